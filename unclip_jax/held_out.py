"""Held-out examples of a training run: the loss on them, pictures drawn from them, and metrics of these.

Rows are split over the mesh and parameters are gathered, as in the train step. Keys belong to rows, so that the numbers
do not depend on the number of devices.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from unclip_jax import pictures
from unclip_jax.arrays import Batch, Key, Params
from unclip_jax.evaluation.metrics import INCEPTION, by_inception
from unclip_jax.keys import RowKeys
from unclip_jax.model import chunk_rows, chunks
from unclip_jax.models.mesh import by_rows, jit_on_mesh
from unclip_jax.paths import to_path, write_bytes
from unclip_jax.stages import Stage
from unclip_jax.stages.base import Sampler
from unclip_jax.training.metrics import json_line, read_log
from unclip_jax.training.sharding import BATCH_AXES, gather_params, replicated

SHOWN = 64  # pictures of a grid, at most


class Programs(NamedTuple):
    """Functions of a stage on a mesh; parameters are split by `param_shardings`, results whole everywhere."""

    evaluate: Callable  # (params, frozen, batch, key) → scalars
    draw: Callable  # (params, frozen, batch, RowKeys) → rows drawn, and the true ones
    finish: Callable  # (params, frozen, batch, key) → parameters, scalars


def programs(stage: Stage, mesh: Mesh) -> Programs:
    """Makes the functions by which a stage is evaluated, for `jit_on_mesh`."""

    def evaluate(params: Params, frozen: Params, batch: Batch, key: Key) -> Any:
        return stage.evaluate(gather_params(params, mesh), frozen, batch, key)

    def draw(params: Params, frozen: Params, batch: Batch, keys: RowKeys) -> Any:
        # Each device for itself: guidance doubles the rows, and the compiler would deal them out anew at every step.
        def own(shared: Any, rows: Any) -> Any:
            params, frozen, key = shared
            batch, numbers, draws = rows
            return stage.draw_examples(params, frozen, batch, RowKeys(key, numbers, draws).make())

        return by_rows(own, (gather_params(params, mesh), frozen, keys.key), (batch, keys.rows, keys.draws))

    def finish(params: Params, frozen: Params, batch: Batch, key: Key) -> Any:
        return stage.finish(gather_params(params, mesh), frozen, batch, key)

    return Programs(evaluate, draw, finish)


class HeldOut:
    """The held-out examples of one run.

    examples: NumPy arrays of `train.eval_size` rows, the same on every process, of which the first `train.draw_size`
    are drawn. key: of their randomness, the same in every evaluation. Construction raises UserError where Inception's
    weights or the reference that `train.measure` needs are not there.
    """

    def __init__(self, config: ConfigDict, stage: Stage, mesh: Mesh, examples: Batch, key: Key, workdir: str):
        self._train, self._stage, self._mesh, self._workdir = config.train, stage, mesh, workdir
        self._examples, self._key = examples, key
        self._count = len(next(iter(examples.values())))
        self._rows = min(self._count, config.train.batch_size // config.optim.accumulate)
        whole: dict[str, Any] = {"dtype": config.dtype, "out_shardings": replicated(mesh)}
        made = (jit_on_mesh(program, mesh, stage.tpu_options, **whole) for program in programs(stage, mesh))
        self._programs = Programs(*made)
        self._inception, self._references = _inception(config.train)

    def measure(
        self, step: int, params: Params, frozen: Params, raw: Params | None = None
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Evaluates the averaged `params`, records the numbers in WORKDIR/evaluation.jsonl and saves a grid of pictures
        under WORKDIR/samples, and one by the `raw` parameters. Returns the numbers, and the grids by name."""
        scalars = self._loss(params, frozen)
        examples = self._draw(params, frozen)
        scalars |= {name: float(value) for name, value in self._stage.score_examples(examples).items()}
        for result in self._metrics(examples) if self._train.measure else []:
            name = result.name.lower().replace(", ", "_").replace(" ", "_")
            scalars |= {name: result.value, f"{name}_low": result.low, f"{name}_high": result.high}
        made = {"samples": _grid(examples)}
        if raw is not None:
            made["samples_raw"] = _grid(self._draw(raw, frozen, SHOWN))
        grids = {name: grid for name, grid in made.items() if grid is not None}
        self._record(step, scalars, grids)
        return scalars, grids

    def finish(self, params: Params, frozen: Params) -> tuple[Params, dict[str, float]]:
        """Completes averaged parameters after the last step: `Stage.finish` by all held-out examples."""
        key = jax.random.fold_in(self._key, 1)
        found, scalars = self._programs.finish(params, frozen, self._placed(self._examples), key)
        return {**params, **found}, {name: float(value) for name, value in scalars.items()}

    def _loss(self, params: Params, frozen: Params) -> dict[str, float]:
        """Averages `Stage.evaluate` over all examples, a batch of training's at a time."""
        total: dict[str, float] = {}
        for i, start in enumerate(range(0, self._count, self._rows)):
            rows = {name: array[start : start + self._rows] for name, array in self._examples.items()}
            share = len(next(iter(rows.values()))) / self._count
            found = self._programs.evaluate(params, frozen, self._placed(rows), jax.random.fold_in(self._key, i))
            for name, value in found.items():
                total[name] = total.get(name, 0.0) + share * float(value)
        return total

    def _draw(self, params: Params, frozen: Params, most: int | None = None) -> dict[str, np.ndarray]:
        """Draws the examples that are drawn, at most so many of them; {} where the stage draws nothing."""
        if not isinstance(self._stage, Sampler):
            return {}
        count = min(self._count, self._train.draw_size, most or self._count)
        arrays = {name: array[:count] for name, array in self._examples.items()}
        parts, waiting = [], None
        size = chunk_rows(count, self._mesh.size)
        for rows, *batch in chunks(np.arange(count), *arrays.values(), size=size):
            keys = RowKeys(self._key, *self._placed((rows, np.zeros_like(rows))))
            drawn = self._programs.draw(params, frozen, self._placed(dict(zip(arrays, batch, strict=True))), keys)
            if waiting:  # fetched while the devices draw the next
                parts.append(_fetched(waiting))
            waiting = drawn
        parts.append(_fetched(waiting))
        return {name: np.concatenate([part[name] for part in parts])[:count] for name in parts[0]}

    def _metrics(self, examples: dict[str, np.ndarray]) -> Iterator[Any]:
        """Measures the drawn pictures as `train.measure` says, beside the true ones."""
        if "alignment" in self._train.measure:
            from unclip_jax.evaluation import alignment

            asked = alignment.classify(examples["true"])
            yield from alignment.score(examples["drawn"], *asked).values()
        names = [name for name in self._train.measure if name in INCEPTION]
        if self._inception:
            kinds = {name: self._features(examples[name]) for name in ("drawn", "true")}
            yield from by_inception(names, kinds["drawn"], kinds["true"], self._inception.card, self._references)

    def _features(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Computes Inception's features, each process those of its share of the pictures."""
        from jax.experimental import multihost_utils

        count, process = jax.process_count(), jax.process_index()
        share = np.resize(np.arange(len(images)), -(-len(images) // count) * count)[process::count]
        mine = self._inception(images[share])
        every = multihost_utils.process_allgather(mine) if count > 1 else {k: v[None] for k, v in mine.items()}
        # Row r of process p is picture r · count + p; those that fill up the last shares come last.
        return {name: np.swapaxes(v, 0, 1).reshape(-1, v.shape[-1])[: len(images)] for name, v in every.items()}

    def _placed(self, tree: Any) -> Any:
        """Puts NumPy arrays on the mesh: rows split where they split evenly, else whole on every device."""

        def place(array: np.ndarray) -> jax.Array:
            axes = P() if len(array) % self._mesh.size else P(BATCH_AXES)
            return jax.make_array_from_callback(array.shape, NamedSharding(self._mesh, axes), lambda at: array[at])

        return jax.tree.map(place, tree)

    def _record(self, step: int, scalars: dict[str, float], grids: dict[str, np.ndarray]) -> None:
        """Writes scalars and grids; replaces lines at or after `step`."""
        if jax.process_index() != 0:
            return
        folder = to_path(self._workdir)
        file = folder / "evaluation.jsonl"
        lines = [line for line in read_log(file) if line["step"] < step] + [{"step": step} | scalars]
        write_bytes(file, "".join(map(json_line, lines)).encode(), alone=True)
        said = ", ".join(f"{name} {value:.4g}" for name, value in scalars.items() if name[-4:] not in ("_low", "high"))
        print(f"held out, step {step}: {said}", file=sys.stderr, flush=True)
        for name, grid in grids.items():
            place = f"step_{step:08d}{name.removeprefix('samples')}.png"
            write_bytes(folder / "samples" / place, pictures.png(grid), alone=True)


def _inception(train: ConfigDict) -> tuple[Any, dict[str, Any]]:
    """Loads the network that `train.measure` needs and, by kind of features, reference statistics if they are named."""
    kinds = tuple(sorted({INCEPTION[name] for name in train.measure if name in INCEPTION}))
    if not kinds:
        return None, {}
    from unclip_jax.evaluation import features, frechet

    named = {INCEPTION[name] for name in ("fid", "sfid") if train.reference and name in train.measure}
    references = {kind: frechet.Statistics.load(train.reference) for kind in named}
    return features.inception(train.inception, kinds), references


def _fetched(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


def _grid(examples: dict[str, np.ndarray]) -> np.ndarray | None:
    """Lays out pictures, each above the others of its row; None where the rows are no pictures."""
    if not examples or examples["drawn"].ndim != 4:
        return None
    return pictures.grid(np.concatenate([rows[:SHOWN] for rows in examples.values()], axis=1))
