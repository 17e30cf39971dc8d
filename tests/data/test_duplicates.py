"""Hashes of pictures, and duplicates found by them: as other code computes them, and as all pairs say."""

import io
import itertools

import numpy as np
import pytest
import scipy.fft
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from unclip_jax.data import duplicates, emoji_scenes
from unclip_jax.data.transforms import decode

looks = st.integers(0, 2**64 - 1)


def differ(one, other):
    return (int(one, 16) ^ int(other, 16)).bit_count()


def scene(name, colour):
    return emoji_scenes.render(emoji_scenes.Scene(name, colour), 128)


def test_look_is_the_hash_of_the_imagehash_library():
    """Its `phash`, written down with SciPy's cosine transform."""
    rng = np.random.default_rng(0)
    for size in ((32, 32), (100, 60), (20, 300)):
        picture = np.asarray(Image.fromarray(rng.integers(0, 256, (9, 7, 3), np.uint8)).resize(size))
        grey = np.asarray(Image.fromarray(picture).convert("L").resize((32, 32), Image.Resampling.LANCZOS), float)
        low = scipy.fft.dct(scipy.fft.dct(grey, axis=0), axis=1)[:8, :8]
        bits = "".join("01"[int(bit)] for bit in (low > np.median(low)).ravel())
        assert duplicates.look(picture) == f"{int(bits, 2):016x}"


def test_a_picture_looks_the_same_smaller_and_as_jpeg():
    drawn = [scene("castle", "red"), scene("hamburger", "blue"), scene("rocket", "green")]
    for picture in drawn:
        out = io.BytesIO()
        Image.fromarray(picture).resize((90, 90)).save(out, "JPEG", quality=70)
        assert differ(duplicates.look(decode(out.getvalue())), duplicates.look(picture)) <= 4
    for one, other in itertools.combinations(map(duplicates.look, drawn), 2):
        assert differ(one, other) > 10


def test_plain_pictures_look_the_same_in_whatever_way_numbers_are_rounded():
    """Without rounding, errors of 1e-13 would decide about the bits."""
    found = {duplicates.look(np.full((40, 50, 3), value, np.uint8)) for value in (1, 77, 130, 255)}
    assert found == {"8000000000000000"}


def test_digest_is_of_pixels_and_shape():
    picture = scene("castle", "red")
    files = []
    for kind in ("PNG", "BMP"):
        out = io.BytesIO()
        Image.fromarray(picture).save(out, kind)
        files.append(out.getvalue())
    assert len({duplicates.digest(decode(file)) for file in files}) == 1
    other = picture.copy()
    other[0, 0, 0] ^= 1
    assert len({duplicates.digest(p) for p in (picture, other, picture.reshape(64, 256, 3), picture[::-1])}) == 4


@given(looks, st.lists(st.integers(0, 63), max_size=duplicates.MOST_BITS, unique=True), st.integers(0, 7))
def test_near_looks_share_a_band(look, flipped, more):
    other = look
    for bit in flipped:
        other ^= 1 << bit
    bits = min(duplicates.MOST_BITS, len(flipped) + more)
    ours, theirs = (
        {key for key, _ in duplicates._bands((0, "", f"{value:016x}"), bits + 1)} for value in (look, other)
    )
    assert len(ours) == bits + 1 and ours & theirs


def few_looks(count, seed=0):
    """Records of few looks with a few bits flipped, so that near ones, equal ones and chains of them occur."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 2**63, 20)
    records = []
    for index in range(count):
        look = int(base[rng.integers(len(base))])
        for bit in rng.integers(0, 64, rng.integers(0, 5)):
            look ^= 1 << int(bit)
        records.append((index, f"{int(rng.integers(count // 2)):032x}", f"{look:016x}"))
    return records


def near(records, bits):
    """Records that are near an earlier one, by comparing all pairs."""
    return {
        (j, duplicates.NEAR)
        for (i, _, one), (j, _, other) in itertools.product(records, records)
        if i < j and differ(one, other) <= bits
    }


@pytest.mark.parametrize("at_once", [1, 7, 100, 2**22])
def test_within_a_group_all_pairs_are_compared(monkeypatch, at_once):
    monkeypatch.setattr(duplicates, "AT_ONCE", at_once)
    records = few_looks(60)
    distinct = list({look: (index, digest, look) for index, digest, look in reversed(records)}.values())
    group = [(index, look) for index, _, look in distinct]
    assert set(duplicates._near(((0, 0), group), 3)) == near(distinct, 3)


@pytest.mark.parametrize(("exact", "bits"), [(True, None), (False, 0), (False, 3), (True, 3), (True, 7)])
def test_beam_finds_what_all_pairs_say(exact, bits):
    pytest.importorskip("apache_beam", reason="needs the extra [build]")
    import apache_beam as beam
    from apache_beam.testing.util import assert_that, equal_to

    from unclip_jax.data.build import on_this_machine

    records, expected = few_looks(300), set()
    if exact:
        first = {digest: index for index, digest, _ in reversed(records)}
        expected = {(index, duplicates.EXACT) for index, digest, _ in records if first[digest] != index}
        left = [record for record in records if (record[0], duplicates.EXACT) not in expected]
    else:
        left = records
    if bits is not None:
        expected |= near(left, bits)
    assert 10 < len(expected) < 300
    options, runner = on_this_machine(1)
    with beam.Pipeline(runner=runner, options=options) as pipeline:
        shuffled = [records[k] for k in np.random.default_rng(1).permutation(len(records))]
        found = duplicates.find(pipeline | beam.Create(shuffled), exact, bits)
        assert_that(found, equal_to(sorted(expected)))  # each of them once
