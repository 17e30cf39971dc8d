"""Finds mistakes in configs that can be found before anything is loaded or compiled."""

import functools

from ml_collections import ConfigDict

from unclip_jax import cli
from unclip_jax.config import flat_keys
from unclip_jax.config_values import check_values
from unclip_jax.diffusion.schedule import make_schedule, respace, respacing
from unclip_jax.errors import UserError
from unclip_jax.paths import same_place, to_path

# Keys of text towers that a model has no use for, by who reads its captions: converted models do not have them.
_UNREAD = {
    "clip": tuple(f"model.text.{key}" for key in ("vocab_size", "context", "depth", "heads", "remat")),
    "none": ("model.text.",),
}
MEASURES = ("fid", "sfid", "kid", "inception_score", "precision_recall", "alignment")
UPSAMPLER_CAPTIONS = ("none", "own")


def check_config(config: ConfigDict, workdir: str) -> None:
    """Raises UserError for values of a config that contradict each other, as far as neither data nor devices tell.

    workdir: folder of the run, which must not be that of its init.bundle.
    """
    check_values(config)
    unread = _UNREAD.get(config.get("model", {}).get("caption"), ())
    if lacking := sorted(key for key in _needed(config.stage) - set(flat_keys(config)) if not key.startswith(unread)):
        raise UserError(f"the config has no {lacking[0]}, which every config of stage {config.stage} has: add it")
    _check_measures(config)
    band = config.train.expected_loss
    if any(low > high for _, low, high in band) or list(band) != sorted(band):
        raise UserError(f"train.expected_loss is {band}: expected (step, low, high) rows, in the order of steps")
    _check_data(config, workdir)
    if config.stage == "clip":
        _check_clip(config)
    _check_widths("model", config.model)
    if config.model.get("caption") == "own" and config.model.get("vocab_size") == 0:
        raise UserError("model.vocab_size is 0, but the model itself reads captions (model.caption): expected its size")
    if "diffusion" in config:
        _check_diffusion(config.diffusion)
    if "sampling" in config:
        check_sampling(config)
    if "unet" in config.model:
        _check_unet(config.stage, config.model)
    if config.stage == "upsampler":
        m = config.model
        if m.last_step and not config.init.bundle:
            raise UserError("model.last_step is true, but training would leave the second network as it was drawn at "
                            "random: expected false, or converted weights in init.bundle")  # fmt: skip
        smallest = m.factor * 2 ** (len(m.unet.channel_mult) - 1)
        if m.patch > m.image_size or m.patch % smallest:
            raise UserError(f"model.patch is {m.patch}: expected a multiple of {smallest}, at most {m.image_size}")
        if m.caption not in UPSAMPLER_CAPTIONS:
            raise UserError(f"model.caption is {m.caption!r}: an upsampler has {' or '.join(UPSAMPLER_CAPTIONS)}")
        if config.diffusion.drop_caption and m.caption == "none":
            raise UserError("diffusion.drop_caption drops captions, and this upsampler reads none: set it to 0")


@functools.cache
def _needed(stage: str) -> set[str]:
    """Collects the keys that all configs of this package for a stage have; not those of sections that may be None. Of a
    stage of one's own, those that all of them have, but for the model's."""
    configs = [cli.load_config(str(path)) for path in cli.installed_configs().glob("[!_]*.py")]
    keys = [set(flat_keys(config)) for config in configs if config.stage == stage]
    if not keys:
        keys = [{key for key in flat_keys(config) if not key.startswith("model.")} for config in configs]
    return {key for key in set.intersection(*keys) if not key.startswith("model.image.")}


def _check_clip(config: ConfigDict) -> None:
    """Raises UserError for a step of SAM's, a way of resizing or a noise schedule that a CLIP cannot have."""
    m = config.model
    rho, rows, parts = config.optim.sam_rho, config.optim.sam_rows, config.optim.accumulate
    if rho and (rho < 0 or rows < 1 or config.train.batch_size % (rows * max(parts, 1))):
        raise UserError(f"optim.sam_rho={rho}, sam_rows={rows}: expected a positive step and rows that divide "
                        f"train.batch_size={config.train.batch_size} / optim.accumulate={parts}")  # fmt: skip
    if m.image and m.image.timesteps:
        if "noise_schedule" not in m:
            raise UserError(f"model.image.timesteps is {m.image.timesteps}, but there is no model.noise_schedule: use "
                            "configs/clip_noised.py")  # fmt: skip
        try:
            make_schedule(m.noise_schedule, m.image.timesteps)
        except ValueError as error:
            raise UserError(f"model.noise_schedule: {error}") from error


