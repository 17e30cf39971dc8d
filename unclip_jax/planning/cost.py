"""Plans a train step or a sampling call: traces, compiles and times it, and searches for settings that fit."""

import statistics
import sys
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from unclip_jax.model import CHUNK_ROWS
from unclip_jax.planning import flops, report, trial
from unclip_jax.planning.chips import GIB, Chip, known_chip, parse_slices, parse_topology, slice_devices
from unclip_jax.planning.compiling import Compiled, TooLarge, compile_program
from unclip_jax.planning.estimate import estimate
from unclip_jax.planning.fitting import Setting, find_setting, possible_settings
from unclip_jax.planning.gpus import GPU_OPTIONS, gpu_devices
from unclip_jax.planning.local import memory_limit, time_calls
from unclip_jax.planning.memory import memory_parts, resident_bytes
from unclip_jax.planning.programs import Program, evaluate_program, sample_program, train_program


class Target(NamedTuple):
    """Devices that a plan is for."""

    name: str  # of one chip, such as "v5p", or what JAX calls a device of this machine
    topology: str  # as on the command line, such as "v5p:4x4x4", or "local"
    devices: list[jax.Device]  # to compile for; they need not exist
    chip: Chip | None  # None: the chip is not known, such as a CPU
    limit: int  # bytes that a program may use on each device


def find_target(topology: str) -> Target | None:
    """Finds the devices that the flag --topology names; None for "".

    Raises UserError for a topology that does not exist and where its compiler is not installed.
    """
    if topology == "local":
        kind = jax.devices()[0].device_kind
        return Target(kind, topology, jax.devices(), known_chip(kind), memory_limit())
    chip, count = parse_topology(topology) if topology else (None, 0)
    # Only tracing happens on this machine's own devices, so an accelerator that it has is left to others.
    jax.config.update("jax_platforms", "cpu")
    if not chip:
        return None
    kind = parse_slices(topology)[1]
    devices = slice_devices(topology) if chip.slice_axes else gpu_devices(kind, count)
    return Target(kind, topology, devices, chip, round(chip.hbm_gib * GIB))


def plan_training(
    config: ConfigDict, target: Target, model_flops: int, quick: bool = False, propose: bool = True
) -> dict[str, Any]:
    """Plans a config's train step on the devices of a target; returns its part of what --json prints.

    model_flops: of the step by the model's formula, on all chips together. quick: without an estimate of cycles, which
    `compile_program` explains. propose: where the step does not fit, search for settings with which it does.
    """
    _say(f"{config.stage}: tracing the train step for {len(target.devices)} x {target.name}")
    program = train_program(config, target.devices)
    batch, steps = config.train.batch_size, config.train.steps
    found = {"call": f"one train step of {batch} examples", "of": "step", "batch_size": batch, "steps": steps}
    found |= _call_cost(program, target, model_flops, batch, quick)
    if "step_seconds" in found:
        found["days"] = steps * found["step_seconds"] / report.DAY
    elif propose:
        found |= _proposal(config, program, target, model_flops, round(found["hbm_gib_per_chip"] * GIB))
    return found


def plan_evaluation(config: ConfigDict, target: Target, quick: bool = False) -> dict[str, Any]:
    """Plans what an evaluation in training runs beside the train state (`evaluate_program`); as `plan_training`."""
    _say(f"{config.stage}: tracing an evaluation for {len(target.devices)} x {target.name}")
    program = evaluate_program(config, target.devices)
    rows = jax.tree.leaves(program.arguments[2])[0].shape[0]
    alone = config.copy_and_resolve_references().unlock()
    alone.mesh.update(dict(data=-1, fsdp=1))
    # Counted in the program for a CPU, because a TPU's kernels do some work in excess.
    counted = evaluate_program(alone.lock(), jax.devices("cpu")[:1])
    share = rows / jax.tree.leaves(counted.arguments[2])[0].shape[0]
    model_flops = round(share * flops.executed_flops(counted.traced.jaxpr))
    found = {"call": f"evaluating {rows} held-out examples", "of": "call", "batch_size": rows}
    return found | _call_cost(program, target, model_flops, rows, quick)


