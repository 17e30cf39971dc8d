"""Reads tars of pictures and captions, as img2dataset and WebDataset write them, at random.

An index says where in the tars each picture and its caption lie. It is made when tars are met for the first time, by
one process for all of a run, and kept beside them in unclip_index_HASH.safetensors, or where that place cannot be
written, in the cache that `paths.on_disk` names. Tars that have changed or are new are read again, and only these.

An index holds "spans" (records, 6), int64: first byte and length of the picture, of its .txt and of its .json file, 0
and 0 where there is none; "names" and "name_ends", the `Names` of the pictures; and "draws", as in `splits`. Its
metadata names the tars, with their sizes, versions and records.
"""

import hashlib
import json
import os
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unclip_jax.data import captions, splits
from unclip_jax.data.decoding import SNIFFED_BYTES, is_picture
from unclip_jax.data.folders import beside, is_hidden, say_left_out
from unclip_jax.data.names import Names
from unclip_jax.data.places import files_matching, read_part
from unclip_jax.errors import UserError
from unclip_jax.paths import CHUNK_BYTES, keep_file, kept_file, on_disk
from unclip_jax.progress import Progress

FORMAT = 1  # raised when an older reader would misread an index
THREADS = 32
SECONDS_BETWEEN_SAVES = 300.0
BLOCK = tarfile.BLOCKSIZE
NEAR = 2**16  # bytes between a picture and its caption, up to which both are read at once
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # how such files begin


Tars = dict[str, tuple[int, str]]  # name → size in bytes and version


class TarPart(NamedTuple):
    """Index of one tar."""

    spans: np.ndarray
    names: Names
    draws: np.ndarray
    left_out: dict[str, int]
    damage: str  # what is wrong with the tar, or ""


class TarRecords:
    """Records of tars, by an index. Holds no open file.

    folder: that the names of the tars start from. index: file on a disk. feature: name of the captions in .json files;
    where it is not "caption", .json files come before .txt files.
    """

    def __init__(self, folder: Path, index: Path, feature: str):
        self._folder, self._index, self._feature = folder, index, feature
        tars = _header(index)["tars"]
        self._tars, self._ends = list(tars), np.cumsum([tar["records"] for tar in tars.values()])
        self._local = threading.local()

    def __reduce__(self) -> tuple:
        return TarRecords, (self._folder, self._index, self._feature)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict:
        tar, picture, caption, is_json = self._place(index)
        image, text = _read_both(self._folder / tar, picture, caption)
        return {"image": image, "caption": self._captions(text, is_json), "key": f"{tar}/{self._name(index)}"}

    def without_picture(self, index: int) -> dict:
        tar, _, caption, is_json = self._place(index)
        text = read_part(self._folder / tar, *caption)
        return {"caption": self._captions(text, is_json), "key": f"{tar}/{self._name(index)}"}

    def _place(self, index: int) -> tuple[str, list[int], list[int], bool]:
        """Returns the tar that a record is in, where in it picture and caption lie, and whether the latter is JSON."""
        picture, text, record = self._opened().get_slice("spans")[index : index + 1][0].reshape(3, 2).tolist()
        is_json = not text[1] if self._feature == captions.USUAL else bool(record[1])
        tar = self._tars[np.searchsorted(self._ends, index, side="right")]
        return tar, picture, record if is_json else text, is_json

    def _captions(self, text: bytes, is_json: bool) -> str | list[str]:
        found = captions.captions_in_json(text, self._feature) if is_json else captions.captions_in(text)
        return found[0] if len(found) == 1 else found

    def draws(self) -> np.ndarray:
        return self._opened().get_tensor("draws")

    def _name(self, index: int) -> str:
        opened = self._opened()
        ends = opened.get_slice("name_ends")[max(index - 1, 0) : index + 1].tolist()
        start = ends[0] if index else 0
        return bytes(opened.get_slice("names")[start : ends[-1]]).decode("utf-8", errors="surrogateescape")

    def _opened(self) -> Any:
        """Maps the index into memory, in each thread by itself."""
        if not hasattr(self._local, "opened"):
            from safetensors import safe_open

            self._local.opened = safe_open(self._index, framework="numpy")
        return self._local.opened


