"""Changes pictures with a trained cascade.

    python -m unclip_jax.edit variations  --bundle DIR --image cat.png -n 8 --eta 1
    python -m unclip_jax.edit interpolate --bundle DIR --image cat.png --image dog.png -n 8
    python -m unclip_jax.edit text_diff   --bundle DIR --image cat.png --after "an anime cat" [--before "a cat"] -n 8
    python -m unclip_jax.edit reconstruct --bundle DIR --image cat.png --components 5 --components 20 [--pca BUNDLE]
    python -m unclip_jax.edit inpaint     --bundle DIR --image room.png --mask hole.png --prompt "a red lamp"
    python -m unclip_jax.edit sdedit      --bundle DIR --image sketch.png --prompt "a castle" --start 0.5
    python -m unclip_jax.edit classify    --bundle DIR --image cat.png --label cat --label dog --template "a {}"

Writes OUT/NAME_SEED_I.png, with what made it inside, and OUT/sheet.png; of interpolate, text_diff and reconstruct
OUT/path.gif too. classify prints, and writes OUT/sheet.png alone. reconstruct keeps so many principal components of the
CLIP embedding, as found by an autoregressive prior: the cascade's own, or the bundle that --pca names. inpaint takes
--mask and --prompt several times, for a scene built up step by step.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unclip_jax import cli, pictures
from unclip_jax.data.transforms import UnreadableRecord, center_square, decode
from unclip_jax.errors import UserError
from unclip_jax.paths import output_folder, to_path

if TYPE_CHECKING:
    from unclip_jax.cascade import Cascade

COMMANDS = ("variations", "interpolate", "text_diff", "reconstruct", "inpaint", "sdedit", "classify")
NEEDS = {
    "text_diff": ("after",),
    "reconstruct": ("components",),
    "inpaint": ("prompt", "mask"),
    "sdedit": ("prompt",),
    "classify": ("label",),
}


def main(argv: list[str]) -> int:
    args = parse(argv)
    images = [_read(path) for path in args.image]
    masks = [_read_mask(path) for path in args.mask]
    _check(args, images, masks)
    out = output_folder(args.out)

    began = time.monotonic()
    cli.enable_compilation_cache()
    compiles = cli.CompileCount()
    from unclip_jax.cascade import Cascade

    cascade = Cascade.load(args.bundle)
    if args.command not in ("inpaint", "sdedit") and not cascade.clip:
        raise UserError(f"{args.bundle} has no clip/, which {args.command} needs: give a cascade of unCLIP")
    if args.prompt:
        cascade.check_prompts(args.prompt)
    if args.command == "classify":
        _classify(cascade, args, images[0], out)
        return 0
    drawn, labels, frames = _edit(cascade, args, images, masks)
    _write(out, args, drawn, labels, frames)
    print(f"{len(drawn)} pictures in {time.monotonic() - began:.1f} s, {compiles}", file=sys.stderr)
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """Reads the command line. Raises UserError for what is wrong with it."""
    parser = cli.Parser("edit", __doc__)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--bundle", required=True, help="folder of a trained cascade")
    parser.add_argument("--image", action="append", required=True, help="picture to start from; of interpolate, two")
    parser.add_argument("--mask", action="append", default=[], help="white where the picture is to be made anew")
    parser.add_argument("--prompt", action="append", default=[], help="what to draw")
    parser.add_argument("--before", default="", help="caption of the picture as it is; none by default")
    parser.add_argument("--after", help="caption of the picture as it should be")
    parser.add_argument("--label", action="append", default=[], help="of classify; may be repeated")
    parser.add_argument("--template", action="append", help="of classify: caption with {} for a label; may be repeated")
    parser.add_argument("--components", action="append", type=int, default=[], help="of reconstruct; may be repeated")
    parser.add_argument("--pca", help="of reconstruct: bundle of an autoregressive prior beside this CLIP")
    parser.add_argument("-n", "--n", type=int, default=4, help="pictures")
    parser.add_argument("--one-noise", action="store_true", help="of interpolate: fresh noise, the same for all frames")
    parser.add_argument("--eta", type=float, default=1.0, help="of variations: 0 reproduces, 1 varies most")
    parser.add_argument("--theta", type=float, default=0.4, help="of text_diff: how far, from 0 to 1")
    parser.add_argument("--start", type=float, default=0.5, help="of sdedit: how much noise, from 0 to 1")
    parser.add_argument("--steps", type=int, default=250, help="of DDIM, to and fro")
    parser.add_argument("--guidance", type=cli.finite, help="of the decoder; default: 1, with a prompt the config's")
    parser.add_argument("--clip-guidance", type=cli.finite, default=0.0, help="of inpaint and sdedit, by noised_clip/")
    parser.add_argument("--seed", type=cli.seed, default=0)
    parser.add_argument("--out", default="edits", help="folder to write to")
    return parser.parse_args(argv[1:])


def _check(args: argparse.Namespace, images: list[np.ndarray], masks: list[np.ndarray]) -> None:
    wanted = 2 if args.command == "interpolate" else 1
    if len(images) != wanted:
        raise UserError(f"{args.command} takes {wanted} --image, not {len(images)}")
    if args.n < 1:
        raise UserError(f"--n {args.n}: expected at least 1 picture")
    for name in ("eta", "theta", "start"):
        if not 0 <= getattr(args, name) <= 1:
            raise UserError(f"--{name} {getattr(args, name)}: expected a number from 0 to 1")
    for name in NEEDS.get(args.command, ()):
        if not getattr(args, name):
            raise UserError(f"{args.command} needs --{name}")
    if len(masks) != len(args.prompt) and args.command == "inpaint":
        raise UserError(f"{len(masks)} masks and {len(args.prompt)} prompts: give one prompt for each mask, in order")


def _edit(
    cascade: "Cascade", args: argparse.Namespace, images: list[np.ndarray], masks: list[np.ndarray]
) -> tuple[np.ndarray, list[str], bool]:
    """Draws what the command asks for: pictures, a label for each, and whether they are the frames of a path."""
    free: dict[str, Any] = {"seed": args.seed, "steps": args.steps}
    if args.guidance is not None:
        free["guidance_scale"] = args.guidance
    if args.command == "variations":
        drawn = cascade.variations(images[0], args.n, args.eta, **free)["images"][-1]
        return drawn, [f"eta {args.eta:g}"] * args.n, False
    if args.command == "interpolate":
        drawn = cascade.interpolate(*images, args.n, inverted=not args.one_noise, **free)["images"][-1]
        return drawn, [f"{share:.2f}" for share in np.linspace(0, 1, args.n)], True
    if args.command == "text_diff":
        drawn = cascade.text_diff(images[0], args.before, args.after, args.theta, args.n, **free)["images"][-1]
        return drawn, [f"theta {share:.2f}" for share in np.linspace(0, args.theta, args.n)], True
    if args.command == "reconstruct":
        statistics = _components(cascade, args)
        drawn = cascade.reconstructions(images[0], statistics, args.components, **free)["images"][-1]
        return drawn, [f"{count} components" for count in args.components], True
    scales = {"guidance_scale": args.guidance, "clip_guidance_scale": args.clip_guidance}
    if args.command == "sdedit":
        drawn = cascade.sdedit(images[0], args.prompt[0], args.start, args.n, args.seed, **scales)["images"][-1]
        return drawn, args.prompt * args.n, False
    return _scene(cascade, args, images[0], masks, scales), [args.prompt[-1]] * args.n, False


def _components(cascade: "Cascade", args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Finds the mean and principal components of CLIP's embeddings, as the autoregressive prior holds them."""
    from unclip_jax.model import Model

    prior = Model.load(args.pca, ("prior_ar",), cascade.clip) if args.pca else cascade.prior
    if not prior or prior.stage.config.stage != "prior_ar":
        raise UserError("reconstruct needs an autoregressive prior, which holds the principal components: name its "
                        "bundle by --pca")  # fmt: skip
    return {name: np.asarray(value) for name, value in prior.params["fixed"].items()}


