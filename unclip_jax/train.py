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
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from unclip_jax import cli, pictures
from unclip_jax.bundle import Bundle, check_params, load_bundle, save_bundle
from unclip_jax.config_checks import check_config, embedded
from unclip_jax.data.embeddings import EmbeddedSource, Provenance
from unclip_jax.data.pipeline import batches, evaluation_batch
from unclip_jax.data.sources import open_source
from unclip_jax.data.tokenizer import Tokenizer, train_tokenizer
from unclip_jax.data.transforms import ToExample
from unclip_jax.errors import UserError
from unclip_jax.models.mesh import jit_on_mesh
from unclip_jax.paths import output_folder, to_path, write_bytes
from unclip_jax.stages import Stage, make_stage
from unclip_jax.stages.base import trained
from unclip_jax.training import preflight
from unclip_jax.training.checkpoint import Checkpointer
from unclip_jax.training.metrics import SECONDS_BETWEEN_LINES, ExpectedLoss, MetricLogger, json_line
from unclip_jax.training.optimizer import learning_rate, make_optimizer
from unclip_jax.training.sharding import global_batch, make_mesh, replicated
from unclip_jax.training.state import (
    TrainState,
    abstract_state,
    digest,
    init_state,
    make_train_step,
    root_key,
    skipped,
    to_host,
)

TOKENIZER_CAPTIONS = 200_000  # more captions would not change a tokenizer's pieces

FLAGS = {
    "workdir": (str, None, "folder of the run, local or gs://"),
    "platform": (str, "", "tpu, gpu or cpu: run on nothing else; empty: on what is there"),
    "coordinator": (str, "", "HOST:PORT of process 0, where no cluster tells it"),
    "processes": (int, -1, "their number"),
    "process": (int, -1, "which of them this is, from 0"),
    "wait": (int, 300, "seconds in which all processes must have come"),
}


def parse(argv: list[str]):
    """Reads the command line: FLAGS and `config`. Raises UserError for what is wrong with it."""
    flags = cli.parse(argv, FLAGS)
    if not flags.workdir:
        raise UserError("no --workdir: give the folder that the run writes to, such as --workdir=runs/decoder")
    return flags


def main(argv: list[str]) -> int:
    flags = parse(argv)
    preflight.join(flags.coordinator, flags.processes, flags.process, flags.wait)
    preflight.check_platform(flags.platform)
    cli.enable_compilation_cache()
    try:
        report = run(flags.config, flags.workdir)
    except BaseException as error:
        if jax.process_count() > 1:
            preflight.end_all(error)
        raise
    if isinstance(report, signal.Signals):
        return exit_status(report)
    print(f"state sha256 {report['sha256']}")
    return 0


def exit_status(stopped_by: signal.Signals) -> int:
    """0 after SIGTERM, which is how machines are taken away in good order; 130 after Ctrl-C, as shells expect."""
    return 0 if stopped_by == signal.SIGTERM else 130


def run(config: ConfigDict, workdir: str) -> dict[str, Any] | signal.Signals:
    """Trains `config` to its last step and writes WORKDIR/bundle.

    Returns {"sha256" of the final state, "metrics" of the last evaluation}, or the signal that stopped the run, whose
    checkpoint is saved. Raises UserError, before any long work, where the config, the data or WORKDIR cannot work.
    """
    check_config(config, workdir)
    output_folder(workdir, "workdir")
    with _Stop() as stop:
        mesh = make_mesh(config.mesh)
        preflight.agree(preflight.facts(config.to_dict()))
        upstream = _upstream(config, workdir, mesh)
        if isinstance(upstream, signal.Signals):
            return upstream
        with preflight.Watchdog(config.train.watchdog_minutes) as watchdog:
            return _run(config, workdir, mesh, upstream, stop, watchdog)


