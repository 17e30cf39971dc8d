"""Batch k is a function of (seed, k): whatever the processes, the threads, and the step that a run starts from."""

import itertools
import logging

import numpy as np
import pytest

from unclip_jax.data.emoji_scenes import encode_png
from unclip_jax.data.pipeline import batches, captions, evaluation_batch
from unclip_jax.data.sources import open_source
from unclip_jax.data.transforms import ToExample
from unclip_jax.errors import UnreadableRecord, UserError

N = 50


class Numbers:
    """Records 0..n-1; those in `broken` cannot be transformed, those in `lost` not even be read."""

    def __init__(self, n=N, broken=(), lost=()):
        self.n, self.broken, self.lost = n, set(broken), set(lost)

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        if index in self.lost:
            raise UnreadableRecord(f"{index} is gone")
        return {"image": index, "caption": "", "key": f"number-{index}", "broken": index in self.broken}


def transform(record, rng):
    if record["broken"]:
        raise UnreadableRecord("torn")
    return {"index": np.int32(record["image"]), "noise": rng.random(3)}


def take(n, source=None, batch_size=8, seed=0, **options):
    it = batches(source or Numbers(), transform, batch_size, seed, **options)
    return [next(it) for _ in range(n)]


def assert_same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_batches_are_stacked():
    batch = take(1)[0]
    assert batch["index"].shape == (8,) and batch["index"].dtype == np.int32 and batch["noise"].shape == (8, 3)


def test_each_example_once_an_epoch_and_shuffled_anew():
    seen = np.concatenate([batch["index"] for batch in take(25)])  # 4 epochs of 50
    epochs = seen.reshape(4, N)
    for epoch in epochs:
        assert sorted(epoch) == list(range(N))
        assert np.mean(epoch == np.arange(N)) < 0.2
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("process_count", [2, 4])
def test_global_batch_is_the_same_for_any_number_of_processes(process_count):
    alone = take(9)
    rows = np.random.default_rng(0).permutation(8).reshape(process_count, -1)
    shares = [take(9, rows=own) for own in rows]
    steps = zip(*shares, strict=True)
    together = [{name: np.concatenate([share[name] for share in step]) for name in step[0]} for step in steps]
    expected = [{name: array[rows.ravel()] for name, array in batch.items()} for batch in alone]
    assert_same(together, expected)


def test_start_step_continues_the_run():
    whole = take(12)
    assert_same(take(5, start_step=7), whole[7:])
    second = {"rows": [2, 3, 6, 7]}
    assert_same(take(2, start_step=10, **second), take(12, **second)[10:])


def test_threads_change_nothing():
    assert_same(take(20, threads=8), take(20, threads=1))


def both(batch):
    return batch["index"], batch["records_skipped"]


def test_seed_changes_order_and_randomness():
    one, other = take(2), take(2, seed=1)
    assert not np.array_equal(one[0]["index"], other[0]["index"])
    assert not np.array_equal(one[0]["noise"], other[0]["noise"])
    assert_same(one, take(2))


def test_randomness_is_new_for_each_example_and_epoch():
    noise = np.concatenate([batch["noise"] for batch in take(25)])
    assert len(np.unique(noise)) == noise.size


def test_fewer_records_than_rows():
    rows = take(3, Numbers(3))[0]["index"]
    assert rows.shape == (8,) and set(rows) == {0, 1, 2}


def test_unreadable_records_are_replaced_by_others_and_named(caplog):
    broken, lost = {3, 4, 49}, {20}
    whole = np.concatenate([batch["index"] for batch in take(25)])
    with caplog.at_level(logging.WARNING):
        it = batches(Numbers(broken=broken, lost=lost), transform, 8, 0, threads=2)
        spoiled, skipped = (np.concatenate(rows) for rows in zip(*map(both, itertools.islice(it, 25)), strict=True))
    bad = np.isin(whole, [3, 4, 49, 20])
    np.testing.assert_array_equal(spoiled[~bad], whole[~bad])
    assert (skipped[~bad] == 0).all() and (skipped[bad] > 0).all() and bad.sum() == 4 * 4
    assert not np.isin(spoiled, [3, 4, 49, 20]).any()
    assert len(set(spoiled[bad])) > 8, "not a neighbour, which may be damaged too"
    assert caplog.text.count("number-3") == 1
    assert "number-3" in caplog.text and "torn" in caplog.text and "20 is gone" in caplog.text


