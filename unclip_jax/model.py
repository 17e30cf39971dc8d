"""A trained stage, ready to be called on any number of rows."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from unclip_jax.arrays import Array, Key, Params
from unclip_jax.bundle import check_params, load_bundle
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.errors import UserError
from unclip_jax.keys import RowKeys
from unclip_jax.models.mesh import by_rows, jit_on_mesh, one_device, specs
from unclip_jax.programs import Kept, kept_value
from unclip_jax.stages import ClipTowers, Stage, make_stage
from unclip_jax.stages.base import Inverter, Sampler, sampling_schedule
from unclip_jax.stages.clip import Clip
from unclip_jax.stages.conditions import Conditions
from unclip_jax.training.leaves import named_leaves
from unclip_jax.training.sharding import make_mesh, split_kernels
from unclip_jax.watching import Watch

CHUNK_ROWS = 16  # rows of a device that go through at once, at most: bounds memory, and keeps the compiled shapes few


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A stage with its trained parameters and tokenizer, on one device or on several, each of which computes rows of
    its own, by the program of one. Each kind of call compiles once.

    identity: SHA-256 of the bundle that it was loaded from. mesh: of the devices; each holds all parameters, but of a
    `Split` its part.
    """

    stage: Stage
    params: Params
    tokenizer: Tokenizer | None
    identity: str
    mesh: Mesh = dataclasses.field(default_factory=one_device)
    _variants: dict[tuple, "Model"] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        stages: tuple[str, ...],
        clip: "Model | None" = None,
        devices: Sequence[jax.Device] | None = None,
        fsdp: int = 1,
    ) -> "Model":
        """Reads a bundle. Raises UserError where it is none of `stages` or was trained against another CLIP.

        devices: which of this process's it runs on; None: the first. fsdp: so many of them, a divisor of their number,
        share one copy of the parameters.
        """
        bundle = load_bundle(folder)
        if bundle.stage not in stages:
            raise UserError(f"{folder} holds a model of stage {bundle.stage!r}: expected {' or '.join(stages)}")
        if bundle.clip_identity and (clip is None or bundle.clip_identity != clip.identity):
            raise UserError(f"{folder} was trained against another CLIP than the one beside it: use the CLIP it knows")
        stage = make_stage(bundle.config, cast(ClipTowers, clip.stage) if clip else None)
        check_params(bundle.params, _shapes(stage))
        tokenizer = Tokenizer(bundle.tokenizer_bytes) if bundle.tokenizer_bytes else None
        mesh = make_mesh(ConfigDict(dict(data=-1, fsdp=fsdp)), list(devices or jax.local_devices()[:1]))
        params = split_kernels(bundle.params, mesh)
        placed = jax.device_put(params, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(params)))
        return cls(stage, placed, tokenizer, bundle.identity, mesh)

    def sampled_by(self, **sampling: Any) -> "Model":
        """The model with `config.sampling` changed; the same object every time, so that it compiles once."""
        key = tuple(sampling.items())
        if key not in self._variants:
            config = self.stage.config.copy_and_resolve_references().unlock()
            config.sampling.update(sampling)
            stage = dataclasses.replace(self.stage, config=config.lock())
            self._variants[key] = dataclasses.replace(self, stage=stage, _variants={})
        return self._variants[key]

    def draw(
        self,
        frozen: Params,
        conditions: Conditions,
        key: Key | RowKeys,
        noised_clip: "Model | None" = None,
        noised_text: np.ndarray | None = None,
        watch: Watch | None = None,
    ) -> np.ndarray:
        """Draws a row for each row of the conditions; fields of no dimension, such as scales, go to all rows.

        key: one, whose rows are numbered from 0, or keys of rows: the same key draws the same row in any company.
        noised_clip: guides the drawing to the rows of noised_text (N, dim), its embeddings of the captions, as far as
        `conditions.clip_scale` says: by x_t if it is a noised CLIP, else by the predicted x0. watch: looks on while
        pictures are drawn.
        """
        given = {name: value for name, value in conditions._asdict().items() if value is not None}
        scalars = {name: value for name, value in given.items() if not np.ndim(value)}
        arrays = {name: value for name, value in given.items() if np.ndim(value)}
        if noised_clip:
            arrays["noised_text"] = noised_text
        counts = {name: len(value) for name, value in arrays.items()}
        count = max(counts.values())
        if min(counts.values()) != count:
            found = ", ".join(f"{rows} of {name}" for name, rows in counts.items())
            raise UserError(f"rows do not match ({found}): give as many of each")
        keys = RowKeys.of(key, count)
        scalars, key = jax.device_put((scalars, keys.key), NamedSharding(self.mesh, P()))
        if noised_clip:
            name = "clip_gradient" if noised_clip.stage.config.model.image.timesteps else "x0_gradient"
            scalars[name] = jax.tree_util.Partial(noised_clip._similarity_gradient, noised_clip.params)

        # A program that runs another model's function too is not known by this one's stage.
        sample = self._sample.jitted() if noised_clip else self._sample

        def drawn(start: int, rows: jax.Array, draws: jax.Array, *parts: jax.Array) -> jax.Array | np.ndarray:
            chunk = dict(zip(arrays, parts, strict=True)) | scalars
            text = chunk.pop("noised_text", None)
            given, own = Conditions(**chunk), RowKeys(key, rows, draws)

            def take(**part: jax.Array) -> jax.Array:
                return sample(self.params, frozen, given._replace(**part), own, text)

            return self._watched(take, given, rows, count - start, watch) if watch else take()

        rows = self._chunks(keys.rows, keys.draws, *arrays.values())
        starts = range(0, count, chunk_rows(count, self.mesh.size))
        return fetched(drawn(start, *chunk) for start, chunk in zip(starts, rows, strict=True))[:count]

    def _watched(
        self, take: Callable, given: Conditions, rows: jax.Array, shown: int, watch: Watch
    ) -> jax.Array | np.ndarray:
        """Draws pictures of a chunk in parts. take: takes one. shown: how many rows are to be seen."""
        m, steps = self.stage.config.model, sampling_schedule(self.stage.config, given.sketch is not None).num_steps
        if not (at_once := watch.at_once(steps)):
            return take()
        sides = (m.image_size,) * 2 if given.low_res is None else (m.factor * side for side in given.low_res.shape[1:3])
        state = jax.device_put(np.zeros((2 * len(rows), *sides, 3), np.float32), rows.sharding)
        shape = self.mesh.size, 2, -1, *state.shape[1:]  # each device's x_t, then its x0
        for first in range(steps - 1, -1, -at_once):
            part = np.int32(first), np.int32(min(at_once, first + 1))
            part = jax.device_put(part, NamedSharding(self.mesh, P()))
            with watch.step(steps - 1 - first):
                state = jax.block_until_ready(take(state=state, first=part[0], steps=part[1]))
            if watch.sees:
                x0 = np.asarray(state).reshape(shape)[:, 1]
                watch.see(x0.reshape(-1, *state.shape[1:])[:shown])
        return np.asarray(state).reshape(shape)[:, 0].reshape(-1, *state.shape[1:])

    def invert(self, frozen: Params, conditions: Conditions, images: np.ndarray) -> np.ndarray:
        """DDIM-inverts pictures, float32 (N, R, R, 3) in [-1, 1], to their x_T."""
        given = {name: value for name, value in conditions._asdict().items() if value is not None}
        parts = (
            self._invert((self.params, frozen), (Conditions(**dict(zip(given, rows, strict=True))), part))
            for part, *rows in self._chunks(images, *given.values())
        )
        return fetched(parts)[: len(images)]

    def embed_texts(self, texts: list[str]) -> np.ndarray:
        """Embeds captions by a CLIP: float32 (N, dim)."""
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer: it embeds no captions")
        arrays = self.tokenizer.encode(texts, self.stage.config.model.text.context, ends=True)
        return fetched(self._embed_texts(self.params, chunk) for chunk in self._chunks(*arrays))[: len(texts)]

    def embed_images(self, images: np.ndarray) -> np.ndarray:
        """Embeds pictures, uint8 (N, R, R, 3), by a CLIP: float32 (N, dim)."""
        return fetched(self._embed_images(self.params, chunk) for chunk in self._chunks(images))[: len(images)]

    @functools.cached_property
    def _sample(self) -> Kept:
        return Kept(lambda: jitted_sample(self.stage, self.mesh), self.mesh, "sample", self.stage.description)

    @functools.cached_property
    def _invert(self) -> Callable:
        return self._jitted("invert", lambda shared, rows: cast(Inverter, self.stage).invert(*shared, *rows))

    @functools.cached_property
    def _embed_texts(self) -> Callable:
        return self._jitted("texts", lambda params, rows: cast(Clip, self.stage).embed_texts(params, *rows))

    @functools.cached_property
    def _embed_images(self) -> Callable:
        return self._jitted("images", lambda params, rows: cast(Clip, self.stage).embed_images(params, *rows))

    def _jitted(self, name: str, function: Callable) -> Callable:
        def make() -> Callable:
            options = self.stage.tpu_options, self.stage.config.dtype
            return jit_on_mesh(functools.partial(by_rows, function), self.mesh, *options)

        return Kept(make, self.mesh, name, self.stage.description)

    def _chunks(self, *arrays: np.ndarray) -> Iterator[list[jax.Array]]:
        """Splits arrays into chunks, and the rows of each chunk over the devices."""
        for parts in chunks(*arrays, size=chunk_rows(len(arrays[0]), self.mesh.size)):
            yield jax.device_put(parts, NamedSharding(self.mesh, P(self.mesh.axis_names)))

    @functools.cached_property
    def _similarity_gradient(self) -> Callable:
        """One object for all calls, by which jit knows it again. Takes pictures of any size, made the CLIP's."""
        clip, size = cast(Clip, self.stage), self.stage.config.model.image_size

        def gradient(params: Params, text: Array, x: Array, t: Array) -> Array:
            shape = (len(x), size, size, 3)
            seen, back = jax.vjp(lambda x: x if x.shape == shape else jax.image.resize(x, shape, "cubic"), x)
            return back(clip.similarity_gradient(params, seen, t, text))[0]

        return gradient


