"""Files of weights as people have them: several, wrapped, pointers, pages, and numbers that are none."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from unclip_jax.errors import UserError
from unclip_jax.pretrained.diffusers_unclip import _tensors
from unclip_jax.pretrained.openai_clip import _find_weights
from unclip_jax.pretrained.state_dict import WEIGHT_FILES, StateDict, read_tensors

TENSORS = {name: np.full((2, 3), value, np.float32) for value, name in enumerate(("a.weight", "a.bias", "b.weight"))}


def read(path):
    weights = StateDict(read_tensors(path), str(path))
    found = {name: weights.take(name, 2, 3) for name in sorted(weights)}
    weights.finish()
    return found


def sharded(folder, index="model.safetensors.index.json"):
    files = {"a.weight": "model-1.safetensors", "a.bias": "model-1.safetensors", "b.weight": "model-2.safetensors"}
    for file in set(files.values()):
        save_file({name: TENSORS[name] for name in files if files[name] == file}, folder / file)
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 72}, "weight_map": files}))
    return folder / index


def test_several_files_are_one_model(tmp_path):
    np.testing.assert_equal(read(sharded(tmp_path)), TENSORS)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"names model-2\.safetensors, which is not beside it: download it too"):
        read(tmp_path / "model.safetensors.index.json")


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": []}', "no JSON", '{"weight_map": {"a": 3}}'])
def test_index_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match="is no index of safetensors files"):
        read(tmp_path / "model.safetensors.index.json")


def test_index_may_not_name_files_elsewhere(tmp_path):
    index = sharded(tmp_path)
    index.write_text(index.read_text().replace("model-1", "../model-1"))
    with pytest.raises(UserError, match="names files that are not beside it"):
        read(index)


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "model.safetensors.index.fp16.json"])
def test_variants_are_found(tmp_path, name):
    assert name in WEIGHT_FILES
    if name.endswith("json"):
        sharded(tmp_path, name)
    else:
        save_file(TENSORS, tmp_path / name)
    assert _find_weights(tmp_path).name == name
    assert sorted(_tensors(tmp_path)) == sorted(TENSORS)
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert _find_weights(tmp_path).name == "model.safetensors", "full precision first"


def test_names_of_parallel_training_are_unwrapped(tmp_path):
    save_file({f"module.{name}": value for name, value in TENSORS.items()}, tmp_path / "w.safetensors")
    np.testing.assert_equal(read(tmp_path / "w.safetensors"), TENSORS)
    save_file({"module.a": TENSORS["a.bias"], "b": TENSORS["a.bias"]}, tmp_path / "w.safetensors")
    assert sorted(read(tmp_path / "w.safetensors")) == ["b", "module.a"], "a module of that name"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path, value):
    spoiled = TENSORS["a.bias"].copy()
    spoiled[1, 2] = value
    save_file(TENSORS | {"a.bias": spoiled}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"a\.bias has 1 values not finite"):
        read(tmp_path / "w.safetensors")


@pytest.mark.parametrize(("content", "says"), [
    ("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n", "is a pointer of Git LFS"),
    ("\n<!DOCTYPE html><html>404</html>", "is a web page"), ("<html>", "is a web page"), ("<?xml v", "is a web page"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.safetensors.index.json"])
def test_what_is_downloaded_in_place_of_weights_is_named(tmp_path, content, says, name):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=says):
        read_tensors(tmp_path / name)
