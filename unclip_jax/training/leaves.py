"""Leaves of a pytree by name: the "/"-joined path that optimizer masks, digests, checkpoints and bundles agree on."""

from typing import Any

import jax

LISTED = 20


def leaf_name(path: tuple) -> str:
    """Writes a key path of `jax.tree_util` as "text/block_0/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: Any) -> dict[str, Any]:
    """Collects every leaf of `tree` under its name, sorted by name.

    Raises ValueError where two leaves would share a name (a dict key that contains "/").
    """
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = leaf_name(path)
        if name in found:
            raise ValueError(f"two leaves are both named {name!r}: a key must not contain '/'")
        found[name] = leaf
    return dict(sorted(found.items()))


def differences(found: Any, expected: Any) -> str:
    """Names each leaf that `found` lacks, should not have, or holds in another shape than `expected`.

    Both are pytrees whose leaves have a `.shape`. "" when names and shapes agree; beyond `LISTED` leaves the others are
    only counted.
    """
    found, expected = named_leaves(found), named_leaves(expected)
    missing = [f"missing {name} {tuple(expected[name].shape)}" for name in expected if name not in found]
    unexpected = [f"unexpected {name} {tuple(found[name].shape)}" for name in found if name not in expected]
    misshapen = [
        f"{name} is {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected
        if name in found and tuple(found[name].shape) != tuple(expected[name].shape)
    ]
    lines = missing + unexpected + misshapen
    return "; ".join(lines[:LISTED] + ([f"and {len(lines) - LISTED} more"] if len(lines) > LISTED else []))
