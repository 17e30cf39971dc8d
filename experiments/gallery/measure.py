"""Measures what the edits of the papers do on emoji scenes, where it is known what a picture shows.

    python experiments/gallery/measure.py --bundle quickstart/bundle --runs runs

Needs the runs that README.md, beside this file, lists. Writes report.json here and prints it.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import numpy as np

from unclip_jax import cli
from unclip_jax.cascade import Cascade
from unclip_jax.data import emoji_scenes
from unclip_jax.data.emoji_scenes import Scene
from unclip_jax.evaluation import alignment, intervals
from unclip_jax.model import Model

HERE = Path(__file__).parent
SCALES = (1.0, 1.5, 2.0, 3.0, 4.0)
CLIP_SCALES = (0.0, 1.0, 2.0, 4.0, 8.0)
SEEDS = range(4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS))
    args = parser.parse_args()
    cli.enable_compilation_cache()
    cascade = Cascade.load(args.bundle)
    cascade = Cascade(cascade.clip, cascade.prior, cascade.decoder, [])  # scored as the decoder draws
    path = HERE / "report.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    for name in args.only:
        began = time.monotonic()
        report[name] = rounded(PARTS[name](cascade, args.runs))
        print(f"{name} ({time.monotonic() - began:.0f} s): {json.dumps(report[name])}", flush=True)
        path.write_text(json.dumps(report, indent=1) + "\n")


def priors(cascade: Cascade, runs: Path) -> dict:
    """Both priors for the 64 held-out captions; the autoregressive one told of dot products from other percentiles."""
    scenes, texts = held_out()
    side = cascade.clip.stage.config.model.image_size
    truth = cascade.image_embeddings(np.stack([emoji_scenes.render(scene, side) for scene in scenes]))
    captions = cascade.text_embeddings(texts)
    autoregressive = Model.load(runs / "prior_ar" / "bundle", ("prior_ar",), cascade.clip)
    models = {"diffusion": cascade.prior, "autoregressive": autoregressive}
    models |= {f"autoregressive_from_{p}": autoregressive.sampled_by(dot_percentile=float(p)) for p in (0, 85)}
    found = {}
    for name, model in models.items():
        one = Cascade(cascade.clip, model, cascade.decoder, [])
        one.embeddings(texts, jax.random.key(0))  # compiles
        began = time.monotonic()
        z = np.concatenate([one.embeddings(texts, jax.random.key(seed)) for seed in SEEDS])
        seconds = (time.monotonic() - began) * 1000 / len(z)
        drawn = one.generate(texts, 0, embeddings=z[: len(texts)])["images"][0]
        found[name] = {
            "cosine": np.mean(np.sum(z * np.tile(truth, (4, 1)), axis=1)),
            "cosine_to_text": np.mean(np.sum(z * np.tile(captions, (4, 1)), axis=1)),
            "seconds_per_1000": seconds,
            "alignment": score(drawn, scenes),
        }
    found["true_embedding"] = {"cosine_to_text": np.mean(np.sum(truth * captions, axis=1))}
    return found


def dot_products(cascade: Cascade, runs: Path) -> dict:
    """z_i · z_t that the autoregressive prior draws, told of dot products above a percentile: over that of all."""
    _, texts = held_out()
    captions = cascade.text_embeddings(texts)
    model = Model.load(runs / "prior_ar" / "bundle", ("prior_ar",), cascade.clip)

    def drawn(percentile):
        one = Cascade(cascade.clip, model.sampled_by(dot_percentile=percentile), cascade.decoder, [])
        z = np.stack([one.embeddings(texts, jax.random.key(seed)) for seed in range(32)])
        return np.sum(z * captions, axis=-1)

    of_all = drawn(0.0)
    rises = {percentile: drawn(percentile) - of_all for percentile in (50.0, 85.0)}
    return {"of all": np.mean(of_all)} | {
        f"rise above {percentile:g} %": {"mean": np.mean(rise), "standard_error": np.std(rise) / np.sqrt(rise.size)}
        for percentile, rise in rises.items()
    }


def clip_guidance(cascade: Cascade, runs: Path) -> dict:
    """Alignment of held-out captions drawn by GLIDE, which has no embedding, over scales of both kinds of guidance."""
    scenes, texts = held_out()
    lines = [json.loads(line) for line in (runs / "clip_noised" / "evaluation.jsonl").read_text().splitlines()]
    glide, clip = (Model.load(runs / name / "bundle", ("glide", "clip")) for name in ("glide", "clip_noised"))
    guided = Cascade(None, None, glide, [], clip)
    table = {}
    for scale in SCALES:
        for clip_scale in CLIP_SCALES:
            drawn = guided.generate(texts, 0, scale, clip_guidance_scale=clip_scale)["images"][0]
            table[f"{scale:g}, {clip_scale:g}"] = score(drawn, scenes)
    return {"noised_clip": lines[-1], "classifier_free_and_clip": table}


def clip_guidance_early(cascade: Cascade, runs: Path) -> dict:
    """The share of right objects, unguided otherwise, drawn by a GLIDE that has not learned its captions yet."""
    scenes, texts = held_out()
    glide, clip = (Model.load(runs / name / "bundle", ("glide", "clip")) for name in ("glide_early", "clip_noised"))
    guided = Cascade(None, None, glide.sampled_by(sampler="ddpm", steps="50"), [], clip)

    def objects(scale, seed):
        return score(guided.generate(texts, seed, 1.0, clip_guidance_scale=scale)["images"][0], scenes)["object"]

    return {f"{scale:g}": np.mean([objects(scale, seed) for seed in SEEDS]) for scale in (0.0, 2.0, 4.0)}


def inversion(cascade: Cascade, runs: Path) -> dict:
    """DDIM there and back by a decoder that was trained longer; see `to_and_fro`."""
    return to_and_fro(cascade, runs / "decoder" / "bundle")


def inversion_eps(cascade: Cascade, runs: Path) -> dict:
    """DDIM there and back by a decoder that predicts eps and learns its variance, as the papers' do."""
    return to_and_fro(cascade, runs / "decoder_eps" / "bundle")


