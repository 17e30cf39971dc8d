"""Converts GLIDE's released models (arXiv 2112.10741): base, upsampler, both for inpainting too, and noised CLIP."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from unclip_jax.errors import UserError
from unclip_jax.pretrained import Converted, Options, tokenizers
from unclip_jax.pretrained.adm import unet_config, unet_params
from unclip_jax.pretrained.layers import deinterleaved, dense, final_norm, joined, norm, stacked
from unclip_jax.pretrained.state_dict import StateDict, count_blocks, read_tensors

SUBFOLDERS = {  # file → subfolder of the output
    "base": "decoder",
    "upsample": "upsampler_256",
    "base_inpaint": "inpaint/decoder",
    "upsample_inpaint": "inpaint/upsampler_256",
}
SIDES = {"base": 64, "upsample": 256}  # pixels of the pictures drawn
CHANNELS = {3: "base", 6: "upsample", 7: "base_inpaint", 10: "upsample_inpaint"}  # of the input → file
FINE_TUNED = "glide-ft-"  # begins the names of the checkpoints of github.com/afiaka87/glide-finetune
NOISED_CLIP = ("clip_image_enc", "clip_text_enc")
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
FACTOR = 4


def read_folder(folder: Path, options: Options) -> Iterator[Converted]:
    """Yields those of GLIDE's models that a folder holds, one at a time.

    They are base.pt, upsample.pt, base_inpaint.pt, upsample_inpaint.pt, and clip_image_enc.pt with clip_text_enc.pt; or
    .safetensors of the same names; or, in place of one of the first four, a checkpoint of glide-finetune, such as
    glide-ft-2x1500.pt. GPT-2's vocabulary must be beside the first four, CLIP's beside the last two. Raises UserError
    for files that are missing, damaged or of another model.
    """
    found = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix in (".pt", ".safetensors")}
    for name in [name for name in found if name.startswith(FINE_TUNED)]:
        path = found.pop(name)
        channels = StateDict(read_tensors(path), str(path)).shape("input_blocks.0.0.weight")[1]
        other = found.setdefault(CHANNELS.get(channels, "base"), path)
        if other != path:
            raise UserError(f"{path.name} and {other.name} are the same model of GLIDE: leave one of them in {folder}")
    if not found.keys() & {*SUBFOLDERS, *NOISED_CLIP}:
        raise UserError(f"{folder} holds no model of GLIDE: expected {', '.join(f'{name}.pt' for name in SUBFOLDERS)}")
    if found.keys() & SUBFOLDERS.keys():
        vocabulary = tokenizers.read_gpt2(folder)
    for name in (name for name in SUBFOLDERS if name in found):
        weights = StateDict(read_tensors(found[name]), str(found[name]))
        side = options.image_size or SIDES[name.removesuffix("_inpaint")]
        config, params = convert(weights, side, options.dtype, options.head_channels, text_heads=options.heads)
        yield Converted(SUBFOLDERS[name], config, params, vocabulary)
        del weights, params  # so that only one model is in memory at a time
    if found.keys() & set(NOISED_CLIP):
        vocabulary = tokenizers.read_clip(folder)
        towers = [StateDict(read_tensors(found.get(name, folder / f"{name}.pt")), name) for name in NOISED_CLIP]
        config, params = convert_noised_clip(*towers, options.dtype, options.head_channels)
        yield Converted("noised_clip", config, params, vocabulary)


def convert(
    weights: StateDict,
    image_size: int,
    dtype: str = "float32",
    head_channels: int = 64,
    heads: tuple[int, int] = (1, 1),
    text_heads: int = 0,
) -> tuple[ConfigDict, dict]:
    """Converts one of the four diffusion models; returns config and parameters of the `glide` stage.

    The number of input channels tells which of the four it is. image_size: side in pixels of the pictures drawn.
    head_channels, heads: as in `models.unet.UNet`. text_heads: attention heads of the text path; 0: one for each 64
    channels. No shape tells these. Raises UserError for a state dict that is not such a model.
    """
    channels = weights.shape("input_blocks.0.0.weight")[1]
    upsamples, inpaints = channels in (6, 10), channels in (7, 10)
    unet = unet_config(weights, head_channels, heads, norm_groups=32)
    vocab_size, width = weights.shape("token_embedding.weight")
    text = {
        "vocab_size": vocab_size,
        "context": weights.shape("positional_embedding")[0],
        "width": width,
        "depth": count_blocks(weights, "transformer.resblocks.{}.ln_1.weight"),
        "heads": text_heads or width // 64,
    }
    outputs = weights.shape("out.2.weight")[0]
    params = {
        "conditioner": {
            "text": text_params(weights, text),
            "text_to_emb": dense(weights, "transformer_proj", width, 4 * unet["channels"]),
        },
        "unet": unet_params(weights, unet, channels, outputs, width),
    }
    weights.finish()
    return _config(image_size, dtype, unet, text, upsamples, inpaints, outputs == 6), params


def _config(
    image_size: int, dtype: str, unet: dict, text: dict, upsamples: bool, inpaints: bool, learned_variance: bool
) -> ConfigDict:
    """Makes the config of a diffusion model, with the sampling settings of the release's notebooks."""
    model = {
        "image_size": image_size,
        "factor": FACTOR if upsamples else 0,
        "interpolation": "bilinear",
        "round_low_res": True,
        "inpaint": inpaints,
        "unet": unet,
        "text": text,
    }
    diffusion = {
        "schedule": "linear" if upsamples else "cosine",
        "timesteps": 1000,
        "predicts": "eps",
        "learned_variance": learned_variance,
        "snr_clip": (),
        "drop_caption": 0.2,
    }
    sampling = {"eta": 0.0, "clip_x0": 1.0}
    if upsamples:
        sampling |= {"sampler": "ddim", "steps": "fast27", "temperature": 0.997}
    else:
        guidance_scale = 5.0 if inpaints else 3.0
        sampling |= {"sampler": "ddpm", "steps": "100", "temperature": 1.0, "guidance_scale": guidance_scale}
    sections = {"model": model, "diffusion": diffusion, "sampling": sampling}
    return ConfigDict({"stage": "glide", "dtype": dtype, **sections})


