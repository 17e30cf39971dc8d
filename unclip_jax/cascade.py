"""Trained stages chained: caption → prior → decoder → upsamplers (arXiv 2204.06125, figure 2).

A cascade is a folder of bundles: clip/, prior/, decoder/ and, if they are there, upsampler_256/ and upsampler_1024/.
Each arrow is one jitted function of arrays; guidance scales and keys are arguments, so no choice of them compiles anew.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.bundle import check_params, load_bundle
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.errors import UserError
from unclip_jax.stages import Stage, make_stage

UPSAMPLERS = ("upsampler_256", "upsampler_1024")
PRIORS = ("prior_diffusion",)
ROWS = 16  # at most so many pictures at once: bounds memory, and keeps the shapes few


@dataclasses.dataclass(frozen=True)
class Model:
    """One trained stage, ready to be called."""

    stage: Stage
    params: Any
    tokenizer: Tokenizer | None
    identity: str

    @functools.cached_property
    def sample(self):
        """Jitted (params, conditions, key) → what the stage draws."""
        return jax.jit(lambda params, conditions, key: self.stage.sample(params, {}, conditions, key))


class Cascade:
    """The whole system. Pictures are uint8 (N, H, W, 3), embeddings float32 (N, dim) of unit norm."""

    def __init__(self, clip: Model, prior: Model, decoder: Model, upsamplers: list[Model]):
        self.clip, self.prior, self.decoder, self.upsamplers = clip, prior, decoder, upsamplers
        self._embed_texts = jax.jit(clip.stage.embed_texts)
        self._embed_images = jax.jit(clip.stage.embed_images)

    @classmethod
    def load(cls, folder: str) -> "Cascade":
        """Reads a folder of bundles. Raises UserError for what is missing or was trained against another CLIP."""
        root = Path(folder).expanduser()
        if not root.is_dir():
            raise UserError(f"no bundle at {root}: expected a folder with clip/, prior/ and decoder/")
        clip = _load(root / "clip", ("clip",), None)
        prior, decoder = _load(root / "prior", PRIORS, clip), _load(root / "decoder", ("decoder",), clip)
        upsamplers = [root / name for name in UPSAMPLERS if (root / name).exists()]
        return cls(clip, prior, decoder, [_load(path, ("upsampler",), clip) for path in upsamplers])

    def text_embeddings(self, texts: list[str]) -> np.ndarray:
        """CLIP text embeddings."""
        arrays = _tokens(self.clip, texts, self.clip.stage.config.model.text.context, ends=True)
        rows = [self._embed_texts(self.clip.params, *chunk) for chunk in _chunks(*arrays)]
        return np.concatenate(rows)[: len(texts)]

    def image_embeddings(self, images: np.ndarray) -> np.ndarray:
        """CLIP image embeddings of pictures at CLIP's own size."""
        rows = [self._embed_images(self.clip.params, *chunk) for chunk in _chunks(images)]
        return np.concatenate(rows)[: len(images)]

    def embeddings(self, texts: list[str], key, guidance_scale: float | None = None) -> np.ndarray:
        """The prior's image embeddings for captions. guidance_scale: None is the trained config's."""
        arrays = _tokens(self.prior, texts, self.prior.stage.config.model.context, ends=False)
        names = ("tokens", "tokens_length", "text_embedding")
        return self._draw(self.prior, dict(zip(names, (*arrays, self.text_embeddings(texts)), strict=True)), key,
                          guidance_scale)  # fmt: skip

    def decode(self, embeddings: np.ndarray, texts: list[str], key, guidance_scale: float | None = None) -> np.ndarray:
        """The decoder's pictures for image embeddings and captions ("" for none)."""
        tokens, length = _tokens(self.decoder, texts, self.decoder.stage.config.model.text.context, ends=False)
        conditions = {"tokens": tokens, "tokens_length": length, "image_embedding": embeddings}
        return self._draw(self.decoder, conditions, key, guidance_scale)

    def upsample(self, images: np.ndarray, key) -> list[np.ndarray]:
        """The pictures after each upsampler in turn."""
        sizes = []
        for i, model in enumerate(self.upsamplers):
            images = self._draw(model, {"low_res": images}, jax.random.fold_in(key, i))
            sizes.append(images)
        return sizes

    def generate(
        self,
        texts: list[str],
        seed: int,
        guidance_scale: float | None = None,
        prior_guidance_scale: float | None = None,
    ) -> dict[str, Any]:
        """One picture per caption: {"embeddings", "images": list of arrays, the decoder's first, the largest last}."""
        key_prior, key_decoder, key_upsampler = jax.random.split(jax.random.key(seed), 3)
        embeddings = self.embeddings(texts, key_prior, prior_guidance_scale)
        small = self.decode(embeddings, texts, key_decoder, guidance_scale)
        return {"embeddings": embeddings, "images": [small, *self.upsample(small, key_upsampler)]}

    def check_prompts(self, texts: list[str]) -> None:
        """Raises UserError for a prompt that is empty or longer than the models read."""
        limits = {
            "CLIP": (self.clip.tokenizer, self.clip.stage.config.model.text.context - 2),
            "the prior": (self.prior.tokenizer, self.prior.stage.config.model.context),
            "the decoder": (self.decoder.tokenizer, self.decoder.stage.config.model.text.context),
        }
        for text in texts:
            if not text.strip():
                raise UserError("the prompt is empty: say what to draw")
            for name, (tokenizer, limit) in limits.items():
                count = tokenizer.count(text)
                if count > limit:
                    raise UserError(f"the prompt {text[:40]!r}… has {count} tokens: {name} reads {limit}; shorten it")

    def _draw(self, model: Model, conditions: dict[str, np.ndarray], key, guidance_scale: float | None = None):
        names, drawn = list(conditions), []
        for i, rows in enumerate(_chunks(*conditions.values())):
            chunk = dict(zip(names, rows, strict=True))
            if "guidance_scale" in model.stage.config.sampling:
                scale = model.stage.config.sampling.guidance_scale if guidance_scale is None else guidance_scale
                chunk["guidance_scale"] = jnp.float32(scale)
            drawn.append(np.asarray(model.sample(model.params, chunk, jax.random.fold_in(key, i))))
        return np.concatenate(drawn)[: len(next(iter(conditions.values())))]


def _load(folder: Path, stages: tuple[str, ...], clip: Model | None) -> Model:
    bundle = load_bundle(str(folder))
    if bundle.stage not in stages:
        raise UserError(f"{folder} holds a model of stage {bundle.stage!r}: expected {' or '.join(stages)}")
    if bundle.clip_identity and bundle.clip_identity != clip.identity:
        raise UserError(f"{folder} was trained against another CLIP than the one beside it: use the CLIP it knows")
    stage = make_stage(bundle.config, clip.stage if clip else None)
    check_params(bundle.params, jax.eval_shape(stage.init, jax.random.key(0)))
    tokenizer = Tokenizer(bundle.tokenizer_bytes) if bundle.tokenizer_bytes else None
    return Model(stage, jax.device_put(bundle.params), tokenizer, bundle.identity)


def _tokens(model: Model, texts: list[str], context: int, ends: bool):
    return model.tokenizer.encode(texts, context, ends)


def _chunks(*arrays):
    """Rows in chunks of ROWS (fewer where there are fewer in all), the last filled up with its own first row."""
    count = len(arrays[0])
    size = min(count, ROWS)
    for start in range(0, count, size):
        parts = [np.asarray(a[start : start + size]) for a in arrays]
        fill = size - len(parts[0])
        yield [np.concatenate([p, np.repeat(p[:1], fill, axis=0)]) if fill else p for p in parts]