def to_and_fro(cascade: Cascade, decoder: Path) -> dict:
    """32 training pictures and their variations without noise and with it, ends of interpolations, and what is drawn of
    their embeddings and fresh noise."""
    cascade = Cascade(cascade.clip, None, Model.load(decoder, ("decoder",), cascade.clip), [])
    scenes = [scene for scene, _ in emoji_scenes.scenes("single", "train")]
    scenes = scenes[:: len(scenes) // 32][:32]
    pictures = [emoji_scenes.render(scene, 64) for scene in scenes]
    squares = cascade._squares(pictures)
    embeddings, x_T = cascade.encode(pictures)
    noise = np.random.default_rng(0).normal(size=x_T.shape).astype(np.float32)
    again, varied, fresh = (
        cascade.redraw(embeddings, start, seed=0, eta=eta, inverted=start is x_T)["images"][0]
        for start, eta in ((x_T, 0.0), (x_T, 1.0), (noise, 0.0))
    )
    pairs = zip(pictures[::2], pictures[1::2], strict=True)
    ends = np.concatenate([cascade.interpolate(*pair, 2, 0)["images"][0] for pair in pairs])
    return {
        "saturated_in_the_pictures": saturated(squares),
        "interpolation_ends_psnr": mean_psnr(ends, squares),
        "variations_eta_0": compared(again, squares, scenes),
        "variations_eta_1": compared(varied, squares, scenes),
        "fresh_noise": compared(fresh, squares, scenes),
    }


def compared(drawn, squares, scenes) -> dict:
    """How near drawn pictures are to those they were drawn from, what they show, and the share of values at an end."""
    both = score(drawn, scenes)
    low, high = intervals.wilson(round(both["both"] * len(drawn)), len(drawn))
    kept = both | {"both_low": low, "both_high": high}
    return {"psnr": mean_psnr(drawn, squares), "kept": kept, "saturated": saturated(drawn)}


def text_diff(cascade: Cascade, runs: Path) -> dict:
    """32 objects on blue, moved from "… blue background" to "… red background", by how far."""
    scenes = [Scene(name, "blue") for name in emoji_scenes.objects()[:32]]
    goals = [Scene(name, "red") for name in emoji_scenes.objects()[:32]]
    paths = [
        cascade.text_diff(
            emoji_scenes.render(scene, 64), emoji_scenes.caption(scene), emoji_scenes.caption(goal), 0.5, 5, 0
        )["images"][0]
        for scene, goal in zip(scenes, goals, strict=True)
    ]
    return {
        f"theta {theta:g}": score(np.stack([path[k] for path in paths]), goals)
        for k, theta in enumerate(np.linspace(0, 0.5, 5))
    }


def inpainting(cascade: Cascade, runs: Path) -> dict:
    """64 held-out scenes whose object is masked and another one asked for: by the model that was trained to inpaint,
    told of the known pixels and not, and by GLIDE and unCLIP, which have them put back."""
    scenes, _ = held_out()
    names = emoji_scenes.objects()
    wanted = [Scene(names[(names.index(scene.object) + 11) % len(names)], scene.colour) for scene in scenes]
    mask = np.zeros((256, 256), bool)
    edge = round(256 * (1 - emoji_scenes.SINGLE_SIDE) / 2) - 8
    mask[edge:-edge, edge:-edge] = True
    trained, glide = (
        Cascade(None, None, Model.load(runs / run / "bundle", ("glide",)), []) for run in ("glide_inpaint", "glide")
    )
    chains = {"trained": trained, "trained, not told": trained, "implicit, GLIDE": glide, "implicit, unCLIP": cascade}
    found = {}
    for name, chain in chains.items():
        drawn, equal = [], True
        for i, (scene, other) in enumerate(zip(scenes, wanted, strict=True)):
            picture = emoji_scenes.render(scene, 256)
            implicit = name != "trained"
            images = chain.inpaint(picture, mask, emoji_scenes.caption(other), 1, i, implicit)["images"][0]
            small, kept = chain._squares([picture]), known(mask, images.shape[1])
            equal &= np.array_equal(images[:, kept], small[:, kept])
            drawn.append(images)
        found[name] = score(np.concatenate(drawn), wanted) | {"known_pixels_equal": bool(equal)}
    return found


def known(mask, size):
    """Pixels of a picture of `size` of which the mask touches no part."""
    side = len(mask) // size
    return ~mask.reshape(size, side, size, side).any(axis=(1, 3))


def held_out():
    scenes, texts = zip(*emoji_scenes.scenes("single", "test"), strict=True)
    return list(scenes), list(texts)


def score(drawn, scenes) -> dict:
    found = alignment.score(drawn, [scene.object for scene in scenes], [scene.colour for scene in scenes])
    return {name: result.value for name, result in found.items()}


def psnr(a, b):
    """Equal pictures count as one that differs by rounding, 59 dB."""
    return 10 * np.log10(255**2 / np.maximum(np.mean((a.astype(float) - b) ** 2, axis=(1, 2, 3)), 1 / 12))


def mean_psnr(drawn, squares) -> dict:
    values = psnr(drawn, squares)
    low, high = intervals.bootstrap(values)
    return {"mean": values.mean(), "low": low, "high": high, "least": values.min(), "n": len(values)}


def saturated(images) -> float:
    """Share of the values that are at an end of their range."""
    return np.mean((images == 0) | (images == 255))


def rounded(value):
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    return value if isinstance(value, bool | str | int) else round(float(value), 4)


PARTS = (priors, dot_products, clip_guidance, clip_guidance_early, inversion, inversion_eps, text_diff, inpainting)
PARTS = {f.__name__: f for f in PARTS}

if __name__ == "__main__":
    main()
