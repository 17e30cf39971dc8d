"""The programs that a plan is about: a stage's real train step and its real sampling, traced from shapes alone."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from unclip_jax import cli
from unclip_jax.config_checks import check_config, embedded
from unclip_jax.errors import UserError
from unclip_jax.model import CHUNK_ROWS
from unclip_jax.models.mesh import jit_on_mesh, one_device
from unclip_jax.paths import to_path
from unclip_jax.planning import flops
from unclip_jax.planning.fitting import remat_keys
from unclip_jax.stages import Stage, make_stage
from unclip_jax.stages.base import Sampler
from unclip_jax.stages.conditions import Conditions
from unclip_jax.training.optimizer import learning_rate, make_optimizer
from unclip_jax.training.sharding import batch_sharding, make_mesh, replicated
from unclip_jax.training.state import TrainState, abstract_state, init_state, make_train_step, root_key


class Program(NamedTuple):
    """A traced function and what it takes: ShapeDtypeStructs with shardings, over devices that need not exist."""

    stage: Stage
    traced: Any  # jax.stages.Traced
    arguments: tuple


def upstream(config: ConfigDict) -> Stage | None:
    """The CLIP that a stage needs: of clip.bundle, of clip.config, or the one of configs/clip.py whose embeddings have
    as many numbers. Its weights are not read."""
    if "clip" not in config:
        return None
    if config.clip.bundle:
        return make_stage(cli.load_config(str(to_path(config.clip.bundle) / "config.json")))
    if config.clip.config:
        return make_stage(cli.load_config(config.clip.config))
    for size in ("paper", "small", "tiny"):
        found = cli.load_config(f"configs/clip.py:{size}")
        if found.model.dim == config.model.embedding_dim:
            return make_stage(found)
    raise UserError(
        f"no CLIP of configs/clip.py has embeddings of {config.model.embedding_dim} numbers: name one by clip.bundle"
    )


def assembled(config: ConfigDict) -> Stage:
    """The stage of a config. Raises UserError where training would refuse the config, the lack of data apart."""
    checked = config.copy_and_resolve_references().unlock()
    checked.data.source = config.data.source or "folder:."
    check_config(checked, ".")
    return make_stage(config, upstream(config), embedded(config))


def train_program(config: ConfigDict, devices: list) -> Program:
    """The train step on all of `devices`, of (state, frozen CLIP, batch, root key).

    Raises UserError where mesh or batch do not fit them.
    """
    stage, mesh = assembled(config), make_mesh(config.mesh, devices)
    optimizer = make_optimizer(config.optim, config.train.steps)
    step = make_train_step(stage, optimizer, learning_rate(config.optim, config.train.steps), config, mesh)
    arguments = (
        abstract_state(stage, optimizer, mesh),
        _placed(_frozen(stage), replicated(mesh)),
        _placed(stage.batch_spec(config.train.batch_size), batch_sharding(mesh)),
        _placed(jax.eval_shape(lambda: root_key(0)), replicated(mesh)),
    )
    return Program(stage, step.trace(*arguments), arguments)


def sample_program(config: ConfigDict, device: jax.Device, rows: int = CHUNK_ROWS) -> Program:
    """Traces what `sample` runs on one device: the stage draws so many rows, of (params, frozen CLIP, conditions, key).

    Raises UserError where it draws nothing.
    """
    stage = assembled(config)
    if not isinstance(stage, Sampler):
        raise UserError(f"--sample: a {config.stage} draws nothing")
    shapes = (
        jax.eval_shape(stage.init, jax.random.key(0)),
        _frozen(stage),
        conditions(stage, rows),
        jax.eval_shape(lambda: root_key(0)),
    )
    arguments = _placed(shapes, jax.sharding.SingleDeviceSharding(device))
    sample = jit_on_mesh(stage.sample, one_device(device), stage.tpu_options)
    return Program(stage, sample.trace(*arguments), arguments)


def conditions(stage: Stage, rows: int) -> Conditions:
    """Shapes of the conditions from which a stage draws `rows` pictures or embeddings."""
    config, spec = stage.config, {}
    for name, (_, context, _) in stage.texts.items():
        spec |= {name: ((rows, context), jnp.int32), f"{name}_length": ((rows,), jnp.int32)}
    if stage.needs_clip:
        given = "text_embedding" if config.stage.startswith("prior") else "image_embedding"
        spec[given] = (rows, config.model.embedding_dim), jnp.float32
    if "guidance_scale" in config.sampling:
        spec["guidance_scale"] = (), jnp.float32
    if config.model.get("factor"):
        side = config.model.image_size // config.model.factor
        spec["low_res"] = (rows, side, side, 3), jnp.float32
    return Conditions(**{name: jax.ShapeDtypeStruct(*shape_and_type) for name, shape_and_type in spec.items()})


def trained_flops(config: ConfigDict, params: Any) -> int:
    """FLOPs of one step over the whole batch by the model's formula: forward and backward, nothing done twice.
    params: ShapeDtypeStructs."""
    stage = assembled(without_remat(config))
    rest = _frozen(stage), stage.batch_spec(config.train.batch_size), jax.eval_shape(lambda: root_key(0))
    jaxpr = jax.make_jaxpr(lambda *arguments: stage.loss(*arguments)[0])(params, *rest)
    count, others = (len(jax.tree.leaves(tree)) for tree in (params, rest))
    return flops.training_flops(jaxpr, [True] * count + [False] * others)


def without_remat(config: ConfigDict) -> ConfigDict:
    """The config of a network that computes nothing twice."""
    new = config.copy_and_resolve_references().unlock()
    new.update_from_flattened_dict({name: False for name, _ in remat_keys("model", config.model)})
    return new.lock()


def random_arguments(program: Program) -> tuple:
    """Arguments of a program, on the devices that they name: fresh parameters, noise, captions of one token."""
    stage, (first, frozen, *rest) = program.stage, program.arguments
    seed, rng = stage.config.train.seed, np.random.default_rng(stage.config.train.seed)

    def initial(init, tree):
        return jax.jit(init, out_shardings=jax.tree.map(lambda s: s.sharding, tree))(jax.random.key(seed))

    def draw(spec):
        if jnp.issubdtype(spec.dtype, jax.dtypes.prng_key):
            value = root_key(seed)
        elif jnp.issubdtype(spec.dtype, jnp.floating):
            value = rng.standard_normal(spec.shape, np.float32)
        else:
            value = rng.integers(1, 256 if spec.dtype == jnp.uint8 else 2, spec.shape).astype(spec.dtype)
        return jax.device_put(value, spec.sharding)

    if isinstance(first, TrainState):
        optimizer = make_optimizer(stage.config.optim, stage.config.train.steps)
        first = init_state(stage, optimizer, first.step.sharding.mesh, seed)
    else:
        first = initial(stage.init, first)
    frozen = initial(stage.clip.init, frozen) if frozen else {}
    return first, frozen, *jax.tree.map(draw, tuple(rest))


def _placed(tree, sharding):
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), tree)


def _frozen(stage: Stage):
    return jax.eval_shape(stage.clip.init, jax.random.key(0)) if stage.clip and stage.runs_clip else {}
