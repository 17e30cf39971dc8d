"""Randomness of rows: where each row has a key of its own, its numbers depend on no other row and not on its place.

Functions take either one key for all rows, as training does, or keys (B,), one for each row, as drawing does.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.arrays import Array, Key
from unclip_jax.errors import UserError


class RowKeys(NamedTuple):
    """Keys of B rows before they are made: row r's is fold_in(fold_in(key, rows[r]), draws[r]).

    rows: int (B,), such as the numbers of captions in a file. draws: int (B,), numbers of pictures of the same caption.
    """

    key: Key
    rows: Array
    draws: Array

    @classmethod
    def of(cls, key: "Key | RowKeys", count: int) -> "RowKeys":
        """Numbers the rows of one key from 0; leaves row keys as they are. Raises ValueError for another count."""
        if not isinstance(key, RowKeys) and not jnp.issubdtype(getattr(key, "dtype", None), jax.dtypes.prng_key):
            raise UserError(f"key {key!r}: expected a key of JAX, such as jax.random.key(0)")
        keys = key if isinstance(key, RowKeys) else cls(key, np.arange(count), np.zeros(count, np.int64))
        if len(keys.rows) != count or len(keys.draws) != count:
            raise ValueError(f"keys of {len(keys.rows)} rows and {len(keys.draws)} draws: expected {count}")
        return keys

    def split(self, number: int) -> list["RowKeys"]:
        """Derives keys for `number` independent uses of the same rows."""
        return [self._replace(key=key) for key in jax.random.split(self.key, number)]

    def make(self) -> Key:
        """Makes the keys (B,)."""
        return jax.vmap(lambda row, draw: jax.random.fold_in(jax.random.fold_in(self.key, row), draw))(
            jnp.asarray(self.rows, jnp.uint32), jnp.asarray(self.draws, jnp.uint32)
        )


def seed_key(seed: int) -> Key:
    """Makes the key of a seed. Raises UserError for what is no whole number from 0 to 2^64 - 1."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**64:
        raise UserError(f"seed {seed!r}: expected a whole number from 0 to 2^64 - 1")
    high, low = divmod(int(seed), 2**32)  # JAX would cut it to 32 bits, and seeds 7 and 2^32 + 7 would draw the same
    key = jax.random.key(low)
    return jax.random.fold_in(key, high) if high else key


def split(key: Key) -> tuple[Key, Key]:
    """Splits a key, or each row's, in two."""
    first, second = jax.random.split(key) if not key.ndim else jax.vmap(jax.random.split)(key).T
    return first, second


def fold_in(key: Key, number: Array | int) -> Key:
    """Folds a number into a key, or into each row's."""
    return jax.random.fold_in(key, number) if not key.ndim else jax.vmap(jax.random.fold_in, (0, None))(key, number)


def draw_rows(distribution: Callable[..., jax.Array], key: Key, shape: tuple[int, ...]) -> jax.Array:
    """Draws an array of `shape` (B, ...) by `distribution(key, shape)`, such as `jax.random.normal`."""
    if not key.ndim:
        return distribution(key, shape)
    return jax.vmap(lambda one: distribution(one, shape[1:]))(key)
