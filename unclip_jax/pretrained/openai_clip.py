"""Converts CLIP (arXiv 2103.00020) with a vision transformer, from the files of OpenAI, transformers or open_clip."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from unclip_jax.errors import UserError
from unclip_jax.models.transformer import ACTIVATIONS
from unclip_jax.pretrained import Converted, Options, tokenizers
from unclip_jax.pretrained.layers import dense, joined, norm, stacked
from unclip_jax.pretrained.state_dict import WEIGHT_FILES, StateDict, count_blocks, read_tensors

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MAX_SCALE = 100.0
BUFFERS = ("input_resolution", "context_length", "vocab_size")  # scalars of OpenAI's TorchScript archives
POSITION_IDS = ("vision_model.embeddings.position_ids", "text_model.embeddings.position_ids")  # 0, 1, 2, …
RESNET = "visual.attnpool.positional_embedding"  # which OpenAI's and open_clip's ResNets have
# Values that transformers leaves out of a config.json because they are its defaults.
DEFAULTS = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
DEFAULT_HEADS = {"image": 12, "text": 8}
# The only preprocessing that is supported; `resample` 3 is bicubic.
PREPROCESSING = {
    "do_resize": True,
    "do_center_crop": True,
    "do_rescale": True,
    "do_normalize": True,
    "resample": 3,
}

# open_clip: file of the architecture, files of weights, and keys of each tower that say what the shapes say, or heads.
OPEN_CLIP, OPEN_CLIP_WEIGHTS = "open_clip_config.json", ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
OPEN_CLIP_KEYS = {
    "vision_cfg": {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"},
}
OPEN_CLIP_PREPROCESSING = {"interpolation": "bicubic", "resize_mode": "shortest", "mode": "RGB"}


class Layout(NamedTuple):
    """A release's names of CLIP's tensors by this library's names, and how it lays out two of the layers."""

    image: dict[str, str]  # names in the image tower
    text: dict[str, str]  # names in the text tower
    block: dict[str, str]  # names in each block of either tower
    qkv: Callable[[StateDict, str, int], dict]  # (weights, block's name, width) → the attention's input projection
    projection: str  # axes of the last projection: "in out" or "out in"


OPENAI = Layout(
    image={
        "class_token": "visual.class_embedding",
        "patch": "visual.conv1.weight",
        "positions": "visual.positional_embedding",
        "norm_in": "visual.ln_pre",
        "blocks": "visual.transformer.resblocks.{}",
        "norm_out": "visual.ln_post",
        "projection": "visual.proj",
    },
    text={
        "tokens": "token_embedding.weight",
        "positions": "positional_embedding",
        "blocks": "transformer.resblocks.{}",
        "norm": "ln_final",
        "projection": "text_projection",
    },
    block={"norm_1": "ln_1", "out": "attn.out_proj", "norm_2": "ln_2", "mlp_in": "mlp.c_fc", "mlp_out": "mlp.c_proj"},
    qkv=lambda weights, block, width: {
        "kernel": weights.take(f"{block}.attn.in_proj_weight", 3 * width, width).T,
        "bias": weights.take(f"{block}.attn.in_proj_bias", 3 * width),
    },
    projection="in out",
)
HUGGINGFACE = Layout(
    image={
        "class_token": "vision_model.embeddings.class_embedding",
        "patch": "vision_model.embeddings.patch_embedding.weight",
        "positions": "vision_model.embeddings.position_embedding.weight",
        "norm_in": "vision_model.pre_layrnorm",  # spelt like this in transformers
        "blocks": "vision_model.encoder.layers.{}",
        "norm_out": "vision_model.post_layernorm",
        "projection": "visual_projection.weight",
    },
    text={
        "tokens": "text_model.embeddings.token_embedding.weight",
        "positions": "text_model.embeddings.position_embedding.weight",
        "blocks": "text_model.encoder.layers.{}",
        "norm": "text_model.final_layer_norm",
        "projection": "text_projection.weight",
    },
    block={
        "norm_1": "layer_norm1",
        "out": "self_attn.out_proj",
        "norm_2": "layer_norm2",
        "mlp_in": "mlp.fc1",
        "mlp_out": "mlp.fc2",
    },
    qkv=lambda weights, block, width: joined(
        *(dense(weights, f"{block}.self_attn.{part}_proj", width, width) for part in "qkv")
    ),
    projection="out in",
)


