"""Trains one stage.

    python -m unclip_jax.train --config=configs/decoder.py:tiny --workdir=runs/decoder [--config.train.steps=20]

WORKDIR gets metrics.jsonl, TensorBoard events, pictures under samples/, checkpoints/, and at the end bundle/, the
averaged weights that `sample` reads. Stopped by Ctrl-C, SIGTERM or a crash, the same command goes on from the last
checkpoint. WORKDIR/config.json holds the whole config, and can be given as --config. The order of one turn of the loop:
dispatch the step, log the step before it, evaluate, save.

Several processes (a slice with many hosts, a cluster) run the same command: Cloud TPU and SLURM are detected, elsewhere
--coordinator, --processes and --process say who is who.
"""

import hashlib
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import FrameType
from typing import TypedDict

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from unclip_jax import cli
from unclip_jax.arrays import Batch, Params
from unclip_jax.bundle import check_params, load_bundle, save_bundle
from unclip_jax.config_checks import check_config, embedded
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.errors import UserError
from unclip_jax.held_out import HeldOut
from unclip_jax.inputs import Inputs, Upstream
from unclip_jax.origin import load_origin
from unclip_jax.paths import output_folder, owned, storage_errors, to_path, write_bytes
from unclip_jax.planning.chips import known_chip
from unclip_jax.planning.programs import train_step_flops
from unclip_jax.run_identity import changes, identity
from unclip_jax.stages import Stage, make_stage
from unclip_jax.stages.base import ClipTowers, Metrics, trained
from unclip_jax.training import preflight
from unclip_jax.training.checkpoint import Checkpointer, SaveClock
from unclip_jax.training.metrics import ExpectedLoss, MetricLogger
from unclip_jax.training.sharding import global_batch, make_mesh, replicated, to_host
from unclip_jax.training.state import (
    Skips,
    TrainState,
    abstract_state,
    digest,
    init_state,
    make_train_step,
    root_key,
    skipped,
)
from unclip_jax.training.tracking import Profiler, tracked
from unclip_jax.training.tuning import merged, trained_part


class Report(TypedDict):
    """Outcome of a finished run."""

    sha256: str  # of the final state
    metrics: dict[str, float]  # of the last evaluation

FLAGS = {
    "workdir": (str, None, "folder of the run, local or gs://"),
    "profile": (int, 0, "trace so many steps, from the eleventh on, into WORKDIR/profile, for xprof or TensorBoard"),
    "wandb": (str, "", "project of Weights & Biases that gets all metrics and pictures too"),
} | preflight.FLAGS


def parse(argv: list[str]) -> "cli.FlagValues":
    """Reads the command line: FLAGS and `config`. Other data than the config's own have no expected losses. Raises
    UserError for what is wrong with it."""
    flags = cli.parse(argv, FLAGS)
    if not flags.workdir:
        raise UserError("no --workdir: give the folder that the run writes to, such as --workdir=runs/decoder")
    if flags.profile < 0:
        raise UserError(f"--profile={flags.profile}: expected a number of steps, 1 or more, or 0 for no trace")
    # What losses to expect was seen on the config's own data.
    if "config.data.source" in flags and "config.train.expected_loss" not in flags:
        with flags.config.unlocked():
            flags.config.train.expected_loss = ()
    return flags


def main(argv: list[str]) -> int:
    flags = parse(argv)
    with preflight.joined(flags):
        cli.enable_compilation_cache()
        report = run(flags.config, flags.workdir, flags.profile, flags.wandb)
    if isinstance(report, signal.Signals):
        return exit_status(report)
    print(f"state sha256 {report['sha256']}")
    return 0


def exit_status(stopped_by: signal.Signals) -> int:
    """Exit status of a stopped run, as shells have it: 130 after Ctrl-C, 143 after SIGTERM. It is never 0, by which
    Kubernetes and SLURM know a run that is finished and need not be started again."""
    return 128 + stopped_by


def run(config: ConfigDict, workdir: str, profile: int = 0, wandb: str = "") -> Report | signal.Signals:
    """Trains `config` to its last step and writes WORKDIR/bundle. profile, wandb: as in FLAGS.

    Returns the report, or the signal that stopped the run, whose checkpoint is saved. Raises UserError, before any long
    work, where the config, the data or WORKDIR cannot work.
    """
    check_config(config, workdir)
    folder = output_folder(workdir, "workdir")
    kept = "the checkpoints there are kept: mend that and run the same command again"
    with storage_errors(workdir, kept), owned(folder) if jax.process_index() == 0 else nullcontext(), _Stop() as stop:
        mesh = make_mesh(config.mesh)
        preflight.agree(preflight.facts(config.to_dict()))
        upstream = _upstream(config, workdir, mesh)
        if isinstance(upstream, signal.Signals):
            return upstream
        with preflight.Watchdog(config.train.watchdog_minutes) as watchdog:
            return _run(config, workdir, mesh, upstream, stop, watchdog, profile, wandb)


