"""Karlo's prior, decoder and upsampler as stages: their configs and parameters from tensors by Karlo's own names.

`karlo` reads those names from the repository's own files, `diffusers_unclip` from the folder that diffusers publishes.
"""

import numpy as np
from ml_collections import ConfigDict

from unclip_jax.pretrained.adm import unet_config, unet_params
from unclip_jax.pretrained.glide import transformer_params
from unclip_jax.pretrained.layers import dense, final_norm, norm
from unclip_jax.pretrained.state_dict import StateDict, count_blocks


def convert_prior(
    weights: StateDict, mean: np.ndarray, std: np.ndarray, dtype: str = "float32", heads: int = 32
) -> tuple[ConfigDict, dict]:
    """Converts the prior; returns config and parameters of the `prior_diffusion` stage.

    mean, std: (dim,), of CLIP's image embeddings. heads: of its attention, which no shape tells. Raises UserError for
    a state dict that is not such a model.
    """
    width, dim = weights.shape("clip_img_proj.weight")
    places = weights.shape("positional_embedding")[1]
    states = weights.shape("text_enc_proj.weight")[1]
    layers = count_blocks(weights, "transformer.resblocks.{}.ln_1.weight")
    params = {
        "caption": dense(weights, "text_enc_proj", states, width),
        "text_embedding": dense(weights, "text_emb_proj", dim, width),
        "time": {name: dense(weights, f"time_embed.{n}", width, width) for name, n in (("in", 0), ("out", 2))},
        "noised_embedding": dense(weights, "clip_img_proj", dim, width),
        "query": weights.take("prd_emb", 1, 1, width)[0, 0],
        "positions": weights.take("positional_embedding", 1, places, width)[0],
        "transformer": transformer_params(weights, "transformer.resblocks", layers, width, heads),
        "norm": final_norm(weights, width),
        "out": dense(weights, "out_proj", width, dim),
        "embedding_mean": np.asarray(mean, np.float32),
        "embedding_std": np.asarray(std, np.float32),
    }
    weights.finish()
    config = ConfigDict({
        "stage": "prior_diffusion",
        "dtype": dtype,
        "model": {
            "embedding_dim": dim,
            "caption": "clip",
            "vocab_size": 0,
            "context": places - 4,
            "width": width,
            "depth": layers,
            "heads": heads,
            "remat": False,
        },
        "diffusion": {
            "schedule": "cosine",
            "timesteps": 1000,
            "predicts": "x0",
            "learned_variance": False,
            "snr_clip": (),
            "embedding_scale": 1.0,
            "whiten": True,
            "drop_text": 0.2,
        },
        "sampling": {
            "sampler": "ddpm",
            "steps": "25",
            "eta": 0.0,
            "guidance_scale": 4.0,
            "clip_x0": 10.0,  # Karlo's
            "temperature": 1.0,
            "draws": 1,
        },
    })  # fmt: skip
    return config, params


def convert_decoder(
    weights: StateDict,
    image_size: int = 64,
    dtype: str = "float32",
    head_channels: int = 64,
    heads: tuple[int, int] = (1, 1),
) -> tuple[ConfigDict, dict]:
    """Converts the decoder; returns config and parameters of the `decoder` stage, whose captions CLIP reads.

    image_size: side in pixels of the pictures drawn. head_channels, heads: as in `models.unet.UNet`, where no shape
    tells them. Raises UserError for a state dict that is not such a model.
    """
    unet = unet_config(weights, head_channels, heads, norm_groups=32)
    dim, width = weights.shape("clip_emb.weight")[1], weights.shape("text_seq_proj.0.weight")[0]
    tokens = weights.shape("clip_tok_proj.weight")[0] // width if "clip_tok_proj.weight" in weights else 0
    channels, outputs = weights.shape("input_blocks.0.0.weight")[1], weights.shape("out.2.weight")[0]
    conditioner = _conditioner(weights, tokens)
    params = {"conditioner": conditioner, "unet": unet_params(weights, unet, channels, outputs, width)}
    weights.finish()
    config = ConfigDict({
        "stage": "decoder",
        "dtype": dtype,
        "model": {
            "image_size": image_size,
            "embedding_dim": dim,
            "embedding": "image",
            "image_tokens": tokens,
            "caption": "clip",
            "learned_null": "null_embedding" in conditioner,
            "unet": unet,
            "text": {"width": width},
        },
        "diffusion": {
            "schedule": "cosine",
            "timesteps": 1000,
            "predicts": "eps",
            "learned_variance": outputs == 2 * channels,
            "snr_clip": (),
            "drop_embedding": 0.1,
            "drop_caption": 0.3,
        },
        "sampling": {
            "sampler": "ddpm",
            "steps": "50",
            "eta": 0.0,
            "guidance_scale": 8.0,
            "clip_x0": 1.0,
            "temperature": 1.0,
        },
    })  # fmt: skip
    return config, params


