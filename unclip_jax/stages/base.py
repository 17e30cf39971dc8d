"""Base of every stage, and the few lines that all diffusion stages share."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from unclip_jax.diffusion.guidance import (
    classifier_free,
    clip_x0,
    condition_eps,
    condition_mean,
    known_pixels,
    known_states,
)
from unclip_jax.diffusion.losses import training_loss
from unclip_jax.diffusion.process import make_denoiser, q_sample
from unclip_jax.diffusion.samplers import analytic_dpm_step, ddim_invert, ddim_step, ddpm_step, sample
from unclip_jax.diffusion.schedule import first_steps, make_schedule, respace

Params = dict[str, Any]

# What a fusion may hold on the chip: 96 MiB, or all that there is, instead of 16. Products of transformers stream their
# operands a third faster by the compiler's estimate, for two to five times its own time.
MORE_ON_CHIP = {"xla_tpu_scoped_vmem_limit_kib": "98304"}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One kind of trained model: what its batch is, what its loss is, how it samples.

    Built from a config (and, where the model lives in CLIP's space, the CLIP stage); construction computes nothing.
    Parameters are plain dicts. `frozen` is the parameters of that CLIP, or {}.
    `embedded`: batches carry the embeddings that CLIP made beforehand, in place of what it makes them of.
    """

    config: ConfigDict
    clip: "Stage | None" = None
    embedded: bool = False
    needs_clip: ClassVar[bool] = False
    tpu_options: ClassVar[dict[str, str]] = {}  # to the TPU compiler

    @property
    def images(self) -> dict[str, int]:
        """Name → side in pixels of each square uint8 picture in a batch, all cut from the same crop."""
        raise TypeError(f"{type(self).__name__} does not say which pictures it takes")

    @property
    def patch(self) -> int | None:
        """Side of the random window of "image" that is trained on; None: the whole picture."""
        return None

    @property
    def texts(self) -> dict[str, tuple[str, int, bool]]:
        """Name → (whose tokenizer: "own" or "clip", context, whether start and end tokens are added)."""
        return {}

    @property
    def bsr_factor(self) -> int | None:
        """Factor by which "low_res" is smaller, a BSR-degraded copy of "image" in a batch; None: there is none."""
        return None

    @property
    def vectors(self) -> dict[str, int]:
        """Name → length of each float32 vector in a batch: embeddings made beforehand."""
        return {}

    @property
    def runs_clip(self) -> bool:
        """Tells whether the loss needs CLIP's parameters: a batch holds what CLIP reads."""
        return "clip_image" in self.images or "clip_tokens" in self.texts

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and types of a batch's arrays."""
        spec = {}
        for name, size in self.images.items():
            side = self.patch if name == "image" and self.patch else size
            spec[name] = jax.ShapeDtypeStruct((batch_size, side, side, 3), jnp.uint8)
        if self.bsr_factor:
            side = spec["image"].shape[1] // self.bsr_factor
            spec["low_res"] = jax.ShapeDtypeStruct((batch_size, side, side, 3), jnp.uint8)
        for name, (_, context, _) in self.texts.items():
            spec[name] = jax.ShapeDtypeStruct((batch_size, context), jnp.int32)
            spec[f"{name}_length"] = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
        for name, size in self.vectors.items():
            spec[name] = jax.ShapeDtypeStruct((batch_size, size), jnp.float32)
        return spec

    def init(self, key) -> Params:
        """Fresh parameters."""
        raise TypeError(f"{type(self).__name__} has no parameters")

    def adapt_params(self, params: Params, config: ConfigDict) -> Params:
        """Adapts the parameters of a trained model of the same stage, of `config`, to initialise this one."""
        return params

    def prepare(self, params: Params, frozen: Params, batches: Iterator[dict]) -> tuple[Params, dict[str, jax.Array]]:
        """Before the first step: parameters that hold what training batches tell, and scalars worth saying about it.

        batches: endless; takes as many as it needs. Leaves found here that are not to be trained belong under "fixed".
        """
        return params, {}

    def finish(self, params: Params, frozen: Params, batch: dict, key) -> tuple[Params, dict[str, jax.Array]]:
        """After the last step: the averaged parameters as they go into the bundle, with what a held-out batch tells of
        the trained network, and scalars worth saying about it."""
        return params, {}

    def loss(self, params: Params, frozen: Params, batch: dict, key) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mean loss of a batch and the scalars worth logging beside it.

        A mean over some rows alone is a pair: (their sum, their number), each divided by the number of all rows. Pairs
        are averaged over microbatches first and divided when they are logged, if there was such a row at all.
        """
        raise TypeError(f"{type(self).__name__} has no loss")

    def evaluate(self, params: Params, frozen: Params, batch: dict, key) -> tuple[dict, jax.Array | None]:
        """Scalars of a held-out batch and, where the stage draws, its pictures: uint8 (rows, H, W, 3)."""
        raise TypeError(f"{type(self).__name__} has no evaluation")

    def project(self, params: Params) -> Params:
        """Back to the allowed parameters, after each update."""
        return params


def trained(params: Params) -> Params:
    """Selects the parameters that are trained: all but what `prepare` and `finish` find."""
    return {name: value for name, value in params.items() if name != "fixed"}


def to_float(images):
    """uint8 → float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1


