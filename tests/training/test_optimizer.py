import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from unclip_jax.errors import UserError
from unclip_jax.training.optimizer import decayed, ema_update, learning_rate, make_optimizer
from unclip_jax.training.state import root_key


def constant(toy, **optim):
    """The toy's optim section, reduced to a constant learning rate of 0.1 and plain Adam, plus `optim`."""
    plain = {"learning_rate": 0.1, "warmup_steps": 0, "schedule": "constant", "weight_decay": 0.0, "clip_norm": 0.0}
    return toy.config(**(plain | optim)).optim


def test_one_adam_step_is_the_closed_form(toy):
    # From zero moments, m_hat = g and v_hat = g^2 whatever b1 and b2 are.
    g, w = np.array([[0.5, -2.0], [1e-3, 0.0]]), np.array([[1.0, 2.0], [3.0, -4.0]])
    optimizer = make_optimizer(constant(toy, eps=1e-2, weight_decay=0.5), 10)
    params = {"kernel": jnp.asarray(w, jnp.float32)}
    updates, _ = optimizer.update(
        {"kernel": jnp.asarray(g, jnp.float32)}, optimizer.init(params), params, step=jnp.int32(0)
    )
    np.testing.assert_allclose(updates["kernel"], -0.1 * (g / (np.abs(g) + 1e-2) + 0.5 * w), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("b1, b2, eps", [(0.9, 0.999, 1e-8), (0.9, 0.91, 1e-10), (0.0, 0.96, 1e-6)])
def test_adam_agrees_with_optax(toy, b1, b2, eps):
    rng = np.random.default_rng(0)
    ours = {"a": {"kernel": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)}}
    theirs = ours
    optimizer = make_optimizer(constant(toy, b1=b1, b2=b2, eps=eps, weight_decay=0.05), 10)
    reference = optax.adamw(0.1, b1=b1, b2=b2, eps=eps, weight_decay=0.05)
    state, reference_state = optimizer.init(ours), reference.init(theirs)
    for k in range(6):
        grads = {"a": {"kernel": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)}}
        updates, state = optimizer.update(grads, state, ours, step=jnp.int32(k))
        ours = optax.apply_updates(ours, updates)
        with jax.numpy_dtype_promotion("standard"):
            updates, reference_state = reference.update(grads, reference_state, theirs)
            theirs = optax.apply_updates(theirs, updates)
    # optax forms 1 - 0.999^n in float32, which costs it up to 3e-5 of each step of 0.1.
    np.testing.assert_allclose(ours["a"]["kernel"], theirs["a"]["kernel"], rtol=0, atol=1e-5)


def test_gradients_are_clipped_to_the_global_norm(toy):
    # With an eps that dwarfs the gradient, one Adam step is -lr g / eps: the clipped gradient itself.
    grads = {"a": jnp.full((2, 2), 3.0), "b": jnp.full((4,), 4.0)}  # global norm 10
    for clip_norm, scale in ((1.0, 0.1), (20.0, 1.0), (0.0, 1.0)):
        optimizer = make_optimizer(constant(toy, eps=1e8, clip_norm=clip_norm), 10)
        updates, _ = optimizer.update(grads, optimizer.init(grads), grads, step=jnp.int32(0))
        np.testing.assert_allclose(np.asarray(updates["a"]) * -1e9, 3.0 * scale, rtol=1e-5)
        np.testing.assert_allclose(np.asarray(updates["b"]) * -1e9, 4.0 * scale, rtol=1e-5)


def test_weight_decay_spares_gains_and_biases():
    def leaf(*shape):
        return jnp.zeros(shape)

    params = {
        "blocks": {"norm": {"scale": leaf(24, 8), "bias": leaf(24, 8)}, "mlp": {"kernel": leaf(24, 8, 8)}},
        "conv": {"kernel": leaf(3, 3, 4, 4), "bias": leaf(4)},
        "tokens": {"embedding": leaf(100, 8)},
        "positional_embedding": leaf(77, 8),
        "class_embedding": leaf(8),
        "logit_scale": leaf(),
        "qkv_bias": leaf(3, 8),
        "fixed": {"components": leaf(8, 8)},
    }
    assert decayed(params) == {
        "blocks": {"norm": {"scale": False, "bias": False}, "mlp": {"kernel": True}},
        "conv": {"kernel": True, "bias": False},
        "tokens": {"embedding": True},
        "positional_embedding": True,
        "class_embedding": False,
        "logit_scale": False,
        "qkv_bias": False,
        "fixed": {"components": False},
    }


