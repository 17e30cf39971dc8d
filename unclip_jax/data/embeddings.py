"""Stores CLIP's embeddings of a dataset, which `python -m unclip_jax.data embed` writes and training reads.

    DIR/embeddings.json                     names the CLIP and the data, with the number of records of each split
    DIR/train-00000-of-00012.safetensors    a shard: embeddings of SHARD_RECORDS records, and the same facts again

A shard holds "image" (records, crops, dim) and "text" (captions, dim), float16 or float32, and "records", int64, a row
of TABLE for each record. The row ends in a checksum of itself and of the record's embeddings, which is compared each
time that they are read. Two more tell whether the data has changed since. Shards appear as a whole or not at all.

DIR may be in a bucket. Training reads rows at random, and a request for each would be too slow. So it first copies the
shards of its splits to a disk, 4 KiB for a record at the papers' size with one crop and one caption in float16, where a
later run finds them again (`paths.on_disk` says where). They are mapped into memory, so that they fill only memory that
nothing else needs. Every host needs all of them.
"""

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

import numpy as np

from unclip_jax import cli
from unclip_jax.data.sources import Source, without_picture
from unclip_jax.data.transforms import Crops, captions_of
from unclip_jax.errors import UnreadableRecord, UserError
from unclip_jax.foreign import parsed_json
from unclip_jax.paths import is_remote, on_disk, write_bytes

if TYPE_CHECKING:
    from safetensors import safe_open

FORMAT = 2  # raised when an older reader would misread the folder; format 1 is still read
DESCRIPTION = "embeddings.json"
SHARD_RECORDS = 2**14  # of one shard; 64 MiB at the papers' size with one crop and one caption each, in float16
COMMAND = f"{cli.command('data')} embed"
DTYPES = ("float16", "float32")


class Provenance(NamedTuple):
    """Origin of embeddings: the CLIP that made them, and the data."""

    clip: str  # identity of the CLIP's bundle
    source: str  # as in config.data, like those below
    image_feature: str
    caption_feature: str
    crop: str


class Form(NamedTuple):
    """Form in which embeddings are stored."""

    dtype: str  # one of DTYPES
    crops: int = 1  # of each picture
    seed: int = 0  # of random crops: `Crops` draws crop j of record i by (seed, i, j)
    side: int = 0  # of CLIP's pictures, by which random crops are drawn, in pixels


class Shard(NamedTuple):
    """One file of embeddings, of the records start … stop - 1 of a split."""

    path: Path
    start: int
    stop: int
    labels: dict[str, Any]  # metadata of the file: provenance, form, split, start and stop


class Row(NamedTuple):
    """Facts that a shard stores of a record."""

    first: int  # row of its first caption in "text"
    captions: int  # their number; 0: the record could not be read
    words: int  # checksum of its key and captions
    whole: int  # checksum of its captions and its picture's file
    height: int  # of its picture, in pixels
    width: int


TABLE = (*Row._fields, "checksum")


def begin(folder: Path, provenance: Provenance, form: Form, splits: dict[str, int]) -> list[Shard]:
    """Describes a folder of embeddings and lists its shards, of which none need exist yet.

    Any number of processes may begin at once. splits: name → number of records. Raises UserError where the folder holds
    embeddings by another CLIP, of other data or in another form.
    """
    ours = {"format": FORMAT} | provenance._asdict() | form._asdict()
    if not (folder / DESCRIPTION).exists():
        description = ours | {"shard": SHARD_RECORDS, "splits": splits}
        write_bytes(folder / DESCRIPTION, json.dumps(description, indent=2).encode() + b"\n")  # alike in all processes
    description = _description(folder, "give a new folder", **ours)
    if description["splits"] != splits:
        found, now = (", ".join(f"{n} of {name}" for name, n in s.items()) for s in (description["splits"], splits))
        raise UserError(f"{folder} was begun for records {found}, now there are {now}: give a new folder")
    return [shard for split in splits for shard in _shards(folder, description, split)]


def write(shard: Shard, image: np.ndarray, text: np.ndarray, rows: list[Row]) -> None:
    """Writes the file of a shard.

    image: (records, crops, dim). text: (captions, dim). Raises UserError for embeddings that are not finite, or that
    are too large for the type that they are stored in.
    """
    from safetensors.numpy import save

    with np.errstate(over="ignore"):
        image, text = (np.ascontiguousarray(array, shard.labels["dtype"]) for array in (image, text))
    table = np.zeros((len(rows), len(TABLE)), np.int64)
    table[:, :-1] = rows
    for record, row in enumerate(rows):
        captions = text[row.first : row.first + row.captions]
        if not (np.isfinite(image[record]).all() and np.isfinite(captions).all()):
            raise UserError(
                f"CLIP's embeddings of record number {shard.start + record} of split {shard.labels['split']!r} are not "
                f"finite numbers in {shard.labels['dtype']}: is this CLIP trained? If it is, give a new folder and "
                "--dtype=float32"
            )
        table[record, -1] = _checksum(table[record, :-1], image[record], captions)
    labels = shard.labels | {"unreadable": sum(row.captions == 0 for row in rows)}
    content = save({"image": image, "text": text, "records": table}, {"shard": json.dumps(labels)})
    write_bytes(shard.path, content, alone=True)