def _run(
    config: ConfigDict, workdir: str, mesh: Mesh, upstream: Upstream, stop: "_Stop", watchdog: preflight.Watchdog,
    profile: int, wandb: str,
) -> Report | signal.Signals:
    # Everything that can be wrong is found here, before anything is computed.
    stage, train_step = _assemble(config, upstream.stage, mesh)
    origin = load_origin(config, stage, upstream.identity)
    inputs = Inputs.open(config, stage, upstream, workdir, origin, watchdog.beat)
    root = root_key(config.train.seed)
    held_out = HeldOut(config, stage, mesh, inputs.held_out, jax.random.fold_in(root, 2**31 - 1), workdir)
    tokenizer_bytes = inputs.tokenizer.model_bytes if inputs.tokenizer else None
    checkpointer = Checkpointer(workdir, config.train.keep, config.train.keep_every)
    found = {
        "CLIP": upstream.identity, "tokenizer": hashlib.sha256(tokenizer_bytes or b"").hexdigest(),
        "model of init.bundle": origin.identity if origin else "", **inputs.fingerprints,
    }  # fmt: skip
    preflight.agree({"newest checkpoint": checkpointer.latest_step(), **found})
    run_identity, before = identity(config, found), checkpointer.latest_meta() or {}
    for line in changes(before["run"], run_identity) if "run" in before else []:
        _say(f"{config.stage}: {line}")
    _write_config(config, workdir)

    # The state: of the newest checkpoint, or a fresh one.
    state = checkpointer.restore_latest(abstract_state(stage, config, mesh))
    start = int(state.step) if state else 0
    if state and state.skips.in_a_row >= config.train.max_skips:  # it is tried again, perhaps with another config
        state = state._replace(skips=jax.tree.map(jnp.zeros_like, state.skips))
    state = state or init_state(stage, config, mesh, config.train.seed)
    frozen = jax.device_put(upstream.params if stage.runs_clip else {}, replicated(mesh))

    # Before step 1: another model's parameters, and what the stage finds in training batches.
    size = sum(leaf.size for leaf in jax.tree.leaves(trained(state.ema)))
    devices = f"{mesh.size} {jax.default_backend()} device(s)"
    _say(f"{config.stage}: {size:,} parameters to train on {devices}, from step {start}")
    if start == 0:
        if origin:
            _say(f"{config.stage}: starting from {config.init.bundle}")
            state = _with_params(state, config, origin.params)
        else:
            state = _prepared(state, stage, config, frozen, inputs.first_batches(mesh))
    del origin  # its parameters need as much memory again
    steps, data = config.train.steps, inputs.batches(start, mesh)
    expected = ExpectedLoss(config.train.expected_loss)
    about = config.train.batch_size, start, to_path(workdir).name, _utilization(config, stage)
    profiler = Profiler(workdir, start, profile)
    with tracked(wandb, workdir, config), profiler, MetricLogger(workdir, steps, *about) as log:

        def log_step(k: int, skips: Skips, metrics: Metrics) -> None:
            """Logs step k; warns of skipped updates and of a loss outside of what is expected."""
            expected.look(k, log.log(k, metrics)["loss"])
            warning = skipped(skips, state.ema, config.train.max_skips)
            if warning:
                _say(f"warning: {warning}")

        clock = SaveClock(config.train.checkpoint_minutes, mesh)

        # Metrics are read one step late, once the next step is dispatched: reading them would wait for their own.
        waiting = None
        for k in range(start + 1, steps + 1):
            with log.waiting():
                rows = stop.unless_asked(lambda: next(data))
            if rows is None:
                checkpointer.save(state, {"run": run_identity})
                break
            batch = global_batch(rows, mesh)
            with profiler.step(k, state):
                if k == start + 1:
                    with log.pause():  # compilation
                        state, metrics = jax.block_until_ready(train_step(state, frozen, batch, root))
                else:
                    state, metrics = train_step(state, frozen, batch, root)
            watchdog.beat()
            if waiting:
                log_step(*waiting)
                waiting = None

            # What is due after this step. A stop is a checkpoint too.
            stopping = k == steps or stop.asked or checkpointer.preempted(k)
            if stopping or k % config.train.log_every == 0:
                # Copied, since the next step takes the state's own.
                waiting = (k, jax.tree.map(jnp.copy, state.skips), metrics)
            if k % config.train.sample_every == 0 and k < steps:
                with log.pause(metrics):
                    log.add_held_out(k, *held_out.measure(k, state.average, frozen, merged(state.params)))
            if clock.due(ask=k % config.train.log_every == 0) or stopping or k % config.train.checkpoint_every == 0:
                with log.pause(metrics):
                    checkpointer.save(state, {"run": run_identity})
                clock.restart()
            checkpointer.check()
            if stopping:
                break
        if waiting:
            log_step(*waiting)
        profiler.close(state)

        # The end: the stage completes its averaged parameters, which become the bundle.
        checkpointer.close()
        if int(state.step) < steps:
            _say(f"stopped at step {int(state.step)} of {steps}, saved: the same command goes on from there")
            return stop.asked or signal.SIGTERM
        if stage.finishes:
            _say(f"{config.stage}: completing the averaged parameters by held-out examples, which may take minutes")
        finished, found = held_out.finish(state.average, frozen)
        if found:
            _say("finished: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
        scalars, grids = held_out.measure(steps, finished, frozen)
        log.add_held_out(steps, scalars, grids)

    average = jax.tree.map(to_host, finished)
    if jax.process_index() == 0:
        folder = to_path(workdir) / "bundle"
        save_bundle(folder, config.stage, config, average, tokenizer_bytes, upstream.identity, {})
    return {"sha256": digest(state), "metrics": scalars}


def _assemble(config: ConfigDict, clip: ClipTowers | None, mesh: Mesh) -> tuple[Stage, Callable]:
    """Builds the stage and its train step, from shapes alone. Raises UserError where they do not fit each other."""
    stage = make_stage(config, clip, embedded(config))
    return stage, make_train_step(stage, config, mesh)


def _utilization(config: ConfigDict, stage: Stage) -> float:
    """Computes the share of the peak of all chips' FLOPs that one example a second takes; 0 for chips that are not
    known."""
    chip = known_chip(jax.devices()[0].device_kind)
    if chip is None:
        return 0.0
    flops = train_step_flops(config, jax.eval_shape(stage.init, jax.random.key(0))) / config.train.batch_size
    return flops / (jax.device_count() * chip.computing_in(config.dtype).peak_flops)


def _upstream(config: ConfigDict, workdir: str, mesh: Mesh) -> Upstream | signal.Signals:
    """Loads `config.clip.bundle`, or trains `config.clip.config` first where no bundle is named. Returns the signal if
    one stopped that training."""
    if "clip" not in config:
        return Upstream(None, {}, None, "")
    folder = config.clip.bundle
    if not folder:
        if not config.clip.config:
            raise UserError("clip.bundle is empty: name a trained CLIP: --config.clip.bundle=runs/clip/bundle")
        folder = to_path(workdir) / "clip" / "bundle"
        if not folder.exists():
            _say(f"no CLIP named by clip.bundle: training {config.clip.config} first, into {folder.parent}")
            clip_config = cli.load_config(config.clip.config)
            alike = ("source", "data_dir", "split", "eval_split", "image_feature", "caption_feature")
            for name in (*alike, "threads", "workers"):
                clip_config.data[name] = config.data[name]
            clip_config.mesh = config.mesh
            _assemble(config, make_stage(clip_config), mesh)  # what cannot fit is said before CLIP is trained
            report = run(clip_config, str(folder.parent))
            if isinstance(report, signal.Signals):
                return report
    bundle = load_bundle(folder)
    if bundle.stage != "clip":
        raise UserError(f"clip.bundle {folder} holds a model of stage {bundle.stage!r}, not a CLIP")
    stage = make_stage(bundle.config)
    check_params(bundle.params, jax.eval_shape(stage.init, jax.random.key(0)))
    return Upstream(stage, bundle.params, Tokenizer(bundle.tokenizer_bytes), bundle.identity)


def _prepared(
    state: TrainState, stage: Stage, config: ConfigDict, frozen: Params, batches: Iterator[Batch]
) -> TrainState:
    """Completes the state before step 1 by what the stage finds in training batches, in parameters and average."""
    params, scalars = stage.prepare(state.params, frozen, batches)
    if params is state.params:
        return state
    _say("prepared: " + ", ".join(f"{name} {float(value):.4g}" for name, value in scalars.items()))
    return _with_params(state, config, params)


def _with_params(state: TrainState, config: ConfigDict, params: Params) -> TrainState:
    """Replaces the model's parameters in the state before step 1, and their average."""
    params = state.params | params
    params = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, state.params))
    return state._replace(params=params, ema=jax.tree.map(jnp.copy, trained_part(params, config.optim)))


