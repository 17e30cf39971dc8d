"""The loss by hand, SAM against its own definition, and what a noised CLIP sees."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from shrink import random_batch, small_config, small_stage

from unclip_jax import train
from unclip_jax.errors import UserError
from unclip_jax.models.mesh import jit_on_mesh, one_device
from unclip_jax.stages import make_stage

ROWS, RHO = 16, 0.1
KEY = jax.random.key(3)


def sharp_stage(rows):
    config = small_config("clip").unlock()
    config.optim.update(dict(sam_rho=RHO, sam_rows=rows))
    return make_stage(config.lock())


def embedded(stage, params, batch):
    z_i = stage.embed_images(params, batch["image"])
    return z_i, stage.embed_texts(params, batch["tokens"], batch["tokens_length"]), jnp.exp(params["logit_scale"])


def cross_entropy(logits):
    logits = logits.astype(np.float64)
    return np.mean(np.log(np.exp(logits).sum(axis=1)) - np.diagonal(logits))


def test_loss_is_the_papers():
    """arXiv 2103.00020, figure 3."""
    stage, _, params = small_stage("clip")
    batch = random_batch(stage, ROWS)
    z_i, z_t, scale = (np.asarray(v) for v in jax.jit(lambda p: embedded(stage, p, batch))(params))
    logits = scale * z_i @ z_t.T
    loss, metrics = jax.jit(stage.loss)(params, {}, batch, KEY)
    assert float(loss) == pytest.approx((cross_entropy(logits) + cross_entropy(logits.T)) / 2, rel=1e-5)
    own = [(matrix.argmax(axis=1) == np.arange(ROWS)).mean() for matrix in (logits, logits.T)]
    assert float(metrics["accuracy"]) == pytest.approx(np.mean(own))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [ROWS, ROWS // 2, ROWS // 4])
def test_sam_descends_where_each_replica_has_climbed(rows):
    """arXiv 2010.01412, algorithm 1, with a climb for each replica's rows (unCLIP, appendix C)."""
    plain, _, params = small_stage("clip")
    batch = random_batch(plain, ROWS)
    parts = [jax.tree.map(lambda v, i=i: v[i : i + rows], batch) for i in range(0, ROWS, rows)]

    gradient = jax.jit(jax.grad(lambda p, part: plain.loss(p, {}, part, KEY)[0]))
    climbed = []
    for part in parts:
        grads = gradient(params, part)
        norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads)))
        climbed.append(jax.tree.map(lambda w, g, norm=norm: w + RHO * g / norm, params, grads))
    assert float(optax.tree.norm(optax.tree.sub(climbed[0], params))) == pytest.approx(RHO, rel=1e-4)

    def whole_loss(climbed):
        found = [embedded(plain, w, part) for w, part in zip(climbed, parts, strict=True)]
        z_i, z_t = (jnp.concatenate([f[n] for f in found]) for n in (0, 1))
        scale = jnp.repeat(jnp.stack([f[2] for f in found]), rows)[:, None]
        both = [jax.nn.log_softmax(scale * a @ b.T) for a, b in ((z_i, z_t), (z_t, z_i))]
        return -0.5 * sum(jnp.mean(jnp.diagonal(log_p)) for log_p in both)

    expected, each = jax.jit(jax.value_and_grad(whole_loss))(climbed)
    expected_grads = jax.tree.map(lambda *g: sum(g), *each)
    sharp = sharp_stage(rows)
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("data",))  # of two or four groups of rows each device does its own
    params, batch = jax.device_put((params, batch), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    gradient = jax.value_and_grad(lambda p, batch: sharp.loss(p, {}, batch, KEY)[0])
    loss, grads = jit_on_mesh(gradient, mesh)(params, batch)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert abs(float(loss) - float(jax.jit(plain.loss)(params, {}, batch, KEY)[0])) > 1e-4
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-3), grads, expected_grads)


