"""Trains one stage.

    python -m unclip_jax.train --config=configs/decoder.py:tiny --workdir=runs/decoder [--config.train.steps=20]

WORKDIR gets metrics.jsonl, TensorBoard events, pictures under samples/, checkpoints/, and at the end bundle/, the
averaged weights that `sample` reads. Stopped by Ctrl-C, SIGTERM or a crash, the same command goes on from the last
checkpoint. The order of one turn of the loop: dispatch the step, log the step before it, evaluate, save.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from unclip_jax import cli, pictures
from unclip_jax.bundle import Bundle, check_params, load_bundle, save_bundle
from unclip_jax.data.embeddings import EmbeddedSource, Provenance
from unclip_jax.data.pipeline import batches, evaluation_batch
from unclip_jax.data.sources import open_source
from unclip_jax.data.tokenizer import Tokenizer, train_tokenizer
from unclip_jax.data.transforms import CROPS, ToExample
from unclip_jax.diffusion.process import PREDICTS
from unclip_jax.diffusion.schedule import make_schedule, respace
from unclip_jax.errors import UserError
from unclip_jax.stages import Stage, make_stage
from unclip_jax.stages.base import trained
from unclip_jax.training.checkpoint import Checkpointer
from unclip_jax.training.metrics import SECONDS_BETWEEN_LINES, MetricLogger
from unclip_jax.training.optimizer import learning_rate, make_optimizer
from unclip_jax.training.sharding import global_batch, make_mesh, replicated
from unclip_jax.training.state import (
    TrainState,
    abstract_state,
    digest,
    init_state,
    make_train_step,
    root_key,
    whole,
)

SAMPLERS = ("ddpm", "ddim", "analytic")
DEGRADATIONS = ("blur", "bsr")
TOKENIZER_CAPTIONS = 200_000  # more captions would not change a tokenizer's pieces


def main(argv: list[str]) -> int:
    flags = cli.parse(argv, {"workdir": (str, None, "folder of the run")})
    if not flags.workdir:
        raise UserError("no --workdir: give the folder that the run writes to, such as --workdir=runs/decoder")
    cli.enable_compilation_cache()
    report = run(flags.config, flags.workdir)
    if report is None:
        return 130
    print(f"state sha256 {report['sha256']}")
    return 0


def run(config: ConfigDict, workdir: str) -> dict[str, Any] | None:
    """Trains `config` to its last step and writes WORKDIR/bundle.

    Returns {"sha256" of the final state, "metrics" of the last evaluation}, or None when a signal stopped the run and
    its checkpoint is saved. Raises UserError, before any long work, where the config, the data or WORKDIR cannot work.
    """
    check_config(config, workdir)
    mesh = make_mesh(config.mesh)
    upstream = _upstream(config, workdir, mesh)
    stage, optimizer, train_step = _assemble(config, upstream.stage, mesh)
    origin = _origin(config, stage)
    source = _open(config, config.data.split, upstream.identity)
    unseen = _open(config, config.data.eval_split, upstream.identity)
    tokenizer = _tokenizer(config, stage, source, workdir, origin)
    to_example = _to_example(config, stage, tokenizer, upstream.tokenizer)
    held_out = evaluation_batch(unseen, to_example, config.train.eval_size, config.train.seed)

    checkpointer = Checkpointer(workdir, config.train.keep)
    state = checkpointer.restore_latest(abstract_state(stage, optimizer, mesh))
    start = int(state.step) if state else 0
    state = state or init_state(stage, optimizer, mesh, config.train.seed)
    frozen = jax.device_put(upstream.params if stage.runs_clip else {}, replicated(mesh))
    root = root_key(config.train.seed)
    evaluate = jax.jit(stage.evaluate)

    def look(params, step):
        """Scalars of the held-out batch; its pictures go to WORKDIR/samples."""
        scalars, images = evaluate(params, frozen, held_out, jax.random.fold_in(root, 2**31 - 1))
        scalars = {name: float(value) for name, value in scalars.items()}
        _record(workdir, step, scalars, images)
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
    with MetricLogger(workdir, steps, config.train.batch_size, start, Path(workdir).name) as log, _Stop() as stop:
        waiting = None  # metrics of an earlier step, logged once the next one is under way
        for k in range(start + 1, steps + 1):
            batch = global_batch(next(data), mesh)
            if k == start + 1:
                with log.pause():  # compilation
                    state, metrics = jax.block_until_ready(train_step(state, frozen, batch, root))
            else:
                state, metrics = train_step(state, frozen, batch, root)
            if waiting:
                log.log(*waiting)
                waiting = None
            stopping = k == steps or stop.asked or checkpointer.preempted(k)
            if stopping or k % config.train.log_every == 0:
                waiting = (k, metrics | {"records_skipped": data.skipped})
            if k % config.train.sample_every == 0 and k < steps:
                with log.pause(metrics):
                    look(state.ema, k)
            if stopping or k % config.train.checkpoint_every == 0:
                with log.pause(metrics):
                    checkpointer.save(state, {"config": config.to_dict()})
            checkpointer.check()
            if stopping:
                log.log(*waiting)
                break
    checkpointer.close()
    if int(state.step) < steps:
        _say(f"stopped at step {int(state.step)} of {steps}, saved: the same command goes on from there")
        return None
    finished, found = stage.finish(state.ema, frozen, held_out, jax.random.fold_in(root, 2**31 - 2))
    if found:
        _say("finished: " + ", ".join(f"{name} {float(value):.4g}" for name, value in found.items()))
    scalars = look(finished, steps)
    average = jax.tree.map(whole, finished)
    if jax.process_index() == 0:
        model = tokenizer.model_bytes if tokenizer else None
        save_bundle(os.path.join(workdir, "bundle"), config.stage, config, average, model, upstream.identity, {})
    return {"sha256": digest(state), "metrics": scalars}


def check_config(config: ConfigDict, workdir: str) -> None:
    """Raises UserError for contradictions that can be seen without data or devices."""
    for name in ("steps", "batch_size", "log_every", "checkpoint_every", "sample_every", "eval_size"):
        if config.train[name] < 1:
            raise UserError(f"train.{name} is {config.train[name]}: expected at least 1")
    if not config.data.source:
        raise UserError("data.source is empty: name a dataset, such as --config.data.source=folder:/my/pictures")
    if config.data.crop not in CROPS:
        raise UserError(f"data.crop is {config.data.crop!r}: expected one of {', '.join(CROPS)}")
    if _embedded(config) and config.data.crop != "center":
        raise UserError(f"data.crop is {config.data.crop!r}, but embeddings are of a picture's middle: expected center")
    if _embedded(config) and not config.clip.bundle:
        raise UserError("data.embeddings is set, but not the CLIP that made them: name it by clip.bundle")
    named = config.data.tokenizer if "tokenizer" in config.data else ""
    if named and not epath.Path(named).exists():
        raise UserError(f"data.tokenizer {named} does not exist: name a sentencepiece model, or leave it empty")
    if "init" in config and config.init.bundle:
        if named:
            raise UserError("data.tokenizer is set, but a model keeps the tokenizer of its init.bundle: leave it empty")
        if Path(config.init.bundle).expanduser().resolve() == Path(workdir).expanduser().resolve() / "bundle":
            raise UserError(f"init.bundle {config.init.bundle} is of this same workdir: give the new model another")
    if "://" in workdir:
        raise UserError(f"workdir {workdir} is no local folder: give one, and copy its bundle/ where you want it")
    cli.output_folder(workdir, "workdir")
    if config.stage == "clip" and config.optim.accumulate > 1:
        raise UserError("optim.accumulate must be 1 for clip: its loss compares all pairs of the batch")
    if config.stage == "clip" and config.optim.sam_rho:
        rho, rows = config.optim.sam_rho, config.optim.sam_rows
        if rho < 0 or rows < 1 or config.train.batch_size % rows:
            raise UserError(f"optim.sam_rho={rho}, sam_rows={rows}: expected a positive step and rows that divide "
                            f"train.batch_size={config.train.batch_size}")  # fmt: skip
    if config.dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype is {config.dtype!r}: expected float32 or bfloat16")
    _check_widths("model", config.model)
    if "diffusion" in config:
        _check_diffusion(config)
    if config.stage == "upsampler":
        m = config.model
        smallest = m.factor * 2 ** (len(m.unet.channel_mult) - 1)
        if m.patch > m.image_size or m.patch % smallest:
            raise UserError(f"model.patch is {m.patch}: expected a multiple of {smallest}, at most {m.image_size}")
        if config.diffusion.degradation not in DEGRADATIONS:
            known = ", ".join(DEGRADATIONS)
            raise UserError(f"diffusion.degradation is {config.diffusion.degradation!r}: expected one of {known}")


def _check_widths(name: str, section: ConfigDict) -> None:
    """Heads and groups must share out the channels evenly, in this section and those within it."""
    if "width" in section and "heads" in section and section.width % section.heads:
        raise UserError(f"{name}.width={section.width} must be a multiple of {name}.heads={section.heads}")
    if "norm_groups" in section:
        for part in ("norm_groups", "head_channels"):
            if section.get(part) and section.channels % section[part]:
                raise UserError(f"{name}.channels={section.channels} must be a multiple of {part}={section[part]}")
    for key, value in section.items():
        if isinstance(value, ConfigDict):
            _check_widths(f"{name}.{key}", value)


def _check_diffusion(config: ConfigDict) -> None:
    d, s = config.diffusion, config.sampling
    try:
        respace(make_schedule(d.schedule, d.timesteps), s.steps)
    except ValueError as error:
        raise UserError(f"diffusion or sampling: {error}") from error
    if d.predicts not in PREDICTS:
        raise UserError(f"diffusion.predicts is {d.predicts!r}: expected one of {', '.join(PREDICTS)}")
    if d.snr_clip and d.predicts != "x0":
        raise UserError("diffusion.snr_clip weighs errors of x0: set it to () where diffusion.predicts is eps")
    if s.sampler not in SAMPLERS:
        raise UserError(f"sampling.sampler is {s.sampler!r}: expected one of {', '.join(SAMPLERS)}")
    if s.sampler == "analytic" and config.stage != "prior_diffusion":
        raise UserError(f"sampling.sampler is 'analytic', which {config.stage} does not estimate variances for: "
                        "expected ddpm or ddim")  # fmt: skip


def _assemble(config: ConfigDict, clip: Stage | None, mesh):
    """The stage, its optimizer and its train step, from shapes alone. Raises UserError where they cannot fit."""
    stage = make_stage(config, clip, _embedded(config))
    optimizer = make_optimizer(config.optim, config.train.steps)
    rate = learning_rate(config.optim, config.train.steps)
    return stage, optimizer, make_train_step(stage, optimizer, rate, config, mesh)


class Upstream(NamedTuple):
    """The CLIP that a stage is trained against; all empty for a stage that needs none."""

    stage: Stage | None
    params: Any
    tokenizer: Tokenizer | None
    identity: str


def _upstream(config: ConfigDict, workdir: str, mesh) -> Upstream:
    """Loads `config.clip.bundle`, or trains `config.clip.config` first where no bundle is named."""
    if "clip" not in config:
        return Upstream(None, {}, None, "")
    folder = config.clip.bundle
    if not folder:
        if not config.clip.config:
            raise UserError("clip.bundle is empty: name a trained CLIP: --config.clip.bundle=runs/clip/bundle")
        folder = os.path.join(workdir, "clip", "bundle")
        if not os.path.exists(folder):
            _say(f"no CLIP named by clip.bundle: training {config.clip.config} first, into {os.path.dirname(folder)}")
            clip_config = cli.load_config(config.clip.config)
            for name in ("source", "data_dir", "split", "eval_split", "image_feature", "caption_feature", "threads"):
                clip_config.data[name] = config.data[name]
            clip_config.mesh = config.mesh
            _assemble(config, make_stage(clip_config), mesh)  # what cannot fit is said before CLIP is trained
            if run(clip_config, os.path.join(workdir, "clip")) is None:
                raise UserError("stopped while training CLIP: the same command goes on from there")
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
    params = stage.adopted(bundle.params, bundle.config)
    check_params(params, jax.eval_shape(stage.init, jax.random.key(0)))
    return bundle._replace(params=params)


def _embedded(config: ConfigDict) -> bool:
    return "embeddings" in config.data and bool(config.data.embeddings)


def _open(config: ConfigDict, split: str, clip_identity: str):
    d = config.data
    source = open_source(d.source, split, os.path.expanduser(d.data_dir), d.image_feature, d.caption_feature)
    if not _embedded(config):
        return source
    provenance = Provenance(clip_identity, d.source, d.image_feature, d.caption_feature)
    return EmbeddedSource(source, Path(d.embeddings).expanduser(), provenance, split)


def _tokenizer(config: ConfigDict, stage: Stage, source, workdir: str, origin: Bundle | None) -> Tokenizer | None:
    """The stage's own tokenizer: that of the model it starts from, the file named, the one an earlier run left in
    WORKDIR, or a new one."""
    if "own" not in {owner for owner, _, _ in stage.texts.values()}:
        return None
    vocab_size = (config.model if "vocab_size" in config.model else config.model.text).vocab_size
    stored = epath.Path(workdir) / "tokenizer.model"
    named = epath.Path(config.data.tokenizer) if config.data.tokenizer else stored
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
        stored.parent.mkdir(parents=True, exist_ok=True)
        stored.write_bytes(tokenizer.model_bytes)
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
    """Those that training begins with, for `Stage.prepare`; read only when asked for, and said now and then."""
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


def _record(workdir: str, step: int, scalars: dict[str, float], images) -> None:
    """Appends to WORKDIR/evaluation.jsonl, says it, and draws."""
    if jax.process_index() != 0:
        return
    folder = epath.Path(workdir)
    lines = (folder / "evaluation.jsonl").read_text() if (folder / "evaluation.jsonl").exists() else ""
    (folder / "evaluation.jsonl").write_text(lines + json.dumps({"step": step} | scalars) + "\n")
    _say(f"held out, step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in scalars.items()))
    if images is not None:
        pictures.save_png(folder / "samples" / f"step_{step:08d}.png", pictures.grid(np.asarray(images)))


class _Stop:
    """Notes a first Ctrl-C or SIGTERM, so that the loop can save and leave; a second one acts at once."""

    asked = False

    def __enter__(self):
        self._handlers = {name: signal.signal(name, self._note) for name in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number, frame):
        self.asked = True
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
