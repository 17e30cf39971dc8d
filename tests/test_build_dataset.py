"""The command `data build`: what it keeps, counts and refuses, by any number of workers, after a stop, in a bucket."""

import io
import json
import shutil
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("apache_beam", reason="needs the extra [build]")

from unclip_jax import build_dataset, cli
from unclip_jax.data import __main__ as command
from unclip_jax.data import build, build_ranges, duplicates
from unclip_jax.data.sources import open_source
from unclip_jax.data.transforms import captions_of
from unclip_jax.errors import UserError

PICTURES, UPRIGHT, SMALL, TWICE, ALIKE = 400, 7, 11, 13, 17  # every so many is so
STEPS = ["--min-side=24", "--max-aspect=2", "--min-words=2", "--letters=latin"]
STEPS += ["--exact-duplicates", "--near-duplicates=3"]


def jpeg(picture, quality=90):
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "JPEG", quality=quality)
    return out.getvalue()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """400 pictures with two captions each; four are broken, and some are what steps are there for."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    (folder / "below").mkdir()
    for k in range(PICTURES):
        size = (20, 64) if k % UPRIGHT == 3 else (22, 22) if k % SMALL == 3 else (60, 44)
        picture = np.asarray(Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)).resize(size))
        content = jpeg(picture) if k not in (50, 150, 250, 350) else b"no picture"
        place = folder / ("below" if k % 3 else ".") / f"{k:03}.jpg"
        place.write_bytes(content)
        place.with_suffix(".txt").write_text(f"picture {k}\n" + ("кот и пёс" if k % 5 else "word"))
        if k % TWICE == 5:
            (folder / f"twice_{k:03}.jpg").write_bytes(content)
            (folder / f"twice_{k:03}.txt").write_text(f"again {k}")
        if k % ALIKE == 5:
            (folder / f"x_alike_{k:03}.png").write_bytes(jpeg(picture, quality=60))
            (folder / f"x_alike_{k:03}.txt").write_text(f"alike {k}")
    return folder


def run(pictures, out, *words, name="mine"):
    argv = ["data", "build", f"--source=folder:{pictures}", f"--out={out}", f"--name={name}", *words]
    assert command.main(argv) == 0
    return json.loads((build.to_path(out) / name / "1.0.0" / "build.json").read_text())


def opened(out, split, name="mine"):
    return open_source(f"tfds:{name}", split, str(out), "image", "caption")


def records(out, split, name="mine"):
    """Picture file and captions of all records, in order."""
    source = opened(out, split, name)
    return [(source[k]["image"], tuple(source[k]["caption"])) for k in range(len(source))]


@pytest.fixture(scope="module")
def built(pictures, tmp_path_factory):
    """Folder of datasets that one process made: "plain" without steps, "mine" with them."""
    out = tmp_path_factory.mktemp("built")
    run(pictures, out, name="plain")
    run(pictures, out, *STEPS)
    return out


def test_every_record_is_there_once_in_the_split_of_the_folder(pictures, built):
    for split in ("train", "test"):
        source = open_source(f"folder:{pictures}", split, "", "", "")
        there = [(source[k]["image"], tuple(captions_of(source[k]))) for k in range(len(source))]
        assert records(built, split, "plain") == [record for record in there if record[0] != b"no picture"]


def expected(pictures):
    """Counts and kept records, by a plain loop over all records that compares each with all before it."""
    dropped, seen, kept = Counter(), [], {"train": [], "test": []}
    for split in kept:
        source = open_source(f"folder:{pictures}", split, "", "", "")
        for record in map(source.__getitem__, range(len(source))):
            if record["image"] == b"no picture":
                dropped["unreadable"] += 1
                continue
            picture = np.asarray(Image.open(io.BytesIO(record["image"])))
            captions = [text for text in captions_of(record) if len(text.split()) > 1 and "кот" not in text]
            if min(picture.shape[:2]) < 24:
                dropped["min-side"] += 1
            elif not captions:
                dropped["min-words"] += 1
            else:
                look = int(duplicates.look(picture), 16)
                if any(np.array_equal(picture, other) for other, _ in seen):
                    dropped["exact-duplicates"] += 1
                    continue
                if any((look ^ other).bit_count() <= 3 for _, other in seen):
                    dropped["near-duplicates"] += 1
                else:
                    kept[split].append((record["image"], tuple(captions)))
                seen.append((picture, look))
    return dropped, kept


def test_steps_drop_what_a_plain_loop_finds(pictures, built):
    known = json.loads((built / "mine" / "1.0.0" / "build.json").read_text())
    dropped, kept = expected(pictures)
    assert known["dropped"] == dropped and min(dropped.values()) >= 4 and len(dropped) == 4
    assert known["records"] == sum(known["kept"].values()) + dropped.total()
    for split in ("train", "test"):
        assert records(built, split) == kept[split] and len(kept[split]) == known["kept"][split]


def test_what_cannot_be_read_is_named(built):
    plain = json.loads((built / "plain" / "1.0.0" / "build.json").read_text())
    assert plain["dropped"] == {"unreadable": 4}
    names = [line.partition(": ") for line in plain["unreadable"]]
    assert sorted(name.split("/")[-1] for name, _, _ in names) == ["050.jpg", "150.jpg", "250.jpg", "350.jpg"]
    assert {why for _, _, why in names} == {"it is no picture of a known kind"}


def test_records_are_the_same_for_any_number_of_workers(pictures, built, tmp_path):
    run(pictures, tmp_path, *STEPS, "--workers=3")
    for split in ("train", "test"):
        assert records(tmp_path, split) == records(built, split)
    ours, theirs = (json.loads((out / "mine/1.0.0/build.json").read_text()) for out in (tmp_path, built))
    assert ours == theirs


def test_what_is_done_is_not_done_again(pictures, built, tmp_path, monkeypatch, capsys):
    """A build that stops in the midst of either pass goes on, and ends in the same records."""
    for stopped, calls in (("_examined", 3), ("_again", 2)):
        inner, left = getattr(build_ranges, stopped), [calls]

        def failing(*arguments, inner=inner, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise OSError("No space left on device")
            return inner(*arguments)

        with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left on device"):
            patch.setattr(build_ranges, stopped, failing)
            run(pictures, tmp_path, *STEPS)
        with pytest.raises(UserError, match="no dataset 'mine'"):
            opened(tmp_path, "train")
    parts = tmp_path / "mine/1.0.0/parts"
    assert len(list(parts.glob("examined-*.json"))) > 5 and len(list(parts.glob("done-*.json"))) == 2
    monkeypatch.setattr(build_ranges, "_examined", None)  # all ranges were examined
    run(pictures, tmp_path, *STEPS)
    assert records(tmp_path, "train") == records(built, "train") and not parts.exists()
    monkeypatch.setattr(build, "run", None)
    capsys.readouterr()
    run(pictures, tmp_path, *STEPS)  # nothing is left to do
    said = capsys.readouterr()
    assert "is there already" in said.err and "dropped: near-duplicates" in said.out


def test_other_settings_are_another_dataset(pictures, built, tmp_path):
    with pytest.raises(UserError, match="is of min_side 24, not 25: give another --name"):
        run(pictures, built, "--min-side=25", *STEPS[1:])
    (tmp_path / "mine" / "2.0.0").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds 2\.0\.0, which this has not written"):
        run(pictures, tmp_path)
    shutil.copytree(built / "plain", tmp_path / "plain")
    (tmp_path / "plain/1.0.0/build.json").write_text("{")
    with pytest.raises(UserError, match=r"build.json cannot be read .*: delete"):
        run(pictures, tmp_path, name="plain")


def test_sources_come_one_after_another_and_pictures_are_made_smaller(pictures, built, tmp_path):
    words = ["--source=tfds:plain", f"--data-dir={built}", "--split=train", "--shorter-side=30", "--held-out=0.5"]
    known = run(pictures, tmp_path, *words)
    specs = (f"folder:{pictures}", "tfds:plain")
    folder, dataset = (len(open_source(spec, "train", str(built), "image", "caption")) for spec in specs)
    assert known["records"] == folder + dataset and known["dropped"] == {"unreadable": folder - dataset}
    assert 0.4 < known["kept"]["test"] / (2 * dataset) < 0.6
    run(pictures, tmp_path, "--shorter-side=30", "--exact-duplicates", name="twice_read")
    for name in ("mine", "twice_read"):
        sides = {min(Image.open(io.BytesIO(image)).size) for image, _ in records(tmp_path, "train", name)}
        assert sides == {20, 22, 30}


def test_into_a_bucket(pictures, bucket, built):
    run(pictures, bucket, *STEPS)
    for split in ("train", "test"):
        assert records(bucket, split) == records(built, split)
    assert not (build.to_path(bucket) / "mine/1.0.0/parts").exists()


def test_nothing_kept_and_nothing_held_out(pictures, tmp_path, capsys):
    with pytest.raises(UserError, match="no record is kept for training: loosen the steps"):
        run(pictures, tmp_path, "--min-side=1000")
    assert "dropped: min-side" in capsys.readouterr().out
    with pytest.raises(UserError, match="no dataset 'mine'"):
        opened(tmp_path, "train")
    known = run(pictures, tmp_path, "--held-out=0", name="all")
    assert list(known["kept"]) == ["train"] and len(opened(tmp_path, "train", "all")) == known["kept"]["train"]


def test_a_source_that_changes_while_it_is_read(pictures, tmp_path, monkeypatch):
    changed = build_ranges.open_source
    monkeypatch.setattr(build_ranges, "open_source", lambda *arguments: [*range(len(changed(*arguments)) - 1)])
    build_ranges._opened.cache_clear()
    with pytest.raises(UserError, match=r"had \d+ records of train, now \d+: build anew"):
        run(pictures, tmp_path)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--name=Mine"], "--name 'Mine': expected lower-case letters"),
        (["--source=folder:/nowhere"], "no folder /nowhere"),
        (["--source=mine"], "data.source 'mine': expected"),
        (["--out=s3://bucket/x"], "expected a place on a disk"),
        (["--out=/dev/null/x"], "is a file or lies below one"),
        (["--split=validation"], "data.source has no split 'validation'"),
        (["--min-side=-1"], "--min-side -1: expected 0 or more"),
        (["--max-aspect=0.5"], "--max-aspect 0.5: expected 1 or more"),
        (["--min-words=9", "--max-words=3"], "no caption is kept"),
        (["--held-out=1"], "--held-out 1: expected a share"),
        (["--workers=0"], "--workers 0: expected 1 or more"),
        (["--near-duplicates=8"], "--near-duplicates 8: expected 0 … 7 bits"),
        (["--letters=latim"], "--letters 'latim': expected scripts such as latin"),
        (["--min-similarity=0.3"], "--clip goes with --min-similarity"),
        (["--clip=clip"], "--clip goes with --min-similarity"),
        (["--clip=nowhere", "--min-similarity=0.3"], "no bundle at nowhere"),
        (["--clip=clip", "--probe=probe.npz"], "--probe and --min-rating go together"),
        (["--workers=2", "--", "--runner=DataflowRunner"], "--workers is for this machine"),
        (["--", "--runner=NoRunner"], "Unexpected pipeline runner: NoRunner"),
        (["--min-sides=3"], "unrecognized arguments: --min-sides=3"),
    ],
)
def test_mistakes(pictures, tmp_path, words, line):
    with pytest.raises(UserError, match=line):
        run(pictures, tmp_path, *words)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam.options.pipeline_options", None)
    with pytest.raises(ModuleNotFoundError) as found:
        build_dataset._beam(build_dataset.parse(["build", "--source=x", "--out=y", "--name=z"]))
    assert cli.OPTIONAL[found.value.name.partition(".")[0]] == "build"
