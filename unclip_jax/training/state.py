"""The state of training and the one step that advances it.

Everything random in step k comes from `fold_in(root, k)`, so a run that is stopped and resumed at k is the same run.
"""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from unclip_jax.arrays import Batch, Key, Params
from unclip_jax.errors import UserError
from unclip_jax.models.mesh import jit_on_mesh
from unclip_jax.training.gradients import gradients
from unclip_jax.training.leaves import named_leaves
from unclip_jax.training.optimizer import ema_update, learning_rate, make_optimizer
from unclip_jax.training.sharding import batch_sharding, param_shardings, replicated, to_host
from unclip_jax.training.tuning import merged, overlaid, trained_part, with_factors


class Skips(NamedTuple):
    """Counts of unread records, and of steps skipped because their loss or gradient was not finite; int32 scalars."""

    records: jax.Array  # that could not be read, in the batches so far
    steps: jax.Array  # skipped: they changed nothing
    in_a_row: jax.Array  # steps skipped without a break, up to the last step
    last: jax.Array  # the latest skipped step, counted as done
    leaf: jax.Array  # where its gradient was largest: a position in `named_leaves` of what is trained


class TrainState(NamedTuple):
    """State of training, which is all that a checkpoint must hold."""

    step: jax.Array  # int32 scalar: steps taken, skipped ones included
    skips: Skips
    params: Params  # all of them, with the factors of `tuning`, where there are any
    ema: Params  # averages of those that are trained
    opt_state: Any  # of those that are trained

    @property
    def average(self) -> Params:
        """The model's averaged parameters; those that are not trained are what they are."""
        return merged(overlaid(self.params, self.ema))


def root_key(seed: int) -> Key:
    """Makes the key into which every step of training folds its number; independent of the parameters' initial key."""
    return jax.random.fold_in(jax.random.key(seed), 1)


def abstract_state(stage: Any, config: ConfigDict, mesh: Mesh) -> TrainState:
    """The state as ShapeDtypeStructs with their shardings over `mesh`; computes and allocates nothing.

    Raises UserError where `config.optim` cannot be.
    """
    shapes = jax.eval_shape(lambda: _initial(stage, config, 0))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        param_shardings(shapes, mesh),
    )


def init_state(stage: Any, config: ConfigDict, mesh: Mesh, seed: int) -> TrainState:
    """Makes the state before step 0, in place on the devices that keep it: the same numbers on every mesh."""
    shardings = _shardings(abstract_state(stage, config, mesh))
    return jax.jit(lambda: _initial(stage, config, seed), out_shardings=shardings)()


