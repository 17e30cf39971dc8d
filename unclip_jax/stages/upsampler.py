"""unCLIP's upsamplers: a picture → the same at four times the side (arXiv 2204.06125, section 2.1 and appendix C).

Convolutions only, no caption and no guidance: trained on small patches, applied to whole pictures. The low-resolution
input is corrupted a little in training, so that the flaws of the stage before do not throw it off.
"""

import jax
import jax.numpy as jnp

from unclip_jax.diffusion.corruption import area_downsample, maybe_blur, upsample
from unclip_jax.models.unet import UNet
from unclip_jax.stages.base import Stage, diffusion_loss, draw, output_channels, to_float, to_uint8


class Upsampler(Stage):
    """Params of one U-Net whose input is x_t beside the low-resolution picture, upsampled."""

    @property
    def images(self):
        return {"image": self.config.model.image_size}

    @property
    def patch(self):
        return self.config.model.patch

    def _unet(self) -> UNet:
        dtype = jnp.dtype(self.config.dtype)
        return UNet(
            **self.config.model.unet,
            attention=(),
            middle_attention=False,
            head_channels=1,
            out_channels=output_channels(self.config, 3),
            dtype=dtype,
        )

    def init(self, key):
        x = jnp.zeros((1, self.patch, self.patch, 6))
        return self._unet().init(key, x, jnp.ones((1,), jnp.int32))["params"]

    def _enlarged(self, low_res):
        """Float (B, h, w, 3) → the target's size."""
        height, width = (side * self.config.model.factor for side in low_res.shape[1:3])
        return upsample(low_res, (height, width), self.config.model.interpolation)

    def loss(self, params, frozen, batch, key):
        del frozen
        d = self.config.diffusion
        key_blur, key_dropout, key_loss = jax.random.split(key, 3)
        x0 = to_float(batch["image"])
        low_res = maybe_blur(key_blur, area_downsample(x0, self.config.model.factor), d.blur_probability, d.blur_sigma)
        enlarged = self._enlarged(low_res)

        def network(x_t, t):
            x = jnp.concatenate([x_t, enlarged], axis=-1)
            return self._unet().apply({"params": params}, x, t, deterministic=False, rngs={"dropout": key_dropout})

        return diffusion_loss(self.config, network, x0, key_loss)

    def sample(self, params, frozen, conditions, key):
        """uint8 (B, factor·h, factor·w, 3) for {"low_res": uint8 (B, h, w, 3)} of any size."""
        del frozen
        enlarged = self._enlarged(to_float(conditions["low_res"]))

        def network(x_t, t):
            return self._unet().apply({"params": params}, jnp.concatenate([x_t, enlarged], axis=-1), t)

        return to_uint8(draw(self.config, network, enlarged.shape, key))

    def evaluate(self, params, frozen, batch, key):
        """Held-out loss; `psnr` (dB) of pictures drawn from the true ones made small, and `psnr_interpolated` of plain
        interpolation; the drawn, the interpolated and the true picture above each other."""
        loss, _ = self.loss(params, frozen, batch, key)
        truth = batch["image"]
        small = to_uint8(area_downsample(to_float(truth), self.config.model.factor))
        drawn = self.sample(params, frozen, {"low_res": small}, key)
        plain = to_uint8(self._enlarged(to_float(small)))

        def psnr(images):
            error = jnp.mean(jnp.square(to_float(images) - to_float(truth)), axis=(1, 2, 3))
            return jnp.mean(10 * jnp.log10(4 / jnp.maximum(error, 1e-10)))

        metrics = {"loss": loss, "psnr": psnr(drawn), "psnr_interpolated": psnr(plain)}
        return metrics, jnp.concatenate([drawn, plain, truth], axis=1)
