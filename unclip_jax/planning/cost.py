"""Plans a train step or a sampling for a target: traces, compiles and times it, and searches for settings that fit."""

import statistics
import sys
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from unclip_jax.model import CHUNK_ROWS
from unclip_jax.planning import flops, report, trial
from unclip_jax.planning.chips import GIB, Chip, known_chip, parse_topology, slice_devices
from unclip_jax.planning.compiling import Compiled, TooLarge, compiled
from unclip_jax.planning.estimate import estimate
from unclip_jax.planning.fitting import search, settings
from unclip_jax.planning.gpus import GPU_OPTIONS, gpu_devices
from unclip_jax.planning.local import memory_limit, seconds
from unclip_jax.planning.memory import lasting, split
from unclip_jax.planning.programs import Program, sample_program, train_program


class Target(NamedTuple):
    """Devices that a plan is for."""

    name: str  # of the chip
    topology: str  # as the command line has it
    devices: list  # to compile for; they need not exist
    chip: Chip | None  # None: nothing is known of its speed
    limit: int  # bytes that a program may use of each


def find_target(topology: str) -> Target | None:
    """Finds the devices that --topology names; None for "". Raises UserError where they cannot be had."""
    if topology == "local":
        kind = jax.devices()[0].device_kind
        return Target(kind, topology, jax.devices(), known_chip(kind), memory_limit())
    chip, count = parse_topology(topology) if topology else (None, 0)
    # Nothing runs but the tracing: an accelerator that is here is left to others.
    jax.config.update("jax_platforms", "cpu")
    if not chip:
        return None
    kind = topology.partition(":")[0]
    devices = slice_devices(topology) if chip.axes else gpu_devices(kind, count)
    return Target(kind, topology, devices, chip, round(chip.hbm_gib * GIB))


def training(config: ConfigDict, target: Target, count: int, quick: bool = False, propose: bool = True) -> dict:
    """The train step of `count` FLOPs; quick: as of `compiled`; propose: look for settings that fit if it does not."""
    _say(f"{config.stage}: tracing the train step for {len(target.devices)} x {target.name}")
    program = train_program(config, target.devices)
    batch, steps = config.train.batch_size, config.train.steps
    found = {"call": f"one train step of {batch} examples", "of": "step", "batch_size": batch, "steps": steps}
    found |= _call_cost(program, target, count, batch, quick)
    if "step_seconds" in found:
        found["days"] = steps * found["step_seconds"] / report.DAY
    elif propose:
        found |= _proposal(config, program, target, count, round(found["hbm_gib_per_chip"] * GIB))
    return found


def sampling(config: ConfigDict, target: Target | None, quick: bool = False) -> dict:
    """Plans what `sample` runs on one chip; without a target, its FLOPs alone."""
    _say(f"{config.stage}: tracing the sampling of {CHUNK_ROWS} rows")
    # Counted as the CPU has it, without what a TPU's kernels do in excess.
    count = flops.executed(sample_program(config, jax.devices("cpu")[0]).traced.jaxpr)
    if not target:
        return {"batch_size": CHUNK_ROWS} | report.flop_report(count, count, CHUNK_ROWS, 1)
    program = sample_program(config, target.devices[0])
    found = {"call": f"sampling {CHUNK_ROWS} rows", "of": "call", "batch_size": CHUNK_ROWS}
    return found | _call_cost(program, target._replace(devices=target.devices[:1]), count, CHUNK_ROWS, quick)


def _call_cost(program: Program, target: Target, count: int, examples: int, quick: bool) -> dict:
    """Plans one call of a program; count: its FLOPs on all chips, each done once."""
    chips = len(target.devices)
    executed = flops.executed(program.traced.jaxpr)
    found = {"device": target.name, "chips": chips} | report.flop_report(count, executed, examples, chips)
    least = sum(lasting(program).values())
    done = TooLarge(least, 0.0) if least > target.limit else _compiled(program, target, quick)
    if isinstance(done, TooLarge):
        found["compile_seconds"] = done.seconds
        return found | report.memory(lasting(program), max(done.hbm, target.limit + 1), target.limit)
    parts = split(program, done)
    found |= report.memory(parts, sum(parts.values()), target.limit) | report.program(done)
    if not found["fits"]:
        return found
    chip = target.chip and target.chip.computing_in(program.stage.config.dtype)
    best = estimate(done, chip, chips) if chip else None
    if target.topology == "local":
        taken, bound = statistics.median(seconds(program, done)), "measured"
    else:
        taken, bound = best.seconds, best.bound
    return found | report.timing(taken, bound, best, count / chips, examples, chip)


def _compiled(program: Program, target: Target, quick: bool) -> Compiled | TooLarge:
    platform = target.devices[0].platform
    options = GPU_OPTIONS if platform == "gpu" and target.topology != "local" else {}
    try:
        return compiled(program.traced, f"compiling for {target.topology}", platform == "tpu", quick, options)
    except TooLarge as refusal:
        return refusal


def _proposal(config: ConfigDict, program: Program, target: Target, count: int, needed: int) -> dict:
    """Settings that fit, as keys and values, with what they cost."""
    tried = {}

    def attempt(setting):
        changed = setting.changed(config)
        _say("it does not fit; trying " + " ".join(f"--config.{name}={value}" for name, value in changed.items()))
        new = setting.of(config)
        if target.topology == "local":
            tried[setting] = training(new, target, count, propose=False)
        else:
            tried[setting] = trial.run(new, target.topology, count)
        return round(tried[setting]["hbm_gib_per_chip"] * GIB)

    possible = settings(config, len(target.devices))
    fits = search(possible, lasting(program), needed, target.limit, attempt)
    return {"proposal": fits.changed(config), "proposed": tried[fits]} if fits else {"proposal": {}}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
