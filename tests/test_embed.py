"""Embeddings made once: the loss they give is that of CLIP in the step, and what is not theirs is refused."""

import io
import itertools
import json
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from shrink import CAPTIONS, compilation_cache, random_params, small_config, small_stage, tokenizer_bytes

from unclip_jax import embed as embedding
from unclip_jax import inputs
from unclip_jax.bundle import save_bundle
from unclip_jax.data import __main__ as command
from unclip_jax.data import embeddings
from unclip_jax.data.embeddings import EmbeddedSource, Provenance
from unclip_jax.data.pipeline import batches, evaluation_batch
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.data.transforms import ToExample
from unclip_jax.errors import UserError
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


def embed(clip, folder, process=0, processes=1):
    embedding.embed_dataset(config_of(clip), folder, process, processes)


@pytest.fixture
def folder(clip, tmp_path):
    embed(clip, tmp_path / "embeddings")
    return tmp_path / "embeddings"


def opened(source, folder, clip, split="train"):
    provenance = Provenance(clip.identity, "some:data", "image", "caption")
    return EmbeddedSource(source, folder, provenance, split)


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
        rows = batches(inputs._open_sources(config, clip.identity)[0], to_example, 2 * RECORDS, 0)
        batch = next(rows)
        skipped = batch.pop("records_skipped").sum()
        held_out = evaluation_batch(inputs._open_sources(config, clip.identity)[1], to_example, HELD_OUT, 0)
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
        record, plain = source[i], data["train"][i]
        if i in (SPOILED, SILENT):
            assert record == plain
            continue
        captions = [plain["caption"]] if isinstance(plain["caption"], str) else plain["caption"]
        expected = read(clip.params, *tokenizer.encode((3 * captions)[:3], context, True))[: len(captions)]
        np.testing.assert_allclose(record["text_embeddings"], expected, atol=1e-5)
        assert all(np.abs(a - b).max() > 1e-3 for a, b in itertools.combinations(expected, 2))
        assert record["image_embedding"].shape == (8,) and record["image_embedding"].dtype == np.float32


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
    labels = embeddings._opened(shard, shard.path).metadata()
    assert labels == {
        "clip": clip.identity,
        "source": "some:data",
        "image_feature": "image",
        "caption_feature": "caption",
        "split": "train",
        "start": "4",
        "stop": "8",
        "unreadable": "2",
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
    said = capsys.readouterr().err
    assert "8 of 14 records were done before" in said and "14 records are in" in said and "2 could not be read" in said

    monkeypatch.setattr(embedding._Towers, "_call", None)
    embed(clip, stopped)  # nothing is left to do


def test_processes_share_the_files(clip, folder, tmp_path, data):
    shared = tmp_path / "shared"
    embed(clip, shared, process=1, processes=3)
    assert files(shared).keys() == {"train-00001-of-00003.safetensors"}
    with pytest.raises(UserError, match="lacks 2 of 3 files of split 'train': run python"):
        opened(data["train"], shared, clip)
    embed(clip, shared, process=0, processes=3)
    embed(clip, shared, process=2, processes=3)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), files(shared), files(folder))


def test_in_a_bucket_they_are_the_same(clip, folder, bucket, tmp_path, data, monkeypatch, capsys):
    """CLIP from a bucket, embeddings into one; stopped, gone on with, and read from copies on a disk."""
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "cache"))
    copy_folder(clip.folder, to_path(bucket) / "clip", "config.json")
    there, write = to_path(bucket) / "embeddings", embeddings.write
    flags = [f"--config.clip.bundle={bucket}/clip", "--config.data.source=some:data", "--config.data.threads=2"]
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
    for i in range(RECORDS):
        ours, theirs = local[i], remote[i]
        assert ours.keys() == theirs.keys()
        for name in ours.keys() & {"image_embedding", "text_embeddings"}:
            np.testing.assert_allclose(theirs[name], ours[name], atol=1e-6)
    assert len(list((tmp_path / "cache").iterdir())) == 3
    (there / "train-00001-of-00003.safetensors").write_bytes((folder / "train-00000-of-00003.safetensors").read_bytes())
    refused("train-00001-of-00003.safetensors belongs to other embeddings", opened, data["train"], there, clip)


def refused(says, act, *arguments):
    with pytest.raises(UserError, match=says) as caught:
        act(*arguments)
    assert "\n" not in str(caught.value)


def test_embeddings_of_something_else_are_refused(clip, folder, data):
    def open_as(clip=clip.identity, source="some:data", split="train", records=data["train"]):
        return EmbeddedSource(records, folder, Provenance(clip, source, "image", "caption"), split)

    open_as()
    refused(f"embeddings of clip {clip.identity}, not abc", lambda: open_as(clip="abc"))
    refused("embeddings of source some:data, not folder:/x", lambda: open_as(source="folder:/x"))
    refused("no split 'validation': it has train, test", lambda: open_as(split="validation"))
    refused("of 11 records of split 'train', now there are 3", lambda: open_as(records=data["test"]))
    with pytest.raises(UserError, match="no embeddings at"):
        EmbeddedSource(data["train"], folder / "nowhere", Provenance("", "", "", ""), "train")


def test_a_record_that_changed_is_noticed(clip, folder, data):
    source = opened(data["train"], folder, clip)
    data["train"]._records[2], data["train"]._records[3] = data["train"][3], data["train"][2]
    refused("record record-3 changed since", lambda: source[2])
    source[1]
    data["train"]._records[1]["caption"] = ["another", *data["train"][1]["caption"][1:]]
    refused("record record-1 changed since", lambda: source[1])


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
    refused("data.crop is 'dalle'", embedding.embed_dataset, config_of(clip, crop="dalle"), tmp_path, 0, 1)
    refused("clip.bundle is empty", embedding.embed_dataset, config_of(nobody), tmp_path, 0, 1)
    refused("data.source is empty", embedding.embed_dataset, config_of(clip, source=""), tmp_path, 0, 1)
    refused("clip is not trained on CLIP's embeddings", embedding.embed_dataset, small_config("clip"), tmp_path, 0, 1)
    refused("expected python -m unclip_jax.data embed", command.main, ["data"])
    refused("--out is None", command.main, ["data", "embed", "--config=configs/prior_ar.py:tiny"])
    assert not list(tmp_path.iterdir())


def test_command_embeds(clip, tmp_path, folder):
    """By `--out DIR` with a space; equal to the folder above."""
    flags = [f"--config.clip.bundle={clip.folder}", "--config.data.source=some:data", "--config.data.threads=1"]
    out = tmp_path / "out"
    assert command.main(["data", "embed", "--config=configs/prior_diffusion.py:tiny", *flags, "--out", str(out)]) == 0
    assert files(out).keys() == files(folder).keys()
