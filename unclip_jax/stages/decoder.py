"""unCLIP's decoder: CLIP image embedding and caption → picture (arXiv 2204.06125, section 2.1)."""

import jax
import jax.numpy as jnp

from unclip_jax.models.transformer import TextTransformer
from unclip_jax.models.unet import Conditioner, UNet
from unclip_jax.stages.base import Stage, diffusion_loss, draw, output_channels, to_float, to_uint8


class Decoder(Stage):
    """Params {"conditioner", "unet"}. The embedding and the caption are dropped independently of each other; where
    one is dropped it reaches the network on no path."""

    needs_clip = True

    @property
    def images(self):
        return {"image": self.config.model.image_size, "clip_image": self.clip.config.model.image_size}

    @property
    def texts(self):
        return {"tokens": ("own", self.config.model.text.context, False)}

    def _unet(self) -> UNet:
        dtype = jnp.dtype(self.config.dtype)
        return UNet(**self.config.model.unet, out_channels=output_channels(self.config, 3), dtype=dtype)

    def _conditioner(self) -> Conditioner:
        m, dtype = self.config.model, jnp.dtype(self.config.dtype)
        return Conditioner(
            text=TextTransformer(**m.text, remat=m.unet.remat, dtype=dtype),
            emb_width=4 * m.unet.channels,
            image_tokens=m.image_tokens,
            learned_null=m.learned_null,
            dtype=dtype,
        )

    def init(self, key):
        m = self.config.model
        key_conditioner, key_unet = jax.random.split(key)
        one = jnp.ones((1,), jnp.int32)
        inputs = (jnp.zeros((1, m.text.context), jnp.int32), one, jnp.zeros((1, m.embedding_dim)), one > 0)
        conditioning, conditioner = self._conditioner().init_with_output(key_conditioner, *inputs)
        x = jnp.zeros((1, m.image_size, m.image_size, 3))
        unet = self._unet().init(key_unet, x, one, *conditioning)
        return {"conditioner": conditioner["params"], "unet": unet["params"]}

    def condition(self, params, tokens, length, image_embedding, has_embedding):
        """What the U-Net is told besides x_t and t; see `models.unet.Conditioner`."""
        variables = {"params": params["conditioner"]}
        return self._conditioner().apply(variables, tokens, length, image_embedding, has_embedding)

    def loss(self, params, frozen, batch, key):
        d = self.config.diffusion
        z_i = self.clip.embed_images(frozen, batch["clip_image"])
        key_z, key_text, key_dropout, key_loss = jax.random.split(key, 4)
        has_embedding = ~jax.random.bernoulli(key_z, d.drop_embedding, z_i.shape[:1])
        has_caption = ~jax.random.bernoulli(key_text, d.drop_caption, z_i.shape[:1])
        length = jnp.where(has_caption, batch["tokens_length"], 0)
        conditioning = self.condition(params, batch["tokens"], length, z_i, has_embedding)

        def network(x_t, t):
            variables, rngs = {"params": params["unet"]}, {"dropout": key_dropout}
            return self._unet().apply(variables, x_t, t, *conditioning, deterministic=False, rngs=rngs)

        return diffusion_loss(self.config, network, to_float(batch["image"]), key_loss)

    def sample(self, params, frozen, conditions, key):
        """uint8 (B, R, R, 3) for {"tokens" (B, context), "tokens_length" (B,), "image_embedding" (B, dim) of unit norm,
        "guidance_scale" ()}. The unconditional branch has neither embedding nor caption."""
        del frozen
        tokens, length, z_i = (conditions[name] for name in ("tokens", "tokens_length", "image_embedding"))
        rows = len(z_i)
        has = jnp.arange(2 * rows) < rows
        both = [jnp.concatenate([v, v]) for v in (tokens, length, z_i)]
        conditioning = self.condition(params, both[0], jnp.where(has, both[1], 0), both[2], has)

        def network(x_t, t):
            return self._unet().apply({"params": params["unet"]}, x_t, t, *conditioning)

        size = self.config.model.image_size
        return to_uint8(draw(self.config, network, (rows, size, size, 3), key, conditions["guidance_scale"]))

    def evaluate(self, params, frozen, batch, key):
        """Held-out loss; pictures drawn from the true embeddings and captions, each above the true picture."""
        loss, _ = self.loss(params, frozen, batch, key)
        conditions = {
            "tokens": batch["tokens"],
            "tokens_length": batch["tokens_length"],
            "image_embedding": self.clip.embed_images(frozen, batch["clip_image"]),
            "guidance_scale": jnp.float32(self.config.sampling.guidance_scale),
        }
        drawn = self.sample(params, frozen, conditions, key)
        return {"loss": loss}, jnp.concatenate([drawn, batch["image"]], axis=1)
