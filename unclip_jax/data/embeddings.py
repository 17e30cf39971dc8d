"""Stores CLIP's embeddings of a dataset, which `python -m unclip_jax.data embed` writes and training reads.

    DIR/embeddings.json                     names the CLIP and the data, with the number of records of each split
    DIR/train-00000-of-00012.safetensors    a shard: embeddings of SHARD_RECORDS records, and the same facts again

A shard holds "image" (records, dim) and "text" (captions, dim), float32, and "records" (records, 3), int64: for each
record, where its captions begin in "text", how many they are (0: the record could not be read), and a checksum of the
record, by which changed data is noticed. Shards appear as a whole or not at all.

DIR may be in a bucket. Training reads rows at random, and a request for each would be too slow. So it first copies the
shards of its splits to a disk, 8 KiB for a record at the papers' size with one caption, where a later run finds them
again (`paths.on_disk` says where). They are mapped into memory, so that they fill only memory that nothing else needs.
Every host needs all of them.
"""

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

import numpy as np

from unclip_jax import cli
from unclip_jax.data.sources import Source
from unclip_jax.data.transforms import captions_of
from unclip_jax.errors import UserError
from unclip_jax.paths import is_remote, on_disk, write_bytes

if TYPE_CHECKING:
    from safetensors import safe_open

FORMAT = 1  # raised when an older reader would misread the folder
DESCRIPTION = "embeddings.json"
SHARD_RECORDS = 2**14  # of one shard; 128 MiB at the papers' size with one caption each
COMMAND = f"{cli.command('data')} embed"


class Provenance(NamedTuple):
    """Origin of embeddings: the CLIP that made them, and the data."""

    clip: str  # identity of the CLIP's bundle
    source: str  # as in config.data, like the two below
    image_feature: str
    caption_feature: str


class Shard(NamedTuple):
    """One file of embeddings, of the records start … stop - 1 of a split."""

    path: Path
    start: int
    stop: int
    labels: dict[str, str]  # metadata of the file: provenance, split, start and stop


def begin(folder: Path, provenance: Provenance, splits: dict[str, int]) -> list[Shard]:
    """Describes a folder of embeddings and lists its shards, of which none need exist yet.

    Any number of processes may begin at once. splits: name → number of records. Raises UserError where the folder holds
    embeddings by another CLIP or of other data.
    """
    if not (folder / DESCRIPTION).exists():
        description = {"format": FORMAT} | provenance._asdict() | {"shard": SHARD_RECORDS, "splits": splits}
        write_bytes(folder / DESCRIPTION, json.dumps(description, indent=2).encode() + b"\n")  # alike in all processes
    description = _description(folder, **provenance._asdict())
    if description["splits"] != splits:
        found, now = (", ".join(f"{n} of {name}" for name, n in s.items()) for s in (description["splits"], splits))
        raise UserError(f"{folder} was begun for records {found}, now there are {now}: give a new folder")
    return [shard for split in splits for shard in _shards(folder, description, split)]


def write(shard: Shard, image: np.ndarray, text: np.ndarray, records: np.ndarray) -> None:
    """Writes the file of a shard, whose arrays the module's docstring describes."""
    from safetensors.numpy import save

    unreadable = {"unreadable": str(int(np.sum(records[:, 1] == 0)))}
    arrays = {"image": image, "text": text, "records": records}
    write_bytes(shard.path, save(arrays, shard.labels | unreadable), alone=True)


def finished(folder: Path, shards: list[Shard]) -> list[Shard]:
    """Returns those of the shards whose files are in the folder."""
    names = {path.name for path in folder.iterdir()}
    return [shard for shard in shards if shard.path.name in names]


def unreadable(shard: Shard) -> int:
    """Returns how many records of a finished shard could not be read when it was made."""
    if not is_remote(shard.path):
        return int(_opened(shard, shard.path).metadata()["unreadable"])
    with shard.path.open("rb") as file:  # only its header, which begins with its own length
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return int(_checked(shard, header["__metadata__"])["unreadable"])


def checksum(record: dict) -> int:
    """Computes the checksum of a record's picture file and captions."""
    return zlib.crc32("\0".join(captions_of(record)).encode(), zlib.crc32(record["image"]))


