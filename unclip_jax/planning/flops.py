"""FLOPs of traced functions, from the formulas of their matrix products and convolutions.

A product of m × k and k × n takes 2 m n k: multiplications and additions. A convolution takes that for every element
of its output, over the taps of its kernel; padding counts, zeros that dilation puts into the input do not. All else
(norms, softmax, Adam) is left out, as papers leave it out. What a scan repeats is counted as often.

Training repeats a product once for each of its two operands that depends on what is trained, to find that operand's
gradient: three times in all for most, which is the usual "3 × forward". What is computed a second time to save memory
(remat) is no part of that.
"""

import math
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Literal

PRODUCTS = ("dot_general", "conv_general_dilated")
# Products within cuDNN's attention: two, and in its gradient the logits again and four more.
CUDNN = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}


def executed(jaxpr: Any) -> int:
    """FLOPs of a (closed) jaxpr as it stands."""
    jaxpr = _opened(jaxpr)
    return _walk(jaxpr, [False] * len(jaxpr.invars))[0]


def training_flops(jaxpr: Any, inputs: list[bool]) -> int:
    """FLOPs of a (closed) jaxpr that gives a loss, and of its gradient by those `inputs` that are True."""
    return _walk(_opened(jaxpr), inputs)[0]


def _opened(jaxpr):
    return getattr(jaxpr, "jaxpr", jaxpr)


def _walk(jaxpr, inputs: list[bool]) -> tuple[int, list[bool]]:
    """FLOPs with those of gradients, and which outputs depend on the inputs that are True."""
    depends = dict(zip(jaxpr.invars, inputs, strict=True))
    total = 0
    for equation in jaxpr.eqns:
        given = [not isinstance(v, Literal) and depends.get(v, False) for v in equation.invars]
        count, found = _equation(equation, given)
        total += count
        # Integers have no gradient.
        pairs = zip(equation.outvars, found, strict=True)
        depends |= {v: yes and jnp.issubdtype(v.aval.dtype, jnp.inexact) for v, yes in pairs}
    outputs = [not isinstance(v, Literal) and depends.get(v, False) for v in jaxpr.outvars]
    return total, outputs


def _equation(equation, given: list[bool]) -> tuple[int, list[bool]]:
    """FLOPs of one equation and its dependent outputs; `given[i]`: operand i depends on trained inputs."""
    name, params = equation.primitive.name, equation.params
    same = [any(given)] * len(equation.outvars)
    if name in PRODUCTS:
        return (1 + sum(given)) * _product(equation), same
    if name == "stop_gradient":
        return 0, [False] * len(equation.outvars)
    if name == "scan":
        return _scan(equation, given)
    if name == "cond":
        branches = [_walk(_opened(branch), given[1:]) for branch in params["branches"]]
        return max(count for count, _ in branches), [any(d) for d in zip(*(d for _, d in branches), strict=True)]
    if name in CUDNN:
        (rows, length, heads, width), (_, keys, _, _) = (v.aval.shape for v in equation.invars[:2])
        return CUDNN[name] * 2 * rows * heads * length * keys * width, same
    inner = [_opened(value) for value in params.values() if hasattr(_opened(value), "eqns")]
    if name == "while":
        if any(executed(body) for body in inner):
            raise ValueError("a while loop with products in it: nothing says how often it runs")
        return 0, same
    if name == "pallas_call":  # a kernel: its gradient is a kernel of its own, taken to be twice the work
        return (3 if any(given) else 1) * math.prod(params["grid_mapping"].grid) * executed(inner[0]), same
    if len(inner) == 1 and len(inner[0].invars) == len(given):  # a function called: jit, checkpoint, custom gradients
        count, found = _walk(inner[0], given)
        return _shards(params) * count if name == "shard_map" else count, found
    if any(executed(body) for body in inner):
        raise ValueError(f"products inside of {name}: it is not known how often they run")
    return 0, same


def _shards(params) -> int:
    """Number of devices that run the body of a shard_map."""
    axes = next(value for name, value in params.items() if name.endswith("manual_axes"))  # JAX renames it now and then
    return math.prod(params["mesh"].shape[axis] for axis in axes)


def _scan(equation, given):
    """FLOPs of a loop, whose carry depends on the trained inputs as soon as one of its iterations made it so.

    A loop takes constants, carry and rows, in this order, and gives carry and rows. JAX's parameter that counts them
    changes with its version; rows are told by the axis that the loop's body does not see.
    """
    body = _opened(equation.params["jaxpr"])
    carry = sum(_same_rank(equation.outvars, body.outvars))
    consts = sum(_same_rank(equation.invars, body.invars)) - carry
    carried = slice(consts, consts + carry)
    while True:
        count, found = _walk(body, given)
        grown = [a or b for a, b in zip(given[carried], found, strict=False)]
        if grown == given[carried]:
            return equation.params["length"] * count, found
        given = [*given[:consts], *grown, *given[carried.stop :]]


def _same_rank(outside, inside) -> list[bool]:
    return [len(a.aval.shape) == len(b.aval.shape) for a, b in zip(outside, inside, strict=True)]


def _product(equation) -> int:
    left, right = (v.aval.shape for v in equation.invars)
    size = math.prod(equation.outvars[0].aval.shape)
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return 2 * size * math.prod(left[i] for i in contracted)
    _, channels, *spatial = equation.params["dimension_numbers"].rhs_spec
    taps = right[channels] * math.prod(right[i] for i in spatial)
    return 2 * size * taps // math.prod(equation.params["lhs_dilation"])