def open_tars(pattern: str, feature: str, first: Callable[[Callable[[], bytes]], bytes]) -> TarRecords:
    """Opens the tars that a pattern names, and makes their index where there is none.

    first: has one process of a run call what it is given, while the others wait. Raises UserError where there are no
    tars, and no pictures with captions in them.
    """
    folder, tars = files_matching(pattern, ".tar")
    of_pattern = hashlib.sha256(os.fsencode(pattern.removeprefix(str(folder)))).hexdigest()[:16]
    place = folder / f"unclip_index_{of_pattern}.safetensors"

    def make() -> bytes:
        _make_index(folder, tars, place)
        return b""

    first(make)
    if not _is_of(kept_file(place), tars):  # where it lies in the cache of another machine
        make()
    (index,) = on_disk([kept_file(place)], f"copying {place}")
    return TarRecords(folder, index, feature)


def _make_index(folder: Path, tars: Tars, place: Path) -> None:
    """Writes the index of some tars, as `place` or in the cache, unless it is there; reads only tars that are new.

    Says what is left out or damaged. Raises UserError where there are no pictures with captions.
    """
    parts = _known(kept_file(place), tars)
    missing = [name for name in tars if name not in parts]
    progress, saved = Progress(f"indexing {folder}", sum(tars[name][0] for name in missing), "bytes"), time.monotonic()
    with ThreadPoolExecutor(THREADS) as pool:
        waiting = {pool.submit(read_tar, folder / name, tars[name][0]): name for name in missing}
        for future in as_completed(waiting):
            name = waiting[future]
            parts[name] = future.result()
            progress.advance(tars[name][0])
            if time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                saved = time.monotonic()
                keep_file(place, _encoded(parts, tars))
    if missing:
        where = keep_file(place, _encoded(parts, tars))
        _say(f"{where}: made, the index of {len(parts):,} tars")

    left_out: Counter[str] = sum((Counter(part.left_out) for part in parts.values()), Counter())
    damaged = [f"{name} {parts[name].damage}" for name in tars if parts[name].damage]
    if damaged:
        more = f"; and {len(damaged) - 5} more" if len(damaged) > 5 else ""
        _say(f"{folder}: damaged, the rest is used: {'; '.join(damaged[:5])}{more}")
    taken = sum(len(part.spans) for part in parts.values())
    say_left_out(folder, taken, left_out)
    if not taken:
        raise UserError(f"the tars of {folder} have no pictures with captions: expected such as 1.jpg with 1.txt or "
                        "1.json")  # fmt: skip


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def read_tar(path: Path, size: int) -> TarPart:
    """Finds the pictures with captions in a tar of `size` bytes.

    Pictures are told by their content. The captions of a.jpg are in a.txt or a.json, or a.jpg.txt or a.jpg.json; of
    a.b.jpg, as WebDataset has it, also in a.txt or a.json.
    """
    with path.open("rb") as file:
        if file.read(6).startswith(COMPRESSED):
            return TarPart(np.zeros((0, 6), np.int64), Names.of([]), splits.draws_of_names([]), {}, "is compressed")
        members, damage = _members(file, size)
    left_out = Counter(hidden=sum(map(is_hidden, members)))
    shown = {name: member for name, member in members.items() if not is_hidden(name)}
    texts = {captions.folded(name): (start, length) for name, (start, length, is_one) in shown.items()
             if name.lower().endswith(captions.TEXTS) and length}  # fmt: skip
    pictures = {name: (start, length) for name, (start, length, is_one) in shown.items() if is_one}
    left_out["of other kinds"] = len(shown) - len(pictures) - sum(n.lower().endswith(captions.TEXTS) for n in shown)

    names, spans = [], []
    for name, picture in pictures.items():
        start, _, base = name.rpartition("/")
        short = f"{start}/{base.partition('.')[0]}.".lstrip("/")
        found = [beside(name, ending, texts) or beside(short, ending, texts) for ending in captions.TEXTS]
        if any(found):
            names.append(name)
            spans.append([*picture, *(found[0] or (0, 0)), *(found[1] or (0, 0))])
    left_out["without a caption"] = len(pictures) - len(names)
    stems = (f"{path.name}/{name}" for name in names)
    spans = np.array(spans, np.int64).reshape(-1, 6)
    return TarPart(spans, Names.of(names), splits.draws_of_names(stems), dict(left_out), damage)


