"""Reads pictures and captions that lie as files in a folder."""

import json
import mimetypes
import os
import posixpath
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from unclip_jax.data import captions, splits
from unclip_jax.data.decoding import SNIFFED_BYTES, endings, is_picture
from unclip_jax.data.names import Names
from unclip_jax.data.places import read_file
from unclip_jax.errors import UnreadableRecord, UserError
from unclip_jax.paths import files_below

SYSTEMS = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found"}  # folders that systems and their archives make
ELSEWHERE = {".tar": "tars", ".parquet": "parquet", ".arrow": "arrow"}  # ending → how data.source reads such files
INLINE = "="  # begins a caption that is held itself, as JSON; else the name of its file is
SNIFFERS = 32  # threads


class FolderRecords:
    """Pictures anywhere below a folder, each with its captions: `find` says where these are.

    pictures: names of the files. captions: for each, the name of a file, or INLINE and a list in JSON. feature: name of
    the captions in JSON files. In a bucket each file is a request: tars and TFDS datasets are faster there.
    """

    def __init__(self, folder: Path, pictures: Names, captions: Names, feature: str):
        self._folder, self._pictures, self._captions, self._feature = folder, pictures, captions, feature

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> dict:
        record = self.without_picture(index)
        return {"image": read_file(self._folder / record["key"])} | record

    def without_picture(self, index: int) -> dict:
        source = self._captions[index]
        if source.startswith(INLINE):
            found = json.loads(source.removeprefix(INLINE))
        else:
            data = read_file(self._folder / source)
            is_json = source.lower().endswith(".json")
            found = captions.captions_in_json(data, self._feature) if is_json else captions.captions_in(data)
        return {"caption": found[0] if len(found) == 1 else found, "key": self._pictures[index]}

    def draws(self) -> np.ndarray:
        return splits.draws_of_names(self._pictures)


def open_folder(folder: Path, feature: str, first: Callable[[Callable[[], bytes]], bytes]) -> FolderRecords:
    """Finds the pictures with captions below a folder.

    first: has one process of a run call what it is given, and returns what that returns to all of them. Raises
    UserError where there is no folder, and where it has no pictures with captions.
    """
    from safetensors.numpy import load, save

    def listing() -> bytes:
        names, sources = find(folder, feature)
        return save({"names": names.letters, "name_ends": names.ends, "captions": sources.letters,
                     "caption_ends": sources.ends})  # fmt: skip

    found = load(first(listing))
    names, sources = Names(found["names"], found["name_ends"]), Names(found["captions"], found["caption_ends"])
    return FolderRecords(folder, names, sources, feature)


def find(folder: Path, feature: str) -> tuple[Names, Names]:
    """Finds the pictures below a folder that have captions, and where these are, as `FolderRecords` takes both.

    The captions of cat.jpg are in cat.txt or cat.jpg.txt, one a line; else in cat.json or cat.jpg.json, by the name
    `feature`; else in a file of METADATA, in this folder or one above it, by that name too. Where `feature` is not
    "caption", text files come last. What is left out is counted on stderr. Raises UserError as `open_folder` does.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: data.source=folder:PATH needs one with pictures and .txt captions")
    files = files_below(folder)
    shown, left_out = [name for name in files if not is_hidden(name)], Counter[str]()
    left_out["hidden"] = len(files) - len(shown)
    pictures = pictures_among(shown)
    pictures = sorted([*pictures, *_sniffed(folder, shown, left_out)], key=lambda name: name.split("/"))
    if not pictures:
        raise UserError(f"{folder} has no pictures: expected such as NAME.jpg or NAME.png{_advice(folder, shown)}")

    texts = {captions.folded(name): name for name in shown if name.lower().endswith(captions.TEXTS)}
    tables, missing = _tables(folder, shown, feature, left_out)
    found: dict[str, str] = {}
    for name in pictures:
        text, record = (beside(name, ending, texts) for ending in captions.TEXTS)
        record = record or tables.get(captions.folded(name))
        if source := text or record if feature == captions.USUAL else record or text:
            found[name] = source
    left_out["without a caption"] = len(pictures) - len(found)
    if not found:
        raise UserError(f"{folder} has {len(pictures)} pictures but no captions: put NAME.txt beside NAME.png"
                        f"{missing}{_advice(folder, shown)}")  # fmt: skip
    say_left_out(folder, len(found), left_out)
    return Names.of(found), Names.of(found.values())


def pictures_among(files: Iterable[str]) -> list[str]:
    """Selects the names that end as pictures' do, without files that are hidden or that systems leave in folders."""
    return [name for name in files if _ending(name) in endings() and not is_hidden(name)]


