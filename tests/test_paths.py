"""Places on a disk and in a bucket: one is used like the other, and what cannot be used is one line."""

import errno
import importlib
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest

from unclip_jax import paths
from unclip_jax.errors import StorageError, UserError
from unclip_jax.paths import (
    copy_files,
    copy_folder,
    files_below,
    local_copy,
    on_disk,
    output_folder,
    owned,
    same_place,
    storage_errors,
    to_path,
    write_bytes,
    written_by_others,
)


@pytest.fixture(params=["disk", "bucket"])
def root(request, tmp_path):
    """An empty folder of each kind."""
    return tmp_path / "root" if request.param == "disk" else to_path(request.getfixturevalue("bucket"))


def test_weights_of_the_package_have_names():
    assert to_path("shipped:clip") == to_path("shipped:") / "clip" == Path(paths.__file__).parent / "weights" / "clip"
    with pytest.raises(UserError, match="--out shipped:clip: what comes with this package is read only: give a folder"):
        paths.output_folder("shipped:clip")


def test_home_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert to_path("~/runs/a") == Path("/home/someone/runs/a") and to_path("a:b/~c") == Path("a:b/~c")


@pytest.mark.parametrize("name", ["s3://bucket/x", "file:///x", "https://x/y", "gs:/bucket/x", "gs:x", "gs://", "gs:///x"])
def test_what_is_no_path_is_refused(name):
    with pytest.raises(UserError, match="expected a place on a disk, or gs://BUCKET/NAME"):
        to_path(name)


def test_a_path_in_a_bucket_keeps_its_name(bucket):
    path = to_path(f"{bucket}/a/b.png")
    assert str(path) == os.fspath(path) == f"{bucket}/a/b.png" and (path.stem, path.suffix) == ("b", ".png")
    assert to_path(path) == path and str(path.parent / "c") == f"{bucket}/a/c"


