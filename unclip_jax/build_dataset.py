"""Builds a TFDS dataset that training reads fast, out of pictures with captions in any form that training reads.

    python -m unclip_jax.data build --source folder:mine --out /data/tfds --name mine --min-side 256 --near-duplicates 4
    python -m unclip_jax.train --config=configs/clip.py:small --workdir=runs/clip --config.data.source=tfds:mine \\
        --config.data.data_dir=/data/tfds

Sources are those of data.source; with several --source, their records come one after another. Each step that a flag
asks for drops records; how many is printed, and stored in build.json. The records that are kept depend on the sources
and these flags alone, not on how many workers there are. After a stop the same command goes on: what is done is not
done again. A dataset of other settings under the same name is refused.

It runs on this machine, by --workers processes, or wherever Apache Beam does. What follows -- goes to Beam:

    python -m unclip_jax.data build --source folder:gs://bucket/mine --out gs://bucket/tfds --name mine -- \\
        --runner=DataflowRunner --project=PROJECT --region=REGION --temp_location=gs://bucket/tmp \\
        --sdk_container_image=IMAGE
"""

import argparse
import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

from unclip_jax import cli
from unclip_jax.clip_steps import ClipSteps
from unclip_jax.data import build, cleaning, duplicates
from unclip_jax.data.build_ranges import Job
from unclip_jax.data.sources import open_sources
from unclip_jax.errors import UserError
from unclip_jax.foreign import parsed_json
from unclip_jax.paths import output_folder, to_path, write_bytes

FORMAT = 1  # of build.json
RECORD = "build.json"
STEPS = (cleaning.UNREADABLE, "min-side", "max-aspect", "min-words", "max-words", "letters", "min-similarity")
STEPS += ("min-rating", "filter", duplicates.EXACT, duplicates.NEAR)


def parse(argv: list[str]) -> argparse.Namespace:
    """Reads the command line, ["build", "--source", …]. Raises UserError for what is wrong with it."""
    at = argv.index("--") if "--" in argv else len(argv)
    parser = cli.Parser("data build", __doc__)
    parser.add_argument("--source", action="append", required=True, help="as data.source; may be given several times")
    parser.add_argument("--split", default="", help="of the sources, such as train or train,test; default: train of "
                        "TFDS datasets, and all of the others")  # fmt: skip
    parser.add_argument("--data-dir", default="~/tensorflow_datasets", help="as data.data_dir")
    parser.add_argument("--image-feature", default="image", help="as data.image_feature; default image")
    parser.add_argument("--caption-feature", default="caption", help="as data.caption_feature; default caption")
    parser.add_argument("--out", required=True, help="folder of TFDS datasets, on a disk or gs://…")
    parser.add_argument("--name", required=True, help="of the dataset, such as my_pictures")
    text = "share of the records that make the split test, by a hash of their keys; default 0.02"
    parser.add_argument("--held-out", type=cli.finite, default=0.02, help=text)
    parser.add_argument("--shorter-side", type=int, default=0, help="make larger pictures smaller: JPEG, quality 95")
    parser.add_argument("--workers", type=int, default=1, help="processes on this machine; default 1")

    steps = parser.add_argument_group("steps, which drop records")
    steps.add_argument("--min-side", type=int, default=0, help="least pixels of a picture's shorter side")
    steps.add_argument("--max-aspect", type=cli.finite, default=0.0, help="most that the longer side is of the shorter")
    steps.add_argument("--min-words", type=int, default=0, help="least words of a caption")
    steps.add_argument("--max-words", type=int, default=0, help="most words of a caption")
    text = f"scripts that {cleaning.SHARE_OF_LETTERS:.0%} of a caption's letters are of, such as latin,greek"
    steps.add_argument("--letters", default="", help=text.replace("%", "%%"))
    steps.add_argument("--exact-duplicates", action="store_true", help="drop pictures of the pixels of an earlier one")
    text = "drop pictures whose perceptual hash differs from an earlier one's in at most BITS of 64 bits, such as 4"
    steps.add_argument("--near-duplicates", type=int, metavar="BITS", help=text)
    steps.add_argument("--clip", help="bundle of a CLIP, for the steps below")
    steps.add_argument("--min-similarity", type=cli.finite, help="least cosine of a picture and its caption")
    steps.add_argument("--probe", help="linear probe of the CLIP, such as of aesthetics (docs/evaluation.md)")
    steps.add_argument("--min-rating", type=cli.finite, help="least that the probe gives a picture")
    steps.add_argument("--filter", action="append", default=[], help="drop what a filter of `data filter` finds")
    args = parser.parse_args(argv[1:at])
    args.beam = argv[at + 1 :]
    _check(args)
    return args