def _members(file: Any, size: int) -> tuple[dict[str, tuple[int, int, bool]], str]:
    """Lists the files in an opened tar: name → first byte, length, whether it is a picture; and what is damaged."""
    found, damage, end = {}, "", 0
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True) as tar:  # which also skips what is no header
            while member := tar.next():
                tar.members = []  # it would keep them all
                damage = damage or _no_zeros(file, end, member.offset)
                start, end = member.offset_data, member.offset_data + -(-member.size // BLOCK) * BLOCK
                if start + member.size > size:
                    return found, f"is cut off within {member.name}"
                if not member.isreg() or member.sparse:
                    continue
                file.seek(start)
                is_one = not member.name.lower().endswith(captions.TEXTS) and is_picture(
                    member.name, file.read(min(SNIFFED_BYTES, member.size))
                )
                found[member.name.removeprefix("./")] = (start, member.size, is_one)
            damage = damage or _no_zeros(file, end, size)
    except (tarfile.TarError, OSError, ValueError) as error:
        damage = damage or f"cannot be read from byte {end:,} on ({error})"
    return found, damage


def _no_zeros(file: Any, start: int, stop: int) -> str:
    """Says that a part of a tar, between or after its files, is not zeros as it should be; "" where it is."""
    file.seek(start)
    for at in range(start, stop, CHUNK_BYTES):
        if file.read(min(CHUNK_BYTES, stop - at)).strip(b"\0"):
            return f"has {stop - start:,} bytes that are no files from byte {start:,} on"
    return ""


def _encoded(parts: dict[str, TarPart], tars: Tars) -> bytes:
    """Writes an index of those tars that have a part."""
    from safetensors.numpy import save

    known = {name: parts[name] for name in tars if name in parts}
    facts = {name: {"size": tars[name][0], "version": tars[name][1], "records": len(part.spans),
                    "left_out": part.left_out, "damage": part.damage} for name, part in known.items()}  # fmt: skip
    names = Names.joined([part.names for part in known.values()])
    arrays = {"spans": np.concatenate([part.spans for part in known.values()]), "names": names.letters,
              "name_ends": names.ends, "draws": np.concatenate([part.draws for part in known.values()])}  # fmt: skip
    return save(arrays, {"format": str(FORMAT), "tars": json.dumps(facts)})


def _known(index: Path, tars: Tars) -> dict[str, TarPart]:
    """Reads from an index the parts of those tars that have not changed since; none where there is no index."""
    from safetensors.numpy import load

    header, parts, start = _header(index), {}, 0
    if not header["tars"]:
        return {}
    arrays = load(index.read_bytes())
    names = Names(arrays["names"], arrays["name_ends"])
    for name, tar in header["tars"].items():
        stop = start + tar["records"]
        if tars.get(name) == (tar["size"], tar["version"]):
            parts[name] = TarPart(arrays["spans"][start:stop], names.part(start, stop), arrays["draws"][start:stop],
                                  tar["left_out"], tar["damage"])  # fmt: skip
        start = stop
    return parts


def _is_of(index: Path, tars: Tars) -> bool:
    """Tells whether an index is of these very tars."""
    there = {name: (tar["size"], tar["version"]) for name, tar in _header(index)["tars"].items()}
    return list(there.items()) == list(tars.items())


def _header(index: Path) -> dict[str, Any]:
    """Reads what an index is of: "tars", none of them where it is missing or damaged or of another FORMAT."""
    try:
        with index.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            metadata = json.loads(file.read(length))["__metadata__"]
        if metadata["format"] == str(FORMAT):
            return {"tars": json.loads(metadata["tars"])}
    except (OSError, ValueError, KeyError, MemoryError):
        pass
    return {"tars": {}}


def _read_both(tar: Path, one: list[int], other: list[int]) -> tuple[bytes, bytes]:
    """Reads two parts of a tar, each (first byte, length): at once where they are near each other."""
    first, last = sorted([one, other])
    if last[0] - sum(first) > NEAR:
        return read_part(tar, *one), read_part(tar, *other)
    both = read_part(tar, first[0], sum(last) - first[0])
    return tuple(both[start - first[0] : start - first[0] + length] for start, length in (one, other))
