"""unCLIP's upsamplers: a picture → the same at four times the side (arXiv 2204.06125, section 2.1 and appendix C).

In the paper convolutions only, without caption and guidance: trained on small patches, applied to whole pictures. The
low-resolution input is corrupted a little in training, so that the flaws of the stage before do not throw it off:
blurred here, or degraded by data/bsr.py. Sampling and PSNR take it as it is.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from unclip_jax.arrays import Array, Batch, Key, Params
from unclip_jax.diffusion.corruption import area_downsample, maybe_blur, upsample
from unclip_jax.diffusion.process import Network
from unclip_jax.models.transformer import TextTransformer
from unclip_jax.models.unet import Conditioning, TextConditioner, UNet, read_context
from unclip_jax.stages.base import (
    Metrics,
    Pictures,
    Scalars,
    Stage,
    diffusion_loss,
    draw,
    output_channels,
    rounded,
    to_float,
    to_uint8,
)
from unclip_jax.stages.conditions import Conditions, captions


class Upsampler(Stage):
    """Params of one U-Net whose input is x_t beside the low-resolution picture, upsampled.

    Where `config.model.last_step` is true they are {"first", "last"}: a second U-Net for the last step of sampling (as
    Karlo has), which the loss does not train. Where `config.model.caption` is "own" they are {"conditioner", "unet"}:
    GLIDE's text path, and the rest.
    """

    @property
    def images(self) -> dict[str, int]:
        return {"image": self.config.model.image_size}

    @property
    def patch(self) -> int:
        return self.config.model.patch

    @property
    def texts(self) -> dict[str, tuple[str, int, bool]]:
        return {"tokens": ("own", self.config.model.text.context, False)} if self._reads else {}

    @property
    def guided(self) -> bool:
        return self._reads and self.config.diffusion.drop_caption > 0

    @property
    def _reads(self) -> bool:
        return self.config.model.caption == "own"

    @property
    def bsr_factor(self) -> int | None:
        return self.config.model.factor if self.config.diffusion.degradation == "bsr" else None

    def _unet(self) -> UNet:
        dtype = jnp.dtype(self.config.dtype)
        return UNet(**self.config.model.unet, out_channels=output_channels(self.config, 3), dtype=dtype)

    def conditioner(self) -> TextConditioner:
        """Builds the network that embeds captions, with params["conditioner"], for the U-Net."""
        m, dtype = self.config.model, jnp.dtype(self.config.dtype)
        text = TextTransformer(**m.text, remat=m.unet.remat, dtype=dtype)
        return TextConditioner(text=text, emb_width=4 * m.unet.channels)

    def init(self, key: Key) -> Params:
        m, one = self.config.model, jnp.ones((1,), jnp.int32)
        conditioning, conditioner = (), {}
        if self._reads:
            key_conditioner, key = jax.random.split(key)
            tokens = jnp.zeros((1, m.text.context), jnp.int32)
            conditioning, conditioner = self.conditioner().init_with_output(key_conditioner, tokens, one)
        params = self._unet().init(key, jnp.zeros((1, self.patch, self.patch, 6)), one, *conditioning)["params"]
        params = {"first": params, "last": params} if m.last_step else params
        return {"conditioner": conditioner["params"], "unet": params} if self._reads else params

    def condition(
        self, params: Params, tokens: Int[Array, "B context"] | None, length: Int[Array, " B"] | None
    ) -> Conditioning | None:
        """Computes the U-Net's conditions from captions, where it reads any; length 0 drops one."""
        if not self._reads:
            return None
        return self.conditioner().apply({"params": params["conditioner"]}, tokens, length)

    def _unets(self, params: Params) -> list[Params]:
        """Lists the U-Net's parameters, and after them those of the last step's, if there is one."""
        params = params["unet"] if self._reads else params
        return [params["first"], params["last"]] if self.config.model.last_step else [params]

    def _enlarged(self, low_res: Float[Array, "B h w 3"]) -> Float[Array, "B H W 3"]:
        """Interpolates small pictures to the target's size."""
        height, width = (side * self.config.model.factor for side in low_res.shape[1:3])
        return upsample(low_res, (height, width), self.config.model.interpolation)

    def _blurred(self, images: Float[Array, "B H W 3"], key: Key) -> Float[Array, "B h w 3"]:
        """Makes pictures small, and blurs some of them where that is their degradation."""
        d, small = self.config.diffusion, area_downsample(images, self.config.model.factor)
        return maybe_blur(key, small, d.blur_probability, d.blur_sigma) if d.degradation == "blur" else small

    def loss(
        self, params: Params, frozen: Params, batch: Batch, key: Key, train: bool = True
    ) -> tuple[Float[Array, ""], Metrics]:
        del frozen
        key_blur, key_dropout, key_loss = jax.random.split(key, 3)
        x0, tokens, length = to_float(batch["image"]), batch.get("tokens"), batch.get("tokens_length")
        if self.guided and train:
            dropped = jax.random.bernoulli(jax.random.fold_in(key, 3), self.config.diffusion.drop_caption, length.shape)
            length = jnp.where(dropped, 0, length)
        unet, conditioning = self._unets(params)[0], self.condition(params, tokens, length) or ()
        if not train:
            low_res = area_downsample(x0, self.config.model.factor)
        else:
            low_res = to_float(batch["low_res"]) if self.bsr_factor else self._blurred(x0, key_blur)
        enlarged = self._enlarged(low_res)

        def network(x_t: Array, t: Array) -> Array:
            x, rngs = jnp.concatenate([x_t, enlarged], axis=-1), {"dropout": key_dropout}
            return self._unet().apply({"params": unet}, x, t, *conditioning, deterministic=not train, rngs=rngs)

        return diffusion_loss(self.config, network, x0, key_loss)

    def sample(
        self, params: Params, frozen: Params, conditions: Conditions, key: Key
    ) -> Float[Array, "B H W 3"]:
        """Draws pictures in [-1, 1] at `model.factor` times the sides of `conditions.low_res`, which may be any.

        A model that reads captions is guided where there is a scale: the unconditional branch has no caption.
        """
        del frozen
        enlarged = self._enlarged(conditions.low_res)
        shape, tokens, length = enlarged.shape, conditions.tokens, conditions.tokens_length
        if conditions.guidance_scale is not None:
            tokens, length = jnp.concatenate([tokens, tokens]), jnp.concatenate([length, jnp.zeros_like(length)])
            enlarged = jnp.concatenate([enlarged, enlarged])
        conditioning = self.condition(params, tokens, length)

        def applied(unet: Params) -> Network:
            read = read_context(unet, conditioning, jnp.dtype(self.config.dtype)) if conditioning else ()
            return lambda x_t, t: self._unet().apply(
                {"params": unet}, jnp.concatenate([x_t, enlarged], axis=-1), t, *read
            )

        networks = [applied(unet) for unet in self._unets(params)]

        def network(x_t: Array, t: Array) -> Array:
            return jax.lax.cond(t[0] == 0, networks[-1], networks[0], x_t, t) if networks[1:] else networks[0](x_t, t)

        return draw(self.config, network, shape, conditions, key)

    def draw_examples(self, params: Params, frozen: Params, batch: Batch, keys: Key) -> dict[str, Pictures]:
        """Draws pictures from the true ones made small; "interpolated" are these enlarged without a model."""
        truth = batch["image"]
        small = rounded(area_downsample(to_float(truth), self.config.model.factor))
        conditions = Conditions(**captions(batch), low_res=small, guidance_scale=self.guidance())
        drawn = to_uint8(self.sample(params, frozen, conditions, keys))
        return {"drawn": drawn, "interpolated": to_uint8(self._enlarged(small)), "true": truth}

    def score_examples(self, examples: Mapping[str, Array]) -> Scalars:
        """Measures `psnr` (dB) of the drawn pictures, and `psnr_interpolated`."""

        def psnr(images: Array) -> jax.Array:
            error = jnp.mean(jnp.square(to_float(images) - to_float(examples["true"])), axis=(1, 2, 3))
            return jnp.mean(10 * jnp.log10(4 / jnp.maximum(error, 1e-10)))

        return {"psnr": psnr(examples["drawn"]), "psnr_interpolated": psnr(examples["interpolated"])}