def plan_sampling(config: ConfigDict, target: Target | None, quick: bool = False) -> dict[str, Any]:
    """Plans what the command `sample` runs for a file of captions; without a target, counts its FLOPs alone.

    Each host of a target draws rows of its own, CHUNK_ROWS on each of its chips, so one host's program is planned.

    Returns its part of what --json prints. quick: as in `plan_training`. Raises UserError if the stage draws nothing.
    """
    devices = target.devices if target else jax.devices("cpu")[:1]
    devices = [device for device in devices if device.process_index == devices[0].process_index]
    rows = CHUNK_ROWS * len(devices)
    _say(f"{config.stage}: tracing the sampling of {rows} rows")
    # Counted in the program for a CPU, because a TPU's kernels do some work in excess.
    alone = config.copy_and_resolve_references().unlock()
    alone.mesh.update(dict(data=-1, fsdp=1))
    program = sample_program(alone.lock(), jax.devices("cpu")[:1], CHUNK_ROWS)
    model_flops = len(devices) * flops.executed_flops(program.traced.jaxpr)
    if not target:
        return {"batch_size": rows} | report.flop_report(model_flops, model_flops, rows, 1)
    hosts = len(target.devices) // len(devices)
    found = {"call": f"sampling {rows} rows", "of": "call", "batch_size": rows, "hosts": hosts}
    program = sample_program(config, devices, CHUNK_ROWS)
    found |= _call_cost(program, target._replace(devices=devices), model_flops, rows, quick)
    if "examples_per_second" in found:
        found["examples_per_second"] *= hosts
    return found


def _call_cost(program: Program, target: Target, model_flops: int, examples: int, quick: bool) -> dict[str, Any]:
    """Plans one call of a program, which processes so many examples on all devices of the target."""
    chips = len(target.devices)
    executed = flops.executed_flops(program.traced.jaxpr)
    found = {"device": target.name, "chips": chips}
    found |= report.flop_report(model_flops, executed, examples, chips)

    # A program whose arguments alone are too large is not compiled.
    resident = resident_bytes(program)
    least = sum(resident.values())
    done = TooLarge(least, 0.0) if least > target.limit else _compiled(program, target, quick)
    if isinstance(done, TooLarge):
        found["compile_seconds"] = done.compile_seconds
        return found | report.memory_report(resident, max(done.hbm, target.limit + 1), target.limit)
    parts = memory_parts(program, done)
    found |= report.memory_report(parts, sum(parts.values()), target.limit) | report.program_report(done)
    if not found["fits"]:
        return found

    # Seconds are measured on devices that are there, and estimated for all others.
    chip = target.chip and target.chip.computing_in(program.stage.config.dtype)
    best = estimate(done, chip, chips) if chip else None
    if target.topology == "local":
        seconds, bound = statistics.median(time_calls(program, done)), "measured"
    else:
        seconds, bound = best.seconds, best.bound
    return found | report.timing_report(seconds, bound, best, model_flops / chips, examples, chip)


def _compiled(program: Program, target: Target, quick: bool) -> Compiled | TooLarge:
    """Compiles a program for a target, or returns the compiler's refusal."""
    platform = target.devices[0].platform
    options = GPU_OPTIONS if platform == "gpu" and target.topology != "local" else {}
    try:
        return compile_program(program.traced, f"compiling for {target.topology}", platform == "tpu", quick, options)
    except TooLarge as refusal:
        return refusal


def _proposal(
    config: ConfigDict, program: Program, target: Target, model_flops: int, needed: int
) -> dict[str, dict[str, Any]]:
    """Searches for settings that fit, as "proposal" (config key → value, {} if none), and their plan as "proposed".

    program: the train step, which does not fit. needed: bytes that it needs on each chip.
    """
    tried: dict[Setting, dict[str, Any]] = {}

    def attempt(setting: Setting) -> int:
        overrides = setting.overrides(config)
        _say("it does not fit; trying " + " ".join(f"--config.{name}={value}" for name, value in overrides.items()))
        new = setting.applied_to(config)
        if target.topology == "local":
            tried[setting] = plan_training(new, target, model_flops, propose=False)
        else:
            tried[setting] = trial.run(new, target.topology, model_flops)
        return round(tried[setting]["hbm_gib_per_chip"] * GIB)

    possible = possible_settings(config, len(target.devices))
    fits = find_setting(possible, resident_bytes(program), needed, target.limit, attempt)
    return {"proposal": fits.overrides(config), "proposed": tried[fits]} if fits else {"proposal": {}}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
