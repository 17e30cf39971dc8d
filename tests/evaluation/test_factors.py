"""Reading factors: true pictures are read without error, and what shows no scene is not called one."""

import dataclasses
import io
import itertools

import numpy as np
import pytest
from documents import ROOT, blocks
from PIL import Image

from unclip_jax.data import varied_scenes
from unclip_jax.data.varied_scenes import ROTATIONS, SIDES, Scene, render, scenes
from unclip_jax.evaluation import factor_scores
from unclip_jax.evaluation.factor_scores import alignment, binding, diversity, evenness, precision, variety
from unclip_jax.evaluation.factors import as_read, read, rotation_as_read

FACTORS = varied_scenes.factors()


def drawn(n, size=64, split="test", every=7):
    """Every so many scenes, the factors that captions name, and true pictures."""
    chosen = list(itertools.islice(scenes(split), 0, n * every, every))
    return [c[0] for c in chosen], [c[1] for c in chosen], np.stack([render(c[0], size) for c in chosen])


@pytest.fixture(scope="module")
def true():
    return drawn(96)


def rates(reading, asked):
    pairs = list(zip(reading.scenes, map(as_read, asked), strict=True))
    return {name: np.mean([getattr(seen, name) == getattr(scene, name) for seen, scene in pairs]) for name in FACTORS}


def test_true_pictures_are_read_without_error(true):
    asked, named, images = true
    reading = read(images)
    assert reading.scenes == [as_read(scene) for scene in asked]
    assert reading.readable.all()
    scores = alignment(reading, asked, named)
    assert set(scores) == {*FACTORS, "named", "all"}
    assert all(score.value == 1 and score.low < 1 and score.high == pytest.approx(1) for score in scores.values())
    assert scores["object"].n == scores["all"].n == 96
    assert scores["named"].n == 96 + sum(map(len, named)) == sum(scores[name].n for name in FACTORS)


@pytest.mark.parametrize("size", [96, 256])
def test_true_pictures_of_other_sizes_are_read_without_error(size):
    asked, _, images = drawn(24, size, every=79)
    assert read(images).scenes == [as_read(scene) for scene in asked]


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 256, 1024])
def test_a_thousand_pictures_are_read_without_error(size):
    n = 1920 // 2 if size < 1024 else 96
    asked, _, images = drawn(n, size, every=1920 // n)
    reading = read(images)
    assert set(rates(reading, asked).values()) == {1} and reading.readable.mean() > 0.99


def degraded(images, how):
    """Pictures after JPEG of quality 50, noise, or averaging to fewer pixels, which are then repeated."""
    if how == "jpeg":
        files = [io.BytesIO() for _ in images]
        for file, picture in zip(files, images, strict=True):
            Image.fromarray(picture).save(file, "JPEG", quality=50)
        return np.stack([np.asarray(Image.open(file)) for file in files])
    kind, amount = how.split()
    if kind == "noise":
        noisy = images + np.random.default_rng(0).normal(0, int(amount), images.shape)
        return np.rint(np.clip(noisy, 0, 255)).astype(np.uint8)
    side, times = int(amount), 64 // int(amount)
    small = images.reshape(-1, side, times, side, times, 3).mean(axis=(2, 4))
    return np.rint(small).astype(np.uint8).repeat(times, axis=1).repeat(times, axis=2)


@pytest.mark.parametrize("how", ["jpeg", "noise 10", "average 32"])
def test_degraded_pictures_are_read(true, how):
    asked, _, images = true
    reading = read(degraded(images[::2], how))
    assert min(rates(reading, asked[::2]).values()) > 0.95 and reading.readable.mean() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "factors", "readable"),
    [("jpeg", 0.99, 0.93), ("noise 10", 0.99, 0.99), ("noise 30", 0.99, 0.94), ("average 32", 0.97, 0.97)],
)
def test_a_thousand_degraded_pictures_are_read(how, factors, readable):
    asked, _, images = drawn(960, every=2)
    reading = read(degraded(images, how))
    print(how, rates(reading, asked), reading.readable.mean())
    assert min(rates(reading, asked).values()) > factors and reading.readable.mean() > readable


