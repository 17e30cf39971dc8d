"""Draws pictures for captions with a trained cascade.

    python -m unclip_jax.sample --bundle OUT/bundle --prompt "a red apple on a yellow background" -n 4
    python -m unclip_jax.sample --bundle OUT/bundle --prompts captions.txt -n 1 --out drawn
    python -m unclip_jax.sample --again samples/a_red_apple_on_a_yellow_background_0_2.png --out again

Writes OUT/PROMPT_SEED_I.png, with all that it takes to draw it again inside, and OUT/grid.png. Other files that are
there stay: a second grid is grid-2.png. A picture depends on its prompt and the prompt's place on the command line, the
seed, its number among the prompt's pictures, and the flags that say how it is drawn; not on -n. A second run finds its
programs compiled, whatever the prompt, seed and guidance scales.

--prompts takes a file of captions (.txt, .jsonl or .csv), which all devices of all processes draw, into tars of
WebDataset or, by --format png, a file each. Stopped, the same command draws what is missing.

--preview shows what becomes of the pictures while they are drawn. --profile traces where the time goes.

--fsdp N splits the parameters of models that do not fit one device over N. The pictures are the same.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from unclip_jax import __version__, cli, pictures
from unclip_jax.config_values import SAMPLERS
from unclip_jax.errors import UserError
from unclip_jax.foreign import parsed_json
from unclip_jax.paths import SHIPPED, output_folder, to_path

if TYPE_CHECKING:
    from unclip_jax.cascade import Cascade

SCALES = ("guidance", "prior_guidance", "clip_guidance")
SOURCES = ("prior", "text", "caption")
TRACE = "profile"  # below OUT
OF_PRIOR = ("prior_guidance", "prior_steps", "dot_percentile")
FAST = {"sampler": "dpm++", "steps": "10"}


def parse(argv: list[str]) -> argparse.Namespace:
    """Reads the command line. Raises UserError for what is wrong with it."""
    parser = cli.Parser("sample", __doc__)
    parser.add_argument("--bundle", help="folder of a trained cascade; default: the one that comes with this package")
    parser.add_argument("--prompt", action="append", default=[], help="what to draw; may be repeated")
    parser.add_argument("--prompts", help="file of captions: a line each of .txt; field prompt of .jsonl or .csv")
    parser.add_argument("--format", choices=("tar", "png"), default="tar", help="of what --prompts draws")
    parser.add_argument("--again", help="a picture that this command drew: draws it again, by what is stored in it")
    parser.add_argument("-n", "--n", type=cli.whole(1, cli.MOST_PICTURES), default=4, help="pictures per prompt")
    text = "draw so many a prompt, keep the n that CLIP likes best"
    parser.add_argument("--rerank", type=cli.whole(0, cli.MOST_PICTURES), default=0, help=text)
    add_drawing_flags(parser)
    parser.add_argument("--out", default="samples", help="folder to write to")
    parser.add_argument("--preview", action="store_true", help="show what becomes of the pictures in OUT/preview.png")
    text = "trace the steps, once all is compiled, into FOLDER (default: OUT/profile), for xprof or TensorBoard"
    parser.add_argument("--profile", nargs="?", const="", metavar="FOLDER", help=text)
    args = parser.parse_args(argv[1:])
    if sum(map(bool, (args.prompt, args.prompts, args.again))) != 1:
        raise UserError("give one of --prompt, which may be repeated, --prompts and --again")
    if not args.again:
        args.bundle = args.bundle or SHIPPED
    if args.rerank and args.rerank < args.n:
        raise UserError(f"--rerank {args.rerank}: expected at least --n {args.n}, the pictures to be kept")
    for name in ("rerank", "preview", "profile"):
        if getattr(args, name) not in (0, False, None) and not args.prompt:
            beside = "--prompts" if args.prompts else "--again"
            raise UserError(f"--{name} goes with --prompt alone: leave it out beside {beside}")
    if args.preview and args.profile is not None:
        raise UserError("give one of --preview and --profile: to show pictures takes time that a trace would hold")
    return args


def add_drawing_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of how pictures are drawn."""
    parser.add_argument("--seed", type=cli.seed, default=0)
    parser.add_argument("--guidance", type=cli.scale, help="of the decoder; 1: none; default: the trained config's")
    parser.add_argument("--prior-guidance", type=cli.scale, help="of the prior; likewise")
    parser.add_argument("--clip-guidance", type=cli.scale, default=0.0, help="of the decoder, by noised_clip/")
    parser.add_argument("--from", choices=SOURCES, help="the decoder draws from the prior's embedding, from the text's "
                        "in its place, or from the caption alone; default: as it was trained")  # fmt: skip
    parser.add_argument("--steps", help="of the decoder: 50, 10,10,3,2,2, ddim25 or fast27; default: the config's")
    parser.add_argument("--sampler", choices=SAMPLERS, help="of the decoder; default: the config's")
    parser.add_argument("--eta", type=cli.number(0, 1), help="noise of ddim, from 0 to 1; default: the config's")
    parser.add_argument("--prior-steps", help="of a diffusion prior; likewise")
    text = "sample decoder and diffusion prior by dpm++ in 10 steps, where the flags above say nothing else"
    parser.add_argument("--fast", action="store_true", help=text)
    parser.add_argument("--dot-percentile", type=cli.number(0, 100), help="of an autoregressive prior; likewise")
    text = "devices that share a model, where it does not fit one"
    parser.add_argument("--fsdp", type=cli.whole(1, 2**20), default=1, help=text)