def _run(config: ConfigDict, workdir: str, mesh, upstream: "Upstream", stop: "_Stop", watchdog: preflight.Watchdog):
    stage, optimizer, train_step = _assemble(config, upstream.stage, mesh)
    origin = _origin(config, stage)
    source = _open(config, config.data.split, upstream.identity)
    unseen = _open(config, config.data.eval_split, upstream.identity)
    tokenizer = _tokenizer(config, stage, source, workdir, origin)
    to_example = _to_example(config, stage, tokenizer, upstream.tokenizer)
    held_out = evaluation_batch(unseen, to_example, config.train.eval_size, config.train.seed)
    checkpointer = Checkpointer(workdir, config.train.keep, config.train.keep_every)
    preflight.agree({
        "newest checkpoint": checkpointer.latest_step(), "CLIP": upstream.identity, "examples": len(source),
        "tokenizer": hashlib.sha256(tokenizer.model_bytes).hexdigest() if tokenizer else "",
        "init.bundle": origin.identity if origin else "",
    })  # fmt: skip
    _write_config(config, workdir)

    state = checkpointer.restore_latest(abstract_state(stage, optimizer, mesh))
    start = int(state.step) if state else 0
    if state and state.skips.in_a_row >= config.train.max_skips:  # it is tried again, perhaps with another config
        state = state._replace(skips=jax.tree.map(jnp.zeros_like, state.skips))
    state = state or init_state(stage, optimizer, mesh, config.train.seed)
    frozen = jax.device_put(upstream.params if stage.runs_clip else {}, replicated(mesh))
    root = root_key(config.train.seed)
    evaluate = jit_on_mesh(stage.evaluate, mesh, stage.tpu_options, out_shardings=replicated(mesh))

    def look(step, params, raw=None):
        """Scalars of the held-out batch; its pictures go to WORKDIR/samples, those of the raw weights beside them."""
        key = jax.random.fold_in(root, 2**31 - 1)
        scalars, images = evaluate(params, frozen, held_out, key)
        scalars = {name: float(value) for name, value in scalars.items()}
        _record(workdir, step, scalars, {"": images, "_raw": evaluate(raw, frozen, held_out, key)[1] if raw else None})
        return scalars

    size = sum(leaf.size for leaf in jax.tree.leaves(trained(state.params)))
    _say(f"{config.stage}: {size:,} parameters on {mesh.size} {jax.default_backend()} device(s), from step {start}")
    if start == 0:
        if origin:
            _say(f"{config.stage}: starting from {config.init.bundle}")
            state = _with_params(state, origin.params)
        state = _prepared(state, stage, frozen, _first_batches(config, source, to_example, mesh))
    del origin  # its parameters need as much memory again
    steps, data = config.train.steps, _batches(config, source, to_example, start)
    expected = ExpectedLoss(config.train.expected_loss)
    with MetricLogger(workdir, steps, config.train.batch_size, start, to_path(workdir).name) as log:

        def tell(k, skips, metrics):
            """Logs step k, and says what is not as it should be."""
            expected.look(k, log.log(k, metrics)["loss"])
            told = skipped(skips, state.params, config.train.max_skips)
            if told:
                _say(f"warning: {told}")

        waiting = None  # of an earlier step, told once the next one is under way
        for k in range(start + 1, steps + 1):
            batch = global_batch(next(data), mesh)
            if k == start + 1:
                with log.pause():  # compilation
                    state, metrics = jax.block_until_ready(train_step(state, frozen, batch, root))
            else:
                state, metrics = train_step(state, frozen, batch, root)
            watchdog.beat()
            if waiting:
                tell(*waiting)
                waiting = None
            stopping = k == steps or stop.asked or checkpointer.preempted(k)
            if stopping or k % config.train.log_every == 0:
                # Copied, since the next step takes the state's own.
                waiting = (k, jax.tree.map(jnp.copy, state.skips), metrics)
            if k % config.train.sample_every == 0 and k < steps:
                with log.pause(metrics):
                    look(k, state.ema, state.params)
            if stopping or k % config.train.checkpoint_every == 0:
                with log.pause(metrics):
                    checkpointer.save(state, {"config": config.to_dict()})
            checkpointer.check()
            if stopping:
                tell(*waiting)
                break
    checkpointer.close()
    if int(state.step) < steps:
        _say(f"stopped at step {int(state.step)} of {steps}, saved: the same command goes on from there")
        return stop.asked or signal.SIGTERM
    finished, found = stage.finish(state.ema, frozen, held_out, jax.random.fold_in(root, 2**31 - 2))
    if found:
        _say("finished: " + ", ".join(f"{name} {float(value):.4g}" for name, value in found.items()))
    scalars = look(steps, finished)
    average = jax.tree.map(to_host, finished)
    if jax.process_index() == 0:
        model = tokenizer.model_bytes if tokenizer else None
        save_bundle(to_path(workdir) / "bundle", config.stage, config, average, model, upstream.identity, {})
    return {"sha256": digest(state), "metrics": scalars}


