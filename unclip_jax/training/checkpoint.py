"""Checkpoints of training: Orbax, one folder per step, written in the background.

WORKDIR/checkpoints/STEP holds four items: `params`, `ema`, `opt_state` and `meta` (JSON). A folder gets its name when
it is complete: an interrupted save leaves a temporary folder, which is never read and which the next run over WORKDIR
removes. Arrays are restored onto any mesh, whichever wrote them.

Storage can change what was written. So `meta` holds a checksum of each array and of itself, which the devices compute
before saving and after restoring. A damaged checkpoint is named and deleted, and the one before it is taken.
"""

import hashlib
import json
import logging
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import unclip_jax
from unclip_jax.errors import StorageError, UserError
from unclip_jax.paths import is_remote, to_path
from unclip_jax.training import preflight
from unclip_jax.training.checksums import checksums
from unclip_jax.training.leaves import differences
from unclip_jax.training.sharding import batch_sharding, replicated
from unclip_jax.training.state import Skips, TrainState

TREES = ("params", "ema", "opt_state")


class Checkpointer:
    """Saves and restores the train state under `workdir` (a folder on a disk, or gs://...).

    Keeps the last `keep` steps and, of the older ones, those that `keep_every` divides (0: none). Every process must
    make the same calls in the same order.
    """

    def __init__(self, workdir: str, keep: int, keep_every: int = 0):
        import orbax.checkpoint as ocp

        # With one, Orbax would delete the last good checkpoint before the new one is known to be whole.
        if keep < 2 or keep_every < 0:
            raise UserError(f"train.keep={keep}, keep_every={keep_every}: expected at least 2, and at least 0")

        policies = [ocp.checkpoint_managers.LatestN(keep)]
        if keep_every:
            policies.append(ocp.checkpoint_managers.EveryNSteps(keep_every))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
            # In the background, a folder that cannot be made would only be noticed ten minutes later.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        logging.getLogger("absl").addFilter(_without_traceback)
        self._manager = _manager(workdir, options)
        self._written: int | None = None  # a step whose save was not yet checked

    def save(self, state: TrainState, meta: dict) -> None:
        """Starts to save `state` under its own step, and returns once the arrays are copied off the devices.

        meta: a value that JSON can hold, for example the config; `step`, `skips`, the library's `version` and checksums
        are added. A step that is stored already is left alone. When writing fails, the next `check`, `save` or `wait`
        raises the error. Raises UserError when a later step is stored.
        """
        import orbax.checkpoint as ocp

        step = int(state.step)
        self.wait()

        # A step that is stored already is left alone, but a broken one is written again.
        if step in self._manager.all_steps():
            if _complete(self._manager, step):
                return
            self._manager.delete(step)

        items = {name: ocp.args.StandardSave(getattr(state, name)) for name in TREES}
        skips = {name: int(value) for name, value in state.skips._asdict().items()}
        sums = checksums({name: getattr(state, name) for name in TREES})
        meta = {**meta, "step": step, "skips": skips, "version": unclip_jax.__version__, "checksums": sums}
        meta["sha256"] = _sha256(meta)
        if not self._manager.save(step, args=ocp.args.Composite(**items, meta=ocp.args.JsonSave(meta))):
            raise UserError(
                f"{self._manager.directory} already holds step {self.latest_step()}, so step {step} was not saved: "
                "resume from there, or train in a new workdir"
            )
        self._written = step

    def restore_latest(self, abstract_state: TrainState) -> TrainState | None:
        """Restores the newest good checkpoint with the shardings of `abstract_state`; None where there is none yet.

        Damaged checkpoints that are newer are named on stderr and deleted. Raises UserError where all are damaged, and,
        listing leaves and shapes, when the checkpoint was written by another model or optimizer.
        """
        damaged: dict[int, str] = {}
        for step in _complete_steps(self._manager):
            # Twice, since storage fails now and then.
            found, wrong = _attempt(self._manager, step, abstract_state)
            found, wrong = (found, "") if found else _attempt(self._manager, step, abstract_state)
            if found:
                for newer, why in damaged.items():
                    if jax.process_index() == 0:
                        print(f"warning: {self._path(newer)} is damaged ({why}): it is deleted, and training goes on "
                              f"from step {step}", file=sys.stderr, flush=True)  # fmt: skip
                    self._manager.delete(newer)
                return found
            damaged[step] = wrong
        if damaged:
            newest = max(damaged)
            raise UserError(f"{self._path(newest)} is damaged ({damaged[newest]}), and no older one is good: copy it "
                            "again, or train in a new workdir")  # fmt: skip
        return None

    def latest_meta(self) -> dict | None:
        """Reads the meta of the newest checkpoint whose meta is good, alone; None where there is none."""
        for step in _complete_steps(self._manager):
            try:
                return _meta(self._manager, step)
            except _Damaged:
                continue
        return None

    def _path(self, step: int) -> str:
        return f"checkpoint {self._manager.directory}/{step}"

    def latest_step(self) -> int | None:
        """The newest step that is complete."""
        return next(iter(_complete_steps(self._manager)), None)

    def preempted(self, step: int) -> bool:
        """True once the machine is about to be taken away: save, wait, stop. Ask at every step, on every process."""
        return self._manager.reached_preemption(step)

    def check(self) -> None:
        """Raises the error of a save that failed in the background; does not wait for one that is still writing."""
        # Not Orbax's check_for_errors, which stays silent: its finishing thread has consumed the error by then.
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Blocks until every save is complete, and raises the error of one that failed."""
        self._manager.wait_until_finished()
        step, self._written = self._written, None
        if step is not None and not _complete(self._manager, step):
            raise StorageError(f"{self._path(step)} is not whole, since storage failed: the same command goes on from "
                               "the one before")  # fmt: skip

    def close(self) -> None:
        """Waits, then frees the background threads."""
        self.wait()
        self._manager.close()


def _without_traceback(record: logging.LogRecord) -> bool:
    """Keeps Orbax's threads from logging an error with its traceback, since `check` and `wait` raise it."""
    return not (record.levelno >= logging.ERROR and "orbax" in record.pathname)


