"""Plans one train step quickly and prints the plan as JSON: the process that `trial.run` starts for each attempt.

    python -m unclip_jax.planning CONFIG.json TOPOLOGY FLOPS

FLOPS: of one train step by the model's formula, which the parent process has already counted.
"""

import json

from unclip_jax import cli
from unclip_jax.planning.cost import find_target, plan_training


def main(argv: list[str]) -> int:
    _, file, topology, model_flops = argv
    config, target = cli.load_config(file), find_target(topology)
    print(json.dumps(plan_training(config, target, int(model_flops), quick=True, propose=False)))
    return 0


if __name__ == "__main__":
    cli.run(main)
