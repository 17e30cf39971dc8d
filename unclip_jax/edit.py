"""Changes pictures with a trained cascade.

    python -m unclip_jax.edit variations  --bundle DIR --image cat.png -n 8 --eta 1
    python -m unclip_jax.edit interpolate --bundle DIR --image cat.png --image dog.png -n 8
    python -m unclip_jax.edit text_diff   --bundle DIR --image cat.png --after "an anime cat" [--before "a cat"] -n 8
    python -m unclip_jax.edit reconstruct --bundle DIR --image cat.png --components 5 --components 20 [--pca FOLDER]
    python -m unclip_jax.edit inpaint     --bundle DIR --image room.png --mask hole.png --prompt "a red lamp"
    python -m unclip_jax.edit sdedit      --bundle DIR --image sketch.png --prompt "a castle" --start 0.5
    python -m unclip_jax.edit classify    --bundle DIR --image cat.png --label cat --label dog --template "a {}"

Writes OUT/NAME_SEED_I.png, with all that it takes to draw it again inside, and OUT/sheet.png; of interpolate, text_diff
and reconstruct OUT/path.gif too. classify prints, and writes OUT/sheet.png alone. reconstruct keeps so many principal
components of the CLIP embedding: those of an autoregressive prior, the cascade's own or the bundle that --pca names, or
of the embeddings that `data embed` stored in the folder that --pca names. inpaint takes --mask and --prompt several
times, for a scene built up step by step. Other files that are in OUT stay: a second sheet is sheet-2.png.
"""

import argparse
import hashlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unclip_jax import __version__, cli, pictures
from unclip_jax.data.embeddings import DESCRIPTION, image_embeddings
from unclip_jax.data.transforms import center_square, decode
from unclip_jax.errors import UnreadableRecord, UserError
from unclip_jax.paths import SHIPPED, output_folder, to_path

if TYPE_CHECKING:
    from unclip_jax.cascade import Cascade

# Command → the flags that it reads beside --bundle, --image and --out, with their defaults.
NEEDED: Any = object()  # in place of a default
DDIM = {"seed": 0, "steps": 250, "guidance": 1.0}
CAPTIONED = {"prompt": NEEDED, "n": 4, "seed": 0, "guidance": None, "clip_guidance": 0.0}
COMMANDS: dict[str, dict[str, Any]] = {
    "variations": {"n": 4, "eta": 1.0, **DDIM},
    "interpolate": {"n": 4, "one_noise": False, **DDIM},
    "text_diff": {"after": NEEDED, "before": "", "theta": 0.4, "n": 4, **DDIM},
    "reconstruct": {"components": NEEDED, "pca": None, **DDIM},
    "inpaint": {"mask": NEEDED, "implicit": False, **CAPTIONED},
    "sdedit": {"start": 0.5, **CAPTIONED},
    "classify": {"label": NEEDED, "template": ["{}"]},
}
FLAGS: dict[str, dict[str, Any]] = {  # flag → what argparse is told of it
    "mask": {"action": "append", "help": "white where the picture is to be made anew; may be repeated"},
    "prompt": {"action": "append", "help": "what to draw; one for each mask"},
    "implicit": {"action": "store_true", "help": "no model is told which pixels are known: they are put back only"},
    "before": {"help": "caption of the picture as it is; none by default"},
    "after": {"help": "caption of the picture as it should be"},
    "theta": {"type": cli.number(0, 1), "help": "how far, from 0 to 1"},
    "label": {"action": "append", "help": "may be repeated"},
    "template": {"action": "append", "help": "caption with {} for a label; may be repeated"},
    "components": {"action": "append", "type": cli.whole(0, 2**16), "help": "how many to keep; may be repeated"},
    "pca": {"help": "bundle of an autoregressive prior beside this CLIP, or folder of this CLIP's embeddings"},
    "n": {"type": cli.whole(1, cli.MOST_PICTURES), "help": "pictures"},
    "one_noise": {"action": "store_true", "help": "fresh noise, the same for all frames"},
    "eta": {"type": cli.number(0, 1), "help": "0 reproduces, 1 varies most"},
    "start": {"type": cli.number(0, 1), "help": "how much noise, from 0 to 1"},
    "steps": {"type": cli.whole(1, 10**6), "help": "of DDIM, to and fro"},
    "guidance": {"type": cli.scale, "help": "of the decoder; default: with a prompt the trained config's, else 1"},
    "clip_guidance": {"type": cli.scale, "help": "by noised_clip/"},
    "seed": {"type": cli.seed, "help": "any whole number"},
}


