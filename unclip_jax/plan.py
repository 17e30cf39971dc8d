"""What a config costs, known before anything is rented; for now its parameters.

    python -m unclip_jax.plan --config=configs/decoder.py:paper [--json]

Shapes alone are evaluated: nothing is allocated, and the largest model takes seconds.
"""

import json
import math

import jax
from ml_collections import ConfigDict

from unclip_jax import cli
from unclip_jax.stages import make_stage
from unclip_jax.stages.base import trained

DEPTH = 2  # levels of names that the table shows apart


def main(argv: list[str]) -> int:
    flags = cli.parse(argv, {"json": (bool, False, "print one JSON object instead of a table")})
    table = parameters(flags.config)
    total = sum(table.values())
    if flags.json:
        print(json.dumps({"stage": flags.config.stage, "params": total, "parts": table}))
        return 0
    width = max(map(len, table))
    for name, count in sorted(table.items(), key=lambda row: -row[1]):
        print(f"{name:{width}}  {count:>15,}  {100 * count / total:5.1f} %")
    print(f"{'total':{width}}  {total:>15,}")
    return 0


def parameters(config: ConfigDict) -> dict[str, int]:
    """Number of parameters of each part of the model, by the first names of their paths."""
    shapes = trained(jax.eval_shape(make_stage(config).init, jax.random.key(0)))
    counts: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        part = "/".join(str(entry.key) for entry in path[:DEPTH])
        counts[part] = counts.get(part, 0) + math.prod(leaf.shape)
    return counts


if __name__ == "__main__":
    cli.run(main)
