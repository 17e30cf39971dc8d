"""Reads tables of pictures and captions: parquet files, and the arrow files of Hugging Face's datasets.

Parquet is compressed in groups of rows, and a record at random takes a whole group: small groups, of ten megabytes or
less, are read in good time. Arrow files are mapped into memory, and each record is read alone.
"""

import functools
import itertools
import json
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unclip_jax.data import captions, splits
from unclip_jax.data.places import files_matching, read_file
from unclip_jax.errors import UnreadableRecord, UserError
from unclip_jax.foreign import parsed_json
from unclip_jax.paths import is_remote, on_disk, to_path

if TYPE_CHECKING:
    import pyarrow as pa

THREADS = 32
LARGE_GROUP = 2**26  # bytes of a group of rows, from which on reading at random is said to be slow
SPLITS = "dataset_dict.json"  # in a folder of several splits that Hugging Face's `save_to_disk` wrote


class TableRecords:
    """Records of tables. Holds no open file; each thread keeps the group of rows that it read last.

    read: reads one group of a file. files: where they lie. names: what they are called in keys of records. groups: of
    each file, the numbers of rows of its groups. image, caption: names of the columns, "a/b" for b within a.
    """

    def __init__(
        self, read: Callable, files: Sequence[Path], names: Sequence[str], groups: Sequence[list[int]], image: str,
        caption: str,
    ):  # fmt: skip
        self._arguments = (read, files, names, groups, image, caption)
        self._read, self._files, self._names = read, files, names
        self._image, self._caption = image.split("/"), caption.split("/")
        self._places = [(file, group) for file, rows in enumerate(groups) for group in range(len(rows))]
        self._ends = np.cumsum([count for rows in groups for count in rows])
        self._file_ends = np.cumsum([sum(rows) for rows in groups])
        self._local = threading.local()

    def __reduce__(self) -> tuple:
        return TableRecords, self._arguments

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict:
        (image, caption), file, key = self._row(index, [self._image, self._caption])
        return {"image": _picture(image, file.parent), "caption": _captions(caption), "key": key}

    def without_picture(self, index: int) -> dict:
        (caption,), _, key = self._row(index, [self._caption])
        return {"caption": _captions(caption), "key": key}

    def _row(self, index: int, wanted: list[list[str]]) -> tuple[list[Any], Path, str]:
        """Reads values of a row, by the names of columns and what is within them; gives its file and its key too."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        file, group = self._places[number]
        row = index - int(self._ends[number - 1] if number else 0)
        columns = list(dict.fromkeys(names[0] for names in wanted))
        if getattr(self._local, "read", None) != (number, columns):
            self._local.group, self._local.read = self._read(self._files[file], group, columns), (number, columns)
        try:
            values = [captions.value_at(self._local.group.column(n[0])[row].as_py(), n[1:]) for n in wanted]
        except TypeError as error:  # something within nothing
            raise UnreadableRecord("it has no picture or no caption") from error
        return values, self._files[file], f"{self._names[file]}/{index - int(self._file_ends[file - 1] if file else 0)}"

    def draws(self) -> np.ndarray:
        counts = np.diff(self._file_ends, prepend=0).tolist()
        return np.concatenate([splits.draws_of_rows(*of_file) for of_file in zip(self._names, counts, strict=True)])


def open_tables(
    kind: str, pattern: str, image: str, caption: str, first: Callable[[Callable[[], bytes]], bytes]
) -> TableRecords:
    """Opens the tables that a pattern names.

    kind: "parquet" or "arrow". image, caption: names of columns, "a/b" for b within a. The first holds pictures' files
    or their paths, from the table's folder on, or both as Hugging Face has them. first: has one process of a run call
    what it is given, and returns what that returns to all of them. Raises UserError where there are no files, and where
    one lacks a column, naming those that there are.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise UserError(f"{kind}:... needs pyarrow: pip install 'unclip_jax[data]'") from error
    folder, found = files_matching(pattern, f".{kind}")
    if (folder / SPLITS).exists():
        try:
            there = ", ".join(parsed_json((folder / SPLITS).read_text())["splits"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / SPLITS} cannot be read ({error!r}): name one split's folder") from error
        raise UserError(f"{folder} holds several splits: {there}; name one by {kind}:{folder}/{{split}}, for which "
                        "data.split and data.eval_split are put")  # fmt: skip
    files = [folder / name for name in found]
    if kind == "arrow":  # to be mapped into memory
        by_folder = itertools.groupby(files, key=lambda file: file.parent)
        files = [copy for place, group in by_folder for copy in on_disk(list(group), f"copying {place}")]

    def listing() -> bytes:
        with ThreadPoolExecutor(THREADS) as pool:
            looked_at = list(pool.map(_parquet_groups if kind == "parquet" else _arrow_groups, files))
        for name, (_, schema, _) in zip(found, looked_at, strict=True):
            _check_columns(folder / name, schema, image, caption)
        largest = max(size for _, _, size in looked_at)
        if largest > LARGE_GROUP:
            print(f"{pattern}: a record at random takes a group of rows of {largest / 2**20:.0f} MiB: smaller groups "
                  "(pyarrow's row_group_size), or a TFDS dataset, are faster", file=sys.stderr, flush=True)  # fmt: skip
        return json.dumps([rows for rows, _, _ in looked_at]).encode()

    groups = json.loads(first(listing))
    if not any(map(sum, groups)):
        raise UserError(f"{pattern}: no rows in {len(files)} files")
    read = _parquet_group if kind == "parquet" else _arrow_group
    return TableRecords(read, files, list(found), groups, image, caption)


def _parquet_groups(file: Path) -> tuple[list[int], "pa.Schema", int]:
    """Returns the rows of each group, the columns, and the bytes of the largest group, unpacked."""
    footer = _footer(file)
    groups = [footer.row_group(k) for k in range(footer.num_row_groups)]
    sizes = [group.total_byte_size for group in groups]
    return [group.num_rows for group in groups], footer.schema.to_arrow_schema(), max(sizes, default=0)


def _parquet_group(file: Path, group: int, columns: list[str]) -> "pa.Table":
    from pyarrow.parquet import ParquetFile

    footer = _footer(file)
    if is_remote(file):
        with file.open("rb") as opened:
            return ParquetFile(opened, metadata=footer).read_row_group(group, columns, use_threads=False)
    with ParquetFile(str(file), metadata=footer) as opened:
        return opened.read_row_group(group, columns, use_threads=False)


@functools.lru_cache(1024)
def _footer(file: Path) -> Any:
    from pyarrow import ArrowException
    from pyarrow.parquet import read_metadata

    try:
        with file.open("rb") as opened:
            return read_metadata(opened)
    except (ArrowException, OSError) as error:
        raise UserError(f"{file} is no parquet file that can be read: {' '.join(str(error).split())}") from error


def _arrow_groups(file: Path) -> tuple[list[int], "pa.Schema", int]:
    batches, schema = _arrow_batches(file)
    return [len(batch) for batch in batches], schema, 0


def _arrow_group(file: Path, group: int, columns: list[str]) -> "pa.RecordBatch":
    return _arrow_batches(file)[0][group]


@functools.lru_cache(None)
def _arrow_batches(file: Path) -> "tuple[list[pa.RecordBatch], pa.Schema]":
    """Maps an arrow file into memory: a stream, as Hugging Face writes them, or one with a footer. Gives its columns
    too."""
    import pyarrow as pa

    try:
        mapped = pa.memory_map(str(file))
        try:
            table = pa.ipc.open_stream(mapped).read_all()
        except pa.ArrowInvalid:
            table = pa.ipc.open_file(mapped).read_all()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file} is no arrow file that can be read: {' '.join(str(error).split())}") from error
    return table.to_batches(), table.schema


