"""Filters pictures by a CLIP and an SVM, as GLIDE's training data was, which is what the command `data filter` does.

    python -m unclip_jax.data filter train --positive people --negative others --clip clip --out people.npz
    python -m unclip_jax.data filter check --filter people.npz --clip clip --positive more_people --negative more_others
    python -m unclip_jax.data filter apply --filter people.npz --clip clip --pictures mine --out kept.txt

train learns to find pictures like those in the folder --positive among such as in --negative. A fifth of both is held
out: by these the filter is so biased that it misses fewer than --false-negatives of the positives. check counts on
other pictures, and apply lists those of a folder that are kept: in which nothing was found. With --boundary it also
lists the hundred of which it is least sure: label these, put them into the two folders, and train again.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from unclip_jax import cli
from unclip_jax.data import filtering
from unclip_jax.data.folders import pictures_among
from unclip_jax.data.transforms import decode
from unclip_jax.errors import UnreadableRecord, UserError
from unclip_jax.evaluation import features
from unclip_jax.evaluation.intervals import Result, at_most, share
from unclip_jax.paths import files_below, output_folder, to_path, write_bytes

HELD_OUT = 0.2  # share of the pictures
NEAREST = 100  # pictures that --boundary lists
BATCH = 32  # pictures whose crops are in memory at once
HELP = {
    "positive": "folder of pictures that are to be found",
    "negative": "folder of pictures that are not",
    "clip": "bundle of a CLIP",
    "filter": "file that `train` wrote",
    "pictures": "folder of pictures to filter",
}


class _Embedded(NamedTuple):
    names: list[str]  # of the pictures that could be read, from the folder on
    rows: np.ndarray  # their embeddings, each the mean over its crops: (n, d)


def parse(argv: list[str]) -> argparse.Namespace:
    """Reads the command line, ["filter", "train", …]. Raises UserError for what is wrong with it."""
    action = argv[1] if len(argv) > 1 else ""
    if action in ("--help", "-h"):
        action = "train"
    if action not in ACTIONS:
        raise UserError(f"data filter {action}: expected data filter {', '.join(ACTIONS)}")
    parser = cli.Parser(f"data filter {action}", __doc__)
    needed, allowed = {
        "train": (("positive", "negative", "clip"), ()),
        "check": (("filter", "clip", "positive"), ("negative",)),
        "apply": (("filter", "clip", "pictures"), ()),
    }[action]
    for name in (*needed, *allowed):
        parser.add_argument(f"--{name}", required=name in needed, help=HELP[name])
    if action == "train":
        parser.add_argument("--out", required=True, help="file to store the filter in, .npz")
        text = "share of the positives held out that may be missed: fewer than this"
        parser.add_argument("--false-negatives", type=cli.finite, default=0.01, help=f"{text}; default 0.01")
        parser.add_argument("--seed", type=cli.seed, default=0, help="which pictures are held out; default 0")
    if action == "apply":
        parser.add_argument("--out", required=True, help="file to list the pictures in that are kept, .txt")
        parser.add_argument("--boundary", help=f"file to list the {NEAREST} nearest to the boundary in, .txt")
    args = parser.parse_args(argv[2:])
    args.action = action
    if action == "train" and not 0 < args.false_negatives < 1:
        raise UserError(f"--false-negatives {args.false_negatives}: expected a share between 0 and 1, such as 0.01")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    cli.enable_compilation_cache()
    ACTIONS[args.action](args)
    return 0


def train(args: argparse.Namespace) -> None:
    """Trains a filter, stores it, and prints what it misses and finds wrongly of the pictures held out."""
    out = _output(args.out, "--out", ".npz")
    folders = [_pictures(place) for place in (args.positive, args.negative)]
    network = features.clip(args.clip).pictures
    sets = []
    for (place, names), seed in zip(folders, np.random.SeedSequence(args.seed).generate_state(2), strict=True):
        rows = _embed(network, place, names).rows
        if len(rows) < 2:
            raise UserError(f"{place} has {len(rows)} pictures: expected more, some of which are held out")
        sets.append([rows[part] for part in filtering.split(len(rows), HELD_OUT, int(seed))])
    (positives, held_out), (negatives, others) = sets
    card = network.card | {"seed": args.seed, "positives": len(positives), "negatives": len(negatives)}
    card |= {"crops": f"{filtering.CROPS} of {filtering.SIDE} pixels", "held_out": len(held_out)}
    found = filtering.fit(positives, negatives, card).biased(held_out, args.false_negatives)
    found.save(out)
    _report(found, held_out, others)


def check(args: argparse.Namespace) -> None:
    """Prints what a filter misses and finds wrongly of pictures that it was neither trained on nor biased by."""
    found, network = _load(args)
    folders = [_pictures(place) for place in (args.positive, args.negative) if place is not None]
    rows = [_embed(network, *folder).rows for folder in folders]
    _report(found, rows[0], rows[1] if args.negative is not None else None)


def apply(args: argparse.Namespace) -> None:
    """Lists the pictures of a folder that are kept; those that cannot be read are not."""
    out = _output(args.out, "--out", ".txt")
    boundary = _output(args.boundary, "--boundary", ".txt") if args.boundary else None
    place, names = _pictures(args.pictures)
    found, network = _load(args)
    names, rows = _embed(network, place, names, lambda line: print(f"{line}: not kept", file=sys.stderr))
    scores = found.scores(rows, network.card)
    _write(out, [name for name, score in zip(names, scores, strict=True) if score < 0])
    if boundary:
        _write(boundary, [names[row] for row in filtering.nearest_to_boundary(scores, NEAREST)])
    print(share("share of pictures found", scores >= 0, "pictures"))


ACTIONS = {"train": train, "check": check, "apply": apply}


def false_negatives(found: filtering.Filter, positives: np.ndarray) -> Result:
    """Share of positives that a filter misses, of embeddings (n, d) that it was not trained on, with the one-sided
    bound of 95 % that Clopper and Pearson give."""
    missed, n = int(np.sum(found.scores(positives, found.card) < 0)), len(positives)
    card = found.card | {"missed": missed, "interval": "Clopper–Pearson's, one-sided: from 0 to its upper bound"}
    return Result("false negatives", missed / n, 0.0, at_most(missed, n), n, card)


def _report(found: filtering.Filter, positives: np.ndarray, negatives: np.ndarray | None) -> None:
    print(result := false_negatives(found, positives))
    bound = f"at 95 %, fewer than {100 * result.high:.2g} % of such pictures are missed (one-sided)"
    print(f"{result.card['missed']} of {result.n:,} missed: {bound}")
    if negatives is not None:
        print(share("false positives", found.scores(negatives, found.card) >= 0, "pictures"))


def _load(args: argparse.Namespace) -> tuple[filtering.Filter, features.Features]:
    """Reads a filter and its CLIP. Raises UserError where they do not belong together."""
    found, network = filtering.Filter.load(args.filter), features.clip(args.clip).pictures
    found.check(network.card)
    return found, network


def _pictures(place: str) -> tuple[Path, list[str]]:
    """Names of the pictures below a folder. Raises UserError where there is none."""
    folder = to_path(place)
    if not place.strip() or not folder.is_dir():
        raise UserError(f"{place!r} is no folder: expected one of pictures")
    names = pictures_among(files_below(folder))
    if not names:
        raise UserError(f"{place} has no pictures: expected files such as NAME.png or NAME.jpg")
    return folder, names


def _embed(
    network: features.Features, folder: Path, names: list[str], skip: Callable[[str], None] | None = None
) -> _Embedded:
    """Embeds pictures. A picture that cannot be read is an error, or else a line for `skip`."""
    read: list[str] = []

    def batches() -> Iterator[np.ndarray]:
        numbered = iter(enumerate(names))
        while group := list(itertools.islice(numbered, BATCH)):
            crops = []
            for _, name in group:
                try:
                    crops.append(filtering.crops(decode((folder / name).read_bytes())))
                    read.append(name)
                except UnreadableRecord as error:
                    line = f"{folder / name} is not a picture that can be read ({error})"
                    if not skip:
                        raise UserError(line) from error
                    skip(line)
            if crops:
                yield np.concatenate(crops)
            print(f"\r{folder}: {group[-1][0] + 1} of {len(names)} pictures", end="", file=sys.stderr, flush=True)

    rows = filtering.pooled(network(batches())["image"])
    print(file=sys.stderr)
    return _Embedded(read, rows)


def _output(name: str, option: str, ending: str) -> Path:
    """The path of a file to write. Raises UserError where it has another ending, or cannot be written."""
    path = to_path(name)
    if not name.endswith(ending) or path.is_dir():
        raise UserError(f"{option} {name}: expected a file that ends in {ending}")
    output_folder(str(path.parent), option)
    return path


def _write(path: Path, names: list[str]) -> None:
    write_bytes(path, b"".join(os.fsencode(name) + b"\n" for name in names))
