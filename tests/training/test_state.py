import hashlib
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.errors import UserError
from unclip_jax.training.metrics import scalars
from unclip_jax.training.state import Skips, TrainState, abstract_state, digest, init_state, root_key, skipped


def train(toy, stage, config, mesh, steps, batch=None):
    """The state after `steps` steps from seed 0, and the metrics of each."""
    state = init_state(stage, config, mesh, seed=0)
    step, log = toy.step(stage, config, mesh), []
    for k in range(steps):
        state, metrics = step(state, {}, toy.batch(k, mesh) if batch is None else batch, root_key(0))
        log.append(jax.device_get(metrics))
    return state, log


def test_the_start_is_the_same_on_every_mesh_and_depends_on_the_seed(toy):
    config = toy.config()
    states = [init_state(toy.Stage(), config, mesh, 0) for mesh in (toy.mesh(1, 1), toy.mesh(2, 4))]
    assert digest(states[0]) == digest(states[1])
    other = init_state(toy.Stage(), config, toy.mesh(1, 1), 1)
    assert digest(other) != digest(states[0])


def test_ema_starts_as_the_parameters(toy):
    state = init_state(toy.Stage(), toy.config(), toy.mesh(2, 4), 0)
    assert int(state.step) == 0
    chex.assert_trees_all_equal(state.ema, state.params)


def test_training_starts_from_another_key_than_the_parameters():
    # split(key)[i] is fold_in(key, i), so a stage that splits its key could meet the keys of steps 0, 1, ...
    start = jax.random.fold_in(jax.random.key(0), 0)
    of_params = {tuple(map(int, jax.random.key_data(k))) for k in [start, *jax.random.split(start, 8)]}
    of_steps = {tuple(map(int, jax.random.key_data(jax.random.fold_in(root_key(0), k)))) for k in range(8)}
    assert len(of_steps) == 8 and not of_params & of_steps


def test_params_ema_and_moments_are_split_alike(toy):
    state = init_state(toy.Stage(), toy.config(), toy.mesh(2, 4), 0)
    adam = state.opt_state[1]
    for tree in (state.params, state.ema, adam.mu, adam.nu):
        assert tree["hidden"]["kernel"].addressable_shards[0].data.shape == (32, 256)
    abstract = abstract_state(toy.Stage(), toy.config(), toy.mesh(2, 4))
    for a, b in zip(jax.tree.leaves(abstract), jax.tree.leaves(state), strict=True):
        assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)


def test_sharded_training_equals_one_device(toy):
    # A large eps, because Adam turns the rounding of a gradient near zero into a step of up to the learning rate.
    config = toy.config(eps=1e-2)
    one, one_log = train(toy, toy.Stage(), config, toy.mesh(1, 1), 3)
    for mesh in (toy.mesh(2, 4), toy.mesh(8, 1)):
        many, many_log = train(toy, toy.Stage(), config, mesh, 3)
        chex.assert_trees_all_close(many_log, one_log, rtol=1e-5)
        chex.assert_trees_all_close((many.params, many.ema), (one.params, one.ema), rtol=1e-5, atol=1e-6)


def test_compiled_step_gathers_and_never_permutes(toy):
    class Convolution:
        tpu_options = None

        def init(self, key):
            one, two = jax.random.split(key)
            shape = (3, 3, 64, 64)
            return {"one": 0.05 * jax.random.normal(one, shape), "two": 0.05 * jax.random.normal(two, shape)}

        def loss(self, params, frozen, batch, key):
            x = batch["x"]
            for name in ("one", "two"):
                x = jax.nn.silu(jax.lax.conv_general_dilated(x, params[name], (1, 1), "SAME",
                                                             dimension_numbers=("NHWC", "HWIO", "NHWC")))
            return jnp.mean(x**2), {}

        def project(self, params):
            return params

    config, mesh = toy.config(accumulate=2), toy.mesh(2, 4)
    state = abstract_state(Convolution(), config, mesh)
    batch = {"x": jax.ShapeDtypeStruct((32, 8, 8, 64), jnp.float32)}
    compiled = toy.step(Convolution(), config, mesh).lower(state, {}, batch, root_key(0)).compile()
    operations = re.findall(r"(all-gather|all-to-all|collective-permute)(?:-start)?\(", compiled.as_text())
    assert operations == ["all-gather"] * 2  # each parameter once; left to propagation there are more


