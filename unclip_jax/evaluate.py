"""Measures pictures: FID and its kin against a reference, and how well pictures show their captions.

    python -m unclip_jax.evaluate fid precision_recall --pictures drawn --reference coco --inception inception
    python -m unclip_jax.evaluate clip_score r_precision --pictures drawn --clip runs/clip/bundle

Pictures and reference are folders of pictures, or of tars as `sample --prompts` draws them; for fid and sfid the
reference may be statistics (.npz), which --save-reference stores. Captions are those inside the PNG files or beside the
pictures (.txt). Prints each number with its 95 % interval and n, and with --json what else it depends on.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from unclip_jax import cli
from unclip_jax.errors import UserError
from unclip_jax.evaluation.metrics import INCEPTION, by_inception
from unclip_jax.evaluation.reading import KINDS, Picture, read_pictures
from unclip_jax.paths import to_path

METRICS = INCEPTION | dict.fromkeys(("cmmd", "clip_score", "r_precision"), "image")
# metric → the features it needs; "image" is a CLIP's
ALONE = ("inception_score", "clip_score", "r_precision")  # need no reference
BATCH = 64


def parse(argv: list[str]) -> argparse.Namespace:
    """Reads the command line. Raises UserError for what is wrong with it."""
    parser = cli.Parser("evaluate", __doc__)
    parser.add_argument("metric", nargs="+", choices=METRICS)
    parser.add_argument("--pictures", required=True, help="folder of pictures, or of tars of them")
    parser.add_argument("--reference", help="true pictures, likewise, or their statistics, .npz")
    parser.add_argument("--inception", help="folder that `pretrained inception` wrote")
    parser.add_argument("--clip", help="bundle of a CLIP, which is not the one that drew")
    parser.add_argument("--size", type=int, help="side of the square cut from each picture; default: the first's")
    parser.add_argument("--save-reference", help="file to store the reference's statistics in, .npz")
    parser.add_argument("--json", action="store_true", help="print a JSON object a line, with the card of each number")
    args = parser.parse_args(argv[1:])
    features = {METRICS[name] for name in args.metric}
    if "image" in features and not args.clip:
        raise UserError("no --clip: name the bundle of a CLIP to measure by")
    if features - {"image"} and not args.inception:
        raise UserError("no --inception: name the folder that `pretrained inception` wrote")
    if set(args.metric) - set(ALONE) and not args.reference:
        raise UserError("no --reference: name a folder of true pictures, or their statistics (.npz)")
    if args.reference and args.reference.endswith(".npz") and set(args.metric) - {"fid", "sfid", *ALONE}:
        raise UserError(f"--reference {args.reference} is enough for fid and sfid alone: give a folder of pictures")
    if args.save_reference and not {"fid", "sfid"} & set(args.metric):
        raise UserError("--save-reference stores the statistics of fid or sfid: ask for one of them")
    if {"fid", "sfid"} <= set(args.metric) and (args.save_reference or args.reference.endswith(".npz")):
        raise UserError("statistics (.npz) are of fid or of sfid: ask for one at a time")
    if args.size is not None and args.size < 1:
        raise UserError(f"--size {args.size}: expected at least 1 pixel")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    cli.enable_compilation_cache()
    found: list[Any] = []
    names = {METRICS[name] for name in args.metric}
    if names - {"image"}:
        found += _by_inception(args, tuple(sorted(names - {"image"})))
    if "image" in names:
        found += _by_clip(args)
    for result in found:
        print(json.dumps(result._asdict()) if args.json else result)
    return 0


def _by_inception(args: argparse.Namespace, names: tuple[str, ...]) -> list[Any]:
    from unclip_jax.evaluation import features, frechet

    network = features.inception(args.inception, names)
    drawn, size = _features(network, args.pictures, args.size)
    card = network.card | {"crop": "center", "resize": f"area, {size}"}
    statistics = args.reference if args.reference and args.reference.endswith(".npz") else ""
    known = _features(network, args.reference, size)[0] if args.reference and not statistics else {}
    reference = frechet.Statistics.load(to_path(statistics)) if statistics else None
    if args.save_reference:
        kind = next(INCEPTION[name] for name in args.metric if name in ("fid", "sfid"))
        reference = reference or frechet.statistics([known[kind]], card | {"features": kind, "source": args.reference})
        reference.save(to_path(args.save_reference))
    asked = [name for name in args.metric if name in INCEPTION]
    return by_inception(asked, drawn, known, card | {"source": args.pictures}, reference)


def _by_clip(args: argparse.Namespace) -> list[Any]:
    from unclip_jax.evaluation import features, frechet
    from unclip_jax.evaluation.clip_score import clip_score, r_precision

    network = features.clip(args.clip)
    captions: list[str] = []
    drawn, size = _features(network.pictures, args.pictures, args.size, captions)
    card, drawn = network.pictures.card | {"crop": "center", "resize": f"area, {size}"}, drawn["image"]
    asked = [name for name in args.metric if METRICS[name] == "image"]
    texts = None
    if set(asked) - {"cmmd"}:
        if "" in captions:
            raise UserError(f"{captions.count('')} of {len(captions)} pictures in {args.pictures} have no caption: "
                            "expected it inside each PNG file, or beside each picture in a .txt")  # fmt: skip
        texts = network.captions(captions)
    found = []
    for name in asked:
        if name == "cmmd":
            known, _ = _features(network.pictures, args.reference, size)
            found.append(frechet.cmmd(drawn, known["image"]).noting(**card))
        else:
            measure = clip_score if name == "clip_score" else r_precision
            found.append(measure(drawn, texts).noting(**card))
    return found


def _features(
    network: Any, place: str, size: int | None, captions: list[str] | None = None
) -> tuple[dict[str, np.ndarray], int]:
    """Computes the features of all pictures of a place, and the side that they were cut to; notes their captions."""
    pictures = read_pictures(place, size)
    first = next(pictures, None)
    if first is None:
        raise UserError(f"no pictures in {place}: expected files that end in {', '.join(KINDS)}, or tars of them")
    count = itertools.count(1)

    def batches() -> Iterator[np.ndarray]:
        for group in _batched(itertools.chain([first], pictures)):
            if captions is not None:
                captions.extend(picture.caption for picture in group)
            yield np.stack([picture.image for picture in group])
            print(f"\r{place}: {next(count) * BATCH} pictures", end="", file=sys.stderr, flush=True)

    found = network(batches())
    print(f"\r{place}: {len(next(iter(found.values())))} pictures   ", file=sys.stderr)
    return found, len(first.image)


def _batched(pictures: Iterator[Picture]) -> Iterator[list[Picture]]:
    while group := list(itertools.islice(pictures, BATCH)):
        yield group


if __name__ == "__main__":
    cli.run(main)
