"""The default dataset: what is drawn, what is said of it, what is held out, and that it is the same for ever."""

import collections
import io
import itertools

import numpy as np
import pytest
from PIL import Image

from unclip_jax.data import emoji_scenes
from unclip_jax.data.emoji_scenes import EmojiScenes, Scene, caption, draw, render, scenes


def combination(kind, scene):
    """What must not be both in train and in test."""
    return (scene.object, scene.colour) if kind == "single" else frozenset((scene.object, scene.other))


@pytest.mark.parametrize("kind", ["single", "pair"])
def test_combinations_of_test_are_not_in_train(kind):
    train = {combination(kind, scene) for scene, _ in scenes(kind, "train")}
    test = {combination(kind, scene) for scene, _ in scenes(kind, "test")}
    assert train and test and not train & test
    everything = 48 * 8 if kind == "single" else 48 * 47 // 2
    assert len(train | test) == everything


def test_every_part_of_a_single_test_scene_is_in_train():
    test = [scene for scene, _ in scenes("single", "test")]
    assert len(test) == len({(s.object, s.colour) for s in test}) == 64
    assert set(collections.Counter(s.colour for s in test).values()) == {8}
    assert set(collections.Counter(s.object for s in test).values()) == {1, 2}
    seen = {(s.object, s.colour) for s, _ in scenes("single", "train")}
    assert min(collections.Counter(name for name, _ in seen).values()) >= 6


def test_pairs_say_every_relation_alike():
    for split in ("train", "test"):
        counts = collections.Counter(scene.relation for scene, _ in scenes("pair", split))
        assert set(counts) == set(emoji_scenes.relations()) and len(set(counts.values())) == 1


def test_background_of_a_pair_tells_nothing_of_the_relation():
    counts = collections.Counter((scene.relation, scene.colour) for scene, _ in scenes("pair", "train"))
    expected = 8256 / 32
    assert len(counts) == 32 and all(abs(n / expected - 1) < 0.1 for n in counts.values())


@pytest.mark.parametrize(
    ("scene", "expected"),
    [
        (Scene("pizza", "blue"), "a pizza on a blue background"),
        (Scene("alarm clock", "orange"), "an alarm clock on an orange background"),
        (Scene("eye", "red"), "an eye on a red background"),
        (Scene("unicorn", "gray"), "a unicorn on a gray background"),
        (Scene("pizza", "blue", "left of", "red apple"), "a pizza to the left of a red apple"),
        (Scene("eye", "blue", "below", "unicorn"), "an eye below a unicorn"),
    ],
)
def test_plainest_caption(scene, expected):
    assert caption(scene) == expected


@pytest.mark.parametrize("kind", ["single", "pair"])
def test_captions_name_what_they_show(kind):
    wordings = set()
    for scene, text in scenes(kind, "train"):
        plain = text
        for noun in filter(None, (scene.object, scene.other)):
            named = f"{'an' if noun in ('alarm clock', 'eye') else 'a'} {noun}"
            assert f" {named} " in f" {text} ", text
            plain = plain.replace(named, "OBJECT")
        assert kind == "pair" or scene.colour in text
        assert "background" not in text or f"{'an' if scene.colour == 'orange' else 'a'} {scene.colour} back" in text
        wordings.add(plain.replace("an orange", "a COLOUR").replace(scene.colour, "COLOUR"))
    assert len(wordings) >= (6 if kind == "single" else 24)


def test_test_scenes_are_in_the_middle_and_train_scenes_near_it():
    for kind in ("single", "pair"):
        assert all(scene.shift == (0, 0) and scene.scale == 1 for scene, _ in scenes(kind, "test"))
    train = np.array([(*scene.shift, scene.scale) for scene, _ in scenes("single", "train")])
    assert np.abs(train[:, :2]).max() <= 0.03 and np.abs(train[:, :2].mean(0)).max() < 0.003
    assert set(train[:, 2]) == {0.95, 1.0, 1.05}


