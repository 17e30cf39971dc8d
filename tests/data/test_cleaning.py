"""Steps that decide about one record, at their limits."""

import io

import numpy as np
import pytest
from PIL import Image

from unclip_jax.data.cleaning import Candidate, Limits, check_scripts, of_scripts, smaller
from unclip_jax.data.transforms import decode
from unclip_jax.errors import UserError


def after(limits, height=100, width=100, captions=("a cat",)):
    candidate = Candidate(0, "key", captions=list(captions), chosen=list(range(len(captions))))
    limits.apply(candidate, np.zeros((height, width, 3), np.uint8))
    return candidate


@pytest.mark.parametrize(
    ("limits", "height", "width", "dropped"),
    [
        (Limits(), 1, 5000, ""),
        (Limits(min_side=64), 64, 900, ""),
        (Limits(min_side=64), 900, 63, "min-side"),
        (Limits(max_aspect=2.0), 100, 200, ""),
        (Limits(max_aspect=2.0), 201, 100, "max-aspect"),
        (Limits(min_side=64, max_aspect=2.0), 10, 200, "min-side"),
        (Limits(min_side=64, min_words=2), 10, 10, "min-side"),
        (Limits(min_side=64, min_words=3, letters=("greek",)), 64, 64, "min-words"),
    ],
)
def test_pictures(limits, height, width, dropped):
    assert after(limits, height, width).dropped == dropped


@pytest.mark.parametrize(
    ("limits", "captions", "chosen", "dropped"),
    [
        (Limits(min_words=2), ["cat", "a cat", ""], [1], ""),
        (Limits(min_words=2), ["cat", "dog"], [], "min-words"),
        (Limits(max_words=2), ["a b  c", "a\tb"], [1], ""),
        (Limits(max_words=2), ["a b c"], [], "max-words"),
        (Limits(min_words=2, max_words=3), ["a", "a b c d"], [], "max-words"),
        (Limits(letters=("latin",)), ["ein Käse", "кот", "123 !"], [0], ""),
        (Limits(min_words=2, letters=("latin",)), ["cat", "чёрный кот"], [], "letters"),
    ],
)
def test_captions(limits, captions, chosen, dropped):
    found = after(limits, captions=captions)
    assert (found.chosen, found.dropped) == (chosen, dropped)


def test_scripts_are_those_of_nearly_all_letters():
    assert of_scripts("naïve Ærøskøbing", ("latin",)) and not of_scripts("2024", ("latin",))
    assert of_scripts("猫のひげ", ("cjk", "hiragana")) and not of_scripts("猫のひげ", ("cjk",))
    assert of_scripts("a wave of 5 µm length", ("latin",)) and of_scripts("abcdefghi" + "я", ("latin",))
    assert not of_scripts("abcdefgh" + "я", ("latin",))
    check_scripts(("latin", "cyrillic", "arabic", "hangul", "cjk", "devanagari"))
    with pytest.raises(UserError, match=r"--letters 'latim': expected scripts such as latin"):
        check_scripts(("latin", "latim"))


@pytest.mark.parametrize(
    ("size", "expected"), [((300, 200), (96, 64)), ((200, 301), (64, 96)), ((65, 1000), (64, 985))]
)
def test_larger_pictures_are_made_smaller(size, expected):
    ramp = np.broadcast_to(np.linspace(0, 255, size[0], dtype=np.uint8)[None, :, None], (size[1], size[0], 3))
    out = io.BytesIO()
    Image.fromarray(ramp).save(out, "PNG")
    made = smaller(out.getvalue(), ramp, 64)
    picture = decode(made)
    assert Image.open(io.BytesIO(made)).format == "JPEG" and picture.shape == (expected[1], expected[0], 3)
    centres = (np.arange(expected[0]) + 0.5) / expected[0]
    assert np.abs(picture.astype(float) - 255 * centres[None, :, None]).max() < 6


def test_other_pictures_stay_the_very_file():
    assert smaller(b"the file", np.zeros((64, 500, 3), np.uint8), 64) == b"the file"