def _assemble(config: ConfigDict, clip: Stage | None, mesh):
    """The stage, its optimizer and its train step, from shapes alone. Raises UserError where they cannot fit."""
    stage = make_stage(config, clip, embedded(config))
    optimizer = make_optimizer(config.optim, config.train.steps)
    rate = learning_rate(config.optim, config.train.steps)
    return stage, optimizer, make_train_step(stage, optimizer, rate, config, mesh)


class Upstream(NamedTuple):
    """The CLIP that a stage is trained against; all empty for a stage that needs none."""

    stage: Stage | None
    params: Any
    tokenizer: Tokenizer | None
    identity: str


def _upstream(config: ConfigDict, workdir: str, mesh) -> Upstream | signal.Signals:
    """Loads `config.clip.bundle`, or trains `config.clip.config` first where no bundle is named; what stopped that."""
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
            for name in ("source", "data_dir", "split", "eval_split", "image_feature", "caption_feature", "threads"):
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


def _origin(config: ConfigDict, stage: Stage) -> Bundle | None:
    """The trained model that `config.init.bundle` names, its parameters made the stage's own; None: from scratch."""
    if "init" not in config or not config.init.bundle:
        return None
    folder = config.init.bundle
    bundle = load_bundle(folder)
    if bundle.stage != config.stage:
        raise UserError(f"init.bundle {folder} holds a model of stage {bundle.stage!r}, not {config.stage!r}")
    params = stage.adapt_params(bundle.params, bundle.config)
    check_params(params, jax.eval_shape(stage.init, jax.random.key(0)))
    return bundle._replace(params=params)


def _open(config: ConfigDict, split: str, clip_identity: str):
    d = config.data
    source = open_source(d.source, split, d.data_dir, d.image_feature, d.caption_feature)
    if not embedded(config):
        return source
    provenance = Provenance(clip_identity, d.source, d.image_feature, d.caption_feature)
    return EmbeddedSource(source, to_path(d.embeddings), provenance, split)


def _tokenizer(config: ConfigDict, stage: Stage, source, workdir: str, origin: Bundle | None) -> Tokenizer | None:
    """The stage's own tokenizer: that of the model it starts from, the file named, the one an earlier run left in
    WORKDIR, or a new one."""
    if "own" not in {owner for owner, _, _ in stage.texts.values()}:
        return None
    vocab_size = (config.model if "vocab_size" in config.model else config.model.text).vocab_size
    stored = to_path(workdir) / "tokenizer.model"
    named = to_path(config.data.tokenizer) if config.data.tokenizer else stored
    if origin:
        if stored.exists() and stored.read_bytes() != origin.tokenizer_bytes:
            raise UserError(f"{workdir} holds a run with another tokenizer than init.bundle's: give a new one")
        tokenizer = Tokenizer(origin.tokenizer_bytes)
    elif named.exists():
        tokenizer = Tokenizer(named.read_bytes())
    else:
        count = min(len(source), TOKENIZER_CAPTIONS)
        tokenizer = train_tokenizer((source[i]["caption"] for i in range(count)), vocab_size)
    if not named.exists() and jax.process_index() == 0:
        write_bytes(stored, tokenizer.model_bytes, alone=True)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"{named} has {tokenizer.vocab_size} pieces, more than the model's vocab_size={vocab_size}")
    return tokenizer