def finished(folder: Path, shards: list[Shard]) -> list[Shard]:
    """Returns those of the shards whose files are in the folder."""
    names = {path.name for path in folder.iterdir()}
    return [shard for shard in shards if shard.path.name in names]


def unreadable(shard: Shard) -> int:
    """Returns how many records of a finished shard could not be read when it was made."""
    if not is_remote(shard.path):
        return int(_labels(shard, _opened(shard, shard.path).metadata())["unreadable"])
    with shard.path.open("rb") as file:  # only its header, which begins with its own length
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return int(_labels(shard, header["__metadata__"])["unreadable"])


def checksum(record: dict) -> int:
    """Computes the checksum of a record's picture file and captions."""
    return zlib.crc32("\0".join(captions_of(record)).encode(), zlib.crc32(record["image"]))


def checksum_of_words(record: dict) -> int:
    """Computes the checksum of a record's key and captions."""
    words = "\0".join([record["key"], *captions_of(record)])
    return zlib.crc32(words.encode(errors="surrogateescape"))  # names of files may be no UTF-8


class EmbeddedSource:
    """Source whose records also hold "image_embeddings" (crops, dim) and "text_embeddings" (captions, dim), float32.

    Where the crops were random, "crops" are the `Crops`. It can be pickled.

    source: the plain records of `split`, kept as `plain`. folder: of the embeddings, whose form is `form`. provenance:
        that the embeddings must have.
    pictures: False leaves out the pictures, which are not read then; "sides" (height, width) tells their size.

    Raises UserError where the folder does not hold such embeddings of all records of the split.
    """

    def __init__(self, source: Source, folder: Path, provenance: Provenance, split: str, pictures: bool = True):
        description = _description(folder, f"give others, by {COMMAND}", **provenance._asdict())
        if split not in description["splits"]:
            there = ", ".join(description["splits"])
            raise UserError(f"data.embeddings {folder} has no split {split!r}: it has {there}")
        if description["splits"][split] != len(source):
            raise UserError(
                f"data.embeddings {folder} is of {description['splits'][split]} records of split {split!r}, now there "
                f"are {len(source)}: make it anew with {COMMAND}"
            )
        self.plain, self._folder, self._description = source, folder, description
        self.mixed = getattr(source, "mixed", ())
        self.form = Form(**{name: description[name] for name in Form._fields})
        self._pictures = pictures or description["format"] == 1  # by whose checksum alone a change is noticed
        self._shards = _shards(folder, description, split)
        self._files = _all_files(folder, self._shards, split)
        self._readers = dict(enumerate(map(_opened, self._shards, self._files)))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_readers": {}}  # which another process opens when it needs them

    def __len__(self) -> int:
        return len(self.plain)

    def __getitem__(self, index: int) -> dict:
        """Reads a record with its embeddings.

        Raises UnreadableRecord where it could not be read when it was embedded, and UserError where it has changed
        since, and where its embeddings are damaged.
        """
        number, place = divmod(int(index), self._description["shard"])
        if number not in self._readers:
            self._readers[number] = _opened(self._shards[number], self._files[number])
        row, image, text = _read(self._shards[number], self._readers[number], place)
        if not row.captions:
            raise UnreadableRecord("it could not be read when the embeddings were made")
        if self._pictures:
            record = self.plain[index]
            changed = checksum(record) != row.whole
        else:
            record = without_picture(self.plain, index) | {"sides": (row.height, row.width)}
            changed = checksum_of_words(record) != row.words
        if changed:
            raise UserError(f"record {record['key']} changed since data.embeddings {self._folder} was made: make it "
                            f"anew with {COMMAND}")  # fmt: skip
        if self._description["crop"] != "center":
            record["crops"] = Crops(self.form.crops, (self.form.seed, int(index)), self.form.side)
        return record | {"image_embeddings": image, "text_embeddings": text}

    def without_picture(self, index: int) -> dict:
        return without_picture(self.plain, index)


def image_embeddings(folder: Path, clip: str) -> Iterator[np.ndarray]:
    """Yields the image embeddings (records · crops, dim) of the training split, file by file, without unreadable
    records.

    clip: identity of the CLIP that must have made them. Raises UserError where another one did, and for missing files
    and damaged ones.
    """
    description = _description(folder, f"give others, by {COMMAND}", clip=clip)
    split = next(iter(description["splits"]))  # the held-out one is the second
    shards = _shards(folder, description, split)
    for shard, file in zip(shards, _all_files(folder, shards, split), strict=True):
        reader = _opened(shard, file)
        found = (_read(shard, reader, place) for place in range(shard.stop - shard.start))
        yield np.concatenate([image[: image.shape[0] * (row.captions > 0)] for row, image, _ in found])