def test_sam_holds_the_parameters_of_one_group_at_a_time():
    """Of one group a device holds the rows' activations besides, of which four groups hold a quarter at a time."""
    held = []
    for rows in (ROWS, ROWS // 4):
        stage = sharp_stage(rows)
        params = jax.eval_shape(stage.init, KEY)
        batch = {name: jax.ShapeDtypeStruct(s.shape, s.dtype) for name, s in stage.batch_spec(ROWS).items()}
        gradient = jit_on_mesh(jax.grad(lambda p, batch, stage=stage: stage.loss(p, {}, batch, KEY)[0]), one_device())
        held.append(gradient.lower(params, batch).compile().memory_analysis().temp_size_in_bytes)
    assert held[1] < held[0]


@pytest.mark.parametrize("change", [dict(sam_rho=-0.1), dict(sam_rho=0.1, sam_rows=5), dict(sam_rho=0.1, sam_rows=0)])
def test_sam_that_cannot_be_is_refused(change, tmp_path):
    config = small_config("clip").unlock()
    config.optim.update(change)
    with pytest.raises(UserError, match=r"rows that divide|optim\.sam_r(ho|ows) is "):
        train.check_config(config.lock(), str(tmp_path))


def test_noised_clip_sees_less_the_later_the_timestep():
    stage, _, params = small_stage("clip_noised")
    batch = random_batch(stage, ROWS)
    other = batch | {"image": 255 - batch["image"]}
    evaluate = jax.jit(stage.evaluate)
    one, two = (evaluate(params, {}, b, KEY) for b in (batch, other))
    gaps = [abs(float(one[name] - two[name])) for name in (f"loss_t{t}" for t in (0, 250, 500, 749, 999))]
    assert gaps[0] > 1e-3 and gaps[-1] < 1e-4  # at t = 999 the picture's share is 5e-5


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_noised_clip_s_pictures_have_the_noise_of_its_schedule(name):
    """Of the picture sqrt(alpha_bar_t) is left: arXiv 2102.09672, equation 17, and 2006.11239, section 4."""
    config = small_config("clip_noised").unlock()
    config.model.noise_schedule = name
    stage = make_stage(config.lock())
    t = np.array([0, 250, 500, 900])
    if name == "cosine":
        f = np.cos((np.append(t + 1, 0) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
        alpha_bars = f[:-1] / f[-1]
    else:
        alpha_bars = np.array([np.prod(1 - np.linspace(1e-4, 0.02, 1000)[: k + 1]) for k in t])
    dark, light = (jnp.full((4, 8, 8, 3), value, jnp.float32) for value in (-1, 1))
    one, two = (np.asarray(stage._noised(images, jnp.asarray(t), KEY)) for images in (dark, light))
    np.testing.assert_allclose((two - one).mean(axis=(1, 2, 3)) / 2, np.sqrt(alpha_bars), rtol=1e-3)
    noise = (one + two) / 2
    np.testing.assert_allclose(noise.std(axis=(1, 2, 3)), np.sqrt(1 - alpha_bars), rtol=0.2)


def test_noised_clip_trains_on_all_timesteps():
    """Every row of the table of timesteps is told apart, and gets a gradient from the rows that drew it alone."""
    stage, _, params = small_stage("clip_noised")
    batch = random_batch(stage, ROWS)
    grads = jax.jit(jax.grad(lambda p, key: stage.loss(p, {}, batch, key)[0]))
    drawn = [
        np.flatnonzero(np.abs(grads(params, jax.random.key(seed))["image"]["timesteps"]).sum(axis=1))
        for seed in range(20)
    ]
    assert all(0 < len(t) <= ROWS for t in drawn)
    drawn = np.concatenate(drawn)
    assert np.histogram(drawn, bins=4, range=(0, 1000))[0].min() > 0.15 * len(drawn)


def test_similarity_gradient_is_the_slope_of_the_scaled_cosine():
    stage, _, params = small_stage("clip_noised")
    rng = np.random.default_rng(0)
    x_t, way = (rng.normal(size=(2, 8, 8, 3)).astype(np.float32) for _ in range(2))
    text = rng.normal(size=(2, stage.dim)).astype(np.float32)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    t = np.array([3, 700], np.int32)
    embed = jax.jit(stage.embed_noised)

    def similarity(x):
        z = np.asarray(embed(params, x, t), np.float64)
        return np.exp(float(params["logit_scale"])) * (z * text).sum(axis=1) / np.linalg.norm(z, axis=1)

    step = 1e-2
    slope = (similarity(x_t + step * way) - similarity(x_t - step * way)) / (2 * step)
    gradient = jax.jit(stage.similarity_gradient)(params, x_t, t, text)
    np.testing.assert_allclose((np.asarray(gradient) * way).sum(axis=(1, 2, 3)), slope, rtol=1e-2)
