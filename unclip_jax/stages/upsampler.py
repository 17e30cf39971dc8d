"""unCLIP's upsamplers: a picture → the same at four times the side (arXiv 2204.06125, section 2.1 and appendix C).

Convolutions only, no caption and no guidance: trained on small patches, applied to whole pictures. The low-resolution
input is corrupted a little in training, so that the flaws of the stage before do not throw it off: blurred here, or
degraded by data/bsr.py. Sampling and PSNR take it as it is.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Float

from unclip_jax.arrays import Array, Batch, Key, Params
from unclip_jax.diffusion.corruption import area_downsample, maybe_blur, upsample
from unclip_jax.models.unet import UNet
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
from unclip_jax.stages.conditions import Conditions


class Upsampler(Stage):
    """Params of one U-Net whose input is x_t beside the low-resolution picture, upsampled.

    Where `config.model.last_step` is true they are {"first", "last"}: a second U-Net for the last step of sampling (as
    Karlo has), which the loss does not train.
    """

    @property
    def images(self) -> dict[str, int]:
        return {"image": self.config.model.image_size}

    @property
    def patch(self) -> int:
        return self.config.model.patch

    @property
    def bsr_factor(self) -> int | None:
        return self.config.model.factor if self.config.diffusion.degradation == "bsr" else None

    def _unet(self) -> UNet:
        dtype = jnp.dtype(self.config.dtype)
        return UNet(
            **self.config.model.unet,
            attention=(),
            middle_attention=False,
            head_channels=0,
            heads=(1, 1),
            out_channels=output_channels(self.config, 3),
            dtype=dtype,
        )

    def init(self, key: Key) -> Params:
        x = jnp.zeros((1, self.patch, self.patch, 6))
        params = self._unet().init(key, x, jnp.ones((1,), jnp.int32))["params"]
        return {"first": params, "last": params} if self.config.model.last_step else params

    def _enlarged(self, low_res: Float[Array, "B h w 3"]) -> Float[Array, "B H W 3"]:
        """Interpolates small pictures to the target's size."""
        height, width = (side * self.config.model.factor for side in low_res.shape[1:3])
        return upsample(low_res, (height, width), self.config.model.interpolation)

    def _blurred(self, images: Float[Array, "B H W 3"], key: Key) -> Float[Array, "B h w 3"]:
        """Makes pictures small, and blurs some of them."""
        d = self.config.diffusion
        return maybe_blur(key, area_downsample(images, self.config.model.factor), d.blur_probability, d.blur_sigma)

    def loss(
        self, params: Params, frozen: Params, batch: Batch, key: Key, train: bool = True
    ) -> tuple[Float[Array, ""], Metrics]:
        del frozen
        key_blur, key_dropout, key_loss = jax.random.split(key, 3)
        params = params["first"] if self.config.model.last_step else params
        x0 = to_float(batch["image"])
        if not train:
            low_res = area_downsample(x0, self.config.model.factor)
        else:
            low_res = to_float(batch["low_res"]) if self.bsr_factor else self._blurred(x0, key_blur)
        enlarged = self._enlarged(low_res)

        def network(x_t: Array, t: Array) -> Array:
            x, rngs = jnp.concatenate([x_t, enlarged], axis=-1), {"dropout": key_dropout}
            return self._unet().apply({"params": params}, x, t, deterministic=not train, rngs=rngs)

        return diffusion_loss(self.config, network, x0, key_loss)

    def sample(
        self, params: Params, frozen: Params, conditions: Conditions, key: Key
    ) -> Float[Array, "B H W 3"]:
        """Draws pictures in [-1, 1] at `model.factor` times the sides of `conditions.low_res`, which may be any."""
        del frozen
        enlarged = self._enlarged(conditions.low_res)

        def apply(params: Params, x_t: Array, t: Array) -> Array:
            return self._unet().apply({"params": params}, jnp.concatenate([x_t, enlarged], axis=-1), t)

        def network(x_t: Array, t: Array) -> Array:
            if not self.config.model.last_step:
                return apply(params, x_t, t)
            first, last = (functools.partial(apply, params[name], x_t, t) for name in ("first", "last"))
            return jax.lax.cond(t[0] == 0, last, first)

        return draw(self.config, network, enlarged.shape, conditions, key)

    def draw_examples(self, params: Params, frozen: Params, batch: Batch, keys: Key) -> dict[str, Pictures]:
        """Draws pictures from the true ones made small; "interpolated" are these enlarged without a model."""
        truth = batch["image"]
        small = rounded(area_downsample(to_float(truth), self.config.model.factor))
        drawn = to_uint8(self.sample(params, frozen, Conditions(low_res=small), keys))
        return {"drawn": drawn, "interpolated": to_uint8(self._enlarged(small)), "true": truth}

    def score_examples(self, examples: Mapping[str, Array]) -> Scalars:
        """Measures `psnr` (dB) of the drawn pictures, and `psnr_interpolated`."""

        def psnr(images: Array) -> jax.Array:
            error = jnp.mean(jnp.square(to_float(images) - to_float(examples["true"])), axis=(1, 2, 3))
            return jnp.mean(10 * jnp.log10(4 / jnp.maximum(error, 1e-10)))

        return {"psnr": psnr(examples["drawn"]), "psnr_interpolated": psnr(examples["interpolated"])}
