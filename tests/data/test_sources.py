"""Opening what users have, and one clear line where it cannot be opened."""

import io
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from unclip_jax.data import sources, splits
from unclip_jax.data.emoji_scenes import encode_png, scenes
from unclip_jax.data.places import read_file
from unclip_jax.data.sources import open_source, without_picture
from unclip_jax.errors import UnreadableRecord, UserError
from unclip_jax.paths import copy_folder, to_path

PNG = encode_png(np.zeros((4, 4, 3), np.uint8))


def folder_of(path, names, caption="a caption of {}"):
    for name in names:
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(PNG)
        file.with_suffix(".txt").write_text(caption.format(file.stem), encoding="utf-8")
    return f"folder:{path}"


def opened(spec, split="train", data_dir="", image="image", caption="caption"):
    return open_source(spec, split, str(data_dir), image, caption)


def names(source):
    return [source[k]["key"] for k in range(len(source))]


def test_folder(tmp_path):
    spec = folder_of(tmp_path, ["b/2.png", "a.JPG", "b/1.jpeg", "c.webp"])
    (tmp_path / "notes.md").write_text("no picture")
    train, test = opened(spec), opened(spec, "test")
    assert sorted(names(train) + names(test)) == ["a.JPG", "b/1.jpeg", "b/2.png", "c.webp"]
    assert names(train) == sorted(names(train)) and len(test) == 1
    record = train[0]
    assert record["image"] == PNG and record["caption"] == f"a caption of {record['key'].split('/')[-1].split('.')[0]}"
    assert pickle.loads(pickle.dumps(train))[0] == record


def test_order_is_by_name_whatever_the_file_system_says(tmp_path):
    spec = folder_of(tmp_path, [f"{name}/{k}.png" for k in (3, 1, 2) for name in "zqafmc"])
    found = names(opened(spec))
    assert found == sorted(found) and len(found) >= 16


def test_split_of_a_folder_goes_by_name_alone(tmp_path):
    many = [f"{k:04d}.png" for k in range(3000)]
    few = folder_of(tmp_path / "few", many[::3])
    all_of_them = folder_of(tmp_path / "all", many)
    held_out = {split: set(names(opened(few, split))) for split in ("train", "test")}
    now = {split: set(names(opened(all_of_them, split))) for split in ("train", "test")}
    assert held_out["train"] <= now["train"] and held_out["test"] <= now["test"]
    assert not now["train"] & now["test"] and now["train"] | now["test"] == set(many)
    assert 35 <= len(now["test"]) <= 85  # 60 ± 3 standard deviations of a binomial


@pytest.mark.parametrize("n", [2, 3, 10])
def test_both_splits_have_something(tmp_path, n):
    spec = folder_of(tmp_path, [f"{k}.png" for k in range(n)])
    assert len(opened(spec)) == n - 1 and len(opened(spec, "test")) == 1


def test_captions_of_odd_encodings(tmp_path):
    spec = folder_of(tmp_path, ["a.png", "b.png", "c.png"])
    for name in "abc":
        (tmp_path / f"{name}.txt").write_bytes("caf\xe9 \n".encode("latin-1"))
    assert opened(spec)[0]["caption"] == "café"


def test_each_line_is_a_caption(tmp_path):
    spec = folder_of(tmp_path, ["a.png", "b.png", "c.png"])
    for name in "abc":
        (tmp_path / f"{name}.txt").write_bytes(b"\xef\xbb\xbfa cat\r\n\r\n a tabby \n")
    assert opened(spec)[0]["caption"] == ["a cat", "a tabby"]


@pytest.mark.parametrize("caption", ["cat.txt", "cat.TXT", "cat.JPG.txt", "cat.jpg.TXT", "Cat.txt"])
def test_captions_have_the_picture_s_name_with_or_without_its_ending(tmp_path, caption):
    (tmp_path / caption).write_text("a cat")
    folder_of(tmp_path, ["other.png"])
    (tmp_path / "cat.JPG").write_bytes(PNG)
    found = [opened(f"folder:{tmp_path}", split)[0] for split in ("train", "test")]
    assert {record["key"]: record["caption"] for record in found}["cat.JPG"] == "a cat"