def main(argv: list[str]) -> int:
    args = parse(argv)
    out = output_folder(args.out)
    profile = output_folder(args.profile or str(out / TRACE), "--profile") if args.profile is not None else None
    if args.again:
        return _again(args, out)
    if args.prompts:
        from unclip_jax.drawing import read_prompts

        draw_prompts(args, read_prompts(args.prompts), out)
        return 0

    began = time.monotonic()
    cascade, compiles = _load(args.bundle, args.fsdp, args.fsdp)
    from unclip_jax.model import chunk_rows

    cascade = _sampled(cascade, args)
    cascade.check_prompts(args.prompt, vars(args)["from"])
    if args.rerank and not cascade.clip:
        raise UserError(f"--rerank needs a CLIP, and {args.bundle} has no clip/")
    count = args.rerank or args.n
    cascade.check_room(count * len(args.prompt))
    places = [(row, draw) for row in range(len(args.prompt)) for draw in range(count)]
    texts = [args.prompt[row] for row, _ in places]
    rows, draws = zip(*places, strict=True)

    def drawn() -> np.ndarray:
        return cascade.generate(texts, args.seed, **_options(vars(args)), rows=rows, draws=draws)["images"][-1]

    images = _watched(cascade, drawn, out, args.preview, profile)
    if args.rerank:
        kept = _best(cascade, images, args)
        images, texts, places = images[kept], [texts[i] for i in kept], [places[i] for i in kept]

    batch = chunk_rows(len(rows), args.fsdp)
    settings = _settings(cascade, args) | {"batch": batch}
    for i, (text, image, (row, draw)) in enumerate(zip(texts, images, places, strict=True)):
        path = out / f"{pictures.file_name(text)}_{args.seed}_{i}.png"
        position = (row * count + draw) % batch
        place = {"seed": str(args.seed), "row": str(row), "draw": str(draw), "position": str(position)}
        print(pictures.add_file(path, pictures.png(image, {"prompt": text, **place, "settings": settings})))
    grid = pictures.png(pictures.grid(images, args.n, texts), {"seed": str(args.seed)})
    print(pictures.add_file(out / "grid.png", grid))
    print(f"{len(images)} pictures in {time.monotonic() - began:.1f} s, {compiles}", file=sys.stderr)
    return 0


def _watched(
    cascade: "Cascade", drawn: Callable[[], np.ndarray], out: Path, preview: bool, profile: Path | None
) -> np.ndarray:
    """Draws pictures by `drawn`, and shows them meanwhile in OUT/preview.png or traces the steps into a folder."""
    from unclip_jax.training.tracking import traced
    from unclip_jax.watching import Preview, Profile

    if preview:
        with Preview(out) as cascade.watch:
            return drawn()
    if not profile:
        return drawn()
    cascade.watch = Profile()
    drawn()  # compiles
    with traced(profile):
        return drawn()


def _load(bundle: str, fsdp: int, count: int) -> "tuple[Cascade, cli.CompileCount]":
    """Loads a cascade onto so many devices of this process, of which --fsdp share a model."""
    cli.enable_compilation_cache()
    compiles = cli.CompileCount()
    import jax

    from unclip_jax.cascade import Cascade

    devices = jax.local_devices()
    if len(devices) % fsdp:
        raise UserError(f"--fsdp {fsdp}: expected a divisor of {len(devices)}, the devices of this process")
    return Cascade.load(bundle, devices[:count], fsdp), compiles


def draw_prompts(args: argparse.Namespace, prompts: list[str], out: Path, upsample: bool = True) -> None:
    """Draws `args.n` pictures of each prompt into a folder, those that it lacks, by the flags of `add_drawing_flags`.

    upsample: False draws the decoder's pictures.
    """
    from unclip_jax.drawing import draw_file
    from unclip_jax.training import preflight

    preflight.join("", -1, -1, wait=300)
    import jax

    began = time.monotonic()
    cascade, compiles = _load(args.bundle, args.fsdp, jax.local_device_count())
    if not upsample:
        cascade.upsamplers.clear()
    cascade = _sampled(cascade, args)
    cascade.check_prompts(prompts, vars(args)["from"])
    who, how = (jax.process_index(), jax.process_count()), (_options(vars(args)), _settings(cascade, args))
    count = draw_file(cascade, prompts, out, args.n, args.seed, *how, args.format, *who)
    print(f"{count} pictures in {time.monotonic() - began:.1f} s, {compiles}: {out}", file=sys.stderr)


