"""Makes the GLIDE with which the shipped one begins: the decoder's U-Net, and a text path in place of its embedding.

A U-Net teaches captions to a text path only slowly. So a new text path learns first, without the U-Net, what conditions
the decoder makes of the CLIP embeddings of a caption's pictures: the sum that joins the timestep's embedding, and the
tokens that are made of the embedding, in the last places of the context. The least squared error finds their mean over
the pictures. Then make.py trains the whole, as GLIDE is trained.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from unclip_jax.arrays import Params
from unclip_jax.bundle import Bundle, save_bundle
from unclip_jax.cascade import Cascade
from unclip_jax.data import emoji_scenes, varied_scenes
from unclip_jax.stages import make_stage
from unclip_jax.training.optimizer import make_optimizer

VARIED = 16_384  # scenes to learn from, besides all of one object
REPEATED = 8  # how often those of one object are seen for each time that a varied one is
BATCH = 128
STEPS = 800
WARMUP = 50
LEARNING_RATE = 3e-3
DROPPED = 0.1  # share of captions and embeddings that are left out


def store(folder: Path, config: ConfigDict, decoder: Bundle) -> None:
    """Trains the text path and stores a GLIDE, by its config, with the decoder's U-Net, as a bundle in the folder."""
    cascade = Cascade.load()
    captions, embeddings = scenes(cascade)
    tokens = cascade.decoder.tokenizer.encode(captions, config.model.text.context, ends=False)
    params = trained(config, decoder, tokens, embeddings)
    save_bundle(folder, "glide", config, params, decoder.tokenizer_bytes, "", {})


def scenes(cascade: Cascade) -> tuple[list[str], np.ndarray]:
    """Returns captions of training scenes and the CLIP embeddings of their pictures, (N, dim)."""
    single = list(emoji_scenes.scenes("single", "train"))
    varied = [varied_scenes.scene_at("train", index) for index in range(VARIED)]
    captions = [caption for _, caption in single] + [caption for _, _, caption in varied]
    pictures = [emoji_scenes.render(scene, varied_scenes.FRAME) for scene, _ in single]
    pictures += [varied_scenes.render(scene, varied_scenes.FRAME) for scene, _, _ in varied]
    print(f"embedding {len(pictures):,} pictures", file=sys.stderr, flush=True)
    embeddings = cascade.image_embeddings(pictures)
    often = np.r_[np.tile(np.arange(len(single)), REPEATED), np.arange(len(single), len(captions))]
    return [captions[i] for i in often], embeddings[often]


def trained(
    config: ConfigDict, decoder: Bundle, tokens: tuple[np.ndarray, np.ndarray], embeddings: np.ndarray
) -> Params:
    """Trains a GLIDE's text path to give the decoder's conditions, and returns the GLIDE's params.

    tokens: of N captions, with their lengths. embeddings: of their pictures, (N, dim).
    """
    teacher, student = (make_stage(c).conditioner() for c in (decoder.config, config))
    given = decoder.params["conditioner"]
    params = make_stage(config).init(jax.random.key(0))["conditioner"]
    optim = config.optim.copy_and_resolve_references().unlock()
    optim.learning_rate, optim.warmup_steps = LEARNING_RATE, WARMUP
    optimizer = make_optimizer(optim, STEPS)
    count = decoder.config.model.image_tokens

    @jax.jit
    def step(number, params, state, tokens, length, embeddings, kept):
        length = jnp.where(kept, length, 0)
        expected = teacher.apply({"params": given}, tokens, length, embeddings, kept)
        aims = expected.emb, expected.context[:, -count:]

        def loss(params):
            found = student.apply({"params": params}, tokens, length)
            pairs = zip((found.emb, found.context[:, -count:]), aims, strict=True)
            return sum(jnp.mean((a - b) ** 2) / jnp.mean(jnp.var(b, axis=0)) for a, b in pairs)

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params, step=number)
        return optax.apply_updates(params, updates), state, value

    rng, state, total = np.random.default_rng(0), optimizer.init(params), 0.0
    for number in range(STEPS):
        rows, kept = rng.integers(len(embeddings), size=BATCH), rng.random(BATCH) >= DROPPED
        batch = tokens[0][rows], tokens[1][rows], embeddings[rows], kept
        params, state, value = step(np.int32(number), params, state, *batch)
        total += float(value)
        if not (number + 1) % 100:
            print(f"text path: step {number + 1}/{STEPS}, unexplained {total / 200:.3f}", file=sys.stderr, flush=True)
            total = 0.0
    return {"conditioner": params, "unet": decoder.params["unet"]}
