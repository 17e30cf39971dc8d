"""A CLIP image embedding as a sequence of codes, and back (unCLIP, section 2.2: PCA, each component quantised).

    y_k = u_k · (z - μ)                            μ: mean; u_1, u_2, …: eigenvectors of the covariance, largest first
    c_k = ⌊(y_k - low_k) / w_k⌋, in [0, B)         w_k = (high_k - low_k) / B; what is outside goes to the end buckets
    z'  = μ + Σ_k (low_k + (c_k + 1/2) w_k) u_k    N codes of dim: what the other components held is lost

low_k and high_k are quantiles of y_k, and the buckets of the dot product z_i · z_t lie between its smallest and its
largest value, in training. `fit` finds all this once; the other functions take the dict that it returns.
"""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from unclip_jax.arrays import Array, Key
from unclip_jax.keys import draw_rows

DOT_QUANTILES = 1001  # stored, from the smallest dot product to the largest

Statistics = dict[str, Array]


def fit(
    z_i: Float[np.ndarray, "rows dim"], dot: Float[np.ndarray, " rows"], num_codes: int, outside: float
) -> Statistics:
    """Fits the statistics of training embeddings and of their dot products with the captions' embeddings.

    outside: share of the rows beyond each end of a component's buckets. Worked out in float64, given as float32.
    """
    mean, components = principal_components([z_i])
    components = components[:num_codes]
    low, high = np.quantile((z_i.astype(np.float64) - mean) @ components.T, [outside, 1 - outside], axis=0)
    quantiles = np.quantile(dot.astype(np.float64), np.linspace(0, 1, DOT_QUANTILES))
    found = {"mean": mean, "components": components, "low": low, "high": high, "dot_quantiles": quantiles}
    return {name: np.asarray(value, np.float32) for name, value in found.items()}


def principal_components(
    chunks: Iterable[Float[np.ndarray, "_ dim"]],
) -> tuple[Float[np.ndarray, " dim"], Float[np.ndarray, "dim dim"]]:
    """Finds the mean and all principal components of the rows of `chunks`, the largest first, in float64."""
    count, total, products = 0, np.zeros(()), np.zeros(())
    for chunk in chunks:
        z = chunk.astype(np.float64)
        count, total, products = count + len(z), total + z.sum(axis=0), products + z.T @ z
    mean = total / count
    _, vectors = np.linalg.eigh(products - count * np.outer(mean, mean))  # columns, the smallest eigenvalue first
    return mean, vectors[:, ::-1].T


def unfitted(dim: int, num_codes: int) -> Statistics:
    """Statistics to start from, of unit vectors of which nothing is known: the first coordinates, from -1 to 1."""
    ones = jnp.ones(num_codes)
    return {
        "mean": jnp.zeros(dim),
        "components": jnp.eye(num_codes, dim),
        "low": -ones,
        "high": ones,
        "dot_quantiles": jnp.linspace(-1.0, 1.0, DOT_QUANTILES),
    }


def encode(statistics: Statistics, z: Float[Array, "B dim"], buckets: int) -> Int[Array, "B N"]:
    """Encodes embeddings as codes in [0, buckets)."""
    y = jnp.matmul(z - statistics["mean"][None], statistics["components"].T, precision="highest")
    return _bucket(y, statistics["low"][None], statistics["high"][None], buckets)


def decode(statistics: Statistics, codes: Int[Array, "B N"], buckets: int) -> Float[Array, "B dim"]:
    """Decodes codes to embeddings, by the middle of each code's bucket."""
    low, high = statistics["low"][None], statistics["high"][None]
    y = low + (codes.astype(jnp.float32) + 0.5) * ((high - low) / buckets)
    return jnp.matmul(y, statistics["components"], precision="highest") + statistics["mean"][None]


def encode_dot(statistics: Statistics, dot: Float[Array, " B"], buckets: int) -> Int[Array, " B"]:
    """Encodes dot products z_i · z_t as codes in [0, buckets)."""
    return _bucket(dot, statistics["dot_quantiles"][0], statistics["dot_quantiles"][-1], buckets)


def draw_dot(statistics: Statistics, key: Key, rows: int, percentile: float) -> Float[Array, " rows"]:
    """Draws dot products as they were in training, above a percentile of them."""
    uniform = functools.partial(jax.random.uniform, minval=percentile / 100, maxval=1.0)
    share = draw_rows(uniform, key, (rows,))
    return jnp.interp(share, jnp.linspace(0.0, 1.0, DOT_QUANTILES), statistics["dot_quantiles"])


def _bucket(value: Array, low: Array | np.floating, high: Array | np.floating, buckets: int) -> jax.Array:
    width = jnp.maximum((high - low) / buckets, 1e-30)  # 0 of a component in which nothing differs
    return jnp.clip(jnp.floor((value - low) / width), 0, buckets - 1).astype(jnp.int32)