def _check_data(config: ConfigDict, workdir: str) -> None:
    if not config.data.source:
        raise UserError("data.source is empty: name a dataset, such as --config.data.source=folder:/my/pictures")
    if config.data.max_aspect and not config.data.max_aspect >= 1:
        raise UserError(f"data.max_aspect is {config.data.max_aspect}: expected at least 1, or 0 for any")
    if embedded(config) and not config.clip.bundle:
        raise UserError("data.embeddings is set, but not the CLIP that made them: name it in clip.bundle")
    named = config.data.tokenizer if "tokenizer" in config.data else ""
    if named and not to_path(named).exists():
        raise UserError(f"data.tokenizer {named} does not exist: name a sentencepiece model, or leave it empty")
    if config.init.bundle:
        if named:
            raise UserError("data.tokenizer is set, but a model keeps the tokenizer of its init.bundle: leave it empty")
        if same_place(config.init.bundle, to_path(workdir) / "bundle"):
            raise UserError(f"init.bundle {config.init.bundle} is of this same workdir: give the new run another one")
    if named and config.model.get("caption") == "clip":
        raise UserError("data.tokenizer is set, but CLIP reads the captions (model.caption): leave it empty")


def _check_measures(config: ConfigDict) -> None:
    """Raises UserError for metrics that do not exist or that the stage has no pictures for."""
    measures = config.train.measure
    if unknown := [name for name in measures if name not in MEASURES]:
        raise UserError(f"train.measure: there is no metric {unknown[0]!r}: expected some of {', '.join(MEASURES)}")
    if measures and config.stage not in ("decoder", "glide", "upsampler"):
        raise UserError(f"train.measure is {measures}, but a {config.stage} draws no pictures: leave it empty")
    if set(measures) - {"alignment"} and not config.train.inception:
        raise UserError("train.measure needs train.inception: name the folder that `pretrained inception` wrote")


def _check_widths(name: str, section: ConfigDict) -> None:
    """Raises UserError where heads or norm groups do not divide the channels, in a section or those within it.

    name: of the section, for the message.
    """
    if "width" in section and "heads" in section and section.width % section.heads:
        raise UserError(f"{name}.width={section.width} must be a multiple of {name}.heads={section.heads}")
    if "norm_groups" in section:
        for part in ("norm_groups", "head_channels"):
            if section.get(part) and section.channels % section[part]:
                raise UserError(f"{name}.channels={section.channels} must be a multiple of {part}={section[part]}")
    for key, value in section.items():
        if isinstance(value, ConfigDict):
            _check_widths(f"{name}.{key}", value)


def _check_unet(stage: str, m: ConfigDict) -> None:
    """Raises UserError for heads that cannot be, and sizes that neither the levels nor the factor of an upsampler
    divide. m: the section `model`."""
    u, least = m.unet, 2 ** (len(m.unet.channel_mult) - 1)
    attends = u.attention or u.middle_attention
    if attends and not u.head_channels and any(n < 1 or u.channels % n for n in u.heads):
        raise UserError(f"model.unet.head_channels is 0, and model.unet.heads is {u.heads}: expected a number of "
                        f"channels, or two of heads, that divides model.unet.channels={u.channels}")  # fmt: skip
    if m.image_size % least:
        raise UserError(f"model.image_size is {m.image_size}: expected a multiple of {least}, as the "
                        f"{len(u.channel_mult)} levels of model.unet.channel_mult halve it")  # fmt: skip
    factor = m.get("factor", 0)
    if (factor and m.image_size % factor) or (stage == "upsampler" and not factor):
        raise UserError(f"model.factor is {factor}: expected one that divides model.image_size={m.image_size}")
    if factor and "interpolation" not in m:
        raise UserError(f"model.factor is {factor}, but there is no model.interpolation: expected 0, or a config of an "
                        "upsampler, such as configs/glide_upsampler.py")  # fmt: skip


def _check_diffusion(d: ConfigDict) -> None:
    """Raises UserError for a noise schedule or prediction that does not exist. d: the section `diffusion`."""
    try:
        make_schedule(d.schedule, d.timesteps)
    except ValueError as error:
        raise UserError(f"diffusion: {error}") from error
    if d.snr_clip and d.predicts != "x0":
        raise UserError("diffusion.snr_clip weighs errors of x0: set it to () where diffusion.predicts is eps")


def check_sampling(config: ConfigDict) -> None:
    """Raises UserError for steps, a sampler or numbers that do not exist or do not suit the stage, in `sampling`."""
    s = config.sampling
    check_values(ConfigDict({"sampling": s}))
    if "diffusion" not in config:
        return
    try:
        respace(make_schedule(config.diffusion.schedule, config.diffusion.timesteps), respacing(s.sampler, s.steps))
    except ValueError as error:
        raise UserError(f"sampling.steps: {error}") from error
    if s.sampler == "analytic" and config.stage != "prior_diffusion":
        raise UserError(f"sampling.sampler is 'analytic', which {config.stage} does not estimate variances for: "
                        "expected ddpm, ddim or dpm++")  # fmt: skip


def embedded(config: ConfigDict) -> bool:
    """Tells whether CLIP's embeddings are read from data.embeddings, instead of computed in the training step."""
    return "embeddings" in config.data and bool(config.data.embeddings)