def to_uint8(images):
    """Float in [-1, 1] → uint8."""
    return jnp.clip(jnp.round((images + 1) * 127.5), 0, 255).astype(jnp.uint8)


def rounded(images):
    """Float in [-1, 1] → the nearest 8-bit values, still as float."""
    return to_float(to_uint8(images))


def output_channels(config: ConfigDict, channels: int) -> int:
    """Channels a network puts out for `channels` of data: twice as many where it learns its variance."""
    return 2 * channels if config.diffusion.learned_variance else channels


def diffusion_loss(config: ConfigDict, network: Callable, x0, key):
    """The papers' loss at one uniformly drawn timestep per row: (mean loss, metrics).

    metrics: the mean of each term and, as pairs "loss_q1" to "loss_q4", of each quarter of the timesteps, the least
    noisy first (see `Stage.loss`).

    network(x_t, timesteps) → output; x0 (B, ...) float32.
    """
    d = config.diffusion
    schedule = make_schedule(d.schedule, d.timesteps)
    key_t, key_noise = jax.random.split(key)
    t = jax.random.randint(key_t, x0.shape[:1], 0, d.timesteps)
    noise = jax.random.normal(key_noise, x0.shape)
    x_t = q_sample(schedule, x0, t, noise)
    snr_clip = tuple(d.snr_clip) or None
    output = network(x_t, t)
    losses, terms = training_loss(schedule, output, x0, x_t, noise, t, d.predicts, d.learned_variance, snr_clip)
    metrics = {name: jnp.mean(term) for name, term in terms.items()}
    for quarter in range(4):
        within = 4 * t // d.timesteps == quarter
        own = jnp.where(within, losses, 0)  # not a product: another quarter's infinite loss would make it NaN
        metrics[f"loss_q{quarter + 1}"] = (jnp.mean(own), jnp.mean(within.astype(losses.dtype)))
    return jnp.mean(losses), metrics


def draw(config: ConfigDict, network: Callable, shape: tuple[int, ...], conditions: dict, key, told_known=False):
    """Samples x0 of `shape` by `config.sampling`, float32. Of `conditions` it heeds, where they are given:

    "guidance_scale": `network` then answers for 2B rows, the conditional B first.
    "x_T": what to start from, instead of noise from `key` times `temperature`.
    "sketch": pictures to start from, noised to the share `config.sampling.start` of all steps (SDEdit).
    "eta": of DDIM, instead of the config's.
    "known_image", "known" (bool): pixels to keep; told_known: whether the network was told of them.
    "clip_gradient": (x_t, timesteps) → what CLIP guidance follows, "clip_scale" times; a pytree that can be called.
    "C": of the sampler "analytic", a number for each step.
    Scales, eta and arrays may be traced.
    """
    s, d = config.sampling, config.diffusion
    schedule = respace(make_schedule(d.schedule, d.timesteps), s.steps)
    key_start, key_steps = jax.random.split(key)
    x_T = conditions["x_T"] if "x_T" in conditions else s.temperature * jax.random.normal(key_start, shape)
    if "sketch" in conditions:
        schedule = first_steps(schedule, max(1, round(s.start * schedule.num_steps)))
        x_T = q_sample(schedule, conditions["sketch"], jnp.int32(schedule.num_steps - 1), x_T)
    denoiser = make_denoiser(network, schedule, d.predicts, d.learned_variance)
    if "guidance_scale" in conditions:
        denoiser = classifier_free(denoiser, conditions["guidance_scale"])
    gradient, scale = conditions.get("clip_gradient"), conditions.get("clip_scale")
    if gradient and s.sampler == "ddim":
        # Clipped afterwards: at the noisiest steps the least change of eps is a large one of x0.
        denoiser = condition_eps(denoiser, schedule, gradient, scale)
    if s.clip_x0:
        denoiser = clip_x0(denoiser, schedule, s.clip_x0)
    if s.sampler == "ddim":
        step = ddim_step(conditions.get("eta", s.eta))
    else:
        step = analytic_dpm_step(conditions["C"], 1.0) if s.sampler == "analytic" else ddpm_step
        step = condition_mean(step, gradient, scale) if gradient else step
    if "known" in conditions:
        x0, known = conditions["known_image"], conditions["known"]
        if told_known:
            denoiser = known_pixels(denoiser, schedule, x0, known)
        else:
            step = known_states(step, x0, known)
    return sample(denoiser, schedule, x_T, key_steps, step)


def invert(config: ConfigDict, network: Callable, x0):
    """x_T from which DDIM without noise, guidance or clipping draws x0 again, over the steps of `config.sampling`."""
    d = config.diffusion
    schedule = respace(make_schedule(d.schedule, d.timesteps), config.sampling.steps)
    return ddim_invert(make_denoiser(network, schedule, d.predicts, d.learned_variance), schedule, x0)


def empty_caption(tokens, length):
    """The caption of no words, between the start and end tokens of the captions given: tokens, length as given."""
    last = jnp.take_along_axis(tokens, length[:, None] - 1, axis=1)
    nothing = jnp.concatenate([tokens[:, :1], last, jnp.zeros_like(tokens[:, 2:])], axis=1)
    return nothing, jnp.full_like(length, 2)
