"""What helps an upsampler: small pictures that are blurred or degraded in training, and captions."""

import jax
import numpy as np

from unclip_jax.cascade import Cascade
from unclip_jax.data import bsr, varied_scenes
from unclip_jax.data.transforms import area_resize
from unclip_jax.diffusion.corruption import gaussian_blur
from unclip_jax.pictures import to_float, to_uint8
from unclip_jax.trials import Arm, Claim, Experiment, Lab, Values

SIGMA = 0.6  # of the blur, in small pixels, as in training


def measure(lab: Lab, cascade: Cascade, arm: Arm) -> Values:
    """Enlarges pictures of scenes that are small as such, blurred, or degraded by BSR. For each kind the PSNR against
    the large pictures, in dB."""
    config = cascade.upsamplers[0].stage.config.model
    true = np.stack([varied_scenes.render(scene, config.image_size) for scene in lab.scenes])
    plain = np.stack([area_resize(picture, config.image_size // config.factor) for picture in true])
    pairs = enumerate(true)
    degraded = np.stack([bsr.degrade(picture, config.factor, np.random.default_rng(i)) for i, picture in pairs])
    given = {"plain": plain, "blurred": to_uint8(gaussian_blur(to_float(plain), SIGMA)), "degraded": degraded}
    found = {}
    for name, small in given.items():
        large = cascade.upsample(small, list(lab.captions), jax.random.key(0))[0]
        error = np.square((large - true.astype(np.float64)) / 255).mean(axis=(1, 2, 3))
        found[name] = -10 * np.log10(np.maximum(error, 1e-10))[:, None]
    return found


def arm(name: str, label: str, **changes: str) -> Arm:
    return Arm(name, label, changes={"upsampler_256": {key.replace("__", "."): v for key, v in changes.items()}})


EXPERIMENT = Experiment(
    question="Is an upsampler better for corrupted small pictures in training, and for captions?",
    paper="unCLIP, section 2.1",
    models=("upsampler_256",),
    arms=(
        arm("plain", "neither", diffusion__degradation="none"),
        arm("blur", "blurred in training", diffusion__degradation="blur"),
        arm("bsr", "degraded in training", diffusion__degradation="bsr"),
        arm("caption", "reads captions", diffusion__degradation="none", model__caption="own"),
    ),
    measures={"plain": "PSNR, small pictures", "blurred": "PSNR, blurred ones", "degraded": "PSNR, degraded ones"},
    claims=(
        Claim("Blur in training helps with blurred pictures.", "blurred", "blur", "plain"),
        Claim("BSR in training helps with degraded pictures.", "degraded", "bsr", "plain"),
        Claim("Captions help, where the paper saw no benefit.", "plain", "caption", "plain", ours=True),
    ),
    captions=128,
    draws=1,
    short={"upsampler_256": {"train.steps": 1000}},
    measure=measure,
)
