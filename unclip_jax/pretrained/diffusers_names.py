"""Reads the networks of diffusers' UnCLIP under the names that Karlo's own repository gives to their tensors.

They are the same networks apart from attention: in diffusers query, key and value have a projection each, in Karlo they
share one, whose outputs go head by head, each head's query, key and value side by side.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from unclip_jax.pretrained.state_dict import StateDict

# Translates Karlo's name to diffusers'. "{qkv}" in the result stands for three names, with q, k or v in its place.
Names = Callable[[str], str]

# Regular expressions for parts of Karlo's names, and what diffusers has instead; all are applied, in this order.
PRIOR = (
    (r"^clip_img_proj", "proj_in"),
    (r"^text_emb_proj", "embedding_proj"),
    (r"^text_enc_proj", "encoder_hidden_states_proj"),
    (r"^time_embed\.0", "time_embedding.linear_1"),
    (r"^time_embed\.2", "time_embedding.linear_2"),
    (r"^prd_emb$", "prd_embedding"),
    (r"^final_ln", "norm_out"),
    (r"^out_proj", "proj_to_clip_embeddings"),
    (r"^transformer\.resblocks", "transformer_blocks"),
    (r"\.ln_1", ".norm1"),
    (r"\.ln_2", ".norm3"),
    (r"\.attn\.c_qkv", ".attn1.to_{qkv}"),
    (r"\.attn\.c_proj", ".attn1.to_out.0"),
    (r"\.mlp\.c_fc", ".ff.net.0.proj"),
    (r"\.mlp\.c_proj", ".ff.net.2"),
)
UNET = (
    (r"^time_embed\.0", "time_embedding.linear_1"),
    (r"^time_embed\.2", "time_embedding.linear_2"),
    (r"^out\.0", "conv_norm_out"),
    (r"^out\.2", "conv_out"),
    (r"\.in_layers\.0", ".norm1"),
    (r"\.in_layers\.2", ".conv1"),
    (r"\.emb_layers\.1", ".time_emb_proj"),
    (r"\.out_layers\.0", ".norm2"),
    (r"\.out_layers\.3", ".conv2"),
    (r"\.skip_connection", ".conv_shortcut"),
    (r"(attentions\.\d+)\.norm\b", r"\1.group_norm"),
    (r"\.qkv", ".to_{qkv}"),
    (r"\.encoder_kv", ".add_{kv}_proj"),
    (r"\.proj_out", ".to_out.0"),
)
TEXT_PROJECTION = (
    (r"^cf_param$", "learned_classifier_free_guidance_embeddings"),
    (r"^clip_emb\b", "clip_image_embeddings_project_to_time_embeddings"),
    (r"^clip_tok_proj", "clip_extra_context_tokens_proj"),
    (r"^text_feat_proj", "embedding_proj"),
    (r"^text_seq_proj\.0", "encoder_hidden_states_proj"),
    (r"^text_seq_proj\.1", "text_encoder_hidden_states_norm"),
)


def prior_names(name: str) -> str:
    """Translates a name of Karlo's prior to diffusers' PriorTransformer."""
    return _replaced(name, PRIOR)


def unet_names(res_blocks: int, attends: tuple[bool, ...], middle_attends: bool) -> Names:
    """Makes the translation of a Karlo U-Net's names to diffusers' UNet2DModel or UNet2DConditionModel.

    res_blocks: residual blocks of each level on the way down. attends: for each level, that of the whole picture first,
    whether it has attention. middle_attends: whether the middle has.
    """
    # Karlo numbers the blocks of all levels in one row, diffusers those of each level from 0.
    rows, modules = res_blocks + 1, {"input_blocks.0.0": "conv_in"}
    for level, attention in enumerate(attends):
        for i in range(res_blocks):
            modules[f"input_blocks.{1 + level * rows + i}.0"] = f"down_blocks.{level}.resnets.{i}"
            if attention:
                modules[f"input_blocks.{1 + level * rows + i}.1"] = f"down_blocks.{level}.attentions.{i}"
        modules[f"input_blocks.{(level + 1) * rows}.0"] = f"down_blocks.{level}.downsamplers.0"
    middle = ["resnets.0", *["attentions.0"] * middle_attends, "resnets.1"]
    modules |= {f"middle_block.{i}": f"mid_block.{module}" for i, module in enumerate(middle)}
    for level, attention in enumerate(reversed(attends)):
        for i in range(rows):
            modules[f"output_blocks.{level * rows + i}.0"] = f"up_blocks.{level}.resnets.{i}"
            if attention:
                modules[f"output_blocks.{level * rows + i}.1"] = f"up_blocks.{level}.attentions.{i}"
        modules[f"output_blocks.{level * rows + res_blocks}.{1 + attention}"] = f"up_blocks.{level}.upsamplers.0"

    def names(name: str) -> str:
        module = re.match(r"(in|out)put_blocks\.\d+\.\d+|middle_block\.\d+", name)
        if module and module[0] in modules:
            name = modules[module[0]] + name[module.end() :]
        return _replaced(name, UNET)

    return names


def decoder_names(unet: Names) -> Names:
    """Makes the translation of the Karlo decoder's names to diffusers' two models, each with its folder in front.

    They are UNet2DConditionModel (decoder/), whose names `unet` translates, and UnCLIPTextProjModel (text_proj/).
    """

    def names(name: str) -> str:
        found = _replaced(name, TEXT_PROJECTION)
        return f"decoder/{unet(name)}" if found == name else f"text_proj/{found}"

    return names


class RenamedStateDict:
    """A `StateDict` of diffusers' tensors that is asked for them by Karlo's names.

    Errors give diffusers' names. head_channels: channels of each attention head.
    """

    def __init__(self, tensors: Mapping[str, Any], source: str, names: Names, head_channels: int):
        self.source, self._weights = source, StateDict(tensors, source)
        self._names, self._head_channels = names, head_channels

    def __contains__(self, name: str) -> bool:
        return all(part in self._weights for part in self._parts(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape as `StateDict.shape` does; not for attention projections, which are in parts."""
        return self._weights.shape(*self._parts(name))

    def take(self, name: str, *shape: int) -> np.ndarray:
        """Returns a tensor as `StateDict.take` does; an attention projection is joined from its parts, head by head."""
        parts = self._parts(name)
        stored = shape[:2] if shape[2:] == (1,) else shape  # attention projections: convolutions in Karlo alone
        values = [self._weights.take(part, stored[0] // len(parts), *stored[1:]) for part in parts]
        if len(parts) == 1:
            return values[0].reshape(shape)
        by_head = [value.reshape(-1, self._head_channels, *stored[1:]) for value in values]
        return np.stack(by_head, axis=1).reshape(shape)

    def finish(self) -> None:
        """Raises UserError as `StateDict.finish` does."""
        self._weights.finish()

    def _parts(self, name: str) -> list[str]:
        """Translates a name of Karlo's to the names of the tensors that hold it in diffusers."""
        name = self._names(name)
        letters = re.search(r"\{(\w+)\}", name)
        return [name.replace(letters[0], letter) for letter in letters[1]] if letters else [name]


def _replaced(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
