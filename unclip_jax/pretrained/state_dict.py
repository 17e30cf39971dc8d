"""Public weights as they come: a file's tensors by name, read one at a time and all accounted for."""

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from unclip_jax.errors import UserError
from unclip_jax.paths import to_path

LISTED = 20


class StateDict:
    """Tensors by name, each given out as a float32 array. Names that were never asked for are known in the end.

    tensors: anything that gives an array for a name; a prefix is cut off the names, the others are not seen.
    """

    def __init__(self, tensors: Mapping, source: str, prefix: str = ""):
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
        """Raises UserError for a name that is not there: what the architecture is read from must be."""
        if name not in self:
            raise UserError(f"{self.source} has no tensor {self._prefix}{name}: it is not the model that was named")
        return tuple(self._tensors[self._prefix + name].shape)

    def take(self, name: str, *shape: int) -> np.ndarray:
        """The tensor as float32; zeros for one that is missing or has another shape, which is noted for `finish`."""
        self._unread.discard(name)
        if name not in self:
            self._wrong.append(f"missing {self._prefix}{name}")
            return np.zeros(shape, np.float32)
        value = to_numpy(self._tensors[self._prefix + name])
        if value.shape != shape:
            self._wrong.append(f"{self._prefix}{name} is {value.shape}, expected {shape}")
            return np.zeros(shape, np.float32)
        return value

    def skip(self, *names: str) -> None:
        """Marks tensors that are known and not needed."""
        self._unread.difference_update(names)

    def finish(self) -> None:
        """Raises one UserError that lists all that was missing, misshapen or never taken."""
        wrong = self._wrong + [f"unexpected {self._prefix}{name}" for name in sorted(self._unread)]
        if wrong:
            more = [f"and {len(wrong) - LISTED} more"] if len(wrong) > LISTED else []
            raise UserError(f"{self.source} does not fit the model: {'; '.join(wrong[:LISTED] + more)}")


def depth(weights: StateDict, pattern: str) -> int:
    """Counts the names `pattern.format(0)`, `pattern.format(1)`, … there are."""
    count = 0
    while pattern.format(count) in weights:
        count += 1
    return count


def to_numpy(tensor) -> np.ndarray:
    """A NumPy array or a PyTorch tensor of any float type as float32, without a copy where it is one."""
    if not isinstance(tensor, np.ndarray):
        tensor = tensor.detach().float().numpy()
    return np.asarray(tensor, np.float32)


def read(path: str | Path) -> dict:
    """A .safetensors or PyTorch file → its tensors by name; those of `state_dict` where the file has such a part.

    PyTorch files are read with `weights_only`, so that none of their code runs, and mapped rather than loaded; they
    need torch, which .safetensors do not. Raises UserError for a file that is missing, damaged or holds no tensors.
    """
    path = to_path(path)
    if not path.is_file():
        raise UserError(f"no weights at {path}: there is no such file")
    tensors = _read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    if isinstance(tensors, Mapping) and isinstance(tensors.get("state_dict"), Mapping):
        tensors = tensors["state_dict"]
    if not isinstance(tensors, Mapping) or not tensors or not all(hasattr(v, "shape") for v in tensors.values()):
        raise UserError(f"{path} is not a state dict: expected tensors by name")
    return dict(tensors)


class _LazyTensor:
    """One tensor of a safetensors file: its shape now, its numbers when asked for.

    The file is opened for each: kept open, it would in the end be in memory as a whole, beside what was made of it.
    """

    def __init__(self, path: Path, name: str, shape: tuple[int, ...]):
        self._path, self._name, self.shape = path, name, shape

    def detach(self):
        return self

    def float(self):
        return self

    def numpy(self) -> np.ndarray:
        from safetensors import safe_open

        with safe_open(self._path, framework="numpy") as file:
            return np.asarray(file.get_tensor(self._name), np.float32)


def _read_safetensors(path: Path) -> dict:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or cut short ({error}): download it again") from error
    return {name: _LazyTensor(path, name, shape) for name, shape in shapes.items()}


def read_torch(path: Path):
    """Reads a PyTorch file, for `read`."""
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{path} is a PyTorch file: reading it needs torch (pip install torch)") from error
    try:
        if _is_torchscript(path):
            return torch.jit.load(path, map_location="cpu").state_dict()
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises nearly anything for a file that is not its own
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read as a PyTorch state dict ({reason})") from error


def _is_torchscript(path: Path) -> bool:
    """Tells whether a PyTorch file is an archive of TorchScript, as OpenAI publishes CLIP, instead of a pickle."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())
