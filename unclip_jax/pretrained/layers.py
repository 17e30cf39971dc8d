"""The layers of the PyTorch references in our layout: functions (weights, name, sizes) → parameters.

PyTorch keeps linear weights as [out, in] and convolutions as [out, in, height, width]; Flax as [in, out] and
[height, width, in, out].
"""

from collections.abc import Callable

import numpy as np

from unclip_jax.pretrained.state_dict import StateDict


def conv(weights: StateDict, name: str, inputs: int, outputs: int, side: int) -> dict:
    """A convolution with a square kernel."""
    kernel = weights.take(f"{name}.weight", outputs, inputs, side, side).transpose(2, 3, 1, 0)
    return {"kernel": kernel, "bias": weights.take(f"{name}.bias", outputs)}


def dense(weights: StateDict, name: str, inputs: int, outputs: int, bias: bool = True) -> dict:
    """A linear layer."""
    params = {"kernel": weights.take(f"{name}.weight", outputs, inputs).T}
    return params | {"bias": weights.take(f"{name}.bias", outputs)} if bias else params


def norm(weights: StateDict, name: str, width: int) -> dict:
    """LayerNorm or GroupNorm."""
    return {"scale": weights.take(f"{name}.weight", width), "bias": weights.take(f"{name}.bias", width)}


def interleaved(params: dict, heads: int, parts: int) -> dict:
    """A projection to `parts` of (query, key, value) whose outputs go head by head, each head's parts side by side
    (the "legacy" order), in our order: part by part, each part's heads side by side."""

    def reorder(values):
        split = values.reshape(*values.shape[:-1], heads, parts, -1)
        return split.swapaxes(-3, -2).reshape(values.shape)

    return {name: reorder(value) for name, value in params.items()}


def joined(*projections: dict) -> dict:
    """Separate projections of one input as a single one, outputs side by side."""
    return {name: np.concatenate([p[name] for p in projections], axis=-1) for name in projections[0]}


def stacked(block: Callable[[int], dict], depth: int) -> dict:
    """Parameters of `models.transformer.Transformer`: each leaf of blocks 0 … depth - 1, stacked."""
    blocks = [block(n) for n in range(depth)]
    return {"blocks": _stack(blocks)}


def _stack(trees: list):
    if isinstance(trees[0], dict):
        return {name: _stack([tree.pop(name) for tree in trees]) for name in list(trees[0])}
    return np.stack(trees)
