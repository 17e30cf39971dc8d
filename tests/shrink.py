"""The tiny configs made smaller still, so that a test compiles them in seconds; and batches that look real."""

import contextlib
import functools
import json
import tempfile
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from ml_collections import ConfigDict
from PIL import Image

from unclip_jax import cli, shipped, trials
from unclip_jax.bundle import load_description, save_bundle
from unclip_jax.data import varied_scenes
from unclip_jax.data.tokenizer import train_tokenizer
from unclip_jax.stages import make_stage

CONFIGS = ("clip", "clip_noised", "prior_diffusion", "prior_ar", "decoder", "upsampler_256", "upsampler_1024")
CONFIGS += ("glide", "glide_upsampler")
UNET = dict(channels=8, channel_mult=(1, 2), norm_groups=4)
CHANGES = {
    "clip": dict(image_size=16, dim=8, image=dict(width=16, depth=1), text=dict(width=16, depth=1, context=12)),
    "clip_noised": dict(image_size=8, dim=8, image=dict(width=16, depth=1), text=dict(width=16, depth=1, context=12)),
    "prior_diffusion": dict(embedding_dim=8, width=16, depth=1, context=10),
    "prior_ar": dict(
        embedding_dim=8,
        num_codes=6,
        num_buckets=8,
        num_dot_buckets=4,
        context=7,
        width=16,
        depth=1,
        text=dict(width=8, depth=1, context=10),
    ),
    "decoder": dict(
        image_size=8,
        embedding_dim=8,
        unet=UNET | dict(attention=(2,), head_channels=8),
        text=dict(width=8, depth=1, context=10),
    ),
    "upsampler_256": dict(patch=16, unet=UNET | dict(head_channels=8), text=dict(width=8, depth=1, context=10)),
    "upsampler_1024": dict(patch=32, unet=UNET | dict(head_channels=8), text=dict(width=8, depth=1, context=10)),
    "glide": dict(
        image_size=8,
        unet=UNET | dict(attention=(2,), head_channels=8),
        text=dict(width=8, depth=1, context=10),
    ),
    "glide_upsampler": dict(
        image_size=16,
        unet=UNET | dict(attention=(2,), head_channels=8),
        text=dict(width=8, depth=1, context=10),
    ),
}


def small_config(name):
    """The tiny config `name`, shrunk; a few steps of everything."""
    config = cli.load_config(f"configs/{name}.py:tiny").unlock()
    config.model.update(CHANGES[name])
    config.data.min_side = 0
    config.train.update(dict(steps=2, batch_size=16, log_every=1, checkpoint_every=2, sample_every=2, eval_size=4))
    if "sampling" in config and "steps" in config.sampling:
        config.sampling.steps = "3"
    if "prior" in config:
        config.prior.batches = 1
    return config.lock()


def random_params(stage, seed=0):
    """Parameters in which nothing is zero, so that every path is open; those that nothing trains are as they start."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        spread = 0.5 / max(1, np.prod(leaf.shape[:-1])) ** 0.5 if leaf.ndim > 1 else 0.3
        return jnp.asarray(rng.normal(size=leaf.shape) * spread + 0.02, leaf.dtype)

    params = jax.tree.map(draw, jax.eval_shape(stage.init, jax.random.key(0)))
    if "fixed" in params:
        params["fixed"] = jax.jit(lambda: stage.init(jax.random.key(0))["fixed"])()
    return params


@functools.cache
def small_stage(name):
    """(stage, frozen parameters, parameters) of the shrunk config; its CLIP is random too."""
    config = small_config(name)
    if "clip" not in config:
        stage, frozen = make_stage(config), {}
    else:
        clip = make_stage(small_config("clip"))
        stage, frozen = make_stage(config, clip), random_params(clip, 7)
    return stage, frozen, random_params(stage)


def random_batch(stage, batch_size, seed=0):
    """Noise pictures and tokens in the shapes of the stage's batch."""
    rng = np.random.default_rng(seed)
    batch = {}
    for name, spec in stage.batch_spec(batch_size).items():
        if name.endswith("_length"):
            batch[name] = rng.integers(2, 9, spec.shape).astype(spec.dtype)
        elif spec.dtype == np.uint8:
            batch[name] = rng.integers(0, 256, spec.shape).astype(spec.dtype)
        else:
            batch[name] = rng.integers(1, 200, spec.shape).astype(spec.dtype)
    return batch


