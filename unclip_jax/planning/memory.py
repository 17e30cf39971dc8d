"""Splits the memory that a program takes on each chip into parts: parameters, optimizer, activations and so on."""

import math
from typing import Any

import jax

from unclip_jax.planning.compiling import Compiled
from unclip_jax.planning.programs import Program
from unclip_jax.training.state import TrainState


def bytes_per_device(tree: Any) -> int:
    """Bytes that a pytree of ShapeDtypeStructs takes on each device, by their shardings."""
    sizes = (math.prod(s.sharding.shard_shape(s.shape)) * s.dtype.itemsize for s in jax.tree.leaves(tree))
    return sum(sizes)


def resident_bytes(program: Program) -> dict[str, int]:
    """Bytes that a program's arguments take on each chip before a call, by part, from their shapes alone."""
    first, frozen, rows, _ = program.arguments
    if not isinstance(first, TrainState):
        parts = {"parameters": first, "frozen CLIP": frozen, "conditions": rows}
    else:
        parts = {"parameters": first.params, "moving average": first.ema, "optimizer": first.opt_state}
        parts |= {"frozen CLIP": frozen, "batch": rows}
    return {name: bytes_per_device(tree) for name, tree in parts.items()}


def memory_parts(program: Program, compiled: Compiled) -> dict[str, int]:
    """Bytes of each chip's memory while the program runs, by part; their sum is all that it needs.

    Arguments that the program never reads count too, such as the text tower of a CLIP that only embeds images.
    Gradients are counted in float32, as large as what is trained: the compiler only says how much memory it needs
    besides arguments and outputs. The rest of that is activations and other temporaries.
    """
    parts, m = resident_bytes(program), compiled.memory
    parts["padding"] = max(0, m["arguments"] - sum(parts.values()))
    gradients = parts["moving average"] if program.trains else 0
    parts["gradients"] = min(gradients, m["temporaries"])
    parts["activations, temporaries"] = m["temporaries"] - parts["gradients"]
    parts["outputs"] = m["outputs"] - m["aliased"]
    parts["program"] = m["code"]
    return parts