def _check(args: argparse.Namespace) -> None:
    """Raises UserError for values that cannot be."""
    if not re.fullmatch("[a-z][a-z0-9_]*", args.name):
        raise UserError(f"--name {args.name!r}: expected lower-case letters, digits and _, such as my_pictures")
    for name in ("min_side", "max_words", "min_words", "shorter_side"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected 0 or more")
    if args.max_aspect and args.max_aspect < 1:
        raise UserError(f"--max-aspect {args.max_aspect:g}: expected 1 or more, such as 3")
    if args.max_words and args.max_words < args.min_words:
        raise UserError(f"--max-words {args.max_words} is less than --min-words {args.min_words}: no caption is kept")
    if not 0 <= args.held_out < 1:
        raise UserError(f"--held-out {args.held_out:g}: expected a share from 0 to below 1, such as 0.02")
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: expected 1 or more")
    if args.near_duplicates is not None and not 0 <= args.near_duplicates <= duplicates.MOST_BITS:
        raise UserError(f"--near-duplicates {args.near_duplicates}: expected 0 … {duplicates.MOST_BITS} bits")
    if (args.probe is None) != (args.min_rating is None):
        raise UserError("--probe and --min-rating go together: give both or neither")
    by_clip = args.min_similarity is not None or args.probe or args.filter
    if bool(by_clip) != bool(args.clip):
        raise UserError("--clip goes with --min-similarity, --probe or --filter: give it with one of them")
    if args.workers > 1 and args.beam:
        raise UserError("--workers is for this machine: leave it out where Beam is given options of its own")


def main(argv: list[str]) -> int:
    args = parse(argv)
    options, runner = _beam(args)
    job, settings = _prepare(args)
    folder = to_path(job.folder)
    known = _known(folder, settings)
    if "dropped" in known and (folder / "dataset_info.json").exists():
        print(f"build: {folder} is there already, of the same sources and settings", file=sys.stderr)
        build.forget(job)
    else:
        if not known:
            _begin(folder, args.out, settings)
        found = _run(job, options, runner)
        known = _finish(job, settings, found)
    print(_table(known))
    return 0


def _run(job: Job, options: Any, runner: Any) -> dict[str, Any]:
    """Runs the pipeline. Raises UserError where it ends early, whose line is the last of Beam's many."""
    try:
        return build.run(job, options, runner)
    except UserError:
        raise
    except Exception as error:  # of a worker, which Beam makes an error of its own
        line = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise UserError(f"the build ended early ({line}); what is done is kept: the same command goes on") from error


def _beam(args: argparse.Namespace) -> tuple[Any, Any]:
    """Makes Beam's options, and its runner, None for the one that the options name.

    Raises UserError where they name none that there is, and ModuleNotFoundError without Beam.
    """
    logging.disable(logging.WARNING)  # that some of Google's packages are missing, which nothing here needs
    try:
        from apache_beam.options.pipeline_options import PipelineOptions
        from apache_beam.runners import create_runner
    finally:
        logging.disable(logging.NOTSET)
    logging.getLogger("apache_beam").setLevel(logging.ERROR)
    if not args.beam:
        return build.on_this_machine(args.workers)
    options = PipelineOptions(args.beam)
    try:
        create_runner(options.get_all_options()["runner"] or "DirectRunner")
    except (ValueError, ImportError) as error:
        raise UserError(" ".join(str(error).split())) from error
    return options, None


def _prepare(args: argparse.Namespace) -> tuple[Job, dict[str, Any]]:
    """Opens all that is named; returns the job, and the settings by which it is known again.

    Raises UserError for whatever cannot be opened.
    """
    letters = tuple(name.strip().lower() for name in args.letters.split(",") if name.strip())
    if letters:
        cleaning.check_scripts(letters)
    scorer = None
    if args.clip:
        scorer = ClipSteps(args.clip, args.min_similarity, args.probe, args.min_rating, tuple(args.filter))
    made_of = scorer.check() if scorer else {}
    sources = []
    for spec in args.source:
        splits = (args.split or ("train" if spec.startswith("tfds:") else "train,test")).split(",")
        opened = open_sources(spec, (), splits, args.data_dir, args.image_feature, args.caption_feature)
        sources += [(spec, split, len(source)) for split, source in zip(splits, opened, strict=True)]
    folder = output_folder(args.out) / args.name / build.VERSION
    job = Job(
        sources=tuple(sources),
        data_dir=args.data_dir,
        image_feature=args.image_feature,
        caption_feature=args.caption_feature,
        folder=str(folder),
        limits=cleaning.Limits(args.min_side, args.max_aspect, args.min_words, args.max_words, letters),
        scorer=scorer,
        exact=args.exact_duplicates,
        bits=args.near_duplicates,
        shorter_side=args.shorter_side,
        held_out=args.held_out,
    )
    own = ("out", "name", "workers", "beam", "source", "split", "clip", "probe", "filter")
    settings = {name: value for name, value in vars(args).items() if name not in own}
    settings |= {"sources": [list(source) for source in sources]} | made_of
    return job, settings


def _known(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Reads the build.json of a dataset that was built or begun; {} where there is none.

    Raises UserError where the folder holds something else, or was built by other settings.
    """
    place = folder / RECORD
    if not place.exists():
        if folder.parent.exists() and (there := sorted(path.name for path in folder.parent.iterdir())):
            raise UserError(f"{folder.parent} holds {there[0]}, which this has not written: give another --name")
        return {}
    try:
        known = parsed_json(place.read_text())
        if known["format"] > FORMAT:
            raise UserError(f"{folder} was written by a newer version of this library: upgrade unclip_jax")
        before = known["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{place} cannot be read ({error!r}): delete {folder.parent} and build again") from error
    for name in sorted(before.keys() | settings.keys()):
        if before.get(name) != settings.get(name):
            found, asked = before.get(name), settings.get(name)
            raise UserError(f"{folder} is of {name} {found}, not {asked}: give another --name, or delete it")
    return known


def _finish(job: Job, settings: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Makes a dataset of what the workers wrote; returns what build.json says of it.

    Raises UserError where nothing was kept.
    """
    kept = {split: sum(lengths.values()) for split, lengths in found["shards"].items()}
    known = {"format": FORMAT, "settings": settings, "records": job.records, "dropped": found["dropped"], "kept": kept}
    known["unreadable"] = [f"{key}: {why}" for _, key, why in found["unreadable"]]
    for line in known["unreadable"]:
        print(f"build: unreadable {line}", file=sys.stderr)
    if not kept.get("train"):
        print(_table(known))
        raise UserError(f"no record is kept for training: loosen the steps, and delete {to_path(job.folder).parent}")
    _store(to_path(job.folder), known)
    build.describe(job, found)
    if job.held_out and not kept.get("test"):
        print("build: no record is in the split test: there are so few; give a larger --held-out", file=sys.stderr)
    return known


def _begin(folder: Path, out: str, settings: dict[str, Any]) -> None:
    """Writes the first file. Raises UserError where that fails."""
    try:
        _store(folder, {"format": FORMAT, "settings": settings})
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}): give another folder") from error


def _store(folder: Path, known: dict[str, Any]) -> None:
    write_bytes(folder / RECORD, json.dumps(known, indent=2).encode() + b"\n")


def _table(known: dict[str, Any]) -> str:
    """Counts of a dataset, a line each."""
    rows = [("records read", known["records"])]
    rows += [(f"  dropped: {step}", known["dropped"][step]) for step in STEPS if step in known["dropped"]]
    rows += [(f"kept: {split}", known["kept"][split]) for split in build.SPLITS if split in known["kept"]]
    return "\n".join(f"{name:28} {count:>13,}" for name, count in rows)
