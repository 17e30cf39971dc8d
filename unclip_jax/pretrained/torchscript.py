"""Reads the parameters of a TorchScript archive, as OpenAI publishes CLIP, without running the code that it holds.

An archive is a zip file of a pickle (data.pkl: modules, by the names of their classes), of tensors' bytes (data/KEY)
and of code (code/…), in which each class says which of its attributes are parameters and buffers. The pickle is read by
an unpickler that knows tensors, containers and empty modules alone.
"""

import ast
import collections
import io
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from unclip_jax.errors import UserError

DTYPES = {
    "FloatStorage": np.float32, "HalfStorage": np.float16, "DoubleStorage": np.float64, "LongStorage": np.int64,
    "IntStorage": np.int32, "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}  # fmt: skip
LARGEST_COMPRESSED = 2**24  # bytes of a compressed file in an archive, when it is read
DECLARED = re.compile(r"^  __(?:parameters|buffers)__ = (\[.*?\])$", re.MULTILINE)


def is_torchscript(path: Path) -> bool:
    """Tells whether a PyTorch file is an archive of TorchScript instead of a pickle of tensors."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, np.ndarray]:
    """Reads parameters and buffers by name, as PyTorch's `state_dict` names them.

    Raises UserError where large parts of the archive are compressed, as in no archive of PyTorch's, or its pickle asks
    for anything but tensors, containers and modules.
    """
    with zipfile.ZipFile(path) as archive:
        # PyTorch compresses the code alone, so nothing grows much when it is read.
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED and info.file_size > LARGEST_COMPRESSED:
                raise UserError(f"{path} has compressed tensors, which archives of PyTorch have not: download it again")
        names = archive.namelist()
        pickled = next((name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")), None)
        if not pickled:
            raise UserError(f"{path} is no archive of TorchScript: it has no data.pkl")
        root = pickled.removesuffix("data.pkl")
        module = _Unpickler(archive, root, str(path)).load()
        return dict(_tensors(module, _Declarations(archive, root), ""))


class _Module:
    """A module or other object of the archive: its attributes alone. name: of its class."""

    name = ""

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}


class _Unpickler(pickle.Unpickler):
    """Unpickler of data.pkl, for which no code is imported."""

    def __init__(self, archive: zipfile.ZipFile, root: str, source: str):
        super().__init__(io.BytesIO(archive.read(f"{root}data.pkl")))
        self._archive, self._root, self._source = archive, root, source

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full.startswith("__torch__."):
            return type("Module", (_Module,), {"name": full})
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if full in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
            return _rebuilt
        if full == "torch._utils._rebuild_parameter":
            return lambda tensor, *_: tensor
        if full == "collections.OrderedDict":
            return collections.OrderedDict
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return lambda values, *_: values
        raise UserError(f"{self._source} asks for {full!r}, which no tensors need: it is not read")

    def persistent_load(self, key: tuple) -> np.ndarray:
        kind, dtype, name, *_ = key
        if kind != "storage" or not isinstance(dtype, type) or not re.fullmatch(r"\w+", str(name)):
            raise UserError(f"{self._source} is damaged: it names no tensor's bytes")
        return np.frombuffer(self._archive.read(f"{self._root}data/{name}"), dtype)


def _rebuilt(storage: np.ndarray, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> np.ndarray:
    """Makes a tensor of a part of its bytes. Raises ValueError where it would read beyond them."""
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if min([offset, *shape, *strides], default=0) < 0 or (0 not in shape and last >= storage.size):
        raise ValueError(f"a tensor of shape {shape} is not within its {storage.size} numbers")
    steps = [stride * storage.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps).copy()


class _Declarations:
    """Names of a class's parameters and buffers, from the text of the archive's code."""

    def __init__(self, archive: zipfile.ZipFile, root: str):
        self._archive, self._root, self._known = archive, root, dict[str, set[str]]()

    def __getitem__(self, full: str) -> set[str]:
        if full not in self._known:
            module, _, name = full.rpartition(".")
            text = self._archive.read(f"{self._root}code/{module.replace('.', '/')}.py").decode()
            found = re.search(rf"^class {re.escape(name)}\(Module\):\n((?:  .*\n|\n)*)", text, re.MULTILINE)
            lists = DECLARED.findall(found.group(1)) if found else []
            self._known[full] = {str(word) for words in lists for word in ast.literal_eval(words)}
        return self._known[full]


def _tensors(module: _Module, declared: _Declarations, prefix: str) -> Iterator[tuple[str, np.ndarray]]:
    names = declared[module.name]
    for name, value in module.state.items():
        if isinstance(value, _Module):
            yield from _tensors(value, declared, f"{prefix}{name}.")
        elif isinstance(value, np.ndarray) and name in names:
            yield f"{prefix}{name}", value
