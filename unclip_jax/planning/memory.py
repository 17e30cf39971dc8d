"""Splits the memory of a chip into parts."""

import math
from typing import Any

import jax

from unclip_jax.planning.compiling import Compiled
from unclip_jax.planning.programs import Program
from unclip_jax.training.state import TrainState


def on_chip(tree: Any) -> int:
    """Bytes that lie on each device, of a tree of ShapeDtypeStructs with shardings."""
    sizes = (math.prod(s.sharding.shard_shape(s.shape)) * s.dtype.itemsize for s in jax.tree.leaves(tree))
    return sum(sizes)


def lasting(program: Program) -> dict[str, int]:
    """Bytes by part of what lies on each chip before a call, from shapes."""
    first, frozen, rows, _ = program.arguments
    if not isinstance(first, TrainState):
        return {"parameters": on_chip(first), "frozen CLIP": on_chip(frozen), "conditions": on_chip(rows)}
    return {
        "parameters": on_chip(first.params),
        "moving average": on_chip(first.ema),
        "optimizer": on_chip(first.opt_state),
        "frozen CLIP": on_chip(frozen),
        "batch": on_chip(rows),
    }


def split(program: Program, compiled: Compiled) -> dict[str, int]:
    """Bytes of each chip by part, all that must be there while the program runs.

    Arguments that it has no use for lie there all the same, such as the text tower of a CLIP that only sees. Gradients
    are counted as parameters are, in float32: a part of what the compiler needs besides arguments. The rest of that is
    activations and other temporaries.
    """
    parts, m = lasting(program), compiled.memory
    parts["padding"] = max(0, m["arguments"] - sum(parts.values()))
    gradients = parts["parameters"] if isinstance(program.arguments[0], TrainState) else 0
    parts["gradients"] = min(gradients, m["temporaries"])
    parts["activations, temporaries"] = m["temporaries"] - parts["gradients"]
    parts["outputs"] = m["outputs"] - m["aliased"]
    parts["program"] = m["code"]
    return parts
