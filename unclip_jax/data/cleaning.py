"""Decides about one record of a dataset that is built: whether picture and captions are kept.

A record is dropped by the first step that it fails. Of several captions those are left out that fail; the record is
dropped where none is left. Steps are named as the flags of `data build` are.
"""

import difflib
import functools
import io
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from unclip_jax.errors import UserError

UNREADABLE = "unreadable"
SHARE_OF_LETTERS = 0.9  # of a caption that must be of the scripts asked for
QUALITY = 95  # of a JPEG that is made smaller


@dataclass
class Candidate:
    """A record on its way into a dataset. `dropped` is the step that it failed, "" where it is kept; `why` says more.

    row: of its range. chosen: numbers of the captions that are kept. digest, look: as in `duplicates`. views: of the
    picture, for a network.
    """

    row: int
    key: str
    image: bytes = b""
    captions: list[str] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)
    digest: str = ""
    look: str = ""
    views: Any = None
    dropped: str = ""
    why: str = ""

    def choose(self, step: str, keeps: Callable[[str], bool]) -> None:
        """Leaves out captions that a step does not keep, and drops the record where none is left."""
        self.chosen = [k for k in self.chosen if keeps(self.captions[k])]
        self.dropped = self.dropped or ("" if self.chosen else step)


@dataclass(frozen=True)
class Limits:
    """Limits of pictures and captions; 0 or () for none.

    min_side: pixels of the shorter side. max_aspect: longer side over shorter. min_words, max_words: of a caption, as
    spaces part them. letters: scripts, such as ("latin",), of SHARE_OF_LETTERS of a caption's letters, in lower case as
    the Unicode names of letters begin.
    """

    min_side: int = 0
    max_aspect: float = 0.0
    min_words: int = 0
    max_words: int = 0
    letters: tuple[str, ...] = ()

    def apply(self, candidate: Candidate, picture: np.ndarray) -> None:
        """Drops a candidate with its picture, uint8 (H, W, 3), where it is beyond a limit."""
        shorter, longer = sorted(picture.shape[:2])
        if shorter < self.min_side:
            candidate.dropped = "min-side"
        elif self.max_aspect and longer > self.max_aspect * shorter:
            candidate.dropped = "max-aspect"
        if self.min_words:
            candidate.choose("min-words", lambda text: len(text.split()) >= self.min_words)
        if self.max_words:
            candidate.choose("max-words", lambda text: len(text.split()) <= self.max_words)
        if self.letters:
            candidate.choose("letters", lambda text: of_scripts(text, self.letters))


def of_scripts(text: str, scripts: tuple[str, ...]) -> bool:
    """Tells whether a text has letters, SHARE_OF_LETTERS of them or more of the scripts."""
    letters = [_script(letter) for letter in text if letter.isalpha()]
    return bool(letters) and sum(letter in scripts for letter in letters) >= SHARE_OF_LETTERS * len(letters)


@functools.cache
def _script(letter: str) -> str:
    """Names the script of a letter by the first word of its Unicode name, "" for none."""
    return unicodedata.name(letter, "").partition(" ")[0].lower()


def check_scripts(names: tuple[str, ...]) -> None:
    """Raises UserError, which names the nearest, for a name that begins no letter's Unicode name."""
    known = {_script(chr(code)) for code in range(sys.maxunicode + 1) if chr(code).isalpha()}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3, 0.5) or ["latin", "cyrillic", "cjk"]
            raise UserError(f"--letters {name!r}: expected scripts such as {', '.join(near)}")


def smaller(data: bytes, picture: np.ndarray, side: int) -> bytes:
    """Returns a picture file whose shorter side has `side` pixels, as JPEG, or the file itself where it has no more.

    data: the file. picture: what it shows, uint8 (H, W, 3).
    """
    from PIL import Image

    height, width = picture.shape[:2]
    shorter = min(height, width)
    if shorter <= side:
        return data
    size = (max(1, round(width * side / shorter)), max(1, round(height * side / shorter)))
    out = io.BytesIO()
    Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC).save(out, "JPEG", quality=QUALITY)
    return out.getvalue()
