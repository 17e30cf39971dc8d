"""Measures pictures: FID and its kin against a reference, and how well pictures show their captions.

    python -m unclip_jax.evaluate fid precision_recall --pictures drawn --reference coco --inception inception
    python -m unclip_jax.evaluate clip_score r_precision --pictures drawn --clip runs/clip/bundle
    python -m unclip_jax.evaluate fid --preset coco30k --coco coco --bundle B --pictures drawn --inception inception

Pictures and reference are folders of pictures, or of tars as `sample --prompts` draws them; for fid and sfid the
reference may be statistics (.npz), which --save-reference stores. Captions are those inside the PNG files or beside
the pictures (.txt). With --bundle, pictures of --prompts or of a preset's captions are drawn first, those that are not
there yet. Prints each number with its 95 % interval and n, and with --json its card: what else it depends on.
"""

import argparse
import hashlib
import itertools
import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from unclip_jax import cli, sample
from unclip_jax.errors import UserError
from unclip_jax.evaluation.metrics import CAPTIONED, CLIP, COMPARED, INCEPTION, Embedded, by_clip, by_inception
from unclip_jax.evaluation.presets import PICTURES, PRESETS, read_captions
from unclip_jax.evaluation.reading import Picture, read_pictures
from unclip_jax.paths import output_folder, to_path

METRICS = INCEPTION | dict.fromkeys(CLIP, "image") | {"alignment": ""}
# metric → the features it needs; "image" is a CLIP's, "" none: alignment reads emoji scenes off the pixels
ALONE = ("inception_score", "alignment", *(name for name in CLIP if name not in COMPARED))  # need no reference
GROUPED = ("fid", "sfid", "inception_score", "vendi_score")  # are computed by groups of pictures, of so many at least:
FEWEST = 20
BATCH = 64


def parse(argv: list[str]) -> argparse.Namespace:
    """Reads the command line. Raises UserError for what is wrong with it."""
    parser = cli.Parser("evaluate", __doc__)
    parser.add_argument("metric", nargs="+", choices=METRICS)
    parser.add_argument("--pictures", required=True, help="folder of pictures, or of tars of them")
    parser.add_argument("--reference", help="true pictures, likewise, or their statistics, .npz")
    parser.add_argument("--inception", help="folder that `pretrained inception` wrote")
    parser.add_argument("--clip", help="bundle of a CLIP, which is not the one that drew")
    parser.add_argument("--bundle", help="folder of a trained cascade, which draws what is missing of --pictures")
    parser.add_argument("--prompts", help="captions that it draws, as of `sample`")
    parser.add_argument("--preset", choices=PRESETS, help="captions, reference and size of a known study on COCO")
    parser.add_argument("--coco", help="folder of COCO's archives of 2014, for --preset")
    parser.add_argument("-n", "--n", type=cli.whole(1, cli.MOST_PICTURES), default=1, help="pictures per caption")
    sample.add_drawing_flags(parser)
    text = "side of the square cut from each picture; default: the first's"
    parser.add_argument("--size", type=cli.whole(1, 2**16), help=text)
    parser.add_argument("--templates", help="of zero_shot: file of captions with {} for a class, one a line")
    parser.add_argument("--threshold", type=cli.finite, default=0.9, help="cosine from which two pictures are near")
    parser.add_argument("--save-reference", help="file to store the reference's statistics in, .npz")
    parser.add_argument("--json", action="store_true", help="print a JSON object a line, with the card of each number")
    # What `sample` reads too, and no flag here says.
    args = parser.parse_args(argv[1:], argparse.Namespace(format="tar", rerank=0))
    if args.preset:
        if not args.coco or args.prompts:
            raise UserError("--preset takes its captions from --coco, the folder of COCO's archives: give that alone")
        args.size = args.size or PRESETS[args.preset].size
        args.reference = args.reference or f"{args.coco.rstrip('/')}/{PICTURES}"
    if args.bundle and not (args.prompts or args.preset):
        raise UserError("--bundle draws captions: name them by --prompts or --preset")
    if args.prompts and not args.bundle:
        raise UserError("--prompts are drawn by a cascade: name its folder by --bundle")
    _check_needs(args)
    return args


def _check_needs(args: argparse.Namespace) -> None:
    """Raises UserError where a metric lacks a network or a reference."""
    features = {METRICS[name] for name in args.metric}
    if "image" in features and not args.clip:
        raise UserError("no --clip: name the bundle of a CLIP to measure by")
    if features - {"image", ""} and not args.inception:
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


def main(argv: list[str]) -> int:
    args = parse(argv)
    cli.enable_compilation_cache()
    # All that can be missing is looked for before anything is drawn.
    from unclip_jax.drawing import read_run
    from unclip_jax.evaluation import features, frechet
    from unclip_jax.evaluation.zero_shot import read_templates

    kinds = sorted({METRICS[name] for name in args.metric} - {"image", ""})
    inception = features.inception(args.inception, tuple(kinds)) if kinds else None
    clip = features.clip(args.clip) if "image" in {METRICS[name] for name in args.metric} else None
    templates = read_templates(args.templates) if args.templates else ["{}"]
    statistics = None
    if args.reference and args.reference.endswith(".npz"):
        statistics = frechet.Statistics.load(to_path(args.reference))
    elif args.reference:
        next(read_pictures(args.reference, args.size))
    if args.bundle:
        _draw(args)
    drawn = read_run(to_path(args.pictures))

    found: list[Any] = []
    if "alignment" in args.metric:
        found += _by_pixels(args)
    if inception:
        found += _by_inception(args, inception, statistics)
    if clip:
        found += _by_clip(args, clip, templates)
    about = {"drawn": drawn} if drawn else {}
    for result in found:
        print(json.dumps(result.noting(**about)._asdict()) if args.json else result)
    return 0