def test_drawing_fills_the_square_along_its_longer_side():
    for name in emoji_scenes.objects():
        shown = draw(name, 64)[..., 3] > 64
        height, width = (np.ptp(np.flatnonzero(shown.any(axis=axis))) + 1 for axis in (1, 0))
        assert max(height, width) >= 62, name


@pytest.mark.parametrize("size", [16, 64, 100])
def test_picture_is_the_background_around_the_drawing(size):
    picture = render(Scene("soccer ball", "green"), size)
    assert picture.shape == (size, size, 3) and picture.dtype == np.uint8
    margin = int(0.09 * size)
    np.testing.assert_array_equal(picture[:margin].reshape(-1, 3), [emoji_scenes.colours()["green"]] * margin * size)
    x, y = np.meshgrid(*[(np.arange(size) + 0.5) / size - 0.5] * 2)
    ball = np.hypot(x, y) < 0.36
    changed = (picture != emoji_scenes.colours()["green"]).any(axis=-1)
    assert changed[ball].all() and changed.mean() < 0.64


def test_relations_place_objects():
    """A red apple (red) and a swan (white): the centre of what is red says where the apple is."""
    for relation, (axis, before) in {
        "left of": (1, True), "right of": (1, False), "above": (0, True), "below": (0, False),
    }.items():  # fmt: skip
        picture = render(Scene("red apple", "blue", relation, "swan"), 64).astype(int)
        red = (picture[..., 0] - picture[..., 2] > 60) & (picture[..., 0] - picture[..., 1] > 60)
        centre = np.argwhere(red).mean(axis=0)
        assert (centre[axis] < 24) if before else (centre[axis] > 40), relation
        assert abs(centre[1 - axis] - 31.5) < 4, relation


def test_colours_are_far_apart():
    values = np.array(list(emoji_scenes.colours().values()), float)
    distances = np.linalg.norm(values[:, None] - values[None], axis=-1) + 1e9 * np.eye(8)
    assert len(values) == 8 and distances.min() > 90


def test_drawings_differ_at_16_pixels():
    pictures = np.stack([render(Scene(name, "gray"), 16) for name in emoji_scenes.objects()]).reshape(48, -1) / 255
    distances = np.sqrt(np.square(pictures[:, None] - pictures[None]).mean(-1)) + 1e9 * np.eye(48)
    assert distances.min() > 0.15


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    def build():
        builder = EmojiScenes(config="single_64", data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record")
        builder.download_and_prepare()
        return builder

    return build(), build()


def test_two_builds_are_equal(built):
    files = [sorted(builder.data_path.glob("*.array_record-*")) for builder in built]
    assert [f.name for f in files[0]] == [f.name for f in files[1]] and len(files[0]) == 2
    for one, other in zip(*files, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_records_are_the_scenes(built):
    import tensorflow_datasets as tfds

    decoders = {"image": tfds.decode.SkipDecoding()}
    for split in ("train", "test"):
        expected = list(scenes("single", split))
        records = built[0].as_data_source(split, decoders=decoders)
        assert sorted(record["index"] for record in records) == list(range(len(expected)))
        for record in itertools.islice(records, 20):
            scene, text = expected[record["index"]]
            assert record["caption"].decode() == text and record["object"].decode() == scene.object
            assert record["colour"].decode() == scene.colour and record["relation"] == record["other"] == b""
            picture = np.asarray(Image.open(io.BytesIO(record["image"])))
            np.testing.assert_array_equal(picture, render(scene, 64))


def test_same_scene_at_every_size():
    """The picture at 64 is nearly the picture at 256, averaged."""
    scene = next(scene for scene, _ in itertools.islice(scenes("single", "train"), 5, 6))
    large = render(scene, 256).reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
    assert np.abs(large - render(scene, 64)).mean() < 6


def test_drawing_needs_no_tensorflow():
    import subprocess
    import sys

    code = "import sys; from unclip_jax.data import emoji_scenes; emoji_scenes.draw('pizza', 8)"
    code += "; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
