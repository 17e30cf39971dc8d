"""Gradients of a batch that is cut into microbatches, of which one at a time is in memory.

Where a loss is a mean over rows, so is its gradient: it is averaged over the microbatches. A contrastive loss compares
all rows. Its gradient is taken in two passes (GradCache, arXiv 2101.06983): with z = f(w) the embeddings of all rows,

    dL/dw = sum over microbatches m of (dz_m/dw)^T dL/dz_m

so the first pass only embeds, the loss is taken of all embeddings together, and the second pass embeds each microbatch
again, to take dL/dz_m back to the parameters.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from unclip_jax.arrays import Batch, Key, Params
from unclip_jax.training.sharding import BATCH_AXES, gather_params, param_shardings
from unclip_jax.training.tuning import merged, overlaid


def gradients(
    stage: Any, params: Params, part: Params, frozen: Params, batch: Batch, key: Key, microbatches: int, mesh: Mesh
) -> tuple[jax.Array, dict[str, Any], Params]:
    """Computes loss, metrics and the gradient of the whole batch by the `part` of `params` that is trained.

    Microbatch m takes rows m, m + M, ... and the key folded with m. A stage that has `contrast` is contrastive: its
    `embed_pairs` embeds rows, each by itself, and `contrast` is the loss and metrics of all embeddings. The gradient is
    sharded as `part` is.
    """

    def model(part: Params) -> Params:
        return merged(gather_params(overlaid(params, part), mesh))

    def loss_of(part: Params, rows: Batch, key: Key) -> tuple[jax.Array, dict[str, Any]]:
        return _float32(stage.loss(model(part), frozen, rows, key))

    def sharded(grads: Params) -> Params:
        return jax.lax.with_sharding_constraint(grads, param_shardings(grads, mesh))

    if microbatches == 1:
        # No loop around a single pass: XLA's CPU convolutions run on one slow thread inside loops.
        (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(part, batch, jax.random.fold_in(key, 0))
        return loss, metrics, sharded(grads)

    hands = jax.tree.map(lambda rows: _dealt(rows, microbatches, mesh), batch)
    keys = jax.vmap(lambda m: jax.random.fold_in(key, m))(jnp.arange(microbatches))
    if not hasattr(stage, "contrast"):

        def of_one(rows: Batch, key: Key) -> Any:
            values, grads = jax.value_and_grad(loss_of, has_aux=True)(part, rows, key)
            return values, sharded(grads)

        (loss, metrics), grads = jax.tree.map(lambda x: x / microbatches, _summed(of_one, (hands, keys), mesh))
        return loss, metrics, grads

    def embed(part: Params, rows: Batch, key: Key) -> Any:
        return stage.embed_pairs(model(part), frozen, rows, key)

    _, dealt = jax.lax.scan(lambda _, hand: (None, embed(part, *hand)), None, (hands, keys))
    differentiate = jax.value_and_grad(lambda pairs: _float32(stage.contrast(*pairs)), has_aux=True)
    (loss, metrics), slopes = differentiate(jax.tree.map(_gathered, dealt))

    def back(rows: Batch, key: Key, slopes: Any) -> Params:
        return sharded(jax.vjp(lambda part: embed(part, rows, key), part)[1](slopes)[0])

    slopes = jax.tree.map(lambda rows: _dealt(rows, microbatches, mesh), slopes)
    return loss, metrics, _summed(back, (hands, keys, slopes), mesh)


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), tree)


def _dealt(rows: jax.Array, hands: int, mesh: Mesh) -> jax.Array:
    """Deals rows (B, ...) into hands (M, B / M, ...): each device its own, so that nothing moves between devices."""
    dealt = jnp.swapaxes(rows.reshape(-1, hands, *rows.shape[1:]), 0, 1)
    return jax.lax.with_sharding_constraint(dealt, NamedSharding(mesh, P(None, BATCH_AXES)))


def _gathered(hands: jax.Array) -> jax.Array:
    """Undoes `_dealt`."""
    return jnp.swapaxes(hands, 0, 1).reshape(-1, *hands.shape[2:])


def _summed(function: Callable, hands: tuple, mesh: Mesh) -> Any:
    """Sums what a function returns of each hand, in a loop: one microbatch is in memory at a time."""
    shapes = jax.eval_shape(function, *jax.tree.map(lambda rows: rows[0], hands))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    zeros = jax.lax.with_sharding_constraint(zeros, param_shardings(zeros, mesh))
    return jax.lax.scan(lambda total, hand: (jax.tree.map(jnp.add, total, function(*hand)), None), zeros, hands)[0]
