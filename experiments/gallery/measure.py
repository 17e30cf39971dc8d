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
from unclip_jax.evaluation import alignment
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
    """DDIM there and back by a decoder that was trained longer; ends of interpolations; variations without noise and
    with it."""
    cascade = Cascade(cascade.clip, None, Model.load(runs / "decoder" / "bundle", ("decoder",), cascade.clip), [])
    scenes = [scene for scene, _ in emoji_scenes.scenes("single", "train")]
    scenes = scenes[:: len(scenes) // 32][:32]
    pictures = [emoji_scenes.render(scene, 64) for scene in scenes]
    squares = cascade._squares(pictures)
    there = cascade.encode(pictures)
    again = cascade.redraw(*there, seed=0)["images"][0]
    drifted = cascade.redraw(*there, seed=0, eta=1.0)["images"][0]
    ends = np.concatenate(
        [cascade.interpolate(*pair, 2, 0)["images"][0] for pair in zip(pictures[::2], pictures[1::2], strict=True)]
    )
    return {
        "psnr": {"mean": np.mean(psnr(again, squares)), "least": np.min(psnr(again, squares))},
        "interpolation_ends_psnr": {"mean": np.mean(psnr(ends, squares)), "least": np.min(psnr(ends, squares))},
        "variations_eta_0": score(again, scenes),
        "variations_eta_1": score(drifted, scenes) | {"psnr": np.mean(psnr(drifted, squares))},
    }


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
    """64 held-out scenes whose object is masked and another one asked for: by the model that was trained to inpaint, by
    GLIDE and by unCLIP, which have the known pixels put back."""
    scenes, _ = held_out()
    names = emoji_scenes.objects()
    wanted = [Scene(names[(names.index(scene.object) + 11) % len(names)], scene.colour) for scene in scenes]
    mask = np.zeros((256, 256), bool)
    edge = round(256 * (1 - emoji_scenes.SINGLE_SIDE) / 2) - 8
    mask[edge:-edge, edge:-edge] = True
    chains = {
        name: Cascade(None, None, Model.load(runs / run / "bundle", ("glide",)), [])
        for name, run in (("trained", "glide_inpaint"), ("implicit, GLIDE", "glide"))
    }
    found = {}
    for name, chain in (chains | {"implicit, unCLIP": cascade}).items():
        drawn, equal = [], True
        for i, (scene, other) in enumerate(zip(scenes, wanted, strict=True)):
            picture = emoji_scenes.render(scene, 256)
            images = chain.inpaint(picture, mask, emoji_scenes.caption(other), 1, i)["images"][0]
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
    return alignment.score(drawn, [scene.object for scene in scenes], [scene.colour for scene in scenes])


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2, axis=(1, 2, 3)))


def rounded(value):
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    return value if isinstance(value, bool | str | int) else round(float(value), 4)


PARTS = {
    f.__name__: f for f in (priors, dot_products, clip_guidance, clip_guidance_early, inversion, text_diff, inpainting)
}

if __name__ == "__main__":
    main()