def _draw(args: argparse.Namespace) -> None:
    """Draws the captions of --prompts or of the preset into --pictures."""
    from unclip_jax.drawing import read_prompts
    from unclip_jax.evaluation import scene_scores

    preset = PRESETS.get(args.preset)
    prompts = read_captions(to_path(args.coco), preset.captions, args.seed) if preset else read_prompts(args.prompts)
    grouped = [name for name in args.metric if name in GROUPED]
    if grouped and len(prompts) * args.n < FEWEST:
        raise UserError(f"{grouped[0]} of {len(prompts) * args.n} pictures: expected at least {FEWEST}; give more --n")
    if "alignment" in args.metric:
        scene_scores.read_captions(prompts)  # refuses captions of which it knows nothing
    sample.draw_prompts(args, prompts, output_folder(args.pictures, "pictures"), not preset or preset.upsample)


def _by_pixels(args: argparse.Namespace) -> list[Any]:
    """Reads emoji scenes off the pictures, which are compared with their captions."""
    from unclip_jax.evaluation import scene_scores

    pictures = list(read_pictures(args.pictures, args.size))
    captions = [picture.caption for picture in pictures]
    _check_captions(captions, args.pictures)
    images = np.stack([picture.image for picture in pictures])
    digest = hashlib.sha256(images.tobytes()).hexdigest()
    return [result.noting(sha256=digest) for result in scene_scores.score(images, captions)]


def _by_inception(args: argparse.Namespace, network: Any, statistics: Any) -> list[Any]:
    """Measures by Inception's features. statistics: of the reference, if they are stored."""
    from unclip_jax.evaluation import frechet

    drawn, size, digest = _features(network, args.pictures, args.size)
    card = network.card | {"crop": "center", "resize": f"area, {size}"}
    kinds = [INCEPTION[name] for name in args.metric if name in ("fid", "sfid")]
    references, known = {}, {}
    if statistics:
        references = dict.fromkeys(kinds, statistics)
    elif args.reference:
        known, _, theirs = _features(network, args.reference, size)
        about = card | {"source": args.reference, "sha256": theirs}
        references = {kind: frechet.statistics([known[kind]], about | {"features": kind}) for kind in kinds}
        card |= {"reference_sha256": theirs}
    if args.save_reference:
        references[kinds[0]].save(to_path(args.save_reference))
    asked = [name for name in args.metric if name in INCEPTION]
    return by_inception(asked, drawn, known, card | {"source": args.pictures, "sha256": digest}, references)


def _by_clip(args: argparse.Namespace, network: Any, templates: list[str]) -> list[Any]:
    """Measures by a CLIP's features."""
    asked = [name for name in args.metric if name in CLIP]

    def embedded(place: str, size: int | None, captioned: bool) -> tuple[Embedded, int, str]:
        captions: list[str] = []
        found, size, digest = _features(network.pictures, place, size, captions)
        if captioned:
            _check_captions(captions, place)
        return Embedded(found["image"], captions), size, digest

    drawn, size, digest = embedded(args.pictures, args.size, bool(set(asked) & set(CAPTIONED)))
    card, reference = network.pictures.card | {"crop": "center", "resize": f"area, {size}", "sha256": digest}, None
    if set(asked) & set(COMPARED):
        reference, _, card["reference_sha256"] = embedded(args.reference, size, "regurgitation" in asked)
    found = by_clip(asked, network, drawn, reference, templates, args.threshold)
    return [result.noting(**card) for result in found]


def _check_captions(captions: list[str], place: str) -> None:
    if "" in captions:
        raise UserError(f"{captions.count('')} of {len(captions)} pictures in {place} have no caption: expected it "
                        "inside each PNG file, or beside each picture in a .txt")  # fmt: skip


def _features(
    network: Any, place: str, size: int | None, captions: list[str] | None = None
) -> tuple[dict[str, np.ndarray], int, str]:
    """Computes the features of all pictures of a place, the side that they were cut to, and the SHA-256 of their
    pixels; notes their captions."""
    pictures = read_pictures(place, size)
    first = next(pictures)
    count, digest = 0, hashlib.sha256()

    def batches() -> Iterator[np.ndarray]:
        nonlocal count
        for group in _batched(itertools.chain([first], pictures)):
            if captions is not None:
                captions.extend(picture.caption for picture in group)
            images = np.stack([picture.image for picture in group])
            digest.update(images.tobytes())
            yield images
            count += len(images)
            print(f"\r{place}: {count:,} pictures", end="", file=sys.stderr, flush=True)

    found = network(batches())
    print(file=sys.stderr)
    return found, len(first.image), digest.hexdigest()


def _batched(pictures: Iterator[Picture]) -> Iterator[list[Picture]]:
    while group := list(itertools.islice(pictures, BATCH)):
        yield group


if __name__ == "__main__":
    cli.run(main)