def _scene(
    cascade: "Cascade", args: argparse.Namespace, image: np.ndarray, masks: list[np.ndarray], scales: dict[str, Any]
) -> np.ndarray:
    """Inpaints mask after mask; each of the n pictures goes its own way from the first on."""
    drawn = cascade.inpaint(image, masks[0], args.prompt[0], args.n, args.seed, **scales)["images"][-1]
    for step, (mask, prompt) in enumerate(zip(masks[1:], args.prompt[1:], strict=True), 1):
        mask = center_square(np.repeat(np.uint8(255) * mask[..., None], 3, -1), drawn.shape[1], "area")[..., 0] > 0
        seeds = [args.seed + 1000 * step + i for i in range(args.n)]
        parts = [
            cascade.inpaint(one, mask, prompt, 1, seed, **scales)["images"][-1]
            for one, seed in zip(drawn, seeds, strict=True)
        ]
        drawn = np.concatenate(parts)
    return drawn


def _write(out: Path, args: argparse.Namespace, drawn: np.ndarray, labels: list[str], frames: bool) -> None:
    asked = {name: value for name, value in vars(args).items() if value not in (None, []) and name != "out"}
    name = f"{args.command}_{to_path(args.image[0]).stem}_{args.seed}"
    for i, image in enumerate(drawn):
        path = out / f"{name}_{i}.png"
        pictures.save_png(path, image, {"edit": asked | {"index": i}})
        print(path)
    sheet = pictures.grid(drawn, min(len(drawn), 8), labels)
    pictures.save_png(out / "sheet.png", sheet, {"edit": asked})
    print(out / "sheet.png")
    if frames:
        pictures.save_gif(out / "path.gif", drawn)
        print(out / "path.gif")


def _classify(cascade: "Cascade", args: argparse.Namespace, image: np.ndarray, out: Path) -> None:
    """Prints each label's probability, the likeliest first, and draws the picture above them."""
    probabilities = cascade.classify(image, args.label, args.template or ("{}",))
    lines = [f"{probabilities[i]:7.2%}  {args.label[i]}" for i in np.argsort(-probabilities)]
    print("\n".join(lines))
    square = center_square(image, 256, "area")
    sheet = pictures.grid(square[None], 1, [", ".join(" ".join(line.split()) for line in lines)])
    pictures.save_png(out / "sheet.png", sheet, {"edit": {"command": "classify", "image": args.image[0]}})
    print(out / "sheet.png")


def _read(name: str) -> np.ndarray:
    """Reads any picture file as uint8 RGB: grey, 16-bit and transparent ones too."""
    path = to_path(name)
    if not path.is_file():
        raise UserError(f"no picture at {name}: there is no such file")
    try:
        return decode(path.read_bytes())
    except UnreadableRecord as error:
        raise UserError(f"{name} is not a picture that can be read ({error})") from error


def _read_mask(name: str) -> np.ndarray:
    return _read(name).mean(axis=-1) > 127


if __name__ == "__main__":
    cli.run(main)
