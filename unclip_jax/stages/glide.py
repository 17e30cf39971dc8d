"""GLIDE (arXiv 2112.10741): caption → picture, and caption and small picture → the same at four times the side.

Both may also take a picture and which of its pixels are known, to fill in the others (section 4.3): x_t is then
followed, channel by channel, by the known pixels, by 1 where they are known, and by the enlarged small picture.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from unclip_jax.arrays import Array, Batch, Key, Params
from unclip_jax.diffusion.corruption import area_downsample, upsample
from unclip_jax.diffusion.masks import random_known
from unclip_jax.keys import split
from unclip_jax.models.transformer import TextTransformer
from unclip_jax.models.unet import Conditioning, TextConditioner, UNet, read_context
from unclip_jax.stages.base import (
    Metrics,
    Pictures,
    Stage,
    diffusion_loss,
    draw,
    output_channels,
    rounded,
    to_float,
    to_uint8,
)
from unclip_jax.stages.conditions import Conditions, captions


class Glide(Stage):
    """GLIDE's base model (`model.factor` 0) or upsampler, with or without known pixels (`model.inpaint`).

    Params {"conditioner", "unet"}.
    """

    adapts = ("model.inpaint",)

    @property
    def images(self) -> dict[str, int]:
        return {"image": self.config.model.image_size}

    @property
    def texts(self) -> dict[str, tuple[str, int, bool]]:
        return {"tokens": ("own", self.config.model.text.context, False)}

    @property
    def guided(self) -> bool:
        return self.config.diffusion.drop_caption > 0

    def _unet(self) -> UNet:
        dtype = jnp.dtype(self.config.dtype)
        return UNet(**self.config.model.unet, out_channels=output_channels(self.config, 3), dtype=dtype)

    def conditioner(self) -> TextConditioner:
        """Builds the network that embeds captions, with params["conditioner"], for the U-Net."""
        m, dtype = self.config.model, jnp.dtype(self.config.dtype)
        text = TextTransformer(**m.text, remat=m.unet.remat, dtype=dtype)
        return TextConditioner(text=text, emb_width=4 * m.unet.channels)

    def init(self, key: Key) -> Params:
        m = self.config.model
        key_conditioner, key_unet = jax.random.split(key)
        one = jnp.ones((1,), jnp.int32)
        tokens = jnp.zeros((1, m.text.context), jnp.int32)
        conditioning, conditioner = self.conditioner().init_with_output(key_conditioner, tokens, one)
        channels = 3 + 4 * m.inpaint + 3 * bool(m.factor)
        x = jnp.zeros((1, m.image_size, m.image_size, channels))
        unet = self._unet().init(key_unet, x, one, *conditioning)
        return {"conditioner": conditioner["params"], "unet": unet["params"]}

    def adapt_params(self, params: Params, config: ConfigDict) -> Params:
        """Adds input channels for known pixels and their mask, with zero weights, to a model trained without them."""
        if config.model.inpaint or not self.config.model.inpaint:
            return params
        first = params["unet"]["conv_in"]
        x_t, low_res = first["kernel"][:, :, :3], first["kernel"][:, :, 3:]
        nothing = jnp.zeros((*x_t.shape[:2], 4, x_t.shape[3]), x_t.dtype)
        kernel = jnp.concatenate([x_t, nothing, low_res], axis=2)
        return params | {"unet": params["unet"] | {"conv_in": first | {"kernel": kernel}}}

    def _extra_channels(self, conditions: Conditions, shape: tuple[int, ...]) -> list[Array]:
        """Makes the channels that follow x_t of `shape`: known pixels and their mask (all zero where none are given),
        then the enlarged small picture."""
        channels: list[Array] = []
        if self.config.model.inpaint:
            known, image = conditions.known, conditions.known_image
            if known is None:
                known, image = jnp.zeros((*shape[:3], 1), bool), jnp.zeros(shape)
            channels += [jnp.where(known, image, 0.0), known.astype(jnp.float32)]
        if self.config.model.factor:
            channels.append(upsample(conditions.low_res, (shape[1], shape[2]), self.config.model.interpolation))
        return channels

    def _erase(self, conditions: Conditions, x0: Float[Array, "B R R 3"], key: Key) -> Conditions:
        """Draws which pixels of true pictures are known, where the model takes any."""
        if not self.config.model.inpaint:
            return conditions
        return conditions._replace(known_image=x0, known=random_known(key, len(x0), x0.shape[1]))

    def apply(
        self,
        params: Params,
        conditioning: Conditioning,
        extra: list[Array],
        x_t: Float[Array, "B R R 3"],
        t: Int[Array, " B"],
        **options: Any,
    ) -> Float[Array, "B R R C"]:
        """Applies the U-Net to x_t and its extra channels at original timesteps t. options: of `UNet.apply`."""
        x = jnp.concatenate([x_t, *extra], axis=-1)
        return self._unet().apply({"params": params["unet"]}, x, t, *conditioning, **options)

    def condition(
        self, params: Params, tokens: Int[Array, "B context"], length: Int[Array, " B"]
    ) -> Conditioning:
        """Computes the U-Net's conditions from captions; length 0 drops one."""
        return self.conditioner().apply({"params": params["conditioner"]}, tokens, length)

    def loss(
        self, params: Params, frozen: Params, batch: Batch, key: Key, train: bool = True
    ) -> tuple[Float[Array, ""], Metrics]:
        del frozen
        key_text, key_dropout, key_loss, key_known = jax.random.split(key, 4)
        x0 = to_float(batch["image"])
        conditions = self._erase(Conditions(), x0, key_known)
        if self.config.model.factor:
            conditions = conditions._replace(low_res=area_downsample(x0, self.config.model.factor))
        dropped = jax.random.bernoulli(key_text, self.config.diffusion.drop_caption if train else 0.0, x0.shape[:1])
        conditioning = self.condition(params, batch["tokens"], jnp.where(dropped, 0, batch["tokens_length"]))
        extra = self._extra_channels(conditions, x0.shape)

        def network(x_t: Array, t: Array) -> Array:
            rngs = {"dropout": key_dropout}
            return self.apply(params, conditioning, extra, x_t, t, deterministic=not train, rngs=rngs)

        return diffusion_loss(self.config, network, x0, key_loss)

    def sample(
        self, params: Params, frozen: Params, conditions: Conditions, key: Key
    ) -> Float[Array, "B R R 3"]:
        """Draws pictures in [-1, 1] for captions, guided where there is a scale: the unconditional branch has no
        caption. An upsampler needs `low_res`.

        A model that was trained to inpaint sees the known pixels, unless `config.sampling` has a key "implicit", as by
        `Model.sampled_by(implicit=True)`: it sees none then, and they are put back after each step (section 4.3).
        """
        del frozen
        size, tokens, length = self.config.model.image_size, conditions.tokens, conditions.tokens_length
        shape = (len(tokens), size, size, 3)
        told = self.config.model.inpaint and "implicit" not in self.config.sampling
        seen = conditions if told else conditions._replace(known=None, known_image=None)
        extra = self._extra_channels(seen, shape)
        if conditions.guidance_scale is not None:
            tokens, length = jnp.concatenate([tokens, tokens]), jnp.concatenate([length, jnp.zeros_like(length)])
            extra = [jnp.concatenate([channel, channel]) for channel in extra]
        conditioning = self.condition(params, tokens, length)
        conditioning = read_context(params["unet"], conditioning, jnp.dtype(self.config.dtype))

        def network(x_t: Array, t: Array) -> Array:
            return self.apply(params, conditioning, extra, x_t, t)

        return draw(self.config, network, shape, conditions, key, network_inpaints=told)

    def draw_examples(self, params: Params, frozen: Params, batch: Batch, keys: Key) -> dict[str, Pictures]:
        """Draws pictures for the captions. Where the model inpaints, "known" are the pixels that it was given, the rest
        in gray.

        Guided only where captions were dropped in training: else there is no unconditional model.
        """
        key_known, key_draw = split(keys)
        truth = to_float(batch["image"])
        conditions = self._erase(Conditions(**captions(batch), guidance_scale=self.guidance()), truth, key_known)
        if self.config.model.factor:
            conditions = conditions._replace(low_res=rounded(area_downsample(truth, self.config.model.factor)))
        examples = {"drawn": to_uint8(self.sample(params, frozen, conditions, key_draw))}
        if conditions.known is not None:
            examples["known"] = to_uint8(jnp.where(conditions.known, truth, 0.0))
        return examples | {"true": batch["image"]}
