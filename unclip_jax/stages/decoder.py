"""unCLIP's decoder: CLIP image embedding and caption → picture (arXiv 2204.06125, section 2.1)."""

import jax
import jax.numpy as jnp

from unclip_jax.models.transformer import TextTransformer
from unclip_jax.models.unet import ClipConditioner, Conditioner, UNet, read_context
from unclip_jax.stages.base import (
    Stage,
    diffusion_loss,
    draw,
    empty_caption,
    invert,
    output_channels,
    to_float,
    to_uint8,
)


class Decoder(Stage):
    """Params {"conditioner", "unet"}. The embedding and the caption are dropped independently of each other; where
    one is dropped it reaches the network on no path.

    `config.model.caption` says who reads the caption: "own", a text path of the decoder's; "clip", CLIP's text tower.
    """

    needs_clip = True

    @property
    def images(self):
        clip = {} if self.embedded else {"clip_image": self.clip.config.model.image_size}
        return {"image": self.config.model.image_size} | clip

    @property
    def vectors(self):
        return {"image_embedding": self.clip.dim} if self.embedded else {}

    @property
    def texts(self):
        if self._own_text:
            return {"tokens": ("own", self.config.model.text.context, False)}
        return {"clip_tokens": ("clip", self.clip.config.model.text.context, True)}

    @property
    def _own_text(self) -> bool:
        return self.config.model.caption == "own"

    def _unet(self) -> UNet:
        dtype = jnp.dtype(self.config.dtype)
        return UNet(**self.config.model.unet, out_channels=output_channels(self.config, 3), dtype=dtype)

    def _conditioner(self) -> Conditioner | ClipConditioner:
        m, dtype = self.config.model, jnp.dtype(self.config.dtype)
        shared = {
            "emb_width": 4 * m.unet.channels,
            "image_tokens": m.image_tokens,
            "learned_null": m.learned_null,
            "dtype": dtype,
        }
        if self._own_text:
            return Conditioner(text=TextTransformer(**m.text, remat=m.unet.remat, dtype=dtype), **shared)
        return ClipConditioner(width=m.text.width, **shared)

    def init(self, key):
        m = self.config.model
        key_conditioner, key_unet = jax.random.split(key)
        one, z = jnp.ones((1,), jnp.int32), jnp.zeros((1, m.embedding_dim))
        if self._own_text:
            caption = (jnp.zeros((1, m.text.context), jnp.int32), one)
        else:
            text = self.clip.config.model.text
            caption = (jnp.zeros((1, text.context, text.width)), one, z)
        conditioning, conditioner = self._conditioner().init_with_output(key_conditioner, *caption, z, one > 0)
        x = jnp.zeros((1, m.image_size, m.image_size, 3))
        unet = self._unet().init(key_unet, x, one, *conditioning)
        return {"conditioner": conditioner["params"], "unet": unet["params"]}

    def condition(self, params, frozen, captions, has_caption, image_embedding, has_embedding):
        """Conditions of the U-Net besides x_t and t.

        captions: the arrays that `texts` names; has_caption, has_embedding (B,) bool, False where dropped;
        image_embedding (B, dim).
        """
        if self._own_text:
            caption = captions["tokens"], jnp.where(has_caption, captions["tokens_length"], 0)
        else:
            tokens, length = captions["clip_tokens"], captions["clip_tokens_length"]
            nothing, no_length = empty_caption(tokens, length)
            tokens, length = jnp.where(has_caption[:, None], tokens, nothing), jnp.where(has_caption, length, no_length)
            text_embedding, states = self.clip.read_texts(frozen, tokens, length)
            caption = states, length, text_embedding
        variables = {"params": params["conditioner"]}
        return self._conditioner().apply(variables, *caption, image_embedding, has_embedding)

    def embeddings(self, frozen, batch):
        """CLIP's z_i of a batch, (B, dim)."""
        return batch["image_embedding"] if self.embedded else self.clip.embed_images(frozen, batch["clip_image"])

    def loss(self, params, frozen, batch, key):
        d = self.config.diffusion
        z_i = self.embeddings(frozen, batch)
        key_z, key_text, key_dropout, key_loss = jax.random.split(key, 4)
        has_embedding = ~jax.random.bernoulli(key_z, d.drop_embedding, z_i.shape[:1])
        has_caption = ~jax.random.bernoulli(key_text, d.drop_caption, z_i.shape[:1])
        conditioning = self.condition(params, frozen, batch, has_caption, z_i, has_embedding)

        def network(x_t, t):
            variables, rngs = {"params": params["unet"]}, {"dropout": key_dropout}
            return self._unet().apply(variables, x_t, t, *conditioning, deterministic=False, rngs=rngs)

        return diffusion_loss(self.config, network, to_float(batch["image"]), key_loss)

    def sample(self, params, frozen, conditions, key):
        """Pictures (B, R, R, 3) for the captions that `texts` names (with their lengths), "image_embedding" (B, dim)
        and "guidance_scale" (). The unconditional branch has neither embedding nor caption."""
        rows = len(conditions["image_embedding"])
        has = jnp.arange(2 * rows) < rows
        captions = {k: jnp.concatenate([v, v]) for k, v in conditions.items() if "tokens" in k}
        z_i = jnp.concatenate([conditions["image_embedding"]] * 2)
        conditioning = self.condition(params, frozen, captions, has, z_i, has)
        conditioning = read_context(params["unet"], conditioning, jnp.dtype(self.config.dtype))

        def network(x_t, t):
            return self._unet().apply({"params": params["unet"]}, x_t, t, *conditioning)

        size = self.config.model.image_size
        return draw(self.config, network, (rows, size, size, 3), conditions, key)

    def invert(self, params, frozen, conditions, images):
        """x_T (B, R, R, 3) from which `sample` by DDIM draws `images` (B, R, R, 3), in [-1, 1], again, under the same
        captions and embeddings, unguided and unclipped (arXiv 2204.06125, section 3)."""
        yes = jnp.ones(len(images), bool)
        conditioning = self.condition(params, frozen, conditions, yes, conditions["image_embedding"], yes)
        conditioning = read_context(params["unet"], conditioning, jnp.dtype(self.config.dtype))

        def network(x_t, t):
            return self._unet().apply({"params": params["unet"]}, x_t, t, *conditioning)

        return invert(self.config, network, images)

    def evaluate(self, params, frozen, batch, key):
        """Held-out loss; pictures drawn from the true embeddings and captions, each above the true picture."""
        loss, _ = self.loss(params, frozen, batch, key)
        conditions = {k: v for k, v in batch.items() if "tokens" in k} | {
            "image_embedding": self.embeddings(frozen, batch),
            "guidance_scale": jnp.float32(self.config.sampling.guidance_scale),
        }
        drawn = to_uint8(self.sample(params, frozen, conditions, key))
        return {"loss": loss}, jnp.concatenate([drawn, batch["image"]], axis=1)