def beside(picture: str, ending: str, texts: Mapping[str, Any]) -> Any:
    """Finds cat.txt or cat.jpg.txt for cat.jpg; None where there is neither. texts: by their `folded` names."""
    stem = os.path.splitext(picture)[0]
    return texts.get(captions.folded(stem + ending)) or texts.get(captions.folded(picture + ending))


def say_left_out(place: object, taken: int, left_out: Mapping[str, int]) -> None:
    """Says on stderr how many pictures a place has, and how many files were left out, by reason."""
    reasons = [f"{reason} {count:,}" for reason, count in left_out.items() if count]
    if reasons:
        line = f"{place}: {taken:,} pictures with captions; left out: {', '.join(reasons)}"
        print(line, file=sys.stderr, flush=True)


def is_hidden(name: str) -> bool:
    """Tells whether a file, or a folder above it, is hidden, or is one that systems, archives and editors leave."""
    parts = name.split("/")
    return parts[-1].endswith("~") or any(part.startswith(".") or part in SYSTEMS for part in parts)


def _sniffed(folder: Path, files: list[str], left_out: Counter[str]) -> list[str]:
    """Finds pictures among the files whose endings say nothing, and counts files that are neither picture nor caption.

    Only files are opened whose endings no other kind of file is known for.
    """
    others = [name for name in files if _ending(name) not in endings() and not name.lower().endswith(captions.TEXTS)]
    others = [name for name in others if name.lower().rpartition("/")[2] not in captions.METADATA]
    kinds = mimetypes.MimeTypes().types_map[True]
    unknown = [name for name in others if _ending(name) not in (*kinds, *ELSEWHERE, ".jsonl")]

    def sniff(name: str) -> bool:
        try:
            with (folder / name).open("rb") as file:
                return is_picture(name, file.read(SNIFFED_BYTES))
        except OSError:
            return False

    with ThreadPoolExecutor(SNIFFERS) as pool:
        found = [name for name, is_one in zip(unknown, pool.map(sniff, unknown), strict=True) if is_one]
    rest = Counter(_ending(name) or "without ending" for name in others) - Counter(_ending(name) for name in found)
    if count := len(others) - len(found):
        endings_there = ", ".join(ending for ending, _ in rest.most_common(5))
        left_out[f"of other kinds ({endings_there})"] = count
    return found


def _tables(
    folder: Path, files: list[str], feature: str, left_out: Counter[str]
) -> tuple[dict[str, str], str]:
    """Reads the captions in all files of METADATA, by the folded names of pictures, as `FolderRecords` takes them.

    Returns also what a message should say about names that the rows lack.
    """
    found, missing = defaultdict(list), ""
    for name in files:
        place, _, base = name.rpartition("/")
        if base.lower() not in captions.METADATA:
            continue
        for row in captions.rows_of_metadata(base.lower(), read_file(folder / name)):
            try:
                said = captions.cleaned(captions.captions_named(row, feature))
                found[captions.folded(posixpath.normpath(posixpath.join(place, row["file_name"])))] += said
            except UnreadableRecord as error:
                left_out[f"rows without a caption in {name}"] += 1
                missing = f"; of {name}: {error}"
            except (KeyError, TypeError):
                left_out[f"rows without file_name in {name}"] += 1
                missing = f"; its {name} lacks file_name"
    return {name: INLINE + json.dumps(said) for name, said in found.items()}, missing


def _advice(folder: Path, files: list[str]) -> str:
    """Names the source that reads the files of a folder which holds no pictures with captions."""
    for ending, kind in ELSEWHERE.items():
        if there := next((name for name in files if _ending(name) == ending), ""):
            within = folder / there.rpartition("/")[0]
            return f"; its {ending} files are read by --config.data.source='{kind}:{within}/*{ending}'"
    if any(_ending(name) in (".jsonl", ".csv") for name in files):
        return "; captions of many pictures are read from metadata.jsonl or metadata.csv, with file_name and caption"
    return ""


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()
