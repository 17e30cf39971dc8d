"""Converts single layers from PyTorch's layout to Flax's.

PyTorch keeps linear weights as [out, in] and convolutions as [out, in, height, width]; Flax as [in, out] and
[height, width, in, out]. Functions take a state dict, a layer's name in it and its sizes, and return its parameters.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from unclip_jax.errors import UserError
from unclip_jax.pretrained.state_dict import StateDict


def conv(weights: StateDict, name: str, inputs: int, outputs: int, side: int) -> dict:
    """Converts a convolution with a square kernel of `side` × `side` pixels."""
    kernel = weights.take(f"{name}.weight", outputs, inputs, side, side).transpose(2, 3, 1, 0)
    return {"kernel": kernel, "bias": weights.take(f"{name}.bias", outputs)}


def dense(weights: StateDict, name: str, inputs: int, outputs: int, bias: bool = True) -> dict:
    """Converts a linear layer."""
    params = {"kernel": weights.take(f"{name}.weight", outputs, inputs).T}
    return params | {"bias": weights.take(f"{name}.bias", outputs)} if bias else params


def norm(weights: StateDict, name: str, width: int) -> dict:
    """Converts a LayerNorm or GroupNorm of `width` channels."""
    return {"scale": weights.take(f"{name}.weight", width), "bias": weights.take(f"{name}.bias", width)}


def final_norm(weights: StateDict, width: int) -> dict:
    """Converts the last LayerNorm of GLIDE's text path or of Karlo's prior. Raises UserError where a model has none."""
    if "final_ln.weight" not in weights:
        raise UserError(f"{weights.source} has no final_ln: it was trained with xf_final_ln=False, or a prior's "
                        "final_ln=False, which no released model is and this library does not convert")  # fmt: skip
    return norm(weights, "final_ln", width)


def deinterleaved(params: dict, heads: int, parts: int) -> dict:
    """Reorders the outputs of an attention projection from head by head to part by part.

    The references go through the heads, with each head's query, key and value side by side (guided-diffusion's
    "legacy" order). Here all queries come first, then all keys, then all values, each head by head. parts: 3, or 2 for
    keys and values alone.
    """

    def reorder(values: np.ndarray) -> np.ndarray:
        split = values.reshape(*values.shape[:-1], heads, parts, -1)
        return split.swapaxes(-3, -2).reshape(values.shape)

    return {name: reorder(value) for name, value in params.items()}


def joined(*projections: dict) -> dict:
    """Joins several projections of one input into a single one, their outputs side by side."""
    return {name: np.concatenate([p[name] for p in projections], axis=-1) for name in projections[0]}


def stacked(block: Callable[[int], dict], depth: int) -> dict:
    """Makes the parameters of `models.transformer.Transformer`: each leaf of block(0) … block(depth - 1), stacked."""
    blocks = [block(n) for n in range(depth)]
    return {"blocks": _stack(blocks)}


def _stack(trees: list[Any]) -> Any:
    """Stacks the leaves of nested dicts of one structure, which are emptied meanwhile to save memory."""
    if isinstance(trees[0], dict):
        return {name: _stack([tree.pop(name) for tree in trees]) for name in list(trees[0])}
    return np.stack(trees)