def test_what_systems_leave_in_folders_is_no_picture(tmp_path):
    spec = folder_of(tmp_path, ["a.png", "b.png", "._a.png", ".trash/c.png", "__MACOSX/a.png", "d/.e/f.png"])
    assert sorted(names(opened(spec)) + names(opened(spec, "test"))) == ["a.png", "b.png"]


class Failing:
    """A source of five records, each of which fails as often as `failures` says."""

    def __init__(self, failures):
        self.failures, self.tries = dict(failures), []

    def __len__(self):
        return 5

    def __getitem__(self, index):
        self.tries.append(index)
        if self.failures.get(index, 0):
            self.failures[index] -= 1
            raise RuntimeError("503\nService Unavailable")
        return {"key": str(index), "caption": "a"}


def test_a_record_that_fails_for_a_moment_is_read_again(monkeypatch):
    waits = []
    monkeypatch.setattr(sources.time, "sleep", waits.append)
    source = Failing({1: 2, 2: 3})
    steady = sources.Retrying(source)
    assert steady[1]["key"] == "1" and source.tries == [1, 1, 1] and waits == list(sources.RETRY_SECONDS)
    with pytest.raises(UnreadableRecord, match="it cannot be read: RuntimeError: 503 Service Unavailable"):
        steady[2]
    assert steady[2]["key"] == "2"
    with pytest.raises(IndexError):
        steady[5]


def test_what_is_no_use_is_not_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.time, "sleep", lambda _: pytest.fail("waits"))
    spec = folder_of(tmp_path, ["a.png", "b.png"])
    for name in "ab":
        (tmp_path / f"{name}.txt").write_bytes(b"\x89PNG\x01\xff")
    with pytest.raises(UnreadableRecord, match="its caption is no text"):
        opened(spec)[0]


def test_never_all_are_held_out():
    assert splits.held_out(np.array([3, 1, 2], np.uint64)).tolist() == [1, 2]
    assert splits.held_out(np.array([2**63, 2**62, 2**63], np.uint64)).tolist() == [1]


def test_captions_are_read_without_the_picture(tmp_path, monkeypatch):
    """By a source that can; from the whole record where it cannot."""
    monkeypatch.setattr(sources, "RETRY_SECONDS", (0, 0))
    (tmp_path / "cat.txt").write_text("a cat")
    (tmp_path / "dog.txt").write_text("a dog\nanother")
    for name in ("cat", "dog"):
        (tmp_path / f"{name}.png").symlink_to(__file__)
    both = [open_source(f"folder:{tmp_path}", split, "", "", "") for split in ("train", "test")]
    expected = [{name: split[0][name] for name in ("caption", "key")} for split in both]
    assert sorted(record["key"] for record in expected) == ["cat.png", "dog.png"]
    assert [without_picture([{"image": b"", **record}], 0) for record in expected] == expected
    for name in ("cat", "dog"):
        (tmp_path / f"{name}.png").unlink()
    assert [without_picture(split, 0) for split in both] == expected
    for name in ("cat", "dog"):
        (tmp_path / f"{name}.txt").unlink()
    with pytest.raises(UnreadableRecord, match="cannot be read: FileNotFoundError"):
        without_picture(both[0], 0)
    with pytest.raises(IndexError):
        without_picture(both[0], 1)


def test_waiting_in_vain_ends(monkeypatch):
    waits = []
    monkeypatch.setattr(sources.time, "sleep", waits.append)
    source = Failing({0: 3 * sources.MAX_IN_A_ROW + 1})
    steady = sources.Retrying(source)
    for _ in range(sources.MAX_IN_A_ROW + 1):
        with pytest.raises(UnreadableRecord):
            steady[0]
    assert len(waits) == 2 * sources.MAX_IN_A_ROW and source.failures[0] == 0
    assert steady[0] and steady[1] and len(source.tries) == 3 * sources.MAX_IN_A_ROW + 3


def test_pictures_without_a_caption_are_left_out(tmp_path, capsys):
    spec = folder_of(tmp_path, ["a.png", "b.png", "c.png"])
    (tmp_path / "b.txt").unlink()
    assert sorted(names(opened(spec)) + names(opened(spec, "test"))) == ["a.png", "c.png"]
    assert "2 pictures with captions; left out: without a caption 1" in capsys.readouterr().err