def test_shifted_pictures_are_read(true):
    """Down by one pixel and left by two. Patterns do not move with their pictures in the search."""
    asked, _, images = true
    plain = [scene.pattern == "plain" for scene in asked]
    reading = read(np.roll(images, (1, -2), axis=(1, 2))[plain])
    assert min(rates(reading, [s for s, p in zip(asked, plain, strict=True) if p]).values()) >= 0.95
    assert reading.readable.mean() > 0.9


def test_noise_is_no_scene_and_scores_chance():
    asked, named, _ = drawn(240, 8, every=4)
    reading = read(np.random.default_rng(0).integers(0, 256, (240, 64, 64, 3), dtype=np.uint8))
    assert precision(reading).value == 0
    scores, chance = alignment(reading, asked, named), factor_scores.chance()
    for name, p in chance.items():
        assert abs(scores[name].value - p) < 4 * np.sqrt(p * (1 - p) / scores[name].n), name
    assert all(score.n == 0 and np.isnan(score.value) for score in diversity(reading, named).values())


def put(scene, *, sticker=None, label=None, background=None):
    """The scene's picture with another drawing, label or background."""
    parts = {"background": varied_scenes.background(scene.colour, scene.pattern, 64)}
    parts["sticker"] = np.rot90(varied_scenes.sticker(scene.object, SIDES[scene.size]), ROTATIONS[scene.rotation])
    parts["label"] = varied_scenes.label(scene.word, 44, 11)
    given = {"background": background, "sticker": sticker, "label": label}
    parts |= {name: value for name, value in given.items() if value is not None}
    picture = parts["background"].astype(float)
    left, top, right, bottom = varied_scenes.box(scene.size, scene.place)
    ink, paper, opaque = np.split(parts["sticker"], 3, axis=-1)
    area = picture[top:bottom, left:right]
    area[:] = area * (1 - opaque) + ink * np.array(varied_scenes.colours()[scene.tint]) + 255 * paper
    left, top, right, bottom = varied_scenes.label_box(scene.place)
    alpha = parts["label"][..., 3:] / 255
    area = picture[top:bottom, left:right]
    area[:] = area * (1 - alpha) + parts["label"][..., :3] * alpha
    return np.rint(picture).astype(np.uint8)


def changed(asked, how):
    """Share of the pictures that are readable once they are put together differently."""
    return read(np.stack([put(scene, **how(scene, k)) for k, scene in enumerate(asked)])).readable.mean()


def test_what_shows_no_scene_is_unreadable(true):
    asked = true[0][::2]
    assert changed(asked, lambda scene, k: {}) == 1

    def nothing(scene, k):
        return {"sticker": np.zeros((SIDES[scene.size],) * 2 + (3,))}

    def unknown(scene, k):
        name = ("guitar", "bicycle", "banana", "dog face", "snail", "umbrella")[k % 6]
        return {"sticker": np.rot90(varied_scenes.sticker(name, SIDES[scene.size]), k % 4)}

    def no_word(scene, k):
        return {"label": varied_scenes.label(("NOT", "LEAN", "SON", "TOE", "LEAST", "OTHE")[k % 6], 44, 11)}

    def brown(scene, k):
        return {"background": np.full((64, 64, 3), (130, 80, 40), np.uint8)}

    assert changed(asked, nothing) == 0
    assert changed(asked, unknown) < 0.1
    assert changed(asked, no_word) == 0
    assert changed(asked, brown) == 0


def test_a_label_on_the_wrong_side_is_impossible():
    scene = Scene("fish", "red", "small", "centre", "upright", "blue", "plain", "SEA")
    picture = render(scene, 64)
    left, top, right, bottom = varied_scenes.label_box("centre")
    moved = picture.copy()
    moved[top:bottom, left:right] = picture[0, 0]
    moved[1 : 1 + bottom - top, left:right] = picture[top:bottom, left:right]
    reading = read(np.stack([picture, moved]))
    assert reading.scenes == [scene, scene] and reading.readable.tolist() == [True, False]


def test_rotations_that_look_alike_are_one():
    alike = {name: {rotation_as_read(name, rotation) for rotation in ROTATIONS} for name in FACTORS["object"]}
    assert {name for name, kinds in alike.items() if len(kinds) == 1} == {"compass"}
    assert {name for name, kinds in alike.items() if len(kinds) == 2} == {"eye", "lemon", "mirror"}
    assert all(len(kinds) == 4 for name, kinds in alike.items() if name not in ("compass", "eye", "lemon", "mirror"))
    turned = Scene("lemon", "red", "large", "centre", "upside down", "blue", "plain", "SEA")
    (seen,) = read(render(turned, 64)[None]).scenes
    assert seen.rotation == "upright"
    named = [("rotation",)]
    assert alignment(read(render(turned, 64)[None]), [turned], named)["rotation"].value == 1
    assert diversity(read(render(turned, 64)[None]), [()])["rotation"].n == 0