def text_params(weights: StateDict, text: dict) -> dict:
    """Converts the text path: the parameters of `models.transformer.TextTransformer`. text: its config."""
    width, context = text["width"], text["context"]
    return {
        "tokens": {"embedding": weights.take("token_embedding.weight", text["vocab_size"], width)},
        "positions": weights.take("positional_embedding", context, width),
        "padding": weights.take("padding_embedding", context, width),
        "transformer": transformer_params(weights, "transformer.resblocks", text["depth"], width, text["heads"]),
        "norm": final_norm(weights, width),
    }


def transformer_params(weights: StateDict, name: str, depth: int, width: int, heads: int) -> dict:
    """Converts the blocks of a transformer of GLIDE or Karlo: the parameters of `models.transformer.Transformer`.

    name: of the list of blocks in the state dict. depth: number of blocks. Raises UserError for heads that do not
    divide the width.
    """
    if not heads or width % heads:
        raise UserError(f"{heads} attention heads do not fit a transformer of {width} channels: give theirs by --heads")

    def block(n: int) -> dict:
        here = f"{name}.{n}"
        return {
            "norm_1": norm(weights, f"{here}.ln_1", width),
            "qkv": deinterleaved(dense(weights, f"{here}.attn.c_qkv", width, 3 * width), heads, 3),
            "out": dense(weights, f"{here}.attn.c_proj", width, width),
            "norm_2": norm(weights, f"{here}.ln_2", width),
            "mlp_in": dense(weights, f"{here}.mlp.c_fc", width, 4 * width),
            "mlp_out": dense(weights, f"{here}.mlp.c_proj", 4 * width, width),
        }

    return stacked(block, depth)


