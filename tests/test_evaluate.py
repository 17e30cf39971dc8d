"""The command that measures: what it reads, that its numbers are the library's, and what it refuses."""

import hashlib
import io
import json
import re
import shutil
import tarfile
from itertools import islice

import numpy as np
import pytest
from PIL import Image
from shrink import CAPTIONS, random_params, small_config, tokenizer_bytes

from unclip_jax import evaluate, pictures
from unclip_jax.bundle import save_bundle
from unclip_jax.data import emoji_scenes, varied_scenes
from unclip_jax.errors import UserError
from unclip_jax.evaluation import features, frechet, presets
from unclip_jax.evaluation.clip_score import clip_score
from unclip_jax.stages import make_stage


class Means:
    """In Inception's place: the mean of each colour, its square, and products with its neighbour."""

    card = {"network": "means", "weights": "0" * 64}  # noqa: RUF012

    def __init__(self, folder, names):
        self.names = names

    def __call__(self, batches):
        rows = np.concatenate([batch.reshape(len(batch), -1, 3).mean(axis=1) / 255 for batch in batches])
        found = np.concatenate([rows, rows**2, rows * np.roll(rows, 1, axis=1)], axis=1).astype(np.float32)
        return dict.fromkeys(self.names, found)


@pytest.fixture(autouse=True)
def means(monkeypatch):
    monkeypatch.setattr(features, "inception", Means)