def test_update_without_a_gradient_is_the_decay_of_kernels_alone(toy):
    optimizer = make_optimizer(constant(toy, weight_decay=0.5), 10)
    params = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full((2,), 3.0)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params, step=jnp.int32(0))
    np.testing.assert_allclose(updates["kernel"], -0.1 * 0.5 * 3.0, rtol=1e-6)
    assert np.array_equal(updates["bias"], np.zeros(2))


@pytest.mark.parametrize(
    "schedule, expected",
    [
        # peak 2, warm-up of 4 steps, 12 in all: steps 0, 1, 3, 4, 6, 8, 10, 12
        ("constant", [0.5, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]),
        ("linear", [0.5, 1.0, 2.0, 2.0, 1.5, 1.0, 0.5, 0.0]),
        ("cosine", [0.5, 1.0, 2.0, 2.0, 1 + 0.5**0.5, 1.0, 1 - 0.5**0.5, 0.0]),
    ],
)
def test_learning_rate_warms_up_and_decays_to_zero(toy, schedule, expected):
    rate = learning_rate(toy.config(learning_rate=2.0, warmup_steps=4, schedule=schedule).optim, 12)
    found = [float(jax.jit(rate)(jnp.int32(k))) for k in (0, 1, 3, 4, 6, 8, 10, 12)]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_learning_rate_without_warm_up_starts_at_its_peak(toy):
    rate = learning_rate(toy.config(learning_rate=2.0, warmup_steps=0, schedule="linear").optim, 10)
    assert float(rate(0)) == 2.0 and rate(0).dtype == jnp.float32


def test_the_update_follows_the_learning_rate_of_the_step_it_is_given(toy):
    optim = constant(toy, schedule="linear")
    optimizer = make_optimizer(optim, 10)
    params = {"kernel": jnp.ones((2, 2))}
    state = optimizer.init(params)
    for k in (0, 5, 9):  # the first Adam step from the same state is the rate itself
        updates, _ = optimizer.update(params, state, params, step=jnp.int32(k))
        np.testing.assert_allclose(updates["kernel"], -0.1 * (1 - k / 10), rtol=1e-5)


def test_ema_decay_warms_up():
    # min(decay, (1 + k) / (10 + k)): 0.1 at 0, 0.5 at 8, 0.991 at 990, then the decay itself.
    for k, decay in ((0, 0.1), (8, 0.5), (990, 0.991), (100_000, 0.9999)):
        ema = ema_update({"w": jnp.float32(1.0)}, {"w": jnp.float32(2.0)}, jnp.int32(k), 0.9999)
        np.testing.assert_allclose(float(ema["w"]), decay * 1.0 + (1 - decay) * 2.0, rtol=1e-6)


def test_ema_of_equal_parameters_is_exactly_them_and_integers_are_copied():
    weights = {"w": jax.random.normal(root_key(0), (100,)), "n": jnp.int32(3)}
    ema = ema_update(weights, weights, jnp.int32(7), 0.999)
    assert np.array_equal(ema["w"], weights["w"])
    assert int(ema_update(weights, {"w": weights["w"], "n": jnp.int32(9)}, jnp.int32(7), 0.999)["n"]) == 9


@pytest.mark.parametrize("name, value", [("b2", 1.0), ("eps", -1.0), ("ema_decay", 1.0), ("accumulate", 0)])
def test_numbers_out_of_range_are_named(toy, name, value):
    with pytest.raises(UserError, match=f"optim.{name} is"):
        make_optimizer(toy.config(**{name: value}).optim, 10)


def test_unknown_schedule_is_named(toy):
    with pytest.raises(UserError, match="'cosin': expected one of constant, cosine, linear"):
        learning_rate(toy.config(schedule="cosin").optim, 10)
