"""Choice of the parameters that are trained: all, some, or only changes of low rank (LoRA, arXiv 2106.09685).

    W + A B      W (…, in, out): a kernel, as it was; A (…, in, r): normal, of variance 1 / in; B (…, r, out): zero

Of a convolution, `in` is each pixel of its window and each channel. A train state holds the factors beside the
parameters, under "lora"; the loss sees their sum, and so does the bundle, which is like any other.
"""

import difflib
import fnmatch
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from unclip_jax.arrays import Key, Params
from unclip_jax.errors import UserError
from unclip_jax.training.leaves import leaf_name, named_leaves

FACTORS = "lora"


def with_factors(params: Params, optim: ConfigDict, key: Key) -> Params:
    """Adds the factors A and B of `optim.lora_rank` to a model's parameters; none where it is 0.

    Kernels that `optim.frozen` names have none, nor have those without more inputs and outputs than the rank. Raises
    UserError where `optim.frozen` names what is not there, or nothing is left to be trained.
    """
    names = named_leaves(params)
    frozen = _named(optim.frozen, names)
    rank = optim.lora_rank
    kernels = {n: w for n, w in names.items() if n not in frozen and _inputs(n, w) > rank < w.shape[-1]}
    if not (kernels if rank else names.keys() - frozen):
        raise UserError(f"optim.frozen={tuple(optim.frozen)}, lora_rank={rank} leave no parameter to be trained")
    if not rank:
        return params
    factors: dict[str, Any] = {}
    for i, (name, kernel) in enumerate(kernels.items()):
        shape = (*kernel.shape[:-1], rank)
        A = jax.random.normal(jax.random.fold_in(key, i), shape) / math.sqrt(_inputs(name, kernel))
        # A stack of layers has a B each, a convolution one for its whole window.
        B = jnp.zeros((*(kernel.shape[:1] if kernel.ndim == 3 else ()), rank, kernel.shape[-1]))
        *folders, leaf = name.split("/")
        node = factors
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = {"A": A, "B": B}
    return params | {FACTORS: factors}


def trained_part(params: Params, optim: ConfigDict) -> Params:
    """Picks the parameters that are trained, in the same nesting: the factors where there are any, else those that are
    not frozen."""
    if FACTORS in params:
        return {FACTORS: params[FACTORS]}
    frozen = _named(optim.frozen, named_leaves(params))
    return _picked(params, lambda name: name not in frozen) if frozen else params


def changed(params: Params, optim: ConfigDict) -> Params:
    """Marks a model's parameters that training changes, themselves or by factors. params: shapes will do."""
    part = jax.eval_shape(lambda p: trained_part(with_factors(p, optim, jax.random.key(0)), optim), params)
    factors = {name.rpartition("/")[0] for name in named_leaves(part.get(FACTORS, {}))}
    names = factors or set(named_leaves(part))
    return jax.tree_util.tree_map_with_path(lambda path, _: leaf_name(path) in names, params)


def overlaid(params: Params, part: Params) -> Params:
    """Replaces what a part of the parameters has, as `trained_part` picks it, and keeps the others."""
    return params | {
        name: overlaid(params[name], value) if isinstance(value, dict) else value for name, value in part.items()
    }


def merged(params: Params) -> Params:
    """Adds the factors' products to their kernels: the parameters of the model itself."""
    model = {name: value for name, value in params.items() if name != FACTORS}
    return _added(model, params[FACTORS]) if FACTORS in params else model


def _added(model: Params, factors: Params) -> Params:
    def added(name: str, value: Any) -> Any:
        if name not in factors:
            return value
        found = factors[name]
        # In full precision, so that the bundle holds to the last digit what the loss saw.
        product = None if isinstance(value, dict) else jnp.matmul(found["A"], found["B"], precision="highest")
        return _added(value, found) if product is None else value + product

    return {name: added(name, value) for name, value in model.items()}


def _picked(params: Params, wanted: Callable[[str], bool], prefix: str = "") -> Params:
    """Leaves whose names are wanted, without the folders that this leaves empty."""
    found = {}
    for name, value in params.items():
        if isinstance(value, dict):
            if inner := _picked(value, wanted, f"{prefix}{name}/"):
                found[name] = inner
        elif wanted(prefix + name):
            found[name] = value
    return found


def _inputs(name: str, kernel: Any) -> int:
    """Numbers that a kernel multiplies for each output; 0 for a leaf that is no kernel."""
    if name.rpartition("/")[2] != "kernel":
        return 0
    return math.prod(kernel.shape[1:-1] if kernel.ndim == 3 else kernel.shape[:-1])  # 3: a stack of layers


def _named(patterns: Iterable[str], names: Iterable[str]) -> set[str]:
    """Names that patterns match as a whole, by a beginning up to a "/", or as a glob. Raises UserError for a pattern
    that matches none, with the nearest that would."""
    found: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}/")}
        if not matched:
            known = {"/".join(name.split("/")[:n]) for name in names for n in range(1, name.count("/") + 2)}
            nearest = difflib.get_close_matches(pattern, sorted(known), 1, 0)[0]
            raise UserError(f"optim.frozen: no parameter is named {pattern!r}; the nearest is {nearest!r}")
        found |= matched
    return found
