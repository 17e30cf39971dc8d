"""Base of every stage, and the few lines that all diffusion stages share."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8
from ml_collections import ConfigDict

from unclip_jax.arrays import Array, Batch, Key, Params
from unclip_jax.diffusion.guidance import (
    classifier_free,
    clip_x0,
    condition_eps,
    condition_mean,
    known_pixels,
    known_states,
    through_x0,
)
from unclip_jax.diffusion.losses import training_loss
from unclip_jax.diffusion.process import Network, make_denoiser, q_sample
from unclip_jax.diffusion.samplers import (
    Step,
    analytic_dpm_step,
    ddim_invert,
    ddim_step,
    ddpm_step,
    dpm_solver_step,
    sample,
    sample_part,
)
from unclip_jax.diffusion.schedule import NoiseSchedule, Table, first_steps, make_schedule, respace, respacing
from unclip_jax.errors import UserError
from unclip_jax.keys import draw_rows, split
from unclip_jax.stages.conditions import Conditions

Scalars = Mapping[str, Array]
Metrics = Mapping[str, Array | tuple[Array, Array]]  # pairs: see `Stage.loss`
Pictures = UInt8[Array, "B H W 3"]

# What a fusion may hold on the chip: 96 MiB, or all that there is, instead of 16. Products of transformers stream their
# operands a third faster by the compiler's estimate, for two to five times its own time.
MORE_ON_CHIP = {"xla_tpu_scoped_vmem_limit_kib": "98304"}


@runtime_checkable
class ClipTowers(Protocol):
    """A CLIP, as the stages that live in its space use it; `params` are its own."""

    @property
    def config(self) -> ConfigDict: ...

    @property
    def dim(self) -> int:
        """Dimension of the shared space."""

    def init(self, key: Key) -> Params:
        """Fresh parameters."""

    def embed_images(self, params: Params, images: UInt8[Array, "B R R 3"]) -> Float[Array, "B dim"]:
        """Embeddings of pictures."""

    def embed_texts(
        self, params: Params, tokens: Int[Array, "B context"], length: Int[Array, " B"]
    ) -> Float[Array, "B dim"]:
        """Embeddings of captions with start and end tokens."""

    def embed_texts_with_states(
        self, params: Params, tokens: Int[Array, "B context"], length: Int[Array, " B"]
    ) -> tuple[Float[Array, "B dim"], Float[Array, "B context width"]]:
        """Embeddings of captions, and the text tower's states that they are read from."""


@runtime_checkable
class Sampler(Protocol):
    """A stage that draws pictures or embeddings; every stage but a CLIP."""

    def sample(self, params: Params, frozen: Params, conditions: Conditions, key: Key) -> Float[Array, " B *shape"]:
        """Draws a row for each row of the conditions, by `config.sampling`.

        key: one for all rows, or keys (B,), by which each row's randomness is its own.
        """


@runtime_checkable
class Inverter(Sampler, Protocol):
    """A stage that also finds the noise from which pictures are drawn: unCLIP's decoder."""

    def invert(
        self, params: Params, frozen: Params, conditions: Conditions, images: Float[Array, "B R R 3"]
    ) -> Float[Array, "B R R 3"]:
        """DDIM-inverts pictures in [-1, 1] to their x_T, under the same conditions."""


