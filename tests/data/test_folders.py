"""A folder as people have it: every picture is read right, or counted and named."""

import io
import json
import os
import pickle

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from records import both, captions, opened, picture, records

from unclip_jax.data import folders
from unclip_jax.data.pipeline import batches
from unclip_jax.data.transforms import ToExample, captions_of, decode
from unclip_jax.errors import UnreadableRecord, UserError
from unclip_jax.paths import copy_folder, to_path

UPRIGHT = np.zeros((24, 16, 3), np.uint8)
UPRIGHT[:12, :, 0], UPRIGHT[:, :8, 1] = 200, 100  # red above, green on the left


def encoded(image, kind, **options):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def turned(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(np.rot90(UPRIGHT), kind, exif=exif.tobytes(), **({"quality": 95} if kind == "JPEG" else {}))


def grown_folder(path):
    """Pictures of all kinds, all of UPRIGHT, with captions in all forms, among all that collects in folders.

    Returns the captions of the pictures that can be read.
    """
    plain, texts = Image.fromarray(UPRIGHT), PngImagePlugin.PngInfo()
    texts.add_text("workflow", "x" * 2_000_000)
    grey16 = np.asarray(plain.convert("L")).astype(np.uint16) * 257
    pictures = {
        "cat.jpg": encoded(UPRIGHT, "JPEG", quality=95),
        "Dog.JPEG": turned("JPEG"),
        "my holiday/Photo 1 (copy).png": encoded(UPRIGHT, "PNG", pnginfo=texts),
        "my holiday/größe 東京.webp": encoded(UPRIGHT, "WEBP", lossless=True),
        "print.jpg": encoded(plain.convert("CMYK"), "JPEG", quality=95),
        "scan.tif": encoded(grey16, "TIFF"),
        "depth.tiff": encoded(grey16.astype(np.float32) / 65535, "TIFF"),
        "grey.png": encoded(grey16, "PNG"),
        "palette.gif": encoded(plain.quantize(8), "GIF"),
        "old.BMP": encoded(UPRIGHT, "BMP"),
        "icon.ico": encoded(plain, "ICO", sizes=[(16, 24)]),
        "mislabelled.jpg": encoded(UPRIGHT, "PNG"),
        "no ending": encoded(UPRIGHT, "PNG"),
        "odd.image": encoded(UPRIGHT, "JPEG", quality=95),
        "clear.png": encoded(plain.convert("RGBA"), "PNG"),
        "utf16.png": encoded(UPRIGHT, "PNG"),
        "several.png": encoded(UPRIGHT, "PNG"),
        "words.png": encoded(UPRIGHT, "PNG"),
        "json.png": encoded(UPRIGHT, "PNG"),
        "table/t1.png": encoded(UPRIGHT, "PNG"),
        "table/t2.png": encoded(UPRIGHT, "PNG"),
    }
    said = {name: f"a picture of {name}" for name in pictures}
    said |= {"utf16.png": "ütf 16", "several.png": ["one", "two"], "words.png": " ".join(["word"] * 1000)}
    said |= {"table/t1.png": "first in the table", "table/t2.png": ["second", "again"], "cat.jpg": "café"}
    for name, data in pictures.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
        text, caption = path / f"{os.path.splitext(name)[0]}.txt", "\n".join(captions_of({"caption": said[name]}))
        if name == "utf16.png":
            text.write_bytes(caption.encode("utf-16"))
        elif name == "cat.jpg":
            text.write_bytes(b"caf\xe9\r\n")
        elif name == "json.png":
            text.with_suffix(".json").write_text(json.dumps({"caption": caption, "url": "x"}))
        elif name == "Dog.JPEG":
            (path / "Dog.JPEG.TXT").write_bytes(b"\xef\xbb\xbf" + caption.encode() + b"\0\r\n\r\n")
        elif not name.startswith("table"):
            text.write_text(caption, encoding="utf-8")
    rows = [{"file_name": "t1.png", "text": "first in the table"}, {"file_name": "./t2.png", "text": "second"},
            {"file_name": "t2.png", "text": "again"}, {"file_name": "t3.png"}, {"text": "lost"}]  # fmt: skip
    lines = [*map(json.dumps, rows), "{broken"]
    (path / "table" / "metadata.jsonl").write_text("\n".join(lines))

    # What is left out, or cannot be read.
    litter = [".DS_Store", "._cat.jpg", ".hidden/a.jpg", "__MACOSX/b.jpg", "@eaDir/c.jpg", "cat.jpg~", "notes.md"]
    for name in [*litter, "film.mp4", "phone.heic", "lonely.png"]:
        (path / name).parent.mkdir(exist_ok=True)
        no_pictures = {"phone.heic": b"\0\0\0\x18ftypheic", "notes.md": b"# Notes"}
        (path / name).write_bytes(no_pictures.get(name, pictures["old.BMP"]))
    bad = {"empty.jpg": b"", "page.jpg": b"<html>404</html>", "half.jpg": pictures["cat.jpg"][:200], "mute.png": b""}
    for name, data in bad.items():
        (path / name).write_bytes(data or (pictures["no ending"] if name == "mute.png" else b""))
        (path / name).with_suffix(".txt").write_text(" \n" if name == "mute.png" else "a caption")
    return said


def test_every_picture_is_read_right_or_named(tmp_path, capsys):
    said = grown_folder(tmp_path)
    train, test = both(f"folder:{tmp_path}")
    line = capsys.readouterr().err
    assert line.startswith(f"{tmp_path}: {len(said) + 4} pictures with captions; left out: hidden 6, of other kinds (")
    table = "rows without a caption in table/metadata.jsonl 2, rows without file_name in table/metadata.jsonl 1"
    assert f") 3, {table}, without a caption 1" in line
    assert all(ending in line.partition("of other kinds")[2].partition(")")[0] for ending in (".md", ".mp4", ".heic"))

    read, why = {}, {}
    for source in (train, test):
        for k in range(len(source)):
            try:
                record = source[k]
                read[record["key"]] = record["caption"], decode(record["image"])
            except UnreadableRecord as error:
                why[k] = str(error)
    expected = UPRIGHT.astype(float)
    grey = np.asarray(Image.fromarray(UPRIGHT).convert("L").convert("RGB")).astype(float)
    assert {name: caption for name, (caption, _) in read.items()} == said
    for name, (_, image) in read.items():
        like = grey if name in ("scan.tif", "depth.tiff", "grey.png") else expected
        assert np.abs(image - like)[2:-2, 2:-2].mean() < 8, name
    assert len(why) == 4 and sorted(reason.partition(":")[0] for reason in why.values()) == [
        "OSError", "it has no caption", "it is no picture of a known kind", "it is no picture of a known kind",
    ]  # fmt: skip


def test_training_on_it(tmp_path):
    said = grown_folder(tmp_path)
    source = opened(f"folder:{tmp_path}")
    transform = ToExample({"image": 16}, {}, "center", None)
    found = batches(source, transform, len(source), seed=0)
    counts = [int(next(found)["records_skipped"].sum()) for _ in range(3)]
    assert min(counts) >= 3 and max(counts) < 12 and len(source) < len(said) + 4


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_hugging_face_s_metadata(tmp_path, ending):
    """Of the folder of pictures, or of one above; the file beside a picture comes first."""
    for name in ("train/a.png", "train/b.png", "c,d.png", "Ä.png", "e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture(1, "PNG"))
    (tmp_path / "e.txt").write_text("of its own")
    rows = [("train/a.png", 'an "A",\nwith more'), ("train/b.png", "B"), ("c,d.png", "C"), ("A\u0308.png", "Ä")]
    rows += [("e.png", "E")]
    if ending == "csv":
        quoted = [f'"{name}","{text.replace(chr(34), chr(34) * 2)}",3' for name, text in rows]
        (tmp_path / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(["file_name,text,n", *quoted]).encode())
    else:
        lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
        (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    said = {"Ä.png" if name[0] == "A" else name: text for name, text in rows} | {"e.png": "of its own"}
    assert captions(*both(f"folder:{tmp_path}")) == said
    assert captions(*both(f"folder:{tmp_path}", caption="text")) == said | {"e.png": "E"}
    (tmp_path / "e.txt").unlink()
    with pytest.raises(UserError, match=r"no captions: .*; of metadata\..*: it has no 'title' .* file_name, text"):
        opened(f"folder:{tmp_path}", caption="title")


def test_output_of_img2dataset_as_files(tmp_path):
    from records import sample

    for k in (0, 1, 10000):
        folder = tmp_path / f"{k // 10000:05d}"
        folder.mkdir(exist_ok=True)
        for name, data in sample(k):
            (folder / name).write_bytes(data)
    assert captions(*both(f"folder:{tmp_path}")) == {
        f"{k // 10000:05d}/{k:09d}.jpg": f"caption {k}" for k in (0, 1, 10000)
    }


def test_linked_folders_are_followed_once(tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside, outside):
        (folder / "sub").mkdir(parents=True)
        for name in ("a", "sub/b"):
            (folder / f"{name}.png").write_bytes(picture(1, "PNG"))
            (folder / f"{name}.txt").write_text("a caption")
    (inside / "0 link").symlink_to(outside)
    (inside / "1 again").symlink_to(outside / "sub")
    (inside / "loop").symlink_to(inside)
    (outside / "loop").symlink_to(tmp_path)
    (inside / "nowhere").symlink_to(tmp_path / "nowhere")
    (inside / "linked.png").symlink_to(outside / "a.png")
    (inside / "linked.txt").symlink_to(outside / "a.txt")
    names = ["0 link/a.png", "0 link/sub/b.png", "a.png", "linked.png", "sub/b.png"]
    assert sorted(captions(*both(f"folder:{inside}"))) == names


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a/1.tar", r"its \.tar files are read by --config\.data\.source='tars:.*/a/\*\.tar'"),
        ("1.parquet", r"its \.parquet files are read by --config\.data\.source='parquet:.*/\*\.parquet'"),
        ("1.arrow", r"its \.arrow files are read by --config\.data\.source='arrow:"),
        ("captions.jsonl", "read from metadata.jsonl or metadata.csv, with file_name and caption"),
    ],
)
def test_files_of_other_sources_are_named_with_the_source(tmp_path, name, words):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n")  # not looked at
    with pytest.raises(UserError, match=f"has no pictures.*; .*{words}"):
        opened(f"folder:{tmp_path}")
    (tmp_path / "a.png").write_bytes(picture(1))
    with pytest.raises(UserError, match=f"1 pictures but no captions.*; .*{words}"):
        opened(f"folder:{tmp_path}")


def test_known_endings_are_not_opened(tmp_path, monkeypatch):
    looked_at = []
    monkeypatch.setattr(folders, "is_picture", lambda name, first: looked_at.append(name))
    for name in ("a.png", "a.txt", "b.jpg", "b.json", "c.mp4", "d.html", "metadata.csv", "e.tar", "f.xyz", "g", ".h"):
        (tmp_path / name).write_text("{}")
    both(f"folder:{tmp_path}")
    assert sorted(looked_at) == ["f.xyz", "g"]


def test_a_listing_is_made_by_one_process_for_all(tmp_path, monkeypatch):
    from unclip_jax.data.sources import open_sources

    said, made, found = grown_folder(tmp_path), [], folders.find
    monkeypatch.setattr(folders, "find", lambda *arguments: made.append(1) or found(*arguments))

    def first(make):
        made.append(make())
        return made[-1]

    open_sources(f"folder:{tmp_path}", (), ["train", "test"], "", "image", "caption", first)
    assert made[0] == 1 and len(made) == 2  # one scan for both splits
    monkeypatch.setattr(folders, "find", None)
    sources = open_sources(f"folder:{tmp_path}", (), ["train", "test"], "", "image", "caption", lambda make: made[1])
    assert sum(map(len, sources)) == len(said) + 4 and len(made[1]) < 100 * len(said)


def test_names_that_are_no_utf_8(tmp_path):
    for name in (b"caf\xe9", b"b"):
        with open(os.path.join(os.fsencode(tmp_path), name + b".png"), "wb") as file:
            file.write(picture(1, "PNG"))
        with open(os.path.join(os.fsencode(tmp_path), name + b".txt"), "w") as file:
            file.write("a caption")
    train, test = both(f"folder:{tmp_path}")
    found = records(train, test)
    assert {os.fsencode(key) for key in found} == {b"caf\xe9.png", b"b.png"}
    assert pickle.loads(pickle.dumps(train))[0] == train[0]


def test_a_large_folder_is_cheap_to_send(tmp_path):
    for k in range(500):
        (tmp_path / f"{k:06d}.png").touch()
        (tmp_path / f"{k:06d}.txt").touch()
    train, _ = both(f"folder:{tmp_path}")
    assert len(pickle.dumps(train)) < 50 * 500 + 1000


def test_in_a_bucket(bucket, tmp_path):
    said = grown_folder(tmp_path)
    copy_folder(tmp_path, to_path(bucket), "")
    here, there = opened(f"folder:{tmp_path}", "test"), opened(f"folder:{bucket}", "test")
    assert len(here) == len(there) and len(opened(f"folder:{bucket}")) == len(said) + 4 - len(here)
    assert there[0] == here[0]