def drawn(count, seed, low=0):
    return np.random.default_rng(seed).integers(low, 256, (count, 8, 8, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Two folders of the same pictures, as files with captions beside them and as tars that `sample` would draw."""
    root = tmp_path_factory.mktemp("pictures")
    images = drawn(40, 0)
    (root / "tars").mkdir()
    (root / "files").mkdir()
    for start in (0, 24):
        with tarfile.open(root / "tars" / f"{start:06}.tar", "w") as archive:
            for i in range(start, min(start + 24, 40)):
                data = pictures.png(images[i], {"prompt": CAPTIONS[i % 48]})
                member = tarfile.TarInfo(f"{i:03}.png")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    for i, image in enumerate(images):
        Image.fromarray(image).save(root / "files" / f"{i:03}.png")
        (root / "files" / f"{i:03}.txt").write_text(CAPTIONS[i % 48] + "\n")
    (root / "files" / "grid.png").write_bytes(pictures.png(images[0]))
    (root / "others").mkdir()
    for i, image in enumerate(drawn(30, 1, low=60)):
        Image.fromarray(image).save(root / "others" / f"{i:03}.png")
    return root


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    config, folder = small_config("clip"), tmp_path_factory.mktemp("clip") / "clip"
    save_bundle(folder, "clip", config, random_params(make_stage(config)), tokenizer_bytes(), "", {})
    return folder


def run(capsys, *arguments):
    assert evaluate.main(["evaluate", *map(str, arguments), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_files_and_tars_are_read_alike(places):
    for place in ("files", "tars"):
        found = list(evaluate.read_pictures(str(places / place), None))
        np.testing.assert_array_equal(np.stack([picture.image for picture in found]), drawn(40, 0))
        assert [picture.caption for picture in found] == [CAPTIONS[i % 48] for i in range(40)]
    assert next(evaluate.read_pictures(str(places / "files"), 4)).image.shape == (4, 4, 3)


def test_the_first_caption_counts_and_what_systems_leave_does_not(places, tmp_path):
    picture = (places / "files" / "000.png").read_bytes()
    (tmp_path / "a.png").write_bytes(picture)
    (tmp_path / "a.txt").write_text("a fox\nan animal\n")
    (tmp_path / "._a.png").write_bytes(b"of macOS")
    with tarfile.open(tmp_path / "b.tar", "w") as archive:
        for name, data in {"__MACOSX/b.png": b"of macOS", "b.png": picture, "b.txt": b"\n a cat\n"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    assert [picture.caption for picture in evaluate.read_pictures(str(tmp_path), None)] == ["a fox", "a cat"]


@pytest.mark.parametrize("data", [b"", b"no tar", None])
def test_damaged_tars_and_captions_are_one_line(places, tmp_path, data):
    whole = (places / "tars" / "000000.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: len(whole) // 2 + 100] if data is None else data)
    with pytest.raises(UserError, match=r"a\.tar is damaged or no tar") as caught:
        list(evaluate.read_pictures(str(tmp_path), None))
    assert "\n" not in str(caught.value)
    (tmp_path / "a.tar").unlink()
    (tmp_path / "b.png").write_bytes((places / "files" / "000.png").read_bytes())
    (tmp_path / "b.txt").write_bytes(b"\x89PNG\x01\xff")
    with pytest.raises(UserError, match=r"b\.png is not a picture that can be read .its caption is no text"):
        list(evaluate.read_pictures(str(tmp_path), None))


def test_numbers_are_the_librarys_and_say_what_they_depend_on(places, capsys):
    options = ["--pictures", places / "tars", "--reference", places / "others", "--inception", "x"]
    fid, kid, *four = run(capsys, "fid", "kid", "precision_recall", *options)
    network = Means("", ("pool",))
    ours, theirs = (network([images])["pool"] for images in (drawn(40, 0), drawn(30, 1, low=60)))
    groups, reference = frechet.grouped_statistics([ours], 10, {}), frechet.statistics([theirs], {})
    assert fid["value"] == pytest.approx(frechet.fid(groups, reference).value) and fid["n"] == 40
    assert fid["low"] < fid["value"] < fid["high"]
    assert fid["card"]["reference"]["source"] == str(places / "others")
    assert kid["card"]["reference_sha256"] == hashlib.sha256(drawn(30, 1, low=60).tobytes()).hexdigest()
    card = fid["card"]["pictures"]
    assert card["crop"] == "center" and card["resize"] == "area, 8" and card["source"] == str(places / "tars")
    assert kid["value"] == pytest.approx(frechet.kid(ours, theirs).value) and kid["card"]["weights"] == "0" * 64
    assert len(four) == 4


def test_statistics_stand_in_for_the_reference(places, tmp_path, capsys):
    options = ["fid", "--pictures", places / "files", "--inception", "x", "--reference"]
    first = run(capsys, *options, places / "others", "--save-reference", tmp_path / "others.npz")
    again = run(capsys, *options, tmp_path / "others.npz")
    assert again[0]["value"] == first[0]["value"] > 0.01
    same = run(capsys, *options, places / "tars")
    assert abs(same[0]["value"]) < 1e-9


def test_captions_are_scored_by_a_clip(places, clip_folder, capsys):
    score, precision = run(capsys, "clip_score", "r_precision", "--pictures", places / "files", "--clip", clip_folder)
    clip = features.clip(clip_folder)
    texts = clip.captions([CAPTIONS[i % 48] for i in range(40)])
    assert score["value"] == pytest.approx(clip_score(clip.pictures(drawn(40, 0))["image"], texts).value, abs=1e-4)
    assert precision["card"]["distractors"] == 39 and score["n"] == precision["n"] == 40


def test_metrics_of_a_clip_are_the_librarys(tmp_path, clip_folder, capsys):
    """24 drawings of 8 captions, of which the first of each is a copy of its training picture."""
    names = ["apple", "bus", "cat", "dog", "egg", "fox", "moon", "tent"]  # in the order of letters, as classes are
    own, others = drawn(8, 2), drawn(16, 3)
    for i in range(24):
        image = own[i] if i < 8 else others[i - 8]
        pictures.save_png(tmp_path / "drawn" / f"{i:02}.png", image, {"prompt": names[i % 8]})
    for i in range(8):
        pictures.save_png(tmp_path / "training" / f"{i:02}.png", own[i], {"prompt": names[i]})
    (tmp_path / "templates.txt").write_text("{}\na {}\n")
    metrics = ["diversity", "vendi_score", "zero_shot", "near_matches", "regurgitation"]
    options = ["--pictures", tmp_path / "drawn", "--reference", tmp_path / "training", "--clip", clip_folder]
    options += ["--templates", tmp_path / "templates.txt", "--threshold", "0.99999"]
    found = {line["name"]: line for line in run(capsys, *metrics, *options)}
    clip = features.clip(clip_folder)
    z = clip.pictures(np.concatenate([own, others]))["image"]
    numbers = np.arange(24) % 8
    cosines = [[z[i] @ z[j] for i in range(24) for j in range(i) if i % 8 == j % 8 == k] for k in range(8)]
    assert found["diversity"]["value"] == pytest.approx(1 - np.mean([np.mean(row) for row in cosines]), abs=1e-5)
    eigenvalues = np.linalg.eigvalsh(z.astype(float) @ z.T / 24)
    eigenvalues = eigenvalues[eigenvalues > 1e-12]
    assert found["Vendi score"]["value"] == pytest.approx(np.exp(-np.sum(eigenvalues * np.log(eigenvalues))), rel=1e-3)
    texts = sum(clip.captions([form.format(text) for text in names]) for form in ("{}", "a {}"))
    right = np.argmax(z @ (texts / np.linalg.norm(texts, axis=1, keepdims=True)).T, axis=1) == numbers
    assert found["top-1 accuracy"]["value"] == right.mean() and found["top-1 accuracy"]["card"]["classes"] == 8
    assert found["share with a near match"]["value"] >= 1 / 3 and found["share near to its own"]["value"] >= 1 / 3
    nearest = found["share near to its own"]["card"]["nearest_to_own"][:8]
    assert {row["drawing"] for row in nearest} == set(range(8)) and all(row["cosine"] > 0.9999 for row in nearest)


@pytest.mark.parametrize("kind", ["single", "varied"])
def test_scenes_are_read_off_the_pictures(tmp_path, capsys, kind):
    if kind == "single":
        rows = [(emoji_scenes.render(scene, 32), text) for scene, text in emoji_scenes.scenes("single", "test")][:20]
    else:
        rows = [(varied_scenes.render(scene, 64), text) for scene, _, text in islice(varied_scenes.scenes("test"), 20)]
    for i, (_, text) in enumerate(rows):
        pictures.save_png(tmp_path / f"{i:02}.png", rows[(i + 1) % 20 if i < 10 else i][0], {"prompt": text})
    found = {line["name"]: line for line in run(capsys, "alignment", "--pictures", tmp_path)}
    whole = found["alignment, both" if kind == "single" else "alignment, all"]
    assert 0.5 <= whole["value"] <= 0.6 and whole["n"] == 20 and whole["low"] < 0.5 < whole["high"]


def test_bundle_draws_what_is_measured(places, tmp_path, capsys, monkeypatch):
    """COCO in small: 30 pictures with two captions each; one of each of 25 is drawn, all are the reference."""
    coco = tmp_path / "coco"
    (coco / "annotations").mkdir(parents=True)
    shutil.copytree(places / "others", coco / "val2014")
    rows = [{"image_id": i % 30, "id": i, "caption": f" {CAPTIONS[i % 48]}\n"} for i in range(60)]
    (coco / "annotations" / "captions_val2014.json").write_text(json.dumps({"annotations": rows}))
    monkeypatch.setitem(evaluate.PRESETS, "small", presets.Preset(25, 8, upsample=False))
    config, bundle = small_config("glide"), tmp_path / "cascade"
    save_bundle(bundle / "decoder", "glide", config, random_params(make_stage(config)), tokenizer_bytes(), "", {})
    options = ["fid", "--preset", "small", "--coco", coco, "--bundle", bundle, "--pictures", tmp_path / "drawn"]
    options += ["--inception", "x", "--seed", "5"]
    (fid,) = run(capsys, *options)
    texts = [picture.caption for picture in evaluate.read_pictures(str(tmp_path / "drawn"), None)]
    assert fid["n"] == len(texts) == 25 and set(texts) <= set(CAPTIONS)
    assert texts == presets.read_captions(coco, 25, 5) != presets.read_captions(coco, 25, 6)
    assert fid["card"]["reference"]["n"] == 30
    card = fid["card"]["drawn"]
    assert card["seed"] == 5 and card["sampling"]["decoder"]["steps"] == "3" and card["models"]["decoder"]
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "drawn").iterdir()}
    assert run(capsys, *options)[0]["value"] == fid["value"]
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "drawn").iterdir()}  # nothing drawn twice


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["fid", "--pictures", "{0}/files", "--reference", "{0}/others"], "no --inception"),
        (["fid", "--pictures", "{0}/files", "--inception", "x"], "no --reference"),
        (["clip_score", "--pictures", "{0}/files"], "no --clip"),
        (["kid", "--pictures", "{0}/files", "--inception", "x", "--reference", "a.npz"], "enough for fid and sfid"),
        (["fid", "--pictures", "{0}/none", "--inception", "x", "--reference", "{0}/others"], "is no folder"),
        (["fid", "--pictures", "{0}/empty", "--inception", "x", "--reference", "{0}/others"], "no pictures in"),
        (["fid", "--pictures", "{0}/broken", "--inception", "x", "--reference", "{0}/others"], "can be read"),
        (["r_precision", "--pictures", "{0}/others", "--clip", "{1}"], "30 of 30 pictures .* have no caption"),
        (["lpips", "--pictures", "{0}/files"], "invalid choice"),
        (["fid", "sfid", "--pictures", "a", "--inception", "x", "--reference", "a.npz"], "one at a time"),
        (["kid", "--pictures", "a", "--inception", "x", "--reference", "b", "--save-reference", "c"], "fid or sfid"),
        (["fid", "--pictures", "a", "--inception", "x", "--reference", "b", "--size", "0"], "--size: '0': exp"),
        (["alignment", "--pictures", "{0}/others"], "30 of 30 pictures .* have no caption"),
        (["alignment", "--pictures", "{0}/files"], "is no caption of emoji scenes"),
        (["alignment", "--pictures", "a", "--bundle", "b"], "name them by --prompts or --preset"),
        (["alignment", "--pictures", "a", "--prompts", "b"], "name its folder by --bundle"),
        (["alignment", "--pictures", "a", "--bundle", "b", "--prompts", "{0}/odd.txt"], "'a cat' is no caption"),
        (["clip_score", "--pictures", "a", "--bundle", "b", "--prompts", "{0}/odd.txt", "--clip", "{0}"], "{0}"),
        (["fid", "--pictures", "a", "--inception", "x", "--preset", "small"], "captions from --coco"),
        (["fid", "--pictures", "a", "--inception", "x", "--preset", "small", "--coco", "{0}", "--bundle", "b"], "val"),
    ],
)
def test_what_cannot_be_measured_is_one_line(places, clip_folder, arguments, says):
    (places / "empty").mkdir(exist_ok=True)
    (places / "broken").mkdir(exist_ok=True)
    (places / "broken" / "a.png").write_bytes(b"no picture")
    (places / "odd.txt").write_text("a cat\n")
    with pytest.raises(UserError, match=says.replace("{0}", re.escape(str(places)))) as caught:
        evaluate.main(["evaluate", *(text.format(places, clip_folder) for text in arguments)])
    assert "\n" not in str(caught.value)
