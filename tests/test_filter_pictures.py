"""The command `data filter`, with a random CLIP on red and blue pictures."""

import numpy as np
import pytest
from PIL import Image
from shrink import random_params, small_config, tokenizer_bytes

from unclip_jax import filter_pictures
from unclip_jax.bundle import save_bundle
from unclip_jax.data import __main__ as command
from unclip_jax.data import filtering
from unclip_jax.data.transforms import decode
from unclip_jax.errors import UserError
from unclip_jax.evaluation import features
from unclip_jax.stages import make_stage

COUNTS = {"red": 24, "blue": 20, "new_red": 9, "new_blue": 8}


def save(folder, count, colour, seed):
    """Pictures of one colour, up to noise; every other is higher than wide, and some lie in a folder below."""
    rng = np.random.default_rng(seed)
    (folder / "below").mkdir(parents=True)
    for i in range(count):
        noise = rng.integers(-40, 41, (30, 40, 3) if i % 2 else (40, 30, 3))
        picture = Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8))
        picture.save(folder / ("below" if i % 5 == 0 else ".") / f"{i:02}.png")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("filter")
    for seed, (name, count) in enumerate(COUNTS.items()):
        save(root / name, count, (200, 40, 40) if "red" in name else (40, 40, 200), seed)
    save(root / "mine", 6, (40, 40, 200), 8)
    save(root / "mine" / "reds", 5, (200, 40, 40), 9)
    (root / "mine" / "spoiled.png").write_bytes(b"no picture")
    (root / "empty").mkdir()
    config = small_config("clip")
    for name, seed in (("clip", 0), ("other_clip", 1)):
        params = random_params(make_stage(config), seed)
        save_bundle(root / name, "clip", config, params, tokenizer_bytes(), "", {})
    words = ["--positive", "{0}/red", "--negative", "{0}/blue", "--clip", "{0}/clip", "--out", "{0}/red.npz"]
    assert run(root, "train", *words) == 0
    return root


def run(root, *words):
    return command.main(["data", "filter", *(word.format(root) for word in words)])


def test_filter_is_what_the_library_makes(places):
    """The scores of a picture are those of the mean of its crops' embeddings, by the stored filter."""
    found = filtering.Filter.load(places / "red.npz")
    assert (found.card["positives"], found.card["held_out"], found.card["negatives"]) == (19, 5, 16)
    clip = features.clip(places / "clip").pictures
    for name in ("red/01.png", "blue/02.png"):
        crops = filtering.crops(decode((places / name).read_bytes()))
        rows = clip(crops)["image"].mean(axis=0)[None]
        whole = filter_pictures._embed(clip, places, [name]).rows
        np.testing.assert_allclose(whole, rows, atol=1e-6)
        assert (found.scores(rows, clip.card)[0] >= 0) == name.startswith("red")


def test_check_counts_what_is_missed(places, capsys):
    words = ["--filter", "{0}/red.npz", "--clip", "{0}/clip"]
    assert run(places, "check", *words, "--positive", "{0}/new_red", "--negative", "{0}/new_blue") == 0
    lines = capsys.readouterr().out.splitlines()
    # 1 - 0.05^(1 / 9) is 0.2831.
    assert lines[0] == "false negatives 0 [0, 0.2831], n = 9"
    assert lines[1] == "0 of 9 missed: at 95 %, fewer than 28 % of such pictures are missed (one-sided)"
    assert lines[2].startswith("false positives 0 [0, ") and lines[2].endswith("n = 8")
    assert run(places, "check", *words, "--positive", "{0}/new_blue") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "false negatives 1 [0, 1], n = 8" and len(lines) == 2


def test_apply_keeps_what_is_not_found(places, tmp_path, capsys):
    words = ["--filter", "{0}/red.npz", "--clip", "{0}/clip", "--pictures", "{0}/mine"]
    out, boundary = tmp_path / "new" / "kept.txt", tmp_path / "boundary.txt"
    assert run(places, "apply", *words, "--out", str(out), "--boundary", str(boundary)) == 0
    kept = out.read_text().splitlines()
    assert kept == ["01.png", "02.png", "03.png", "04.png", "below/00.png", "below/05.png"]
    said = capsys.readouterr()
    assert said.out.startswith("share of pictures found 0.4545 [") and said.out.endswith("n = 11\n")  # 5 of 11
    assert "spoiled.png is not a picture that can be read" in said.err and "not kept" in said.err
    listed = boundary.read_text().splitlines()
    clip, found = features.clip(places / "clip").pictures, filtering.Filter.load(places / "red.npz")
    scores = found.scores(filter_pictures._embed(clip, places / "mine", listed).rows, clip.card)
    assert len(listed) == 11 and (np.diff(np.abs(scores)) >= -1e-9).all()


def test_a_seed_holds_out_other_pictures(places, tmp_path, capsys):
    words = ["--positive", "{0}/red", "--negative", "{0}/blue", "--clip", "{0}/clip", "--out", f"{tmp_path}/filter.npz"]
    assert run(places, "train", *words) == 0
    first = (tmp_path / "filter.npz").read_bytes()
    assert "n = 5" in capsys.readouterr().out
    assert run(places, "train", *words) == 0 and (tmp_path / "filter.npz").read_bytes() == first
    assert run(places, "train", *words, "--seed", "1") == 0 and (tmp_path / "filter.npz").read_bytes() != first


TRAIN = ["train", "--positive", "{0}/red", "--negative", "{0}/blue", "--clip", "{0}/clip", "--out", "{0}/x.npz"]
APPLY = ["apply", "--filter", "{0}/red.npz", "--clip", "{0}/clip", "--pictures", "{0}/mine", "--out", "{0}/x.txt"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "expected data filter train, check, apply"),
        (["teach"], "data filter teach: expected"),
        (TRAIN[:-2], "--out"),
        ([*TRAIN, "--out", "x.txt"], "ends in .npz"),
        ([*TRAIN, "--out", "{0}/red/01.png/x.npz"], "is a file or lies below one"),
        ([*TRAIN, "--false-negatives", "1"], "between 0 and 1"),
        ([*TRAIN, "--positive", "{0}/nowhere"], "is no folder"),
        ([*TRAIN, "--negative", "{0}/empty"], "has no pictures"),
        ([*TRAIN, "--positive", "{0}/mine"], "spoiled.png is not a picture"),
        ([*TRAIN, "--clip", "{0}/empty"], "empty"),
        ([*APPLY, "--clip", "{0}/other_clip"], "the filter is of"),
        (["check", *APPLY[1:5], "--positive", ""], "'' is no folder"),
        ([*APPLY, "--filter", "{0}/red/01.png"], "holds no filter"),
        ([*APPLY, "--boundary", "{0}"], "ends in .txt"),
    ],
)
def test_what_cannot_be_filtered_is_one_line(places, words, says):
    with pytest.raises(UserError, match=says) as caught:
        run(places, *words)
    assert "\n" not in str(caught.value)
    assert not (places / "x.npz").exists() and not (places / "x.txt").exists()
