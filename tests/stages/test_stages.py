"""Every stage: what its loss listens to, and that a mesh changes nothing."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from shrink import CONFIGS, random_batch, small_stage

from unclip_jax.models.unet import read_context
from unclip_jax.stages import make_stage
from unclip_jax.stages.base import diffusion_loss
from unclip_jax.stages.conditions import Conditions, captions
from unclip_jax.training.leaves import named_leaves
from unclip_jax.training.sharding import batch_sharding, gather_params, make_mesh, param_shardings, replicated

# Stages whose code another config, or test_public_forms, runs too.
TWICE = ("clip_noised", "upsampler_1024", "glide", "glide_upsampler")
STAGE_CASES = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in TWICE)) for name in CONFIGS]
)


@STAGE_CASES
def test_batch_spec_and_loss_agree(name):
    stage, frozen, params = small_stage(name)
    spec = stage.batch_spec(8)
    loss, metrics = jax.eval_shape(stage.loss, params, frozen, spec, jax.random.key(0))
    chex.assert_shape([loss, *jax.tree.leaves(metrics)], ())
    assert loss.dtype == jnp.float32


@pytest.mark.parametrize("name", CONFIGS)
def test_captions_have_start_and_end_tokens_where_clip_reads_them_alone(name):
    """Bundles hold parameters that learned from the one or the other."""
    stage = small_stage(name)[0]
    of_clip = {"tokens"} if name.startswith("clip") else {"clip_tokens"}
    assert {text for text, (_, _, ends) in stage.texts.items() if ends} == of_clip & set(stage.texts)
    assert all(whose == ("clip" if text == "clip_tokens" else "own") for text, (whose, _, _) in stage.texts.items())


def test_losses_of_the_quarters_make_up_the_loss():
    """Of a network whose x0 is wrong by the share of the timesteps that have passed."""
    config, x0, rows = small_stage("prior_diffusion")[0].config, jnp.zeros((256, 8)), 256
    wrong = lambda x_t, t: jnp.broadcast_to(t[:, None] / config.diffusion.timesteps, x_t.shape)  # noqa: E731
    loss, metrics = diffusion_loss(config, wrong, x0, jax.random.key(0))
    sums, shares = np.array([metrics[f"loss_q{quarter}"] for quarter in (1, 2, 3, 4)]).T
    np.testing.assert_allclose(sums.sum(), loss, rtol=1e-5)
    np.testing.assert_allclose(shares.sum(), 1, rtol=1e-6)
    assert (shares > 0.15).all() and ((rows * shares) % 1 == 0).all()
    edges = np.arange(5) / 4
    assert (edges[:-1] ** 2 <= sums / shares).all() and (sums / shares < edges[1:] ** 2).all()


def test_an_infinite_loss_in_one_quarter_is_not_one_in_another():
    config = small_stage("prior_diffusion")[0].config
    late = lambda x_t, t: jnp.where(4 * t[:, None] // config.diffusion.timesteps == 3, jnp.inf, x_t)  # noqa: E731
    loss, metrics = diffusion_loss(config, late, jnp.zeros((256, 8)), jax.random.key(0))
    sums = [float(metrics[f"loss_q{quarter}"][0]) for quarter in (1, 2, 3, 4)]
    assert np.isinf(loss) and np.isfinite(sums[:3]).all() and np.isinf(sums[3])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in (*TWICE, "decoder"))) for name in CONFIGS]
)
def test_sharded_equals_one_device(name):
    stage, frozen, params = small_stage(name)
    batch, key = random_batch(stage, 16), jax.random.key(3)
    differentiate = jax.value_and_grad(lambda p, b: stage.loss(p, frozen, b, key)[0])
    one_loss, one_grads = jax.jit(differentiate)(params, batch)

    mesh = make_mesh(ConfigDict(dict(data=2, fsdp=4)))
    shardings = param_shardings(params, mesh)

    @jax.jit
    def on_mesh(params, batch):
        loss = lambda p: stage.loss(gather_params(p, mesh), jax.device_put(frozen, replicated(mesh)), batch, key)[0]  # noqa: E731
        value, grads = jax.value_and_grad(loss)(params)
        return value, jax.lax.with_sharding_constraint(grads, shardings)

    loss, grads = on_mesh(jax.device_put(params, shardings), jax.device_put(batch, batch_sharding(mesh)))
    np.testing.assert_allclose(loss, one_loss, rtol=1e-5)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(one_grads))
    chex.assert_trees_all_close(jax.device_get(grads), jax.device_get(one_grads), atol=2e-5 * scale, rtol=1e-4)


@STAGE_CASES
def test_every_parameter_learns(name):
    stage, frozen, params = small_stage(name)
    batch = random_batch(stage, 16)
    grads = jax.jit(jax.grad(lambda p: stage.loss(p, frozen, batch, jax.random.key(5))[0]))(params)
    still = {name for name, g in named_leaves(grads).items() if not float(jnp.abs(g).max()) > 0}
    assert still == {name for name in named_leaves(params) if name.startswith("fixed/")}


def decoder_inputs(rows=4):
    stage, _, params = small_stage("decoder")
    batch = random_batch(stage, rows)
    z = jax.random.normal(jax.random.key(9), (rows, stage.config.model.embedding_dim))
    x = jax.random.normal(jax.random.key(8), (rows, 8, 8, 3))

    @jax.jit
    def output(z, tokens, length, has):
        captions = {"tokens": tokens, "tokens_length": length}
        conditioning = stage.condition(params, {}, captions, jnp.ones(rows, bool), z, has)
        t = jnp.full((rows,), 500, jnp.int32)
        return stage._unet().apply({"params": params["unet"]}, x, t, *conditioning)

    return output, z, batch["tokens"], jnp.asarray(batch["tokens_length"])


def test_dropped_embedding_reaches_the_decoder_on_no_path():
    output, z, tokens, length = decoder_inputs()
    has = jnp.zeros(4, bool)
    gradient = jax.jit(jax.grad(lambda z: jnp.sum(output(z, tokens, length, has) ** 2)))
    assert float(jnp.abs(gradient(z)).max()) == 0
    kept = jax.jit(jax.grad(lambda z: jnp.sum(output(z, tokens, length, ~has) ** 2)))(z)
    assert float(jnp.abs(kept).max()) > 0


def test_dropped_caption_reaches_the_decoder_on_no_path():
    output, z, tokens, length = decoder_inputs()
    has = jnp.ones(4, bool)
    np.testing.assert_array_equal(output(z, tokens, 0 * length, has), output(z, tokens + 1, 0 * length, has))
    assert not np.array_equal(output(z, tokens, length, has), output(z, tokens + 1, length, has))


def test_tokens_beyond_a_captions_length_do_not_matter():
    output, z, tokens, _ = decoder_inputs()
    length, has = jnp.full((4,), 3, jnp.int32), jnp.ones(4, bool)
    changed = tokens.copy()
    changed[:, 3:] += 1
    np.testing.assert_array_equal(output(z, tokens, length, has), output(z, changed, length, has))


def test_decoder_drops_embedding_and_caption_independently_at_their_own_rates(monkeypatch):
    stage, frozen, params = small_stage("decoder")
    seen = {}

    def spy(self, params, frozen, captions, has_caption, z, has_embedding):
        seen["caption"], seen["embedding"] = has_caption, has_embedding
        return original(self, params, frozen, captions, has_caption, z, has_embedding)

    original = type(stage).condition
    monkeypatch.setattr(type(stage), "condition", spy)
    batch = random_batch(stage, 16)

    @jax.jit
    def drops(key):
        stage.loss(params, frozen, batch, key)
        return jnp.stack([seen["caption"], seen["embedding"]])

    caption, embedding = np.concatenate([drops(jax.random.key(k)) for k in range(40)], axis=1)
    count = len(caption)
    assert abs(caption.mean() - 0.5) < 4 * (0.25 / count) ** 0.5
    assert abs(embedding.mean() - 0.9) < 4 * (0.09 / count) ** 0.5
    both = (caption & embedding).mean()
    assert abs(both - 0.45) < 4 * (0.2475 / count) ** 0.5


def prior_inputs():
    stage, _, params = small_stage("prior_diffusion")
    batch = random_batch(stage, 4)
    x, z_t = jax.random.normal(jax.random.key(1), (2, 4, stage.config.model.embedding_dim))
    t = jnp.full((4,), 300, jnp.int32)

    @jax.jit
    def output(x, tokens, length, z_t):
        return stage._model().apply({"params": params}, x, t, tokens, length, z_t)

    return output, x, batch["tokens"], jnp.asarray(batch["tokens_length"]), z_t


def test_prior_listens_to_the_noised_embedding_with_and_without_text():
    output, x, tokens, length, z_t = prior_inputs()
    for length_, text in ((length, z_t), (0 * length, 0 * z_t)):
        gradient = jax.grad(lambda x, n=length_, text=text: jnp.sum(output(x, tokens, n, text) ** 2))(x)
        assert float(jnp.abs(gradient).min(axis=-1).max()) > 0


def test_priors_unconditional_branch_ignores_the_text_and_differs_from_the_conditional():
    output, x, tokens, length, z_t = prior_inputs()
    null = output(x, tokens, 0 * length, 0 * z_t)
    np.testing.assert_array_equal(null, output(x, tokens + 1, 0 * length, 0 * z_t))
    assert float(jnp.abs(null - output(x, tokens, length, z_t)).max()) > 1e-3


def test_guidance_scale_one_is_the_conditional_prior_and_traced_scales_compile_once():
    stage, _, params = small_stage("prior_diffusion")
    batch = random_batch(stage, 4)
    z_t = jax.random.normal(jax.random.key(2), (4, stage.config.model.embedding_dim))
    z_t = z_t / jnp.linalg.norm(z_t, axis=-1, keepdims=True)
    conditions = Conditions(tokens=batch["tokens"], tokens_length=batch["tokens_length"], text_embedding=z_t)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def draw(scale, key):
        return stage.sample(params, {}, conditions._replace(guidance_scale=scale), key)

    outputs = [draw(jnp.float32(scale), jax.random.key(seed)) for scale in (0.0, 1.0, 3.0) for seed in (0, 1)]
    np.testing.assert_allclose(np.linalg.norm(outputs[0], axis=-1), 1, rtol=1e-5)
    assert not np.allclose(outputs[0], outputs[4])
    assert not np.allclose(outputs[0], outputs[1])


@pytest.mark.parametrize("name", ["decoder", "glide", "prior_diffusion", "prior_ar"])
def test_without_a_guidance_scale_the_conditional_model_draws_in_half_the_time(name):
    stage, frozen, params = small_stage(name)
    batch = random_batch(stage, 4)
    z = jax.random.normal(jax.random.key(2), (4, stage.config.model.get("embedding_dim", 8)))
    z = z / jnp.linalg.norm(z, axis=-1, keepdims=True)
    given = {"prior": {"text_embedding": z}, "decoder": {"image_embedding": z}}.get(name.split("_")[0], {})
    conditions = Conditions(**captions(batch), **given)
    assert stage.guidance(1) is None and stage.guidance(2.5) == 2.5
    assert stage.guidance() in (None, stage.config.sampling.guidance_scale)
    drawn, flops = [], []
    for scale in (stage.guidance(1), jnp.float32(1)):
        draw = jax.jit(stage.sample).lower(params, frozen, conditions._replace(guidance_scale=scale), jax.random.key(0))
        flops.append(draw.cost_analysis()["flops"])
        drawn.append(draw.compile()(params, frozen, conditions._replace(guidance_scale=scale), jax.random.key(0)))
    np.testing.assert_allclose(*drawn, atol=1e-4)
    assert 0.45 < flops[0] / flops[1] < 0.65


def test_upsampler_trained_on_patches_takes_whole_pictures_of_any_size():
    stage, _, params = small_stage("upsampler_256")
    for shape in ((1, 8, 8, 3), (1, 6, 10, 3)):
        low = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
        high = jax.eval_shape(stage.sample, params, {}, Conditions(low_res=low), jax.random.key(0))
        assert high.shape == (1, 4 * shape[1], 4 * shape[2], 3)


def test_clip_scale_is_held_below_its_maximum():
    stage, _, params = small_stage("clip")
    projected = stage.project(params | {"logit_scale": jnp.float32(9.0)})
    np.testing.assert_allclose(jnp.exp(projected["logit_scale"]), 100.0, rtol=1e-6)


def test_clip_loss_is_the_mean_of_both_cross_entropies():
    stage, _, params = small_stage("clip")
    batch = random_batch(stage, 6)
    z_i = np.asarray(jax.jit(stage.embed_images)(params, batch["image"]), np.float64)
    z_t = jax.jit(stage.embed_texts)(params, batch["tokens"], batch["tokens_length"])
    z_t = np.asarray(z_t, np.float64)
    np.testing.assert_allclose(np.linalg.norm(z_i, axis=-1), 1, rtol=1e-5)
    logits = np.exp(np.float64(params["logit_scale"])) * z_i @ z_t.T
    rows = np.log(np.exp(logits).sum(1)) - np.diag(logits)
    columns = np.log(np.exp(logits).sum(0)) - np.diag(logits)
    loss, _ = jax.jit(stage.loss)(params, {}, batch, jax.random.key(0))
    np.testing.assert_allclose(loss, (rows.mean() + columns.mean()) / 2, rtol=1e-4)


def test_a_context_read_beforehand_draws_the_same_and_is_read_once():
    """No step of sampling has the context for an operand."""
    stage, frozen, params = small_stage("decoder")
    batch = random_batch(stage, 2)
    yes = jnp.ones(2, bool)
    conditioning = stage.condition(params, frozen, batch, yes, jnp.ones((2, 8)), yes)
    x, t = jnp.ones((2, 8, 8, 3)), jnp.array([1, 5])
    read = read_context(params["unet"], conditioning, jnp.float32).context
    assert read.keys() == {name for name in params["unet"] if name.endswith("attention")}
    apply = jax.jit(lambda context: stage._unet().apply({"params": params["unet"]}, x, t, conditioning.emb, context))
    np.testing.assert_allclose(apply(read), apply(conditioning.context), rtol=1e-5, atol=1e-5)

    conditions = Conditions(**captions(batch), image_embedding=jnp.ones((2, 8)), guidance_scale=jnp.float32(2))
    jaxpr = jax.make_jaxpr(stage.sample)(params, frozen, conditions, jax.random.key(0))
    steps = next(e for e in jaxpr.eqns if e.primitive.name == "scan" and e.params["length"] == 3)
    shapes = {v.aval.shape for e in steps.params["jaxpr"].eqns for v in e.invars}
    assert (4, *conditioning.context.shape[1:]) not in shapes


def random_draws(jaxpr):
    """Counts the draws of random bits in a program and all that it calls."""
    found = 0
    for equation in jaxpr.eqns:
        inner = jax.tree.leaves(equation.params, is_leaf=lambda value: hasattr(value, "eqns"))
        found += equation.primitive.name == "random_bits"
        found += sum(random_draws(value) for value in inner if hasattr(value, "eqns"))
    return found


@pytest.mark.parametrize("name", ["decoder", "glide", "upsampler_256"])
def test_dropout_is_drawn_in_training_alone(name):
    """A draw of random bits for each residual block, and none where dropout is 0 or nothing is trained."""
    plain, frozen, params = small_stage(name)
    batch, draws = random_batch(plain, 2), {}
    for dropout in (0.0, 0.3):
        config = plain.config.copy_and_resolve_references().unlock()
        config.model.unet.dropout = dropout
        stage = make_stage(config.lock(), plain.clip)
        for train in (True, False):
            loss = functools.partial(stage.loss, train=train)
            draws[dropout, train] = random_draws(jax.make_jaxpr(loss)(params, frozen, batch, jax.random.key(0)))
    blocks = sum("norm_in" in part for part in params.get("unet", params).values())
    assert blocks > 4
    assert draws[0.3, True] == draws[0.0, True] + blocks and draws[0.3, False] == draws[0.0, False]
