"""Decides what is a path: a place on a disk, in a bucket of Google Cloud Storage, gs://BUCKET/FOLDER, on the Hugging
Face Hub, hf:OWNER/NAME, or in this package, shipped:MODEL.

Every path that a user names goes through `to_path`, and is from then on a `pathlib.Path` or, in a bucket, an
`epath.Path`, which is used in the same way. In this package Path means either. Buckets need
`pip install 'unclip_jax[gcs]'`.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import logging
import os
import re
import shutil
import socket
import stat
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

from unclip_jax import hub
from unclip_jax.errors import StorageError, UserError

SHIPPED = "shipped:"  # the weights that come with this package
SECONDS_BETWEEN_LINES = 10.0
CHUNK_BYTES = 2**24  # copied at once
SPARE_BYTES = 2**30  # of a disk, which copies leave free
GIB = 2**30
STORAGE_ERRORS = [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE]
STORAGE_ERRORS += [errno.EFBIG, errno.EMFILE, errno.ENAMETOOLONG]


def to_path(text: str | os.PathLike[str]) -> Path:
    """Makes the path that a user named; ~ is the home folder.

    shipped:MODEL is a bundle that comes with this package, and shipped: alone all of them. A place on the Hugging Face
    Hub, hf:OWNER/NAME, is fetched, and is then a folder on the disk. Raises UserError for a name that is none of these,
    for what cannot be fetched and, at the first path in a bucket, where that bucket cannot be read.
    """
    text = os.fspath(text)
    if text.startswith(SHIPPED):
        return Path(__file__).parent / "weights" / text.removeprefix(SHIPPED)
    if text.startswith(hub.PREFIX):
        return hub.pull(text)
    if in_bucket := re.match("gs://([^/]+)", text):
        from etils import epath

        _check_bucket(in_bucket.group(1))
        return epath.Path(text)
    if re.match("gs:|[A-Za-z][A-Za-z0-9+.-]*://", text):
        raise UserError(f"{text}: expected a place on a disk, or gs://BUCKET/NAME in a bucket of Google Cloud Storage")
    return Path(text).expanduser()


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Tells whether a path is in a bucket."""
    return os.fspath(path).startswith("gs://")


def same_place(one: str | Path, other: str | Path) -> bool:
    """Tells whether two names mean one place."""
    found = [path if is_remote(path) else path.resolve() for path in map(to_path, (one, other))]
    return found[0] == found[1]


def output_folder(name: str, option: str = "--out") -> Path:
    """Returns the path of the folder `name`, which a flag gave and which need not exist yet.

    option: the flag, for error messages. Raises UserError where it cannot be a folder, or cannot be written.
    """
    if not name.strip():
        raise UserError(f"{option} is empty: give a folder, such as {option}=out")
    if name.startswith(hub.PREFIX):
        raise UserError(f"{option} {name}: the Hub is read only here: give a folder, and push it there when it is done")
    if name.startswith(SHIPPED):
        raise UserError(f"{option} {name}: what comes with this package is read only: give a folder")
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


