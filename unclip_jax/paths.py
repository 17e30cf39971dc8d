"""Decides what is a path: a place on a disk, or in a bucket of Google Cloud Storage, gs://BUCKET/FOLDER.

Whatever a user names goes through `to_path`, and is from then on a `pathlib.Path` or, in a bucket, an `epath.Path`,
which is used in the same way. Below, Path means either. Buckets need `pip install 'unclip_jax[gcs]'`.
"""

import contextlib
import functools
import hashlib
import logging
import os
import re
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

from unclip_jax.errors import UserError

SECONDS_BETWEEN_LINES = 10.0
CHUNK = 2**24  # bytes copied at once
SPARE = 2**30  # bytes of a disk that copies leave free
GIB = 2**30


def to_path(text: str | os.PathLike) -> Path:
    """The path that a user named; ~ is the home folder. Raises UserError for what is neither on a disk nor in a bucket.

    The first path in a bucket asks whether the bucket can be read at all, and raises UserError where it cannot.
    """
    text = os.fspath(text)
    if in_bucket := re.match("gs://([^/]+)", text):
        from etils import epath

        _check_bucket(in_bucket.group(1))
        return epath.Path(text)
    if re.match("gs:|[A-Za-z][A-Za-z0-9+.-]*://", text):
        raise UserError(f"{text}: expected a place on a disk, or gs://BUCKET/NAME in a bucket of Google Cloud Storage")
    return Path(text).expanduser()


def is_remote(path: str | os.PathLike) -> bool:
    """Tells whether a path is in a bucket."""
    return os.fspath(path).startswith("gs://")


def same(one: str | Path, other: str | Path) -> bool:
    """Tells whether two names mean one place."""
    found = [path if is_remote(path) else path.resolve() for path in map(to_path, (one, other))]
    return found[0] == found[1]


def output_folder(name: str, option: str = "--out") -> Path:
    """The folder that `option` names, which need not exist. Raises UserError where it cannot be one, or be written."""
    folder = to_path(name)
    if is_remote(folder):
        if folder.is_file():
            raise UserError(f"{option} {name} is a file: give a folder")
        probe = folder / f".unclip_jax_{uuid.uuid4().hex}"
        with _bucket_errors(f"{option} {name} cannot be written"):
            probe.write_bytes(b"may this be written?")
            probe.unlink()
        return folder
    places = (folder, *folder.parents)
    if any(place.exists() and not place.is_dir() for place in places):
        raise UserError(f"{option} {name} is a file or lies below one: give a folder")
    there = next((place for place in places if place.exists()), None)
    if there and not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{option} {name} cannot be written: no permission to write in {there}; give another folder")
    return folder


def write_bytes(path: Path, content: bytes, alone: bool = False) -> None:
    """Writes a file and the folders it needs: all of it or nothing, also for whoever is killed meanwhile, or reads.

    alone: no other process writes this file; what was left half written is then overwritten by the next try.
    """
    if is_remote(path):
        path.write_bytes(content)  # an object appears when its upload is complete
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with _beside(path, alone) as beside:
        beside.write_bytes(content)


def files_below(folder: Path) -> list[str]:
    """Names of all files below a folder, as "sub/folder/name", folder by folder in order of their names."""
    if is_remote(folder):
        names = list(_listed(folder))
    else:
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return sorted(names, key=lambda name: name.split("/"))


def copy(files: Sequence[tuple[Path, Path]], label: str) -> None:
    """Copies files, (source, target) each, one after another; a target appears whole or not at all.

    What takes longer is said on stderr now and then, as `label`.
    """
    progress = _Progress(sum(_size(source) for source, _ in files), label)
    for source, target in files:
        if is_remote(target):
            _copy(source, target, progress)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            with _beside(target) as beside:
                _copy(source, beside, progress)


def copy_folder(source: Path, target: Path, last: str) -> None:
    """Copies a folder's files into another. last: the file by which readers know that all others are there."""
    names = sorted(files_below(source), key=lambda name: name == last)
    copy([(source / name, target / name) for name in names], f"copying {source}")


