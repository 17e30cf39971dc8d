"""Tars as img2dataset and WebDataset write them, damaged ones too, written by tarfile."""

import gzip
import json
import os
import pickle
import tarfile

import pytest
from records import both, captions, opened, picture, records, red, sample, save_shards, save_tar

from unclip_jax import paths
from unclip_jax.data import tars
from unclip_jax.errors import UnreadableRecord, UserError
from unclip_jax.paths import copy_folder, to_path


def test_output_of_img2dataset(tmp_path, capsys):
    said = save_shards(tmp_path)
    (tmp_path / "00000_stats.json").write_text("{}")
    train, test = both(f"tars:{tmp_path}/*.tar")
    assert captions(train, test) == said and len(train) + len(test) == 60 and len(test) >= 1
    assert not captions(train).keys() & captions(test).keys()
    found = records(train, test)
    assert all(abs(red(record) - int(key.split("/")[1][:-4]) % 256) < 9 for key, record in found.items())
    assert found["00001.tar/000010007.jpg"]["image"] == picture(10007)
    assert pickle.loads(pickle.dumps(train))[5] == train[5] and len(pickle.dumps(train)) < 3000
    (index,) = tmp_path.glob("unclip_index_*.safetensors")
    assert f"{index}: made, the index of 3 tars" in capsys.readouterr().err


def test_an_index_is_made_once(tmp_path, monkeypatch, capsys):
    said = save_shards(tmp_path)
    first = captions(*both(f"tars:{tmp_path}/*.tar"))
    capsys.readouterr()
    read, read_tar = [], tars.read_tar
    monkeypatch.setattr(tars, "read_tar", lambda path, size: read.append(path.name) or read_tar(path, size))
    assert captions(*both(f"tars:{tmp_path}/*.tar")) == first == said
    assert read == [] and capsys.readouterr().err == ""
    # A tar that has changed is read again, a new one too, and no other.
    save_tar(tmp_path / "00001.tar", sample(10000, "another"))
    os.utime(tmp_path / "00001.tar", ns=(1, 1))
    save_tar(tmp_path / "00009.tar", sample(90000))
    (tmp_path / "00002.tar").unlink()
    now = captions(*both(f"tars:{tmp_path}/*.tar"))
    assert sorted(read) == ["00001.tar", "00009.tar"]
    assert now == {key: text for key, text in said.items() if key < "00001"} | {
        "00001.tar/000010000.jpg": "another",
        "00009.tar/000090000.jpg": "caption 90000",
    }


def test_an_index_that_is_cut_off_is_made_anew(tmp_path):
    said = save_shards(tmp_path)
    assert captions(*both(f"tars:{tmp_path}")) == said
    (index,) = tmp_path.glob("unclip_index_*.safetensors")
    index.write_bytes(index.read_bytes()[:50])
    assert captions(*both(f"tars:{tmp_path}")) == said


def test_an_index_that_is_begun_is_gone_on_with(tmp_path, monkeypatch):
    said, read, read_tar = save_shards(tmp_path), [], tars.read_tar
    monkeypatch.setattr(tars, "SECONDS_BETWEEN_SAVES", -1)
    monkeypatch.setattr(tars, "THREADS", 1)

    def until_the_third(path, size):
        if path.name == "00002.tar":
            raise KeyboardInterrupt
        return read_tar(path, size)

    monkeypatch.setattr(tars, "read_tar", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        both(f"tars:{tmp_path}")
    monkeypatch.setattr(tars, "read_tar", lambda path, size: read.append(path.name) or read_tar(path, size))
    assert captions(*both(f"tars:{tmp_path}")) == said and read == ["00002.tar"]


def test_a_place_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    said = save_shards(tmp_path / "tars")
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "cache"))
    write = paths.write_bytes

    def refuse(path, content, alone=False):
        if path.parent == tmp_path / "tars":
            raise PermissionError(13, "Permission denied")
        write(path, content, alone)

    monkeypatch.setattr(paths, "write_bytes", refuse)
    assert captions(*both(f"tars:{tmp_path}/tars")) == said
    (index,) = (tmp_path / "cache").iterdir()
    assert f"{index}: made" in capsys.readouterr().err
    assert captions(*both(f"tars:{tmp_path}/tars")) == said and capsys.readouterr().err == ""