def test_two_names_of_one_place(bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert same_place("runs/a", tmp_path / "runs" / "a") and not same_place("runs/a", "runs/b")
    assert same_place(f"{bucket}/a/", to_path(bucket) / "a") and not same_place(f"{bucket}/a", "a")


def test_files_are_written_whole_listed_and_copied(root, tmp_path):
    for name in ("b/2", "b-/1", "a", "b/c/3"):
        write_bytes(root / name, name.encode())
    write_bytes(root / "a", b"other")
    assert files_below(root) == ["a", "b/2", "b/c/3", "b-/1"], "folder by folder, as sorted paths are"
    assert (root / "a").read_bytes() == b"other" and (root / "b" / "c").is_dir() and (root / "a").is_file()
    copy_folder(root / "b", root / "copied", "2")
    assert files_below(root / "copied") == ["2", "c/3"] and (root / "copied" / "c" / "3").read_bytes() == b"b/c/3"
    with local_copy(root / "b-" / "1") as file:
        assert file.read_bytes() == b"b-/1" and os.path.isfile(file)
    assert file.exists() == (file == root / "b-" / "1")


def test_what_was_cut_off_while_writing_is_not_there(tmp_path, monkeypatch):
    """A failed write leaves the old file and nothing beside it; a killed one, at most what the next one overwrites."""
    write_bytes(tmp_path / "a", b"old")

    def disk_full(*_):
        raise OSError("disk full")

    for alone in (False, True):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
            patch.setattr(os, "replace", disk_full)
            write_bytes(tmp_path / "a", b"new", alone=alone)
        assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"old"
    (tmp_path / "a.tmp").write_bytes(b"half")
    write_bytes(tmp_path / "a", b"new", alone=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"new"


def test_a_file_has_the_permissions_of_any_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        write_bytes(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_long_copies_say_how_far_they_are(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paths, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(paths, "CHUNK_BYTES", 2**20)
    (tmp_path / "a").write_bytes(bytes(2**21))
    copy_files([(tmp_path / "a", tmp_path / "b")], "copying a")
    assert capsys.readouterr().err.splitlines()[-1] == "copying a: 0.00 of 0.00 GiB, left 0:00:00"


def test_nothing_is_written_through_a_planted_link(tmp_path):
    other = tmp_path / "other"
    other.write_bytes(b"mine")
    (tmp_path / "config.json.tmp").symlink_to(other)
    write_bytes(tmp_path / "config.json", b"{}", alone=True)
    assert other.read_bytes() == b"mine" and (tmp_path / "config.json").read_bytes() == b"{}"
    assert not (tmp_path / "config.json").is_symlink()


def test_folder_to_write_to_may_be_anywhere_that_can_be_written(root):
    assert output_folder(str(root / "new" / "folder")) == root / "new" / "folder"
    assert not root.exists(), "looking leaves nothing"
    write_bytes(root / "file", b"")
    with pytest.raises(UserError, match=r"--out .*root/file is a file|--out gs://.*/file is a file: give a folder"):
        output_folder(str(root / "file"))


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_no_folder_to_write_to(name):
    """As of a variable of the shell that is not set."""
    with pytest.raises(UserError, match="--out is empty: give a folder"):
        output_folder(name)


def test_folder_on_a_disk_that_may_not_be_written_is_refused(tmp_path, monkeypatch):
    """A superuser may write anywhere, hence no real one."""
    monkeypatch.setattr(os, "access", lambda place, mode: place != tmp_path)
    with pytest.raises(UserError, match=f"workdir .*/a/b cannot be written: no permission to write in {tmp_path};"):
        output_folder(str(tmp_path / "a" / "b"), "workdir")


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda: to_path("gs://nosuch/a"), "gs://nosuch cannot be read: there is no such bucket"),
        (lambda: to_path("gs://forbidden/a"), "gs://forbidden cannot be read: this account may not"),
        (lambda: to_path("gs://login/a"), r"login cannot be read: .*Anonymous caller.*gcloud auth application-default"),
        (lambda: output_folder("gs://readonly/a"), "--out gs://readonly/a cannot be written: this account may not"),
    ],
    ids=["missing", "forbidden", "anonymous", "readonly"],
)
def test_bucket_that_cannot_be_used_is_one_line(act, says, bucket_server, caplog):
    with pytest.raises(UserError, match=says) as caught:
        act()
    assert "\n" not in str(caught.value) and not caplog.records


def test_bucket_without_its_packages_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"gs://unseen needs more packages: pip install 'unclip_jax\[gcs\]'"):
        to_path("gs://unseen/a")


def test_bucket_that_nobody_answers_for(monkeypatch):
    pytest.importorskip("gcsfs")
    call = SimpleNamespace(call=lambda *_, **__: (_ for _ in ()).throw(ConnectionError("refused\nby all")))
    monkeypatch.setattr(importlib.import_module("fsspec"), "filesystem", lambda _: call)
    with pytest.raises(UserError, match="gs://unseen cannot be read: ConnectionError: refused by all; is there"):
        to_path("gs://unseen/a")


def test_what_another_process_writes_is_seen(bucket, bucket_server):
    folder = to_path(bucket)
    write_bytes(folder / "a", b"")
    assert [path.name for path in folder.iterdir()] == ["a"] and not (folder / "b").exists()
    name = str(folder / "b").removeprefix("gs://bucket/")
    request = f"{bucket_server.url}/upload/storage/v1/b/bucket/o?uploadType=media&name={name}"
    urllib.request.urlopen(urllib.request.Request(request, b"theirs", method="POST"))
    assert (folder / "b").read_bytes() == b"theirs" and [path.name for path in folder.iterdir()] == ["a", "b"]