def make_train_step(stage: Any, config: ConfigDict, mesh: Mesh) -> Callable:
    """Makes the jitted step (state, frozen, batch, root key) -> (state, metrics), which donates the old state.

    batch: pytree of (rows, ...) arrays, split by `batch_sharding`; rows must be a multiple of devices times
    `config.optim.accumulate`. The rows are dealt into that many microbatches, and the gradients of their mean losses
    averaged, which equals one pass over the whole batch; see `gradients` for CLIP, whose loss is no mean over rows.

    metrics: float32 scalars. The stage's own, averaged over microbatches (pairs too, which `metrics.scalars` divides);
    loss, grad_norm (before clipping), param_norm, learning_rate (as applied); records_skipped, the sum so far of
    "records_skipped" in batches that have it; and skipped, the number of skipped steps so far.

    A step is skipped when its loss or gradient norm is not finite: params, EMA and optimizer state stay as they were,
    `step` moves on. After `config.train.max_skips` skipped steps in a row, nothing changes any more.

    Raises UserError when `config.train.batch_size` does not split evenly.
    """
    microbatches = config.optim.accumulate
    if config.train.batch_size % (mesh.size * microbatches):
        raise UserError(
            f"train.batch_size={config.train.batch_size} cannot be split evenly into optim.accumulate={microbatches} "
            f"microbatches over {mesh.size} devices: make it a multiple of {mesh.size * microbatches}"
        )
    optimizer = make_optimizer(config.optim, config.train.steps)
    rate_at = learning_rate(config.optim, config.train.steps)
    shardings = _shardings(abstract_state(stage, config, mesh))

    def step(state: TrainState, frozen: Params, batch: Batch, root: Key) -> tuple[TrainState, dict[str, Any]]:
        key = jax.random.fold_in(root, state.step)
        part = trained_part(state.params, config.optim)
        loss, metrics, grads = gradients(stage, state.params, part, frozen, batch, key, microbatches, mesh)
        squares = jnp.stack([jnp.sum(jnp.square(leaf)) for leaf in named_leaves(grads).values()])
        grad_norm = jnp.sqrt(jnp.sum(squares))

        rate = rate_at(state.step)
        updates, opt_state = optimizer.update(grads, state.opt_state, part, step=state.step)
        params = stage.project(overlaid(state.params, optax.apply_updates(part, updates)))
        new_part = trained_part(params, config.optim)
        ema = ema_update(state.ema, new_part, state.step, config.optim.ema_decay)

        # A skipped step keeps the old values, and so does every step after too many of them.
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        stuck = state.skips.in_a_row >= config.train.max_skips
        skips = _counted(state, batch, finite, stuck, squares)
        old, new = (part, state.ema, state.opt_state), (new_part, ema, opt_state)
        part, ema, opt_state = jax.tree.map(lambda a, b: jnp.where(finite & ~stuck, a, b), new, old)
        params = overlaid(state.params, part)
        metrics |= {"loss": loss, "grad_norm": grad_norm, "param_norm": optax.tree.norm(part), "learning_rate": rate}
        metrics |= {"skipped": skips.steps.astype(jnp.float32), "records_skipped": skips.records.astype(jnp.float32)}
        return TrainState(state.step + 1, skips, params, ema, opt_state), metrics

    return jit_on_mesh(
        step,
        mesh,
        stage.tpu_options,
        config.dtype,
        in_shardings=(shardings, None, batch_sharding(mesh), None),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def digest(state: TrainState) -> str:
    """Hex sha256 of the names, types, shapes and bytes of params, EMA and optimizer state, in the order of the names.

    Every process must call this, since it gathers split leaves. All get the same answer, whatever the mesh.
    """
    sha = hashlib.sha256()
    for name, leaf in named_leaves(state._asdict()).items():
        if name == "step" or name.startswith("skips/"):
            continue
        value = to_host(leaf)
        sha.update(f"{name} {value.dtype} {value.shape}\n".encode())
        sha.update(np.ascontiguousarray(value).tobytes())
    return sha.hexdigest()


def skipped(skips: Skips, trained: Params, allowed: int) -> str:
    """Describes the steps skipped in a row up to the last one; "" where that was not skipped. Waits for the device.

    Raises UserError once `allowed` steps in a row were skipped.
    """
    _, _, in_a_row, last, leaf = (int(value) for value in skips)
    if not in_a_row:
        return ""
    line = (
        f"not finite for {in_a_row} steps in a row, up to step {last}: they changed nothing; the last one's gradient "
        f"was largest in {list(named_leaves(trained))[leaf]}"
    )
    if in_a_row < allowed:
        return line
    raise UserError(
        f"{line}: training stops (train.max_skips). Checkpoints before step {last - in_a_row + 1} are good; a lower "
        "optim.learning_rate or optim.clip_norm may help, and dtype=float32 tells whether it is a matter of precision"
    )


def _initial(stage: Any, config: ConfigDict, seed: int) -> TrainState:
    # Not the key itself: split(key)[i] equals fold_in(key, i), so a stage that splits it would meet root_key.
    key = jax.random.key(seed)
    params = with_factors(stage.init(jax.random.fold_in(key, 0)), config.optim, jax.random.fold_in(key, 2))
    part = trained_part(params, config.optim)
    skips = Skips(*(jnp.int32(0) for _ in Skips._fields))
    opt_state = make_optimizer(config.optim, config.train.steps).init(part)
    return TrainState(jnp.int32(0), skips, params, jax.tree.map(jnp.copy, part), opt_state)


def _counted(state: TrainState, batch: Batch, finite: jax.Array, stuck: jax.Array, squares: jax.Array) -> Skips:
    """The counts after this step. squares: of its gradients, summed per leaf. stuck: steps are no longer counted."""
    skips = state.skips._replace(records=state.skips.records + jnp.sum(batch.get("records_skipped", jnp.int32(0))))
    largest = jnp.argmax(jnp.where(jnp.isfinite(squares), squares, jnp.inf)).astype(jnp.int32)
    more = Skips(skips.records, skips.steps + 1, skips.in_a_row + 1, state.step + 1, largest)
    counted = jax.tree.map(lambda a, b: jnp.where(finite, a, b), skips._replace(in_a_row=jnp.int32(0)), more)
    return jax.tree.map(lambda a, b: jnp.where(stuck, a, b), skips, counted)


def _shardings(abstract: TrainState) -> TrainState:
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)