def clip_image(clip: ClipTowers) -> dict[str, int]:
    """Names the picture of a batch that CLIP embeds, and its side in pixels. Raises UserError for a CLIP that reads
    captions alone."""
    if not clip.config.model.image:
        raise UserError("clip.bundle reads captions alone, as Karlo's does without its image_encoder: expected a CLIP "
                        "that sees the pictures to train on")  # fmt: skip
    return {"clip_image": clip.config.model.image_size}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One kind of trained model: what a batch of it holds, and its loss. Those that draw are a `Sampler` too.

    Built from a config and, where the model lives in CLIP's space, the CLIP's stage; construction computes nothing.
    Everywhere below, `frozen` is the parameters of that CLIP, or {}.
    embedded: batches hold embeddings that CLIP made beforehand, instead of the pictures and captions to embed.
    """

    config: ConfigDict
    clip: ClipTowers | None = None
    embedded: bool = False
    needs_clip: ClassVar[bool] = False
    adapts: ClassVar[tuple[str, ...]] = ()  # config keys that `adapt_params` may change, such as "model.inpaint"
    tpu_options: ClassVar[dict[str, str]] = {}  # to the TPU compiler

    @property
    def description(self) -> str:
        """Says all that its functions depend on besides their arguments."""
        configs = [part.config.to_dict() for part in (self, self.clip) if part]
        return json.dumps([self.config.stage, self.embedded, configs], sort_keys=True)

    @property
    def images(self) -> dict[str, int]:
        """Sides in pixels of the square uint8 pictures in a batch, by name; all are cut from the same crop."""
        raise TypeError(f"{type(self).__name__} does not say which pictures it takes")

    @property
    def patch(self) -> int | None:
        """Side of the random window of "image" that is trained on; None: the whole picture."""
        return None

    @property
    def texts(self) -> dict[str, tuple[str, int, bool]]:
        """Captions in a batch, by name: (whose tokenizer: "own" or "clip", context, whether start and end tokens are
        added)."""
        return {}

    @property
    def bsr_factor(self) -> int | None:
        """Factor by which "low_res", a BSR-degraded copy of "image", is smaller; None: batches have none."""
        return None

    @property
    def vectors(self) -> dict[str, int]:
        """Lengths of the float32 vectors in a batch, by name: embeddings made beforehand."""
        return {}

    @property
    def guided(self) -> bool:
        """Tells whether the model knows what to draw without its condition, which classifier-free guidance needs."""
        return True

    def guidance(self, scale: float | int | None = None) -> Float[Array, ""] | None:
        """Makes the `guidance_scale` of conditions; None for the config's scale. Gives None for a scale of 1, where the
        unconditional branch would be of no use, and where the model is not guided."""
        sampling = self.config.sampling
        if not self.guided or "guidance_scale" not in sampling:
            return None
        scale = sampling.guidance_scale if scale is None else scale
        return None if scale == 1 else np.array(scale, np.float32)

    @property
    def runs_clip(self) -> bool:
        """Tells whether the loss runs CLIP, on pictures or captions in the batch."""
        return "clip_tokens" in self.texts or "clip_image" in self.images

    @property
    def finishes(self) -> bool:
        """Tells whether `finish` has something to find."""
        return False

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

    def init(self, key: Key) -> Params:
        """Draws fresh parameters."""
        raise TypeError(f"{type(self).__name__} has no parameters")

    def adapt_params(self, params: Params, config: ConfigDict) -> Params:
        """Adapts the parameters of a trained model of the same stage, of `config`, to initialise this one."""
        return params

    def prepare(self, params: Params, frozen: Params, batches: Iterator[Batch]) -> tuple[Params, Scalars]:
        """Fits statistics of training batches before the first step: parameters that hold them, and scalars to report.

        batches: endless; takes as many as it needs. Statistics that are not to be trained belong under "fixed".
        """
        return params, {}

    def finish(self, params: Params, frozen: Params, batch: Batch, key: Key) -> tuple[Params, Scalars]:
        """Finds by held-out examples what the averaged parameters lack after the last step: parameters that replace
        those of the same name in the bundle, and scalars to report."""
        return {}, {}

    def loss(
        self, params: Params, frozen: Params, batch: Batch, key: Key, train: bool = True
    ) -> tuple[Float[Array, ""], Metrics]:
        """Computes the mean loss of a batch and the scalars that are logged beside it.

        train: False leaves out what training alone does: dropout, dropping of conditions, corruption of inputs, SAM.

        The mean over a part of the rows is a pair: (their sum, their number), each divided by the number of all rows.
        Pairs are averaged over microbatches first, and divided when they are logged, if there was such a row at all.
        """
        raise TypeError(f"{type(self).__name__} has no loss")

    def evaluate(self, params: Params, frozen: Params, batch: Batch, key: Key) -> Scalars:
        """Measures held-out examples without drawing: `loss`, and more where a stage says so; means over the rows."""
        return {"loss": self.loss(params, frozen, batch, key, train=False)[0]}

    def draw_examples(self, params: Params, frozen: Params, batch: Batch, keys: Key) -> dict[str, Array]:
        """Draws held-out examples anew from their conditions: "drawn" (B, ...), what is to be seen between, and "true",
        each a uint8 picture or an embedding a row; {} where a stage draws nothing. keys: (B,), one for each row."""
        return {}

    def score_examples(self, examples: Mapping[str, Array]) -> Scalars:
        """Measures what `draw_examples` drew of all held-out examples together."""
        return {}

    def project(self, params: Params) -> Params:
        """Projects parameters onto the allowed ones, after each update."""
        return params


def trained(params: Params) -> Params:
    """Selects the parameters that are trained: all but what `prepare` and `finish` find."""
    return {name: value for name, value in params.items() if name != "fixed"}


def to_float(images: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """Maps 8-bit pictures to [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1


def to_uint8(images: Float[Array, "..."]) -> UInt8[Array, "..."]:
    """Rounds pictures in [-1, 1] to 8 bits; clips what is outside."""
    return jnp.clip(jnp.round((images + 1) * 127.5), 0, 255).astype(jnp.uint8)


def rounded(images: Float[Array, "..."]) -> Float[Array, "..."]:
    """Rounds pictures in [-1, 1] to the nearest 8-bit values, still as float."""
    return to_float(to_uint8(images))


def output_channels(config: ConfigDict, channels: int) -> int:
    """Counts a network's output channels for `channels` of data: twice as many where it learns its variance."""
    return 2 * channels if config.diffusion.learned_variance else channels


def diffusion_loss(
    config: ConfigDict, network: Network, x0: Float[Array, " B *shape"], key: Key
) -> tuple[Float[Array, ""], Metrics]:
    """Computes the papers' loss at one uniformly drawn timestep per row, and metrics.

    metrics: the mean of each term and, as pairs "loss_q1" to "loss_q4", of each quarter of the timesteps, the least
    noisy first (see `Stage.loss`).
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

    metrics: dict[str, Array | tuple[Array, Array]] = {name: jnp.mean(term) for name, term in terms.items()}
    for quarter in range(4):
        within = 4 * t // d.timesteps == quarter
        own = jnp.where(within, losses, 0)  # not a product: another quarter's infinite loss would make it NaN
        metrics[f"loss_q{quarter + 1}"] = (jnp.mean(own), jnp.mean(within.astype(losses.dtype)))
    return jnp.mean(losses), metrics


def draw(
    config: ConfigDict,
    network: Network,
    shape: tuple[int, ...],
    conditions: Conditions,
    key: Key,
    network_inpaints: bool = False,
    C: Float[Array, " timesteps"] | None = None,
) -> Float[Array, " B *shape"]:
    """Samples x0 of `shape` by `config.sampling`, as far as it does not depend on the network which conditions hold:
    guidance, x_T, sketch, eta, known pixels and CLIP guidance.

    key: one for all rows, or keys (B,).
    network: answers for 2B rows where the conditions have a guidance scale, the conditional B first.
    network_inpaints: it takes the known pixels in, so that they are put into its x0; else into each step's x_t.
    C: of the sampler "analytic" (arXiv 2201.06503), a number for each timestep of the whole chain.
    """
    s, d = config.sampling, config.diffusion
    schedule = sampling_schedule(config, conditions.sketch is not None)

    # The start: noise, or a noised sketch some way down the chain.
    key_start, key_steps = split(key)
    x_T = conditions.x_T
    if x_T is None:
        x_T = s.temperature * draw_rows(jax.random.normal, key_start, shape)
    if conditions.sketch is not None:
        x_T = q_sample(schedule, conditions.sketch, jnp.int32(schedule.num_steps - 1), x_T)

    # The denoiser: guidance first, as the papers clip what is guided.
    denoiser = make_denoiser(network, schedule, d.predicts, d.learned_variance)
    if conditions.guidance_scale is not None:
        denoiser = classifier_free(denoiser, conditions.guidance_scale)
    gradient: Any = conditions.clip_gradient
    scale = conditions.clip_scale
    if conditions.x0_gradient is not None:
        whole = make_denoiser(network, make_schedule(d.schedule, d.timesteps), d.predicts, d.learned_variance)
        if conditions.guidance_scale is not None:
            whole = classifier_free(whole, conditions.guidance_scale)
        gradient = through_x0(conditions.x0_gradient, whole)
    if gradient is not None and s.sampler in ("ddim", "dpm++"):
        # Clipped afterwards: at the noisiest steps the least change of eps is a large one of x0.
        denoiser = condition_eps(denoiser, schedule, gradient, scale)
    if s.clip_x0:
        denoiser = clip_x0(denoiser, schedule, s.clip_x0)

    # The step. DDIM's and DPM-Solver's have no mean that could be shifted: their CLIP guidance is in eps, above.
    step = _step(s, conditions.eta, None if C is None else C[schedule.timesteps])
    if gradient is not None and s.sampler in ("ddpm", "analytic"):
        step = condition_mean(step, gradient, scale)
    if conditions.known is not None:
        x0, known = conditions.known_image, conditions.known
        if network_inpaints:
            denoiser = known_pixels(denoiser, schedule, x0, known)
        else:
            step = known_states(step, x0, known)
    looks_back = s.sampler == "dpm++"
    if conditions.state is not None:
        part = conditions.state, conditions.first, conditions.steps
        return sample_part(denoiser, schedule, x_T, key_steps, step, *part, looks_back)
    return sample(denoiser, schedule, x_T, key_steps, step, looks_back=looks_back)


def sampling_schedule(config: ConfigDict, sketched: bool = False) -> NoiseSchedule:
    """Makes the steps of `config.sampling`; of a chain that starts from a sketch, those from there on."""
    s, d = config.sampling, config.diffusion
    schedule = respace(make_schedule(d.schedule, d.timesteps), respacing(s.sampler, s.steps))
    if not sketched:
        return schedule
    # Steps of some samplers are not spread evenly over the chain.
    return first_steps(schedule, max(1, int(np.searchsorted(schedule.timesteps, s.start * d.timesteps))))


def _step(sampling: ConfigDict, eta: Any, C: Table | None) -> Step:
    """Makes the step of a sampler. eta: of DDIM, None being the config's. C: of "analytic", for the steps taken."""
    if sampling.sampler == "ddim":
        return ddim_step(sampling.eta if eta is None else eta)
    if sampling.sampler == "analytic":
        return analytic_dpm_step(C, 1.0)
    return dpm_solver_step if sampling.sampler == "dpm++" else ddpm_step


def invert(config: ConfigDict, network: Network, x0: Float[Array, " B *shape"]) -> Float[Array, " B *shape"]:
    """DDIM-inverts x0 to the x_T that draws it again without noise, guidance or clipping, in `sampling.steps` steps."""
    d = config.diffusion
    schedule = respace(make_schedule(d.schedule, d.timesteps), config.sampling.steps)
    return ddim_invert(make_denoiser(network, schedule, d.predicts, d.learned_variance), schedule, x0)


def empty_caption(
    tokens: Int[Array, "B context"], length: Int[Array, " B"]
) -> tuple[Int[Array, "B context"], Int[Array, " B"]]:
    """Makes captions of no words, between the start and end tokens of the captions given, with their lengths."""
    last = jnp.take_along_axis(tokens, length[:, None] - 1, axis=1)
    nothing = jnp.concatenate([tokens[:, :1], last, jnp.zeros_like(tokens[:, 2:])], axis=1)
    return nothing, jnp.full_like(length, 2)
