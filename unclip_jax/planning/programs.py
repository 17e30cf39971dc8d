"""Programs that plans are about: a stage's real train step and its real sampling, traced from shapes alone."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from unclip_jax import cli, held_out
from unclip_jax.arrays import Batch, Params
from unclip_jax.config_checks import check_config, embedded
from unclip_jax.errors import UserError
from unclip_jax.keys import RowKeys
from unclip_jax.model import chunk_rows, jitted_sample
from unclip_jax.models.mesh import jit_on_mesh, specs
from unclip_jax.paths import to_path
from unclip_jax.planning import flops
from unclip_jax.planning.fitting import remat_keys
from unclip_jax.stages import Stage, make_stage
from unclip_jax.stages.base import Sampler
from unclip_jax.stages.conditions import Conditions
from unclip_jax.training.sharding import batch_sharding, make_mesh, replicated, split_kernels
from unclip_jax.training.state import TrainState, abstract_state, init_state, make_train_step, root_key
from unclip_jax.training.tuning import changed


class Program(NamedTuple):
    """A traced function and its arguments, for devices that need not exist."""

    stage: Stage
    traced: jax.stages.Traced
    arguments: tuple  # pytrees of ShapeDtypeStructs with shardings
    trains: bool = False  # takes a train state and gives the next one


def find_clip(config: ConfigDict) -> Stage | None:
    """Makes the CLIP that a stage needs, without reading weights; None for a stage that needs none.

    It is the one of clip.bundle, else of clip.config, else the one of configs/clip.py whose embeddings have the size
    that the model expects. Raises UserError where there is none.
    """
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
        f"no CLIP of configs/clip.py has embeddings of {config.model.embedding_dim} numbers: name one in clip.bundle"
    )


def checked_stage(config: ConfigDict) -> Stage:
    """Makes the stage of a config. Raises UserError where training would refuse the config, missing data apart."""
    checked = config.copy_and_resolve_references().unlock()
    checked.data.source = config.data.source or "folder:."
    check_config(checked, ".")
    return make_stage(config, find_clip(config), embedded(config))


def train_program(config: ConfigDict, devices: list[jax.Device]) -> Program:
    """Traces the train step on all of `devices`. Its arguments are the train state, frozen CLIP, batch and root key.

    Raises UserError where mesh or batch size do not fit the number of devices.
    """
    stage, mesh = checked_stage(config), make_mesh(config.mesh, devices)
    step = make_train_step(stage, config, mesh)
    arguments = (
        abstract_state(stage, config, mesh),
        _placed(_frozen_params(stage), replicated(mesh)),
        _placed(stage.batch_spec(config.train.batch_size), batch_sharding(mesh)),
        _placed(jax.eval_shape(lambda: root_key(0)), replicated(mesh)),
    )
    return Program(stage, step.trace(*arguments), arguments, trains=True)


def evaluate_program(config: ConfigDict, devices: list[jax.Device]) -> Program:
    """Traces an evaluation in training: drawing as many held-out examples as go through at once, or, where the stage
    draws nothing, the loss of all of them.

    Its arguments are the train state, frozen CLIP, batch and keys: what the evaluation does not read lies beside it on
    the devices. Raises UserError where the mesh does not fit the number of devices.
    """
    stage, mesh = checked_stage(config), make_mesh(config.mesh, devices)
    made, draws = held_out.programs(stage, mesh), isinstance(stage, Sampler)
    count = min(config.train.draw_size, config.train.eval_size) if draws else config.train.eval_size
    rows = chunk_rows(count, mesh.size) if draws else min(count, config.train.batch_size)
    split = replicated(mesh) if rows % mesh.size else batch_sharding(mesh)
    key = _placed(jax.eval_shape(lambda: root_key(0)), replicated(mesh))
    numbers = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=split)
    arguments = (
        abstract_state(stage, config, mesh),
        _placed(_frozen_params(stage), replicated(mesh)),
        _placed(stage.batch_spec(rows), split),
        RowKeys(key, numbers, numbers) if draws else key,
    )

    def evaluate(state: TrainState, frozen: Params, batch: Batch, keys: Any) -> Any:
        return (made.draw if draws else made.evaluate)(state.average, frozen, batch, keys)

    options: dict[str, Any] = {"dtype": config.dtype, "out_shardings": replicated(mesh), "keep_unused": True}
    return Program(stage, jit_on_mesh(evaluate, mesh, stage.tpu_options, **options).trace(*arguments), arguments)


def sample_program(config: ConfigDict, devices: list[jax.Device], rows: int) -> Program:
    """Traces what the command `sample` runs on all devices of a process: the stage draws `rows` rows on each.

    Its arguments are the parameters, frozen CLIP, conditions and keys of rows. Raises UserError for a stage that draws
    nothing, and where mesh.fsdp does not divide the number of devices.
    """
    stage, mesh = checked_stage(config), make_mesh(ConfigDict(dict(data=-1, fsdp=config.mesh.fsdp)), devices)
    if not isinstance(stage, Sampler):
        raise UserError(f"--sample: a {config.stage} draws nothing")
    split, whole = batch_sharding(mesh), replicated(mesh)
    given = conditions(stage, rows * mesh.size)._asdict()
    numbers = jax.ShapeDtypeStruct((rows * mesh.size,), jnp.int32, sharding=split)
    arguments = (
        _split(jax.eval_shape(stage.init, jax.random.key(0)), mesh),
        _split(_frozen_params(stage), mesh),
        Conditions(**{name: _placed(s, split if getattr(s, "shape", ()) else whole) for name, s in given.items()}),
        RowKeys(_placed(jax.eval_shape(lambda: root_key(0)), whole), numbers, numbers),
    )
    return Program(stage, jitted_sample(stage, mesh).trace(*arguments), arguments)


def conditions(stage: Stage, rows: int) -> Conditions:
    """Returns the shapes of the conditions from which a stage draws `rows` pictures or embeddings."""
    config, spec = stage.config, {}
    for name, (_, context, _) in stage.texts.items():
        spec |= {name: ((rows, context), jnp.int32), f"{name}_length": ((rows,), jnp.int32)}
    if stage.needs_clip:
        given = "text_embedding" if config.stage.startswith("prior") else "image_embedding"
        spec[given] = (rows, config.model.embedding_dim), jnp.float32
    if stage.guidance() is not None:
        spec["guidance_scale"] = (), jnp.float32
    if config.model.get("factor"):
        side = config.model.image_size // config.model.factor
        spec["low_res"] = (rows, side, side, 3), jnp.float32
    return Conditions(**{name: jax.ShapeDtypeStruct(*shape_and_type) for name, shape_and_type in spec.items()})


def train_step_flops(config: ConfigDict, params: dict[str, Any]) -> int:
    """Counts the FLOPs of a train step by the model's formula: forward and backward over the whole batch, no remat,
    backward only to what is trained.

    params: the stage's parameters as ShapeDtypeStructs.
    """
    stage = make_stage(without_remat(config), find_clip(config), embedded(config))
    rest = _frozen_params(stage), stage.batch_spec(config.train.batch_size), jax.eval_shape(lambda: root_key(0))
    jaxpr = jax.make_jaxpr(lambda *arguments: stage.loss(*arguments)[0])(params, *rest)
    inputs = jax.tree.leaves((changed(params, config.optim), jax.tree.map(lambda _: False, rest)))
    return flops.training_flops(jaxpr, inputs)


def without_remat(config: ConfigDict) -> ConfigDict:
    """Returns a copy of a config with remat off everywhere, so that nothing is computed twice."""
    new = config.copy_and_resolve_references().unlock()
    new.update_from_flattened_dict({name: False for name, _ in remat_keys("model", config.model)})
    return new.lock()


def random_arguments(program: Program) -> tuple:
    """Makes arguments for a program on its devices: fresh parameters, pictures of noise, captions of a single token."""
    stage, (first, frozen, *rest) = program.stage, program.arguments
    seed, rng = stage.config.train.seed, np.random.default_rng(stage.config.train.seed)

    def initial(init: Callable[[jax.Array], dict[str, Any]], tree: dict[str, Any]) -> dict[str, Any]:
        shapes, structure = jax.tree.flatten(tree)
        leaves = jax.jit(lambda key: jax.tree.leaves(init(key)), out_shardings=[s.sharding for s in shapes])
        return jax.tree.unflatten(structure, leaves(jax.random.key(seed)))

    def draw(spec: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(spec.dtype, jax.dtypes.prng_key):
            value = root_key(seed)
        elif jnp.issubdtype(spec.dtype, jnp.floating):
            value = rng.standard_normal(spec.shape, np.float32)
        else:
            value = rng.integers(1, 256 if spec.dtype == jnp.uint8 else 2, spec.shape).astype(spec.dtype)
        return jax.device_put(value, spec.sharding)

    if isinstance(first, TrainState):
        first = init_state(stage, stage.config, first.step.sharding.mesh, seed)
    else:
        first = initial(stage.init, first)
    frozen = initial(stage.clip.init, frozen) if frozen else {}
    return first, frozen, *jax.tree.map(draw, tuple(rest))


def _placed(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """Gives each ShapeDtypeStruct of a pytree a sharding."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), tree)


def _split(params: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Lays parameters out as drawing does."""
    params = split_kernels(params, mesh)
    return jax.tree.map(lambda spec, s: _placed(s, NamedSharding(mesh, spec)), specs(params), params)


def _frozen_params(stage: Stage) -> dict[str, Any]:
    """Shapes of the parameters of the CLIP that runs within a stage; {} where none does."""
    return jax.eval_shape(stage.clip.init, jax.random.key(0)) if stage.clip and stage.runs_clip else {}
