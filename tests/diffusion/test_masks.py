"""Training masks: their kinds told apart by their outlines alone, against the shares that the module states."""

import jax
import numpy as np
import pytest

from unclip_jax.diffusion import masks
from unclip_jax.diffusion.masks import random_known

SIZE = 160
ROWS = 400
draw = jax.jit(random_known, static_argnums=(1, 2))


@pytest.fixture(scope="module")
def erased():
    """ROWS masks, True where erased."""
    known = np.asarray(draw(jax.random.key(0), ROWS, SIZE))
    assert known.shape == (ROWS, SIZE, SIZE, 1) and known.dtype == bool
    return ~known[..., 0]


def outline(mask):
    """How often a row of pixels differs from the one above it, and a column from the one to its left.

    A rectangle adds two to either number at most, so that four make 16 in all. A stroke's ends are half discs of at
    least 16 pixels, in which more differ.
    """
    return (mask[1:] != mask[:-1]).any(axis=1).sum() + (mask[:, 1:] != mask[:, :-1]).any(axis=0).sum()


def split(erased):
    """(erased whole, rectangles, strokes)."""
    whole = erased.all(axis=(1, 2))
    parts, edges = erased[~whole], np.array([outline(mask) for mask in erased[~whole]])
    return erased[whole], parts[edges <= 16], parts[edges > 16]


def test_shares_of_the_kinds(erased):
    shares = np.array([len(kind) for kind in split(erased)]) / ROWS
    stated = np.array([0.25, 0.45, 0.30])
    assert (abs(shares - stated) < 4 * (stated * (1 - stated) / ROWS) ** 0.5).all(), shares


def test_every_mask_but_the_whole_ones_knows_some_pixels_and_asks_for_some(erased):
    _, *parts = split(erased)
    for kind in parts:
        area = kind.mean(axis=(1, 2))
        assert area.min() > 0 and area.max() < 1
        assert area.min() < 0.1 and area.max() > 0.5, "from small to large"


def test_strokes_prefer_no_side(erased):
    """The four borders of a picture are erased as often as each other, on average."""
    *_, strokes = split(erased)
    borders = np.stack([strokes[:, 0], strokes[:, -1], strokes[:, :, 0], strokes[:, :, -1]]).mean(axis=2)
    for one in borders:
        differences = one - borders.mean(axis=0)
        assert abs(differences.mean()) < 4 * differences.std() / len(strokes) ** 0.5


def test_sides_and_number_of_rectangles(erased):
    _, masks, _ = split(erased)
    boxes = [[np.flatnonzero(mask.any(axis=axis)) for axis in (0, 1)] for mask in masks]
    spans = np.array([[line[-1] - line[0] + 1 for line in box] for box in boxes])
    single = masks.sum(axis=(1, 2)) == spans.prod(axis=1)
    assert 0.2 < single.mean() < 0.5, "a quarter, and those that swallow their fellows"
    sides = spans[single] / SIZE
    assert 0.1 <= sides.min() < 0.2 and 0.7 < sides.max() <= 0.8
    first = np.array([[line[0] for line in box] for box in boxes])[single] / SIZE
    last = first + sides
    assert first.min() < 0.05 and last.max() > 0.95, "anywhere in the picture"


def holds_square(mask, side):
    total = np.pad(mask, ((1, 0), (1, 0))).cumsum(axis=0).cumsum(axis=1)
    return (total[side:, side:] - total[side:, :-side] - total[:-side, side:] + total[:-side, :-side] == side**2).any()


def test_strokes_are_thick_and_reach_far(erased):
    _, _, masks = split(erased)
    assert all(holds_square(mask, 5) for mask in masks), "half as thick as the thinnest, along a border"
    assert np.mean([holds_square(mask, 10) for mask in masks]) > 0.9
    assert not all(holds_square(mask, 25) for mask in masks), "nor are all as thick as the thickest"
    assert any(mask[: SIZE // 4].any() and mask[-SIZE // 4 :].any() for mask in masks)


def test_a_key_is_a_set_of_masks_each_of_its_own():
    one, again, other = (np.asarray(draw(jax.random.key(k), 40, 16)) for k in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    assert len({mask.tobytes() for mask in one}) > 25, "ten of forty are erased whole"


@pytest.mark.parametrize("size", [8, 16, 64])
def test_small_pictures_have_masks_too(size):
    """Each erases something, and most leave something."""
    known = np.asarray(draw(jax.random.key(3), 300, size))[..., 0]
    assert not known.all(axis=(1, 2)).any()
    assert 0.6 < known.any(axis=(1, 2)).mean() < 0.9


def test_the_thinnest_stroke_does_not_slip_between_pixels(monkeypatch):
    monkeypatch.setattr(masks, "THICKNESS", (0.0, 0.0))
    known = np.asarray(jax.jit(lambda key: masks.random_known(key, 300, 8))(jax.random.key(4)))
    assert not known.all(axis=(1, 2, 3)).any()
