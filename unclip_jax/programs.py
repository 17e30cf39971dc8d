"""Keeps compiled programs on the disk, ready to run: a process that finds one neither traces nor compiles it.

JAX's own cache finds a program by its text, and to make that takes longer than to draw a small picture. Here it is
found by all that the text is made of: the code of this package, versions, the machine, JAX's settings, what the caller
says of the function, and the kinds of the arguments. Where any of these is another, so is the program's name.
"""

import contextlib
import functools
import hashlib
import json
import os
import platform
import threading
import zlib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.sharding import Mesh

from unclip_jax.paths import to_path, write_bytes

FOUND, COMPILED = "/unclip_jax/programs/found", "/unclip_jax/programs/compiled"  # events of JAX's monitoring
PACKAGES = ("jax", "jaxlib", "flax", "numpy")
CPU, OF_CPU = "/proc/cpuinfo", ("model name", "flags", "Features")  # where Linux says what the processor can do
ENABLED = "jax_enable_compilation_cache"

folder: Path | None = None  # where programs are kept, which this user alone may write to; None: nowhere
_compiles = threading.Lock()


class Kept:
    """A jitted function that returns one array, with its programs kept where it runs on one device.

    make: makes the function, once a program has to be traced. about: all that the function depends on besides its
    arguments and what `environment` knows.
    """

    def __init__(self, make: Callable[[], Callable], mesh: Mesh, *about: str):
        self.jitted, self._mesh, self._about = functools.cache(make), mesh, (str(mesh.axis_names), *about)
        self._ready: dict[str, Callable] = {}

    def __call__(self, *args: Any) -> jax.Array:
        device = self._mesh.devices.flat[0]
        if folder is None or self._mesh.size > 1 or jax.process_count() > 1 or not environment(device):
            return self.jitted()(*args)
        leaves = ((jax.tree_util.keystr(path), jax.typeof(leaf)) for path, leaf in jax.tree.leaves_with_path(args))
        kinds = (f"{name} {kind.dtype} {kind.shape} {kind.weak_type}" for name, kind in leaves)
        name = _digest(environment(device), *_settings(), *self._about, *kinds)
        if name not in self._ready:
            self._ready[name] = _read(folder / name, args, device) or self._compiled(folder / name, args)
        return self._ready[name](*args)

    def _compiled(self, path: Path, args: tuple) -> Callable:
        """Compiles a program and keeps it, if it is of a kind that can be kept and there is room."""
        with _compiles, _without_cache():
            program = self.jitted().lower(*args).compile()
        jax.monitoring.record_event(COMPILED)
        with contextlib.suppress(ValueError, NotImplementedError, OSError):
            write_bytes(path, zlib.compress(serialize_executable.serialize(program)[0], 1))
        return program


def kept_value(make: Callable[[], Any], *about: str) -> Any:
    """Returns what `make()` does, a value that JSON holds, from the disk where it is kept. about: as of `Kept`."""
    device = jax.local_devices()[0]
    if folder is None or not environment(device):
        return make()
    path = folder / _digest(environment(device), *_settings(), *about)
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_bytes())
    value = make()
    with contextlib.suppress(OSError):
        write_bytes(path, json.dumps(value).encode())
    return value


def _read(path: Path, args: tuple, device: jax.Device) -> Callable | None:
    """Loads a program; None where there is none, or none that can be read."""
    trees = jax.tree.structure((args, {})), jax.tree.structure(0)
    try:
        content = zlib.decompress(path.read_bytes())
        program = serialize_executable.deserialize_and_load(content, *trees, execution_devices=[device])
    except Exception:  # there is no file, or a damaged one, whatever is in it
        return None
    jax.monitoring.record_event(FOUND)
    return program


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """Has JAX compile without its own cache: a program that comes from there cannot be stored again on a CPU."""
    before = getattr(jax.config, ENABLED)
    jax.config.update(ENABLED, False)
    reset_cache()  # JAX reads the setting once
    try:
        yield
    finally:
        jax.config.update(ENABLED, before)
        reset_cache()


@functools.cache
def environment(device: jax.Device) -> str:
    """Makes a digest of the code, the versions and the machine; "" where it is not known what the machine can do."""
    package = to_path(__file__).parent
    code = [_digest(str(path.relative_to(package)), path.read_text()) for path in sorted(package.rglob("*.py"))]
    try:
        cpu = {line for line in to_path(CPU).read_text().splitlines() if line.startswith(OF_CPU)}
    except FileNotFoundError:
        return ""
    versions = [platform.python_version(), *map(version, PACKAGES), device.client.platform_version]
    where = [device.platform, device.device_kind, str(device.id), str(jax.device_count())]
    return _digest(*code, *versions, *where, *sorted(cpu)) if code and cpu else ""


def _settings() -> list[str]:
    """Lists JAX's settings, and the variables that its compilers read."""
    names = sorted(name for name in jax.config.values if "cache" not in name)
    settings = [f"{name} {getattr(jax.config, name, jax.config.values[name])}" for name in names]
    variables = sorted(name for name in os.environ if "XLA" in name or "TPU" in name)
    return settings + [f"{name} {os.environ[name]}" for name in variables]


def _digest(*parts: str) -> str:
    """Makes a hex sha256 of texts, which tells apart where one ends and the next begins."""
    sha = hashlib.sha256()
    for part in parts:
        text = part.encode()
        sha.update(f"{len(text)} ".encode() + text)
    return sha.hexdigest()
