"""Varied scenes: their factors, what captions name of them, what is held out, and that they are the same for ever."""

import collections
import dataclasses
import hashlib
import io
import itertools
import re

import numpy as np
import pytest
from PIL import Image

from unclip_jax.data import varied_scenes
from unclip_jax.data.emoji_scenes import EmojiScenes
from unclip_jax.data.sources import open_source
from unclip_jax.data.varied_scenes import HELD_OUT, PLACES, ROTATIONS, Scene, caption, render, scene_at, scenes

FACTORS = varied_scenes.factors()
COLOUR = "|".join(FACTORS["colour"])


@pytest.fixture(scope="module")
def train():
    return list(itertools.islice(scenes("train"), 9600))


@pytest.fixture(scope="module")
def test():
    return list(scenes("test"))


def told(text):
    """Factors and values that a caption speaks of besides the object, read from its words alone."""
    found = {}
    background = re.search(rf"an? (?:(plain|striped|dotted) )?(?:({COLOUR}) )?background", text)
    if background:
        found |= {name: value for name, value in zip(("pattern", "colour"), background.groups(), strict=True) if value}
        text = text.replace(background[0], "")
    nouns = "|".join(name.removeprefix("red ") for name in FACTORS["object"])
    size, tint, noun = re.search(rf"an? (?:(small|medium|large) )?(?:({COLOUR}) )?({nouns})\b", text).groups()
    found |= {name: value for name, value in (("size", size), ("tint", tint)) if value}
    word = re.search(r'the word "([A-Z]+)"', text)
    found |= {"word": word[1]} if word else {}
    turns = {"clockwise": "clockwise", "upside down|180": "upside down", "upright|right way up": "upright"}
    turns = {"counterclockwise": "counterclockwise"} | turns  # contains the next one's word
    rotation = [turn for pattern, turn in turns.items() if re.search(pattern, text)][:1]
    found |= {"rotation": rotation[0]} if rotation else {}
    place = re.search(r"\b(in the middle at the|in the|at the) (top|bottom|centre|middle|left|right)( \w+)?", text)
    if place:
        words = set(place[0].split()) & {"top", "bottom", "left", "right"}
        found["place"] = next(name for name in PLACES if set(name.split()) - {"centre"} == words)
    return "red apple" if noun == "apple" else noun, found


def test_captions_name_the_object_and_true_factors_alone(train, test):
    for scene, named, text in [*train[:3000], *test]:
        assert told(text) == (scene.object, {name: getattr(scene, name) for name in named}), text


def test_captions_name_half_of_the_other_seven(train, test):
    for split in (train, test):
        counts = collections.Counter(len(named) for _, named, _ in split)
        assert set(counts) == {3, 4} and abs(counts[3] / len(split) - 0.5) < 0.05
    often = collections.Counter(name for _, named, _ in train for name in named)
    assert all(abs(often[name] / len(train) - 0.5) < 0.03 for name in FACTORS if name != "object")


def test_captions_have_many_wordings(train):
    scene = train[0][0]
    every = tuple(name for name in FACTORS if name != "object")
    assert len({caption(scene, every, k) for k in range(32)}) == 28  # one form says neither "on" nor "against"
    scene = Scene("eye", "orange", "small", "top", "clockwise", "blue", "striped", "SEA")
    assert caption(scene, every) == (
        "a small orange eye turned a quarter clockwise in the middle at the top on a striped blue background, "
        'with the word "SEA"'
    )
    assert caption(scene, ("tint",)) == caption(scene, ("tint",), 3) == "an orange eye"
    assert caption(scene, ("pattern",), 2) == "a striped background with an eye"
    assert caption(scene, ("size", "word"), 3) == 'the word "SEA", and a small eye'
    assert caption(scene, (), 1) == "a picture of an eye"


def test_factors_are_drawn_evenly_and_independently(train):
    for name, values in FACTORS.items():
        counts = collections.Counter(getattr(scene, name) for scene, _, _ in train)
        expected = len(train) / len(values)
        assert set(counts) == set(values)
        assert max(abs(n / expected - 1) for n in counts.values()) < 0.15, name
    both = collections.Counter((scene.tint, scene.colour) for scene, _, _ in train)
    assert len(both) == 64 and max(both.values()) < 1.4 * len(train) / 64


def test_train_has_none_of_the_held_out_combinations_and_each_object_all_other_values(train):
    seen = {name: {(scene.object, getattr(scene, name)) for scene, _, _ in train} for name in FACTORS}
    for name, values in FACTORS.items():
        kept = {(o, varied_scenes.held_out(o, name)) for o in FACTORS["object"]} if name in HELD_OUT else set()
        if name != "object":
            assert seen[name] == set(itertools.product(FACTORS["object"], values)) - kept
    for name in HELD_OUT:
        often = collections.Counter(varied_scenes.held_out(o, name) for o in FACTORS["object"])
        assert set(often) == set(FACTORS[name]) and max(often.values()) - min(often.values()) <= 1