def fake_clip(**parts):
    """What stands in for a CLIP: only the given parts of its protocol work."""

    def missing(*_):
        raise AssertionError("this CLIP was not given that part")

    names = ("config", "dim", "init", "embed_images", "embed_texts", "embed_texts_with_states")
    return SimpleNamespace(**(dict.fromkeys(names, missing) | parts))


THINGS = ("apple", "castle", "fox", "ghost", "lemon", "rocket", "tent", "whale")
COLOURS = ("red", "blue", "green")
CAPTIONS = [f"{article} {colour} {thing}" for article in ("a", "one") for colour in COLOURS for thing in THINGS]


def save_pictures(folder, count=12):
    """A dataset of `count` plain pictures of 24 pixels, each with a caption beside it."""
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (24, 24), (20 * i, 255 - 20 * i, 90)).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(CAPTIONS[i])
    return folder


@functools.cache
def tokenizer_bytes():
    """A sentencepiece model of `CAPTIONS`, no larger than the tiny configs' vocabulary."""
    return train_tokenizer(CAPTIONS, 512).model_bytes


def save_cascade(folder, clip_of_decoder=None):
    """A folder of random bundles as `Cascade.load` reads it; `clip_of_decoder`: a false identity of its CLIP."""
    identity = save_bundle(folder / "clip", "clip", *_random_model("clip"), tokenizer_bytes(), "", {})
    for name, config in (("prior", "prior_diffusion"), ("decoder", "decoder")):
        clip = clip_of_decoder if name == "decoder" and clip_of_decoder else identity
        save_bundle(folder / name, config, *_random_model(config), tokenizer_bytes(), clip, {})
    for name in ("upsampler_256", "upsampler_1024"):
        save_bundle(folder / name, "upsampler", *_random_model(name), None, "", {})
    return folder


def _random_model(name):
    stage, _, params = small_stage(name)
    return stage.config, params


@functools.cache
def _cache_folder():
    return tempfile.TemporaryDirectory(prefix="unclip_jax_tests_")


@contextlib.contextmanager
def compilation_cache():
    """Inside, a program that another test compiled inside is found and not compiled again."""
    options = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in options}
    jax.config.update("jax_compilation_cache_dir", _cache_folder().name)
    cli.enable_compilation_cache()
    reset_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        reset_cache()


def leaves(config, prefix=""):
    """Every key of a config as "section.key" → its value."""
    found = {}
    for name, value in config.items():
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else {f"{prefix}{name}": value}
    return found


def save_weights(folder):
    """Writes a folder as unclip_jax/weights is, of smaller, random models, with the digests of those there in its
    manifest."""
    captions = [varied_scenes.scene_at("train", index)[2] for index in range(500)]
    tokenizer = train_tokenizer(captions, 512).model_bytes
    manifest, clip = {}, None
    for name, config_name in {"clip": "clip", "prior": "prior_diffusion", "prior_ar": "prior_ar",
                              "decoder": "decoder", "glide": "glide"}.items():  # fmt: skip
        whole = cli.load_config(f"configs/{config_name}.py:shipped").copy_and_resolve_references().unlock()
        if "clip" in whole:
            whole.clip.bundle = str(folder / "clip")
        manifest[name] = {"digest": trials.digest(whole)}
        config = cli.load_config(f"configs/{config_name}.py:shipped").copy_and_resolve_references().unlock()
        config.model.update(CHANGES[config_name])
        text = config.model if config_name == "prior_diffusion" else config.model.text
        text.context, text.heads = 40, 2
        if "steps" in config.get("sampling", {}):
            config.sampling.steps = "3"
        stage = make_stage(config.lock(), clip)
        identity = load_description(folder / "clip")["identity"] if stage.needs_clip else ""
        save_bundle(folder / name, config.stage, config, random_params(stage), tokenizer, identity, {})
        clip = clip or stage
    (folder / shipped.MANIFEST.name).write_text(json.dumps(manifest))
    return folder
