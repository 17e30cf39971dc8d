"""Embeddings made once: the loss they give is that of CLIP in the step, and what is not theirs is refused."""

import io
import itertools
import json
import pickle
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from shrink import CAPTIONS, compilation_cache, random_params, small_config, small_stage, tokenizer_bytes

from unclip_jax import embed as embedding
from unclip_jax import inputs
from unclip_jax.bundle import save_bundle
from unclip_jax.data import __main__ as command
from unclip_jax.data import embeddings
from unclip_jax.data.embeddings import EmbeddedSource, Form, Provenance, Row
from unclip_jax.data.pipeline import batches, evaluation_batch
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.data.transforms import ToExample
from unclip_jax.errors import UnreadableRecord, UserError
from unclip_jax.paths import copy_folder, to_path
from unclip_jax.stages import make_stage

RECORDS, HELD_OUT, PER_SHARD = 11, 3, 4
SPOILED, SILENT = 5, 6  # a record whose picture is cut short, and one without a caption
NAMES = ("prior_diffusion", "prior_ar", "decoder")


class Records:
    """Pictures of noise, higher than wide, with one to three captions."""

    def __init__(self, count, seed):
        rng = np.random.default_rng(seed)
        self._records = []
        for i in range(count):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (24, 19, 3), dtype=np.uint8)).save(file, "PNG")
            captions = [CAPTIONS[k] for k in rng.permutation(len(CAPTIONS))[: 1 + i % 3]]
            captions = captions[0] if i % 4 == 0 else captions
            self._records.append({"image": file.getvalue(), "caption": captions, "key": f"record-{i}"})
        if count == RECORDS:
            self._records[SPOILED]["image"] = self._records[SPOILED]["image"][:60]
            self._records[SILENT]["caption"] = []

    def __len__(self):
        return len(self._records)

    def __getitem__(self, index):
        return dict(self._records[index])


