"""How many examples a second does the input pipeline make, and how many cores does a slice's host need for it?

    python experiments/benchmarks/input_pipeline.py [--stages clip,decoder] [--workers 1,2]

Pictures with the spectrum of photographs are written as JPEG with captions into a temporary folder, and the package's
own source, transforms and pipeline make batches of them as the papers' models are trained: decode, crop, resize and
tokenise; and, for the second upsampler, BSR degradation. Pictures are as large as the model's, and twice as large or
half as large again. Prints and writes to input_pipeline.json

* examples a second of one core: of the CPU time of one thread, which other programs on the machine change little;
* examples a second by one worker process and by several, and the trainer's own CPU time for an example of theirs;
* for each slice of docs/costs.md, how many examples a second one of its hosts needs, and how many cores make them.
"""

import atexit
import math
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import measure
import numpy as np
from PIL import Image

from unclip_jax import cli
from unclip_jax.data.pipeline import batches
from unclip_jax.data.sources import open_source
from unclip_jax.data.tokenizer import train_tokenizer
from unclip_jax.data.transforms import ToExample
from unclip_jax.stages import make_stage

COSTS = Path(__file__).parents[2] / "docs" / "costs.md"
CHIPS_OF_A_HOST = 4  # of slices with several hosts
COUNT, LINKS = 16, 128  # pictures of each size, and how many names each has: shuffling very few records is slow
SIDES = (256, 512, 1024, 1536)
WORDS = ("a", "the", "photograph", "of", "red", "small", "dog", "lighthouse", "storm", "tree", "beside", "house")
STAGES = ("clip", "prior_diffusion", "decoder", "upsampler_256", "upsampler_1024", "glide", "glide_upsampler")


def photograph(side: int, rng: np.random.Generator) -> np.ndarray:
    """Noise of power 1 / f²: uint8 (side, side, 3)."""
    frequencies = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequencies[0, 0] = np.inf
    planes = [np.fft.irfft2(np.fft.rfft2(rng.standard_normal((side, side))) / frequencies) for _ in range(4)]
    image = np.stack([planes[0] + 0.3 * plane for plane in planes[1:]], axis=-1)
    return np.clip(128 + 50 * image / image.std(), 0, 255).astype(np.uint8)


def write_pictures(folder: Path, side: int, seed: int) -> None:
    """COUNT pictures and captions, by LINKS names each."""
    folder.mkdir()
    rng = np.random.default_rng((seed, side))
    for n in range(COUNT):
        Image.fromarray(photograph(side, rng)).save(folder / f"{n:03}.jpg", quality=90)
        (folder / f"{n:03}.txt").write_text(" ".join(rng.choice(WORDS, 12)))
        for k in range(1, LINKS):
            for ending in ("jpg", "txt"):
                os.link(folder / f"{n:03}.{ending}", folder / f"{n:03}-{k:03}.{ending}")


def transform(name: str, config, tokenizer) -> ToExample:
    """What `inputs.Inputs` makes of a config, but for the tokenizer's pieces."""
    clip = make_stage(cli.load_config("configs/clip.py:paper")) if "clip" in config else None
    stage = make_stage(config, clip)
    texts = {text: (tokenizer, context, ends) for text, (_, context, ends) in stage.texts.items()}
    return ToExample(stage.images, texts, config.data.crop, stage.patch, stage.bsr_factor)


def timed(source, to_example, flags, workers: int) -> dict:
    """Examples a second over slices of equal length, and this process's CPU time."""
    rows = batches(source, to_example, flags.batch, flags.seed, threads=max(1, workers), workers=workers)
    next(rows)
    wall, cpu = [], []
    for _ in range(flags.repeats):
        start, used, count = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - start < flags.seconds / flags.repeats:
            count += len(next(rows)["records_skipped"])
        wall.append((time.perf_counter() - start) / count)
        cpu.append((time.process_time() - used) / count)
    rows.close()
    return {"seconds_per_example": measure.spread(wall), "cpu_seconds_per_example": measure.spread(cpu)}


def slices() -> list[tuple[str, str, int, float]]:
    """The table of docs/costs.md: (config, topology, its chips, seconds a step)."""
    row = re.compile(r"^\| `(\w+)\.py` \| `(\w+:([\dx]+))` \|[^|]*\|[^|]*\| ([\d.]+) \|", re.MULTILINE)
    found = row.findall(COSTS.read_text())
    return [(name, topology, math.prod(map(int, shape.split("x"))), float(s)) for name, topology, shape, s in found]


def main() -> None:
    parser = measure.parser(__doc__, "input_pipeline.json")
    parser.add_argument("--stages", default=",".join(STAGES), help="configs, of which each trains one model")
    parser.add_argument("--workers", default="1,2", help="of the measurement of data.workers")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each measurement")
    flags = parser.parse_args()
    report = {"command": " ".join(sys.argv), "environment": measure.environment()}
    report |= {"batch": flags.batch, "seed": flags.seed, "pictures": COUNT, "cases": {}}
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)  # not before: the pipeline's threads end their last batches
    rng = np.random.default_rng(flags.seed)
    tokenizer, sources = train_tokenizer([" ".join(rng.choice(WORDS, 12)) for _ in range(99)], 320), {}
    names, counts = flags.stages.split(","), [int(count) for count in flags.workers.split(",")]
    progress = measure.Progress(2 * len(names) * (1 + len(counts)), "input pipeline")
    rows, rates = [], {}
    for name in names:
        config = cli.load_config(f"configs/{name}.py:paper")
        to_example = transform(name, config, tokenizer)
        for side in [side for side in SIDES if side >= max(config.data.min_side, 256)][:2]:
            if side not in sources:
                write_pictures(folder / str(side), side, flags.seed)
                sources[side] = open_source(f"folder:{folder}/{side}", "train", "", "image", "caption")
            cells = []
            for workers in (0, *counts):
                found = timed(sources[side], to_example, flags, workers)
                report["cases"][f"{name}, {side} px JPEG, {workers} workers"] = found
                wall, cpu = (found[f"{clock}seconds_per_example"]["median"] for clock in ("", "cpu_"))
                cells.append(measure.significant(1 / (wall if workers else cpu), 3))
                progress.step()
            rates.setdefault(name, {})[side] = cells[0]
            rows.append((name, side, *cells, measure.significant(1e3 * cpu, 2)))
    report["hosts"], needs = [], []
    for name, topology, chips, seconds in slices():
        if name in rates:
            batch = cli.load_config(f"configs/{name}.py:paper").train.batch_size
            need = batch / seconds / (chips / CHIPS_OF_A_HOST)
            cores = {side: measure.significant(need / rate, 2) for side, rate in rates[name].items()}
            host = {"config": name, "slice": topology, "examples_per_second": round(need), "cores": cores}
            report["hosts"].append(host)
            said = ", ".join(f"{count:g} from {side} px" for side, count in cores.items())
            needs.append((name, topology, round(need), said))
    measure.write(flags.out, report)
    by_workers = [f"{count} worker(s), examples/s" for count in counts]
    print(measure.table(("model", "JPEG, px", "examples/s of a core", *by_workers, "trainer's ms for one"), rows))
    print(measure.table(("model", "slice", "examples/s of a host", "cores of it"), needs))


if __name__ == "__main__":
    cli.run(lambda argv: main())
