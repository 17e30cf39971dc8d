"""The trained model that a run starts from, `init.bundle`: loaded, and checked against the run's config."""

import functools
from typing import Any

import jax
from ml_collections import ConfigDict

from unclip_jax.bundle import Bundle, check_params, load_bundle
from unclip_jax.config import flat_keys
from unclip_jax.errors import UserError
from unclip_jax.stages import Stage

# Keys of the sections `model` and `diffusion` that say how a model is trained or drawn from, not which model it is.
FREE = {"remat", "dropout", "initial_scale", "max_scale", "resize", "round_low_res", "snr_clip", "degradation"}
FREE |= {"drop_text", "drop_caption", "drop_embedding", "blur_probability", "blur_sigma"}
FREE |= {"model.patch"}  # of an upsampler's training, not of a vision transformer


def load_origin(config: ConfigDict, stage: Stage, clip_identity: str) -> Bundle | None:
    """Loads the model that `config.init.bundle` names, its parameters adapted to the stage; None: from scratch.

    clip_identity: of the run's CLIP. Raises UserError where the bundle holds a model of another kind, size or CLIP.
    """
    folder = config.init.bundle
    if not folder:
        if config.optim.lora_rank:
            raise UserError("optim.lora_rank changes a trained model: name it in init.bundle")
        return None
    bundle = load_bundle(folder)
    if bundle.stage != config.stage:
        raise UserError(f"init.bundle {folder} holds a model of stage {bundle.stage!r}, not {config.stage!r}")
    if bundle.clip_identity and bundle.clip_identity != clip_identity:
        raise UserError(f"init.bundle {folder} was trained against another CLIP than clip.bundle: name that one")
    if bundle.stage == "clip" and not bundle.config.model.image:
        raise UserError(f"init.bundle {folder} is a text tower alone, which cannot be trained: give a whole CLIP")
    for name in ("model", "diffusion"):
        if name in config:
            _compare(config, bundle.config, name, {*FREE, *stage.adapts}, folder)
    params = stage.adapt_params(bundle.params, bundle.config)
    check_params(params, jax.eval_shape(stage.init, jax.random.key(0)))
    return bundle._replace(params=params)


def _compare(config: ConfigDict, bundle: ConfigDict, section: str, free: set[str], folder: str) -> None:
    """Raises UserError for the first key of a section whose value is not the bundle's. free: names that may differ,
    alone or with their sections."""
    here, there = ({key: _value(c, key) for key in flat_keys(c[section], f"{section}.")} for c in (config, bundle))
    for key in here | there:
        if here.get(key, ()) != there.get(key, ()) and not {key, key.rpartition(".")[2]} & free:
            said, found = (values.get(key, "not there") for values in (here, there))
            raise UserError(
                f"{key} is {said} in the config, {found} in init.bundle {folder}: change it, or take over the model as "
                "it is by --config.init.model=True"
            )


def _value(config: ConfigDict, key: str) -> Any:
    return functools.reduce(lambda part, name: part[name], key.split("."), config)
