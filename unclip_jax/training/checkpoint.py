"""Checkpoints of training: Orbax, one folder per step, written in the background.

WORKDIR/checkpoints/STEP holds four items: `params`, `ema`, `opt_state` and `meta` (JSON), separate so that sampling can
read the average alone. A folder gets its name when it is complete: an interrupted save leaves a temporary folder, which
is never read and which the next run over WORKDIR removes. Arrays are restored onto any mesh, whichever wrote them.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

import unclip_jax
from unclip_jax.arrays import Params
from unclip_jax.errors import UserError
from unclip_jax.paths import is_remote, to_path
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
        self._manager = _manager(workdir, options)
        self._written: int | None = None  # a step whose save was not yet checked

    def save(self, state: TrainState, meta: dict) -> None:
        """Starts to save `state` under its own step, and returns once the arrays are copied off the devices.

        meta: a value that JSON can hold, for example the config; `step` and the library's `version` are added. A step
        that is stored already is left alone. When writing fails, the next `check`, `save` or `wait` raises the error.
        Raises UserError when a later step is stored.
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
        meta = {**meta, "step": step, "skips": skips, "version": unclip_jax.__version__}
        if not self._manager.save(step, args=ocp.args.Composite(**items, meta=ocp.args.JsonSave(meta))):
            raise UserError(
                f"{self._manager.directory} already holds step {self.latest_step()}, so step {step} was not saved: "
                "resume from there, or train in a new workdir"
            )
        self._written = step

    def restore_latest(self, abstract_state: TrainState) -> TrainState | None:
        """Restores the newest complete checkpoint with the shardings of `abstract_state`; None where there is none yet.

        Raises UserError, listing leaves and shapes, when the checkpoint was written by another model or optimizer.
        """
        step = self.latest_step()
        if step is None:
            return None
        trees = _restore(self._manager, step, {name: getattr(abstract_state, name) for name in TREES})

        # Counters are stored in the JSON, not as arrays.
        def counter(value: int, like: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
            return jax.device_put(np.asarray(value, like.dtype), like.sharding)

        stored = Skips(**_meta(self._manager, step)["skips"])
        skips = jax.tree.map(counter, stored, abstract_state.skips)
        return TrainState(step=counter(step, abstract_state.step), skips=skips, **trees)

    def latest_step(self) -> int | None:
        """The newest step that is complete."""
        return _newest(self._manager)

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
            raise OSError(f"checkpoint {self._manager.directory}/{step} is not whole; those before it are good")

    def close(self) -> None:
        """Waits, then frees the background threads."""
        self.wait()
        self._manager.close()


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


def restore_ema(workdir: str, abstract_params: Params) -> Params:
    """Restores the averaged parameters of the newest checkpoint under `workdir`, and reads nothing else.

    abstract_params: ShapeDtypeStructs with the shardings to restore onto; a leaf without one comes back whole on the
    first local device. Raises UserError when there is no checkpoint, or when it holds other leaves.
    """

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = leaf.sharding or SingleDeviceSharding(jax.local_devices()[0])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    manager, step = _open_to_read(workdir)
    try:
        return _restore(manager, step, {"ema": jax.tree.map(placed, abstract_params)})["ema"]
    finally:
        manager.close()


def read_meta(workdir: str) -> dict:
    """Reads the `meta` of the newest checkpoint under `workdir`: `step`, `version` and the meta given to `save`."""
    manager, step = _open_to_read(workdir)
    try:
        return _meta(manager, step)
    finally:
        manager.close()


def _meta(manager: Any, step: int) -> dict:
    import orbax.checkpoint as ocp

    return manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta


def _manager(workdir: str, options: Any) -> Any:
    import orbax.checkpoint as ocp

    folder = to_path(workdir)
    if not is_remote(folder):
        folder = folder.absolute()  # Orbax refuses relative paths
    handlers = {name: ocp.StandardCheckpointHandler() for name in TREES} | {"meta": ocp.JsonCheckpointHandler()}
    return ocp.CheckpointManager(str(folder / "checkpoints"), item_handlers=handlers, options=options)


def _newest(manager: Any) -> int | None:
    manager.reload()
    return max((step for step in manager.all_steps() if _complete(manager, step)), default=None)


def _complete(manager: Any, step: int) -> bool:
    # Orbax merges the files of all processes into this manifest, and where it cannot list them, goes on without one.
    # (An item that is missing as a whole was removed, or never copied: restoring says so.)
    items = [manager.directory / str(step) / name for name in TREES]
    return all((item / "manifest.ocdbt").exists() for item in items if item.exists())


def _open_to_read(workdir: str) -> tuple[Any, int]:
    import orbax.checkpoint as ocp

    manager = _manager(workdir, ocp.CheckpointManagerOptions(create=False, read_only=True))
    step = _newest(manager)
    if step is None:
        manager.close()
        raise UserError(f"no checkpoint under {workdir}: expected {workdir}/checkpoints/STEP, as training writes it")
    return manager, step


def _restore(manager: Any, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    where = f"{manager.directory}/{step}"
    found = manager.item_metadata(step)

    broken = [name for name in abstract if found.get(name) is None]
    if broken:
        raise UserError(
            f"checkpoint {where} lacks {', '.join(broken)}: it is damaged or half copied; copy it again, "
            "or remove that folder to go on from the step before it"
        )

    stored = {name: found[name].tree for name in abstract}
    wrong = differences(stored, abstract)
    if wrong:
        raise UserError(
            f"checkpoint {where} does not fit this config ({wrong}): use the config it was trained with, "
            "or a new workdir"
        )

    items = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
    restored = manager.restore(step, args=ocp.args.Composite(**items))
    return {name: restored[name] for name in abstract}
