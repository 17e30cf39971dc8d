"""Adam with decoupled weight decay, its learning rate, and the moving average of the parameters.

With g the averaged gradient, clipped to a global norm when asked for, and k the step counted from 0,

    m = b1 m + (1 - b1) g                  m_hat = m / (1 - b1^n)
    v = b2 v + (1 - b2) g^2                v_hat = v / (1 - b2^n)
    w = w - lr(k) (m_hat / (sqrt(v_hat) + eps) + weight_decay w)

where n counts the updates done, this one included: a skipped step moves k but not n. The decay is decoupled
(Loshchilov and Hutter, 2019) and leaves gains and biases alone, as CLIP's does (Radford et al., 2021).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from unclip_jax.arrays import Params, Tree
from unclip_jax.errors import UserError
from unclip_jax.training.leaves import leaf_name

SCHEDULES = ("constant", "cosine", "linear")
Schedule = Callable[[Any], jax.Array]  # step, from 0 → learning rate


def learning_rate(optim: ConfigDict, total_steps: int) -> Schedule:
    """Makes the schedule of the learning rate: step k, int32 counted from 0, to a float32 scalar.

    Over the first `warmup_steps` W the rate rises linearly to its peak, as (k + 1) / W. After that, with
    p = (k - W) / (total_steps - W), "constant" stays, "linear" falls as 1 - p and "cosine" as (1 + cos(pi p)) / 2: both
    reach zero at `total_steps`. A run shorter than its warm-up never reaches the peak. Raises UserError for a schedule
    of another name.
    """
    if optim.schedule not in SCHEDULES:
        raise UserError(f"optim.schedule is {optim.schedule!r}: expected one of {', '.join(SCHEDULES)}")
    peak, warmup = float(optim.learning_rate), int(optim.warmup_steps)

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        k = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((k - warmup) / max(total_steps - warmup, 1), 0.0, 1.0)
        if optim.schedule == "cosine":
            decay = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        elif optim.schedule == "linear":
            decay = 1.0 - progress
        else:
            decay = jnp.float32(1.0)
        rise = jnp.minimum((k + 1.0) / warmup, 1.0) if warmup else 1.0
        return peak * rise * decay

    return schedule


def make_optimizer(optim: ConfigDict, total_steps: int) -> optax.GradientTransformationExtraArgs:
    """Makes the optimizer of this module's equations: an optax transformation from gradients to parameter changes.

    `update(grads, state, params, step=k)` takes the step from the caller. So the learning rate depends on the train
    state's own step alone, and the rate logged is the rate applied, also after a skipped step or a resumed run. Raises
    UserError when a number in `optim` is outside its range.
    """
    _check(optim)
    return optax.chain(
        optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm else optax.identity(),
        _scale_by_adam(optim.b1, optim.b2, optim.eps),
        optax.add_decayed_weights(optim.weight_decay, mask=decayed),
        _scale_by_step(learning_rate(optim, total_steps)),
    )


def decayed(params: Params) -> Params:
    """Marks the leaves that weight decay shrinks: a bool for each leaf of `params`.

    These are kernels, matrices and embedding tables. Gains and biases are recognised by the last word of their name
    ("scale", "bias", "logit_scale"), not by their rank: stacked over the layers of a scanned transformer they have
    two axes. Learned vectors, such as a class or null embedding, are left alone, and so is everything under "fixed",
    which is not trained.
    """

    def is_decayed(path: tuple, leaf: jax.Array) -> bool:
        names = leaf_name(path).split("/")
        last_word = names[-1].rsplit("_", 1)[-1]
        return leaf.ndim >= 2 and names[0] != "fixed" and last_word not in ("bias", "scale", "gain")

    return jax.tree_util.tree_map_with_path(is_decayed, params)


def ema_update(ema: Params, params: Params, step: jax.Array, decay: float) -> Params:
    """Moves the average after step k: ema + (1 - d)(params - ema), d = min(decay, (1 + k) / (10 + k)).

    The average starts as the parameters themselves, and the warm-up of d lets it forget them: with decay 0.9999 alone
    it would still hold 37 % of the random start after 10,000 steps. Leaves that are not floats are copied.
    """
    k = jnp.asarray(step, jnp.float32)
    weight = 1.0 - jnp.minimum(jnp.float32(decay), (1.0 + k) / (10.0 + k))

    def average(e: jax.Array, p: jax.Array) -> jax.Array:
        return e + weight.astype(e.dtype) * (p - e) if jnp.issubdtype(e.dtype, jnp.floating) else p

    return jax.tree.map(average, ema, params)


def _scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    # Not optax.scale_by_adam: it raises a Python float to an int32 count, which strict dtype promotion refuses.
    def init(params: Tree) -> optax.ScaleByAdamState:
        return optax.ScaleByAdamState(
            jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params)
        )

    def update(
        grads: Tree, state: optax.ScaleByAdamState, params: Tree | None = None
    ) -> tuple[Tree, optax.ScaleByAdamState]:
        del params
        count = optax.safe_increment(state.count)
        n = count.astype(jnp.float32)
        mu = jax.tree.map(lambda m, g: b1 * m + (1.0 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1.0 - b2) * g * g, state.nu, grads)
        # -expm1(n log b) is 1 - b^n without the cancellation that b near 1 would suffer in float32.
        m_scale, v_scale = (1.0 / -jnp.expm1(n * (math.log(b) if b else -math.inf)) for b in (b1, b2))
        updates = jax.tree.map(lambda m, v: m * m_scale / (jnp.sqrt(v * v_scale) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _scale_by_step(schedule: Schedule) -> optax.GradientTransformationExtraArgs:
    def update(
        updates: Tree, state: optax.OptState, params: Tree | None = None, *, step: jax.Array, **_: Any
    ) -> tuple[Tree, optax.OptState]:
        del params
        rate = schedule(step)
        return jax.tree.map(lambda u: -rate.astype(u.dtype) * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _check(optim: ConfigDict) -> None:
    for name, low, high in (
        ("learning_rate", 0.0, float("inf")),
        ("warmup_steps", 0, float("inf")),
        ("b1", 0.0, 1.0),
        ("b2", 0.0, 1.0),
        ("eps", 0.0, float("inf")),
        ("weight_decay", 0.0, float("inf")),
        ("clip_norm", 0.0, float("inf")),
        ("ema_decay", 0.0, 1.0),
        ("accumulate", 1, float("inf")),
        ("lora_rank", 0, float("inf")),
    ):
        value = optim[name]
        if not low <= value < high:
            raise UserError(f"optim.{name} is {value}: expected at least {low} and below {high}")