def test_folder_errors(tmp_path):
    with pytest.raises(UserError, match=r"no folder .*nowhere"):
        opened(f"folder:{tmp_path}/nowhere")
    with pytest.raises(UserError, match="no pictures"):
        opened(f"folder:{tmp_path}")
    spec = folder_of(tmp_path, ["a.png"])
    with pytest.raises(UserError, match="at least two"):
        opened(spec)
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UserError, match="1 pictures but no captions"):
        opened(spec)
    with pytest.raises(UserError, match=r"'validation'.*train or test"):
        opened(spec, "validation")
    with pytest.raises(UserError, match="expected tfds:NAME, folder:PATH, tars:PATTERN"):
        opened(str(tmp_path))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("tfds")


def test_emoji_scenes_are_drawn_on_first_use(data_dir, capsys):
    source = opened("tfds:emoji_scenes/single_64", "test", data_dir)
    assert "drawing emoji_scenes/single_64" in capsys.readouterr().err
    assert len(source) == 64
    assert {source[k]["caption"] for k in range(64)} == {text for _, text in scenes("single", "test")}
    picture = Image.open(io.BytesIO(source[3]["image"]))
    assert picture.size == (64, 64) and picture.format == "PNG"
    again = opened("tfds:emoji_scenes/single_64", "test", data_dir)
    assert capsys.readouterr().err == "" and again[5] == source[5]
    assert pickle.loads(pickle.dumps(source))[5] == source[5]
    assert len(opened("tfds:emoji_scenes/single_64", "train[:10%]", data_dir)) == 256


def test_a_damaged_shard_loses_its_damaged_records_alone(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "RETRY_SECONDS", ())
    whole = opened("tfds:emoji_scenes/single_64", "train", data_dir)
    shutil.copytree(data_dir / "emoji_scenes" / "single_64", tmp_path / "emoji_scenes" / "single_64")
    (shard,) = tmp_path.rglob("*-train.array_record-*")
    with shard.open("r+b") as file:
        file.seek(shard.stat().st_size // 2)
        file.write(bytes(300_000))
    source, lost = opened("tfds:emoji_scenes/single_64", "train", tmp_path), 0
    for k in range(len(source)):
        try:
            assert source[k]["image"] == whole[k]["image"]
        except UnreadableRecord as error:
            assert "orrupted" in str(error)
            lost += 1
    assert 0 < lost < len(source) / 10


def test_folder_in_a_bucket_has_the_same_records(bucket, tmp_path):
    spec = folder_of(tmp_path, [f"{name}/{k}.png" for k in range(9) for name in ("a", "a-b", "a/c")])
    (tmp_path / "notes.md").write_text("no picture")
    copy_folder(tmp_path, to_path(bucket), "")
    for split in ("train", "test"):
        here, there = opened(spec, split), opened(f"folder:{bucket}", split)
        assert len(here) == len(there) and all(here[k] == there[k] for k in range(len(here)))
        assert pickle.loads(pickle.dumps(there))[0] == here[0]
    with pytest.raises(UserError, match=r"no folder gs://.*nowhere"):
        opened(f"folder:{bucket}/nowhere")


def test_a_file_in_a_bucket_is_read_in_one_request(bucket, monkeypatch):
    from gcsfs import GCSFileSystem

    path, asked, call = to_path(bucket) / "a.txt", [], GCSFileSystem._call
    path.write_bytes(b"some words")
    monkeypatch.setattr(GCSFileSystem, "_call", lambda *args, **more: asked.append(args) or call(*args, **more))
    assert read_file(path) == b"some words" and len(asked) == 1
    with pytest.raises(FileNotFoundError):
        read_file(to_path(bucket) / "b.txt")


def test_emoji_scenes_are_drawn_into_a_bucket(bucket, data_dir, capsys):
    here = opened("tfds:emoji_scenes/single_64", "test", data_dir)
    capsys.readouterr()
    there = opened("tfds:emoji_scenes/single_64", "test", bucket)
    assert "drawing emoji_scenes/single_64" in capsys.readouterr().err
    assert [there[k] for k in range(3)] == [here[k] for k in range(3)] and len(there) == len(here)
    again = opened("tfds:emoji_scenes/single_64", "test", bucket)
    assert capsys.readouterr().err == "" and again[63] == here[63]
    assert pickle.loads(pickle.dumps(again))[5] == here[5]
    with pytest.raises(UserError, match=r"no dataset 'emoji' in gs://.*, where there are: emoji_scenes;"):
        opened("tfds:emoji", "test", bucket)


def test_another_process_was_first(tmp_path, monkeypatch):
    from unclip_jax.data.emoji_scenes import EmojiScenes

    draw = EmojiScenes.download_and_prepare

    def draw_and_fail(builder):
        draw(EmojiScenes(config=builder.builder_config.name, data_dir=tmp_path, file_format="array_record"))
        raise FileExistsError("the folder is there")

    monkeypatch.setattr(EmojiScenes, "download_and_prepare", draw_and_fail)
    assert len(opened("tfds:emoji_scenes/single_64", "test", tmp_path)) == 64


@pytest.fixture(scope="module")
def foreign(data_dir):
    """Someone else's dataset, with two captions a picture, prepared in both formats."""
    import tensorflow_datasets as tfds

    class Foreign(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        url_infos = {}  # noqa: RUF012

        def _info(self):
            features = {
                "picture": tfds.features.Image(shape=(4, 4, 3)),
                "captions": tfds.features.Sequence(tfds.features.Text()),
                "nested": {"text": tfds.features.Sequence(tfds.features.Text())},
                "comments": tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()}),  # as in COCO's
                "words": tfds.features.Tensor(shape=(2, 1), dtype=np.object_),
                "label": np.int64,
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"validation": self._generate_examples()}

        def _generate_examples(self):
            for k in range(3):
                both = [f"one {k}", f"two {k}"]
                captions = {"captions": both, "nested": {"text": both}, "words": np.array([["one"], ["two"]], object)}
                captions["comments"] = [{"id": i, "text": text} for i, text in enumerate(both)]
                yield k, {"picture": io.BytesIO(PNG), "label": k} | captions

    Foreign(data_dir=data_dir, file_format="array_record").download_and_prepare()
    return data_dir


