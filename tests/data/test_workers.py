"""Worker processes change no batch, know no JAX, end with what started them, and are replaced when they are killed.

What stands at the top of this file is pickled and imported by the workers.
"""

import gc
import itertools
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from unclip_jax.data import embeddings, pipeline
from unclip_jax.data.pipeline import batches
from unclip_jax.data.sources import open_source
from unclip_jax.data.tokenizer import train_tokenizer
from unclip_jax.data.transforms import ToExample
from unclip_jax.data.workers import in_order
from unclip_jax.errors import UnreadableRecord, UserError

RECORDS, ROWS = 300, 8
TORN = {3, 4, 49}


class Numbers:
    """Records 0 … RECORDS - 1."""

    def __len__(self):
        return RECORDS

    def __getitem__(self, index):
        return {"image": index, "caption": "", "key": f"number-{index}"}


def transform(record, rng):
    if record["image"] in TORN:
        raise UnreadableRecord("torn")
    return {"index": np.int32(record["image"]), "noise": rng.random((40, 30)), "process": np.int32(os.getpid())}


def fatal(record, rng):
    """Ends the worker at record 7, and only the worker."""
    if record["image"] == 7:
        os._exit(3)
    return transform(record, rng)


def mistaken(record, rng):
    if record["image"] == 7:
        raise KeyError("a mistake in the code")
    return transform(record, rng)


def refusing(record, rng):
    if record["image"] == 7:
        raise UserError("one line")
    return transform(record, rng)


class JaxSpy(ToExample):
    """Also tells whether JAX was imported where it runs."""

    def __call__(self, record, rng):
        return super().__call__(record, rng) | {"jax": np.array("jax" in sys.modules)}


def squared(number):
    return number**2


def process_of(number):
    return os.getpid()


def never(number):
    raise AssertionError("unpickled in vain")


def take(n, start=0, transform=transform, **options):
    it = batches(Numbers(), transform, ROWS, 0, start, **options)
    try:
        return list(itertools.islice(it, n))
    finally:
        it.close()


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"process"}:
            np.testing.assert_array_equal(a[name], b[name])
            assert a[name].dtype == b[name].dtype


def gone(process, seconds=10):
    """Whether a process is no more, or is no more within some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


@pytest.fixture(scope="module")
def whole():
    """40 batches made by this process: more than an epoch."""
    return take(40, threads=2)


@pytest.mark.parametrize(("workers", "threads"), [(1, 1), (2, 5), (4, 2)])
def test_batches_are_equal(whole, workers, threads):
    found = take(40, workers=workers, threads=threads)
    assert_same(found, whole)
    processes = set(np.concatenate([batch["process"] for batch in found]))
    assert len(processes) == workers and os.getpid() not in processes


def test_batches_are_equal_after_a_resume_with_another_number(whole):
    assert_same(take(13, workers=2) + take(12, 13) + take(15, 25, workers=3, threads=6), whole)
    own = [5, 0, 7]
    for batch, part in zip(whole[11:], take(29, 11, rows=own, workers=2), strict=True):
        np.testing.assert_array_equal(part["noise"], batch["noise"][own])


def test_skipped_records_are_named_once_and_counted(whole, caplog):
    with caplog.at_level(logging.WARNING):
        found = take(40, workers=3)
    assert sum(batch["records_skipped"].sum() for batch in found) >= len(TORN)
    assert caplog.text.count("skipped unreadable record") == len(TORN)
    assert all(f"skipped unreadable record number-{k}: torn" in caplog.text for k in TORN)


def test_workers_import_no_jax(tmp_path):
    """With pictures of each way that they are decoded and made small, captions, and emoji scenes of TFDS."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k in range(12):
        picture = Image.fromarray(np.full((60, 70, 3), 20 * k, np.uint8))
        picture.save(folder / f"{k}.{('jpg', 'png')[k % 2]}")
        (folder / f"{k}.txt").write_text("a shade of grey")
    tokenizer = train_tokenizer(["a shade of grey"] * 9, 300)
    images, kernels = {"image": 64, "clip_image": 16}, {"clip_image": "bicubic"}
    to_example = JaxSpy(images, {"t": (tokenizer, 9, True)}, "dalle", 32, 4, (), kernels)
    sources = [open_source(f"folder:{folder}", "train", "", "", "")]
    sources.append(open_source("tfds:emoji_scenes/single_64", "train", str(tmp_path), "image", "caption"))
    for source in sources:
        it = batches(source, to_example, 4, 0, workers=1)
        assert not next(it)["jax"].any()
        it.close()