@contextlib.contextmanager
def local_copy(path: Path) -> Iterator[Path]:
    """A file on a disk: itself or, of one in a bucket, a copy that is gone afterwards."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="unclip_jax_") as folder:
        copied = Path(folder) / path.name
        copy([(path, copied)], f"reading {path}")
        yield copied


def on_disk(files: Sequence[Path], label: str) -> list[Path]:
    """Files that can be mapped into memory: those given or, of files in one folder of a bucket, copies of them.

    Copies are kept in UNCLIP_CACHE, by default ~/.cache/unclip_jax/files, and found there again as long as the bucket
    holds the same objects; what is there may be deleted whenever nothing runs. Raises UserError where the disk is full.
    """
    if not files or not is_remote(files[0]):
        return list(files)
    cache = to_path(os.environ.get("UNCLIP_CACHE") or "~/.cache/unclip_jax/files")
    listed, copies, missing, size = _listed(files[0].parent), [], [], 0
    for file in files:
        info = listed[file.name]
        of_version = hashlib.sha256(f"{file} {info['generation']}".encode()).hexdigest()
        copies.append(cache / f"{of_version[:32]}-{file.name}")
        if not copies[-1].exists() or copies[-1].stat().st_size != int(info["size"]):
            missing.append((file, copies[-1]))
            size += int(info["size"])
    if missing:
        cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(cache).free - SPARE
        if size > free:
            raise UserError(f"{files[0].parent} needs {size / GIB:.1f} GiB more on the disk of {cache}, which has "
                            f"{max(free, 0) / GIB:.1f}: set UNCLIP_CACHE to a folder on a larger one")  # fmt: skip
        copy(missing, label)
    return copies


@contextlib.contextmanager
def _beside(path: Path, alone: bool = False) -> Iterator[Path]:
    """A name beside `path`, on the same file system; what is written there becomes `path` at the end."""
    beside = path.with_name(f"{path.name}.tmp" if alone else f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield beside
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _copy(source: Path, target: Path, progress: "_Progress") -> None:
    with source.open("rb") as read, target.open("wb") as write:
        while chunk := read.read(CHUNK):
            write.write(chunk)
            progress.advance(len(chunk))


def _size(path: Path) -> int:
    found = path.stat()
    return found.length if is_remote(path) else found.st_size


class _Progress:
    """Says on stderr how much is copied and how long the rest takes."""

    def __init__(self, total: int, label: str):
        self._total, self._label, self._done = total, label, 0
        self._began = self._said = time.monotonic()

    def advance(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._said > SECONDS_BETWEEN_LINES:
            self._said = now
            left = timedelta(seconds=round((self._total - self._done) * (now - self._began) / self._done))
            done, total = (f"{size / GIB:.2f}" for size in (self._done, self._total))
            print(f"{self._label}: {done} of {total} GiB, left {left}", file=sys.stderr, flush=True)


def _listed(folder: Path) -> dict[str, dict]:
    """Every object below a folder of a bucket, by its name from there, with what the bucket tells about it."""
    import fsspec

    start = f"{str(folder).removeprefix('gs://').rstrip('/')}/"
    found = fsspec.filesystem("gcs").find(start, detail=True)
    return {name.removeprefix(start): info for name, info in found.items() if not name.endswith("/")}


@functools.cache
def _check_bucket(bucket: str) -> None:
    """Raises UserError where a bucket cannot be read."""
    try:
        import fsspec
        import gcsfs  # noqa: F401 - fsspec opens gs:// through it
    except ImportError as error:
        raise UserError(f"gs://{bucket} needs more packages: pip install 'unclip_jax[gcs]'") from error
    # epath would go through TensorFlow where that is installed. Lists kept in memory would hide what other processes
    # write, and what Orbax writes without gcsfs.
    os.environ.setdefault("EPATH_USE_TF", "false")
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    with _bucket_errors(f"gs://{bucket} cannot be read"):
        fsspec.filesystem("gcs").call("GET", "b/{}/o", bucket, maxResults=1)


@contextlib.contextmanager
def _bucket_errors(wrong: str) -> Iterator[None]:
    """Turns whatever gcsfs raises inside into one line that begins with `wrong`."""
    log = logging.getLogger("gcsfs")  # it would print the traceback
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    except Exception as error:  # of gcsfs, aiohttp, requests and google-auth, whose errors have no common type
        said = " ".join(str(error).split())[:200] or type(error).__name__
        if isinstance(error, FileNotFoundError):
            advice = "there is no such bucket: correct its name, or make it by gcloud storage buckets create"
        elif said.startswith("Forbidden") or getattr(error, "code", None) in (401, 403, "401", "403"):
            advice = (f"this account may not ({said}): log in by gcloud auth application-default login, and give the "
                      "account the role Storage Object User")  # fmt: skip
        else:
            advice = f"{type(error).__name__}: {said}; is there a network, and are the credentials right?"
        raise UserError(f"{wrong}: {advice}") from error
    finally:
        log.setLevel(before)
