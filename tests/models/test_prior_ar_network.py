"""The autoregressive prior: the paper's size, who may know what, and drawing codes one by one."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.errors import UserError
from unclip_jax.models.layers import Mask
from unclip_jax.models.prior_ar import ARPrior
from unclip_jax.models.transformer import TextTransformer, Transformer

F32 = jnp.float32
ROWS, WORDS, CODES, BUCKETS, DOTS, DIM = 3, 5, 6, 7, 4, 8


def model(depth=2, dtype=F32, remat=False, context=CODES + 3):
    text = TextTransformer(20, WORDS, 12, 1, 2, dtype, remat)
    return ARPrior(text, CODES, BUCKETS, DOTS, context, 16, depth, 2, dtype, remat)


def inputs(seed=0):
    """A caption of 3 words, a full one and an empty one; all conditions are kept."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 20, (ROWS, WORDS)).astype(np.int32)
    text_embedding = rng.normal(size=(ROWS, DIM)).astype(np.float32)
    dot = rng.integers(0, DOTS, ROWS).astype(np.int32)
    return tokens, np.array([3, WORDS, 0], np.int32), text_embedding, np.ones(ROWS, bool), dot


def codes(seed=1):
    return np.random.default_rng(seed).integers(0, BUCKETS, (ROWS, CODES)).astype(np.int32)


@functools.cache
def params(depth=2):
    """Parameters in which nothing is zero or small, so that every path is open."""
    shapes = jax.eval_shape(model(depth).init, jax.random.key(0), *inputs(), codes())
    rng = np.random.default_rng(5)
    return jax.tree.map(lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape) + 0.1, F32), shapes)


@jax.jit
def logits(params, *arguments):
    return model().apply(params, *arguments)


def differs(a, b):
    """Bool over the axes that a and b share but the last: where the two are not equal."""
    return np.any(np.asarray(a) != np.asarray(b), axis=-1)


def test_papers_networks_have_the_papers_size():
    """24 blocks of width 2048 for the text, 24 of width 1664 for the codes (unCLIP, table 3), by closed form
    12 w^2 + 13 w a block; text as keys and values: 2048 x 2 x 1664 weights and biases a block."""
    text = TextTransformer(50257, 256, 2048, 24, 32, jnp.bfloat16, True)
    prior = ARPrior(text, 319, 1024, 64, 384, 1664, 24, 26, jnp.bfloat16, True)
    one, caption = jnp.ones((1,), jnp.int32), jnp.zeros((1, 256), jnp.int32)
    arguments = caption, one, jnp.zeros((1, 1024)), one > 0, one, jnp.zeros((1, 319), jnp.int32)
    out, shapes = jax.eval_shape(prior.init_with_output, jax.random.key(0), *arguments)
    assert out.shape == (1, 319, 1024) and out.dtype == F32

    def count(tree):
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))

    assert count(shapes["params"]["text"]["transformer"]) == 1_208_598_528
    assert count(shapes["params"]["transformer"]) == 797_961_216
    assert count(shapes["params"]["context_kv"]) == 163_657_728
    assert count(shapes["params"]["tokens"]) == (1024 + 64) * 1664
    assert count(shapes["params"]["positions"]) == 384 * 1664


@functools.cache
def reach():
    """Size of each logit's gradient, of codes 2 0 6 1 3 5 and caption 4 9 7 (two words of padding behind it: 11 13),
    by the rows of the tables and the inputs that it may go through."""
    tokens, read = np.array([[4, 9, 7, 11, 13]], np.int32), np.array([[2, 0, 6, 1, 3, 5]], np.int32)

    def answer(places, words, text_embedding):
        p = params()["params"] | {"tokens": {"embedding": places}}
        p["text"] = p["text"] | {"tokens": {"embedding": words}}
        keep = np.ones(1, bool)
        given = tokens, np.array([3], np.int32), text_embedding, keep, np.array([1], np.int32), read
        return jnp.sum(model().apply({"params": p}, *given)[0] ** 2, axis=-1)

    p = params()["params"]
    tables = p["tokens"]["embedding"], p["text"]["tokens"]["embedding"], jnp.ones((1, DIM))
    jacobians = jax.jit(jax.jacrev(answer, argnums=(0, 1, 2)))(*tables)
    return [np.abs(jacobian).sum(-1) for jacobian in jacobians]  # (codes, rows)


def test_a_code_knows_those_before_it_and_the_dot_product():
    places, _, _ = reach()
    assert (places[:, BUCKETS + 1] > 1e-4).all()
    before = np.tril(np.ones((CODES, CODES), bool), -1)
    assert (places[:, [2, 0, 6, 1, 3, 5]][before] > 1e-4).all()
    assert (places[:, [2, 0, 6, 1, 3, 5]][~before] == 0).all()


def test_every_code_knows_the_caption_and_its_embedding():
    _, words, text_embedding = reach()
    assert (text_embedding > 1e-4).all()
    assert (words[:, [4, 9, 7]] > 1e-4).all()
    assert (np.delete(words, [4, 9, 7], axis=1) == 0).all()


def test_ids_behind_a_caption_s_end_change_nothing():
    tokens, *rest = inputs()
    other = (tokens + 1) % 20
    beyond = np.arange(WORDS)[None] >= rest[0][:, None]
    before = logits(params(), tokens, *rest, codes())
    np.testing.assert_array_equal(logits(params(), np.where(beyond, other, tokens), *rest, codes()), before)
    changed = differs(logits(params(), np.where(beyond, tokens, other), *rest, codes()), before)
    np.testing.assert_array_equal(changed, np.broadcast_to(rest[0][:, None] > 0, changed.shape))