def test_embeddings_are_read_by_workers(tmp_path):
    """Their files are mapped into memory, and cannot be sent: each worker opens them."""
    records = [{"image": b"picture", "caption": f"caption {k}", "key": str(k)} for k in range(6)]
    provenance = embeddings.Provenance("clip", "some:data", "image", "caption", "center")
    (shard,) = embeddings.begin(tmp_path, provenance, embeddings.Form("float32"), {"train": 6})
    image = np.arange(24, dtype=np.float32).reshape(6, 1, 4)
    checksums = [(embeddings.checksum_of_words(record), embeddings.checksum(record)) for record in records]
    rows = [embeddings.Row(k, 1, *both, 8, 8) for k, both in enumerate(checksums)]
    embeddings.write(shard, image, image[:, 0] + 100, rows)
    source = embeddings.EmbeddedSource(records, tmp_path, provenance, "train")
    to_example = JaxSpy({}, {}, "center", None, vectors=("image_embedding", "text_embedding"))
    alone, theirs = (batches(source, to_example, 6, 0, workers=workers) for workers in (0, 1))
    batch = next(theirs)
    assert not batch.pop("jax").any() and sorted(batch["image_embedding"][:, 0]) == [0, 4, 8, 12, 16, 20]
    assert_same([batch], [{name: array for name, array in next(alone).items() if name != "jax"}])
    theirs.close()


def test_a_killed_worker_is_replaced(whole, caplog):
    """Whatever it was at: seven kills, and no row is lost, or there twice."""
    it, found, rng = batches(Numbers(), transform, ROWS, 0, workers=2, threads=4), [], np.random.default_rng(0)
    with caplog.at_level(logging.WARNING):
        for k, batch in enumerate(itertools.islice(it, 40)):
            found.append(batch)
            if k % 5 == 4 and k < 35:
                time.sleep(rng.uniform(0, 0.02))
                os.kill(int(rng.choice(np.unique(batch["process"]))), signal.SIGKILL)
    it.close()
    assert_same(found, whole)
    assert 3 <= caplog.text.count("was ended by signal 9 (Killed): another takes its place") <= 7


def test_a_record_that_ends_workers_ends_the_run_with_one_line():
    with pytest.raises(UserError, match=r"^data worker \d of 2 ended with status 3, 3 times before it made any[^\n]*$"):
        take(80, transform=fatal, workers=2)


def test_mistakes_in_workers_are_told():
    with pytest.raises(KeyError, match="a mistake in the code") as caught:
        take(80, transform=mistaken, workers=2)
    assert "in mistaken" in caught.value.__notes__[0] and "data worker" in caught.value.__notes__[0]
    with pytest.raises(UserError, match=r"^one line$"):
        take(80, transform=refusing, workers=2)


def test_what_cannot_be_unpickled_is_told(monkeypatch):
    """As a class that is defined in a notebook: it is not there when the worker looks for it."""
    monkeypatch.setattr(never, "__module__", "no_such_module")
    module = type(sys)("no_such_module")
    module.never = never
    monkeypatch.setitem(sys.modules, "no_such_module", module)
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        next(in_order(never, range(3), 2, 1, 1))


