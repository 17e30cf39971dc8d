"""Mixtures: exact proportions, each source shuffled anew in epochs of its own, and the same wherever a run goes on."""

import pickle
from collections import Counter

import numpy as np
import pytest
from records import both, captions, save_shards
from records import sample as sample_files

from unclip_jax.data import tars
from unclip_jax.data.mixture import Mixture, order, sample
from unclip_jax.data.pipeline import batches, evaluation_batch
from unclip_jax.data.splits import without_picture
from unclip_jax.errors import UserError


class Numbers:
    """A source whose records hold numbers from `start` on."""

    def __init__(self, start, count):
        self.start, self.count = start, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"image": b"", "caption": "", "key": str(self.start + index), "number": self.start + index}


def to_number(record, rng):
    return {"number": np.int64(record["number"])}


@pytest.mark.parametrize(("weights", "period"), [((1, 1), 2), ((3, 1), 4), ((0.5, 0.25, 0.25), 4), ((1, 9), 10)])
def test_every_stretch_has_the_proportions(weights, period):
    mixture = Mixture([Numbers(100 * k, 7 + k) for k in range(len(weights))], weights)
    assert len(mixture) == sum(7 + k for k in range(len(weights)))
    found = order(mixture, 0)
    for start in (0, period, 35 * period, 10**9 * period):
        parts = Counter(mixture[found[start + k]]["number"] // 100 for k in range(period))
        assert [parts[k] / period for k in range(len(weights))] == [w / sum(weights) for w in weights]


def test_each_source_has_epochs_of_its_own():
    mixture = Mixture([Numbers(0, 5), Numbers(100, 50)], (1, 1))
    found = [mixture[order(mixture, 3)[k]]["number"] for k in range(200)]
    small, large = ([n for n in found if (n >= 100) == is_large] for is_large in (False, True))
    for numbers, size, start in ((small, 5, 0), (large, 50, 100)):
        epochs = [numbers[k : k + size] for k in range(0, 100, size)]
        assert len(numbers) == 100 and all(sorted(epoch) == list(range(start, start + size)) for epoch in epochs)
        assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])


def test_without_weights_all_records_are_seen_equally_often():
    mixture = Mixture([Numbers(0, 30), Numbers(100, 10)], ())
    seen = Counter(mixture[order(mixture, 0)[k]]["number"] for k in range(400))
    assert set(seen.values()) == {10} and len(seen) == 40


def test_a_run_goes_on_where_it_was():
    mixture = Mixture([Numbers(0, 13), Numbers(100, 29)], (2, 1))

    def take(count, start=0, **options):
        found = batches(mixture, to_number, 6, 7, start, **options)
        return [next(found)["number"].tolist() for _ in range(count)]

    whole = take(20)
    assert take(8, 12) == whole[12:] and take(20, threads=4) == whole
    assert [[batch[r] for r in (5, 0)] for batch in whole] == take(20, rows=[5, 0])
    assert pickle.loads(pickle.dumps(mixture))[20]["number"] == 107
    other = batches(mixture, to_number, 6, 8)
    assert next(other)["number"].tolist() != whole[0]


def test_held_out_examples_have_the_proportions():
    mixture = Mixture([Numbers(0, 50), Numbers(100, 500)], (3, 1))
    numbers = evaluation_batch(mixture, to_number, 40, 0)["number"].tolist()
    assert sum(n < 100 for n in numbers) == 30 and len(set(numbers)) == 40 and numbers == sorted(numbers)
    assert sample(mixture, 40, 0) == sample(mixture, 40, 0) != sample(mixture, 40, 1)
    assert len(sample(mixture, 400, 0)) == 50 + 100  # the first has no more
    # Three parts of a number that three does not divide.
    assert len(sample(Mixture([Numbers(0, 50)] * 3, (1, 1, 1)), 100, 0)) == 100
    # Of one source it is what it was before there were mixtures.
    chosen = sorted(np.random.default_rng(5).choice(50, 8, replace=False))
    assert sample(Numbers(0, 50), 8, 5) == chosen and sample(Numbers(0, 5), 8, 5) == list(range(5))


def test_sources_of_several_kinds(tmp_path):
    said = save_shards(tmp_path / "tars")
    (tmp_path / "folder").mkdir()
    for name in "abc":
        (tmp_path / "folder" / f"{name}.png").write_bytes(b"")
        (tmp_path / "folder" / f"{name}.txt").write_text(f"caption {name}")
    spec = f"tars:{tmp_path}/tars/*.tar + folder:{tmp_path}/folder"
    train, test = both(spec, weights=(1, 1))
    assert captions(train, test) == said | {f"{name}.png": f"caption {name}" for name in "abc"}
    assert sample(test, 2, 0)[0] < len(test) - 1 == sample(test, 2, 0)[1]
    chosen = [train[order(train, 0)[k]]["key"] for k in range(10)]
    assert sum("tar" in key for key in chosen) == 5


@pytest.mark.parametrize(
    ("weights", "spec", "options", "line"),
    [
        ((1,), "{0} + {0}", {}, r"data.weights is \(1,\): expected a positive number for each of the 2 parts"),
        ((1, 0), "{0} + {0}", {}, "expected a positive number"),
        ((1, float("nan")), "{0} + {0}", {}, "expected a positive number"),
        ((1, 1), "{0}", {}, "for each of the 1 parts"),
        ((), "{0} + nowhere", {}, "data.source 'nowhere': expected tfds:NAME"),
        ((), "{0} + {0}", {"caption": "a + b + c"}, "data.caption_feature is .*: expected one for all 2 parts"),
        ((), "{0} + {0}", {"splits": ["train + other"]}, "no split 'other'"),
    ],
)
def test_errors(tmp_path, weights, spec, options, line):
    save_shards(tmp_path, 1)
    with pytest.raises(UserError, match=line):
        both(spec.format(f"tars:{tmp_path}/*.tar"), weights=weights, **options)


def test_features_and_splits_of_each_part(tmp_path):
    save_shards(tmp_path, 2)
    spec = f"tars:{tmp_path}/{{split}}.tar + tars:{tmp_path}/*.tar"
    source, _ = both(spec, caption="url + caption", splits=["00001 + test", "00000 + train"])
    found = captions(source)
    assert found["00001.tar/000010003.jpg"] == "https://x/10003.jpg" and "caption" in source[len(source) - 1]["caption"]


@pytest.mark.parametrize("kind", ["tars", "folder", "parquet", "arrow", "mixture"])
def test_captions_are_read_without_the_pictures(tmp_path, kind, monkeypatch):
    """What is read of a record without its picture is what its whole has."""
    from test_tables import save_arrow, save_parquet

    {"tars": save_shards, "folder": save_files, "parquet": save_parquet, "arrow": save_arrow, "mixture": save_shards}[
        kind
    ](tmp_path)
    place = {"tars": f"tars:{tmp_path}", "mixture": f"tars:{tmp_path} + tars:{tmp_path}/*.tar"}.get(kind)
    for source in both(place or f"{kind}:{tmp_path}"):
        whole = [source[k] for k in range(len(source))]
        assert [without_picture(source, k) for k in range(len(source))] == [
            {"caption": record["caption"], "key": record["key"]} for record in whole
        ]
    # And it is read without them.
    read = []
    monkeypatch.setattr(tars, "read_part", lambda path, start, length: read.append(length) or b"caption 3")
    if kind == "tars":
        assert without_picture(source, 0)["caption"] == "caption 3" and max(read) < 20


def save_files(folder):
    for k in range(5):
        for name, data in sample_files(k):
            (folder / name).write_bytes(data)
