"""Reads files of PyTorch weights: tensors by name, one at a time, with an account of those missing or never read."""

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unclip_jax.errors import UserError
from unclip_jax.foreign import parsed_json
from unclip_jax.paths import to_path
from unclip_jax.pretrained.torchscript import is_torchscript, read_torchscript

# Names by which Hugging Face's libraries store weights, those in full precision and in one file first.
WEIGHT_FILES = tuple(
    f"{name}{form.format(variant)}"
    for variant in ("", ".fp16", ".bf16")
    for form in ("{}.safetensors", ".safetensors.index{}.json", "{}.bin")
    for name in ("diffusion_pytorch_model", "model", "pytorch_model")
)
MAX_LISTED = 20  # tensors that an error names


class StateDict:
    """Tensors by name, given out as float32 arrays; `finish` checks that all of them were taken.

    tensors: name → NumPy array, PyTorch tensor or `_LazyTensor`.
    source: where they come from, for error messages.
    prefix: of the names of the tensors to read, which are asked for without it; other tensors are ignored.
    """

    def __init__(self, tensors: Mapping[str, Any], source: str, prefix: str = ""):
        self.source = source
        self._tensors, self._prefix = tensors, prefix
        self._unread = {name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
        self._names = frozenset(self._unread)
        self._wrong: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape, to read the architecture from. Raises UserError if the tensor is missing."""
        if name not in self:
            raise UserError(f"{self.source} has no tensor {self._prefix}{name}: it is not the model that was named")
        return tuple(self._tensors[self._prefix + name].shape)

    def take(self, name: str, *shape: int) -> np.ndarray:
        """Returns a tensor as float32; zeros if it is missing or has another shape. `finish` will report that, and
        values that are not finite."""
        self._unread.discard(name)
        if name not in self:
            self._wrong.append(f"missing {self._prefix}{name}")
            return np.zeros(shape, np.float32)
        value = to_numpy(self._tensors[self._prefix + name])
        if value.shape != shape:
            self._wrong.append(f"{self._prefix}{name} is {value.shape}, expected {shape}")
            return np.zeros(shape, np.float32)
        if not np.isfinite(value).all():
            self._wrong.append(f"{self._prefix}{name} has {np.count_nonzero(~np.isfinite(value))} values not finite")
        return value

    def skip(self, *names: str) -> None:
        """Marks tensors that are not needed, so that `finish` does not report them."""
        self._unread.difference_update(names)

    def finish(self) -> None:
        """Raises one UserError that lists all tensors that were missing, misshapen, not finite or never taken."""
        wrong = self._wrong + [f"unexpected {self._prefix}{name}" for name in sorted(self._unread)]
        if wrong:
            more = [f"and {len(wrong) - MAX_LISTED} more"] if len(wrong) > MAX_LISTED else []
            raise UserError(f"{self.source} does not fit the model: {'; '.join(wrong[:MAX_LISTED] + more)}")


def count_blocks(weights: StateDict, pattern: str) -> int:
    """Counts a network's blocks: how many names `pattern.format(0)`, `pattern.format(1)`, … there are in a row.

    Raises UserError where there is none.
    """
    weights.shape(pattern.format(0))
    count = 1
    while pattern.format(count) in weights:
        count += 1
    return count


def to_numpy(tensor: Any) -> np.ndarray:
    """Converts a NumPy array or a PyTorch tensor of any float type to float32, without a copy if it is float32."""
    if not isinstance(tensor, np.ndarray):
        tensor = tensor.detach().float().numpy()
    return np.asarray(tensor, np.float32)


def read_tensors(path: str | Path) -> dict[str, Any]:
    """Reads the tensors of a .safetensors or PyTorch file by name, as `StateDict` takes them.

    path: of one file, or of an index of several, which ends in .json. Where the file has a part
    "state_dict", its tensors alone are read. "module." before all names, which PyTorch's parallel training puts there,
    is left out. PyTorch files but archives of TorchScript need torch; they are read with `weights_only`, so that none
    of their code runs, and mapped rather than loaded. Raises UserError for a file that is missing, damaged or holds no
    tensors.
    """
    path = to_path(path)
    if not path.is_file():
        raise UserError(f"no weights at {path}: there is no such file")
    _check_kind(path)
    if path.suffix == ".json":
        tensors = _read_shards(path)
    else:
        tensors = _read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    if isinstance(tensors, Mapping) and isinstance(tensors.get("state_dict"), Mapping):
        tensors = tensors["state_dict"]
    if not isinstance(tensors, Mapping) or not tensors or not all(hasattr(v, "shape") for v in tensors.values()):
        raise UserError(f"{path} is not a state dict: expected tensors by name; give the file of the model's weights")
    wrapped = all(name.startswith("module.") for name in tensors)
    return {name.removeprefix("module.") if wrapped else name: value for name, value in tensors.items()}


def _check_kind(path: Path) -> None:
    """Raises UserError for what is often downloaded in place of weights."""
    with path.open("rb") as file:
        start = file.read(200).lstrip().lower()
    if start.startswith(b"version ") and b"git-lfs" in start:
        raise UserError(f"{path} is a pointer of Git LFS, not the weights themselves: run git lfs pull")
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(f"{path} is a web page, not weights: download it again")


def _read_shards(index: Path) -> dict[str, Any]:
    """Reads the tensors of all files that an index names, which lie beside it."""
    try:
        files = set(parsed_json(index.read_text())["weight_map"].values())
        beside = [index.with_name(name) for name in sorted(files) if name == to_path(name).name]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} is no index of safetensors files: it names no weight_map") from error
    if len(beside) < len(files):
        raise UserError(f"{index} names files that are not beside it")
    tensors = {}
    for path in beside:
        if not path.is_file():
            raise UserError(f"{index} names {path.name}, which is not beside it: download it too")
        _check_kind(path)
        tensors |= _read_safetensors(path)
    return tensors


class _LazyTensor:
    """One tensor of a safetensors file: its shape now, its numbers when they are asked for.

    To `to_numpy` it looks like a PyTorch tensor. The file is opened anew for each tensor: kept open, it would in the
    end be in memory as a whole, beside the converted parameters.
    """

    def __init__(self, path: Path, name: str, shape: tuple[int, ...]):
        self._path, self._name, self.shape = path, name, shape

    def detach(self) -> "_LazyTensor":
        return self

    def float(self) -> "_LazyTensor":
        return self

    def numpy(self) -> np.ndarray:
        from safetensors import safe_open

        with safe_open(self._path, framework="numpy") as file:
            return np.asarray(file.get_tensor(self._name), np.float32)


def _read_safetensors(path: Path) -> dict[str, _LazyTensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or cut short ({error}): download it again") from error
    return {name: _LazyTensor(path, name, shape) for name, shape in shapes.items()}


def read_torch(path: Path) -> Any:
    """Reads whatever a PyTorch file holds, without running its code. Raises UserError where that fails."""
    if is_torchscript(path):
        try:
            return read_torchscript(path)
        except (OSError, KeyError, ValueError, TypeError, IndexError, AttributeError, EOFError, zipfile.BadZipFile,
                pickle.UnpicklingError) as error:  # fmt: skip
            raise UserError(f"{path} is a damaged archive of TorchScript ({error!r}): download it again") from error
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{path} is a PyTorch file: reading it needs torch (pip install torch)") from error
    try:
        # Files older than PyTorch 1.6 are no zip files and cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises nearly anything for a file that is not its own
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read as a PyTorch state dict ({reason})") from error