@pytest.mark.parametrize("end", ["close", "forget", "raise"])
def test_workers_end_with_their_iterator(end):
    it = batches(Numbers(), transform, ROWS, 0, workers=2)
    processes = set(np.concatenate([next(it)["process"] for _ in range(4)]))
    assert len(processes) == 2
    if end == "close":
        it.close()
    elif end == "raise":
        with pytest.raises(RuntimeError, match="out of the loop"):
            it.throw(RuntimeError("out of the loop"))
    del it
    gc.collect()
    assert all(gone(process, 1) for process in processes)


def test_workers_with_nothing_to_do_end_too():
    it = in_order(process_of, itertools.repeat(0), 8, 2, 2)
    processes = {next(it) for _ in range(4)}
    time.sleep(0.5)  # all is answered
    began = time.monotonic()
    it.close()
    assert time.monotonic() - began < 5 and len(processes) == 2 and all(gone(process, 1) for process in processes)


def test_signals_for_the_trainer_do_not_reach_workers(whole, monkeypatch):
    """Not even before a worker has begun to work."""
    it, found, start = batches(Numbers(), transform, ROWS, 0, workers=2), [], subprocess.Popen

    def told(*args, **options):
        process = start(*args, **options)
        process.terminate()
        process.send_signal(signal.SIGINT)
        return process

    monkeypatch.setattr(subprocess, "Popen", told)
    for batch in itertools.islice(it, 40):
        found.append(batch)
        for process in np.unique(batch["process"]) if len(found) < 9 else ():
            assert os.getpgid(process) != os.getpgid(0), "Ctrl-C goes to the trainer's group"
            os.kill(process, signal.SIGTERM)
            os.kill(process, signal.SIGINT)
    it.close()
    assert_same(found, whole)
    assert len(set(np.concatenate([batch["process"] for batch in found]))) == 2
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set(), "the trainer itself still hears them"


@pytest.mark.parametrize("workers", [0, 2])
def test_answers_are_in_order_and_few_wait(workers):
    asked = []

    def requests():
        for k in range(50):
            asked.append(k)
            yield k

    for k, answer in enumerate(in_order(squared, requests(), 5, 2, workers)):
        assert answer == k**2 and len(asked) <= k + 1 + 5
    assert k == 49 and list(in_order(squared, range(3), 5, 2, workers)) == [0, 1, 4]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_what_waits_is_bounded_in_bytes(workers, monkeypatch):
    """Examples of 9,608 bytes, of which 50 may wait, of batches of 400: without the bound, 3,200 would."""
    bytes_each = 40 * 30 * 8 + 4 + 4
    monkeypatch.setattr(pipeline, "BYTES_AHEAD", 50 * bytes_each)
    monkeypatch.setattr(pipeline, "PART_BYTES", 10 * bytes_each)
    asked, through = [], pipeline.in_order

    def counted(make, requests, ahead, threads, workers):
        def noted():
            for request in requests:
                asked.extend(request)
                yield request

        return through(make, noted(), ahead, threads, workers)

    monkeypatch.setattr(pipeline, "in_order", counted)
    it = batches(Numbers(), transform, 400, 0, threads=2, workers=workers)
    for k in range(3):
        batch = next(it)
        assert batch["index"].shape == (400,)
        assert 0 < len(asked) - 400 * (k + 1) <= 50 + 10, "and one part, which the batch did not need"
    it.close()


def test_a_batch_is_made_by_all_threads_together(monkeypatch):
    """The first batch would wait for ever if one thread made it."""
    barrier = threading.Barrier(4, timeout=20)
    monkeypatch.setattr(pipeline, "BYTES_AHEAD", 1)
    checked = []

    def waiting(record, rng):
        if checked:  # else it is the check before anything starts
            barrier.wait()
        checked.append(1)
        return {"thread": np.int64(threading.get_ident())}

    it = batches(Numbers(), waiting, 4, 0, threads=4)
    assert len(set(next(it)["thread"])) == 4
    barrier.abort()
    it.close()