def test_test_captions_ask_for_exactly_one_held_out_combination(test):
    combinations = collections.Counter()
    for scene, named, _ in test:
        new = [name for name in HELD_OUT if getattr(scene, name) == varied_scenes.held_out(scene.object, name)]
        assert len(new) == 1 and new[0] in named
        combinations[scene.object, new[0]] += 1
    assert len(combinations) == 4 * 48 and set(combinations.values()) == {10}


def test_scenes_and_captions_are_the_same_for_ever():
    """An interrupted run goes on with the same data, and a published number is of the same scenes."""
    texts = [str(scene_at(split, k, seed)) for split in ("train", "test") for k in range(200) for seed in (0, 1)]
    assert len(set(texts)) == 800
    assert hashlib.sha256("\n".join(texts).encode()).hexdigest() == DIGEST


DIGEST = "da6bb498d7f1f696f2ff861258a7fa0b34a745be88fa341e582333ac09e16d85"


def test_picture_is_the_background_but_for_drawing_and_label():
    for scene, _, _ in itertools.islice(scenes("train"), 60):
        plain, picture = varied_scenes.background(scene.colour, scene.pattern, 64), render(scene, 64)
        changed = (plain != picture).any(axis=-1)
        boxes = varied_scenes.box(scene.size, scene.place), varied_scenes.label_box(scene.place)
        for left, top, right, bottom in boxes:
            assert changed[top:bottom, left:right].mean() > 0.2
            changed[top:bottom, left:right] = False
        assert not changed.any(), scene


def test_drawing_and_label_never_overlap():
    for size, place in itertools.product(FACTORS["size"], PLACES):
        _, top, _, bottom = varied_scenes.box(size, place)
        _, above, _, below = varied_scenes.label_box(place)
        assert top >= below or bottom <= above


@pytest.mark.parametrize("times", [2, 4])
def test_small_picture_is_the_large_one_averaged(times):
    for scene, _, _ in itertools.islice(scenes("train"), 7, 300, 31):
        large = render(scene, 64 * times).reshape(64, times, 64, times, 3).mean(axis=(1, 3))
        assert np.abs(large - render(scene, 64)).mean() < 1.5, scene


def test_all_but_black_shows_the_tint():
    """Of a pixel with ink alone, channels are in the tint's proportion; outlines stay black."""
    for name in FACTORS["object"]:
        ink, paper, opaque = varied_scenes.sticker(name, 32).transpose(2, 0, 1)
        np.testing.assert_allclose(ink[(paper == 0) & (opaque == 1)].max(), 1, atol=0.3)
        assert ((ink + paper <= opaque + 1e-6) & (ink >= 0) & (opaque <= 1)).all()
        assert np.median(ink[(paper == 0) & (opaque == 1)]) > 0.4, name


def test_rotations_turn_the_picture():
    """A square around the middle is turned by a quarter, and the top of the drawing points to the right."""
    upright = Scene("rocket", "red", "large", "centre", "upright", "blue", "plain", "SEA")
    left, top, right, bottom = varied_scenes.box("large", "centre")
    turned = [
        render(dataclasses.replace(upright, rotation=name), 64)[top:bottom, left:right]
        for name in ("upright", "clockwise", "upside down", "counterclockwise")
    ]
    assert set(ROTATIONS) == {"upright", "clockwise", "upside down", "counterclockwise"}
    for before, after in itertools.pairwise(turned):
        np.testing.assert_array_equal(np.rot90(before, -1), after)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(varied_scenes, "COUNTS", {"train": 96, "test": 48})


def test_records_are_the_scenes_and_two_builds_are_equal(few, tmp_path):
    sources = [open_source("tfds:emoji_scenes/varied_64", "test", tmp_path / name, "image", "caption") for name in "ab"]
    assert len(sources[0]) == 48
    captions = [text for _, _, text in scenes("test")]
    assert sorted(sources[0][k]["caption"] for k in range(48)) == sorted(captions)
    files = [sorted((tmp_path / name).rglob("*.array_record-*")) for name in "ab"]
    assert len(files[0]) == 2 and [f.name for f in files[0]] == [f.name for f in files[1]]
    for one, other in zip(*files, strict=True):
        assert one.read_bytes() == other.read_bytes()

    import tensorflow_datasets as tfds

    builder = EmojiScenes(config="varied_64", data_dir=tmp_path / "a", file_format="array_record")
    for record in builder.as_data_source("train", decoders={"image": tfds.decode.SkipDecoding()}):
        scene, named, text = scene_at("train", int(record["index"]))
        assert Scene(**{name: record[name].decode() for name in FACTORS}) == scene
        assert record["named"].decode() == ",".join(named) and record["caption"].decode() == text
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(record["image"]))), render(scene, 64))


def test_captions_are_read_back():
    rows = [*itertools.islice(varied_scenes.scenes("train"), 3000), *varied_scenes.scenes("test")]
    for scene, named, text in rows:
        found, names = varied_scenes.read_caption(text)
        assert names == named and all(getattr(found, name) == getattr(scene, name) for name in ("object", *named)), text
    for text in ("", "a fox", "a small", "a red background", "a small red apple in a hurry"):
        assert varied_scenes.read_caption(text) is None or text == "a fox"