def test_a_dropped_condition_reaches_nothing():
    """Row 0 is dropped: it is the empty caption, with a learned vector for z_t; the dot product and the codes stay."""
    tokens, length, z_t, _, dot = inputs()
    length = np.full_like(length, WORDS)
    keep = np.array([False, True, True])

    def answer(p, z_t):
        return model().apply(p, tokens, length, z_t, keep, dot, codes())

    row = jax.jit(jax.grad(lambda p, z_t, r: jnp.sum(answer(p, z_t)[r] ** 2), argnums=(0, 1)))
    (dropped, dropped_z), (kept, kept_z) = row(params(), z_t, 0), row(params(), z_t, 1)
    words = [grads["params"]["text"]["tokens"]["embedding"] for grads in (dropped, kept)]
    nulls = [grads["params"]["null_text_embedding"] for grads in (dropped, kept)]
    assert not np.any(dropped_z) and not np.any(words[0]) and np.all(nulls[0])
    assert np.all(kept_z[1]) and np.any(words[1]) and not np.any(nulls[1])

    out = logits(params(), tokens, length, z_t, keep, dot, codes())
    empty = logits(params(), tokens[::-1], 0 * length, z_t[::-1], keep, dot, codes())
    np.testing.assert_array_equal(differs(out, empty).all(axis=1), keep)
    np.testing.assert_array_equal(differs(out, empty).any(axis=1), keep)
    assert differs(logits(params(), tokens, length, z_t, keep, (dot + 1) % DOTS, codes()), out).all()


@functools.partial(jax.jit, static_argnames=("depth", "dtype"))
def one_by_one(params, arguments, given, depth=2, dtype=F32):
    """Logits (B, codes, buckets) of `step` when `given` is what is drawn, and how often it was traced."""
    m, traces = model(depth, dtype), []

    def body(carry, k):
        traces.append(1)
        cache, token = carry
        logits, cache = m.apply(params, cache, k, token, method="step")
        return (cache, given[:, k]), logits

    carry = m.apply(params, *arguments, method="start")
    return jnp.moveaxis(jax.lax.scan(body, carry, jnp.arange(CODES))[1], 0, 1), len(traces)


@pytest.mark.parametrize("depth", [2, 6])
def test_one_by_one_is_all_at_once(depth):
    """Unrolled and as a loop over the blocks; rows with a short caption, an empty one and none at all."""
    tokens, length, z_t, keep, dot = inputs()
    keep[1] = False
    arguments = tokens, length, z_t, keep, dot
    stepped, traces = one_by_one(params(depth), arguments, codes(), depth)
    expected = jax.jit(model(depth).apply)(params(depth), *arguments, codes())
    assert int(traces) == 1
    assert float(jnp.std(expected)) > 0.5
    np.testing.assert_allclose(stepped, expected, atol=1e-5, rtol=1e-5)


def test_bfloat16_keeps_its_cache_and_answers_in_float32():
    m = model(dtype=jnp.bfloat16)
    cache, token = jax.eval_shape(functools.partial(m.apply, method="start"), params(), *inputs())
    assert cache.shape == (2, ROWS, WORDS + CODES + 1, 2, 2, 8) and cache.dtype == jnp.bfloat16
    out, after = jax.eval_shape(lambda *a: m.apply(*a, method="step"), params(), cache, jnp.int32(0), token)
    assert (out.shape, out.dtype) == ((ROWS, BUCKETS), F32)
    assert (after.shape, after.dtype) == (cache.shape, cache.dtype)


@pytest.mark.slow
def test_remat_changes_nothing():
    def gradient(m):
        return jax.jit(jax.grad(lambda p: jnp.mean(m.apply(p, *inputs(), codes()) ** 2)))(params())

    chex.assert_trees_all_close(gradient(model()), gradient(model(remat=True)), rtol=1e-4, atol=1e-5)


def test_memory_is_what_other_places_left():
    """A transformer over a sequence, read whole, is one over its end with the memory of its beginning."""
    m = Transformer(3, 2, "gelu", F32, False)
    x = jax.random.normal(jax.random.key(0), (2, 7, 8))
    p = jax.jit(m.init)(jax.random.key(1), x)
    causal = Mask(causal=True)
    none = jnp.zeros((3, 2, 0, 2, 2, 4))
    apply = jax.jit(m.apply)
    _, memory = apply(p, x[:, :4], causal, none)
    assert memory.shape == (3, 2, 4, 2, 2, 4)
    end, own = apply(p, x[:, 4:], causal, memory)
    np.testing.assert_allclose(end, apply(p, x, causal)[:, 4:], atol=1e-5)
    _, whole = apply(p, x, causal, none)
    np.testing.assert_allclose(jnp.concatenate([memory, own], axis=2), whole, atol=1e-5)


def test_a_context_too_short_for_the_codes_is_refused():
    with pytest.raises(UserError, match=f"context of at least {CODES + 1}"):
        jax.eval_shape(model(context=CODES).init, jax.random.key(0), *inputs(), codes())
    jax.eval_shape(model(context=CODES + 1).init, jax.random.key(0), *inputs(), codes())
