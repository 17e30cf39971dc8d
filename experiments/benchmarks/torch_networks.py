"""The networks of Karlo and CLIP in PyTorch, and ours with the same weights, on the same inputs."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import torch
from diffusers import PriorTransformer, UNet2DConditionModel, UNet2DModel
from transformers import CLIPConfig, CLIPModel

from unclip_jax.models.prior_diffusion import DiffusionPrior
from unclip_jax.models.unet import UNet
from unclip_jax.pretrained import karlo_stages, openai_clip
from unclip_jax.pretrained.adm import unet_config, unet_params
from unclip_jax.pretrained.diffusers_names import RenamedStateDict, prior_names, unet_names
from unclip_jax.pretrained.state_dict import StateDict
from unclip_jax.stages import make_stage

# "full": as released (Karlo, and CLIP ViT-L/14); "reduced": the same structure, for two CPU cores.
SIZES = {
    "prior": {
        "full": dict(heads=32, layers=20, dim=768, states=768, context=77, batch=64),
        "reduced": dict(heads=8, layers=10, dim=768, states=768, context=77, batch=8),
        "tiny": dict(heads=1, layers=1, dim=16, states=16, context=9, batch=2),
    },
    "decoder": {
        "full": dict(channels=320, mult=(1, 2, 3, 4), layers=3, side=64, cross=2048, context=87, batch=16),
        "reduced": dict(channels=64, mult=(1, 2, 3, 4), layers=3, side=64, cross=512, context=87, batch=8),
        "tiny": dict(channels=32, mult=(1, 2), layers=1, side=8, cross=16, context=9, batch=2),
    },
    "super_res": {
        "full": dict(channels=320, mult=(1, 2, 3, 4), layers=3, side=256, batch=4),
        "reduced": dict(channels=64, mult=(1, 2, 3, 4), layers=3, side=128, batch=4),
        "tiny": dict(channels=32, mult=(1, 2), layers=1, side=16, batch=2),
    },
    "clip": {
        "full": dict(image=(1024, 24, 16, 14, 224), text=(768, 12, 12), dim=768, context=77, batch=64),
        "reduced": dict(image=(768, 12, 12, 32, 224), text=(512, 12, 8), dim=512, context=77, batch=4),
        "tiny": dict(image=(16, 1, 2, 8, 16), text=(16, 1, 2), dim=16, context=9, batch=2),
    },
}
HEAD_CHANNELS = 64  # of every attention but the tiny ones'


class Pair(NamedTuple):
    """One network twice. Inputs by name; pictures are (B, H, W, C) for ours and (B, C, H, W) for theirs."""

    module: torch.nn.Module
    theirs: Callable[[torch.nn.Module, dict], torch.Tensor]  # (module, inputs) → output
    ours: Callable[[Any, dict], Any]  # (params, inputs) → output
    params: Any
    inputs: dict[str, np.ndarray]
    shape: dict[str, Any]  # what of SIZES it is


def pair(name: str, size: str, batch: int | None, dtype: str, seed: int) -> Pair:
    """batch: None is that of SIZES. dtype: of ours."""
    shape = SIZES[name][size] | ({"batch": batch} if batch else {})
    torch.manual_seed(seed)
    made = {"prior": _prior, "decoder": _decoder, "super_res": _super_res, "clip": _clip}[name]
    return Pair(*made(shape, dtype, np.random.default_rng(seed)), shape)


def for_torch(array: np.ndarray, device: str, channels_last: bool) -> torch.Tensor:
    """Pictures with their channels in front, integers as its embeddings want them."""
    if array.ndim == 4:
        tensor = torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 1)))
        return tensor.to(device, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    return torch.from_numpy(array.astype(np.int64) if array.dtype == np.int32 else array).to(device)


def _randomized(module: torch.nn.Module) -> torch.nn.Module:
    """Layers that start at zero would hide what is behind them."""
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim > 1 and not p.any():
                p.normal_(0, p[0].numel() ** -0.5)
    return module.eval()


def _normal(rng, *shape):
    return rng.standard_normal(shape, np.float32)


def _prior(s, dtype, rng):
    head_channels = min(HEAD_CHANNELS, s["dim"])
    module = _randomized(PriorTransformer(
        num_attention_heads=s["heads"], attention_head_dim=head_channels, num_layers=s["layers"],
        embedding_dim=s["dim"], num_embeddings=s["context"]))  # fmt: skip
    weights = RenamedStateDict(module.state_dict(), "PriorTransformer", prior_names, head_channels)
    mean, std = (weights.take(name, 1, s["dim"])[0] for name in ("clip_mean", "clip_std"))
    config, params = karlo_stages.convert_prior(weights, mean, std, dtype, s["heads"])
    params = {name: value for name, value in params.items() if not name.startswith("embedding_")}
    network = DiffusionPrior(**config.model, dtype=jnp.dtype(dtype))
    rows = s["batch"]
    inputs = {
        "x": _normal(rng, rows, s["dim"]),
        "t": rng.integers(0, 1000, rows, np.int32),
        "text_embedding": _normal(rng, rows, s["dim"]),
        "states": _normal(rng, rows, s["context"], s["states"]),
        "length": rng.integers(2, s["context"] + 1, rows, np.int32),
    }

    def theirs(module, i):
        mask = torch.arange(s["context"], device=i["length"].device) < i["length"][:, None]
        return module(i["x"], i["t"], i["text_embedding"], i["states"], mask).predicted_image_embedding

    def ours(params, i):
        return network.apply({"params": params}, i["x"], i["t"], i["states"], i["length"], i["text_embedding"])

    return module, theirs, ours, params, inputs


def _unet(module, s, attends, channels, dtype, head_channels=1, context_width=0):
    """Ours, and its parameters."""
    conditional = context_width > 0
    names = unet_names(s["layers"], attends, conditional)
    weights = RenamedStateDict(module.state_dict(), type(module).__name__, names, head_channels)
    config = unet_config(weights, head_channels, (1, 1), norm_groups=32)
    params = unet_params(weights, config, channels, module.config.out_channels, context_width)
    weights.finish()
    return UNet(**config, out_channels=module.config.out_channels, dtype=jnp.dtype(dtype)), params


def _blocks(s, attends):
    kinds = {False: ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"),
             True: ("SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D")}  # fmt: skip
    return {
        "block_out_channels": tuple(s["channels"] * m for m in s["mult"]),
        "layers_per_block": s["layers"],
        "down_block_types": tuple(kinds[a][0] for a in attends),
        "up_block_types": tuple(kinds[a][1] for a in reversed(attends)),
        "norm_num_groups": 32,
        "resnet_time_scale_shift": "scale_shift",
        "sample_size": s["side"],
    }


def _decoder(s, dtype, rng):
    head_channels = min(HEAD_CHANNELS, s["channels"])
    attends = (False, *[True] * (len(s["mult"]) - 1))
    module = _randomized(UNet2DConditionModel(
        in_channels=3, out_channels=6, class_embed_type="identity", cross_attention_dim=s["cross"],
        attention_head_dim=head_channels, mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        only_cross_attention=False, **_blocks(s, attends)))  # fmt: skip
    network, params = _unet(module, s, attends, 3, dtype, head_channels, s["cross"])
    rows = s["batch"]
    inputs = {
        "x": _normal(rng, rows, s["side"], s["side"], 3),
        "t": rng.integers(0, 1000, rows, np.int32),
        "emb": _normal(rng, rows, 4 * s["channels"]),
        "context": _normal(rng, rows, s["context"], s["cross"]),
        "mask": np.arange(s["context"])[None] < rng.integers(2, s["context"] + 1, rows)[:, None],
    }

    def theirs(module, i):
        return module(i["x"], i["t"], i["context"], class_labels=i["emb"], attention_mask=i["mask"]).sample

    def ours(params, i):
        return network.apply({"params": params}, i["x"], i["t"], i["emb"], i["context"], i["mask"])

    return module, theirs, ours, params, inputs


def _super_res(s, dtype, rng):
    attends = (False,) * len(s["mult"])
    module = _randomized(UNet2DModel(in_channels=6, out_channels=3, add_attention=False, **_blocks(s, attends)))
    network, params = _unet(module, s, attends, 6, dtype)
    inputs = {"x": _normal(rng, s["batch"], s["side"], s["side"], 6), "t": rng.integers(0, 1000, s["batch"], np.int32)}

    def theirs(module, i):
        return module(i["x"], i["t"]).sample

    return module, theirs, lambda params, i: network.apply({"params": params}, i["x"], i["t"]), params, inputs


def _clip(s, dtype, rng):
    """Unit embeddings of pictures and captions, one below the other."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size")
    vision = dict(zip(names, s["image"], strict=True), intermediate_size=4 * s["image"][0])
    text = dict(zip(names[:3], s["text"], strict=True), intermediate_size=4 * s["text"][0])
    text |= {"max_position_embeddings": s["context"], "vocab_size": 49408, "eos_token_id": 49407}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=s["dim"])
    module = _randomized(CLIPModel(config))
    weights = StateDict(module.state_dict(), "CLIPModel")
    config, params = openai_clip.convert_huggingface(weights, json.loads(config.to_json_string(False)), {}, dtype)
    stage = make_stage(config)
    rows, side = s["batch"], s["image"][-1]
    tokens = rng.integers(1, 49406, (rows, s["context"]), np.int32)
    lengths = rng.integers(2, s["context"] + 1, rows, np.int32)
    tokens = np.where(np.arange(s["context"])[None] >= lengths[:, None] - 1, 49407, tokens).astype(np.int32)
    images = rng.integers(0, 256, (rows, side, side, 3)).astype(np.uint8)

    statistics = openai_clip.MEAN, openai_clip.STD

    def theirs(module, i):
        mean, std = (torch.tensor(v, device=i["tokens"].device)[:, None, None] for v in statistics)
        pixels = (i["images"] / 255 - mean) / std
        found = module(input_ids=i["tokens"], pixel_values=pixels)
        return torch.cat([found.image_embeds, found.text_embeds])

    def ours(params, i):
        images, texts = stage.embed_images(params, i["images"]), stage.embed_texts(params, i["tokens"], i["length"])
        return jnp.concatenate([images, texts])

    return module, theirs, ours, params, {"images": images, "tokens": tokens, "length": lengths}
