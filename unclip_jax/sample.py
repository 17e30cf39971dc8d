"""Draws pictures for captions with a trained cascade.

    python -m unclip_jax.sample --bundle OUT/bundle --prompt "a red apple on a yellow background" -n 4

Writes OUT/PROMPT_SEED_I.png, with prompt, seed and settings inside, and OUT/grid.png. The same seed draws the same
pictures. A second run finds its programs compiled, whatever the prompt, seed and guidance scales.
"""

import re
import sys
import time

import numpy as np

from unclip_jax import __version__, cli, pictures
from unclip_jax.errors import UserError
from unclip_jax.paths import output_folder


def parse(argv: list[str]):
    """Reads the command line. Raises UserError for what is wrong with it."""
    parser = cli.Parser("sample", __doc__)
    parser.add_argument("--bundle", required=True, help="folder of a trained cascade")
    parser.add_argument("--prompt", required=True, action="append", help="what to draw; may be repeated")
    parser.add_argument("-n", "--n", type=int, default=4, help="pictures per prompt")
    parser.add_argument("--rerank", type=int, default=0, help="draw so many a prompt, keep the n that CLIP likes best")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance", type=float, help="of the decoder; 1: none; default: the trained config's")
    parser.add_argument("--prior-guidance", type=float, help="of the prior; likewise")
    parser.add_argument("--clip-guidance", type=float, default=0.0, help="of the decoder, by noised_clip/")
    parser.add_argument("--out", default="samples", help="folder to write to")
    return parser.parse_args(argv[1:])


def main(argv: list[str]) -> int:
    args = parse(argv)
    if args.n < 1:
        raise UserError(f"--n {args.n}: expected at least 1 picture per prompt")
    if args.rerank and args.rerank < args.n:
        raise UserError(f"--rerank {args.rerank}: expected at least --n {args.n}, the pictures to be kept")
    out = output_folder(args.out)

    began = time.monotonic()
    cli.enable_compilation_cache()
    compiles = cli.CompileCount()
    from unclip_jax.cascade import Cascade

    cascade = Cascade.load(args.bundle)
    cascade.check_prompts(args.prompt)
    if args.rerank and not cascade.clip:
        raise UserError(f"--rerank needs a CLIP, and {args.bundle} has no clip/")
    texts = [prompt for prompt in args.prompt for _ in range(args.rerank or args.n)]
    scales = args.guidance, args.prior_guidance, args.clip_guidance
    images = cascade.generate(texts, args.seed, *scales)["images"][-1]
    if args.rerank:
        images, texts = _best(cascade, images, args)
    models = {"decoder": cascade.decoder, "prior": cascade.prior} if cascade.prior else {"decoder": cascade.decoder}
    settings = {
        "n": args.n,
        "rerank": args.rerank,
        "guidance": args.guidance if args.guidance is not None else _trained_scale(cascade.decoder),
        "prior_guidance": args.prior_guidance,
        "clip_guidance": args.clip_guidance,
        **{name: model.identity for name, model in models.items()},
        "version": __version__,
    }
    if cascade.prior and args.prior_guidance is None:
        settings["prior_guidance"] = _trained_scale(cascade.prior)
    for i, (text, image) in enumerate(zip(texts, images, strict=True)):
        name = re.sub(r"\W+", "_", text).strip("_")[:60]
        path = out / f"{name}_{args.seed}_{i}.png"
        pictures.save_png(path, image, {"prompt": text, "seed": str(args.seed), "index": str(i), "settings": settings})
        print(path)
    pictures.save_png(out / "grid.png", pictures.grid(images, args.n, texts), {"seed": str(args.seed)})
    print(out / "grid.png")
    print(f"{len(images)} pictures in {time.monotonic() - began:.1f} s, {compiles}", file=sys.stderr)
    return 0


def _best(cascade, images, args):
    """Picks each prompt's n pictures whose CLIP embedding is nearest the prompt's, best first, with their prompts."""
    kept, texts = [], []
    for k, prompt in enumerate(args.prompt):
        drawn = images[k * args.rerank : (k + 1) * args.rerank]
        order = np.argsort(-cascade.similarity(drawn, [prompt])[:, 0], kind="stable")[: args.n]
        kept.append(drawn[order])
        texts += [prompt] * args.n
    return np.concatenate(kept), texts


def _trained_scale(model) -> float:
    return model.stage.config.sampling.guidance_scale


if __name__ == "__main__":
    cli.run(main)