def main(argv: list[str]) -> int:
    args = parse(argv)
    images = [_read(path) for path in args.image]
    masks = [_read_mask(path) for path in getattr(args, "mask", ())]
    out = output_folder(args.out)

    began = time.monotonic()
    cli.enable_compilation_cache()
    compiles = cli.CompileCount()
    from unclip_jax.cascade import Cascade, check_mask

    for mask in masks:
        check_mask(mask, images[0])
    for path, (height, width, _) in zip(args.image, (image.shape for image in images), strict=True):
        if height != width:
            print(f"{path}: only the square in its middle is seen, {min(height, width)} of {width}x{height} pixels",
                  file=sys.stderr)  # fmt: skip
    cascade = Cascade.load(args.bundle)
    if hasattr(args, "prompt"):
        cascade.check_prompts(args.prompt)
    elif not cascade.clip:
        raise UserError(f"{args.bundle} has no clip/, which {args.command} needs: give a cascade of unCLIP")
    cascade.check_room(getattr(args, "n", 1))
    if args.command == "text_diff":
        cascade.check_captions([args.after, *filter(None, [args.before])])
    if args.command == "classify":
        cascade.check_captions([template.replace("{}", label) for template in args.template for label in args.label])
    statistics = _components(cascade, args.pca) if args.command == "reconstruct" else {}
    about = _provenance(cascade, args, statistics)
    if args.command == "classify":
        _classify(cascade, args, images[0], out, about)
        return 0
    drawn, labels, frames = _edit(cascade, args, images, masks, statistics)
    _write(out, args, drawn, labels, frames, about)
    print(f"{len(drawn)} pictures in {time.monotonic() - began:.1f} s, {compiles}", file=sys.stderr)
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """Reads the command line: the flags of the command alone. Raises UserError for what is wrong with it."""
    parser = cli.Parser("edit", __doc__)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--bundle", default=SHIPPED, help="folder of a trained cascade; default: this package's")
    parser.add_argument("--image", action="append", required=True, help="picture to start from; of interpolate, two")
    parser.add_argument("--out", default="edits", help="folder to write to")
    for name, told in FLAGS.items():
        readers = _readers(name)
        helped = told["help"] if len(readers) == len(COMMANDS) - 1 else f"of {_listed(readers)}: {told['help']}"
        short = ["-n"] if name == "n" else []
        parser.add_argument(*short, _flag(name), default=argparse.SUPPRESS, **told | {"help": helped})

    given = vars(parser.parse_args(argv[1:]))
    command = given["command"]
    for name in FLAGS:
        if name in given and name not in COMMANDS[command]:
            raise UserError(f"{_flag(name)} is of {_listed(_readers(name))}, not of {command}")
    for name, default in COMMANDS[command].items():
        if default is NEEDED and not given.get(name):
            raise UserError(f"{command} needs {_flag(name)}")
    args = argparse.Namespace(**COMMANDS[command] | given)
    _check(args)
    return args


def _readers(name: str) -> list[str]:
    """Lists the commands that read a flag."""
    return [command for command, flags in COMMANDS.items() if name in flags]


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check(args: argparse.Namespace) -> None:
    """Raises UserError for a wrong number of pictures, masks or prompts."""
    wanted = 2 if args.command == "interpolate" else 1
    if len(args.image) != wanted:
        raise UserError(f"{args.command} takes {wanted} --image, not {len(args.image)}")
    if args.command == "sdedit" and len(args.prompt) != 1:
        raise UserError(f"sdedit takes 1 --prompt, not {len(args.prompt)}")
    if args.command == "inpaint" and len(args.mask) != len(args.prompt):
        raise UserError(f"{len(args.mask)} masks and {len(args.prompt)} prompts: give one for each mask, in order")


def _provenance(cascade: "Cascade", args: argparse.Namespace, statistics: dict[str, np.ndarray]) -> dict[str, Any]:
    """Describes all that it takes to draw the pictures again: what was asked for, the models, and SHA-256 of each file
    that was read; of --pca, of the numbers that it gave."""
    asked = {name: value for name, value in vars(args).items() if value is not None and name != "out"}
    contents = {name: to_path(name).read_bytes() for name in (*args.image, *getattr(args, "mask", ()))}
    if asked.get("pca"):
        contents[args.pca] = b"".join(statistics[name].tobytes() for name in ("mean", "components"))
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    return asked | {"sha256": digests, "models": cascade.identities(), "version": __version__}


