"""Converts Karlo as the diffusers library stores it: a folder of UnCLIPPipeline or UnCLIPImageVariationPipeline.

    model_index.json                        names the pipeline
    prior/                                  config.json and diffusion_pytorch_model.safetensors, or .bin
    decoder/ text_proj/                     the same
    super_res_first/ super_res_last/        the same
    text_encoder/ image_encoder/            config.json and model.safetensors, or pytorch_model.bin
    tokenizer/ feature_extractor/
    prior_scheduler/ decoder_scheduler/ super_res_scheduler/

UnCLIPPipeline alone has prior/ and prior_scheduler/, UnCLIPImageVariationPipeline alone image_encoder/ and
feature_extractor/. The first one's folder with those two of the second one copied into it draws both from captions and
from pictures. Every number comes from the folder; settings that this library's networks do not have are refused.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from unclip_jax.errors import UserError
from unclip_jax.pretrained import Converted, Options, karlo_stages, openai_clip, tokenizers
from unclip_jax.pretrained.diffusers_names import Names, RenamedStateDict, decoder_names, prior_names, unet_names
from unclip_jax.pretrained.state_dict import WEIGHT_FILES, StateDict, read_tensors

PARTS = {  # folder → class of diffusers, in both pipelines
    "decoder": "UNet2DConditionModel",
    "text_proj": "UnCLIPTextProjModel",
    "super_res_first": "UNet2DModel",
    "super_res_last": "UNet2DModel",
    "decoder_scheduler": "UnCLIPScheduler",
    "super_res_scheduler": "UnCLIPScheduler",
}
PRIOR = {"prior": "PriorTransformer", "prior_scheduler": "UnCLIPScheduler"}
PIPELINES = {  # pipeline → folders that it holds besides PARTS
    "UnCLIPPipeline": (*PRIOR, "text_encoder", "tokenizer"),
    "UnCLIPImageVariationPipeline": ("text_encoder", "tokenizer", "image_encoder", "feature_extractor"),
}
DEFAULT_STEPS = {"prior": "25", "decoder": "25", "super_res": "7"}  # of the pipelines; no file tells them

# SUPPORTED holds, for each class, the values that config keys may have. Keys of OTHER_KEYS may have any value: they are
# read, or make no difference. Any other key, such as a later version of diffusers may add, must be null or false.
UNET = {
    "act_fn": ("silu", "swish"),
    "dropout": (0,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_scale_factor": (1,),
    "norm_eps": (1e-5,),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "time_embedding_type": ("positional",),
}
SUPPORTED = {
    "PriorTransformer": {
        "added_emb_type": ("prd",),
        "additional_embeddings": (4,),
        "dropout": (0,),
        "encoder_hid_proj_type": ("linear",),
        "time_embed_act_fn": ("silu",),
    },
    "UnCLIPTextProjModel": {},
    "UNet2DConditionModel": UNET
    | {
        "class_embed_type": ("identity",),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "mid_block_type": ("UNetMidBlock2DSimpleCrossAttn",),
        "resnet_out_scale_factor": (1,),
    },
    "UNet2DModel": UNET | {"add_attention": (False,), "mid_block_type": ("UNetMidBlock2D",)},
    "UnCLIPScheduler": {
        "beta_schedule": ("squaredcos_cap_v2",),
        "prediction_type": ("epsilon", "sample"),
        "variance_type": ("fixed_small_log", "learned_range"),
    },
}
UNET_KEYS = {"attention_head_dim", "block_out_channels", "down_block_types", "downsample_padding", "in_channels",
             "layers_per_block", "norm_num_groups", "out_channels", "sample_size", "up_block_types"}  # fmt: skip
OTHER_KEYS = {
    "PriorTransformer": {"attention_head_dim", "embedding_dim", "num_attention_heads", "num_embeddings", "num_layers"},
    "UnCLIPTextProjModel": {"clip_embeddings_dim", "clip_extra_context_tokens", "cross_attention_dim",
                            "time_embed_dim"},
    "UNet2DConditionModel": {*UNET_KEYS, "addition_embed_type_num_heads", "attention_type", "cross_attention_dim",
                             "transformer_layers_per_block", "upcast_attention", "use_linear_projection"},
    "UNet2DModel": {*UNET_KEYS, "attn_norm_num_groups", "downsample_type", "num_train_timesteps", "upsample_type"},
    "UnCLIPScheduler": {"clip_sample", "clip_sample_range", "num_train_timesteps"},
}  # fmt: skip


def read_folder(folder: Path, options: Options) -> Iterator[Converted]:
    """Yields the folder's models one at a time: CLIP, the prior if there is one, decoder and upsampler.

    options: only its dtype is used, because the folder tells the rest. Raises UserError for parts that are missing,
    damaged or not supported; configs and files that are cut short are checked before the first model is converted.
    """
    pipeline = _Pipeline(folder, options.dtype)
    yield pipeline.clip()
    if "prior" in pipeline.parts:
        yield pipeline.prior()
    yield pipeline.decoder()
    yield pipeline.upsampler()


class _Pipeline:
    """A folder found to be whole, with supported configs; its tensors' numbers are read as models are converted."""

    def __init__(self, folder: Path, dtype: str):
        kind = _json(folder / "model_index.json").get("_class_name")
        if kind not in PIPELINES:
            raise UserError(f"{folder} is a folder of {kind}: expected {' or '.join(PIPELINES)}")
        missing = [f"{name}/" for name in (*PIPELINES[kind], *PARTS) if not (folder / name).is_dir()]
        if missing:
            raise UserError(f"{folder} lacks {', '.join(missing)}, which {kind} has: download it whole")
        kinds = PARTS | (PRIOR if (folder / "prior").is_dir() else {})
        self.folder, self.dtype = folder, dtype
        self.parts = {part: _Part(folder / part, kind) for part, kind in kinds.items()}
        self.has_images = (folder / "image_encoder").is_dir()
        named = [part for part, kind in kinds.items() if kind != "UnCLIPScheduler"]
        named += ["text_encoder", *["image_encoder"] * self.has_images]
        self.tensors = {part: _tensors(folder / part) for part in named}
        decoder, first, last = (self.parts[part] for part in ("decoder", "super_res_first", "super_res_last"))
        self.decoder_names, self.upsampler_names = decoder_names(decoder.unet_names()), first.unet_names()
        if first.differences(last):
            raise UserError(f"{first.path} and {last.path} differ in {', '.join(first.differences(last))}: "
                            "expected two networks of one kind")  # fmt: skip
        if first.number("sample_size") % decoder.number("sample_size"):
            raise UserError(f"{first.path} has sample_size = {first['sample_size']}: expected a multiple of the "
                            f"decoder's, {decoder['sample_size']}")  # fmt: skip

    def clip(self) -> Converted:
        """Converts CLIP, without an image tower where the folder has none. Its embeddings are not normalised."""
        towers = {}
        for tower in ("text", "image")[: 1 + self.has_images]:
            place = self.folder / f"{tower}_encoder"
            towers[tower] = StateDict(self.tensors[place.name], str(place))
            towers[f"{tower}_config"] = _json(place / "config.json")
        preprocessor = self.folder / "feature_extractor/preprocessor_config.json"
        preprocessor = _json(preprocessor) if self.has_images else {}
        towers = {"image": None, "image_config": {}} | towers
        model = openai_clip.convert_towers(**towers, preprocessor=preprocessor, dtype=self.dtype, unit_norm=False)
        return Converted("clip", *model, tokenizers.read_clip(self.folder / "tokenizer"))

    def prior(self) -> Converted:
        """Converts the prior."""
        part = self.parts["prior"]
        heads, head_channels = part.number("num_attention_heads"), part.number("attention_head_dim")
        weights = RenamedStateDict(self.tensors["prior"], str(self.folder / "prior"), prior_names, head_channels)
        part.check("num_attention_heads", weights.shape("clip_img_proj.weight")[0] / head_channels)
        mean, std = (weights.take(name, 1, part.number("embedding_dim"))[0] for name in ("clip_mean", "clip_std"))
        config, params = karlo_stages.convert_prior(weights, mean, std, self.dtype, heads)
        part.check("embedding_dim", config.model.embedding_dim)
        part.check("num_embeddings", config.model.context)
        part.check("num_layers", config.model.depth)
        return self._finished("prior", config, params)

    def decoder(self) -> Converted:
        """Converts the decoder, which diffusers keeps in two folders."""
        part = self.parts["decoder"]
        size, head_channels = part.number("sample_size"), part.number("attention_head_dim")
        both = ("decoder", "text_proj")
        tensors = {f"{name}/{key}": value for name in both for key, value in self.tensors[name].items()}
        weights = RenamedStateDict(tensors, str(self.folder), self.decoder_names, head_channels)
        config, params = karlo_stages.convert_decoder(weights, size, self.dtype, head_channels)
        return self._finished("decoder", config, params)

    def upsampler(self) -> Converted:
        """Converts the upsampler with its two networks, of which the second one makes the last step."""
        size, small = (self.parts[name].number("sample_size") for name in ("super_res_first", "decoder"))
        networks = [
            RenamedStateDict(self.tensors[name], str(self.folder / name), self.upsampler_names, 1)
            for name in ("super_res_first", "super_res_last")
        ]
        config, params = karlo_stages.convert_upsampler(*networks, size, self.dtype)
        config.model.factor = size // small
        halvings = len(config.model.unet.channel_mult) - 1
        config.model.patch = size if small % 2**halvings else small
        return self._finished("super_res", config, params)

    def _finished(self, name: str, config: ConfigDict, params: dict) -> Converted:
        """Completes a stage's config by what the configs of its network and its scheduler say.

        name: of the part of the pipeline, "prior", "decoder" or "super_res".
        """
        if name != "prior":
            unet = self.parts["decoder" if name == "decoder" else "super_res_first"]
            config.model.unet.norm_groups = unet.number("norm_num_groups")
        scheduler = self.parts[f"{name}_scheduler"]
        scheduler.check("variance_type", "learned_range" if config.diffusion.learned_variance else "fixed_small_log")
        config.diffusion.timesteps = scheduler.number("num_train_timesteps")
        config.diffusion.predicts = {"epsilon": "eps", "sample": "x0"}[scheduler["prediction_type"]]
        config.sampling.steps = DEFAULT_STEPS[name]
        config.sampling.clip_x0 = float(scheduler["clip_sample_range"]) if scheduler["clip_sample"] else 0.0
        return Converted("upsampler_256" if name == "super_res" else name, config, params, None)


