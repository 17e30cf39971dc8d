"""unCLIP's decoder: CLIP embedding and caption → picture (arXiv 2204.06125, section 2.1)."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from unclip_jax.arrays import Array, Batch, Key, Params
from unclip_jax.diffusion.process import Network
from unclip_jax.models.transformer import TextTransformer
from unclip_jax.models.unet import ClipConditioner, Conditioner, Conditioning, UNet, read_context
from unclip_jax.stages.base import (
    ClipTowers,
    Metrics,
    Pictures,
    Stage,
    clip_image,
    diffusion_loss,
    draw,
    empty_caption,
    invert,
    output_channels,
    to_float,
    to_uint8,
)
from unclip_jax.stages.conditions import Conditions, captions


class Decoder(Stage):
    """Params {"conditioner", "unet"}. The embedding and the caption are dropped independently of each other; where
    one is dropped it reaches the network on no path.

    `config.model.caption` says who reads the caption: "own", a text path of the decoder's; "clip", CLIP's text tower.
    `config.model.embedding` says what it learns to draw: "image", the picture's embedding z_i, which a prior makes in
    sampling; "text", z_t of the caption, which needs no prior (section 5.1 measures what one is for).
    """

    clip: ClipTowers
    needs_clip = True

    @property
    def images(self) -> dict[str, int]:
        sees = self.config.model.embedding == "image" and not self.embedded
        return {"image": self.config.model.image_size} | (clip_image(self.clip) if sees else {})

    @property
    def vectors(self) -> dict[str, int]:
        return {f"{self.config.model.embedding}_embedding": self.clip.dim} if self.embedded else {}

    @property
    def texts(self) -> dict[str, tuple[str, int, bool]]:
        m = self.config.model
        own = {"tokens": ("own", m.text.context, False)} if self._own_text else {}
        if own and (m.embedding == "image" or self.embedded):
            return own
        return own | {"clip_tokens": ("clip", self.clip.config.model.text.context, True)}

    @property
    def _own_text(self) -> bool:
        return self.config.model.caption == "own"

    def _unet(self) -> UNet:
        dtype = jnp.dtype(self.config.dtype)
        return UNet(**self.config.model.unet, out_channels=output_channels(self.config, 3), dtype=dtype)

    def conditioner(self) -> Conditioner | ClipConditioner:
        """Builds the network that embeds CLIP embeddings and captions, with params["conditioner"], for the U-Net."""
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

    def init(self, key: Key) -> Params:
        m = self.config.model
        key_conditioner, key_unet = jax.random.split(key)
        caption: tuple[Array, ...]
        one, z = jnp.ones((1,), jnp.int32), jnp.zeros((1, m.embedding_dim))
        if self._own_text:
            caption = (jnp.zeros((1, m.text.context), jnp.int32), one)
        else:
            text = self.clip.config.model.text
            caption = (jnp.zeros((1, text.context, text.width)), one, z)
        conditioning, conditioner = self.conditioner().init_with_output(key_conditioner, *caption, z, one > 0)
        x = jnp.zeros((1, m.image_size, m.image_size, 3))
        unet = self._unet().init(key_unet, x, one, *conditioning)
        return {"conditioner": conditioner["params"], "unet": unet["params"]}

    def condition(
        self,
        params: Params,
        frozen: Params,
        captions: Batch,
        has_caption: Bool[Array, " B"],
        image_embedding: Float[Array, "B dim"],
        has_embedding: Bool[Array, " B"],
    ) -> Conditioning:
        """Computes the U-Net's inputs besides x_t and t; a caption or an embedding is dropped where its `has_…` is
        False. captions: arrays that `texts` names. image_embedding: that which `embeddings` gives, or one like it."""
        caption: tuple[Array, ...]
        if self._own_text:
            caption = captions["tokens"], jnp.where(has_caption, captions["tokens_length"], 0)
        else:
            tokens, length = captions["clip_tokens"], captions["clip_tokens_length"]
            nothing, no_length = empty_caption(tokens, length)
            tokens, length = jnp.where(has_caption[:, None], tokens, nothing), jnp.where(has_caption, length, no_length)
            text_embedding, states = self.clip.embed_texts_with_states(frozen, tokens, length)
            caption = states, length, text_embedding
        variables = {"params": params["conditioner"]}
        return self.conditioner().apply(variables, *caption, image_embedding, has_embedding)

    def embeddings(self, frozen: Params, batch: Batch) -> Float[Array, "B dim"]:
        """Reads or computes CLIP's embeddings of a batch: of the pictures or, by `model.embedding`, of the captions."""
        if self.embedded:
            return batch[f"{self.config.model.embedding}_embedding"]
        if self.config.model.embedding == "text":
            return self.clip.embed_texts(frozen, batch["clip_tokens"], batch["clip_tokens_length"])
        return self.clip.embed_images(frozen, batch["clip_image"])

    def loss(
        self, params: Params, frozen: Params, batch: Batch, key: Key, train: bool = True
    ) -> tuple[Float[Array, ""], Metrics]:
        d = self.config.diffusion
        z = self.embeddings(frozen, batch)
        key_z, key_text, key_dropout, key_loss = jax.random.split(key, 4)
        has_embedding = ~jax.random.bernoulli(key_z, d.drop_embedding if train else 0.0, z.shape[:1])
        has_caption = ~jax.random.bernoulli(key_text, d.drop_caption if train else 0.0, z.shape[:1])
        conditioning = self.condition(params, frozen, batch, has_caption, z, has_embedding)

        def network(x_t: Array, t: Array) -> Array:
            variables, rngs = {"params": params["unet"]}, {"dropout": key_dropout}
            return self._unet().apply(variables, x_t, t, *conditioning, deterministic=not train, rngs=rngs)

        return diffusion_loss(self.config, network, to_float(batch["image"]), key_loss)

    def sample(
        self, params: Params, frozen: Params, conditions: Conditions, key: Key
    ) -> Float[Array, "B R R 3"]:
        """Draws pictures in [-1, 1] for captions, embeddings and a guidance scale. The unconditional branch has neither
        embedding nor caption, and without `image_embedding` the conditional one has the caption alone."""
        times = conditions.branches
        repeated = {name: jnp.concatenate([array] * times) for name, array in captions(conditions).items()}
        total = len(next(iter(repeated.values())))
        rows = total // times
        has, z = jnp.arange(total) < rows, conditions.image_embedding
        given = (jnp.zeros((total, self.clip.dim)), has & False) if z is None else (jnp.tile(z, (times, 1)), has)
        network = self._network(params, self.condition(params, frozen, repeated, has, *given))
        size = self.config.model.image_size
        return draw(self.config, network, (rows, size, size, 3), conditions, key)

    def invert(
        self, params: Params, frozen: Params, conditions: Conditions, images: Float[Array, "B R R 3"]
    ) -> Float[Array, "B R R 3"]:
        """DDIM-inverts pictures in [-1, 1] to the x_T from which `sample` by DDIM draws them again, under the same
        captions and embeddings, unguided and unclipped (arXiv 2204.06125, section 3)."""
        yes = jnp.ones(len(images), bool)
        given = captions(conditions), yes, conditions.image_embedding, yes
        return invert(self.config, self._network(params, self.condition(params, frozen, *given)), images)

    def _network(self, params: Params, conditioning: Conditioning) -> Network:
        """The U-Net under fixed conditions, for drawing: no dropout, and the context is read once for all steps."""
        conditioning = read_context(params["unet"], conditioning, jnp.dtype(self.config.dtype))
        return lambda x_t, t: self._unet().apply({"params": params["unet"]}, x_t, t, *conditioning)

    def draw_examples(self, params: Params, frozen: Params, batch: Batch, keys: Key) -> dict[str, Pictures]:
        """Draws pictures from the embeddings that it learns from and the captions."""
        conditions = Conditions(
            **captions(batch),
            image_embedding=self.embeddings(frozen, batch),
            guidance_scale=self.guidance(),
        )
        return {"drawn": to_uint8(self.sample(params, frozen, conditions, keys)), "true": batch["image"]}