@pytest.mark.parametrize("caption", ["captions", "nested/text", "comments/text"])
def test_any_tfds_dataset(foreign, caption):
    source = opened("tfds:foreign", "validation", foreign, "picture", caption)
    assert len(source) == 3 and source[0]["image"] == PNG
    said = sorted(tuple(source[k]["caption"]) for k in range(3))
    assert said == [("one 0", "two 0"), ("one 1", "two 1"), ("one 2", "two 2")]


@pytest.mark.parametrize(
    ("spec", "split", "image", "caption", "line"),
    [
        ("tfds:foreign", "train", "picture", "captions", "no split 'train': it has validation"),
        ("tfds:foreign", "validation[:x]", "picture", "captions", r"cannot give split 'validation\[:x\]'"),
        ("tfds:foreign", "validation", "image", "captions", "no feature 'image': it has .*picture"),
        ("tfds:foreign", "validation", "picture", "text", "no feature 'text': it has .*captions"),
        ("tfds:foreign", "validation", "picture", "label", "no text in 'label'"),
        ("tfds:foreign", "validation", "picture", "nested", "no text in 'nested'"),
        ("tfds:foreign", "validation", "picture", "comments/id", "no text in 'comments/id'"),
        ("tfds:foreign", "validation", "picture", "words", "no text in 'words'"),
        ("tfds:foreign", "validation", "picture", "comments/words", "no feature 'comments/words': .*comments/text"),
        ("tfds:foreign", "validation", "label", "captions", "no picture in 'label'"),
        ("tfds:foriegn", "train", "image", "caption", "no dataset 'foriegn'.*: .*foreign"),
        ("tfds:emoji_scene", "train", "image", "caption", "no dataset 'emoji_scene'.*like name are emoji_scenes"),
        ("tfds:emoji_scenes/single_65", "train", "image", "caption", "no config 'single_65': .*single_64"),
        ("tfds:mnist", "train", "image", "caption", "no dataset 'mnist'.*tfds build mnist"),
    ],
)
def test_tfds_errors(foreign, spec, split, image, caption, line):
    with pytest.raises(UserError, match=line) as error:
        opened(spec, split, foreign, image, caption)
    assert "\n" not in str(error.value)


def test_nothing_is_fetched_to_say_that_a_dataset_is_missing(foreign, monkeypatch):
    import socket

    def refuse(*_):
        raise AssertionError("looked on the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(UserError, match="no dataset"):
        opened("tfds:nosuchthing", "train", foreign)