def test_the_state_is_updated_in_place(toy):
    config, mesh = toy.config(), toy.mesh(1, 1)
    state = init_state(toy.Stage(), config, mesh, 0)
    step = toy.step(toy.Stage(), config, mesh)
    compiled = step.lower(state, {}, toy.batch(0, mesh), root_key(0)).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    step(state, {}, toy.batch(0, mesh), root_key(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


class Linear:
    """loss = mean over rows of x . w, whose gradient is the mean of x."""

    tpu_options = None

    def init(self, key):
        return {"kernel": jnp.ones((128, 1))}

    def loss(self, params, frozen, batch, key):
        return jnp.mean(batch["x"] @ params["kernel"]), {}

    def project(self, params):
        return params


@pytest.mark.parametrize("accumulate", [1, 4])
def test_metrics_of_a_linear_loss_are_its_closed_form(toy, accumulate):
    config, mesh = toy.config(accumulate=accumulate, learning_rate=0.01, weight_decay=0.0), toy.mesh(2, 4)
    state, (metrics,) = train(toy, Linear(), config, mesh, 1)
    mean = np.asarray(toy.batch(0, mesh)["x"], np.float64).mean(0)
    np.testing.assert_allclose(metrics["loss"], mean.sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(mean), rtol=1e-5)
    # The first Adam step moves every weight by the learning rate, here half of its peak, against its gradient.
    np.testing.assert_allclose(metrics["learning_rate"], 0.005, rtol=1e-6)
    expected = 1.0 - 0.005 * np.sign(mean)
    np.testing.assert_allclose(np.asarray(state.params["kernel"])[:, 0], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["param_norm"], np.linalg.norm(expected), rtol=1e-5)
    assert metrics["skipped"] == 0.0 and int(state.step) == 1
    assert all(value.dtype == np.float32 and value.shape == () for value in metrics.values())


def test_norms_are_of_all_leaves_together(toy):
    class Halves(Linear):
        def init(self, key):
            return {name: jnp.ones((64, 1)) for name in ("left", "right")}

        def loss(self, params, frozen, batch, key):
            return super().loss({"kernel": jnp.concatenate([params["left"], params["right"]])}, frozen, batch, key)

    mesh = toy.mesh(1, 1)
    state, (metrics,) = train(toy, Halves(), toy.config(), mesh, 1)
    mean = np.asarray(toy.batch(0, mesh)["x"], np.float64).mean(0)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(mean), rtol=1e-5)
    both = np.concatenate([state.params["left"], state.params["right"]])
    np.testing.assert_allclose(metrics["param_norm"], np.linalg.norm(both), rtol=1e-5)


def test_four_microbatches_equal_one_batch(toy):
    class Quiet(toy.Stage):
        def loss(self, params, frozen, batch, key):
            out = jnp.tanh(batch["x"] @ params["hidden"]["kernel"]) @ params["out"]["kernel"]
            return jnp.mean((out - batch["y"]) ** 2), {"mean_x": jnp.mean(batch["x"])}

    one, one_log = train(toy, Quiet(), toy.config(accumulate=1), toy.mesh(2, 2), 1)
    four, four_log = train(toy, Quiet(), toy.config(accumulate=4), toy.mesh(2, 2), 1)
    chex.assert_trees_all_close(four_log, one_log, rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_close(four.opt_state[1].mu, one.opt_state[1].mu, rtol=1e-4, atol=1e-8)


def test_noise_is_a_function_of_seed_step_and_microbatch(toy):
    class Noise(Linear):
        def loss(self, params, frozen, batch, key):
            return jnp.mean(params["kernel"]) * jnp.mean(jax.random.normal(key, (len(batch["x"]),))), {
                "noise": jnp.mean(jax.random.normal(key, (len(batch["x"]),)))
            }

    _, log = train(toy, Noise(), toy.config(accumulate=2), toy.mesh(2, 4), 3)
    for k, metrics in enumerate(log):
        key = jax.random.fold_in(root_key(0), k)
        expected = np.mean([jax.random.normal(jax.random.fold_in(key, m), (16,)) for m in range(2)])
        np.testing.assert_allclose(metrics["noise"], expected, rtol=1e-4, atol=1e-6)


def test_a_step_that_is_not_finite_is_skipped(toy):
    config, mesh = toy.config(warmup_steps=8, schedule="constant"), toy.mesh(2, 4)
    state, _ = train(toy, toy.Stage(), config, mesh, 2)
    before, step = digest(state), toy.step(toy.Stage(), config, mesh)
    bad = toy.batch(2, mesh)
    bad["y"] = bad["y"].at[3, 5].set(jnp.nan)
    state, metrics = step(state, {}, jax.device_put(bad, toy.batch(2, mesh)["y"].sharding), root_key(0))
    assert digest(state) == before and int(state.step) == 3
    assert metrics["skipped"] == 1.0 and np.isnan(metrics["loss"])
    state, metrics = step(state, {}, toy.batch(3, mesh), root_key(0))
    assert digest(state) != before and metrics["skipped"] == 1.0, "the one before it is still counted"
    # The rate is that of step 3, while Adam counts the three updates that were done.
    np.testing.assert_allclose(metrics["learning_rate"], 1e-2 * 4 / 8, rtol=1e-6)
    assert int(state.opt_state[1].count) == 3


def test_run_with_a_bad_batch_equals_one_without_that_step(toy):
    config, mesh = toy.config(), toy.mesh(2, 4)
    step, start = toy.step(toy.Stage(), config, mesh), lambda: train(toy, toy.Stage(), config, mesh, 2)[0]
    bad = toy.batch(2, mesh)
    bad["x"] = jax.device_put(bad["x"].at[0, 0].set(jnp.nan), bad["x"].sharding)
    state, _ = step(start(), {}, bad, root_key(0))
    without = start()
    without = without._replace(step=without.step + 1)
    for k in (3, 4):
        state, _ = step(state, {}, toy.batch(k, mesh), root_key(0))
        without, _ = step(without, {}, toy.batch(k, mesh), root_key(0))
    assert digest(state) == digest(without)
    assert [int(value) for value in state.skips[:4]] == [0, 1, 0, 3] and int(without.skips.steps) == 0


def test_steps_that_are_not_finite_are_named_and_end_the_run(toy):
    class Spoiled(toy.Stage):
        """The gradient of one leaf is no number where the batch says so."""

        def loss(self, params, frozen, batch, key):
            loss, metrics = super().loss(params, frozen, batch, key)
            return loss + jnp.sum(batch["spoil"][:1, None] * params["out"]["kernel"][:1]), metrics

    mesh = toy.mesh(1, 1)
    config = toy.config()
    step, state, said = toy.step(Spoiled(), config, mesh), init_state(Spoiled(), config, mesh, 0), []
    for k in range(4):
        state, metrics = step(state, {}, toy.batch(k, mesh) | {"spoil": jnp.full(32, jnp.nan)}, root_key(0))
        said.append((int(state.skips.in_a_row), metrics["skipped"]))
    assert said[:3] == [(1, 1), (2, 2), (3, 3)] and said[3] == (3, 3), "it stays at what is allowed"
    says = r"not finite for 3 steps in a row, up to step 3: .*largest in out/kernel: .*max_skips"
    with pytest.raises(UserError, match=says):
        skipped(state.skips, state.params, 3)
    assert "largest in out/kernel" in skipped(state.skips, state.params, 4)
    before = digest(state)
    state, _ = step(state, {}, toy.batch(5, mesh) | {"spoil": jnp.zeros(32)}, root_key(0))
    assert digest(state) == before


def test_a_pair_of_metrics_is_the_mean_of_its_rows_over_microbatches_and_devices(toy):
    class Counting(Linear):
        """Rows are dealt out in turn, so that the microbatches have other counts."""

        def loss(self, params, frozen, batch, key):
            within = (batch["x"][:, 0] > 0).astype(jnp.float32)
            loss, metrics = super().loss(params, frozen, batch, key)
            return loss, metrics | {"part": (jnp.mean(within * batch["x"][:, 1]), jnp.mean(within))}

    mesh = toy.mesh(2, 1)
    batch = toy.batch(0, mesh)
    x = np.asarray(batch["x"])
    _, (metrics,) = train(toy, Counting(), toy.config(accumulate=4), mesh, 1, batch)
    np.testing.assert_allclose(scalars(metrics)["part"], x[x[:, 0] > 0, 1].mean(), rtol=1e-5)


def test_infinite_gradient_of_a_finite_loss_is_skipped(toy):
    class Root(Linear):
        def init(self, key):
            return {"kernel": jnp.zeros((4, 4))}

        def loss(self, params, frozen, batch, key):
            return jnp.sum(jnp.sqrt(params["kernel"])) + 0.0 * jnp.sum(batch["x"]), {}

    state, (metrics,) = train(toy, Root(), toy.config(), toy.mesh(1, 1), 1)
    assert np.isfinite(metrics["loss"]) and metrics["skipped"] == 1.0
    assert np.array_equal(state.params["kernel"], np.zeros((4, 4)))


def test_infinite_loss_with_finite_gradients_is_skipped(toy):
    class Overflow(Linear):
        def loss(self, params, frozen, batch, key):
            return jnp.mean(batch["x"] @ params["kernel"]) + jnp.inf, {}

    state, (metrics,) = train(toy, Overflow(), toy.config(), toy.mesh(1, 1), 1)
    assert np.isfinite(metrics["grad_norm"]) and metrics["skipped"] == 1.0
    assert np.array_equal(state.params["kernel"], np.ones((128, 1)))


def test_project_comes_before_the_average(toy):
    class Clamped(Linear):
        def project(self, params):
            return jax.tree.map(lambda w: jnp.minimum(w, 0.5), params)

    # At step 0 the average keeps 0.1 of the start, which is 1.
    state, _ = train(toy, Clamped(), toy.config(), toy.mesh(1, 1), 1)
    assert np.array_equal(state.params["kernel"], np.full((128, 1), 0.5, np.float32))
    np.testing.assert_allclose(state.ema["kernel"], 0.1 * 1.0 + 0.9 * 0.5, rtol=1e-6)


def test_everything_trained_is_float32(toy):
    state, _ = train(toy, toy.Stage(), toy.config(), toy.mesh(1, 1), 1)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves((state.params, state.ema))} == {"float32"}
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state.opt_state)} == {"float32", "int32"}


