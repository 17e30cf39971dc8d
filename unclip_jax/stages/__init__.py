"""Every kind of trained model: one file each, found by the name that configs give in `stage`."""

from ml_collections import ConfigDict

from unclip_jax.errors import UserError
from unclip_jax.stages.base import ClipTowers, Stage
from unclip_jax.stages.clip import Clip
from unclip_jax.stages.decoder import Decoder
from unclip_jax.stages.glide import Glide
from unclip_jax.stages.prior_ar import PriorAR
from unclip_jax.stages.prior_diffusion import PriorDiffusion
from unclip_jax.stages.upsampler import Upsampler

STAGES = {
    "clip": Clip,
    "prior_diffusion": PriorDiffusion,
    "prior_ar": PriorAR,
    "decoder": Decoder,
    "upsampler": Upsampler,
    "glide": Glide,
}


def make_stage(config: ConfigDict, clip: ClipTowers | None = None, embedded: bool = False) -> Stage:
    """Builds the stage that `config.stage` names; `clip` for those in a CLIP's space, `embedded` as in `Stage`.

    Raises UserError for an unknown stage and for an embedding size that is not the CLIP's.
    """
    if config.stage not in STAGES:
        raise UserError(f"stage {config.stage!r} does not exist: expected one of {', '.join(STAGES)}")
    stage = STAGES[config.stage]
    if not stage.needs_clip:
        return stage(config)
    dim = config.model.embedding_dim
    if clip is not None and clip.dim != dim:
        raise UserError(f"the config expects embeddings of {dim} numbers, but its CLIP makes {clip.dim}: set the same")
    return stage(config, clip, embedded)