def written_by_others(folder: Path) -> bool:
    """Makes a folder on a disk for this user alone, where there is none; tells whether others may write to it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    theirs = found.st_mode & stat.S_IWOTH or (found.st_mode & stat.S_IWGRP and found.st_gid != os.getgid())
    return bool(theirs) or found.st_uid not in (os.getuid(), 0)


def write_bytes(path: Path, content: bytes, alone: bool = False) -> None:
    """Writes a file and the folders above it. The file appears as a whole, whoever reads it or is killed meanwhile.

    alone: no other process writes this file. What a killed process left half written is then overwritten next time.
    """
    if is_remote(path):
        path.write_bytes(content)  # an object appears when its upload is complete
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with _beside(path, alone) as beside:
        beside.write_bytes(content)


@contextlib.contextmanager
def storage_errors(folder: str, advice: str) -> Iterator[None]:
    """Turns errors of storage within the context, such as a full disk, into a StorageError of one line. Others pass.

    folder: that is written to, named where the error names no file. advice: ends the line.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        found: BaseException | None = error
        while found:
            if isinstance(found, OSError) and found.errno in STORAGE_ERRORS:
                raise StorageError(f"{found.filename or folder}: {os.strerror(found.errno)}; {advice}") from error
            # Libraries in C++ give the system's text alone.
            said = next((text for text in map(os.strerror, STORAGE_ERRORS) if text in str(found)), "")
            if said:
                raise StorageError(f"{folder}: {said}; {advice}") from error
            found = found.__cause__ or found.__context__
        raise


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Keeps a folder on a disk for this process alone; other processes get a UserError. A process that has died owns
    nothing. A folder in a bucket is not kept."""
    if is_remote(folder):
        yield
        return
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / ".owner"
    while True:
        with lock.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                owner = file.read().strip() or "another process"
                raise UserError(f"{folder} is in use by {owner}: wait for its end, or give another folder") from error
            if not (lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat())):
                continue  # an owner that just ended has deleted it
            file.truncate(0)
            file.write(f"process {os.getpid()} of {socket.gethostname()}")
            file.flush()
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # what was written stays, with the folders that it is in
                    for place in made:
                        place.rmdir()
            return


def files_below(folder: Path) -> list[str]:
    """Lists all files below a folder by name, as "sub/folder/name", sorted folder by folder.

    Linked folders are entered too, each folder once; of several ways to one, the way without links counts.
    """
    if is_remote(folder):
        return sorted(_listed(folder), key=_by_folder)
    names, entered, waiting, links = [], set(), [(str(folder), "")], []
    while waiting or links:
        path, prefix = waiting.pop() if waiting else links.pop(0)
        try:
            found = os.stat(path)
            if (found.st_dev, found.st_ino) in entered:
                continue
            entered.add((found.st_dev, found.st_ino))
            with os.scandir(path) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if entry.is_dir():
                        (links if entry.is_symlink() else waiting).append((entry.path, f"{prefix}{entry.name}/"))
                    elif entry.is_file():
                        names.append(f"{prefix}{entry.name}")
        except OSError as error:
            print(f"left out, as it cannot be read: {error}", file=sys.stderr, flush=True)
    return sorted(names, key=_by_folder)


def kept_file(path: Path) -> Path:
    """Returns where a file lies that `keep_file` wrote: at `path`, or in the cache; `path` where there is none."""
    return _in_cache(path) if _in_cache(path).exists() and not path.exists() else path


def keep_file(path: Path, content: bytes) -> Path:
    """Writes a file that can be made again, or where that place cannot be written, the same in the cache.

    The cache is the folder of `on_disk`. Returns where the file lies.
    """
    try:
        write_bytes(path, content)
        return path
    except Exception:  # of a disk or of a bucket, for want of permission or of room
        write_bytes(_in_cache(path), content)
        return _in_cache(path)


def copy_files(files: Sequence[tuple[Path, Path]], label: str) -> None:
    """Copies files, each (source, target), one after another; a target appears as a whole or not at all.

    label: begins the lines on stderr that report progress every SECONDS_BETWEEN_LINES.
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
    """Copies a folder's files into another folder.

    last: name of the file to copy last, by which readers know that all others are there.
    """
    names = sorted(files_below(source), key=lambda name: name == last)
    copy_files([(source / name, target / name) for name in names], f"copying {source}")