def test_digest_is_sha256_over_names_and_bytes():
    one, two = np.array([1.0, 2.0], np.float32), np.array([[3]], np.int32)
    state = TrainState(jnp.int32(5), Skips(*[jnp.int32(0)] * 5), *[{"b": jnp.asarray(one)}] * 2, (jnp.asarray(two),))
    expected = hashlib.sha256(
        b"ema/b float32 (2,)\n" + one.tobytes() + b"opt_state/0 int32 (1, 1)\n" + two.tobytes()
        + b"params/b float32 (2,)\n" + one.tobytes()
    ).hexdigest()
    assert digest(state) == expected
    assert digest(state._replace(step=jnp.int32(6))) == expected


def test_digest_changes_with_one_bit(toy):
    state = jax.device_get(init_state(toy.Stage(), toy.config(), toy.mesh(2, 4), 0))
    before = digest(state)
    for tree in (state.params["out"], state.ema["out"], state.opt_state[1].nu["out"]):
        kept = tree["kernel"]
        tree["kernel"] = kept.copy()
        tree["kernel"].view(np.uint32)[-1, -1] ^= 1
        assert digest(state) != before
        tree["kernel"] = kept
    assert digest(state) == before


def test_batch_size_that_does_not_split_is_an_error(toy):
    with pytest.raises(UserError, match=r"batch_size=32 .*accumulate=8 microbatches over 8 devices.*multiple of 64"):
        toy.step(toy.Stage(), toy.config(accumulate=8), toy.mesh(2, 4))