def test_the_others_wait_for_the_first(tmp_path):
    """Another process finds the index made; where it cannot, as in a cache of another machine, it makes its own."""
    said = save_shards(tmp_path)
    calls = []

    def first(make):
        calls.append(make)
        return b""

    folder = tars.open_tars(f"{tmp_path}/*.tar", "caption", first)
    assert len(calls) == 1 and len(folder) == len(said)


def test_captions_in_json(tmp_path):
    one = {"caption": "plain", "llava": {"long": ["a", "b"]}}
    save_tar(tmp_path / "a.tar", [("1.jpg", picture(1)), ("1.json", json.dumps(one).encode()), ("1.txt", b"from txt"),
                                  ("2.jpg", picture(2)), ("2.json", json.dumps({"text": "named text"}).encode()),
                                  ("3.jpg", picture(3)), ("3.json", b"{"),
                                  ("4.jpg", picture(4)), ("4.txt", b"one\ntwo\n")])  # fmt: skip
    source = opened(f"tars:{tmp_path}/{{split}}.tar", "a")
    assert [source[k]["caption"] for k in (0, 1, 3)] == ["from txt", "named text", ["one", "two"]]
    with pytest.raises(UnreadableRecord, match="JSON file cannot be read"):
        source[2]
    source = opened(f"tars:{tmp_path}/{{split}}.tar", "a", caption="llava/long")
    assert source[0]["caption"] == ["a", "b"] and source[3]["caption"] == ["one", "two"]
    with pytest.raises(UnreadableRecord, match=r"no 'llava/long' \(data.caption_feature\): it has text"):
        source[1]


def test_pictures_are_known_by_content(tmp_path, capsys):
    files = [("1.jpg", picture(1, "PNG")), ("2", picture(2)), ("3.image", picture(3, "WEBP")), ("4.jpg", b"<html>"),
             ("5.jpg", b""), ("6.png", picture(6)), ("7.input.jpg", picture(7)), ("8.jpg", picture(8)),
             ("9.mp4", bytes(99)), ("._1.jpg", picture(1)), ("__MACOSX/1.jpg", picture(1)), ("./d/10.jpg", picture(10)),
             ("é b.jpg", picture(11)), ("BMW.txt", b"BMW")]  # fmt: skip
    texts = [(f"{k}.txt", f"caption {k}".encode()) for k in (1, 2, 3, 4, 5, 7, 9, "d/10", "é b")]
    save_tar(tmp_path / "a.tar", [*files, *texts, ("6.png.TXT", b"caption 6"), ("8.txt", b"")])
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("folder.jpg"))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    found = captions(opened(f"tars:{tmp_path}/{{split}}.tar", "a"))
    assert found == {
        f"a.tar/{name}": f"caption {k}"
        for name, k in [("1.jpg", 1), ("2", 2), ("3.image", 3), ("6.png", 6), ("7.input.jpg", 7), ("d/10.jpg", "d/10"),
                        ("é b.jpg", "é b")]
    }  # fmt: skip
    line = capsys.readouterr().err
    assert "7 pictures with captions; left out: hidden 2, of other kinds 4, without a caption 1" in line


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_in_all_kinds_of_tars(tmp_path, format):
    stem = f"{'folder/' * 12}{'long' * 20}"
    for name in ("train.tar", "test.tar"):
        with tarfile.open(tmp_path / name, "w", format=format) as tar:
            for ending in (".jpg", ".txt"):
                (tmp_path / "file").write_bytes(picture(5) if ending == ".jpg" else b"a caption")
                tar.add(tmp_path / "file", f"{stem}{ending}")
    source = opened(f"tars:{tmp_path}/{{split}}.tar", "test")
    assert captions(source) == {f"test.tar/{stem}.jpg": "a caption"} and source[0]["image"] == picture(5)


