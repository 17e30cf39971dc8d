"""Finds files by patterns, and reads them or parts of them, on a disk or in a bucket."""

import glob
import os
import re
from pathlib import Path

from unclip_jax.errors import UserError
from unclip_jax.paths import is_remote, to_path


def files_matching(pattern: str, ending: str) -> tuple[Path, dict[str, tuple[int, str]]]:
    """Finds files by a pattern with * and ?, or ** for any folders; or all of a folder that end in `ending`.

    Returns the last folder before any wildcard, and for each file, by its name from there on and in this order, its
    size in bytes and the version of its content. Raises UserError where there are none.
    """
    start = re.match(r"([^*?[]*/)?", pattern)[0]
    folder, wild, wanted = to_path(start or "."), pattern[len(start) :], f"{start}*{ending}"
    if not re.search(r"[*?[]", wild) and to_path(pattern).is_dir():
        folder, wild = to_path(pattern), f"**/*{ending}"
    if is_remote(folder):
        import fsspec

        start = f"{str(folder).removeprefix('gs://').rstrip('/')}/"
        listed = fsspec.filesystem("gcs").glob(start + wild, detail=True)
        found = {name.removeprefix(start): (int(info["size"]), str(info["generation"]))
                 for name, info in listed.items() if info["type"] == "file"}  # fmt: skip
    else:
        places = [(name, folder / name) for name in glob.glob(wild, root_dir=folder, recursive=True)]
        stats = {name: place.stat() for name, place in places if place.is_file()}
        found = {name: (stat.st_size, str(stat.st_mtime_ns)) for name, stat in stats.items()}
    if not found:
        raise UserError(f"no files {pattern}: expected a folder of {ending} files, or such as {wanted}")
    return folder, {name: found[name] for name in sorted(found, key=lambda name: name.split("/"))}


def read_file(path: Path) -> bytes:
    """Reads a file, in one request where it is in a bucket: its path's own `read_bytes` asks for what it is first."""
    if is_remote(path):
        import fsspec

        return fsspec.filesystem("gcs").cat_file(str(path))
    return path.read_bytes()


def read_part(path: Path, start: int, length: int) -> bytes:
    """Reads bytes from the middle of a file, in one request where it is in a bucket. Raises OSError past its end."""
    if is_remote(path):
        import fsspec

        data = fsspec.filesystem("gcs").cat_file(str(path), start, start + length)
    else:
        with path.open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), length, start)
    if len(data) != length:
        raise OSError(f"{path} ends before byte {start + length}")
    return data
