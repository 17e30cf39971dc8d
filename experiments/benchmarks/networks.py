"""How fast does each model train and draw here?

    python experiments/benchmarks/networks.py --models decoder,upsampler_256 --size small --batch 64 --rows 16

"train" is the step that training runs, of random examples. "sampling step" is one evaluation of the denoiser, guided
where the config says so, and the step that follows from it: the difference of draws of LONG and of SHORT steps, by
the program that sampling runs. Of CLIP it is both towers' forward pass, of the autoregressive prior one code. Prints a
table and writes networks.json. MFU is the model's FLOPs (nothing counted twice) against the chip's peak in bfloat16.
"""

import sys
import time

import jax
import measure
from jax.sharding import SingleDeviceSharding

from unclip_jax import cli
from unclip_jax.models.mesh import jit_on_mesh, one_device
from unclip_jax.planning import flops
from unclip_jax.planning.chips import known_chip
from unclip_jax.planning.programs import (
    Program,
    random_arguments,
    sample_program,
    train_program,
    train_step_flops,
)
from unclip_jax.stages import make_stage

MODELS = ("clip", "prior_diffusion", "prior_ar", "decoder", "glide", "upsampler_256", "upsampler_1024")
SHORT, LONG = 2, 6  # steps


def loaded(model: str, size: str, **changes):
    """The config, with values changed by their dotted names."""
    config = cli.load_config(f"configs/{model}.py:{size}").copy_and_resolve_references().unlock()
    config.update_from_flattened_dict({name: value for name, value in changes.items() if value is not None})
    return config.lock()


def compiled(program: Program):
    """The executable, and the seconds that compiling took."""
    start = time.monotonic()
    return program.traced.lower().compile(), time.monotonic() - start


def sampling_program(config, rows: int) -> Program:
    """What draws `rows` rows on one device; of a CLIP, what embeds so many pictures and captions."""
    device = jax.devices()[0]
    if config.stage != "clip":
        return sample_program(config, [device], rows)
    stage, place = make_stage(config), SingleDeviceSharding(device)

    def towers(params, frozen, batch):
        texts = stage.embed_texts(params, batch["tokens"], batch["tokens_length"])
        return stage.embed_images(params, batch["image"]), texts

    shapes = jax.eval_shape(stage.init, jax.random.key(0)), {}, stage.batch_spec(rows)
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes)
    return Program(stage, jit_on_mesh(towers, one_device(device), stage.tpu_options).trace(*shapes), shapes)


def training(config, flags) -> dict:
    """Of the train step on all devices."""
    program = train_program(config, jax.devices())
    executable, seconds = compiled(program)
    state, *rest = jax.block_until_ready(random_arguments(program))
    held = [state]
    del state

    def call():
        held[0], metrics = executable(held[0], *rest)
        jax.block_until_ready((held[0], metrics))

    found = measure.in_turns({"step": call}, flags.repeats, f"{config.stage}, train")["step"]
    shapes = jax.eval_shape(program.stage.init, jax.random.key(0))
    count = train_step_flops(config, shapes)
    batch = config.train.batch_size
    return {"batch": batch, "compile_seconds": round(seconds, 1)} | rates(found, count, batch, jax.device_count())


def drawing(model: str, config, flags) -> dict:
    """Of one sampling step, on one device."""
    counted = "steps" in config.get("sampling", {})
    names = [str(SHORT), str(LONG)] if counted else [None]
    calls, counts, seconds = {}, {}, 0.0
    for steps in names:
        changed = loaded(model, flags.size, **{"dtype": flags.dtype, "sampling.steps": steps})
        program = sampling_program(changed, flags.rows)
        executable, taken = compiled(program)
        arguments = jax.block_until_ready(random_arguments(program))  # a prior's depend on the steps
        calls[steps] = lambda run=executable, given=arguments: jax.block_until_ready(run(*given))
        counts[steps], seconds = flops.executed_flops(program.traced.jaxpr), seconds + taken
    found = measure.in_turns(calls, flags.repeats, f"{model}, sampling step")
    if counted:
        times = [(b - a) / (LONG - SHORT) for a, b in zip(found[names[0]], found[names[1]], strict=True)]
        count = (counts[names[1]] - counts[names[0]]) / (LONG - SHORT)
    else:
        codes = config.model.get("num_codes", 1)
        times, count = [value / codes for value in found[None]], counts[None] / codes
    return {"rows": flags.rows, "compile_seconds": round(seconds, 1)} | rates(times, count, flags.rows, 1)


def rates(times: list[float], count: float, examples: int, devices: int) -> dict:
    """Of calls of `count` FLOPs on all devices together."""
    middle = measure.spread(times)
    per_second = count / middle["median"]
    chip = known_chip(jax.devices()[0].device_kind)
    return {
        "seconds": middle,
        "examples_per_second": measure.significant(examples / middle["median"]),
        "gflops_per_example": measure.significant(count / examples / 1e9),
        "gflops_per_second": measure.significant(per_second / 1e9),
        "mfu": measure.significant(per_second / devices / chip.peak_flops) if chip else None,
    }


def main() -> None:
    parser = measure.parser(__doc__, "networks.json")
    parser.add_argument("--models", default=",".join(MODELS), help="of " + ", ".join(MODELS))
    parser.add_argument("--size", default="tiny", choices=("paper", "small", "tiny"))
    parser.add_argument("--batch", type=int, help="of a train step, over all devices; else the config's")
    parser.add_argument("--rows", type=int, default=16, help="drawn at once, on one device")
    parser.add_argument("--dtype", help="instead of the config's")
    parser.add_argument("--calls", default="train,sample", help="of train, sample")
    flags = parser.parse_args()
    report = {"command": " ".join(sys.argv), "environment": measure.environment(), "size": flags.size, "models": {}}
    rows = []
    for model in flags.models.split(","):
        measure.say(f"{model}: compiling")
        changes = {"train.batch_size": flags.batch, "train.seed": flags.seed, "dtype": flags.dtype}
        config = loaded(model, flags.size, **changes)
        found = report["models"][model] = {"dtype": config.dtype}
        if "train" in flags.calls:
            found["train"] = training(config, flags)
        if "sample" in flags.calls:
            found["sampling step"] = drawing(model, config, flags)
        for name in found.keys() & {"train", "sampling step"}:
            each = found[name]
            count, s = each.get("batch", each.get("rows")), each["seconds"]
            rows.append((f"{model}, {name}", count, s["median"], s["min"], each["examples_per_second"],
                         each["gflops_per_second"], each["mfu"]))  # fmt: skip
        measure.write(flags.out, report)
    header = ("model", "examples", "median, s", "least, s", "examples/s", "GFLOP/s", "MFU")
    print(measure.table(header, rows))


if __name__ == "__main__":
    cli.run(lambda argv: main())
