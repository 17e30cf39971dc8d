"""What a training costs, known before anything is rented.

    python -m unclip_jax.plan --config=configs/decoder.py:paper [--topology=v5p:4x4x4] [--sample] [--json]

Without --topology: parameters and FLOPs, from shapes alone, in seconds. With a slice of v4, v5e, v5p or v6e, the real
train step is compiled for it: what each chip holds, moves and sends, and how long a step takes at best; where it does
not fit, under which settings it does. --sample asks the same of what `sample` runs, on one chip. This needs the TPU
compiler of jax[tpu], no TPU, and minutes to half an hour. --topology=local runs a few steps on this machine's own
devices instead, on noise, and times them.

A stage that needs a CLIP is planned with the one of clip.bundle, else of configs/clip.py with embeddings of its size.
"""

import json
import math
import statistics
import sys
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from unclip_jax import cli
from unclip_jax.model import ROWS
from unclip_jax.planning import flops, report
from unclip_jax.planning.chips import GIB, Chip, known_chip, parse_topology, slice_devices
from unclip_jax.planning.compiling import Compiled, TooLarge, compiled
from unclip_jax.planning.estimate import estimate
from unclip_jax.planning.fitting import search
from unclip_jax.planning.local import memory_limit, seconds
from unclip_jax.planning.memory import lasting, split
from unclip_jax.planning.programs import Program, assembled, sample_program, train_program, trained_flops
from unclip_jax.stages.base import trained

DEPTH = 2  # levels of names that the table shows apart


class Target(NamedTuple):
    """What a plan is for."""

    name: str  # of the chip
    devices: list  # to compile for; they need not exist
    chip: Chip | None  # None: nothing is known of its speed
    limit: int  # bytes that a program may use of each


def main(argv: list[str]) -> int:
    flags = cli.parse(
        argv,
        {
            "topology": (str, "", "a slice of v4, v5e, v5p or v6e, such as v5p:4x4x4; or local"),
            "sample": (bool, False, "plan what `sample` runs on one chip, instead of the train step"),
            "json": (bool, False, "print one JSON object instead of a table"),
        },
    )
    target = find_target(flags.topology)
    found = plan(flags.config, target, flags.sample)
    print(json.dumps(found) if flags.json else report.table(found))
    return 0


def find_target(topology: str) -> Target | None:
    """What --topology names. Raises UserError where it cannot be had."""
    if topology == "local":
        kind = jax.devices()[0].device_kind
        return Target(kind, jax.devices(), known_chip(kind), memory_limit())
    if topology:
        parse_topology(topology)
    # Nothing runs but the tracing: an accelerator that is here is left to others.
    jax.config.update("jax_platforms", "cpu")
    if not topology:
        return None
    chip, _ = parse_topology(topology)
    return Target(topology.partition(":")[0], slice_devices(topology), chip, round(chip.hbm_gib * GIB))


def plan(config: ConfigDict, target: Target | None, sample: bool = False) -> dict:
    """All that --json prints. Raises UserError for configs that training would refuse."""
    shapes = jax.eval_shape(assembled(config).init, jax.random.key(0))
    parts = _counted(shapes)
    found = {"stage": config.stage, "params": sum(parts.values()), "parts": parts}
    if sample:
        target = target or Target("", jax.devices()[:1], None, 0)
        return found | _sampling(config, target)
    if target is None:
        alone = config.copy_and_resolve_references().unlock()
        alone.mesh.update(dict(data=-1, fsdp=1))
        _say("counting")
        program = train_program(alone.lock(), jax.devices()[:1])
        counts = trained_flops(config, shapes), flops.executed(program.traced.jaxpr)
        return found | {"batch_size": config.train.batch_size} | report.work(*counts, config.train.batch_size, 1)
    return found | _training(config, target, trained_flops(config, shapes), propose=True)


def parameters(config: ConfigDict) -> dict[str, int]:
    """Number of parameters of each part of the model, by the first names of their paths."""
    return _counted(jax.eval_shape(assembled(config).init, jax.random.key(0)))


def _counted(shapes) -> dict[str, int]:
    counts: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(trained(shapes)):
        part = "/".join(str(entry.key) for entry in path[:DEPTH])
        counts[part] = counts.get(part, 0) + math.prod(leaf.shape)
    return counts


def _training(config: ConfigDict, target: Target, count: int, propose: bool) -> dict:
    """The train step of `count` FLOPs; propose: look for settings that fit if it does not."""
    _say(f"{config.stage}: tracing the train step for {len(target.devices)} x {target.name}")
    program = train_program(config, target.devices)
    batch, steps = config.train.batch_size, config.train.steps
    found = {"call": f"one train step of {batch} examples", "of": "step", "batch_size": batch, "steps": steps}
    found |= _called(program, target, count, batch)
    if "step_seconds" in found:
        found["days"] = steps * found["step_seconds"] / report.DAY
    elif propose:
        found |= _proposal(config, program, target, count, round(found["hbm_gib_per_chip"] * GIB))
    return found


def _sampling(config: ConfigDict, target: Target) -> dict:
    """What `sample` runs; without a chip, its FLOPs alone."""
    _say(f"{config.stage}: tracing the sampling of {ROWS} rows")
    program = sample_program(config, target.devices[0])
    count = flops.executed(program.traced.jaxpr)
    if not target.name:
        return {"batch_size": ROWS} | report.work(count, count, ROWS, 1)
    found = {"call": f"sampling {ROWS} rows", "of": "call", "batch_size": ROWS}
    return found | _called(program, target._replace(devices=target.devices[:1]), count, ROWS)


def _called(program: Program, target: Target, count: int, examples: int) -> dict:
    """What one call of a program costs; count: its FLOPs on all chips, each done once."""
    chips = len(target.devices)
    executed = flops.executed(program.traced.jaxpr)
    found = {"device": target.name, "chips": chips} | report.work(count, executed, examples, chips)
    done = _compiled(program, target)
    if isinstance(done, TooLarge):
        found["compile_seconds"] = done.seconds
        return found | report.memory(lasting(program), max(done.hbm, target.limit + 1), target.limit)
    found |= report.memory(split(program, done), done.hbm, target.limit) | report.program(done)
    if not found["fits"]:
        return found
    best = estimate(done, target.chip, chips) if target.chip else None
    if target.devices[0] in jax.devices():
        taken, bound = statistics.median(seconds(program, done)), "measured"
    else:
        taken, bound = best.seconds, best.bound
    return found | report.timing(taken, bound, best, count / chips, examples, target.chip)


def _compiled(program: Program, target: Target) -> Compiled | TooLarge:
    tpu = target.devices[0].platform == "tpu"
    try:
        return compiled(program.traced, f"compiling for {target.name}", tpu)
    except TooLarge as refusal:
        return refusal


def _proposal(config: ConfigDict, program: Program, target: Target, count: int, needed: int) -> dict:
    """Settings that fit, as keys and values, with what they cost."""
    tried = {}

    def attempt(setting):
        changed = setting.changed(config)
        _say("it does not fit; trying " + " ".join(f"--config.{name}={value}" for name, value in changed.items()))
        tried[setting] = _training(setting.of(config), target, count, propose=False)
        return round(tried[setting]["hbm_gib_per_chip"] * GIB)

    fits = search(config, len(target.devices), lasting(program), needed, target.limit, attempt)
    return {"proposal": fits.changed(config), "proposed": tried[fits]} if fits else {"proposal": {}}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main)
