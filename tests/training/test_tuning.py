"""Parts of a model that are trained: frozen parameters, and low-rank changes beside kernels."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shrink import CONFIGS, random_batch, small_stage

from unclip_jax.errors import UserError
from unclip_jax.training.checkpoint import Checkpointer
from unclip_jax.training.gradients import gradients
from unclip_jax.training.leaves import named_leaves
from unclip_jax.training.sharding import make_mesh, to_host
from unclip_jax.training.state import abstract_state, digest, init_state, make_train_step, root_key
from unclip_jax.training.tuning import FACTORS, merged, overlaid, trained_part, with_factors

OTHERS = [name for name in CONFIGS if name != "prior_diffusion"]


def trained(toy, config, mesh, steps=2):
    """The state before and after some steps of the toy, on this host."""
    state = init_state(toy.Stage(), config, mesh, 0)
    before, step = jax.tree.map(to_host, state), toy.step(toy.Stage(), config, mesh)
    for k in range(steps):
        state, metrics = step(state, {}, toy.batch(k, mesh), root_key(0))
        assert np.isfinite(float(metrics["loss"])) and metrics["skipped"] == 0
    return before, jax.tree.map(to_host, state), state


@pytest.mark.parametrize("pattern", ["hidden", "hidden/*", "h*"])
def test_frozen_parameters_stay_and_have_no_moments(toy, pattern):
    before, after, state = trained(toy, toy.config(frozen=(pattern,)), toy.mesh(2, 4))
    chex.assert_trees_all_equal(after.params["hidden"], before.params["hidden"])
    assert not np.array_equal(after.params["out"]["kernel"], before.params["out"]["kernel"])
    for tree in (after.ema, after.opt_state[1].mu, after.opt_state[1].nu):
        assert list(named_leaves(tree)) == ["out/kernel"]
    average = jax.tree.map(to_host, state.average)
    chex.assert_trees_all_equal(average["hidden"], before.params["hidden"])
    chex.assert_trees_all_equal(average["out"], after.ema["out"])


def test_what_is_not_frozen_learns_as_with_all_of_it_trained(toy):
    """The first step of Adam looks at each parameter alone, where the norm of all gradients is not clipped."""
    plain = dict(clip_norm=0.0)
    all_of_it, part = (trained(toy, toy.config(frozen=f, **plain), toy.mesh(1, 1), 1)[1] for f in ((), ("hidden",)))
    chex.assert_trees_all_close(part.params["out"], all_of_it.params["out"], rtol=1e-6)


@pytest.mark.parametrize(
    ("optim", "says"),
    [
        (dict(frozen=("hiden",)), "no parameter is named 'hiden'; the nearest is 'hidden'"),
        (dict(frozen=("hidden/kernels",)), "the nearest is 'hidden/kernel'"),
        (dict(frozen=("hid",)), "the nearest is 'hidden'"),
        (dict(frozen=("*",)), "leave no parameter to be trained"),
        (dict(lora_rank=16), "leave no parameter to be trained"),
    ],
)
def test_what_cannot_be_trained_is_refused(toy, optim, says):
    frozen = ("hidden",) if "lora_rank" in optim else ()  # out/kernel is 256 x 16
    with pytest.raises(UserError, match=says):
        abstract_state(toy.Stage(), toy.config(**({"frozen": frozen} | optim)), toy.mesh(1, 1))


def test_factors_stand_beside_kernels_of_higher_rank():
    stage, _, params = small_stage("decoder")
    config = stage.config.copy_and_resolve_references().unlock()
    config.optim.update(dict(lora_rank=3, frozen=("conditioner",)))
    found = named_leaves(with_factors(params, config.optim, jax.random.key(0))[FACTORS])
    kernels = {n: w for n, w in named_leaves(params).items() if n.startswith("unet") and n.endswith("kernel")}
    narrow = {n for n in kernels if n.startswith(("unet/conv_in", "unet/conv_out")) and kernels[n].shape[-1] <= 3}
    assert narrow and {n.rpartition("/")[0] for n in found} == kernels.keys() - narrow
    for name, kernel in kernels.items():
        if name not in narrow:
            assert found[f"{name}/A"].shape == (*kernel.shape[:-1], 3)
            assert found[f"{name}/B"].shape == (3, kernel.shape[-1])  # one for the window of a convolution
    assert not any(np.any(value) for name, value in found.items() if name.endswith("B"))


def test_gradients_of_factors_are_the_closed_form(toy):
    """Of W + A B: dA = dW Bᵀ and dB = Aᵀ dW; layer by layer of a stack, over the whole window of a convolution."""
    rng, optim = np.random.default_rng(0), toy.config(lora_rank=2).optim

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape) / 4, jnp.float32)

    class Kinds:
        def loss(self, params, frozen, batch, key):
            x = jnp.tanh(batch["x"] @ params["dense"]["kernel"])
            x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["blocks"]["kernel"])
            x = x.reshape(-1, 2, 2, 4)
            dimensions = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(x, params["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=dimensions)
            return jnp.mean(jnp.square(x - 1)), {}

    params = {"dense": {"kernel": draw(8, 16), "bias": draw(16)}, "blocks": {"kernel": draw(3, 16, 16)}}
    params = with_factors(params | {"conv": {"kernel": draw(3, 3, 4, 5)}}, optim, jax.random.key(0))
    part = jax.tree.map(lambda w: draw(*w.shape), trained_part(params, optim))
    params, batch, key = overlaid(params, part), {"x": draw(6, 8)}, jax.random.key(5)
    _, _, grads = gradients(Kinds(), params, part, {}, batch, key, 1, toy.mesh(1, 1))
    whole = named_leaves(jax.grad(lambda w: Kinds().loss(w, {}, batch, key)[0])(merged(params)))
    assert len(named_leaves(grads)) == 6
    assert {name.partition("/")[0] for name in named_leaves(grads)} == {FACTORS}
    grads, part = named_leaves(grads[FACTORS]), named_leaves(part[FACTORS])
    for name in {name.rpartition("/")[0] for name in part}:
        A, B, dW = part[f"{name}/A"], part[f"{name}/B"], whole[name]
        equations = {2: ("io,ro->ir", "ir,io->ro"), 3: ("lio,lro->lir", "lir,lio->lro"),
                     4: ("hwio,ro->hwir", "hwir,hwio->ro")}[dW.ndim]  # fmt: skip
        scale = float(jnp.abs(dW).max())
        for letter, equation, other in (("A", equations[0], (dW, B)), ("B", equations[1], (A, dW))):
            expected = np.einsum(equation, *(np.asarray(x, np.float64) for x in other))
            np.testing.assert_allclose(grads[f"{name}/{letter}"], expected, rtol=1e-4, atol=1e-5 * scale, err_msg=name)


@pytest.mark.parametrize("name", ["prior_diffusion", *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)])
def test_low_rank_changes_lower_the_loss_and_only_they_are_trained(name):
    stage, frozen, origin = small_stage(name)
    config = stage.config.copy_and_resolve_references().unlock()
    config.optim.update(dict(lora_rank=2, warmup_steps=0, schedule="constant", learning_rate=0.01))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    state = init_state(stage, config, mesh, 0)
    state = state._replace(params=jax.tree.map(jnp.array, state.params | origin))
    step, batch, losses = make_train_step(stage, config, mesh), random_batch(stage, 16), []
    before = jax.jit(stage.loss)(origin, frozen, batch, jax.random.fold_in(jax.random.fold_in(root_key(0), 0), 0))[0]
    for _ in range(8):
        state, metrics = step(state._replace(step=jnp.int32(0)), frozen, batch, root_key(0))
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(float(before), rel=1e-5), "B is zero at first"
    assert losses[-1] < losses[0]
    assert {n.partition("/")[0] for n in named_leaves(state.opt_state[1].mu)} == {FACTORS}
    kept = {n: v for n, v in state.params.items() if n != FACTORS}
    chex.assert_trees_all_equal(jax.device_get(kept), jax.device_get(origin))


def test_resumed_factors_equal_uninterrupted_ones_bit_for_bit(toy, tmp_path):
    config, mesh = toy.config(lora_rank=4, frozen=("hidden",)), toy.mesh(2, 1)
    step, state = toy.step(toy.Stage(), config, mesh), init_state(toy.Stage(), config, mesh, 0)
    for k in range(4):
        if k == 2:
            checkpoints = Checkpointer(str(tmp_path), 2)
            checkpoints.save(state, {})
            checkpoints.wait()
            resumed = checkpoints.restore_latest(abstract_state(toy.Stage(), config, mesh))
            checkpoints.close()
            assert digest(resumed) == digest(state)
        state, _ = step(state, {}, toy.batch(k, mesh), root_key(0))
    for k in (2, 3):
        resumed, _ = step(resumed, {}, toy.batch(k, mesh), root_key(0))
    assert digest(resumed) == digest(state)
    assert list(named_leaves(state.ema)) == ["lora/out/kernel/A", "lora/out/kernel/B"]


def test_many_devices_and_microbatches_train_the_same_factors(toy):
    """A large eps, because Adam turns the rounding of a gradient near zero into a step of up to the learning rate."""
    found = []
    for mesh in (toy.mesh(1, 1), toy.mesh(2, 4)):
        before, after, state = trained(toy, toy.config(lora_rank=4, eps=1e-2), mesh)
        found.append(after)
        assert digest(init_state(toy.Stage(), toy.config(lora_rank=4), mesh, 0)) == digest(
            init_state(toy.Stage(), toy.config(lora_rank=4), toy.mesh(1, 1), 0)
        )
        whole = jax.tree.map(to_host, state.average)
        A, B = (after.ema[FACTORS]["out"]["kernel"][name] for name in "AB")
        assert np.abs(B).max() > 0
        np.testing.assert_allclose(whole["out"]["kernel"], before.params["out"]["kernel"] + A @ B, rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_close(found[0].params, found[1].params, rtol=1e-4, atol=1e-6)
