"""Tells what a training costs before anything is rented.

    python -m unclip_jax.plan --config=configs/decoder.py:paper [--topology=v5p:4x4x4 [--quick]] [--sample] [--json]

Without --topology: parameters and FLOPs, from shapes alone, in seconds. With a topology, the real train step is
compiled for it: what each chip holds, moves and sends, and how long a step takes at best. Where it does not fit, a
search proposes settings that do. --sample asks the same of what `sample` runs, on one chip.

    v5p:4x4x4, v4:…, v5e:…, v6e:…       a slice of TPUs; needs jax[tpu], no TPU, and minutes to half an hour
    h100:8, h200:…, a100:…, l4:…, t4:…  GPUs of one machine; needs jax[cuda], no GPU, and seconds to minutes
    local                               this machine's own devices, which run a few steps on noise and are timed

A GPU's seconds are bounds by FLOPs and by bytes; nothing estimates cycles.

A stage that needs a CLIP is planned with the one of clip.bundle, else of configs/clip.py with embeddings of its size.
"""

import json
import math

import jax
from ml_collections import ConfigDict

from unclip_jax import cli
from unclip_jax.errors import UserError
from unclip_jax.planning import flops, report
from unclip_jax.planning.cost import Target, find_target, sampling, training
from unclip_jax.planning.programs import assembled, train_program, trained_flops
from unclip_jax.stages.base import trained

DEPTH = 2  # levels of names that the table shows apart

FLAGS = {
    "topology": (str, "", "a TPU slice such as v5p:4x4x4, GPUs such as h100:8, or local"),
    "sample": (bool, False, "plan what `sample` runs on one chip, instead of the train step"),
    "quick": (bool, False, "leave out the TPU compiler's estimate of cycles, which takes most of the time"),
    "json": (bool, False, "print one JSON object instead of a table"),
}


def parse(argv: list[str]):
    """Reads the command line: FLAGS and `config`. Raises UserError for what is wrong with it."""
    return cli.parse(argv, FLAGS)


def main(argv: list[str]) -> int:
    flags = parse(argv)
    target = find_target(flags.topology)
    found = plan(flags.config, target, flags.sample, flags.quick)
    print(json.dumps(found) if flags.json else report.table(found))
    return 0


def plan(config: ConfigDict, target: Target | None, sample: bool = False, quick: bool = False) -> dict:
    """Returns what --json prints. Raises UserError for configs that training or the target would refuse."""
    if target and target.chip and not target.chip.flops and config.dtype == "bfloat16":
        raise UserError(f"{target.name} does not compute in bfloat16: add --config.dtype=float32")
    shapes = jax.eval_shape(assembled(config).init, jax.random.key(0))
    parts = _counted(shapes)
    found = {"stage": config.stage, "params": sum(parts.values()), "parts": parts}
    if sample:
        return found | sampling(config, target, quick)
    if target is None:
        alone = config.copy_and_resolve_references().unlock()
        alone.mesh.update(dict(data=-1, fsdp=1))
        program = train_program(alone.lock(), jax.devices()[:1])
        counts = trained_flops(config, shapes), flops.executed(program.traced.jaxpr)
        return found | {"batch_size": config.train.batch_size} | report.flop_report(*counts, config.train.batch_size, 1)
    return found | training(config, target, trained_flops(config, shapes), quick)


def parameters(config: ConfigDict) -> dict[str, int]:
    """Number of parameters of each part of the model, by the first names of their paths."""
    return _counted(jax.eval_shape(assembled(config).init, jax.random.key(0)))


def _counted(shapes) -> dict[str, int]:
    counts: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(trained(shapes)):
        part = "/".join(str(entry.key) for entry in path[:DEPTH])
        counts[part] = counts.get(part, 0) + math.prod(leaf.shape)
    return counts


if __name__ == "__main__":
    cli.run(main)