def _to_example(config: ConfigDict, stage: Stage, own: Tokenizer | None, clip: Tokenizer | None) -> ToExample:
    tokenizers = {"own": own, "clip": clip}
    texts = {name: (tokenizers[owner], context, ends) for name, (owner, context, ends) in stage.texts.items()}
    return ToExample(stage.images, texts, config.data.crop, stage.patch, stage.bsr_factor, stage.vectors)


def _batches(config: ConfigDict, source, to_example: ToExample, start: int):
    t = config.train
    processes = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    return batches(source, to_example, t.batch_size, t.seed, start, threads=config.data.threads, **processes)


def _first_batches(config: ConfigDict, source, to_example: ToExample, mesh):
    """Yields the first training batches for `Stage.prepare`; reads them when asked, and tells progress."""
    said = time.monotonic()
    for k, rows in enumerate(_batches(config, source, to_example, 0)):
        if time.monotonic() - said > SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            _say(f"{config.stage}: preparing, {k} training batches read")
        yield global_batch(rows, mesh)


def _prepared(state: TrainState, stage: Stage, frozen, batches) -> TrainState:
    """The state before step 1, with what the stage finds in training batches in its parameters and their average."""
    params, scalars = stage.prepare(state.params, frozen, batches)
    if params is state.params:
        return state
    _say("prepared: " + ", ".join(f"{name} {float(value):.4g}" for name, value in scalars.items()))
    return _with_params(state, params)


def _with_params(state: TrainState, params) -> TrainState:
    """The state before step 1 with other parameters, which are their average too."""
    params = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, state.params))
    return state._replace(params=params, ema=jax.tree.map(jnp.copy, params))


def _record(workdir: str, step: int, scalars: dict[str, float], images: dict[str, Any]) -> None:
    """Writes to WORKDIR/evaluation.jsonl, says it, and draws. images: end of a file's name → pictures, or None.

    A line of an earlier try at this step, or at a later one, gives way.
    """
    if jax.process_index() != 0:
        return
    folder = to_path(workdir)
    file = folder / "evaluation.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    lines = [line for line in lines if line["step"] < step] + [{"step": step} | scalars]
    write_bytes(file, "".join(map(json_line, lines)).encode(), alone=True)
    _say(f"held out, step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in scalars.items()))
    for end, pixels in images.items():
        if pixels is not None:
            file = folder / "samples" / f"step_{step:08d}{end}.png"
            write_bytes(file, pictures.png(pictures.grid(np.asarray(pixels))), alone=True)


def _write_config(config: ConfigDict, workdir: str) -> None:
    if jax.process_index() == 0:
        text = json.dumps({"config": config.to_dict(), "versions": preflight.versions()}, indent=2)
        write_bytes(to_path(workdir) / "config.json", text.encode() + b"\n", alone=True)


class _Stop:
    """Notes a first Ctrl-C or SIGTERM, so that the loop can save and leave; a second one acts at once.

    Of several processes none may stop alone: JAX then handles SIGTERM, and tells all of them the step to stop after.
    """

    asked: signal.Signals | None = None

    def __enter__(self):
        names = (signal.SIGINT, signal.SIGTERM) if jax.process_count() == 1 else ()
        self._handlers = {name: signal.signal(name, self._note) for name in names}
        return self

    def _note(self, number, frame):
        self.asked = signal.Signals(number)
        self._restore()
        _say("stopping after this step, to save it (once more: at once, without saving)")

    def _restore(self):
        for name, handler in self._handlers.items():
            signal.signal(name, handler)

    def __exit__(self, *error):
        self._restore()


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main)