class _Part:
    """The config of one part of the folder, found to have supported values alone. kind: its class in diffusers."""

    def __init__(self, folder: Path, kind: str):
        self.path = folder / ("scheduler_config.json" if kind == "UnCLIPScheduler" else "config.json")
        self._values = _json(self.path)
        self.check("_class_name", kind)
        for key in self._values:
            if key in SUPPORTED[kind]:
                self.check(key, *SUPPORTED[kind][key])
            elif key[0] != "_" and key not in OTHER_KEYS[kind]:
                self.check(key, None, False)

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            raise UserError(f"{self.path} lacks {key}: download it again")
        return self._values[key]

    def check(self, key: str, *allowed: str | float | None) -> None:
        """Raises UserError unless a key has one of the allowed values."""
        if self[key] not in allowed:
            expected = " or ".join(repr(value) for value in allowed)
            raise UserError(f"{self.path} has {key} = {self[key]!r}, which is not supported: expected {expected}")

    def number(self, key: str) -> int:
        """Returns a key's positive integer, or the one that all entries of a list equal; else raises UserError."""
        value = self[key]
        entries = value if isinstance(value, list) else [value]
        if not all(isinstance(entry, int) and entry > 0 and entry == entries[0] for entry in entries or [0]):
            raise UserError(f"{self.path} has {key} = {value!r}, which is not supported: expected a positive number")
        return entries[0]

    def differences(self, other: "_Part") -> list[str]:
        """Lists the keys that have another value in the other config."""
        keys = (self._values | other._values).keys()
        return sorted(key for key in keys if key[0] != "_" and self._values.get(key) != other._values.get(key))

    def unet_names(self) -> Names:
        """Makes the translation of this U-Net's names, which depend on where it has attention.

        Raises UserError for blocks and widths that are not supported.
        """
        conditional = self["_class_name"] == "UNet2DConditionModel"
        plain, attending = "ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"
        known, down = (plain, attending)[: 1 + conditional], self["down_block_types"]
        up = [name.replace("Downsample", "Upsample").replace("Down", "Up") for name in reversed(down)]
        if not set(down) <= set(known) or self["up_block_types"] != up:
            raise UserError(f"{self.path} has blocks {down} and {self['up_block_types']}, which are not supported: "
                            f"expected {' or '.join(known)}, and the same on the way up")  # fmt: skip
        attends = tuple(name == attending for name in down)
        widths, groups = self["block_out_channels"], self.number("norm_num_groups")
        head_channels = self.number("attention_head_dim") if conditional else 1
        for width, attention in zip(widths, (*attends[:-1], conditional), strict=False):  # the middle attends too
            if width % widths[0] or width % groups or (attention and width % head_channels):
                raise UserError(f"{self.path} has block_out_channels = {widths}, which are not supported: expected "
                                "multiples of the first, of norm_num_groups and of attention_head_dim")  # fmt: skip
        return unet_names(self.number("layers_per_block"), attends, conditional)


def _tensors(folder: Path) -> dict[str, Any]:
    paths = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    if not paths:
        raise UserError(f"{folder} holds no weights: expected a file such as {' or '.join(WEIGHT_FILES[:2])}")
    return read_tensors(paths[0])


def _json(path: Path) -> dict[str, Any]:
    value = tokenizers.read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a config: download it again")
    return value