def test_damaged_tars_are_named_and_the_rest_is_used(tmp_path, capsys):
    said = save_shards(tmp_path, 5)
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with tarfile.open(tmp_path / "00000.tar") as tar:
        spans = {member.name: (member.offset, member.offset_data, member.size) for member in tar}
    header, start, _ = spans["000000011.jpg"]
    (tmp_path / "00000.tar").write_bytes(whole["00000.tar"][: start + 100])  # cut off in a picture
    (tmp_path / "00001.tar").write_bytes(whole["00001.tar"][: header + 100])  # cut off in a header
    damaged = bytearray(whole["00002.tar"])
    damaged[header : header + 512] = b"\x55" * 512  # a header lost
    (tmp_path / "00002.tar").write_bytes(damaged)
    (tmp_path / "00003.tar").write_bytes(b"")
    (tmp_path / "00004.tar").write_bytes(gzip.compress(whole["00004.tar"]))
    found = captions(*both(f"tars:{tmp_path}/*.tar"))
    lost = {key for key in said if key[:5] in ("00003", "00004") or (key < "00002" and int(key[-9:-4]) % 10000 > 10)}
    lost |= {key for key in said if key[-9:-4] == "20011"}
    assert found == {key: text for key, text in said.items() if key not in lost}
    line = capsys.readouterr().err
    assert "damaged, the rest is used: 00000.tar is cut off within 000000011.jpg; 00001.tar has 100 bytes that" in line
    assert "00002.tar has " in line and "00003.tar cannot be read from byte 0 on (empty file)" in line
    assert "00004.tar is compressed" in line
    both(f"tars:{tmp_path}/*.tar")
    assert "00000.tar is cut off" in capsys.readouterr().err  # not only while the index is made


def test_a_tar_that_shrinks_later(tmp_path, monkeypatch):
    from unclip_jax.data import sources

    monkeypatch.setattr(sources, "RETRY_SECONDS", ())
    save_shards(tmp_path, 1)
    source = opened(f"tars:{tmp_path}/*.tar")
    (tmp_path / "00000.tar").write_bytes(b"")
    with pytest.raises(UnreadableRecord, match="ends before byte"):
        source[3]


def test_what_is_near_is_read_at_once(tmp_path, monkeypatch):
    filler = ("filler.bin", bytes(2**17))
    save_tar(tmp_path / "near.tar", sample(1, "near"))
    save_tar(tmp_path / "far.tar", [sample(1)[0], filler, ("000000001.txt", b"far")])
    reads, read_part = [], tars.read_part
    monkeypatch.setattr(tars, "read_part", lambda path, *part: reads.append(part) or read_part(path, *part))
    for name, count in (("near", 1), ("far", 2)):
        reads.clear()
        assert captions(opened(f"tars:{tmp_path}/{{split}}.tar", name)) == {f"{name}.tar/000000001.jpg": name}
        assert len(reads) == count and sum(length for _, length in reads) < 2**13


def test_in_a_bucket(bucket, tmp_path):
    said = save_shards(tmp_path)
    copy_folder(tmp_path, to_path(bucket), "")
    for spec in (f"tars:{bucket}/*.tar", f"tars:{bucket}"):
        assert captions(*both(spec)) == said
    here, there = opened(f"tars:{tmp_path}/*.tar"), opened(f"tars:{bucket}/*.tar")
    assert [there[k] for k in range(len(here))] == [here[k] for k in range(len(here))]
    assert pickle.loads(pickle.dumps(there))[1] == here[1]
    assert sorted(path.name for path in to_path(bucket).iterdir() if path.name.startswith("unclip_index"))


def test_errors(tmp_path):
    with pytest.raises(UserError, match=r"no files .*\*\.tar: expected a folder of \.tar files"):
        opened(f"tars:{tmp_path}/*.tar")
    save_tar(tmp_path / "a.tar", [("1.jpg", picture(1)), ("1.cls", b"7")])
    with pytest.raises(UserError, match="no pictures with captions"):
        opened(f"tars:{tmp_path}/*.tar")
    with pytest.raises(UserError, match=r"expected \* in place of numbers in braces"):
        opened(f"tars:{tmp_path}/{{00000..00009}}.tar")
    with pytest.raises(UserError, match=r"no split 'validation': expected train or test"):
        opened(f"tars:{tmp_path}/*.tar", "validation")