def _shapes(stage: Stage) -> dict[str, jax.ShapeDtypeStruct]:
    """Finds the shapes of a stage's parameters, by their names."""

    def traced() -> dict[str, list[int]]:
        found = jax.eval_shape(lambda: stage.init(jax.random.key(0)))
        return {name: list(leaf.shape) for name, leaf in named_leaves(found).items()}

    kept = kept_value(traced, "init", stage.description)
    return {name: jax.ShapeDtypeStruct(tuple(shape), np.float32) for name, shape in kept.items()}


def jitted_sample(stage: Stage, mesh: Mesh) -> Callable:
    """Makes the jitted `stage.sample`: (params, frozen, conditions, RowKeys, noised_text) → a row for each row.

    Rows are split over all devices of the mesh, each of which draws its own, by the program of one device: nothing is
    sent but the parts of a `Split`. noised_text: (N, dim), the argument that the conditions' gradient takes first.
    """
    sample = cast(Sampler, stage).sample

    def draw(shared: tuple, rows: tuple) -> Array:
        params, frozen, given, key = shared
        parts, numbers, draws, text = rows
        if text is not None:
            name = "clip_gradient" if "clip_gradient" in given else "x0_gradient"
            given = given | {name: jax.tree_util.Partial(given[name], text)}
        return sample(params, frozen, Conditions(**given, **parts), RowKeys(key, numbers, draws).make())

    def split(
        params: Params, frozen: Params, conditions: Conditions, keys: RowKeys, noised_text: Array | None = None
    ) -> Array:
        given = {name: value for name, value in conditions._asdict().items() if value is not None}
        parts = {name: given.pop(name) for name, value in list(given.items()) if getattr(value, "ndim", 0)}
        return by_rows(draw, (params, frozen, given, keys.key), (parts, keys.rows, keys.draws, noised_text))

    return jit_on_mesh(split, mesh, stage.tpu_options, stage.config.dtype)


