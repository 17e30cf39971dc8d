"""GLIDE (arXiv 2112.10741): caption → picture, and caption and small picture → the same at four times the side.

Both may also take a picture and which of its pixels are known, to fill in the others (section 4.3): x_t is then
followed, channel by channel, by the known pixels, by 1 where they are known, and by the enlarged small picture.
"""

import jax
import jax.numpy as jnp

from unclip_jax.diffusion.corruption import area_downsample, upsample
from unclip_jax.diffusion.masks import random_known
from unclip_jax.models.transformer import TextTransformer
from unclip_jax.models.unet import TextConditioner, UNet, read_context
from unclip_jax.stages.base import Stage, diffusion_loss, draw, output_channels, rounded, to_float, to_uint8


class Glide(Stage):
    """Params {"conditioner", "unet"}. `config.model.factor` is that of the upsampler, or 0; `config.model.inpaint` says
    whether known pixels are taken in."""

    @property
    def images(self):
        return {"image": self.config.model.image_size}

    @property
    def texts(self):
        return {"tokens": ("own", self.config.model.text.context, False)}

    def _unet(self) -> UNet:
        dtype = jnp.dtype(self.config.dtype)
        return UNet(**self.config.model.unet, out_channels=output_channels(self.config, 3), dtype=dtype)

    def _conditioner(self) -> TextConditioner:
        m, dtype = self.config.model, jnp.dtype(self.config.dtype)
        text = TextTransformer(**m.text, remat=m.unet.remat, dtype=dtype)
        return TextConditioner(text=text, emb_width=4 * m.unet.channels)

    def init(self, key):
        m = self.config.model
        key_conditioner, key_unet = jax.random.split(key)
        one = jnp.ones((1,), jnp.int32)
        tokens = jnp.zeros((1, m.text.context), jnp.int32)
        conditioning, conditioner = self._conditioner().init_with_output(key_conditioner, tokens, one)
        channels = 3 + 4 * m.inpaint + 3 * bool(m.factor)
        x = jnp.zeros((1, m.image_size, m.image_size, channels))
        unet = self._unet().init(key_unet, x, one, *conditioning)
        return {"conditioner": conditioner["params"], "unet": unet["params"]}

    def adapt_params(self, params, config):
        """To a model that was not trained to fill in, the known pixels and their mask weigh nothing at first."""
        if config.model.inpaint or not self.config.model.inpaint:
            return params
        first = params["unet"]["conv_in"]
        x_t, low_res = first["kernel"][:, :, :3], first["kernel"][:, :, 3:]
        nothing = jnp.zeros((*x_t.shape[:2], 4, x_t.shape[3]), x_t.dtype)
        kernel = jnp.concatenate([x_t, nothing, low_res], axis=2)
        return params | {"unet": params["unet"] | {"conv_in": first | {"kernel": kernel}}}

    def _extra_channels(self, conditions, shape):
        """The channels that follow x_t of `shape`: known pixels (none, where they are not given), small picture."""
        channels = []
        if self.config.model.inpaint:
            known = conditions["known"] if "known" in conditions else jnp.zeros((*shape[:3], 1), bool)
            image = conditions["known_image"] if "known" in conditions else jnp.zeros(shape)
            channels += [jnp.where(known, image, 0.0), known.astype(jnp.float32)]
        if self.config.model.factor:
            channels.append(upsample(conditions["low_res"], shape[1:3], self.config.model.interpolation))
        return channels

    def _known(self, x0, key):
        """Draws which pixels of pictures (B, R, R, 3) are known, as conditions, where the model takes any."""
        if not self.config.model.inpaint:
            return {}
        return {"known_image": x0, "known": random_known(key, len(x0), x0.shape[1])}

    def apply(self, params, conditioning, extra, x_t, t, **options):
        """The U-Net's output for x_t (B, R, R, 3) at original timesteps t (B,)."""
        x = jnp.concatenate([x_t, *extra], axis=-1)
        return self._unet().apply({"params": params["unet"]}, x, t, *conditioning, **options)

    def condition(self, params, tokens, length):
        """Conditions of the U-Net from captions; length 0 drops one."""
        return self._conditioner().apply({"params": params["conditioner"]}, tokens, length)

    def loss(self, params, frozen, batch, key):
        del frozen
        key_text, key_dropout, key_loss, key_known = jax.random.split(key, 4)
        x0 = to_float(batch["image"])
        conditions = self._known(x0, key_known)
        if self.config.model.factor:
            conditions["low_res"] = area_downsample(x0, self.config.model.factor)
        dropped = jax.random.bernoulli(key_text, self.config.diffusion.drop_caption, x0.shape[:1])
        conditioning = self.condition(params, batch["tokens"], jnp.where(dropped, 0, batch["tokens_length"]))
        extra = self._extra_channels(conditions, x0.shape)

        def network(x_t, t):
            rngs = {"dropout": key_dropout}
            return self.apply(params, conditioning, extra, x_t, t, deterministic=False, rngs=rngs)

        return diffusion_loss(self.config, network, x0, key_loss)

    def sample(self, params, frozen, conditions, key):
        """Pictures (B, R, R, 3) for "tokens" (B, context) and "tokens_length" (B,); with them "guidance_scale" () where
        guided, "low_res" (B, R/factor, R/factor, 3) for an upsampler, and for inpainting "known_image" (B, R, R, 3) and
        "known" (B, R, R, 1) bool. Pictures are in [-1, 1]. The unconditional branch has no caption."""
        del frozen
        size, tokens, length = self.config.model.image_size, conditions["tokens"], conditions["tokens_length"]
        shape = (len(tokens), size, size, 3)
        extra = self._extra_channels(conditions, shape)
        if "guidance_scale" in conditions:
            tokens, length = jnp.concatenate([tokens, tokens]), jnp.concatenate([length, jnp.zeros_like(length)])
            extra = [jnp.concatenate([channel, channel]) for channel in extra]
        conditioning = self.condition(params, tokens, length)
        conditioning = read_context(params["unet"], conditioning, jnp.dtype(self.config.dtype))

        def network(x_t, t):
            return self.apply(params, conditioning, extra, x_t, t)

        return draw(self.config, network, shape, conditions, key, told_known=self.config.model.inpaint)

    def evaluate(self, params, frozen, batch, key):
        """Held-out loss; pictures drawn for the captions, each above the true picture. A model that fills in is given
        some of the pixels, and what it was given stands in between, the rest in gray.

        Guided where the model knows what to draw without a caption: where it was trained to, at times.
        """
        key_loss, key_known, key_draw = jax.random.split(key, 3)
        loss, _ = self.loss(params, frozen, batch, key_loss)
        truth = to_float(batch["image"])
        conditions = {name: batch[name] for name in ("tokens", "tokens_length")} | self._known(truth, key_known)
        if "guidance_scale" in self.config.sampling and self.config.diffusion.drop_caption:
            conditions["guidance_scale"] = jnp.float32(self.config.sampling.guidance_scale)
        if self.config.model.factor:
            conditions["low_res"] = rounded(area_downsample(truth, self.config.model.factor))
        rows = [to_uint8(self.sample(params, frozen, conditions, key_draw)), batch["image"]]
        if "known" in conditions:
            rows.insert(1, to_uint8(jnp.where(conditions["known"], truth, 0.0)))
        return {"loss": loss}, jnp.concatenate(rows, axis=1)