class EmbeddedSource:
    """Source whose records also hold "image_embedding" (dim,) and "text_embeddings" (captions, dim), float32.

    Records that could not be read when the embeddings were made have neither.

    source: the plain records of `split`, kept as `plain`. folder: of the embeddings. provenance: that the embeddings
    must have. Raises UserError where the folder does not hold such embeddings of all records of the split.
    """

    def __init__(self, source: Source, folder: Path, provenance: Provenance, split: str):
        description = _description(folder, **provenance._asdict())
        if split not in description["splits"]:
            there = ", ".join(description["splits"])
            raise UserError(f"data.embeddings {folder} has no split {split!r}: it has {there}")
        if description["splits"][split] != len(source):
            raise UserError(
                f"data.embeddings {folder} is of {description['splits'][split]} records of split {split!r}, now there "
                f"are {len(source)}: make it anew with {COMMAND}"
            )
        self.plain, self._folder, self._size = source, folder, description["shard"]
        self.mixed = getattr(source, "mixed", ())
        self._shards = _all_opened(folder, description, split)

    def __len__(self) -> int:
        return len(self.plain)

    def __getitem__(self, index: int) -> dict:
        """Reads a record with its embeddings. Raises UserError where the record has changed since it was embedded."""
        record = self.plain[index]
        number, row = divmod(int(index), self._size)
        shard = self._shards[number]
        first, count, stored = shard.get_slice("records")[row : row + 1][0].tolist()
        if not count:
            return record
        if stored != checksum(record):
            raise UserError(f"record {record['key']} changed since data.embeddings {self._folder} was made: make it "
                            f"anew with {COMMAND}")  # fmt: skip
        return record | {
            "image_embedding": shard.get_slice("image")[row : row + 1][0],
            "text_embeddings": shard.get_slice("text")[first : first + count],
        }


def image_embeddings(folder: Path, clip: str) -> Iterator[np.ndarray]:
    """Yields the image embeddings (records, dim) of the training split, file by file, without unreadable records.

    clip: identity of the CLIP that must have made them. Raises UserError where another one did, and for missing files.
    """
    description = _description(folder, clip=clip)
    for shard in _all_opened(folder, description, next(iter(description["splits"]))):  # the held-out one is the second
        yield shard.get_tensor("image")[shard.get_tensor("records")[:, 1] > 0]


def _description(folder: Path, **provenance: str) -> dict[str, Any]:
    """Reads embeddings.json. Raises UserError where it is missing, damaged or of another provenance."""
    if not (folder / DESCRIPTION).exists():
        raise UserError(f"no embeddings at {folder}: it has no {DESCRIPTION}; make them with {COMMAND} --out={folder}")
    try:
        description = json.loads((folder / DESCRIPTION).read_text())
        if description["format"] > FORMAT:
            raise UserError(f"{folder} was written by a newer version of this library: upgrade unclip_jax")
        found = {name: description[name] for name in (*Provenance._fields, "shard", "splits")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / DESCRIPTION} cannot be read ({error!r}): make it anew with {COMMAND}") from error
    for name, ours in provenance.items():
        if found[name] != ours:
            raise UserError(f"{folder} holds embeddings of {name} {found[name]}, not {ours}: give others, by {COMMAND}")
    return found


def _shards(folder: Path, description: dict[str, Any], split: str) -> list[Shard]:
    """Lists the shards of a split, whether they exist or not."""
    size, total = description["shard"], description["splits"][split]
    count = -(-total // size)
    found = []
    for k in range(count):
        start, stop = k * size, min((k + 1) * size, total)
        labels = {name: description[name] for name in Provenance._fields}
        labels |= {"split": split, "start": str(start), "stop": str(stop)}
        name = f"{quote(split, safe='')}-{k:05}-of-{count:05}.safetensors"
        found.append(Shard(folder / name, start, stop, labels))
    return found


def _all_opened(folder: Path, description: dict[str, Any], split: str) -> "list[safe_open]":
    """Opens all shards of a split, or their copies on a disk. Raises UserError where some are missing."""
    shards = _shards(folder, description, split)
    missing = len(shards) - len(finished(folder, shards))
    if missing:
        raise UserError(f"{folder} lacks {missing} of {len(shards)} files of split {split!r}: run {COMMAND} again, it "
                        "goes on where it stopped")  # fmt: skip
    files = on_disk([shard.path for shard in shards], f"copying {folder}")
    return [_opened(shard, file) for shard, file in zip(shards, files, strict=True)]


def _opened(shard: Shard, file: Path) -> "safe_open":
    """Opens a shard, mapped into memory; no file is kept open, as there may be thousands.

    file: the shard's own, or a copy of it. Raises UserError for a damaged file and for one of another shard.
    """
    from safetensors import SafetensorError, safe_open

    try:
        reader = safe_open(file, framework="numpy")
    except SafetensorError as error:
        raise UserError(f"{shard.path} is damaged ({error}): delete it and run {COMMAND} again") from error
    _checked(shard, reader.metadata() or {})
    return reader


def _checked(shard: Shard, labels: dict[str, str]) -> dict[str, str]:
    """Returns the labels of a shard's file. Raises UserError where they are another shard's."""
    if {name: labels.get(name) for name in shard.labels} != shard.labels:
        raise UserError(f"{shard.path} belongs to other embeddings: delete it and run {COMMAND} again")
    return labels
