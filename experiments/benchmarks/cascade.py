"""How long does a picture of 1024 px take, from caption to upsampler, and how long would it take at the chip's peak?

    python experiments/benchmarks/cascade.py --size paper --batch 8 [--weights bfloat16]

The whole cascade at its configs' sizes, steps and guidance, with random weights, through `Model.draw` as sampling calls
it: CLIP's text tower, prior, decoder, both upsamplers, each a jitted function, pictures handed on through the host.
Prints a table and writes cascade.json. --one-at-a-time keeps one model on the device at a time.
"""

import gc
import sys
import time

import jax
import jax.numpy as jnp
import measure
import numpy as np
from networks import loaded

from unclip_jax import cli
from unclip_jax.model import CHUNK_ROWS, Model
from unclip_jax.models.mesh import jit_on_mesh, one_device
from unclip_jax.planning import flops
from unclip_jax.planning.chips import known_chip
from unclip_jax.planning.programs import conditions
from unclip_jax.stages import make_stage
from unclip_jax.stages.conditions import Conditions

MODELS = ("clip", "prior_diffusion", "decoder", "upsampler_256", "upsampler_1024")


def random_model(name: str, flags, clip: Model | None) -> Model:
    """A model of the config's shapes, with fresh weights; matrices and kernels in the type that is asked for."""
    stage = make_stage(loaded(name, flags.size, dtype=flags.dtype), clip.stage if clip else None)

    def fresh(key):
        return jax.tree.map(lambda p: p.astype(flags.weights) if p.ndim > 1 else p, stage.init(key))

    return Model(stage, jax.jit(fresh)(jax.random.key(flags.seed)), None, name)


def inputs(stage, rows: int, seed: int) -> Conditions:
    """Makes conditions to draw from: captions of random tokens, random embeddings and small pictures."""
    rng = np.random.default_rng(seed)
    scale = stage.config.sampling.get("guidance_scale")

    def draw(spec):
        if not spec.shape:
            return np.float32(scale)
        if spec.dtype == jnp.int32:
            return rng.integers(1, 8, spec.shape, np.int32)
        return np.clip(rng.standard_normal(spec.shape, np.float32), -1, 1)

    return jax.tree.map(draw, conditions(stage, rows))


def read_call(clip: Model, rows: int, seed: int):
    """Captions to embeddings, and its arguments."""
    spec = clip.stage.batch_spec(rows)
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 8, spec["tokens"].shape, np.int32)
    lengths = np.full(rows, tokens.shape[1], np.int32)
    return jit_on_mesh(clip.stage.embed_texts, one_device(), clip.stage.tpu_options), (clip.params, tokens, lengths)


def stage_times(model: Model, clip: Model, flags) -> dict:
    """Of one stage, on its own inputs: first call, then `repeats`; and its FLOPs."""
    stage, key = model.stage, jax.random.key(flags.seed)
    if stage.config.stage == "clip":
        function, arguments = read_call(model, flags.batch, flags.seed)
        call = lambda: np.asarray(function(*arguments))  # noqa: E731
        count = flops.executed_flops(jax.make_jaxpr(clip.stage.embed_texts)(*arguments))
    else:
        frozen = clip.params if stage.needs_clip else {}
        given = inputs(stage, flags.batch, flags.seed)
        call = lambda: model.draw(frozen, given, key)  # noqa: E731
        count = flops.executed_flops(jax.make_jaxpr(stage.sample)(model.params, frozen, given, key))
    found = measure.in_turns({"draw": call}, flags.repeats, stage.config.stage)
    seconds = measure.spread(found["draw"])
    chip = known_chip(jax.devices()[0].device_kind)
    floor = count / flags.batch / chip.peak_flops if chip else None
    return {
        "steps": stage.config.get("sampling", {}).get("steps"),
        "seconds": seconds,
        "seconds_per_picture": measure.significant(seconds["median"] / flags.batch),
        "first_call_seconds": round(found["draw first"][0], 1),
        "tflops_per_picture": measure.significant(count / flags.batch / 1e12),
        "gflops_per_second": measure.significant(count / seconds["median"] / 1e9),
        "floor_seconds_per_picture": measure.significant(floor) if chip else None,
    }


def main() -> None:
    parser = measure.parser(__doc__, "cascade.json")
    parser.add_argument("--size", default="tiny", choices=("paper", "small", "tiny"))
    parser.add_argument("--batch", type=int, default=4, help=f"pictures at once, at most {CHUNK_ROWS}")
    parser.add_argument("--dtype", help="of matrix products and convolutions, instead of the configs'")
    parser.add_argument("--weights", default="float32", choices=("float32", "bfloat16"), help="as they are kept")
    parser.add_argument("--one-at-a-time", action="store_true", help="drop each model before the next is made")
    flags = parser.parse_args()
    if not 0 < flags.batch <= CHUNK_ROWS:
        sys.exit(f"--batch {flags.batch}: expected 1 to {CHUNK_ROWS}")
    report = {"command": " ".join(sys.argv), "environment": measure.environment()}
    report |= {name: getattr(flags, name) for name in ("size", "batch", "weights", "seed")} | {"stages": {}}
    clip, models, rows, start = None, [], [], time.monotonic()
    for name in MODELS:
        model = random_model(name, flags, clip)
        clip = clip or model
        models = [clip] if flags.one_at_a_time else [*models, model]
        measure.say(f"{name}: {time.monotonic() - start:.0f} s so far; compiling and drawing {flags.batch} pictures")
        found = report["stages"][name] = stage_times(model, clip, flags) | {"dtype": model.stage.config.dtype}
        rows.append((name, found["steps"], found["seconds_per_picture"], found["tflops_per_picture"],
                     found["gflops_per_second"], found["floor_seconds_per_picture"]))  # fmt: skip
        del model
        gc.collect()
        measure.write(flags.out, report)
    times, work, floors = ([row[i] for row in rows] for i in (2, 3, 5))
    floor = sum(floors) if all(floors) else None
    rows.append(("all", None, sum(times), sum(work), 1e3 * sum(work) / sum(times), floor))
    report["seconds_per_picture"], report["floor_seconds_per_picture"] = rows[-1][2], rows[-1][5]
    measure.write(flags.out, report)
    print(measure.table(("stage", "steps", "s/picture", "TFLOP/picture", "GFLOP/s", "floor, s/picture"), rows))


if __name__ == "__main__":
    cli.run(lambda argv: main())
