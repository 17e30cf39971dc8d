"""How many examples a second does the input pipeline make?

    python experiments/benchmarks/input_pipeline.py [--sides 256,512] [--threads 1,2]

Pictures with the spectrum of photographs are written as JPEG with captions into a temporary folder, a tokenizer is
trained on the captions, and the package's own source, transforms and pipeline make batches of them as training does:
decode, crop, resize and tokenise; and, for the second upsampler, BSR degradation. Prints a table and writes
input_pipeline.json: examples per second, and per second of CPU time, which other programs on the machine change little.
"""

import atexit
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

COUNT = 64  # pictures of each size
WORDS = ("a", "the", "photograph", "of", "red", "small", "dog", "lighthouse", "storm", "tree", "beside", "house")
CASES = {  # arguments of ToExample, but for the tokenizer; the paper's models
    "decoder: 64 px, CLIP's 256 px, caption": dict(images={"image": 64, "clip_image": 256}, patch=None, captions=True),
    "upsampler to 256 px: patch of 64 px": dict(images={"image": 256}, patch=64),
    "upsampler to 512 px: patch of 256 px": dict(images={"image": 512}, patch=256),
    "the same, BSR-degraded to 64 px": dict(images={"image": 512}, patch=256, bsr_factor=4),
}


def photograph(side: int, rng: np.random.Generator) -> np.ndarray:
    """Noise of power 1 / f²: uint8 (side, side, 3)."""
    frequencies = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequencies[0, 0] = np.inf
    planes = [np.fft.irfft2(np.fft.rfft2(rng.standard_normal((side, side))) / frequencies) for _ in range(4)]
    image = np.stack([planes[0] + 0.3 * plane for plane in planes[1:]], axis=-1)
    return np.clip(128 + 50 * image / image.std(), 0, 255).astype(np.uint8)


def write_pictures(folder: Path, side: int, seed: int) -> list[str]:
    """COUNT pictures and captions; gives the captions."""
    folder.mkdir()
    rng, captions = np.random.default_rng((seed, side)), []
    for n in range(COUNT):
        Image.fromarray(photograph(side, rng)).save(folder / f"{n:03}.jpg", quality=90)
        captions.append(" ".join(rng.choice(WORDS, 12)))
        (folder / f"{n:03}.txt").write_text(captions[-1])
    return captions


def timed(source, to_example, threads: int, flags) -> dict:
    """Examples a second over slices of equal length, and their CPU time."""
    rows = batches(source, to_example, flags.batch, flags.seed, threads=threads)
    next(rows)
    wall, cpu = [], []
    for _ in range(flags.repeats):
        start, used, count = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - start < flags.seconds / flags.repeats:
            count += len(next(rows)["image"])
        wall.append((time.perf_counter() - start) / count)
        cpu.append((time.process_time() - used) / count)
    rows.close()  # or its threads would go on for good
    found = {"seconds_per_example": measure.spread(wall), "cpu_seconds_per_example": measure.spread(cpu)}
    rates = {name: measure.significant(1 / times["median"]) for name, times in found.items()}
    return found | {
        "examples_per_second": rates["seconds_per_example"],
        "examples_per_cpu_second": rates["cpu_seconds_per_example"],
    }


def main() -> None:
    parser = measure.parser(__doc__, "input_pipeline.json")
    parser.add_argument("--sides", default="256,512", help="of the stored pictures")
    parser.add_argument("--threads", default="1,2", help="of the pipeline, as data.threads")
    parser.add_argument("--crop", default="dalle", choices=("dalle", "center"))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each measurement")
    flags = parser.parse_args()
    report = {"command": " ".join(sys.argv), "environment": measure.environment()}
    report |= {"crop": flags.crop, "batch": flags.batch, "seed": flags.seed, "pictures": COUNT, "cases": {}}
    rows, sides = [], [int(side) for side in flags.sides.split(",")]
    threads = [int(count) for count in flags.threads.split(",")]
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)  # not before: the pipeline's threads end their last batches
    progress = measure.Progress(len(sides) * len(threads) * len(CASES), "input pipeline")
    for side in sides:
        captions = write_pictures(Path(folder) / str(side), side, flags.seed)
        source = open_source(f"folder:{folder}/{side}", "train", "", "image", "caption")
        tokenizer = train_tokenizer(captions, 320)
        for name, case in CASES.items():
            texts = {"tokens": (tokenizer, 256, False)} if case.get("captions") else {}
            to_example = ToExample(case["images"], texts, flags.crop, case["patch"], case.get("bsr_factor"))
            for count in threads:
                found = timed(source, to_example, count, flags)
                report["cases"][f"{name}, {side} px JPEG, {count} threads"] = found
                rows.append((name, side, count, found["examples_per_second"], found["examples_per_cpu_second"]))
                progress.step()
    measure.write(flags.out, report)
    print(measure.table(("example", "stored, px", "threads", "examples/s", "examples per CPU second"), rows))


if __name__ == "__main__":
    cli.run(lambda argv: main())
