"""FLOPs of traced functions, by the formulas of their matrix products and convolutions.

A product of m × k and k × n takes 2 m n k FLOPs, multiplications and additions. A convolution takes 2 × (taps of its
kernel) × (input channels of its kernel) for each number of its output; padding counts, zeros that dilation puts into
the input do not. All else (norms, softmax, Adam) is left out, as papers leave it out. The body of a scan counts once
per iteration.

In training a product is repeated once for each of its two operands that depends on trained inputs, to find that
operand's gradient: most products run three times in all, the usual "3 × forward". Values that are computed a second
time to save memory (remat) are no part of that.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

PRODUCTS = ("dot_general", "conv_general_dilated")
# Number of products within cuDNN's attention: two, and in its gradient the logits again and four more.
CUDNN = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}


def executed_flops(jaxpr: ClosedJaxpr | Jaxpr) -> int:
    """Counts the FLOPs of one call of a jaxpr as it stands, on all devices together.

    Raises ValueError for a product in a loop of unknown length.
    """
    jaxpr = _opened(jaxpr)
    return _walk(jaxpr, [False] * len(jaxpr.invars))[0]


def training_flops(jaxpr: ClosedJaxpr | Jaxpr, inputs: list[bool]) -> int:
    """Counts the FLOPs of a jaxpr that returns a loss, and of the loss's gradient.

    inputs: for each input of the jaxpr, whether it is trained, so that the gradient is taken by it. Raises ValueError
    for a product in a loop of unknown length.
    """
    return _walk(_opened(jaxpr), inputs)[0]


def _opened(jaxpr: Any) -> Any:
    """Returns the Jaxpr within a ClosedJaxpr; any other value, such as a Jaxpr, as it is."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _walk(jaxpr: Jaxpr, inputs: list[bool]) -> tuple[int, list[bool]]:
    """FLOPs of a jaxpr and of its gradient by trained inputs, and for each output whether it depends on these.

    inputs: for each input, whether it is trained, or depends on one that is.
    """
    depends = dict(zip(jaxpr.invars, inputs, strict=True))
    total = 0
    for equation in jaxpr.eqns:
        dependent = [not isinstance(v, Literal) and depends.get(v, False) for v in equation.invars]
        count, found = _equation(equation, dependent)
        total += count
        # Integers have no gradient.
        pairs = zip(equation.outvars, found, strict=True)
        depends |= {v: yes and jnp.issubdtype(v.aval.dtype, jnp.inexact) for v, yes in pairs}
    outputs = [not isinstance(v, Literal) and depends.get(v, False) for v in jaxpr.outvars]
    return total, outputs


def _equation(equation: JaxprEqn, dependent: list[bool]) -> tuple[int, list[bool]]:
    """FLOPs of one equation and of its gradient, and for each output whether it depends on trained inputs.

    dependent: for each operand, whether it depends on trained inputs.
    """
    name, params = equation.primitive.name, equation.params
    same = [any(dependent)] * len(equation.outvars)
    if name in PRODUCTS:  # the product itself, and one for the gradient by each dependent operand
        return (1 + sum(dependent)) * _product(equation), same
    if name == "stop_gradient":
        return 0, [False] * len(equation.outvars)
    if name == "scan":
        return _scan(equation, dependent)
    if name == "cond":
        branches = [_walk(_opened(branch), dependent[1:]) for branch in params["branches"]]
        return max(count for count, _ in branches), [any(d) for d in zip(*(d for _, d in branches), strict=True)]
    if name in CUDNN:
        (rows, length, heads, width), (_, keys, _, _) = (v.aval.shape for v in equation.invars[:2])
        return CUDNN[name] * 2 * rows * heads * length * keys * width, same
    inner = [_opened(value) for value in params.values() if hasattr(_opened(value), "eqns")]
    if name == "while":
        if any(executed_flops(body) for body in inner):
            raise ValueError("a while loop with products in it: nothing says how often it runs")
        return 0, same
    if name == "pallas_call":  # a kernel; its gradient is another kernel, which is taken to do twice the work
        return (3 if any(dependent) else 1) * math.prod(params["grid_mapping"].grid) * executed_flops(inner[0]), same
    if len(inner) == 1 and len(inner[0].invars) == len(dependent):  # a function call: jit, checkpoint, custom gradients
        count, found = _walk(inner[0], dependent)
        return _shards(params) * count if name == "shard_map" else count, found
    if any(executed_flops(body) for body in inner):
        raise ValueError(f"products within {name}: it is not known how often they run")
    return 0, same


def _shards(params: Mapping[str, Any]) -> int:
    """Number of devices that run the body of a shard_map. params: of its equation."""
    axes = next(value for name, value in params.items() if name.endswith("manual_axes"))  # JAX renames it now and then
    return math.prod(params["mesh"].shape[axis] for axis in axes)


def _scan(equation: JaxprEqn, dependent: list[bool]) -> tuple[int, list[bool]]:
    """Counts as `_equation` does, for a scan, whose carry depends on trained inputs once any iteration has made it so.

    A scan takes constants, carry and rows, in this order, and returns carry and rows. The parameter of the equation
    that counts them differs between versions of JAX; rows are recognised by the axis that the scan's body does not see.
    """
    body = _opened(equation.params["jaxpr"])
    carry = sum(_same_rank(equation.outvars, body.outvars))
    consts = sum(_same_rank(equation.invars, body.invars)) - carry
    carried = slice(consts, consts + carry)
    # Until no further part of the carry comes to depend on trained inputs.
    while True:
        count, found = _walk(body, dependent)
        grown = [a or b for a, b in zip(dependent[carried], found, strict=False)]
        if grown == dependent[carried]:
            return equation.params["length"] * count, found
        dependent = [*dependent[:consts], *grown, *dependent[carried.stop :]]


def _same_rank(outside: Sequence[Var | Literal], inside: Sequence[Var | Literal]) -> list[bool]:
    return [len(a.aval.shape) == len(b.aval.shape) for a, b in zip(outside, inside, strict=True)]


def _product(equation: JaxprEqn) -> int:
    """FLOPs of one matrix product or convolution."""
    left, right = (v.aval.shape for v in equation.invars)
    size = math.prod(equation.outvars[0].aval.shape)
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return 2 * size * math.prod(left[i] for i in contracted)
    _, channels, *spatial = equation.params["dimension_numbers"].rhs_spec
    taps = right[channels] * math.prod(right[i] for i in spatial)
    return 2 * size * taps // math.prod(equation.params["lhs_dilation"])