def convert_noised_clip(
    image: StateDict, text: StateDict, dtype: str = "float32", head_channels: int = 64, scale: float = 100.0
) -> tuple[ConfigDict, dict]:
    """Converts the noised CLIP; returns config and parameters of a `clip` stage that takes timesteps.

    image, text: its two towers. head_channels: of both towers' attention. scale: of the dot products of embeddings,
    which the release fixes at 100. Raises UserError for state dicts that are not such a model.
    """
    steps, width = image.shape("blocks.input.w_t")
    patch, places = image.shape("blocks.input.patch_proj")[-1], image.shape("blocks.input.w_pos")[0]
    rows, text_width = text.shape("blocks.input.w_voc")
    context, dim = text.shape("blocks.input.w_pos")[0], image.shape("blocks.output.f.w")[0]
    towers = {
        "image": {"patch": patch, "timesteps": steps} | _sizes(image, width, head_channels),
        "text": {"vocab_size": rows, "context": context} | _sizes(text, text_width, head_channels),
    }
    params = {
        "image": {
            "timesteps": image.take("blocks.input.w_t", steps, width),
            "patch": {"kernel": image.take("blocks.input.patch_proj", width, 3, patch, patch).transpose(2, 3, 1, 0)},
            "positions": image.take("blocks.input.w_pos", places, width),
            "norm_in": _norm(image, "blocks.input.ln", width),
            **_tower(image, towers["image"], dim, "norm_out"),
        },
        "text": {
            "tokens": {"embedding": text.take("blocks.input.w_voc", rows, text_width)},
            "positions": text.take("blocks.input.w_pos", context, text_width),
            **_tower(text, towers["text"], dim, "norm"),
        },
        "logit_scale": np.float32(math.log(scale)),
    }
    image.finish()
    text.finish()
    model = {
        "image_size": patch * math.isqrt(places - 1),
        "dim": dim,
        **towers,
        "activation": "gelu",
        "initial_scale": scale,
        "max_scale": scale,
        "mean": MEAN,
        "std": STD,
        "resize": "bicubic",
        "unit_norm": True,
        "remat": False,
    }
    diffusion = {"schedule": "cosine", "timesteps": steps}
    return ConfigDict({"stage": "clip", "dtype": dtype, "model": model, "diffusion": diffusion}), params


def _sizes(weights: StateDict, width: int, head_channels: int) -> dict:
    blocks = count_blocks(weights, "blocks.block_{}.f_attn.ln.g")
    return {"width": width, "depth": blocks, "heads": width // head_channels}


def _tower(weights: StateDict, tower: dict, dim: int, last_norm: str) -> dict:
    """Converts blocks, last norm and projection of either tower of the noised CLIP.

    tower: its config. dim: numbers of an embedding. last_norm: name of the last norm in this library.
    """
    width = tower["width"]

    def block(n: int) -> dict:
        attention, mlp = f"blocks.block_{n}.f_attn", f"blocks.block_{n}.f_mlp"
        # The release's keys have no bias. A bias would move all logits of a query alike, so zero is the same as none.
        key = _linear(weights, f"{attention}.f_k", width, width) | {"bias": np.zeros(width, np.float32)}
        query, value = (_linear(weights, f"{attention}.f_{part}", width, width, bias=True) for part in "qv")
        return {
            "norm_1": _norm(weights, f"{attention}.ln", width),
            "qkv": joined(query, key, value),
            "out": _linear(weights, f"{attention}.f_c", width, width, bias=True),
            "norm_2": _norm(weights, f"{mlp}.ln", width),
            "mlp_in": _linear(weights, f"{mlp}.f_1", width, 4 * width, bias=True),
            "mlp_out": _linear(weights, f"{mlp}.f_2", 4 * width, width, bias=True),
        }

    return {
        "transformer": stacked(block, tower["depth"]),
        last_norm: _norm(weights, "blocks.output.ln", width),
        "projection": _linear(weights, "blocks.output.f", width, dim),
    }


def _norm(weights: StateDict, name: str, width: int) -> dict:
    return {"scale": weights.take(f"{name}.g", width), "bias": weights.take(f"{name}.b", width)}


def _linear(weights: StateDict, name: str, inputs: int, outputs: int, bias: bool = False) -> dict:
    params = {"kernel": weights.take(f"{name}.w", outputs, inputs).T}
    return params | {"bias": weights.take(f"{name}.b", outputs)} if bias else params
