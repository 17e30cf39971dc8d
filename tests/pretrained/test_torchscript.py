"""TorchScript archives, made here byte by byte: they are read without torch, and without running what they hold."""

import io
import os
import pickle
import sys
import types
import zipfile

import numpy as np
import pytest

from unclip_jax.errors import UserError
from unclip_jax.pretrained.state_dict import StateDict, read_tensors

CODE = """class Node(Module):
  __parameters__ = ["weight", ]
  __buffers__ = ["steps", ]
  weight : Tensor
  steps : Tensor
  mask : Tensor
  child : __torch__.Child
class Child(Module):
  __parameters__ = []
  __buffers__ = ["half", ]
  half : Tensor
"""


class Tensor:
    """A tensor as PyTorch pickles it: a part of a storage."""

    def __init__(self, key, values, kind, offset=0, strides=None):
        self.key, self.values, self.kind, self.offset = key, values, kind, offset
        self.strides = strides or tuple(stride // values.itemsize for stride in values.strides)

    def __reduce__(self):
        rebuild = sys.modules["torch._utils"]._rebuild_tensor_v2
        return rebuild, (Storage(self), self.offset, self.values.shape, self.strides, False, None)


class Storage:
    def __init__(self, tensor):
        self.tensor = tensor


class Pickler(pickle.Pickler):
    def persistent_id(self, item):
        if isinstance(item, Storage):
            kind = getattr(sys.modules["torch"], item.tensor.kind)
            return ("storage", kind, item.tensor.key, "cpu", item.tensor.values.size)
        return None


@pytest.fixture
def names(monkeypatch):
    """Modules by whose names things are pickled. Nothing may look them up again."""

    def module(name, **members):
        found = types.ModuleType(name)
        for key, member in members.items():
            member.__module__, member.__qualname__ = name, key
            setattr(found, key, member)
        monkeypatch.setitem(sys.modules, name, found)

    storages = {kind: type(kind, (), {}) for kind in ("FloatStorage", "HalfStorage", "LongStorage")}
    module("torch", **storages)
    module("torch._utils", _rebuild_tensor_v2=lambda *_: None)
    module("__torch__", Node=type("Node", (), {}), Child=type("Child", (), {}))
    return sys.modules["__torch__"]


def written(path, root, tensors, compression=zipfile.ZIP_STORED):
    data = io.BytesIO()
    Pickler(data, 2).dump(root)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("model/data.pkl", data.getvalue())
        archive.writestr("model/constants.pkl", pickle.dumps(()))
        archive.writestr("model/code/__torch__.py", CODE)
        for tensor in tensors:
            archive.writestr(f"model/data/{tensor.key}", tensor.values.tobytes())
    return path


def example(names):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(3, 4)).astype(np.float32)
    half = rng.normal(size=(2, 5)).astype(np.float16)
    tensors = [Tensor("0", weight, "FloatStorage"), Tensor("1", half, "HalfStorage")]
    tensors += [Tensor("2", np.array(7), "LongStorage"), Tensor("3", weight[:1], "FloatStorage")]
    node, child = names.Node(), names.Child()
    child.half = tensors[1]
    node.weight, node.steps, node.mask, node.child, node.training = tensors[0], tensors[2], tensors[3], child, True
    return node, tensors


def test_parameters_and_buffers_have_their_names_and_nothing_else_is_read(names, tmp_path, monkeypatch):
    node, tensors = example(names)
    path = written(tmp_path / "model.pt", node, tensors)
    for name in ("torch", "torch._utils", "__torch__"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    found = read_tensors(path)
    assert sorted(found) == ["child.half", "steps", "weight"]
    np.testing.assert_array_equal(found["weight"], tensors[0].values)
    np.testing.assert_array_equal(found["child.half"], tensors[1].values)
    assert found["steps"] == 7 and found["child.half"].dtype == np.float16
    weights = StateDict(found, "model.pt")
    assert weights.take("child.half", 2, 5).dtype == np.float32


def test_parts_and_transposes_of_a_storage(names, tmp_path):
    node, tensors = example(names)
    whole = tensors[0].values
    part = Tensor("0", whole, "FloatStorage", offset=1, strides=(1, 4))
    part.values = whole.T[1:3]  # its shape; its bytes are those of the whole
    node.weight = part
    path = written(tmp_path / "model.pt", node, tensors)
    np.testing.assert_array_equal(read_tensors(path)["weight"], whole.T[1:3])


class Evil:
    """Whoever unpickles it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_code_in_an_archive_is_not_run(names, tmp_path):
    node, tensors = example(names)
    node.extra = Evil(tmp_path / "made")
    path = written(tmp_path / "model.pt", node, tensors)
    with pytest.raises(UserError, match=r"asks for '(posix|nt)\.mkdir', which no tensors need"):
        read_tensors(path)
    assert not (tmp_path / "made").exists()


def test_archives_that_lie_are_refused(names, tmp_path):
    node, tensors = example(names)
    read_tensors(written(tmp_path / "small.pt", node, tensors, zipfile.ZIP_DEFLATED))
    bomb = Tensor("4", np.zeros(5_000_000, np.float32), "FloatStorage")
    path = written(tmp_path / "bomb.pt", node, [*tensors, bomb], zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 50_000
    with pytest.raises(UserError, match="has compressed tensors, which archives of PyTorch have not"):
        read_tensors(path)
    node.weight = Tensor("0", tensors[0].values, "FloatStorage", offset=3)  # beyond its storage's end
    with pytest.raises(UserError, match=r"damaged archive of TorchScript .*is not within its 12 numbers"):
        read_tensors(written(tmp_path / "beyond.pt", node, tensors))
    node.weight = Tensor("9", tensors[0].values, "FloatStorage")
    with pytest.raises(UserError, match="damaged archive of TorchScript"):
        read_tensors(written(tmp_path / "missing.pt", node, tensors))
