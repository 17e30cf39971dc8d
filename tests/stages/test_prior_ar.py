"""The autoregressive prior: embeddings as codes by closed forms, and what is drawn by a network of known answers."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shrink import fake_clip, random_batch, small_config, small_stage

from unclip_jax.errors import UserError
from unclip_jax.stages import codes, make_stage
from unclip_jax.stages.conditions import Conditions
from unclip_jax.stages.prior_ar import PriorAR
from unclip_jax.training.leaves import named_leaves

RNG = np.random.default_rng(0)
F32 = np.float32
DIM, CODES, BUCKETS, DOTS = 8, 6, 8, 4  # of the shrunk config


# Embeddings as codes.


def test_components_are_the_covariances_largest_first():
    """Rows μ ± s_k q_k, once each, of orthonormal q: covariance Σ s_k² q_k q_kᵀ times a constant, mean μ."""
    q = np.linalg.qr(RNG.normal(size=(5, 5)))[0]
    mean, s = RNG.normal(size=5), np.array([0.3, 2.0, 0.1, 1.0, 0.5])
    z = np.concatenate([mean + s[:, None] * q.T, mean - s[:, None] * q.T]).astype(F32)
    fitted = codes.fit(z, np.zeros(10, F32), 3, 0.0)
    np.testing.assert_allclose(fitted["mean"], mean, atol=1e-6)
    np.testing.assert_allclose(np.abs(fitted["components"] @ q), np.eye(5)[[1, 3, 4]], atol=1e-5)
    np.testing.assert_allclose(fitted["low"], [-2, -1, -0.5], atol=1e-6)
    np.testing.assert_allclose(fitted["high"], [2, 1, 0.5], atol=1e-6)
    assert {value.dtype for value in fitted.values()} == {np.dtype(F32)}


def test_buckets_end_at_quantiles():
    """Of the numbers 0, 0.0001, … 1, which are their own quantiles, around their mean of a half."""
    z = np.stack([np.linspace(0, 1, 10001), np.zeros(10001)], axis=1).astype(F32)
    fitted = codes.fit(z, 2 * z[:, 0], 1, 0.01)
    np.testing.assert_allclose([fitted["low"], fitted["high"]], [[-0.49], [0.49]], atol=1e-6)
    np.testing.assert_allclose(fitted["dot_quantiles"], np.linspace(0, 2, len(fitted["dot_quantiles"])), atol=1e-6)


def test_buckets_are_even_and_hold_what_is_outside():
    fixed = codes.unfitted(2, 2)
    z = np.array([[-0.9, -0.1], [0.1, 0.9], [-7.0, 7.0], [0.499, 0.501]], F32)
    found = codes.encode(fixed, z, 4)
    np.testing.assert_array_equal(found, [[0, 1], [2, 3], [0, 3], [2, 3]])
    middles = [[-0.75, -0.25], [0.25, 0.75], [-0.75, 0.75], [0.25, 0.75]]
    np.testing.assert_allclose(codes.decode(fixed, found, 4), middles, atol=1e-6)


def correlated(rows=4000, dim=6):
    return (RNG.normal(size=(rows, dim)) @ RNG.normal(size=(dim, dim)) + 3).astype(F32)


def test_an_embedding_comes_back_within_half_a_bucket():
    z = correlated()
    fitted, buckets = codes.fit(z, z[:, 0], 6, 0.01), 32
    back = codes.decode(fitted, codes.encode(fitted, z, buckets), buckets)
    y, y_back = ((v - fitted["mean"]) @ fitted["components"].T for v in (z, np.asarray(back)))
    half = (fitted["high"] - fitted["low"]) / buckets / 2
    outside = (y < fitted["low"]) | (y > fitted["high"])
    error = np.abs(y - y_back)
    assert 0.015 < outside.mean() < 0.025  # one in a hundred at each end
    assert (error <= half * 1.001)[~outside].all() and error[~outside].max() > 0.9 * half.min()
    ends = np.where(y < fitted["low"], fitted["low"] + half, fitted["high"] - half)
    np.testing.assert_allclose(y_back[outside], ends[outside], rtol=1e-3, atol=1e-3)


def test_components_left_out_cost_their_own_variance():
    z = correlated()
    fitted = codes.fit(z, z[:, 0], 4, 0.0)
    back = np.asarray(codes.decode(fitted, codes.encode(fitted, z, 4096), 4096))
    variances = np.sort(np.linalg.eigvalsh(np.cov(z.T.astype(np.float64), bias=True)))
    np.testing.assert_allclose(np.sum((z - back) ** 2, axis=1).mean(), variances[:2].sum(), rtol=1e-3)


def test_a_component_without_variance_is_coded():
    fitted = codes.fit(np.ones((10, 2), F32), np.ones(10, F32), 2, 0.0)
    found = codes.encode(fitted, np.ones((1, 2), F32), 16)
    np.testing.assert_allclose(codes.decode(fitted, found, 16), [[1, 1]], atol=1e-6)


@pytest.mark.parametrize("percentile", [0.0, 50.0, 95.0])
def test_dot_products_are_drawn_as_in_training_above_a_percentile(percentile):
    dot = RNG.beta(2, 5, 20_000).astype(F32)
    fitted = codes.fit(np.ones((len(dot), 1), F32), dot, 1, 0.0)
    drawn = np.asarray(jax.jit(lambda key: codes.draw_dot(fitted, key, 20_000, percentile))(jax.random.key(0)))
    expected = np.sort(dot)[int(len(dot) * percentile / 100) :]
    assert drawn.min() >= expected[0] - 1e-3 and drawn.max() <= dot.max()
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        # Standard error of a share of 20,000 draws: at most 0.0035.
        assert np.mean(drawn <= np.quantile(expected, share)) == pytest.approx(share, abs=0.015)


def test_dot_buckets_lie_between_the_smallest_and_the_largest():
    fitted = codes.fit(np.ones((5, 1), F32), np.array([0.2, 0.3, 0.3, 0.5, 0.6], F32), 1, 0.0)
    dot = jnp.array([0.2, 0.29, 0.31, 0.45, 0.59, 0.6, 0.9, -1.0])
    np.testing.assert_array_equal(codes.encode_dot(fitted, dot, 4), [0, 0, 1, 2, 3, 3, 3, 0])


# The stage, with a CLIP or a network of known answers.


def clip(unit_norm=True):
    """Takes embeddings where others take pictures and captions."""
    config = small_config("clip").unlock()
    config.model.unit_norm = unit_norm
    same = {"embed_images": lambda frozen, z: z, "embed_texts": lambda frozen, z, length: z}
    return fake_clip(config=config.lock(), dim=DIM, **same)


def stage_of(kind=PriorAR, clip=None, **sections):
    config = small_config("prior_ar").unlock()
    for section, values in sections.items():
        config[section].update(values)
    return kind(config.lock(), clip or small_stage("prior_ar")[0].clip)


class Answering(PriorAR):
    """A network whose logits are `table`[keep, k], of shape (2, num_codes, num_buckets); notes what it is given."""

    table = np.zeros((2, CODES, BUCKETS), F32)

    def init(self, key):
        return {"fixed": codes.unfitted(DIM, CODES)}

    def _model(self):
        table = jnp.asarray(self.table)

        def apply(variables, *arguments, method="__call__"):
            if method == "step":
                keep, k, _ = arguments
                return table[keep.astype(int), k], keep
            self.seen.update(zip(("tokens", "length", "z_t", "keep", "dot", "codes"), arguments, strict=False))
            keep = self.seen["keep"]
            return (keep, self.seen["dot"]) if method == "start" else table[keep.astype(int)]

        return SimpleNamespace(apply=apply)

    @functools.cached_property
    def seen(self):
        return {}


def unit(rows, seed=0):
    z = np.random.default_rng(seed).normal(size=(rows, DIM)).astype(F32)
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def batch_of(stage, z_i, z_t):
    return random_batch(stage, len(z_i)) | {"clip_image": z_i, "clip_tokens": z_t}


def conditions(stage, rows, scale=1.0, seed=0):
    batch = random_batch(stage, rows, seed)
    tokens = {name: batch[name] for name in ("tokens", "tokens_length")}
    return Conditions(**tokens, text_embedding=unit(rows, seed), guidance_scale=jnp.float32(scale))


def test_loss_is_the_mean_cross_entropy_of_the_codes(monkeypatch):
    rows = 64
    stage = stage_of(Answering, clip(), prior=dict(drop_text=0.0))
    table = RNG.normal(size=(2, CODES, BUCKETS)).astype(F32)
    monkeypatch.setattr(Answering, "table", table)
    z_i = unit(rows)
    batch, key = batch_of(stage, z_i, unit(rows, 1)), jax.random.key(0)
    loss, given = jax.jit(lambda: (stage.loss(stage.init(None), {}, batch, key)[0], stage.seen))()
    target = np.floor((z_i[:, :CODES] + 1) / 2 * BUCKETS).astype(int)  # unfitted codes: coordinates from -1 to 1
    log_p = table[1] - np.log(np.exp(table[1].astype(np.float64)).sum(-1, keepdims=True))
    assert float(loss) == pytest.approx(-log_p[np.arange(CODES), target].mean(), rel=1e-5)
    np.testing.assert_array_equal(given["codes"], target)


def test_loss_tells_the_network_what_belongs_together():
    rows = 400
    stage = stage_of(Answering, clip())
    z_i, z_t = unit(rows), unit(rows, 1)
    batch = batch_of(stage, z_i, z_t)
    given = jax.jit(lambda: (stage.loss(stage.init(None), {}, batch, jax.random.key(0)), stage.seen)[1])()
    np.testing.assert_array_equal(given["tokens"], batch["tokens"])
    np.testing.assert_array_equal(given["length"], batch["tokens_length"])
    np.testing.assert_array_equal(given["z_t"], z_t)
    dot = np.sum(z_i * z_t, axis=1)  # buckets of the unfitted: from -1 to 1
    np.testing.assert_array_equal(given["dot"], np.floor((dot + 1) / 2 * DOTS))
    kept = np.asarray(given["keep"]).mean()
    assert abs(kept - 0.9) < 4 * (0.09 / rows) ** 0.5


def test_codes_are_drawn_from_guided_and_tempered_logits(monkeypatch):
    """Frequencies of 20,000 draws against softmax((l0 + s (lc - l0)) / T); their standard error is below 0.0036."""
    rows, scale = 20_000, 2.0
    table = RNG.normal(size=(2, CODES, BUCKETS)).astype(F32)
    monkeypatch.setattr(Answering, "table", table)
    for temperature in (1.0, 0.5):
        stage = stage_of(Answering, clip(), sampling=dict(temperature=temperature))
        draw = jax.jit(functools.partial(stage.draw_codes, stage.init(None)))
        drawn = np.asarray(draw(conditions(stage, rows, scale), jax.random.key(0)))
        assert drawn.shape == (rows, CODES)
        p = np.exp((table[0] + scale * (table[1] - table[0])) / temperature)
        p /= p.sum(-1, keepdims=True)
        found = np.stack([np.bincount(drawn[:, k], minlength=BUCKETS) / rows for k in range(CODES)])
        np.testing.assert_allclose(found, p, atol=0.016)
        together = np.mean((drawn[:, 0] == p[0].argmax()) & (drawn[:, 1] == p[1].argmax()))
        assert together == pytest.approx(p[0].max() * p[1].max(), abs=0.016)  # codes do not share their noise


def test_sampling_tells_dot_products_of_the_top_half():
    rows = 4000
    stage = stage_of(Answering, clip())
    params = stage.init(None)
    params["fixed"]["dot_quantiles"] = jnp.linspace(0.0, 1.0, codes.DOT_QUANTILES) ** 2  # median 1/4: buckets 1, 2, 3
    told = conditions(stage, rows)
    given = jax.jit(lambda: (stage.draw_codes(params, told, jax.random.key(0)), stage.seen)[1])()
    dot, keep = np.asarray(given["dot"]), np.asarray(given["keep"])
    np.testing.assert_array_equal(dot[keep], dot[~keep])  # both halves of guidance are told the same
    shares = np.bincount(dot[keep], minlength=DOTS) / rows
    expected = np.diff(np.sqrt([0.25, 0.5, 0.75, 1])) * 2
    np.testing.assert_allclose(shares, [0, *expected], atol=4 * 0.5 / rows**0.5)


def test_sample_gives_the_middles_of_buckets_at_unit_length(monkeypatch):
    likeliest = np.array([0, 7, 3, 4, 1, 6])
    table = np.broadcast_to(100 * np.eye(BUCKETS, dtype=F32)[likeliest], (2, CODES, BUCKETS))
    monkeypatch.setattr(Answering, "table", table)
    middles = np.append((likeliest + 0.5) / BUCKETS * 2 - 1, [0, 0])
    for unit_norm, expected in ((True, middles / np.linalg.norm(middles)), (False, middles)):
        stage = stage_of(Answering, clip(unit_norm))
        drawn = jax.jit(stage.sample)(stage.init(None), {}, conditions(stage, 3), jax.random.key(0))
        np.testing.assert_allclose(drawn, np.tile(expected, (3, 1)), atol=1e-5)


def test_prepare_reads_its_batches_and_no_more():
    stage = stage_of(Answering, clip(), prior=dict(batches=3), model=dict(num_buckets=256))
    params = {"network": jnp.ones(3)} | stage.init(None)
    pairs = [(unit(50, k) + F32(0.5), unit(50, 9 + k)) for k in range(9)]
    batches = iter([batch_of(stage, *pair) for pair in pairs])
    found, scalars = stage.prepare(params, {}, batches)
    np.testing.assert_array_equal(next(batches)["clip_image"], pairs[3][0])
    np.testing.assert_array_equal(found["network"], params["network"])
    z_i, z_t = (np.concatenate(part) for part in zip(*pairs[:3], strict=True))
    np.testing.assert_allclose(found["fixed"]["mean"], z_i.mean(0), atol=1e-6)
    dot = np.sum(z_i * z_t, axis=1)
    np.testing.assert_allclose(found["fixed"]["dot_quantiles"][[0, -1]], [dot.min(), dot.max()], atol=1e-6)
    variances = np.sort(np.linalg.eigvalsh(np.cov(z_i.T.astype(np.float64))))
    assert float(scalars["roundtrip_variance"]) == pytest.approx(variances[2:].sum() / variances.sum(), abs=1e-3)
    centred = z_i.astype(np.float64) - z_i.mean(0)
    vectors = np.linalg.eigh(centred.T @ centred)[1][:, 2:]
    back = centred @ vectors @ vectors.T + z_i.mean(0)
    cosine = np.sum(back * z_i, axis=1) / np.linalg.norm(back, axis=1) / np.linalg.norm(z_i, axis=1)
    assert float(scalars["roundtrip_cosine"]) == pytest.approx(cosine.mean(), abs=1e-3)
    assert {name: leaf.shape for name, leaf in named_leaves(found).items()} == {
        name: leaf.shape for name, leaf in named_leaves(params).items()
    }


def test_evaluation_says_what_the_codes_can_reach():
    stage = stage_of(Answering, clip())
    z_i = unit(4)
    metrics = jax.jit(stage.evaluate)(stage.init(None), {}, batch_of(stage, z_i, z_i), jax.random.key(0))
    middles = (np.floor((z_i[:, :CODES] + 1) / 2 * BUCKETS) + 0.5) / BUCKETS * 2 - 1
    expected = np.mean(np.sum(middles * z_i[:, :CODES], axis=1) / np.linalg.norm(middles, axis=1))
    assert float(metrics["roundtrip_cosine"]) == pytest.approx(expected, abs=1e-5)


# The stage with its own network.


@functools.cache
def loud_params():
    """A network whose answers depend much on everything it is told."""
    rng = np.random.default_rng(3)
    params = small_stage("prior_ar")[2]
    return jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape), F32), params) | {
        "fixed": params["fixed"]
    }


@functools.cache
def drawer():
    """The shrunk prior where the likeliest code is taken and the dot product is the largest: nothing left to chance."""
    stage = stage_of(sampling=dict(temperature=0.0, dot_percentile=100.0))
    return stage, loud_params(), jax.jit(stage.draw_codes)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_codes_one_by_one_are_the_likeliest_of_all_at_once(scale):
    """Scale 0: the unconditional logits, 1: the conditional, 3: beyond."""
    stage, params, draw = drawer()
    given = conditions(stage, 5, scale)
    drawn = draw(params, given, jax.random.key(0))
    network = {name: value for name, value in params.items() if name != "fixed"}

    @jax.jit
    def logits(keep):
        captions = given.tokens, given.tokens_length, given.text_embedding
        dot = jnp.full((5,), DOTS - 1)
        return stage._model().apply({"params": network}, *captions, jnp.full((5,), keep), dot, drawn)

    null, conditional = logits(False), logits(True)
    guided = null + scale * (conditional - null)
    top = np.sort(guided, axis=-1)
    assert (top[..., -1] - top[..., -2]).min() > 1e-5, "no ties"
    np.testing.assert_array_equal(drawn, jnp.argmax(guided, axis=-1))
    assert not np.array_equal(drawn, jnp.argmax(null + (4 - scale) * (conditional - null), axis=-1))


def test_without_guidance_to_the_caption_it_is_not_heard():
    stage, params, draw = drawer()
    key = jax.random.key(0)
    for scale, heard in ((0.0, False), (1.0, True)):
        one, other = conditions(stage, 5, scale), conditions(stage, 5, scale, seed=1)
        embedding, tokens = one._replace(text_embedding=other.text_embedding), one._replace(tokens=one.tokens + 1)
        for changed in (other, embedding, tokens):
            assert np.array_equal(draw(params, one, key), draw(params, changed, key)) != heard


def test_scales_and_seeds_compile_once_and_seeds_differ():
    stage, frozen, _ = small_stage("prior_ar")
    draw = jax.jit(stage.sample)
    outputs = [
        np.asarray(draw(loud_params(), frozen, conditions(stage, 4, scale), jax.random.key(seed)))
        for scale in (0.0, 1.0, 3.0)
        for seed in (0, 1)
    ]
    assert draw._cache_size() == 1
    for output in outputs:
        np.testing.assert_allclose(np.linalg.norm(output, axis=-1), 1, rtol=1e-5)
    assert len({output.tobytes() for output in outputs}) == len(outputs)


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("model", "num_codes", DIM + 1),
        ("prior", "batches", 0),
        ("prior", "outside", 0.5),
        ("prior", "drop_text", 1.5),
        ("sampling", "temperature", -1.0),
        ("sampling", "dot_percentile", 101.0),
    ],
)
def test_numbers_out_of_range_are_named(section, name, value):
    config = small_config("prior_ar").unlock()
    config[section][name] = value
    with pytest.raises(UserError, match=f"{section}.{name} is {value}: expected at least"):
        jax.eval_shape(make_stage(config.lock()).init, jax.random.key(0))