class SaveClock:
    """Tells all processes at the same step that `minutes` have passed since the last checkpoint (0: never).

    Clocks differ, so the processes ask each other: devices compute whether any clock has run out, and the answer is
    read a step later, when it is there.
    """

    def __init__(self, minutes: float, mesh: Mesh):
        self._seconds, self._mesh = 60 * minutes, mesh
        self._any = jax.jit(jnp.any, out_shardings=replicated(mesh))
        self.restart()

    def restart(self) -> None:
        """Starts the clock, at a checkpoint; forgets what was asked."""
        self._began, self._asked = time.monotonic(), None

    def due(self, ask: bool) -> bool:
        """Gives the answer to what was asked at the last step. To be called at each step, by every process.

        ask: whether to ask now; every process must at the same steps.
        """
        asked: jax.Array | None = self._asked
        self._asked = None
        if ask and self._seconds:
            own = np.full(self._mesh.size, time.monotonic() - self._began >= self._seconds)
            split = batch_sharding(self._mesh)
            self._asked = self._any(jax.make_array_from_callback(own.shape, split, lambda at: own[at]))
        return asked is not None and bool(asked)


class _Damaged(Exception):
    """A checkpoint cannot be read, or is not what was written."""


def _attempt(manager: Any, step: int, abstract: TrainState) -> tuple[TrainState | None, str]:
    """Restores a checkpoint; returns its state, or None and why not. All processes return alike."""
    found, wrong = None, ""
    try:
        meta = _meta(manager, step)
        trees = _restore(manager, step, {name: getattr(abstract, name) for name in TREES})
        found = TrainState(step=_counter(step, abstract.step), skips=_skips(meta, abstract), **trees)
    except _Damaged as error:
        wrong = str(error)
    # What one process cannot read, none may go on from.
    wrong = next(filter(None, map(json.loads, preflight.gathered(json.dumps(wrong).encode()))), "")
    if found and not wrong and "checksums" in meta:
        sums = checksums(trees)
        wrong = next((f"{name} was changed" for name, value in meta["checksums"].items() if sums[name] != value), "")
    return (None, wrong) if wrong else (found, "")


def _counter(value: int, like: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    return jax.device_put(np.asarray(value, like.dtype), like.sharding)


def _skips(meta: dict, abstract: TrainState) -> Skips:
    """Makes the counters, which are stored in the JSON, not as arrays."""
    return jax.tree.map(_counter, Skips(**meta["skips"]), abstract.skips)


def _meta(manager: Any, step: int) -> dict:
    """Reads a checkpoint's meta. Raises _Damaged where that is not what was written."""
    import orbax.checkpoint as ocp

    try:
        meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        said = meta.pop("sha256", None)
    except Exception as error:
        raise _Damaged(f"meta cannot be read: {_line(error)}") from error
    if said is not None and said != _sha256(meta):
        raise _Damaged("meta was changed")
    return meta


def _sha256(meta: dict) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _line(error: Exception) -> str:
    """Says in one line what an error of Orbax or of storage is."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _manager(workdir: str, options: Any) -> Any:
    import orbax.checkpoint as ocp

    folder = to_path(workdir)
    if not is_remote(folder):
        folder = folder.absolute()  # Orbax refuses relative paths
    handlers = {name: ocp.StandardCheckpointHandler() for name in TREES} | {"meta": ocp.JsonCheckpointHandler()}
    return ocp.CheckpointManager(str(folder / "checkpoints"), item_handlers=handlers, options=options)


def _complete_steps(manager: Any) -> list[int]:
    """Lists the steps whose saving was completed, the newest first."""
    manager.reload()
    return sorted((step for step in manager.all_steps() if _complete(manager, step)), reverse=True)


def _complete(manager: Any, step: int) -> bool:
    # Orbax merges the files of all processes into this manifest, and where it cannot list them, goes on without one.
    # (An item that is missing as a whole was removed, or never copied: restoring says so.)
    items = [manager.directory / str(step) / name for name in TREES]
    return all((item / "manifest.ocdbt").exists() for item in items if item.exists())


def _restore(manager: Any, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
    """Restores the trees of a checkpoint. Raises _Damaged where they cannot be read, and UserError where they are of
    another model or optimizer."""
    import orbax.checkpoint as ocp

    where = f"{manager.directory}/{step}"
    try:
        found = manager.item_metadata(step)
        broken = [name for name in abstract if found.get(name) is None]
        stored = {name: found[name].tree for name in abstract if name not in broken}
    except Exception as error:
        raise _Damaged(_line(error)) from error
    if broken:
        raise _Damaged(f"it lacks {', '.join(broken)}")

    wrong = differences(stored, abstract)
    if wrong:
        raise UserError(
            f"checkpoint {where} does not fit this config ({wrong}): use the config it was trained with, "
            "or a new workdir"
        )

    items = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
    try:
        restored = manager.restore(step, args=ocp.args.Composite(**items))
    except Exception as error:
        raise _Damaged(_line(error)) from error
    return {name: restored[name] for name in abstract}
