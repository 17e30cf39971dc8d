"""The tiny configs made smaller still, so that a test compiles them in seconds; and batches that look real."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax import cli
from unclip_jax.stages import make_stage

CONFIGS = ("clip", "prior_diffusion", "decoder", "upsampler_256", "upsampler_1024")
UNET = dict(channels=8, channel_mult=(1, 2), norm_groups=4)
CHANGES = {
    "clip": dict(image_size=16, dim=8, image=dict(width=16, depth=1), text=dict(width=16, depth=1, context=12)),
    "prior_diffusion": dict(embedding_dim=8, width=16, depth=1, context=10),
    "decoder": dict(
        image_size=8,
        embedding_dim=8,
        unet=UNET | dict(attention=(2,), head_channels=8),
        text=dict(width=8, depth=1, context=10),
    ),
    "upsampler_256": dict(patch=16, unet=UNET),
    "upsampler_1024": dict(patch=32, unet=UNET),
}


def small_config(name):
    """The tiny config `name`, shrunk; a few steps of everything."""
    config = cli.load_config(f"configs/{name}.py:tiny").unlock()
    config.model.update(CHANGES[name])
    config.train.update(dict(steps=2, batch_size=16, log_every=1, checkpoint_every=2, sample_every=2, eval_size=4))
    if "sampling" in config:
        config.sampling.steps = "3"
    return config.lock()


def random_params(stage, seed=0):
    """Parameters in which nothing is zero, so that every path through the network is open."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        spread = 0.5 / max(1, np.prod(leaf.shape[:-1])) ** 0.5 if leaf.ndim > 1 else 0.3
        return jnp.asarray(rng.normal(size=leaf.shape) * spread + 0.02, leaf.dtype)

    return jax.tree.map(draw, jax.eval_shape(stage.init, jax.random.key(0)))


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