def fetched(results: Iterable[jax.Array]) -> np.ndarray:
    """Concatenates results on the host; while one is fetched, the devices compute the next.

    Raises UserError for numbers that are not finite, of which no picture can be made.
    """
    arrays: list[np.ndarray] = []
    waiting = None
    for result in results:
        if waiting is not None:
            arrays.append(np.asarray(waiting))
        waiting = result
    found = np.concatenate([*arrays, np.asarray(waiting)])
    if not np.isfinite(found).all():
        raise UserError("a model computed numbers that are not finite: what it was given, such as a scale of guidance, "
                        "or its weights are too large for it")  # fmt: skip
    return found


def chunk_rows(count: int, devices: int = 1) -> int:
    """Number of rows that go through at once where there are `count`: as many on each device."""
    return devices * min(-(-count // devices), CHUNK_ROWS)


def chunks(*arrays: np.ndarray, size: int) -> Iterator[list[np.ndarray]]:
    """Splits arrays into chunks of `size` rows, the last filled up with its own first row."""
    for start in range(0, len(arrays[0]), size):
        parts = [np.asarray(a[start : start + size]) for a in arrays]
        fill = size - len(parts[0])
        yield [np.concatenate([p, np.repeat(p[:1], fill, axis=0)]) if fill else p for p in parts]
