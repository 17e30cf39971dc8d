"""Plans one train step quickly and prints the plan as JSON: the process that `trial.run` starts for each attempt.

    python -m unclip_jax.planning CONFIG.json TOPOLOGY FLOPS

FLOPS: of one train step by the model's formula, which the parent process has already counted.
"""

import json

from unclip_jax import cli
from unclip_jax.planning.cost import find_target, training


def main(argv: list[str]) -> int:
    _, file, topology, count = argv
    print(json.dumps(training(cli.load_config(file), find_target(topology), int(count), quick=True, propose=False)))
    return 0


if __name__ == "__main__":
    cli.run(main)