def _edit(
    cascade: "Cascade",
    args: argparse.Namespace,
    images: list[np.ndarray],
    masks: list[np.ndarray],
    statistics: dict[str, np.ndarray],
) -> tuple[np.ndarray, list[str], bool]:
    """Draws what the command asks for: pictures, a label for each, and whether they are the frames of a path."""
    if hasattr(args, "prompt"):
        scales = {"guidance_scale": args.guidance, "clip_guidance_scale": args.clip_guidance}
        if args.command == "inpaint":
            return _scene(cascade, args, images[0], masks, scales), [args.prompt[-1]] * args.n, False
        pairs = [images[0]] * args.n, [args.prompt[0]] * args.n
        drawn = cascade.sdedit(*pairs, args.start, args.seed, **scales)["images"][-1]
        return drawn, args.prompt * args.n, False
    free = {"seed": args.seed, "steps": args.steps, "guidance_scale": args.guidance}
    if args.command == "variations":
        drawn = cascade.variations(images[0], args.n, args.eta, **free)
        return drawn["images"][-1], [f"eta {args.eta:g}"] * args.n, False
    if args.command == "interpolate":
        drawn = cascade.interpolate(*images, args.n, inverted=not args.one_noise, **free)
        labels = [f"{share:.2f}" for share in np.linspace(0, 1, args.n)]
    elif args.command == "text_diff":
        drawn = cascade.text_diff(images[0], args.before, args.after, args.theta, args.n, **free)
        labels = [f"theta {share:.2f}" for share in np.linspace(0, args.theta, args.n)]
    else:
        drawn = cascade.reconstructions(images[0], statistics, args.components, **free)
        labels = [f"{count} components" for count in args.components]
    return drawn["images"][-1], labels, True


def _components(cascade: "Cascade", pca: str | None) -> dict[str, np.ndarray]:
    """Finds the mean and principal components of the CLIP's embeddings: those of an autoregressive prior, or of stored
    embeddings. pca: folder of either; None: the cascade's own prior."""
    from unclip_jax.model import Model
    from unclip_jax.stages.codes import principal_components

    if pca and (to_path(pca) / DESCRIPTION).exists():
        mean, components = principal_components(image_embeddings(to_path(pca), cascade.clip.identity))
        return {"mean": mean, "components": components}
    prior = Model.load(pca, ("prior_ar",), cascade.clip) if pca else cascade.prior
    if not prior or prior.stage.config.stage != "prior_ar":
        raise UserError("reconstruct needs principal components: name by --pca the bundle of an autoregressive prior, "
                        "or a folder that `data embed` wrote")  # fmt: skip
    return {name: np.asarray(prior.params["fixed"][name]) for name in ("mean", "components")}


def _scene(
    cascade: "Cascade", args: argparse.Namespace, image: np.ndarray, masks: list[np.ndarray], scales: dict[str, Any]
) -> np.ndarray:
    """Inpaints mask after mask; each of the n pictures goes its own way from the first on."""
    from unclip_jax.cascade import scaled_mask

    options = scales | {"implicit": args.implicit}
    drawn = cascade.inpaint(image, masks[0], args.prompt[0], args.n, args.seed, **options)["images"][-1]
    for step, (mask, prompt) in enumerate(zip(masks[1:], args.prompt[1:], strict=True), 1):
        mask = scaled_mask(mask, drawn.shape[1])
        seeds = [args.seed + 1000 * step + i for i in range(args.n)]
        parts = [
            cascade.inpaint(one, mask, prompt, 1, seed, **options)["images"][-1]
            for one, seed in zip(drawn, seeds, strict=True)
        ]
        drawn = np.concatenate(parts)
    return drawn


def _write(
    out: Path, args: argparse.Namespace, drawn: np.ndarray, labels: list[str], frames: bool, about: dict[str, Any]
) -> None:
    name = f"{args.command}_{pictures.file_name(to_path(args.image[0]).stem)}_{args.seed}"
    for i, image in enumerate(drawn):
        print(pictures.add_file(out / f"{name}_{i}.png", pictures.png(image, {"edit": about | {"index": i}})))
    sheet = pictures.grid(drawn, min(len(drawn), 8), labels)
    print(pictures.add_file(out / "sheet.png", pictures.png(sheet, {"edit": about})))
    if frames:
        print(pictures.add_file(out / "path.gif", pictures.gif(drawn)))


def _classify(
    cascade: "Cascade", args: argparse.Namespace, image: np.ndarray, out: Path, about: dict[str, Any]
) -> None:
    """Prints each label's probability, the likeliest first, and draws the picture above them."""
    probabilities = cascade.classify(image, args.label, args.template)
    lines = [f"{probabilities[i]:7.2%}  {args.label[i]}" for i in np.argsort(-probabilities)]
    print("\n".join(lines))
    square = center_square(image, 256, "area")
    sheet = pictures.grid(square[None], 1, [", ".join(" ".join(line.split()) for line in lines)])
    print(pictures.add_file(out / "sheet.png", pictures.png(sheet, {"edit": about})))


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
    """Reads a mask, bool (H, W): True where the file is white, or transparent, which is read as white."""
    return _read(name).mean(axis=-1) > 127


if __name__ == "__main__":
    cli.run(main)
