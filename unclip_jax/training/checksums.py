"""Checksums of arrays, computed by the devices that hold them, whatever the mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.training.leaves import named_leaves


def checksums(tree: Any) -> dict[str, int]:
    """Computes a checksum of 32 bits for each leaf, by its name.

    A change of one element always changes its leaf's checksum, a change of several with a probability of 1 - 2⁻³².
    Leaves have elements of at most 32 bits. Every process must call this, since a leaf may be split over all of them.
    """
    sums = {name: _checksum(jnp.asarray(leaf)) for name, leaf in named_leaves(tree).items()}
    return {name: int(np.asarray(value.addressable_data(0))) for name, value in sums.items()}


@jax.jit
def _checksum(leaf: jax.Array) -> jax.Array:
    """Sums a hash of each element's bits and place, modulo 2³², so that the order of summation does not matter."""
    leaf = leaf.astype(jnp.uint8) if leaf.dtype == jnp.bool_ else leaf
    bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")).astype(jnp.uint32)
    place = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        place = place * np.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    # Each line is a bijection of 32 bits. The constants are of a known hash of integers ("lowbias32").
    mixed = bits ^ (place * np.uint32(0x9E3779B1) + np.uint32(0x7F4A7C15))
    mixed = (mixed ^ (mixed >> 16)) * np.uint32(0x7FEB352D)
    mixed = (mixed ^ (mixed >> 15)) * np.uint32(0x846CA68B)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)
