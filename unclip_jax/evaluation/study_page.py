"""Studies by people: which pictures they compare, in which order and on which side, and the page that asks them.

The page is one HTML file beside a folder of pictures. It needs no network, and nothing in it tells the arms apart: the
names of arms and folders are in a key, which stays with whoever counts the votes.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np

from unclip_jax import pictures
from unclip_jax.errors import UserError
from unclip_jax.evaluation.reading import picture_files
from unclip_jax.paths import write_bytes

QUESTIONS = {
    "photorealism": "Which picture looks more photorealistic?",
    "caption": "Which picture matches the caption better?",
    "diversity": "Which set of pictures is more diverse?",
}
GRID = 16  # pictures of a caption, 4 × 4, in a set of the question "diversity"
GRID_SIDE = 128  # of each of them, at most: about what a screen has room for


class Comparison(NamedTuple):
    """Two arms' pictures of one caption, side by side."""

    left: str  # arms
    right: str
    caption: str
    number: int  # of the picture, or set of pictures, among the caption's


def choose(captions: dict[str, Sequence[str]], per_sheet: int, comparisons: int, seed: int) -> list[Comparison]:
    """Draws comparisons: each pair of arms equally often, each arm of a pair equally often left, in random order.

    captions: arm → the captions of its pictures. per_sheet: pictures that are shown at once. comparisons: at most so
    many; less where there are not so many pictures, as none is shown twice beside the same other. Captions come a
    second time only when all have come once. Raises UserError where the arms' captions differ or are missing.
    """
    rng = np.random.default_rng(seed)
    items = [(number, caption) for caption, count in _sheets(captions, per_sheet).items() for number in range(count)]
    pairs = list(combinations(captions, 2))
    total = min(comparisons, len(pairs) * len(items))
    chosen = []
    for k, pair in enumerate(pairs):
        shuffled = sorted(rng.permutation(len(items)), key=lambda i: items[i][0])
        count = (total + k) // len(pairs)  # these add up to the total
        sides = rng.permutation(count) % 2
        for i, side in zip(shuffled[:count], sides, strict=True):
            chosen.append(Comparison(pair[side], pair[1 - side], items[i][1], items[i][0]))
    return [chosen[i] for i in rng.permutation(total)]


def _sheets(captions: dict[str, Sequence[str]], per_sheet: int) -> dict[str, int]:
    """Counts, for each caption, the sheets that every arm has pictures for."""
    counts = {arm: Counter(texts) for arm, texts in captions.items()}
    for arm, count in counts.items():
        if not count or "" in count:
            lacking = f"{count['']} of its {count.total()} pictures have no caption"
            raise UserError(f"arm {arm}: {lacking}; expected PNG files or tars as `sample --prompts` draws them")
    (first, known), *others = counts.items()
    for arm, count in others:
        if different := sorted(set(known) ^ set(count)):
            owner, other = (first, arm) if different[0] in known else (arm, first)
            raise UserError(f"{len(different)} captions differ between the arms {first} and {arm}: {owner} has "
                            f"{different[0]!r}, {other} has not; draw both for one file of captions")  # fmt: skip
    for arm, count in counts.items():
        if lacking := [caption for caption in known if count[caption] < per_sheet]:
            raise UserError(f"arm {arm} has {count[lacking[0]]} pictures of {lacking[0]!r}, and a set has {per_sheet}: "
                            f"draw them with `sample --prompts` and -n {per_sheet}")  # fmt: skip
    return {caption: min(count[caption] for count in counts.values()) // per_sheet for caption in known}


def write_study(out: Path, question: str, arms: dict[str, str], comparisons: int, seed: int) -> list[Comparison]:
    """Writes OUT/page, which is for those who vote, and OUT/key.json, which tells what they saw; returns the latter.

    question: one of QUESTIONS. arms: name → folder of its pictures, as `picture_files` reads it. Pictures are cut to
    the square in their middle, and brought to the smallest arm's size. Raises UserError as `choose` does, and where OUT
    holds a study.
    """
    if (out / "key.json").exists():
        raise UserError(f"{out} holds a study already: give another --out")
    per_sheet = GRID if question == "diversity" else 1
    captions = {arm: [file.caption for file in picture_files(folder)] for arm, folder in arms.items()}
    chosen = choose(captions, per_sheet, comparisons, seed)
    side = min(len(next(picture_files(folder)).square(None)) for folder in arms.values())
    if question == "diversity":
        side = min(side, GRID_SIDE)
    digest = hashlib.sha256(json.dumps([question, seed, list(arms), chosen]).encode())
    for arm, folder in arms.items():
        shown = defaultdict(list)  # caption and number of a sheet → names of its files
        for i, comparison in enumerate(chosen):
            for hand in ("left", "right"):
                if getattr(comparison, hand) == arm:
                    shown[comparison.caption, comparison.number].append(f"{i:05d}_{hand}.png")
        _write_pictures(out / "page" / "pictures", folder, captions[arm], shown, per_sheet, side, digest)
    asked = [None if question == "photorealism" else comparison.caption for comparison in chosen]
    known = {"id": digest.hexdigest()[:12], "question": question, "seed": seed, "side": side, "arms": arms}
    page = {"id": known["id"], "question": QUESTIONS[question], "captions": asked}
    key = known | {"comparisons": [comparison._asdict() for comparison in chosen]}
    template = Path(__file__).with_name("study_page.html").read_text(encoding="utf-8")
    # A caption may hold "</script>", and the replaced text may not be read as anything but itself.
    filled = template.replace("STUDY", json.dumps(page).replace("<", "\\u003c"), 1)
    write_bytes(out / "page" / "index.html", filled.encode())
    write_bytes(out / "key.json", (json.dumps(key, indent=1, ensure_ascii=False) + "\n").encode())
    return chosen


def _write_pictures(
    out: Path,
    folder: str,
    captions: Sequence[str],
    shown: dict[tuple[str, int], list[str]],
    per_sheet: int,
    side: int,
    digest: "hashlib._Hash",
) -> None:
    """Writes an arm's sheets, each under the names that `shown` has for it, with nothing in the files but pixels."""
    seen, parts = Counter(), defaultdict(list)
    for caption, file in zip(captions, picture_files(folder), strict=True):
        sheet = caption, seen[caption] // per_sheet
        seen[caption] += 1
        if sheet not in shown:
            continue
        parts[sheet].append(file.square(side))
        if len(parts[sheet]) == per_sheet:
            images = np.stack(parts.pop(sheet))
            data = pictures.png(images[0] if per_sheet == 1 else pictures.grid(images, 4))
            digest.update(data)
            for name in shown[sheet]:
                write_bytes(out / name, data)