@contextlib.contextmanager
def local_copy(path: Path) -> Iterator[Path]:
    """Yields a file on a disk: `path` itself or, if it is in a bucket, a copy that is deleted afterwards."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="unclip_jax_") as folder:
        copied = Path(folder) / path.name
        copy_files([(path, copied)], f"reading {path}")
        yield copied


def on_disk(files: Sequence[Path], label: str) -> list[Path]:
    """Returns files on a disk, to be mapped into memory: those given or, if they are in a bucket, copies of them.

    files: of one folder. label: as in `copy_files`. Copies are kept in UNCLIP_CACHE, by default
    ~/.cache/unclip_jax/files, and found there again as long as the bucket holds the same objects; they may be deleted
    whenever nothing runs. Raises UserError where the disk has no room for them.
    """
    if not files or not is_remote(files[0]):
        return list(files)
    cache = _cache()
    listed, copies, missing, size = _listed(files[0].parent), [], [], 0
    for file in files:
        info = listed[file.name]
        of_version = hashlib.sha256(os.fsencode(f"{file} {info['generation']}")).hexdigest()
        copies.append(cache / f"{of_version[:32]}-{file.name}")
        if not copies[-1].exists() or copies[-1].stat().st_size != int(info["size"]):
            missing.append((file, copies[-1]))
            size += int(info["size"])
    if missing:
        cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(cache).free - SPARE_BYTES
        if size > free:
            raise UserError(f"{files[0].parent} needs {size / GIB:.1f} GiB more on the disk of {cache}, which has "
                            f"{max(free, 0) / GIB:.1f}: set UNCLIP_CACHE to a folder on a larger one")  # fmt: skip
        copy_files(missing, label)
    return copies


def _cache() -> Path:
    """Returns the folder of this machine for files that may be deleted whenever nothing runs."""
    return to_path(os.environ.get("UNCLIP_CACHE") or "~/.cache/unclip_jax/files")


def _in_cache(path: Path) -> Path:
    return _cache() / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}-{path.name}"


def _by_folder(name: str) -> list[str]:
    return name.split("/")


@contextlib.contextmanager
def _beside(path: Path, alone: bool = False) -> Iterator[Path]:
    """Yields a path beside `path`, so on the same file system; the file written there is renamed to `path` at the end.

    alone: as in `write_bytes`.
    """
    beside = path.with_name(f"{path.name}.tmp" if alone else f".{path.name}.{uuid.uuid4().hex}.tmp")
    beside.unlink(missing_ok=True)  # of an earlier run, or a link that leads elsewhere
    try:
        yield beside
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _copy(source: Path, target: Path, progress: "_Progress") -> None:
    with source.open("rb") as read, target.open("wb") as write:
        while chunk := read.read(CHUNK_BYTES):
            write.write(chunk)
            progress.advance(len(chunk))


def _size(path: Path) -> int:
    found = path.stat()
    return found.length if is_remote(path) else found.st_size


class _Progress:
    """Reports on stderr how much has been copied and how long the rest will take. total: bytes."""

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
    """Lists every object below a folder of a bucket: its name from that folder on → facts from the bucket."""
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
    # epath would use TensorFlow where that is installed. Listings kept in memory would hide files that other processes
    # write, or that Orbax writes without gcsfs.
    os.environ.setdefault("EPATH_USE_TF", "false")
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    with _bucket_errors(f"gs://{bucket} cannot be read"):
        fsspec.filesystem("gcs").call("GET", "b/{}/o", bucket, maxResults=1)


@contextlib.contextmanager
def _bucket_errors(wrong: str) -> Iterator[None]:
    """Turns any error of gcsfs within the context into a UserError whose line begins with `wrong`."""
    logs = [logging.getLogger(name) for name in ("gcsfs", "google.auth")]  # which would print lines of their own
    before = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.CRITICAL)
    try:
        yield
    except Exception as error:  # of gcsfs, aiohttp, requests and google-auth, whose errors have no common type
        said = " ".join(str(error).split())[:200] or type(error).__name__
        if isinstance(error, FileNotFoundError):
            advice = "there is no such bucket: correct its name, or make it with gcloud storage buckets create"
        elif said.startswith("Forbidden") or getattr(error, "code", None) in (401, 403, "401", "403"):
            advice = (f"this account may not ({said}): log in with gcloud auth application-default login, and give the "
                      "account the role Storage Object User")  # fmt: skip
        else:
            advice = f"{type(error).__name__}: {said}; is there a network, and are the credentials right?"
        raise UserError(f"{wrong}: {advice}") from error
    finally:
        for log, level in zip(logs, before, strict=True):
            log.setLevel(level)
