"""Uploads a cascade, or a single bundle, to the Hugging Face Hub, with a card of what it is.

    python -m unclip_jax.push cascade hf:OWNER/NAME --license cc-by-sa-4.0
    python -m unclip_jax.push cascade hf:OWNER/NAME --license mit --evaluation numbers.jsonl --private

Everyone can then name it: --bundle hf:OWNER/NAME. The card, README.md, lists the models with their parameters, data and
steps, by their configs, and the numbers of --evaluation, which `evaluate … --json` printed. All bundles are checked
first, by their sha256. Needs the extra [hub], and `hf auth login` once. --dry-run prints the card and uploads nothing.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unclip_jax import __version__, cli, hub
from unclip_jax.bundle import CONFIG, TOKENIZERS, WEIGHTS, Bundle, load_bundle
from unclip_jax.errors import UserError
from unclip_jax.foreign import parsed_json
from unclip_jax.paths import is_remote, to_path
from unclip_jax.training.leaves import named_leaves

PAPERS = {
    "unCLIP": "https://arxiv.org/abs/2204.06125", "GLIDE": "https://arxiv.org/abs/2112.10741",
}  # fmt: skip


def parse(argv: list[str]) -> argparse.Namespace:
    """Reads the command line. Raises UserError for what is wrong with it."""
    parser = cli.Parser("push", __doc__)
    parser.add_argument("cascade", help="folder of a cascade, or of one bundle")
    parser.add_argument("place", help="hf:OWNER/NAME, or hf:OWNER/NAME@BRANCH")
    parser.add_argument("--license", required=True, help="of the weights, by the Hub's name, such as cc-by-sa-4.0")
    text = "file of `evaluate … --json`; may be repeated"
    parser.add_argument("--evaluation", action="append", default=[], help=text)
    parser.add_argument("--private", action="store_true", help="let only its owner see a repository that is made")
    parser.add_argument("--dry-run", action="store_true", help="print the card and upload nothing")
    args = parser.parse_args(argv[1:])
    hub.place(args.place)
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    folder = to_path(args.cascade)
    if is_remote(folder):
        raise UserError(f"{folder} is in a bucket: copy it to a disk first, with gcloud storage cp --recursive")
    bundles = {name: load_bundle(path) for name, path in bundle_folders(folder).items()}
    results = [line for name in args.evaluation for line in read_evaluation(name)]
    text = card(args.place, args.license, bundles, results)
    if args.dry_run:
        print(text)
        return 0
    files = [f"{name}/{file}".removeprefix("./") for name in bundles for file in (CONFIG, WEIGHTS, *TOKENIZERS)]
    print(hub.push(folder, files, args.place, text, args.private))
    return 0


def bundle_folders(folder: Path) -> dict[str, Path]:
    """Finds the bundles in a folder by their places below it, "." being itself. Raises UserError for none."""
    found = {str(path.parent.relative_to(folder)): path.parent for path in sorted(folder.rglob(CONFIG))}
    if not found:
        raise UserError(f"{folder} holds no bundle: expected the folder of a cascade, or of one model's bundle")
    return found


def read_evaluation(name: str) -> list[dict[str, Any]]:
    """Reads numbers that `evaluate … --json` printed. Raises UserError for another file."""
    path = to_path(name)
    try:
        lines = [parsed_json(line) for line in path.read_text().splitlines()]
        kinds = {"name": str, "value": float, "low": float, "high": float, "n": int}
        return [{key: kind(line[key]) for key, kind in kinds.items()} for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--evaluation {name} is no output of `evaluate … --json` ({error})") from error


def card(place: str, licence: str, bundles: Mapping[str, Bundle], results: Sequence[Mapping[str, Any]]) -> str:
    """Writes the card of a cascade in Markdown, with the Hub's own header."""
    decoder = bundles.get("decoder")
    paper = "GLIDE" if (decoder or next(iter(bundles.values()))).stage == "glide" else "unCLIP"
    name = hub.place(place).repository
    header = ["---", f"license: {licence}", "library_name: unclip_jax", "tags:"]
    header += ["- unclip_jax", "- jax", f"- {paper.lower()}"]
    header += [*(["pipeline_tag: text-to-image"] if decoder else []), "---"]
    text = [*header, "", f"# {name.rpartition('/')[2]}", ""]
    text += [f"Models of [{paper}]({PAPERS[paper]}) for unclip_jax, written by version {__version__}.", ""]
    text += ["```bash", f'unclip sample --bundle {place} --prompt "…"', "```", ""] if decoder else []
    text += ["## Models", ""]
    text += ["| folder | stage | parameters | data | steps × batch |", "|---|---|--:|---|--:|"]
    for folder, bundle in bundles.items():
        count = sum(array.size for array in named_leaves(bundle.params).values())
        c = bundle.config
        trained = f"{c.train.steps:,} × {c.train.batch_size:,}" if "train" in c else ""
        source = c.data.source if "data" in c else ""
        text.append(f"| `{folder}` | {bundle.stage} | {count:,} | {source} | {trained} |")
    if results:
        text += ["", "## Measured", "", "| metric | value | 95% interval | n |", "|---|--:|---|--:|"]
        for line in results:
            interval = f"{line['low']:.4g} to {line['high']:.4g}"
            text.append(f"| {line['name']} | {line['value']:.4g} | {interval} | {line['n']:,} |")
    text += ["", "Each bundle's `config.json` has all numbers of its model and training, and its sha256."]
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    cli.run(main)