def _conditioner(weights: StateDict, tokens: int) -> dict:
    """Converts the decoder's conditioner. tokens: number of tokens that it makes of an image embedding; 0: none."""
    emb, dim = weights.shape("clip_emb.weight")
    width, states = weights.shape("text_seq_proj.0.weight")
    # This library's conditioner multiplies embeddings by sqrt(dim), Karlo's does not.
    conditioner = {
        "text_states": dense(weights, "text_seq_proj.0", states, width),
        "text_norm": norm(weights, "text_seq_proj.1", width),
        "text_to_emb": dense(weights, "text_feat_proj", dim, emb),
        "image_to_emb": _unscaled(dense(weights, "clip_emb", dim, emb)),
    }
    if tokens:
        projection = dense(weights, "clip_tok_proj", dim, width * tokens)
        conditioner["image_to_tokens"] = _unscaled(_by_token(projection, tokens))
    if "cf_param" in weights:
        conditioner["null_embedding"] = weights.take("cf_param", dim) * np.float32(dim**0.5)
    return conditioner


def convert_upsampler(
    first: StateDict, last: StateDict | None, image_size: int = 256, dtype: str = "float32"
) -> tuple[ConfigDict, dict]:
    """Converts the upsampler; returns config and parameters of the `upsampler` stage.

    first: the network of all steps but the last one. last: the network of the last step; None: `first` makes all steps.
    image_size: side in pixels of the pictures drawn. Raises UserError for state dicts that are not such models.
    """
    unet = unet_config(first, head_channels=0, heads=(1, 1), norm_groups=32)
    channels, outputs = first.shape("input_blocks.0.0.weight")[1], first.shape("out.2.weight")[0]
    networks = [first] if last is None else [first, last]
    params = []
    for weights in networks:
        params.append(unet_params(weights, unet, channels, outputs, 0))
        weights.finish()
    config = ConfigDict({
        "stage": "upsampler",
        "dtype": dtype,
        "model": {
            "image_size": image_size,
            "factor": 4,
            "patch": image_size // 4,
            "interpolation": "antialiased_bicubic",
            "round_low_res": False,
            "caption": "none",
            "last_step": last is not None,
            "unet": unet,
        },
        "diffusion": {
            "schedule": "cosine",
            "timesteps": 1000,
            "predicts": "eps",
            "learned_variance": outputs == channels,
            "snr_clip": (),
            "drop_caption": 0.0,
            "degradation": "blur",
            "blur_probability": 0.5,
            "blur_sigma": 0.6,
        },
        "sampling": {
            "sampler": "ddpm",
            "steps": "7",
            "eta": 0.0,
            "guidance_scale": 1.0,
            "clip_x0": 1.0,
            "temperature": 1.0,
        },
    })  # fmt: skip
    return config, params[0] if last is None else dict(zip(("first", "last"), params, strict=True))


def _unscaled(projection: dict) -> dict:
    """Divides a projection's kernel by sqrt(inputs)."""
    kernel = projection["kernel"]
    return projection | {"kernel": kernel / np.float32(len(kernel) ** 0.5)}


def _by_token(projection: dict, tokens: int) -> dict:
    """Reorders the outputs of a projection to several tokens from channel by channel to token by token."""

    def turned(value: np.ndarray) -> np.ndarray:
        return value.reshape(*value.shape[:-1], -1, tokens).swapaxes(-2, -1).reshape(value.shape)

    return {name: turned(value) for name, value in projection.items()}
