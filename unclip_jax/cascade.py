"""Trained stages chained: caption → prior → decoder → upsamplers (unCLIP, arXiv 2204.06125, figure 2; GLIDE's chain,
2112.10741, is caption → decoder → upsampler).

A cascade is a folder of bundles: decoder/, beside it clip/ and prior/ where the decoder draws CLIP embeddings, and, if
they are there, upsampler_256/ and upsampler_1024/. Each arrow is one jitted function of arrays; guidance scales and
keys are arguments, so no choice of them compiles anew.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.bundle import check_params, load_bundle, load_description
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.data.transforms import center_square
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
        """Jitted (params, frozen, conditions, key) → what the stage draws."""
        return jax.jit(self.stage.sample)


class Cascade:
    """The whole system. Pictures are uint8 (N, H, W, 3), embeddings float32 (N, dim) of unit norm where the CLIP's are.

    A cascade without a prior draws pictures for embeddings alone, one without a CLIP for captions alone.
    """

    def __init__(self, clip: Model | None, prior: Model | None, decoder: Model, upsamplers: list[Model]):
        self.clip, self.prior, self.decoder, self.upsamplers = clip, prior, decoder, upsamplers
        if clip:
            self._embed_texts = jax.jit(clip.stage.embed_texts)
            self._embed_images = jax.jit(clip.stage.embed_images)

    @classmethod
    def load(cls, folder: str) -> "Cascade":
        """Reads a folder of bundles. Raises UserError for what is missing or was trained against another CLIP."""
        root = Path(folder).expanduser()
        if not root.is_dir():
            raise UserError(f"no bundle at {root}: expected a folder with decoder/ and what it needs")
        clip = prior = None
        if load_description(root / "decoder")["stage"] == "decoder":
            clip = _load(root / "clip", ("clip",), None)
            prior = _load(root / "prior", PRIORS, clip) if (root / "prior").exists() else None
        decoder = _load(root / "decoder", ("decoder", "glide"), clip)
        upsamplers = [root / name for name in UPSAMPLERS if (root / name).exists()]
        return cls(clip, prior, decoder, [_load(path, ("upsampler", "glide"), clip) for path in upsamplers])

    def text_embeddings(self, texts: list[str]) -> np.ndarray:
        """CLIP text embeddings."""
        arrays = self.clip.tokenizer.encode(texts, self.clip.stage.config.model.text.context, ends=True)
        rows = [self._embed_texts(self.clip.params, *chunk) for chunk in _chunks(*arrays)]
        return np.concatenate(rows)[: len(texts)]

    def image_embeddings(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """CLIP image embeddings of pictures, uint8 (H, W, 3) of any size: the square in their middle is looked at."""
        m = self.clip.stage.config.model
        squares = np.stack([center_square(image, m.image_size, m.resize) for image in images])
        rows = [self._embed_images(self.clip.params, *chunk) for chunk in _chunks(squares)]
        return np.concatenate(rows)[: len(squares)]

    def embeddings(self, texts: list[str], key, guidance_scale: float | None = None) -> np.ndarray:
        """The prior's image embeddings for captions. guidance_scale: None is the trained config's."""
        self._check_prior()
        conditions = self._captions(self.prior, texts) | {"text_embedding": self.text_embeddings(texts)}
        return self._draw(self.prior, conditions, key, guidance_scale)

    def decode(
        self, embeddings: np.ndarray | None, texts: list[str], key, guidance_scale: float | None = None
    ) -> np.ndarray:
        """The decoder's pictures for image embeddings (None: GLIDE takes none) and captions ("" for none)."""
        return _to_uint8(self._decode(embeddings, texts, key, guidance_scale))

    def upsample(self, images: np.ndarray, texts: list[str], key) -> list[np.ndarray]:
        """The pictures after each upsampler in turn. texts: read by GLIDE's alone."""
        return [_to_uint8(larger) for larger in self._upsample(_to_float(images), texts, key)]

    def generate(
        self,
        texts: list[str],
        seed: int,
        guidance_scale: float | None = None,
        prior_guidance_scale: float | None = None,
    ) -> dict[str, Any]:
        """One picture per caption: {"embeddings" (None of GLIDE), "images": list of arrays, the decoder's first, the
        largest last}."""
        key_prior, key_decoder, key_upsampler = jax.random.split(jax.random.key(seed), 3)
        embeddings = self.embeddings(texts, key_prior, prior_guidance_scale) if self.clip else None
        small = self._decode(embeddings, texts, key_decoder, guidance_scale)
        larger = self._upsample(small, texts, key_upsampler)
        return {"embeddings": embeddings, "images": [_to_uint8(images) for images in (small, *larger)]}

    def check_prompts(self, texts: list[str]) -> None:
        """Raises UserError for a prompt that is empty or longer than the models read, and without a prior."""
        self._check_prior()
        limits = {}
        if self.clip:
            limits["CLIP"] = self.clip.tokenizer, self.clip.stage.config.model.text.context - 2
        for name, model in {"the prior": self.prior, "the decoder": self.decoder}.items():
            if model and "tokens" in model.stage.texts:
                limits[name] = model.tokenizer, model.stage.texts["tokens"][1]
        for text in texts:
            if not text.strip():
                raise UserError("the prompt is empty: say what to draw")
            for name, (tokenizer, limit) in limits.items():
                count = tokenizer.count(text)
                if count > limit:
                    raise UserError(f"the prompt {text[:40]!r}… has {count} tokens: {name} reads {limit}; shorten it")

    def _check_prior(self):
        if self.clip and not self.prior:
            raise UserError("this cascade has no prior/: it draws pictures for image embeddings, not for captions")

    def _decode(self, embeddings, texts, key, guidance_scale):
        conditions = self._captions(self.decoder, texts)
        if embeddings is not None:
            conditions["image_embedding"] = embeddings
        return self._draw(self.decoder, conditions, key, guidance_scale)

    def _upsample(self, images, texts, key):
        sizes = []
        for i, model in enumerate(self.upsamplers):
            images = np.clip(images, -1, 1)
            if model.stage.config.model.round_low_res:
                images = _to_float(_to_uint8(images))
            conditions = self._captions(model, texts) | {"low_res": images}
            images = self._draw(model, conditions, jax.random.fold_in(key, i), None)
            sizes.append(images)
        return sizes

    def _captions(self, model: Model, texts: list[str]) -> dict[str, np.ndarray]:
        """The texts in every form of tokens that the model's stage reads."""
        arrays = {}
        for name, (whose, context, ends) in model.stage.texts.items():
            tokenizer = (model if whose == "own" else self.clip).tokenizer
            arrays[name], arrays[f"{name}_length"] = tokenizer.encode(texts, context, ends)
        return arrays

    def _draw(self, model: Model, conditions: dict[str, np.ndarray], key, guidance_scale: float | None):
        names, drawn = list(conditions), []
        frozen = self.clip.params if model.stage.needs_clip else {}
        for i, rows in enumerate(_chunks(*conditions.values())):
            chunk = dict(zip(names, rows, strict=True))
            if "guidance_scale" in model.stage.config.sampling:
                scale = model.stage.config.sampling.guidance_scale if guidance_scale is None else guidance_scale
                chunk["guidance_scale"] = jnp.float32(scale)
            drawn.append(np.asarray(model.sample(model.params, frozen, chunk, jax.random.fold_in(key, i))))
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


def _to_uint8(images: np.ndarray) -> np.ndarray:
    return np.clip(np.rint((images + 1) * 127.5), 0, 255).astype(np.uint8)


def _to_float(images: np.ndarray) -> np.ndarray:
    return images.astype(np.float32) / 127.5 - 1


def _chunks(*arrays):
    """Rows in chunks of ROWS (fewer where there are fewer in all), the last filled up with its own first row."""
    count = len(arrays[0])
    size = min(count, ROWS)
    for start in range(0, count, size):
        parts = [np.asarray(a[start : start + size]) for a in arrays]
        fill = size - len(parts[0])
        yield [np.concatenate([p, np.repeat(p[:1], fill, axis=0)]) if fill else p for p in parts]