@pytest.fixture(autouse=True)
def data(monkeypatch):
    """In place of every dataset; a shard holds four records."""
    sources = {"train": Records(RECORDS, 0), "test": Records(HELD_OUT, 1)}
    for module in (embedding, inputs):
        monkeypatch.setattr(module, "open_sources", lambda spec, weights, splits, *_: [sources[s] for s in splits])
    monkeypatch.setattr(embeddings, "SHARD_RECORDS", PER_SHARD)
    with compilation_cache():
        yield sources


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A random CLIP: its bundle, identity, stage and parameters, so large that nothing looks or reads alike."""
    folder = tmp_path_factory.mktemp("clip") / "bundle"
    stage = small_stage("clip")[0]
    params = jax.tree.map(lambda w: 5 * w, random_params(stage))
    identity = save_bundle(str(folder), "clip", stage.config, params, tokenizer_bytes(), "", {})
    return SimpleNamespace(folder=folder, identity=identity, stage=stage, params=params)


def config_of(clip, name="prior_diffusion", **data):
    config = small_config(name).unlock()
    config.clip.bundle = str(clip.folder)
    config.data.update(dict(source="some:data", threads=2) | data)
    return config.lock()


def embed(clip, folder, process=0, processes=1, dtype="float32", crops=1, **data):
    embedding.embed_dataset(config_of(clip, **data), folder, process, processes, dtype, crops)


@pytest.fixture
def folder(clip, tmp_path):
    embed(clip, tmp_path / "embeddings")
    return tmp_path / "embeddings"


def opened(source, folder, clip, split="train", crop="center", pictures=True):
    provenance = Provenance(clip.identity, "some:data", "image", "caption", crop)
    return EmbeddedSource(source, folder, provenance, split, pictures)


def changed(config, reader):
    """The config with another reader of captions, or a decoder of text embeddings."""
    config.unlock()
    if reader == "clip":
        config.model.caption = "clip"
        if config.stage == "prior_diffusion":
            config.model.context = 12
    if reader == "text":
        config.model.embedding = "text"
    return config.lock()


@pytest.mark.parametrize(
    ("name", "reader"),
    [
        pytest.param(name, reader, marks=[pytest.mark.slow] * ((name, reader) != ("prior_diffusion", "own")))
        for reader in ("own", "clip")
        for name in NAMES
        if (name, reader) != ("prior_ar", "clip")
    ]
    + [("decoder", "text")],
)
def test_loss_is_that_of_clip_in_the_step(name, reader, clip, folder):
    """Same rows, captions and key; over an epoch, so that spoiled records, too, come up."""
    tokenizer = Tokenizer(tokenizer_bytes())
    found = []
    for where in ("", str(folder)):
        config = changed(config_of(clip, name, embeddings=where), reader)
        stage = make_stage(config, clip.stage, embedded=bool(where))
        texts = {name: (tokenizer, context, ends) for name, (_, context, ends) in stage.texts.items()}
        to_example = ToExample(
            stage.images, texts, config.data.crop, stage.patch, stage.bsr_factor, stage.vectors
        )
        sources = inputs._open_sources(config, clip.identity, bool(stage.images))
        batch = next(batches(sources[0], to_example, 2 * RECORDS, 0))
        skipped = batch.pop("records_skipped").sum()
        held_out = evaluation_batch(sources[1], to_example, HELD_OUT, 0)
        found.append((stage, batch, held_out, skipped))
    (plain, batch, held_out, skipped), (embedded, *others, again) = found
    for one, other in zip((batch, held_out), others, strict=True):
        spec = embedded.batch_spec(len(next(iter(other.values()))))
        assert {n: (v.shape, v.dtype) for n, v in other.items()} == {n: (s.shape, s.dtype) for n, s in spec.items()}
        for shared in one.keys() & other.keys():
            np.testing.assert_array_equal(one[shared], other[shared])
    assert skipped == again > 0

    kept = {"clip_tokens", "clip_tokens_length"} if reader == "clip" else set()
    assert {n for n in others[0] if n.startswith("clip")} == kept and embedded.runs_clip == bool(kept)
    params, key = random_params(plain), jax.random.key(1)
    expected, _ = jax.jit(plain.loss)(params, clip.params, batch, key)
    loss, _ = jax.jit(embedded.loss)(params, clip.params if kept else {}, others[0], key)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_every_caption_has_its_own_embedding(clip, folder, data):
    tokenizer, context = Tokenizer(tokenizer_bytes()), clip.stage.config.model.text.context
    source = opened(data["train"], folder, clip)
    read = jax.jit(clip.stage.embed_texts)
    assert len(source) == RECORDS
    for i in range(RECORDS):
        if i in (SPOILED, SILENT):
            with pytest.raises(UnreadableRecord, match="when the embeddings were made"):
                source[i]
            continue
        record, plain = source[i], data["train"][i]
        assert {name: record[name] for name in plain} == plain
        captions = [plain["caption"]] if isinstance(plain["caption"], str) else plain["caption"]
        expected = read(clip.params, *tokenizer.encode((3 * captions)[:3], context, True))[: len(captions)]
        np.testing.assert_allclose(record["text_embeddings"], expected, atol=1e-5)
        assert all(np.abs(a - b).max() > 1e-3 for a, b in itertools.combinations(expected, 2))
        assert record["image_embeddings"].shape == (1, 8) and record["image_embeddings"].dtype == np.float32


def files(folder):
    """Name → arrays of every file but embeddings.json, which must be there."""
    assert (folder / "embeddings.json").exists()
    return {path.name: load_file(path) for path in folder.iterdir() if path.name != "embeddings.json"}


def test_files_say_whose_they_are(clip, folder):
    said = json.loads((folder / "embeddings.json").read_text())
    assert (said["clip"], said["source"], said["splits"]) == (clip.identity, "some:data", {"train": 11, "test": 3})
    names = [f"train-0000{k}-of-00003.safetensors" for k in range(3)] + ["test-00000-of-00001.safetensors"]
    assert files(folder).keys() == set(names)
    shard = embeddings._shards(folder, said, "train")[1]
    labels = json.loads(embeddings._opened(shard, shard.path).metadata()["shard"])
    assert labels == {
        "format": 2,
        "clip": clip.identity,
        "source": "some:data",
        "image_feature": "image",
        "caption_feature": "caption",
        "crop": "center",
        "dtype": "float32",
        "crops": 1,
        "seed": 0,
        "side": 0,
        "split": "train",
        "start": 4,
        "stop": 8,
        "unreadable": 2,
    }


def test_killed_and_run_again_goes_on(clip, folder, tmp_path, monkeypatch, capsys):
    """Killed while the third of four files is written."""
    whole, written, write = files(folder), [], embeddings.write

    def killing(shard, *arrays):
        if len(written) == 2:
            shard.path.with_name(f"{shard.path.name}.tmp").write_bytes(b"half a file")
            raise KeyboardInterrupt
        written.append(shard.path.name)
        write(shard, *arrays)

    stopped = tmp_path / "stopped"
    monkeypatch.setattr(embeddings, "write", killing)
    with pytest.raises(KeyboardInterrupt):
        embed(clip, stopped)
    before = {name: (stopped / name).stat().st_mtime_ns for name in written}
    monkeypatch.setattr(embeddings, "write", lambda shard, *a: written.append(shard.path.name) or write(shard, *a))
    embed(clip, stopped)
    assert len(written) == len(set(written)) == 4
    assert before == {name: (stopped / name).stat().st_mtime_ns for name in before}
    jax.tree.map(np.testing.assert_array_equal, files(stopped), whole)
    assert {path.name: path.read_bytes() for path in stopped.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }
    said = capsys.readouterr().err
    assert "8 of 14 records were done before" in said and "14 records are in" in said and "2 could not be read" in said

    monkeypatch.setattr(embedding._Towers, "_call", None)
    embed(clip, stopped)  # nothing is left to do
    says = "embeddings of dtype float32, not float16: give a new folder"
    refused(says, partial(embed, dtype="float16"), clip, stopped)


def test_processes_share_the_files(clip, folder, tmp_path, data):
    shared = tmp_path / "shared"
    embed(clip, shared, process=1, processes=3)
    assert files(shared).keys() == {"train-00001-of-00003.safetensors"}
    with pytest.raises(UserError, match="lacks 2 of 3 files of split 'train': run python"):
        opened(data["train"], shared, clip)
    embed(clip, shared, process=0, processes=3)
    embed(clip, shared, process=2, processes=3)
    ours, theirs = files(shared), files(folder)
    for array in (*ours.values(), *theirs.values()):
        array["records"] = array["records"][:, :-1]  # without the checksums: other rows at once round otherwise
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), ours, theirs)


def test_in_a_bucket_they_are_the_same(clip, folder, bucket, tmp_path, data, monkeypatch, capsys):
    """CLIP from a bucket, embeddings into one; stopped, gone on with, and read from copies on a disk."""
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "cache"))
    copy_folder(clip.folder, to_path(bucket) / "clip", "config.json")
    there, write = to_path(bucket) / "embeddings", embeddings.write
    flags = [f"--config.clip.bundle={bucket}/clip", "--config.data.source=some:data", "--config.data.threads=2"]
    flags += ["--dtype=float32"]
    command_line = ["data", "embed", "--config=configs/prior_diffusion.py:tiny", *flags, f"--out={there}"]

    def killing(shard, *arrays):
        if shard.start == 8:
            raise KeyboardInterrupt
        write(shard, *arrays)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(embeddings, "write", killing)
        command.main(command_line)
    refused("lacks 1 of 3 files of split 'train'", opened, data["train"], there, clip)
    assert command.main(command_line) == 0
    said = capsys.readouterr().err
    assert "8 of 14 records were done before" in said and "2 could not be read" in said
    local, remote = (opened(data["train"], place, clip) for place in (folder, there))
    for i in set(range(RECORDS)) - {SPOILED, SILENT}:
        ours, theirs = local[i], remote[i]
        assert ours.keys() == theirs.keys()
        for name in ("image_embeddings", "text_embeddings"):
            np.testing.assert_allclose(theirs[name], ours[name], atol=1e-6)
    assert len(list((tmp_path / "cache").iterdir())) == 3
    (there / "train-00001-of-00003.safetensors").write_bytes((folder / "train-00000-of-00003.safetensors").read_bytes())
    refused("train-00001-of-00003.safetensors belongs to other embeddings", opened, data["train"], there, clip)


def refused(says, act, *arguments):
    with pytest.raises(UserError, match=says) as caught:
        act(*arguments)
    assert "\n" not in str(caught.value)


def test_embeddings_of_something_else_are_refused(clip, folder, data):
    def open_as(clip=clip.identity, source="some:data", split="train", records=data["train"], crop="center"):
        return EmbeddedSource(records, folder, Provenance(clip, source, "image", "caption", crop), split)

    open_as()
    refused(f"embeddings of clip {clip.identity}, not abc", lambda: open_as(clip="abc"))
    refused("embeddings of source some:data, not folder:/x", lambda: open_as(source="folder:/x"))
    refused("embeddings of crop center, not dalle", lambda: open_as(crop="dalle"))
    refused("no split 'validation': it has train, test", lambda: open_as(split="validation"))
    refused("of 11 records of split 'train', now there are 3", lambda: open_as(records=data["test"]))
    with pytest.raises(UserError, match="no embeddings at"):
        EmbeddedSource(data["train"], folder / "nowhere", Provenance("", "", "", "", ""), "train")


def test_a_record_that_changed_is_noticed(clip, folder, data):
    source = opened(data["train"], folder, clip)
    data["train"]._records[2], data["train"]._records[3] = data["train"][3], data["train"][2]
    refused("record record-3 changed since", lambda: source[2])
    source[1]
    data["train"]._records[1]["caption"] = ["another", *data["train"][1]["caption"][1:]]
    refused("record record-1 changed since", lambda: source[1])


def test_without_pictures_changed_captions_are_noticed(clip, folder, data):
    source = opened(data["train"], folder, clip, pictures=False)
    data["train"]._records[1]["image"] = data["train"][2]["image"]
    source[1]
    data["train"]._records[1]["caption"] = ["another", *data["train"][1]["caption"][1:]]
    refused("record record-1 changed since", lambda: source[1])
    data["train"]._records[3]["key"] = "record-4"
    refused("record record-4 changed since", lambda: source[3])


def test_a_prior_reads_no_pictures(clip, folder, data, monkeypatch):
    """Its batches are those that it has with the pictures; sizes of pictures are known from the embeddings."""
    config = config_of(clip, embeddings=str(folder))
    stage = make_stage(config, clip.stage, embedded=True)
    assert not stage.images
    own = Tokenizer(tokenizer_bytes())
    texts = {name: (own, context, ends) for name, (_, context, ends) in stage.texts.items()}

    def batch(pictures):
        to_example = ToExample(stage.images, texts, "center", None, vectors=stage.vectors)
        return next(batches(opened(data["train"], folder, clip, pictures=pictures), to_example, 2 * RECORDS, 0))

    def example(**limits):
        to_example = ToExample(stage.images, texts, "center", None, vectors=stage.vectors, **limits)
        return to_example(opened(data["train"], folder, clip, pictures=False)[1], np.random.default_rng(0))

    whole = batch(True)
    monkeypatch.setattr(Records, "__getitem__", lambda *_: pytest.fail("a picture is read"))
    words = lambda self, i: {name: self._records[i][name] for name in ("caption", "key")}  # noqa: E731
    monkeypatch.setattr(Records, "without_picture", words, raising=False)
    jax.tree.map(np.testing.assert_array_equal, batch(False), whole)
    example(min_side=19, max_aspect=24 / 19)
    with pytest.raises(UnreadableRecord, match="shorter side has 19 pixels"):
        example(min_side=20)
    with pytest.raises(UnreadableRecord, match="has 24 by 19 pixels"):
        example(max_aspect=1.2)


def quadrants(pictures):
    """Embeddings in place of CLIP's: mean red and green of the four quarters of pictures."""
    n, side = pictures.shape[:2]
    cut = np.asarray(pictures, np.float32).reshape(n, 2, side // 2, 2, side // 2, 3).mean(axis=(2, 4))
    return cut[..., :2].reshape(n, 8) / 255


@pytest.fixture
def crops(clip, tmp_path, data, monkeypatch):
    """Embeddings by `quadrants` of three random crops of pictures whose red and green tell a pixel's place."""
    rows, columns = np.mgrid[:200, :160].astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(np.stack([rows, columns, rows], axis=-1)).save(file, "PNG")
    for record in (*data["train"]._records, *data["test"]._records):
        record["image"] = file.getvalue()
    monkeypatch.setattr(embedding._Towers, "embed_images", lambda self, pictures: quadrants(pictures))
    embed(clip, tmp_path / "crops", crops=3, crop="dalle")
    return tmp_path / "crops"


@pytest.mark.parametrize("pictures", [True, False])
def test_a_random_crop_is_the_one_that_was_embedded(clip, crops, data, pictures):
    """Many epochs draw all crops of each record; with a picture, of the decoder's size, the same one is cut."""
    source = opened(data["train"], crops, clip, crop="dalle", pictures=pictures)
    to_example = ToExample({"image": 8} if pictures else {}, {}, "dalle", None, vectors=["image_embedding"])
    seen = {i: set() for i in range(RECORDS) if i != SILENT}
    for draw in range(30):
        for i in seen:
            example = to_example(source[i], np.random.default_rng((5, draw, i)))
            seen[i].add(tuple(example["image_embedding"].tolist()))
            if pictures:
                found = quadrants(example["image"][None])[0]
                np.testing.assert_allclose(found, example["image_embedding"], atol=1.01 / 255)  # rounded at two sizes
    assert seen == {i: set(map(tuple, source[i]["image_embeddings"].tolist())) for i in seen}
    assert len(set.union(*seen.values())) > 2 * len(seen), "others for each record"


def test_crops_are_those_of_training_without_embeddings(clip, crops, data):
    """In their distribution: a window of 8/9 to all of the shorter side, within an eighth of the slack."""
    source = opened(data["train"], crops, clip, crop="dalle")
    every = 255 * np.concatenate([source[i]["image_embeddings"] for i in range(RECORDS) if i != SILENT])
    top, left = every[:, 0], every[:, 1]  # middle of the first quarter
    side = 2 * (every[:, 4] - every[:, 0])
    assert (side > 160 * 8 / 9 - 3).all() and (side < 161).all() and np.ptp(side) > 8
    assert (top - side / 4 > 40 * 3 / 8 - 3).all() and (top + side * 3 / 4 < 40 * 5 / 8 + 163).all()
    assert (left - side / 4 > -2).all() and (left + side * 3 / 4 < 162).all()


def test_float16_is_near_and_half_as_large(clip, folder, tmp_path, data):
    embed(clip, tmp_path / "half", dtype="float16")
    exact, near = (opened(data["train"], place, clip) for place in (folder, tmp_path / "half"))
    for i in set(range(RECORDS)) - {SPOILED, SILENT}:
        for name in ("image_embeddings", "text_embeddings"):
            ours, theirs = near[i][name], exact[i][name]
            assert ours.dtype == np.float32
            np.testing.assert_allclose(ours, theirs, rtol=2**-11, atol=2**-25)
            assert (ours != theirs).any()
    sizes = [sum(array[name].nbytes for array in files(place).values() for name in ("image", "text"))
             for place in (folder, tmp_path / "half")]  # fmt: skip
    assert sizes[0] == 2 * sizes[1]
    refused("are not finite numbers in float16", write_one, tmp_path, 1e6, "float16")


def write_one(folder, value, dtype):
    """A shard of two records, the second of which has this number among its embeddings."""
    shards = embeddings.begin(folder / "one", Provenance(*"abcde"), Form(dtype), {"train": 2})
    image, rows = np.ones((2, 1, 8), np.float32), [Row(0, 1, 0, 0, 1, 1), Row(1, 1, 0, 0, 1, 1)]
    image[1, 0, 3] = value
    embeddings.write(shards[0], image, image[:, 0], rows)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_not_written(tmp_path, value):
    refused("record number 1 of split 'train' are not finite numbers in float32", write_one, tmp_path, value, "float32")
    assert not list((tmp_path / "one").glob("*.safetensors"))


def test_any_flipped_bit_is_noticed(clip, folder, data, tmp_path):
    """Wherever it is in a shard: what is loaded is what was stored, or one line names the file."""
    path = folder / "train-00000-of-00003.safetensors"
    whole, rng, noticed = path.read_bytes(), np.random.default_rng(0), 0
    good = [opened(data["train"], folder, clip)[i] for i in range(PER_SHARD)]
    header = 8 + int.from_bytes(whole[:8], "little")
    for bit in rng.permutation(8 * len(whole))[:300]:
        spoiled = bytearray(whole)
        spoiled[bit // 8] ^= 1 << bit % 8
        path.write_bytes(spoiled)
        try:
            source = opened(data["train"], folder, clip)
            jax.tree.map(np.testing.assert_array_equal, [source[i] for i in range(PER_SHARD)], good)
            assert bit // 8 < header, "only a label without meaning may change"
        except UserError as error:
            assert path.name in str(error) and "delete it and run" in str(error) and "\n" not in str(error)
            noticed += 1
    assert noticed > 250


def test_a_damaged_file_is_not_read_for_its_components(clip, folder):
    path = folder / "train-00001-of-00003.safetensors"
    content = bytearray(path.read_bytes())
    content[-200] ^= 1
    path.write_bytes(content)
    refused("train-00001-of-00003.safetensors is damaged", list, embeddings.image_embeddings(folder, clip.identity))


@pytest.fixture
def first_format(clip, folder):
    """The embeddings as versions before 0.2 wrote them."""
    said = json.loads((folder / "embeddings.json").read_text())
    for name in ("crop", "dtype", "crops", "seed", "side"):
        del said[name]
    (folder / "embeddings.json").write_text(json.dumps(said | {"format": 1}))
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            labels = json.loads(file.metadata()["shard"])
        array = load_file(path)
        array["image"], array["records"] = array["image"][:, 0], np.ascontiguousarray(array["records"][:, [0, 1, 3]])
        kept = ("clip", "source", "image_feature", "caption_feature", "split", "start", "stop", "unreadable")
        save_file(array, path, {name: str(labels[name]) for name in kept})
    return folder


def test_the_first_format_is_still_read(clip, first_format, data, tmp_path):
    """With the pictures, whose checksum alone it has."""
    embed(clip, tmp_path / "new")
    ours, theirs = (opened(data["train"], place, clip) for place in (first_format, tmp_path / "new"))
    for i in set(range(RECORDS)) - {SPOILED, SILENT}:
        jax.tree.map(np.testing.assert_array_equal, ours[i], theirs[i])
    found = [np.concatenate(list(embeddings.image_embeddings(place, clip.identity)))
             for place in (first_format, tmp_path / "new")]  # fmt: skip
    np.testing.assert_array_equal(*found)
    refused("embeddings of format 1, not 2: give a new folder", embed, clip, first_format)
    plain = opened(data["train"], first_format, clip, pictures=False)
    data["train"]._records[2]["image"] = data["train"][3]["image"]
    refused("record record-2 changed since", lambda: plain[2])

    path = first_format / "train-00000-of-00003.safetensors"
    with safe_open(path, "numpy") as file:
        labels = file.metadata()
    array = load_file(path)
    array["text"][2] = np.nan
    save_file(array, path, labels)
    source = opened(data["train"], first_format, clip)
    refused("damaged .record number 1 has embeddings that are not finite", lambda: source[1])


def test_it_can_be_pickled(clip, folder, data):
    source = opened(data["train"], folder, clip)
    copy = pickle.loads(pickle.dumps(source))
    jax.tree.map(np.testing.assert_array_equal, copy[7], source[7])


def test_damaged_and_foreign_files_are_refused(clip, folder, data):
    path, other = (folder / f"train-0000{k}-of-00003.safetensors" for k in (0, 1))
    path.write_bytes(path.read_bytes()[:-5])
    refused("train-00000-of-00003.safetensors is damaged", opened, data["train"], folder, clip)
    path.write_bytes(other.read_bytes())
    refused("train-00000-of-00003.safetensors belongs to other embeddings", opened, data["train"], folder, clip)
    (folder / "embeddings.json").write_text("{}")
    refused(r"embeddings.json cannot be read \(KeyError", opened, data["train"], folder, clip)


def test_a_folder_begun_for_other_data_is_not_gone_on_with(clip, folder, monkeypatch, data):
    monkeypatch.setattr(embedding, "open_sources", lambda *_: [data["test"]] * 2)
    refused("was begun for records 11 of train, 3 of test, now there are 3 of train", embed, clip, folder)


def test_mistakes_are_refused_before_clip_is_loaded(clip, tmp_path):
    nobody = SimpleNamespace(folder="", identity="")

    def act(config, dtype="float16", crops=1):
        embedding.embed_dataset(config, tmp_path, 0, 1, dtype, crops)

    refused("data.crop is 'dalle'.* such as --crops=4", act, config_of(clip, crop="dalle"))
    refused("--crops is 2, but data.crop is 'center'", act, config_of(clip), "float16", 2)
    refused("--dtype is 'bfloat16': expected float16 or float32", act, config_of(clip), "bfloat16")
    refused("clip.bundle is empty", act, config_of(nobody))
    refused("data.source is empty", act, config_of(clip, source=""))
    refused("clip is not trained on CLIP's embeddings", act, small_config("clip"))
    refused("expected python -m unclip_jax.data embed", command.main, ["data"])
    refused("--out is None", command.main, ["data", "embed", "--config=configs/prior_ar.py:tiny"])
    assert not list(tmp_path.iterdir())


def test_command_embeds(clip, tmp_path, folder):
    """By `--out DIR` with a space; equal to the folder above."""
    flags = [f"--config.clip.bundle={clip.folder}", "--config.data.source=some:data", "--config.data.threads=1"]
    out = tmp_path / "out"
    assert command.main(["data", "embed", "--config=configs/prior_diffusion.py:tiny", *flags, "--out", str(out)]) == 0
    stored = files(out)
    assert stored.keys() == files(folder).keys()
    assert {array["image"].dtype for array in stored.values()} == {np.dtype("float16")}
