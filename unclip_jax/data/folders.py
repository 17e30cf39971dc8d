"""Reads pictures and captions that lie as files in a folder."""

import hashlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from unclip_jax.errors import UserError
from unclip_jax.paths import files_below

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
ONE_HELD_OUT_IN = 50  # pictures of a folder


class FolderSource:
    """Pictures anywhere below a folder, each with its captions beside it, in cat.txt or cat.jpg.txt for cat.jpg.

    Each line of the file is a caption, of which training draws one at a time.

    Whether a picture is in the split "train" or "test" depends on a hash of its name, so that this does not change when
    pictures are added. In a bucket each record takes several requests: a TFDS dataset is faster there. Raises UserError
    for another split and for a folder with fewer than two captioned pictures.
    """

    def __init__(self, folder: Path, split: str):
        if not folder.is_dir():
            raise UserError(f"no folder {folder}: data.source=folder:PATH needs one with pictures and .txt captions")
        if split not in ("train", "test"):
            raise UserError(f"a folder has no split {split!r}: expected train or test")
        files = files_below(folder)
        pictures = pictures_among(files)
        if not pictures:
            raise UserError(f"{folder} has no pictures: expected files ending in {', '.join(PICTURES)}")
        texts = {name.lower(): name for name in files if name.lower().endswith(".txt")}
        captions = {}
        for name in pictures:
            for beside in (str(PurePosixPath(name).with_suffix(".txt")), f"{name}.txt"):
                if beside.lower() in texts:
                    captions[name] = texts[beside.lower()]
                    break
        names = list(captions)
        if not names:
            raise UserError(f"{folder} has {len(pictures)} pictures but no captions: put NAME.txt beside NAME.png")
        self.uncaptioned = len(pictures) - len(names)
        if self.uncaptioned:
            print(f"{folder}: {self.uncaptioned} of {len(pictures)} pictures have no caption: skipped", file=sys.stderr)
        if len(names) == 1:
            raise UserError(f"{folder} has one captioned picture: at least two are needed, one of them to hold out")
        held_out = _held_out(names)
        self._folder, self._captions = folder, captions
        self._names = [name for name in names if (name in held_out) == (split == "test")]

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> dict:
        name = self._names[index]
        captions = captions_in((self._folder / self._captions[name]).read_bytes()) or [""]
        image = (self._folder / name).read_bytes()
        return {"image": image, "caption": captions[0] if len(captions) == 1 else captions, "key": name}


def pictures_among(files: Iterable[str]) -> list[str]:
    """Selects the names of pictures, without hidden files and folders, and __MACOSX, which macOS puts into archives."""
    return [
        name
        for name in files
        if name.lower().endswith(PICTURES)
        and not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
    ]


def captions_in(text: bytes) -> list[str]:
    """Lists the captions in a text file, one a line. Bytes that are not UTF-8 become U+FFFD."""
    return [line.strip() for line in text.decode("utf-8-sig", errors="replace").splitlines() if line.strip()]


def _held_out(names: list[str]) -> set[str]:
    """Chooses about one picture in ONE_HELD_OUT_IN by its name alone, at least one, and never all of them."""

    def draw(name: str) -> float:
        # Without the ending, so that two pictures with one caption are in one split.
        return int.from_bytes(hashlib.sha256(os.path.splitext(name)[0].encode()).digest()[:8]) / 2**64

    chosen = {name for name in names if draw(name) < 1 / ONE_HELD_OUT_IN} or {min(names, key=draw)}
    return chosen if len(chosen) < len(names) else chosen - {max(names, key=draw)}
