"""The autoregressive prior: the paper's size, who may know what, and drawing codes one by one."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.errors import UserError
from unclip_jax.models.ar_prior import ARPrior
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


def test_the_paper_s_networks_have_the_paper_s_size():
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


def test_a_code_knows_those_before_it_and_itself_never():
    """By gradient: an embedding is added to the token read at each place."""
    arguments = (*inputs(), codes())

    class Nudged(ARPrior):
        """ARPrior whose tokens are moved by what is given: (B, places, width), z_t's place excepted."""

        def nudge(self, shift, *arguments):
            table = self.tokens
            object.__setattr__(self, "tokens", lambda read: table(read) + shift)
            return self(*arguments)

    m = model()
    nudged = Nudged(**{field: getattr(m, field) for field in ARPrior.__dataclass_fields__ if field not in
                       ("parent", "name")})

    @jax.jit
    @jax.jacobian
    def jacobian(shift):
        return jnp.sum(nudged.apply(params(), shift, *arguments, method="nudge")[0] ** 2, axis=-1)

    reach = np.abs(jacobian(jnp.zeros((1, CODES, 16)))).sum(axis=(1, 3))  # (code predicted, place read)
    assert reach.shape == (CODES, CODES)
    assert (reach[np.tril_indices(CODES)] > 1e-6).all()  # place 0 is the dot product, k + 1 is code k
    assert (reach[np.triu_indices(CODES, 1)] == 0).all()
