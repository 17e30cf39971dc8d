"""Values that each key of a config may have: types, ranges and sets, checked before anything is loaded.

What keys mean is said in config.py. How they must fit each other is checked in config_checks.py.
"""

import difflib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from unclip_jax.config import flat_items
from unclip_jax.errors import UserError


class Rule(NamedTuple):
    """Values of a key: whether one is allowed, in words what is expected, and whether it is a real number."""

    allows: Callable[[Any], bool]
    expected: str
    real: bool = False


def _whole(low: int, high: int) -> Rule:
    return Rule(
        lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high,
        f"a whole number from {low:,} to {high:,}",
    )


def _number(low: float, high: float, below: bool = False) -> Rule:
    """A finite number; below: `high` itself is not allowed."""

    def allows(value: Any) -> bool:
        known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return known and low <= value <= high and not (below and value == high)

    return Rule(allows, f"a number from {low:,} to {'below ' if below else ''}{high:,}", real=True)


def _one_of(*words: str) -> Rule:
    return Rule(lambda value: isinstance(value, str) and value in words, f"one of {', '.join(words)}")


def _some(rule: Rule, least: int, most: int) -> Rule:
    """A tuple of values."""
    many = f"{least}" if least == most else f"{least} to {most}"
    return Rule(
        lambda value: isinstance(value, tuple) and least <= len(value) <= most and all(map(rule.allows, value)),
        f"a tuple of {many} values, each {rule.expected}",
    )


def _or_empty(rule: Rule) -> Rule:
    return Rule(lambda value: value == () or rule.allows(value), f"() or {rule.expected}")


SAMPLERS = ("ddpm", "ddim", "dpm++", "analytic")

_text = Rule(lambda value: isinstance(value, str) and "\0" not in value and len(value) <= 4096, "a text")
_flag = Rule(lambda value: isinstance(value, bool), "True or False")
_share = _number(0, 1)
_size = _whole(1, 2**16)
_steps = _whole(1, 10**10)
_count = _whole(1, 2**24)
_row = Rule(
    lambda row: isinstance(row, tuple) and len(row) == 3 and all(map(_number(-1e30, 1e30).allows, row)),
    "(step, low, high)",
)