def _description(folder: Path, advice: str, **wanted: str | int) -> dict[str, Any]:
    """Reads embeddings.json. Raises UserError, with advice, where it is missing, damaged or of another provenance."""
    if not (folder / DESCRIPTION).exists():
        raise UserError(f"no embeddings at {folder}: it has no {DESCRIPTION}; make them with {COMMAND} --out={folder}")
    try:
        description = parsed_json((folder / DESCRIPTION).read_text())
        if description["format"] > FORMAT:
            raise UserError(f"{folder} was written by a newer version of this library: upgrade unclip_jax")
        if description["format"] == 1:
            description = Form("float32")._asdict() | {"crop": "center"} | description
        names = ("format", *Provenance._fields, *Form._fields, "shard", "splits")
        found = {name: description[name] for name in names}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / DESCRIPTION} cannot be read ({error!r}): make it anew with {COMMAND}") from error
    for name, ours in wanted.items():
        if found[name] != ours:
            raise UserError(f"{folder} holds embeddings of {name} {found[name]}, not {ours}: {advice}")
    return found


def _shards(folder: Path, description: dict[str, Any], split: str) -> list[Shard]:
    """Lists the shards of a split, whether they exist or not."""
    size, total = description["shard"], description["splits"][split]
    count = -(-total // size)
    found = []
    for k in range(count):
        start, stop = k * size, min((k + 1) * size, total)
        labels = {name: description[name] for name in ("format", *Provenance._fields, *Form._fields)}
        labels |= {"split": split, "start": start, "stop": stop}
        name = f"{quote(split, safe='')}-{k:05}-of-{count:05}.safetensors"
        found.append(Shard(folder / name, start, stop, labels))
    return found


def _all_files(folder: Path, shards: list[Shard], split: str) -> list[Path]:
    """Finds the files of all shards of a split, or their copies on a disk. Raises UserError where some are missing."""
    missing = len(shards) - len(finished(folder, shards))
    if missing:
        raise UserError(f"{folder} lacks {missing} of {len(shards)} files of split {split!r}: run {COMMAND} again, it "
                        "goes on where it stopped")  # fmt: skip
    return on_disk([shard.path for shard in shards], f"copying {folder}")


def _opened(shard: Shard, file: Path) -> "safe_open":
    """Opens a shard, mapped into memory; no file is kept open, as there may be thousands.

    file: the shard's own, or a copy of it. Raises UserError for a damaged file and for one of another shard.
    """
    from safetensors import SafetensorError, safe_open

    try:
        reader = safe_open(file, framework="numpy")
    except SafetensorError as error:
        raise _damaged(shard, str(error)) from error
    _labels(shard, reader.metadata() or {})
    return reader


def _labels(shard: Shard, metadata: dict[str, str]) -> dict[str, Any]:
    """Returns the labels of a shard's file. Raises UserError where they are another shard's."""
    ours = shard.labels
    if ours["format"] == 1:
        ours = {name: str(ours[name]) for name in (*Provenance._fields[:4], "split", "start", "stop")}
        found = metadata
    else:
        try:
            found = json.loads(metadata["shard"])
        except (KeyError, ValueError) as error:
            raise _damaged(shard, f"its labels cannot be read: {error!r}") from error
    if {name: found.get(name) for name in ours} != ours:
        raise UserError(f"{shard.path} belongs to other embeddings: delete it and run {COMMAND} again")
    return found


def _read(shard: Shard, reader: "safe_open", place: int) -> tuple[Row, np.ndarray, np.ndarray]:
    """Reads the record at a place of a shard: its row, and its embeddings of crops and of captions, float32 (…, dim).

    Raises UserError where they are damaged.
    """
    from safetensors import SafetensorError

    old = shard.labels["format"] == 1
    try:
        table = reader.get_slice("records")[place : place + 1][0]
        image = reader.get_slice("image")[place : place + 1]
        image = image if old else image[0]
        first, captions = int(table[0]), int(table[1])
        text = reader.get_slice("text")[first : first + captions] if captions else image[:0]
    except (SafetensorError, ValueError, IndexError, OverflowError) as error:  # OverflowError: a negative place
        raise _damaged(shard, str(error)) from error
    if old:
        row = Row(first, captions, 0, int(table[2]), 0, 0)
    else:
        row = Row(*table[:-1].tolist())
        if int(table[-1]) != _checksum(table[:-1], image, text):
            raise _damaged(shard, f"record number {shard.start + place} has another checksum")
    image, text = image.astype(np.float32), text.astype(np.float32)
    if not (np.isfinite(image).all() and np.isfinite(text).all()):
        raise _damaged(shard, f"record number {shard.start + place} has embeddings that are not finite numbers")
    return row, image, text


def _checksum(row: np.ndarray, image: np.ndarray, text: np.ndarray) -> int:
    """Computes the checksum of a record's row, without its last number, and embeddings."""
    return zlib.crc32(text.tobytes(), zlib.crc32(image.tobytes(), zlib.crc32(row.tobytes())))


def _damaged(shard: Shard, how: str) -> UserError:
    return UserError(f"{shard.path} is damaged ({how}): delete it and run {COMMAND} again")