def read_folder(source: Path, options: Options) -> Iterator[Converted]:
    """Yields the one model of a folder, or of a file with its vocabulary beside it; its embeddings get unit norm.

    source: OpenAI's archive or state dict, such as ViT-L-14.pt, whose heads `options` tell; as transformers stores it,
    one of WEIGHT_FILES with config.json and, if there is one, preprocessor_config.json; or one of OPEN_CLIP_WEIGHTS
    with open_clip_config.json. Raises UserError for files that are missing, damaged or not a CLIP with a vision
    transformer.
    """
    path = source if source.is_file() else _find_weights(source)
    folder = path.parent
    vocabulary = tokenizers.read_clip(folder)
    weights = StateDict(read_tensors(path), str(path))
    if HUGGINGFACE.image["patch"] in weights:
        preprocessor = folder / "preprocessor_config.json"
        preprocessor = tokenizers.read_json(preprocessor) if preprocessor.is_file() else {}
        hf_config = tokenizers.read_json(folder / "config.json")
        config, params = convert_huggingface(weights, hf_config, preprocessor, options.dtype)
    elif (folder / OPEN_CLIP).is_file():
        config, params = convert_open_clip(weights, tokenizers.read_json(folder / OPEN_CLIP), options.dtype)
    elif path.name in OPEN_CLIP_WEIGHTS:
        raise UserError(f"no {OPEN_CLIP} in {folder}, which says heads and activation: download it too")
    else:
        config, params = convert(weights, options.dtype, options.head_channels, options.heads)
    yield Converted("", config, params, vocabulary)


