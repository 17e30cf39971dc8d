"""A trained stage, ready to be called on any number of rows."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from unclip_jax.bundle import check_params, load_bundle
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.errors import UserError
from unclip_jax.models.mesh import jit_on_mesh, one_device
from unclip_jax.stages import Stage, make_stage

CHUNK_ROWS = 16  # at most so many at once: bounds memory, and keeps the shapes few


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """Rows go through in chunks; each kind of call compiles once."""

    stage: Stage
    params: Any
    tokenizer: Tokenizer | None
    identity: str
    _variants: dict[tuple, "Model"] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | Path, stages: tuple[str, ...], clip: "Model | None" = None) -> "Model":
        """Reads a bundle. Raises UserError where it is none of `stages` or was trained against another CLIP."""
        bundle = load_bundle(folder)
        if bundle.stage not in stages:
            raise UserError(f"{folder} holds a model of stage {bundle.stage!r}: expected {' or '.join(stages)}")
        if bundle.clip_identity and (clip is None or bundle.clip_identity != clip.identity):
            raise UserError(f"{folder} was trained against another CLIP than the one beside it: use the CLIP it knows")
        stage = make_stage(bundle.config, clip.stage if clip else None)
        check_params(bundle.params, jax.eval_shape(stage.init, jax.random.key(0)))
        tokenizer = Tokenizer(bundle.tokenizer_bytes) if bundle.tokenizer_bytes else None
        return cls(stage, jax.device_put(bundle.params), tokenizer, bundle.identity)

    def sampled_by(self, **sampling) -> "Model":
        """The model with `config.sampling` changed; the same object every time, so that it compiles once."""
        key = tuple(sampling.items())
        if key not in self._variants:
            config = self.stage.config.copy_and_resolve_references().unlock()
            config.sampling.update(sampling)
            stage = dataclasses.replace(self.stage, config=config.lock())
            self._variants[key] = dataclasses.replace(self, stage=stage, _variants={})
        return self._variants[key]

    def draw(self, frozen: Any, conditions: dict[str, Any], key, noised_clip: "Model | None" = None) -> np.ndarray:
        """Draws a row for each row of the conditions; single numbers among them go to all rows.

        noised_clip: guides the drawing to the rows of the condition "noised_text", its embeddings of the captions.
        """
        scalars = {name: value for name, value in conditions.items() if not np.ndim(value)}
        arrays = {name: value for name, value in conditions.items() if np.ndim(value)}
        drawn = []
        for i, rows in enumerate(chunks(*arrays.values())):
            chunk = dict(zip(arrays, rows, strict=True)) | scalars
            if noised_clip:
                gradient, text = noised_clip._similarity_gradient, chunk.pop("noised_text")
                chunk["clip_gradient"] = jax.tree_util.Partial(gradient, noised_clip.params, text)
            drawn.append(np.asarray(self._sample(self.params, frozen, chunk, jax.random.fold_in(key, i))))
        return np.concatenate(drawn)[: len(next(iter(arrays.values())))]

    def invert(self, frozen: Any, conditions: dict[str, np.ndarray], images: np.ndarray) -> np.ndarray:
        """The noise that pictures (N, R, R, 3) are drawn from, without any other."""
        parts = [
            self._invert(self.params, frozen, dict(zip(conditions, rows, strict=True)), part)
            for part, *rows in chunks(images, *conditions.values())
        ]
        return np.concatenate(parts)[: len(images)]

    def embed_texts(self, texts: list[str]) -> np.ndarray:
        """A CLIP's embeddings of captions."""
        arrays = self.tokenizer.encode(texts, self.stage.config.model.text.context, ends=True)
        rows = [self._embed_texts(self.params, *chunk) for chunk in chunks(*arrays)]
        return np.concatenate(rows)[: len(texts)]

    def embed_images(self, images: np.ndarray) -> np.ndarray:
        """A CLIP's embeddings of pictures, uint8 (N, R, R, 3)."""
        rows = [self._embed_images(self.params, *chunk) for chunk in chunks(images)]
        return np.concatenate(rows)[: len(images)]

    @functools.cached_property
    def _sample(self):
        return self._jitted(self.stage.sample)

    @functools.cached_property
    def _invert(self):
        return self._jitted(self.stage.invert)

    @functools.cached_property
    def _embed_texts(self):
        return self._jitted(self.stage.embed_texts)

    @functools.cached_property
    def _embed_images(self):
        return self._jitted(self.stage.embed_images)

    def _jitted(self, function):
        """For the one device that a Model runs on."""
        return jit_on_mesh(function, one_device(), self.stage.tpu_options)

    @functools.cached_property
    def _similarity_gradient(self):
        """One object for all calls, by which jit knows it again."""
        return lambda params, text, x_t, t: self.stage.similarity_gradient(params, x_t, t, text)


def chunks(*arrays: np.ndarray):
    """Rows in chunks of CHUNK_ROWS (fewer where there are fewer in all), the last filled up with its own first row."""
    count = len(arrays[0])
    size = min(count, CHUNK_ROWS)
    for start in range(0, count, size):
        parts = [np.asarray(a[start : start + size]) for a in arrays]
        fill = size - len(parts[0])
        yield [np.concatenate([p, np.repeat(p[:1], fill, axis=0)]) if fill else p for p in parts]
