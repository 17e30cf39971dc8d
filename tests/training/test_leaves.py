import numpy as np
import pytest

from unclip_jax.training.leaves import differences, named_leaves
from unclip_jax.training.state import TrainState


def test_names_are_paths_in_sorted_order():
    state = TrainState(0, (), {"b": 1, "a": {"kernel": 2}}, {}, ({"mu": 3}, ()))
    expected = {"opt_state/0/mu": 3, "params/a/kernel": 2, "params/b": 1, "step": 0}
    assert list(named_leaves(state).items()) == list(expected.items())


def test_two_leaves_of_one_name_are_an_error():
    with pytest.raises(ValueError, match="'a/b'"):
        named_leaves({"a": {"b": 1}, "a/b": 2})


def test_equal_trees_have_no_differences_whatever_their_containers():
    leaf = np.zeros((2, 3))
    assert differences(TrainState(leaf, (), {}, {}, ()), {"step": leaf}) == ""
    assert differences({"w": leaf.T}, {"w": leaf}) == "w is (3, 2), expected (2, 3)"
