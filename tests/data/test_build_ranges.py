"""A worker's share of a build, without Beam: ranges, splits, what cannot be read, and what is there already."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

from unclip_jax.data import build_ranges
from unclip_jax.data.build import _merged
from unclip_jax.data.build_ranges import Job, examine, place_of, write
from unclip_jax.data.cleaning import Limits
from unclip_jax.data.emoji_scenes import encode_png
from unclip_jax.errors import UnreadableRecord

PNG = encode_png(np.zeros((4, 4, 3), np.uint8))


class Source(list):
    """Records, of which None cannot be read."""

    def __getitem__(self, index):
        if super().__getitem__(index) is None:
            raise UnreadableRecord("it is gone")
        return super().__getitem__(index)


@pytest.fixture
def source(monkeypatch):
    """A source of 300 records, of which 150 cannot be read."""
    records = Source({"image": PNG, "caption": f"caption {k}", "key": f"{k}.png"} for k in range(300))
    records[50:200] = [None] * 150
    monkeypatch.setattr(build_ranges, "open_source", lambda *_: records)
    build_ranges._opened.cache_clear()
    yield records
    build_ranges._opened.cache_clear()


def job(tmp_path, records=300):
    (tmp_path / "mine/1.0.0").mkdir(parents=True)
    folder = str(tmp_path / "mine/1.0.0")
    return Job((("it", "train", records),), "", "", "", folder, Limits(), None, False, None, 0, 0.1)


@pytest.mark.parametrize(
    ("records", "size", "ranges"),
    [(1, 64, 1), (64, 64, 1), (65, 64, 2), (20_000, 200, 100), (20_001, 201, 100), (600_000_000, 8192, 73_243)],
)
def test_ranges_hold_every_record_once(tmp_path, records, size, ranges):
    plan = job(tmp_path, records)
    assert (plan.range_size, plan.ranges) == (size, ranges)
    rows = [plan.rows(number) for number in range(plan.ranges)]
    assert rows[0].start == 0 and rows[-1].stop == records and len(rows[-1])
    assert all(one.stop == other.start for one, other in itertools.pairwise(rows))


def test_first_hundred_that_cannot_be_read_are_named(tmp_path, source):
    plan = job(tmp_path)
    found = _merged([_merged([write(number, plan) for number in (4, 0, 2)]), write(3, plan), write(1, plan)])
    assert found["dropped"] == {"unreadable": 150}
    assert found["unreadable"] == [(k, f"record {k}", "it is gone") for k in range(50, 150)]
    kept = [k for k in range(300) if not 50 <= k < 200]
    held_out = [k for k in kept if place_of(f"{k}.png") < 0.1]
    assert sum(found["shards"]["test"].values()) == len(held_out) > 5
    assert sum(found["shards"]["train"].values()) == len(kept) - len(held_out)


def test_keys_draw_evenly_and_without_their_ending():
    places = np.array([place_of(f"{k}.png") for k in range(4000)])
    assert np.abs(np.histogram(places, 10, (0, 1))[0] - 400).max() < 4 * np.sqrt(400)
    assert place_of("a/b.c.png") == place_of("a/b.c.jpg") != place_of("a/b.png") and place_of("a\udcff.png") >= 0


def test_what_is_there_is_not_done_again(tmp_path, source, monkeypatch):
    plan = replace(job(tmp_path), exact=True)
    assert examine(0, plan) == 0
    before = plan.part("examined", 0).read_text()
    row, chosen, *hashes = json.loads(before)["kept"][49]
    assert (row, chosen) == (49, [0]) and list(map(len, hashes)) == [32, 16]
    summary = write(0, plan, {3: "exact-duplicates"})
    assert summary["dropped"] == {"unreadable": 14, "exact-duplicates": 1}
    monkeypatch.setattr(build_ranges, "_read", None)
    assert examine(0, plan) == 0 and plan.part("examined", 0).read_text() == before
    assert write(0, plan, {}) == summary


def test_a_record_that_is_lost_before_it_is_written_is_counted(tmp_path, source):
    plan = replace(job(tmp_path), exact=True)
    examine(0, plan)
    source[7] = None
    summary = write(0, plan, {})
    assert summary["dropped"] == {"unreadable": 15}
    assert [7, "record 7", "it is gone"] in map(list, summary["unreadable"])
    assert sum(summary["shards"][split]["0"] for split in summary["shards"]) == 49


def test_captions_may_be_missing_and_names_need_not_be_text(tmp_path, source):
    source[3] = {"image": PNG, "caption": [], "key": "3.png"}
    source[4] = {"image": PNG, "caption": "x", "key": "caf\udce9.png"}
    summary = write(0, job(tmp_path), None)
    assert (3, "3.png", "it has no caption") in summary["unreadable"] and summary["dropped"] == {"unreadable": 15}