def _again(args: argparse.Namespace, out: Path) -> int:
    """Draws the picture of a PNG file again. Raises UserError where the models are not those that drew it."""
    path = to_path(args.again)
    if not path.is_file():
        raise UserError(f"no picture at {args.again}: there is no such file")
    try:
        with path.open("rb") as file, Image.open(file) as image:
            stored = image.text
            prompt = stored["prompt"]
            seed, row, draw, position = (int(stored[name]) for name in ("seed", "row", "draw", "position"))
            settings = parsed_json(stored["settings"])
            bundle, models, batch = args.bundle or settings["bundle"], dict(settings["models"]), int(settings["batch"])
            if not 0 <= position < batch <= cli.MOST_PICTURES:
                raise ValueError(f"number {position} of {batch} pictures")
            options = _options(settings)
            sampling = {name: dict(own) for name, own in settings.get("sampling", {}).items()}
    except (OSError, AttributeError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{args.again} is not a picture of this command, or of an older version: it does not hold what "
                        f"drew it ({error})") from error  # fmt: skip
    cascade, _ = _load(bundle, args.fsdp, args.fsdp)
    del cascade.upsamplers[sum(name.startswith("upsampler") for name in models) :]  # it may be the decoder's picture
    if cascade.identities() != models:
        changed = sorted(name for name in models if cascade.identities().get(name) != models[name])
        raise UserError(f"{bundle} holds another {', '.join(changed) or 'set of models'} than drew {args.again}: name "
                        "the cascade that drew it by --bundle")  # fmt: skip
    cascade = cascade.sampled_by(sampling.get("decoder", {}), sampling.get("prior", {}))
    # As many rows at once as then, and taken from the same place: another program, or place, may round otherwise.
    numbers = {"rows": [row] * batch, "draws": [draw] * batch}
    image = cascade.generate([prompt] * batch, seed, **options, **numbers)["images"][-1][position]
    place = {"seed": str(seed), "row": str(row), "draw": str(draw), "position": str(position)}
    drawn = pictures.png(image, {"prompt": prompt, **place, "settings": settings})
    print(pictures.add_file(out / path.name, drawn))
    return 0


def _sampled(cascade: "Cascade", args: argparse.Namespace) -> "Cascade":
    """The cascade whose models sample as the flags say. Raises UserError for what they do not have."""
    cascade.check_clip_guidance(args.clip_guidance)
    if cascade.source(vars(args)["from"]) != "prior":
        for name in OF_PRIOR:
            if getattr(args, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} is of a prior, which this run does not draw from")
    decoder = {"steps": args.steps, "sampler": args.sampler, "eta": args.eta}
    prior = {"steps": args.prior_steps, "dot_percentile": args.dot_percentile}
    decoder, prior = ({key: value for key, value in flags.items() if value is not None} for flags in (decoder, prior))
    if args.fast:
        diffuses = cascade.prior and "sampler" in cascade.prior.stage.config.sampling
        decoder, prior = FAST | decoder, (FAST if diffuses else {}) | prior
    return cascade.sampled_by(decoder, prior)


def _options(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `Cascade.generate` that flags, or the settings in a picture, say."""
    scales = {f"{name}_scale": None if given[name] is None else float(given[name]) for name in SCALES}
    return scales | {"source": given.get("from")}


def _settings(cascade: "Cascade", args: argparse.Namespace) -> dict:
    """Everything that a picture depends on besides its prompt, seed and numbers."""
    settings = {name: getattr(args, name) for name in SCALES} | {"from": cascade.source(vars(args)["from"])}
    models = cascade.models()
    prior = models.get("prior") if settings["from"] == "prior" else None
    for name, model in (("guidance", cascade.decoder), ("prior_guidance", prior)):
        if settings[name] is None and model and model.stage.guided:
            settings[name] = model.stage.config.sampling.guidance_scale
    draws = (name for name, model in models.items() if "clip" not in name and (name != "prior" or model is prior))
    sampling = {name: models[name].stage.config.sampling.to_dict() for name in draws}
    where = {"bundle": str(args.bundle), "models": cascade.identities(), "version": __version__}
    return {"n": args.n, "rerank": args.rerank, "sampling": sampling} | settings | where


def _best(cascade: "Cascade", images: np.ndarray, args: argparse.Namespace) -> np.ndarray:
    """Numbers of each prompt's n pictures whose CLIP embedding is nearest to the prompt's, best first."""
    kept = []
    for row, prompt in enumerate(args.prompt):
        first = row * args.rerank
        likeness = cascade.similarity(images[first : first + args.rerank], [prompt])[:, 0]
        kept.append(first + np.argsort(-likeness, kind="stable")[: args.n])
    return np.concatenate(kept)


if __name__ == "__main__":
    cli.run(main)
