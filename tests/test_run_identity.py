"""A resumed run is the same run."""

import copy
import json
import os
import re
import shutil

import jax
import numpy as np
import pytest
from shrink import save_pictures, small_config

from unclip_jax import train
from unclip_jax.data.emoji_scenes import encode_png
from unclip_jax.data.sources import open_source
from unclip_jax.errors import UserError
from unclip_jax.run_identity import changes, fingerprint, identity


def changed(config, values):
    config = copy.deepcopy(config).unlock()
    config.update_from_flattened_dict(values)
    return config


@pytest.fixture(scope="module")
def config():
    return small_config("decoder")


FOUND = {"CLIP": "a", "tokenizer": "b", "examples": "3 records, c"}


@pytest.mark.parametrize("values", [
    {"train.log_every": 7}, {"train.steps": 10**6}, {"optim.learning_rate": 0.5}, {"mesh.fsdp": 2},
    {"dtype": "bfloat16"}, {"model.unet.remat": True}, {"sampling.guidance_scale": 9.0}, {"data.threads": 3},
    {"data.workers": 2},
])  # fmt: skip
def test_what_may_change_is_said(config, values):
    before, now = identity(config, FOUND), identity(changed(config, values), FOUND)
    ((key, value),) = values.items()
    (said,) = changes(before, now)
    assert said.startswith(f"{key} was ") and said.endswith(f", now it is {json.dumps(value)}")


@pytest.mark.parametrize("values", [
    {"train.seed": 5}, {"train.batch_size": 6}, {"model.unet.channels": 64}, {"diffusion.drop_caption": 0.2},
    {"data.crop": "dalle"}, {"data.split": "test"}, {"optim.frozen": ("text",)}, {"diffusion.predicts": "v"},
])  # fmt: skip
def test_what_may_not_change_is_refused_with_both_values(config, values):
    before, now = identity(config, FOUND), identity(changed(config, values), FOUND)
    ((key, value),) = values.items()
    line = f"this run was started with other values: {key} was .*, now it is {re.escape(json.dumps(value))}; give"
    with pytest.raises(UserError, match=line):
        changes(before, now)


@pytest.mark.parametrize("name", FOUND)
def test_what_lies_at_a_place_may_not_change(config, name):
    before = identity(config, FOUND)
    with pytest.raises(UserError, match=f'{name} was "{FOUND[name]}", now it is "other"'):
        changes(before, identity(config, FOUND | {name: "other"}))


def test_places_and_keys_of_other_versions_are_not_compared(config):
    before = identity(config, FOUND)
    moved = {"clip.bundle": "elsewhere", "data.source": "folder:moved", "data.data_dir": "there"}
    assert changes(before, identity(changed(config, moved), FOUND)) == []
    older = copy.deepcopy(before)
    del older["config"]["train"]["eval_size"], older["found"]["tokenizer"]
    older["config"]["model"]["gone"] = 3
    assert changes(older, before) == []
    older["versions"]["jax"] = "0.1"
    assert changes(older, before) == [f'version of jax was "0.1", now it is "{before["versions"]["jax"]}"']


def test_settings_of_randomness_may_not_change(config, monkeypatch):
    before = identity(config, FOUND)
    with jax.default_prng_impl("rbg"), pytest.raises(UserError, match='jax_default_prng_impl was "threefry2x32", now'):
        changes(before, identity(config, FOUND))


def test_fingerprint_is_of_names_captions_and_pictures(tmp_path):
    def of(folder):
        return fingerprint(open_source(f"folder:{folder}", "train", "", "", ""))

    first = save_pictures(tmp_path / "one")
    before = of(first)
    assert of(shutil.copytree(first, tmp_path / "moved")) == before
    pictures = sorted(tmp_path.glob("one/**/*.png"))
    for number, change in enumerate([
        lambda folder: (folder / pictures[0].name).with_suffix(".txt").write_text("another caption"),
        lambda folder: (folder / pictures[0].name).write_bytes(pictures[1].read_bytes()),
        lambda folder: (folder / pictures[0].name).write_bytes(b""),
        lambda folder: (folder / pictures[0].name).unlink(),
    ]):  # fmt: skip
        folder = shutil.copytree(first, tmp_path / str(number))
        change(folder)
        assert of(folder) != before


def test_names_that_are_no_utf_8_have_a_fingerprint(tmp_path):
    for name in (b"caf\xe9", b"b"):
        for ending, data in ((b".png", encode_png(np.zeros((4, 4, 3), np.uint8))), (b".txt", b"x")):
            with open(os.path.join(os.fsencode(tmp_path), name + ending), "wb") as file:
                file.write(data)
    found = [fingerprint(open_source(f"folder:{tmp_path}", split, "", "", "")) for split in ("train", "test")]
    assert all(one.startswith("1 records, ") for one in found) and found[0] != found[1]


def test_run_goes_on_only_with_what_it_was_started_with(tmp_path, capsys):
    config = small_config("clip").unlock()
    pictures = save_pictures(tmp_path / "pictures")
    config.data.update(dict(source=f"folder:{pictures}", threads=1))
    config.train.update(dict(steps=1, checkpoint_every=1, sample_every=10**6))
    train.run(config, str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"train\.seed was 0, now it is 1; give what it was started with"):
        train.run(changed(config, {"train.steps": 2, "train.seed": 1}), str(tmp_path / "run"))
    other = shutil.copytree(pictures, tmp_path / "other")
    for caption in other.glob("*.txt"):
        caption.write_text("nothing")
    with pytest.raises(UserError, match="examples was "):
        train.run(changed(config, {"train.steps": 2, "data.source": f"folder:{other}"}), str(tmp_path / "run"))

    capsys.readouterr()
    moved = shutil.move(pictures, tmp_path / "moved")
    train.run(changed(config, {"train.steps": 2, "data.source": f"folder:{moved}"}), str(tmp_path / "run"))
    said = capsys.readouterr().err
    assert "clip: train.steps was 1, now it is 2\n" in said and "from step 1" in said
