"""Tells what a training run costs before anything is rented.

    python -m unclip_jax.plan --config=configs/decoder.py:paper [--topology=v5p:4x4x4 [--quick]]
        [--sample | --evaluate] [--json]

Without --topology it counts parameters and FLOPs, from shapes alone, in seconds. With --topology it compiles the real
train step for those devices and tells what each chip holds, moves and sends, and how long a step takes at best. Where
the step does not fit, it searches for settings with which it does. --sample plans what `sample` runs for a file of
captions: 16 rows on each chip, on every host rows of its own. --config.mesh.fsdp=N is then `sample --fsdp N`.
--evaluate plans how held-out examples are drawn while a model trains, beside its state: train.draw_size of them, at
most 16 at once on each chip.

    v5p:4x4x4, v4:…, v5e:…, v6e:…       a slice of TPUs; needs jax[tpu], no TPU, and minutes to half an hour
    2xv5p:4x4x4                         two such slices, between which gradients alone are sent
    h100:8, h200:…, a100:…, l4:…, t4:…  GPUs of one machine; needs jax[cuda], no GPU, and seconds to minutes
    local                               this machine's own devices, on which a few steps on noise are timed

On GPUs the seconds are lower bounds from FLOPs and bytes alone, because nothing estimates a GPU's cycles.

A stage that needs a CLIP is planned with the one of clip.bundle, else of clip.config, else the one of configs/clip.py
whose embeddings have the size that the stage expects.
"""

import json
import math
from typing import Any

import jax
from ml_collections import ConfigDict

from unclip_jax import cli
from unclip_jax.errors import UserError
from unclip_jax.planning import flops, report
from unclip_jax.planning.cost import Target, find_target, plan_evaluation, plan_sampling, plan_training
from unclip_jax.planning.programs import checked_stage, train_program, train_step_flops
from unclip_jax.stages.base import trained

DEPTH = 2  # levels of parameter names by which the table tells parts of the model apart

FLAGS = {
    "topology": (str, "", "a TPU slice such as v5p:4x4x4, GPUs such as h100:8, or local"),
    "sample": (bool, False, "plan what `sample` runs for a file of captions, instead of the train step"),
    "evaluate": (bool, False, "plan what an evaluation in training runs, instead of the train step"),
    "quick": (bool, False, "leave out the TPU compiler's estimate of cycles, which takes most of the time"),
    "json": (bool, False, "print one JSON object instead of a table"),
}


def parse(argv: list[str]) -> "cli.FlagValues":
    """Reads the command line: FLAGS and `config`. Raises UserError for what is wrong with it."""
    return cli.parse(argv, FLAGS)


def main(argv: list[str]) -> int:
    flags = parse(argv)
    target = find_target(flags.topology)
    if flags.evaluate and (flags.sample or not target):
        raise UserError("--evaluate needs a --topology, and goes without --sample")
    found = plan(flags.config, target, flags.sample, flags.quick, flags.evaluate)
    print(json.dumps(found) if flags.json else report.table(found))
    return 0


def plan(
    config: ConfigDict, target: Target | None, sample: bool = False, quick: bool = False, evaluate: bool = False
) -> dict[str, Any]:
    """Plans a config's train step, or with `sample` its sampling, with `evaluate` its evaluation in training; returns
    the object that --json prints.

    target: as of `find_target`; None counts parameters and FLOPs alone. quick: as in `cost.plan_training`. Raises
    UserError for a config that training or the target would refuse.
    """
    if target and target.chip and not target.chip.peak_flops and config.dtype == "bfloat16":
        raise UserError(f"{target.name} does not compute in bfloat16: add --config.dtype=float32")
    shapes = jax.eval_shape(checked_stage(config).init, jax.random.key(0))
    parts = _count_by_part(shapes)
    found = {"stage": config.stage, "params": sum(parts.values()), "parts": parts}
    if evaluate and target:
        return found | plan_evaluation(config, target, quick)
    if sample:
        return found | plan_sampling(config, target, quick)
    if target is None:
        # Recomputed FLOPs are those of the real train step, which is traced here for one device.
        alone = config.copy_and_resolve_references().unlock()
        alone.mesh.update(dict(data=-1, fsdp=1))
        program = train_program(alone.lock(), jax.devices()[:1])
        counts = train_step_flops(config, shapes), flops.executed_flops(program.traced.jaxpr)
        return found | {"batch_size": config.train.batch_size} | report.flop_report(*counts, config.train.batch_size, 1)
    return found | plan_training(config, target, train_step_flops(config, shapes), quick)


def parameters(config: ConfigDict) -> dict[str, int]:
    """Counts the trained parameters of each part of a config's model; parts are named such as "unet/time"."""
    return _count_by_part(jax.eval_shape(checked_stage(config).init, jax.random.key(0)))


def _count_by_part(shapes: dict[str, Any]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(trained(shapes)):
        part = "/".join(str(entry.key) for entry in path[:DEPTH])
        counts[part] = counts.get(part, 0) + math.prod(leaf.shape)
    return counts


if __name__ == "__main__":
    cli.run(main)