def test_scenes_of_one_caption_are_all_right_and_differ_where_it_is_open():
    fixed = {"object": "fish", "tint": "red", "size": "large", "colour": "blue"}
    named = ("tint", "size", "colour")
    others = itertools.product(("left", "right"), ("upright", "clockwise"), ("plain", "dotted"), ("SEA", "TEN"))
    asked = [Scene(place=p, rotation=r, pattern=t, word=w, **fixed) for p, r, t, w in others]
    reading = read(np.stack([render(scene, 64) for scene in asked]))
    assert len(set(reading.scenes)) == 16
    scores = alignment(reading, [asked[0]] * 16, [named] * 16)
    assert scores["all"].value == scores["named"].value == 1 and scores["place"].n == 0
    assert binding(reading, asked, [named] * 16).n == 16
    spread = diversity(reading, [named] * 16)
    assert spread["tint"].n == 0 and spread["place"].n == 16
    assert spread["pattern"].value == pytest.approx((np.log(2) + 1 / 32) / np.log(3))
    differ = variety(reading, ["one"] * 16, [named] * 16)
    assert differ["word"].value == 1 and differ["word"].n == 8  # neighbours differ in the word alone
    assert differ["place"].value == 0 and differ["tint"].n == 0


def test_factors_are_counted_where_their_part_is_readable():
    """Without an object the background is still told, and all that an object shows is not."""
    scene = Scene("fish", "red", "small", "centre", "upright", "blue", "plain", "SEA")
    scenes = [scene, dataclasses.replace(scene, colour="red")]
    blank = np.zeros((SIDES["small"],) * 2 + (3,))
    reading = read(np.stack([put(scene, sticker=blank) for scene in scenes]))
    assert not reading.readable.any()
    spread, differ = diversity(reading, [()] * 2), variety(reading, ["one"] * 2, [()] * 2)
    assert [spread[name].n for name in ("colour", "pattern", "tint", "size", "place", "rotation")] == [2, 2, 0, 0, 0, 0]
    assert (differ["colour"].value, differ["pattern"].value, differ["tint"].n) == (1, 0, 0)


def test_exchanged_colours_are_not_bound(true):
    asked = true[0]
    swapped = [dataclasses.replace(scene, tint=scene.colour, colour=scene.tint) for scene in asked]
    names = [("tint", "colour")] * len(asked)
    mixed = [s if k % 4 == 0 else scene for k, (s, scene) in enumerate(zip(swapped, asked, strict=True))]
    reading = read(np.stack([render(scene, 64) for scene in mixed]))
    apart = [scene.tint != scene.colour for scene in asked]
    expected = np.mean([k % 4 != 0 for k in range(len(asked)) if apart[k]])
    result = binding(reading, asked, names)
    assert result.n == sum(apart) and result.value == pytest.approx(expected)
    assert binding(reading, asked, [("tint",)] * len(asked)).n == 0


def test_interval_of_evenness_covers_the_truth():
    rng = np.random.default_rng(0)
    for p in ([0.25] * 4, [0.7, 0.1, 0.1, 0.1], [0.5, 0.5, 0, 0]):
        truth = -sum(x * np.log(x) for x in p if x) / np.log(4)
        drawn = [evenness("", rng.multinomial(200, p)) for _ in range(400)]
        assert np.mean([r.low <= truth <= r.high for r in drawn]) > 0.9
        assert np.mean([r.value for r in drawn]) == pytest.approx(truth, abs=0.01)
    assert evenness("", np.array([0, 7, 0])).value == 0


def test_python_of_the_page_runs(capsys):
    found = blocks((ROOT / "docs/emoji_scenes.md").read_text())
    (code,) = (block.text for block in found if block.language == "python")
    exec(compile(code, "docs/emoji_scenes.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "precision 1 [0.9259, 1], n = 48" in printed and "alignment, all 1 [0.9259, 1], n = 48" in printed
    assert "variety, word nan" in printed  # no caption comes twice