def test_a_thousand_bad_records_in_a_row_do_not_end_a_run():
    source = Numbers(4000, broken=range(1500), lost=range(1500, 3000))
    assert set(take(1, source, batch_size=64)[0]["index"]) <= set(range(3000, 4000))


def test_the_first_hundred_are_named(caplog):
    take(50, Numbers(400, broken=range(200)), batch_size=8)
    assert caplog.text.count("skipped unreadable record") == 100


def test_nothing_readable():
    with pytest.raises(UserError, match=r"none of 1000 records .* The last: number-[0-4]: torn"):
        batches(Numbers(5, broken=range(5)), transform, 8, 0)
    with pytest.raises(UserError, match=r"none of 1000 records .* The last: number [0-4]: [0-4] is gone"):
        evaluation_batch(Numbers(5, lost=range(5)), transform, 4, 0)


def test_captions_of_readable_records_in_order(caplog):
    class Said(Numbers):
        def __getitem__(self, index):
            return super().__getitem__(index) | {"caption": f"number {index}"}

    said = list(captions(Said(8, lost=[2, 5]), 8, threads=3))
    assert said == [f"number {k}" for k in (0, 1, 3, 4, 6, 7)]
    assert "skipped unreadable record number 5: 5 is gone" in caplog.text
    assert list(captions(Said(8), 3, threads=3)) == ["number 0", "number 2", "number 5"]


def test_mistakes_of_a_transform_are_not_taken_for_bad_records():
    def wrong(record, rng):
        raise ValueError("a mistake in the code")

    with pytest.raises(ValueError, match="a mistake"):
        next(batches(Numbers(), wrong, 8, 0))


@pytest.mark.parametrize(("broken", "said"), [(12, 1), (2, 0)])
def test_more_than_a_tenth_that_cannot_be_read_is_said_once(caplog, broken, said):
    take(40, Numbers(50, broken=range(broken)), batch_size=8)
    list(captions(Numbers(200, lost=range(4 * broken)), 200, threads=2))
    text = "records cannot be read, more than a tenth: see above why"
    assert caplog.text.count(text) == 2 * said


def test_evaluation_batch(caplog):
    batch = evaluation_batch(Numbers(), transform, 5, 0)
    assert_same([batch], [evaluation_batch(Numbers(), transform, 5, 0)])
    chosen = list(batch["index"])
    assert chosen == sorted(set(chosen)) and len(chosen) == 5 and max(chosen) >= 5, "not the first five"
    assert list(evaluation_batch(Numbers(), transform, 5, 1)["index"]) != chosen
    np.testing.assert_array_equal(evaluation_batch(Numbers(3), transform, 5, 0)["index"], range(3))
    spoiled = evaluation_batch(Numbers(4, broken=[1]), transform, 4, 0)["index"]
    np.testing.assert_array_equal(spoiled[[0, 2, 3]], [0, 2, 3])
    assert spoiled[1] in (0, 2, 3) and "skipped unreadable record number-1: torn" in caplog.text


def test_damaged_files_in_a_folder(tmp_path, caplog):
    """Of twelve pictures one is cut off, one is empty and one is text; the others are seen (less the one held out)."""
    for k in range(12):
        data = encode_png(np.full((16, 16, 3), 20 * k, np.uint8))
        data = {3: data[: len(data) // 2], 5: b"", 7: b"<html>not found</html>"}.get(k, data)
        (tmp_path / f"{k}.png").write_bytes(data)
        (tmp_path / f"{k}.txt").write_text(f"shade {k}")
    source = open_source(f"folder:{tmp_path}", "train", "", "", "")
    to_example = ToExample({"image": 8}, {}, "center", None)
    with caplog.at_level(logging.WARNING):
        it = batches(source, to_example, 4, 0)
        found = list(itertools.islice(it, 12))
        seen = np.concatenate([batch["image"][:, 0, 0, 0] for batch in found])
    assert set(seen) <= {20 * k for k in range(12) if k not in (3, 5, 7)} and len(set(seen)) >= 8
    assert sum(batch["records_skipped"].sum() for batch in found) > 0
    assert all(f"{k}.png" in caplog.text for k in (3, 5, 7))
