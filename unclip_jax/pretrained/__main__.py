"""Converts public PyTorch weights into bundles that `sample` and `edit` read.

    python -m unclip_jax.pretrained glide SOURCE --out DIR
    python -m unclip_jax.pretrained openai_clip SOURCE --out DIR
    python -m unclip_jax.pretrained karlo SOURCE --out DIR
    python -m unclip_jax.pretrained inception SOURCE --out DIR

SOURCE is the folder (of CLIP and Inception: or the file) that the weights were downloaded to, with their vocabulary
files; the README lists them. DIR becomes a cascade, of `openai_clip` a single bundle, of `inception` what
docs/evaluation.md measures with.
"""

import importlib
import sys

import jax

from unclip_jax import cli
from unclip_jax.bundle import check_params, save_bundle
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.errors import UserError
from unclip_jax.paths import is_remote, output_folder, to_path
from unclip_jax.pretrained import Converted, Options
from unclip_jax.stages import make_stage

FAMILIES = ("glide", "openai_clip", "karlo", "inception")


def main(argv: list[str]) -> int:
    parser = cli.Parser("pretrained", __doc__)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("source", help="what was downloaded: a folder, or a file of CLIP")
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="to compute in")
    parser.add_argument("--head-channels", type=int, default=64, help="of every attention; no shape tells it")
    parser.add_argument("--heads", type=int, default=0, help="of the text path or prior; 0: the published models'")
    parser.add_argument("--image-size", type=int, default=0, help="of the pictures drawn; 0: the published models'")
    args = parser.parse_args(argv[1:])
    source, out = to_path(args.source), output_folder(args.out)
    if is_remote(source):
        raise UserError(f"{source} is in a bucket: copy it to a disk first, by gcloud storage cp --recursive")
    if not source.exists():
        raise UserError(f"no weights at {source}: give the folder that they were downloaded to")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is in the way: give a new or empty folder")

    family = importlib.import_module(f"unclip_jax.pretrained.{args.family}")
    if args.family == "inception":  # no stage: it neither trains nor draws
        return family.save(source, out)
    options = Options(args.dtype, args.head_channels, args.heads, args.image_size)
    clip, clip_identity = None, ""
    for model in family.read_folder(source, options):
        stage = make_stage(model.config.lock(), clip)
        check_params(model.params, jax.eval_shape(stage.init, jax.random.key(0)))
        _check_vocabulary(model)
        size = sum(leaf.size for leaf in jax.tree.leaves(model.params))
        target = out / model.place
        known = clip_identity if stage.needs_clip else ""
        identity = save_bundle(
            target, model.config.stage, model.config, model.params, model.tokenizer_bytes, known, {}
        )
        print(f"{target}: {model.config.stage}, {size:,} parameters", file=sys.stderr, flush=True)
        if model.place == "clip":
            clip, clip_identity = stage, identity
        del model  # else it would be held while the next one is made
    return 0


def _check_vocabulary(model: Converted) -> None:
    """Every id that the tokenizer gives must have a row in the model's table, which may have more."""
    if model.tokenizer_bytes is None or "text" not in model.config.model:
        return
    count, rows = Tokenizer(model.tokenizer_bytes).vocab_size, model.config.model.text.vocab_size
    if count > rows:
        raise UserError(f"the vocabulary has {count} tokens, the model {rows}: they do not belong together")


if __name__ == "__main__":
    cli.run(main)