def _check_columns(file: Path, schema: "pa.Schema", image: str, caption: str) -> None:
    """Raises UserError where a file lacks the columns, or they hold something else than pictures and texts."""
    import pyarrow as pa

    def is_text(kind: pa.DataType) -> bool:
        if pa.types.is_dictionary(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
            return is_text(kind.value_type)
        return pa.types.is_string(kind) or pa.types.is_large_string(kind)

    known = _columns(schema)
    for key, name in (("image_feature", image), ("caption_feature", caption)):
        if name not in known:
            raise UserError(f"{file} has no column {name!r} (data.{key}): it has {', '.join(known)}")
    kind = known[image]
    binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    both = pa.types.is_struct(kind) and {field.name for field in kind} & {"bytes", "path"}
    if not (binary or both or (is_text(kind) and not pa.types.is_nested(kind))):
        raise UserError(f"{file} has no pictures in {image!r} (data.image_feature): it holds {kind}")
    if not is_text(known[caption]):
        raise UserError(f"{file} has no text in {caption!r} (data.caption_feature): it holds {known[caption]}")


def _columns(fields: Any, prefix: str = "") -> dict[str, Any]:
    """Types of columns by name, those within others, or within lists of others, as "outer/inner"."""
    import pyarrow as pa

    found = {}
    for field in fields:
        found[f"{prefix}{field.name}"] = kind = field.type
        while pa.types.is_list(kind) or pa.types.is_large_list(kind):
            kind = kind.value_type
        if pa.types.is_struct(kind):
            found |= _columns(kind, f"{prefix}{field.name}/")
    return found


def _captions(value: Any) -> str | list[str]:
    found = captions.texts_in(value)
    return found[0] if len(found) == 1 else found


def _picture(value: Any, folder: Path) -> bytes:
    """Returns a picture's file from a table: itself, or by its path. Raises UnreadableRecord where there is none."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if not value:
        raise UnreadableRecord("it has no picture")
    if isinstance(value, bytes):
        return value
    try:
        return read_file(to_path(value) if is_remote(value) else folder / to_path(value))
    except (UserError, FileNotFoundError) as error:
        raise UnreadableRecord(f"its picture {value} is no file that can be read: {error}") from error
