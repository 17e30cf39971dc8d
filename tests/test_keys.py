"""Keys of rows: a row's numbers are its own, whatever its place and its company."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.errors import UserError
from unclip_jax.keys import RowKeys, draw_rows, fold_in, seed_key, split


def data(keys):
    return np.asarray(jax.random.key_data(keys))


def test_a_row_s_key_is_folded_of_its_two_numbers():
    keys = RowKeys(jax.random.key(3), np.array([5, 0, 5]), np.array([1, 0, 2])).make()
    for key, row, draw in zip(keys, (5, 0, 5), (1, 0, 2), strict=True):
        expected = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), row), draw)
        np.testing.assert_array_equal(data(key), data(expected))


def test_rows_draw_the_same_in_any_company():
    keys = RowKeys.of(seed_key(1), 6).make()
    start, steps = split(keys)
    noise = draw_rows(jax.random.normal, fold_in(steps, 7), (6, 3, 2))
    order = np.array([4, 1, 5])
    again = draw_rows(jax.random.normal, fold_in(steps[order], 7), (3, 3, 2))
    np.testing.assert_array_equal(again, noise[order])
    assert len(np.unique(np.asarray(noise))) == noise.size, "no two rows share a number"
    assert not np.array_equal(noise, draw_rows(jax.random.normal, fold_in(start, 7), (6, 3, 2)))


def test_one_key_draws_as_jax_does():
    key = jax.random.key(0)
    np.testing.assert_array_equal(draw_rows(jax.random.normal, key, (2, 3)), jax.random.normal(key, (2, 3)))
    np.testing.assert_array_equal(data(fold_in(key, 4)), data(jax.random.fold_in(key, 4)))
    np.testing.assert_array_equal(data(jnp.stack(split(key))), data(jax.random.split(key)))


def test_seeds_of_any_size_differ():
    seeds = [0, 7, 2**32 - 1, 2**32, 2**32 + 7, 2**64 - 1]
    assert len({data(seed_key(seed)).tobytes() for seed in seeds}) == len(seeds)
    np.testing.assert_array_equal(data(seed_key(7)), data(jax.random.key(7)))


@pytest.mark.parametrize("seed", [-1, 2**64, 2**70, 1.5, "7", None, True])
def test_what_is_no_seed_is_refused(seed):
    with pytest.raises(UserError, match="expected a whole number from 0 to"):
        seed_key(seed)


def test_keys_of_another_number_of_rows_are_refused():
    with pytest.raises(ValueError, match="expected 3"):
        RowKeys.of(RowKeys.of(seed_key(0), 2), 3)
