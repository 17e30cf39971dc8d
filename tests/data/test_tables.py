"""Parquet and arrow files of pictures and captions, written by pyarrow in the forms that others write."""

import pickle
import threading

import pyarrow as pa
import pytest
from pyarrow import parquet
from records import both, captions, opened, picture, records, red

from unclip_jax.data import tables
from unclip_jax.errors import UnreadableRecord, UserError
from unclip_jax.paths import copy_folder, to_path

N = 60


def hugging_face(numbers):
    """Columns as the library `datasets` writes pictures: their bytes and the name that they had."""
    image = pa.array([{"bytes": picture(k), "path": f"{k}.jpg"} for k in numbers])
    return pa.table({"image": image, "caption": [f"caption {k}" for k in numbers], "width": [8] * len(numbers)})


def save_parquet(folder, files=3, group=7):
    folder.mkdir(parents=True, exist_ok=True)
    for file in range(files):
        numbers = range(100 * file, 100 * file + N // files)
        parquet.write_table(hugging_face(numbers), folder / f"train-{file:05d}-of-00003.parquet", row_group_size=group)
    return {f"train-{file:05d}-of-00003.parquet/{row}": f"caption {100 * file + row}"
            for file in range(files) for row in range(N // files)}  # fmt: skip


def save_arrow(folder, files=3, batch=7):
    """As `datasets.save_to_disk` does: streams of record batches."""
    folder.mkdir(parents=True, exist_ok=True)
    said = {}
    for file in range(files):
        table, name = hugging_face(range(100 * file, 100 * file + N // files)), f"data-{file:05d}-of-00003.arrow"
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=batch)
        said |= {f"{name}/{row}": f"caption {100 * file + row}" for row in range(N // files)}
    return said


@pytest.mark.parametrize(("kind", "save"), [("parquet", save_parquet), ("arrow", save_arrow)])
def test_hugging_face_s_files(tmp_path, kind, save):
    said = save(tmp_path)
    (tmp_path / "dataset_info.json").write_text("{}")
    train, test = both(f"{kind}:{tmp_path}/*.{kind}")
    assert captions(train, test) == said and len(test) >= 1 and len(train) + len(test) == N
    assert captions(*both(f"{kind}:{tmp_path}")) == said
    for record in records(train, test).values():
        assert record["image"] == picture(int(record["caption"].split()[1])) and 0 <= red(record) < 256
    assert pickle.loads(pickle.dumps(train))[5] == train[5] and len(pickle.dumps(train)) < 4000


def test_the_split_of_a_row_stays(tmp_path):
    """Whatever files come beside it."""
    def save(name, rows):
        parquet.write_table(pa.table({"image": [b""] * rows, "caption": ["a"] * rows}), tmp_path / name)

    def held_out():
        train, test = (part._source for part in both(f"parquet:{tmp_path}/*.parquet"))
        assert len(train) + len(test) == sum(parquet.read_metadata(file).num_rows for file in tmp_path.iterdir())
        keys = test._records
        return {f"{keys._names[0 if index < 2000 else 1]}/{index % 2000}" for index in test._indices.tolist()}

    save("m.parquet", 2000)
    before = held_out()
    assert 20 <= len(before) <= 60  # 40 ± 3 standard deviations of a binomial
    save("n.parquet", 2000)
    now = held_out()
    assert {key for key in now if key[0] == "m"} == before and len(now) > len(before) + 20
    assert {key[2:] for key in now if key[0] == "n"} != {key[2:] for key in before}


def test_splits_that_files_are_named_after(tmp_path):
    said = save_parquet(tmp_path / "data")
    parquet.write_table(hugging_face(range(900, 910)), tmp_path / "data" / "validation-00000-of-00001.parquet")
    splits = "train", "validation"
    train, unseen = both(f"parquet:{tmp_path}/data/{{split}}-*.parquet", splits=splits)
    assert captions(train) == said
    assert list(captions(unseen).values()) == [f"caption {k}" for k in range(900, 910)]


def test_several_splits_on_disk(tmp_path):
    """DatasetDict.save_to_disk."""
    said = save_arrow(tmp_path / "train")
    save_arrow(tmp_path / "test", files=1)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UserError, match=rf"several splits: train, test; name one by arrow:{tmp_path}/{{split}}"):
        opened(f"arrow:{tmp_path}")
    train, test = both(f"arrow:{tmp_path}/{{split}}")
    assert captions(train) == said and len(test) == N


def test_files_with_a_footer(tmp_path):
    table = hugging_face(range(N))
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=9)
    assert captions(*both(f"arrow:{tmp_path}")) == {f"a.arrow/{k}": f"caption {k}" for k in range(N)}


def one_file(tmp_path, columns, **options):
    parquet.write_table(pa.table(columns), tmp_path / "all.parquet", **options)
    return f"parquet:{tmp_path}/{{split}}.parquet"


PICTURES = [picture(k) for k in range(4)]


def test_forms_of_pictures(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "3.jpg").write_bytes(PICTURES[3])
    columns = {"caption": ["a"] * 4, "jpg": PICTURES, "large": pa.array(PICTURES, pa.large_binary()),
               "inner": [{"image": p, "n": 1} for p in PICTURES], "path": ["sub/3.jpg"] * 4,
               "absolute": [str(tmp_path / "sub" / "3.jpg")] * 4,
               "linked": pa.array([{"bytes": None, "path": "sub/3.jpg"}] * 4,
                                  pa.struct({"bytes": pa.binary(), "path": pa.string()}))}  # fmt: skip
    spec = one_file(tmp_path, columns)
    for name in ("jpg", "large", "inner/image"):
        source = opened(spec, "all", name)
        assert [source[k]["image"] for k in range(4)] == PICTURES
    for name in ("path", "absolute", "linked"):
        assert opened(spec, "all", name)[0]["image"] == PICTURES[3]


def test_forms_of_captions(tmp_path):
    columns = {"image": PICTURES, "list": [["a", "b"], [], None, ["", "c"]], "text": ["a", "", None, "\0d\n"],
               "coded": pa.array(["a", "b", "a", "b"]).dictionary_encode(),
               "sentences": [[{"raw": "a", "id": 1}, {"raw": "b", "id": 2}]] * 4,
               "facts": [{"long": "x"}, None, {"long": None}, {"long": "y"}]}  # fmt: skip
    spec = one_file(tmp_path, columns)

    def said(name):
        source, found = opened(spec, "all", caption=name), []
        for k in range(4):
            try:
                found.append(source[k]["caption"])
            except UnreadableRecord as error:
                assert "no caption" in str(error)
                found.append(None)
        return found

    assert said("list") == [["a", "b"], None, None, ["c"]]
    assert said("text") == ["a", None, None, "d\n"]
    assert said("coded") == ["a", "b", "a", "b"]
    assert said("sentences/raw") == [["a", "b"]] * 4
    assert said("facts/long") == ["x", None, None, "y"]


def test_only_what_is_needed_is_read(tmp_path, monkeypatch):
    spec = one_file(tmp_path, {"image": PICTURES, "caption": list("abcd"), "other": PICTURES}, row_group_size=2)
    read, read_group = [], parquet.ParquetFile.read_row_group

    def note(self, group, columns=None, **options):
        read.append((group, tuple(columns)))
        return read_group(self, group, columns, **options)

    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", note)
    source = opened(spec, "all")
    assert [source[k]["caption"] for k in (0, 1, 2, 3, 0)] == list("abcda")
    assert read == [(0, ("image", "caption")), (1, ("image", "caption")), (0, ("image", "caption"))]
    # Each thread has a group of its own.
    thread = threading.Thread(target=lambda: source[0])
    thread.start()
    thread.join()
    assert source[1]["caption"] == "b" and len(read) == 4


def test_large_groups_are_named(tmp_path, monkeypatch, capsys):
    save_parquet(tmp_path)
    opened(f"parquet:{tmp_path}")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(tables, "LARGE_GROUP", 3000)
    opened(f"parquet:{tmp_path}")
    assert "a record at random takes a group of rows of 0 MiB: smaller groups" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_in_a_bucket(bucket, tmp_path, kind):
    said = {"parquet": save_parquet, "arrow": save_arrow}[kind](tmp_path)
    copy_folder(tmp_path, to_path(bucket), "")
    train, test = both(f"{kind}:{bucket}/*.{kind}")
    assert captions(train, test) == said and pickle.loads(pickle.dumps(train))[2] == train[2]


@pytest.mark.parametrize(
    ("image", "caption", "line"),
    [
        ("picture", "caption", r"no column 'picture' \(data.image_feature\): it has image, image/bytes,.*, width"),
        ("image", "text", r"no column 'text' \(data.caption_feature\): it has .*caption, width"),
        ("width", "caption", "no pictures in 'width'.*: it holds int64"),
        ("image", "width", "no text in 'width'.*: it holds int64"),
    ],
)
def test_columns_that_are_not_there(tmp_path, image, caption, line):
    save_parquet(tmp_path)
    save_arrow(tmp_path)
    for kind in ("parquet", "arrow"):
        with pytest.raises(UserError, match=line) as error:
            opened(f"{kind}:{tmp_path}", "train", image, caption)
        assert "\n" not in str(error.value)


def test_files_that_are_none(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "a.arrow").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    for kind in ("parquet", "arrow"):
        with pytest.raises(UserError, match=rf"a\.{kind} is no {kind} file that can be read"):
            opened(f"{kind}:{tmp_path}")
        with pytest.raises(UserError, match=rf"no files .*: expected a folder of \.{kind} files"):
            opened(f"{kind}:{tmp_path}/none-*")
    with pytest.raises(UserError, match="no rows in 1 files"):
        opened(one_file(tmp_path, {"image": pa.array([], pa.binary()), "caption": pa.array([], pa.string())}), "all")


def test_pictures_that_are_none(tmp_path):
    columns = {"image": ["https://x.org/1.jpg", "nowhere.jpg", None], "caption": ["a", "b", "c"]}
    source = opened(one_file(tmp_path, columns), "all")
    for k, why in enumerate(("expected a place on a disk", "nowhere.jpg is no file that can be read", "no picture")):
        with pytest.raises(UnreadableRecord, match=why):
            source[k]