def test_copies_on_a_disk_are_made_once_for_each_object(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "cache"))
    files = [to_path(bucket) / name for name in ("a", "b")]
    for file in files:
        write_bytes(file, file.name.encode())

    def read():
        return [path.read_bytes() for path in on_disk(files, "copying")]

    assert read() == [b"a", b"b"]
    copied, copies = [], paths._copy
    monkeypatch.setattr(paths, "_copy", lambda source, *rest: copied.append(source.name) or copies(source, *rest))
    assert read() == [b"a", b"b"] and copied == []
    write_bytes(files[1], b"B")  # another object of the same size
    assert read() == [b"a", b"B"] and copied == ["b"]
    next((tmp_path / "cache").glob("*-a")).write_bytes(b"")  # cut off
    assert read() == [b"a", b"B"] and copied == ["b", "a"]
    assert on_disk([tmp_path / "x"], "") == [tmp_path / "x"] and on_disk([], "") == []


def test_a_disk_too_small_for_copies_is_refused(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(paths.shutil, "disk_usage", lambda _: SimpleNamespace(free=paths.SPARE_BYTES))
    write_bytes(to_path(bucket) / "a", bytes(2**20))
    with pytest.raises(UserError, match=r"needs 0.0 GiB more on the disk of .*cache, which has 0.0: set UNCLIP_CACHE"):
        on_disk([to_path(bucket) / "a"], "copying")
    assert not list((tmp_path / "cache").iterdir())


def test_importing_the_package_needs_no_bucket():
    """gcsfs takes a second to import."""
    code = "import sys, unclip_jax.train, unclip_jax.sample; sys.exit('gcsfs' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=True)


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/b"), PermissionError(errno.EACCES, "x", "/a/b"),
    OSError(errno.EIO, os.strerror(errno.EIO)), ValueError('RESOURCE_EXHAUSTED: "/a/b": No space left on device'),
])  # fmt: skip
@pytest.mark.parametrize("behind", [False, True])
def test_errors_of_storage_are_one_line_that_names_the_place(error, behind):
    with pytest.raises(StorageError, match=r"^/a(/b)?: [A-Z][a-z/ ]+; do this$"), storage_errors("/a", "do this"):
        if behind:
            raise RuntimeError("a thread failed") from error
        raise error


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "x"), ValueError("y"), UserError("Is a directory")])
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as caught, storage_errors("/a", "do this"):
        raise error
    assert caught.value is error


OWNER = """
import sys
from unclip_jax.paths import owned, to_path
with owned(to_path(sys.argv[1])):
    print("mine", flush=True)
    sys.stdin.read()
"""


def test_a_folder_has_one_owner_until_that_ends_or_dies(tmp_path):
    folder = tmp_path / "run"

    def another():
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(folder)], env=environment, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout.readline() == "mine\n"
        return process

    for end in (lambda process: process.communicate(""), lambda process: (process.kill(), process.communicate())):
        process = another()
        with pytest.raises(UserError, match=f"is in use by process {process.pid} of "), owned(folder):
            pass
        end(process)
    with owned(folder):
        assert [path.name for path in folder.iterdir()] == [".owner"]
    assert list(folder.iterdir()) == []
    with owned(tmp_path / "a" / "b"):
        pass
    assert not (tmp_path / "a").exists(), "folders of a run that wrote nothing"
    with owned(tmp_path / "a" / "b"):
        (tmp_path / "a" / "log").write_text("")
    assert (tmp_path / "a" / "log").exists()


def test_folders_that_others_may_write_to_are_known(tmp_path, monkeypatch):
    folder = tmp_path / "a" / "cache"
    assert not written_by_others(folder) and folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o775)
    assert not written_by_others(folder), "a group of one's own"
    group = os.getgid()
    monkeypatch.setattr(os, "getgid", lambda: group + 1)
    assert written_by_others(folder)
    folder.chmod(0o755)
    assert not written_by_others(folder)
    folder.chmod(0o777)
    assert written_by_others(folder)
    folder.chmod(0o755)
    if folder.stat().st_uid:
        monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
        assert written_by_others(folder)