def _write_config(config: ConfigDict, workdir: str) -> None:
    if jax.process_index() == 0:
        text = json.dumps({"config": config.to_dict(), "versions": preflight.versions()}, indent=2)
        write_bytes(to_path(workdir) / "config.json", text.encode() + b"\n", alone=True)


class _Asked(BaseException):
    """A stop was asked while the loop waited for data. No Exception, which libraries of storage catch."""


class _Stop:
    """Notes a first Ctrl-C or SIGTERM, so that the loop can save and leave; a second one acts at once.

    Of several processes none may stop alone: JAX then handles SIGTERM, and tells all of them the step to stop after.
    """

    asked: signal.Signals | None = None
    _waiting = False

    def __enter__(self) -> "_Stop":
        names = (signal.SIGINT, signal.SIGTERM) if jax.process_count() == 1 else ()
        self._handlers = {name: signal.signal(name, self._note) for name in names}
        return self

    def unless_asked(self, wait: Callable[[], Batch]) -> Batch | None:
        """Returns what `wait` returns, which may hang, or None as soon as a stop is asked."""
        try:
            self._waiting = True
            return None if self.asked else wait()
        except _Asked:
            return None
        finally:
            self._waiting = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number)
        self._restore()
        _say("stopping after this step, to save it (once more: at once, without saving)")
        if self._waiting:
            raise _Asked

    def _restore(self) -> None:
        for name, handler in self._handlers.items():
            signal.signal(name, handler)

    def __exit__(self, *error: object) -> None:
        self._restore()


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main)