def convert(
    weights: StateDict,
    dtype: str = "float32",
    head_channels: int = 64,
    text_heads: int = 0,
    activation: str = "quick_gelu",
    unit_norm: bool = True,
    preprocessor: dict | None = None,
) -> tuple[ConfigDict, dict]:
    """Converts a CLIP from OpenAI's names; returns config and parameters of the `clip` stage.

    head_channels: channels of each attention head. text_heads: heads of the text tower; 0: as many as head_channels
    gives. activation: "quick_gelu", or "gelu" for models of others who kept OpenAI's names. No shape tells these.
    unit_norm: give embeddings length 1; else they stay as the projections leave them. preprocessor: as in
    `convert_huggingface`. Raises UserError for a state dict that is not such a model.
    """
    if RESNET in weights:
        raise UserError(f"{weights.source} is a CLIP with a ResNet: expected a vision transformer, such as ViT-L-14")
    widths = weights.shape(OPENAI.image["class_token"])[0], weights.shape(OPENAI.text["tokens"])[1]
    if any(width % head_channels for width in widths[: 1 if text_heads else 2]):
        raise UserError(f"heads of {head_channels} channels do not fit towers of {widths} channels: give their width")
    heads = {"image": widths[0] // head_channels, "text": text_heads or widths[1] // head_channels}
    weights.skip(*BUFFERS)
    scale = weights.take("logit_scale")
    return _convert(OPENAI, weights, weights, heads, activation, scale, preprocessor or {}, dtype, unit_norm)


def convert_open_clip(weights: StateDict, about: dict, dtype: str = "float32") -> tuple[ConfigDict, dict]:
    """Converts a CLIP of open_clip, which keeps OpenAI's names; returns config and parameters of the `clip` stage.

    about: its open_clip_config.json. Raises UserError for an architecture or preprocessing that is not supported.
    """
    model, preprocess = about.get("model_cfg", {}), about.get("preprocess_cfg", {})
    odd = [f"{tower}.{key}={value}" for tower, known in OPEN_CLIP_KEYS.items()
           for key, value in model.get(tower, {}).items() if key not in known and value]  # fmt: skip
    odd += [f"{key}={value}" for key, value in model.items()
            if key not in (*OPEN_CLIP_KEYS, "embed_dim", "quick_gelu") and value]  # fmt: skip
    odd += [f"{key}={preprocess[key]}" for key, value in OPEN_CLIP_PREPROCESSING.items()
            if preprocess.get(key, value) != value]  # fmt: skip
    if odd:
        raise UserError(f"{OPEN_CLIP} has {', '.join(odd)}: only CLIP's own towers and preprocessing are supported")
    size = {"mean": preprocess.get("mean", MEAN), "std": preprocess.get("std", STD)}
    return convert(
        weights,
        dtype,
        model.get("vision_cfg", {}).get("head_width", 64),
        model.get("text_cfg", {}).get("heads", 8),
        "quick_gelu" if model.get("quick_gelu") else "gelu",
        preprocessor={f"image_{name}": value for name, value in size.items()},
    )


def convert_huggingface(
    weights: StateDict, hf_config: dict, preprocessor: dict, dtype: str = "float32", unit_norm: bool = True
) -> tuple[ConfigDict, dict]:
    """Converts a CLIP from the names of transformers' CLIPModel; returns config and parameters of the `clip` stage.

    hf_config, preprocessor: its config.json and preprocessor_config.json; an empty preprocessor stands for OpenAI's
    mean and standard deviation. unit_norm: as in `convert`. Raises UserError for a model or preprocessing that is not
    supported.
    """
    scale = weights.take("logit_scale")
    configs = hf_config.get("vision_config", {}), hf_config.get("text_config", {})
    return _convert_huggingface(weights, weights, *configs, scale, preprocessor, dtype, unit_norm)


def convert_towers(
    text: StateDict,
    text_config: dict,
    image: StateDict | None,
    image_config: dict,
    preprocessor: dict,
    dtype: str = "float32",
    unit_norm: bool = True,
) -> tuple[ConfigDict, dict]:
    """Converts one CLIP's two halves, transformers' CLIPTextModelWithProjection and CLIPVisionModelWithProjection.

    image: None if there is only the text tower; `config.model.image` is then None. text_config, image_config: their
    config.json. preprocessor, unit_norm: as in `convert_huggingface`. Returns config and parameters of the `clip`
    stage. No file holds the scale of the dot products: it is set to 100, where OpenAI's models ended. Raises UserError
    as `convert_huggingface` does.
    """
    scale = np.float32(math.log(MAX_SCALE))
    return _convert_huggingface(image, text, image_config, text_config, scale, preprocessor, dtype, unit_norm)


def _convert_huggingface(
    image: StateDict | None,
    text: StateDict,
    image_config: dict,
    text_config: dict,
    scale: np.ndarray,
    preprocessor: dict,
    dtype: str,
    unit_norm: bool,
) -> tuple[ConfigDict, dict]:
    """Converts towers by transformers' names, after their configs are found to be supported.

    image, text: state dicts of the towers, which may be the same. scale: logarithm of the dot products' scale.
    """
    configs = {"text": DEFAULTS | text_config}
    if image is not None:
        configs["image"] = DEFAULTS | image_config
        image.skip(*POSITION_IDS)
    text.skip(*POSITION_IDS)
    activations = {config["hidden_act"] for config in configs.values()}
    if len(activations) > 1 or not activations <= ACTIVATIONS.keys():
        raise UserError(f"hidden_act is {' and '.join(sorted(activations))}: expected one, {' or '.join(ACTIVATIONS)}")
    heads = {}
    for name, config in configs.items():
        if not math.isclose(config["layer_norm_eps"], 1e-5):
            raise UserError(f"layer_norm_eps of the {name} tower is {config['layer_norm_eps']}: only 1e-5 is supported")
        heads[name] = config.get("num_attention_heads", DEFAULT_HEADS[name])
    return _convert(HUGGINGFACE, image, text, heads, activations.pop(), scale, preprocessor, dtype, unit_norm)


def _convert(
    layout: Layout,
    image: StateDict | None,
    text: StateDict,
    heads: dict[str, int],
    activation: str,
    scale: np.ndarray,
    preprocessor: dict,
    dtype: str,
    unit_norm: bool,
) -> tuple[ConfigDict, dict]:
    """Converts a CLIP of either layout. image, text, scale: as in `_convert_huggingface`. heads: of each tower."""
    dim = text.shape(layout.text["projection"])[layout.projection.split().index("out")]
    text_sizes, text_params = _text_tower(layout, text, heads["text"], dim)
    params = {"text": text_params, "logit_scale": scale}
    image_size, image_sizes = 0, None
    if image is not None:
        image_size, image_sizes, params["image"] = _image_tower(layout, image, heads["image"], dim)
        image.finish()
    if image is not text:
        text.finish()
    mean, std = _mean_and_std(preprocessor, image_size)
    config = ConfigDict({
        "stage": "clip",
        "dtype": dtype,
        "model": {
            "image_size": image_size,
            "dim": dim,
            "image": image_sizes,
            "text": text_sizes,
            "activation": activation,
            "initial_scale": 1 / 0.07,
            "max_scale": MAX_SCALE,
            "mean": mean,
            "std": std,
            "resize": "bicubic",
            "unit_norm": unit_norm,
            "remat": False,
        },
    })  # fmt: skip
    return config, params


def _image_tower(layout: Layout, weights: StateDict, heads: int, dim: int) -> tuple[int, dict, dict]:
    """Converts the image tower; returns the side of its pictures in pixels, its part of the config, its parameters."""
    names = layout.image
    width, _, _, patch = weights.shape(names["patch"])
    places = weights.shape(names["positions"])[0]
    layers, mlp_width = _sizes(layout, weights, names["blocks"], width, heads)
    kernel = weights.take(names["patch"], width, 3, patch, patch)
    params = {
        "class_token": weights.take(names["class_token"], width),
        "patch": {"kernel": kernel.transpose(2, 3, 1, 0)},
        "positions": weights.take(names["positions"], places, width),
        "norm_in": norm(weights, names["norm_in"], width),
        "transformer": stacked(lambda n: _block(layout, weights, names["blocks"].format(n), width, mlp_width), layers),
        "norm_out": norm(weights, names["norm_out"], width),
        "projection": _projection(layout, weights, names["projection"], width, dim),
    }
    sizes = {"patch": patch, "width": width, "depth": layers, "heads": heads, "timesteps": 0}
    return patch * math.isqrt(places - 1), sizes | {"mlp_width": mlp_width}, params


def _text_tower(layout: Layout, weights: StateDict, heads: int, dim: int) -> tuple[dict, dict]:
    """Converts the text tower; returns its part of the config and its parameters."""
    names = layout.text
    vocab_size, width = weights.shape(names["tokens"])
    context = weights.shape(names["positions"])[0]
    layers, mlp_width = _sizes(layout, weights, names["blocks"], width, heads)
    params = {
        "tokens": {"embedding": weights.take(names["tokens"], vocab_size, width)},
        "positions": weights.take(names["positions"], context, width),
        "transformer": stacked(lambda n: _block(layout, weights, names["blocks"].format(n), width, mlp_width), layers),
        "norm": norm(weights, names["norm"], width),
        "projection": _projection(layout, weights, names["projection"], width, dim),
    }
    sizes = {"vocab_size": vocab_size, "context": context, "width": width, "depth": layers, "heads": heads}
    return sizes | {"mlp_width": mlp_width}, params


def _sizes(layout: Layout, weights: StateDict, blocks: str, width: int, heads: int) -> tuple[int, int]:
    """Reads the number of a tower's blocks and the width of their MLPs. blocks: pattern of the blocks' names."""
    if width % heads:
        raise UserError(f"{heads} heads do not share {width} channels of {weights.source} equally: give their number")
    mlp_width = weights.shape(f"{blocks.format(0)}.{layout.block['mlp_in']}.weight")[0]
    return count_blocks(weights, f"{blocks}.{layout.block['norm_1']}.weight"), mlp_width


def _block(layout: Layout, weights: StateDict, block: str, width: int, mlp_width: int) -> dict:
    names = {part: f"{block}.{name}" for part, name in layout.block.items()}
    return {
        "norm_1": norm(weights, names["norm_1"], width),
        "qkv": layout.qkv(weights, block, width),
        "out": dense(weights, names["out"], width, width),
        "norm_2": norm(weights, names["norm_2"], width),
        "mlp_in": dense(weights, names["mlp_in"], width, mlp_width),
        "mlp_out": dense(weights, names["mlp_out"], mlp_width, width),
    }


def _projection(layout: Layout, weights: StateDict, name: str, inputs: int, outputs: int) -> dict:
    if layout.projection == "in out":
        return {"kernel": weights.take(name, inputs, outputs)}
    return {"kernel": weights.take(name, outputs, inputs).T}


def _mean_and_std(preprocessor: dict, image_size: int) -> tuple[tuple, tuple]:
    """Reads mean and standard deviation of pixels in [0, 1]. Raises UserError for preprocessing other than CLIP's."""
    asked = PREPROCESSING | preprocessor
    wrong = [f"{name}={asked[name]}" for name in PREPROCESSING if asked[name] != PREPROCESSING[name]]
    for name, sides in (("size", ("shortest_edge",)), ("crop_size", ("height", "width"))):
        given = preprocessor.get(name, image_size)
        # Older files write one number.
        if given not in (image_size, dict.fromkeys(sides, image_size)):
            wrong.append(f"{name}={given}")
    if wrong:
        raise UserError(
            f"preprocessor_config.json has {', '.join(wrong)}: only CLIP's own preprocessing is supported, the shorter "
            f"side brought to the model's {image_size} pixels by bicubic interpolation and the middle cut out"
        )
    return tuple(preprocessor.get("image_mean", MEAN)), tuple(preprocessor.get("image_std", STD))


def _find_weights(folder: Path) -> Path:
    """Finds the one file of weights in a folder. Raises UserError where there is none, or several."""
    found = [folder / name for name in (*WEIGHT_FILES, *OPEN_CLIP_WEIGHTS) if (folder / name).is_file()]
    found = found or sorted(path for path in folder.iterdir() if path.suffix in (".pt", ".safetensors"))
    if not found or (len(found) > 1 and found[0].name not in (*WEIGHT_FILES, *OPEN_CLIP_WEIGHTS)):
        names = ", ".join(path.name for path in found) or "none"
        raise UserError(f"{folder} should hold one file of weights, .pt or .safetensors, but has {names}: give one")
    return found[0]
