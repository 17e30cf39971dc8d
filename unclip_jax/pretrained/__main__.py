"""Converts public PyTorch weights into bundles that `sample` and `edit` read.

    python -m unclip_jax.pretrained glide SOURCE --out DIR
    python -m unclip_jax.pretrained openai_clip SOURCE --out DIR
    python -m unclip_jax.pretrained karlo SOURCE --out DIR
    python -m unclip_jax.pretrained inception SOURCE --out DIR

SOURCE is the folder that the weights were downloaded to (for `openai_clip` and `inception` it may be the file itself),
with their vocabulary files beside them; docs/public_weights.md lists all files. DIR becomes a cascade, with
`openai_clip` a single bundle, with `inception` what docs/evaluation.md measures with.
"""

import argparse
import sys

import jax

from unclip_jax import cli
from unclip_jax.bundle import check_params, save_bundle
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.errors import UserError
from unclip_jax.paths import is_remote, output_folder, to_path
from unclip_jax.pretrained import Converted, Options, glide, inception, karlo, openai_clip
from unclip_jax.stages import make_stage

FAMILIES = {"glide": glide, "openai_clip": openai_clip, "karlo": karlo, "inception": inception}
FOLDERS = ("glide", "karlo")  # families of several files


def parse(argv: list[str]) -> argparse.Namespace:
    """Reads the command line. Raises UserError for what is wrong with it."""
    parser = cli.Parser("pretrained", __doc__)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("source", help="what was downloaded: a folder, or for openai_clip and inception a file")
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="type to compute in")
    parser.add_argument("--head-channels", type=cli.whole(1, 2**14), default=64, help="channels of each attention head")
    text = "attention heads of text path or prior; 0: as published"
    parser.add_argument("--heads", type=cli.whole(0, 1024), default=0, help=text)
    text = "side of the pictures drawn; 0: as published"
    parser.add_argument("--image-size", type=cli.whole(0, 2**14), default=0, help=text)
    return parser.parse_args(argv[1:])


def main(argv: list[str]) -> int:
    args = parse(argv)
    source, out = to_path(args.source), output_folder(args.out)
    if is_remote(source):
        raise UserError(f"{source} is in a bucket: copy it to a disk first, with gcloud storage cp --recursive")
    if not source.exists():
        raise UserError(f"no weights at {source}: give the folder that they were downloaded to")
    if args.family in FOLDERS and not source.is_dir():
        raise UserError(f"{source} is a file: give the folder that all files of {args.family} were downloaded to")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} is in the way: give a new or empty folder")

    if args.family == "inception":  # which is no stage: it measures pictures
        inception.save(source, out)
        return 0
    options = Options(args.dtype, args.head_channels, args.heads, args.image_size)
    clip, clip_identity = None, ""
    for model in FAMILIES[args.family].read_folder(source, options):
        stage = make_stage(model.config.lock(), clip)
        check_params(model.params, jax.eval_shape(stage.init, jax.random.key(0)))
        _check_vocabulary(model)
        size = sum(leaf.size for leaf in jax.tree.leaves(model.params))
        target = out / model.subfolder
        known = clip_identity if stage.needs_clip else ""
        identity = save_bundle(
            target, model.config.stage, model.config, model.params, model.tokenizer_bytes, known, {}
        )
        print(f"{target}: {model.config.stage}, {size:,} parameters", file=sys.stderr, flush=True)
        if model.subfolder == "clip":
            clip, clip_identity = stage, identity
        del model  # it would stay in memory while the next one is made
    return 0


def _check_vocabulary(model: Converted) -> None:
    """Raises UserError unless every token id has a row in the model's embedding table, which may have more rows."""
    if model.tokenizer_bytes is None or "text" not in model.config.model:
        return
    count, rows = Tokenizer(model.tokenizer_bytes).vocab_size, model.config.model.text.vocab_size
    if count > rows:
        raise UserError(
            f"the vocabulary has {count} tokens, the model {rows}: they do not belong together, download both again"
        )


if __name__ == "__main__":
    cli.run(main)