# By the key with its section, or for keys that several sections have by the name alone.
RULES = {
    "stage": _text,
    "dtype": _one_of("bfloat16", "float32"),
    "width": _size, "depth": _whole(1, 1000), "context": _whole(1, 2**17), "vocab_size": _whole(4, 2**24),
    "heads": _whole(1, 1024), "remat": _flag, "bundle": _text, "drop_text": _share, "drop_caption": _share,
    "patch": _size, "timesteps": _whole(0, 10**6),
    "model.vocab_size": _whole(0, 2**24),  # 0: no vocabulary of its own
    "mlp_width": _size,  # of converted CLIPs
    "model.image_size": _whole(1, 2**14), "model.dim": _size, "model.activation": _one_of("gelu", "quick_gelu"),
    "model.initial_scale": _number(1e-6, 1e6), "model.max_scale": _number(1e-6, 1e6),
    "model.mean": _some(_share, 3, 3), "model.std": _some(_number(1e-6, 1), 3, 3),
    "model.resize": _one_of("area", "bicubic"), "model.unit_norm": _flag,
    "model.noise_schedule": _one_of("cosine", "linear"),
    "model.embedding_dim": _size, "model.embedding": _one_of("image", "text"), "model.image_tokens": _whole(0, 1024),
    "model.caption": _one_of("own", "clip", "none"), "model.learned_null": _flag, "model.factor": _whole(0, 64),
    "model.inpaint": _flag, "model.interpolation": _one_of("bicubic", "bilinear", "antialiased_bicubic"),
    "model.round_low_res": _flag, "model.num_codes": _size, "model.num_buckets": _whole(2, 2**16),
    "model.num_dot_buckets": _whole(1, 2**16), "model.last_step": _flag,
    "model.image": Rule(lambda value: value is None, "None, or a section"),
    "model.unet.channels": _size, "model.unet.channel_mult": _some(_whole(1, 64), 1, 12),
    "model.unet.res_blocks": _whole(1, 64), "model.unet.attention": _some(_whole(1, 2**11), 0, 12),
    "model.unet.middle_attention": _flag, "model.unet.head_channels": _whole(0, 2**14),
    "model.unet.heads": _some(_whole(0, 1024), 2, 2), "model.unet.norm_groups": _whole(1, 2**14),
    "model.unet.scale_shift": _flag, "model.unet.resample_blocks": _flag,
    "model.unet.dropout": _number(0, 1, below=True),
    "init.model": _flag, "clip.config": _text,
    "prior.batches": _count, "prior.outside": _number(0, 0.4),
    "diffusion.schedule": _one_of("cosine", "linear"), "diffusion.timesteps": _whole(1, 10**6),
    "diffusion.predicts": _one_of("eps", "x0"), "diffusion.learned_variance": _flag,
    "diffusion.snr_clip": _or_empty(_some(_number(0, 1e30), 2, 2)), "diffusion.drop_embedding": _share,
    "diffusion.embedding_scale": _number(1e-6, 1e6), "diffusion.whiten": _flag,
    "diffusion.degradation": _one_of("none", "blur", "bsr"), "diffusion.blur_probability": _share,
    "diffusion.blur_sigma": _number(1e-3, 100),
    "sampling.sampler": _one_of(*SAMPLERS), "sampling.steps": _text, "sampling.eta": _share,
    "sampling.clip_x0": _number(0, 1e6), "sampling.temperature": _number(0, 1e3),
    "sampling.guidance_scale": _number(-1e3, 1e3), "sampling.draws": _whole(1, 1024),
    "sampling.dot_percentile": _number(0, 100),
    "data.source": _text, "data.data_dir": _text, "data.split": _text, "data.eval_split": _text,
    "data.image_feature": _text, "data.caption_feature": _text, "data.tokenizer": _text, "data.embeddings": _text,
    "data.min_side": _whole(0, 2**16), "data.max_aspect": _number(0, 1e6), "data.crop": _one_of("center", "dalle"),
    "data.threads": _whole(1, 1024), "data.weights": _some(_number(1e-9, 1e12), 0, 100),
    "data.workers": _whole(0, 1024),
    "optim.learning_rate": _number(0, 1e3), "optim.warmup_steps": _whole(0, 10**10),
    "optim.schedule": _one_of("constant", "cosine", "linear"), "optim.b1": _number(0, 1, below=True),
    "optim.b2": _number(0, 1, below=True), "optim.eps": _number(1e-30, 1), "optim.weight_decay": _number(0, 1e3),
    "optim.clip_norm": _number(0, 1e30), "optim.ema_decay": _number(0, 1, below=True), "optim.accumulate": _count,
    "optim.frozen": _some(_text, 0, 10**4), "optim.lora_rank": _whole(0, 2**14), "optim.sam_rho": _number(0, 1e3),
    "optim.sam_rows": _count,
    "train.steps": _steps, "train.batch_size": _count, "train.seed": _whole(0, 2**32 - 1), "train.log_every": _steps,
    "train.checkpoint_every": _steps, "train.checkpoint_minutes": _number(0, 1e6), "train.sample_every": _steps,
    "train.eval_size": _count, "train.draw_size": _count, "train.measure": _some(_text, 0, 100),
    "train.inception": _text, "train.reference": _text, "train.keep": _whole(2, 10**6),
    "train.keep_every": _whole(0, 10**10), "train.max_skips": _steps, "train.watchdog_minutes": _number(0, 1e5),
    "train.expected_loss": _some(_row, 0, 10**4),
    "mesh.data": _whole(-1, 2**20), "mesh.fsdp": _whole(1, 2**20),
}  # fmt: skip


def check_values(config: ConfigDict) -> None:
    """Raises UserError for the first key whose value is of another type, or outside of its range or set, and for a key
    that no config has."""
    for key, value in flat_items(config):
        rule = _rule(key)
        if rule is None:
            nearest = difflib.get_close_matches(key, RULES, 1, 0)[0]
            raise UserError(f"no config has a key {key}: the nearest is {nearest}")
        if not rule.allows(value):
            raise UserError(f"{key} is {_short(value)}: expected {rule.expected}")


def with_floats(config: ConfigDict) -> ConfigDict:
    """Makes floats of the whole numbers that keys of real numbers hold, as people write them; locks the config."""
    with config.unlocked():
        for key, value in list(flat_items(config)):
            rule = _rule(key)
            if rule and rule.real and type(value) is int:
                section, _, name = key.rpartition(".")
                node = get(config, section)
                with node.ignore_type():
                    node[name] = float(value)
    return config.lock()


def _rule(key: str) -> Rule | None:
    return RULES.get(key) or RULES.get(key.rpartition(".")[2])


def get(config: ConfigDict, key: str) -> Any:
    """Value of a key with its sections, such as "model.unet.channels"; of "" the whole."""
    for name in filter(None, key.split(".")):
        config = config[name]
    return config


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
