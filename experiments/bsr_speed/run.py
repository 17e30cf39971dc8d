"""How many examples of the second upsampler does the host make in a second, BSR degradation included?

    cc -shared -fPIC experiments/bsr_speed/lock.c -o /tmp/lock.so -ldl
    LD_PRELOAD=/tmp/lock.so python experiments/bsr_speed/run.py

Times `degrade` alone, one record's way to an example, and the pipeline as training reads it, on pictures with the
spectrum of photographs (power 1 / f²) stored as JPEG. All is CPU time, which other programs on the machine change
little: of each, and of its part under Python's lock, which only one thread of a process has at a time. Prints a table
and writes report.json beside this file. Without LD_PRELOAD, or where Python is no shared library, the lock is left out.
"""

import argparse
import ctypes
import io
import json
import time
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from unclip_jax import cli
from unclip_jax.data.bsr import degrade
from unclip_jax.data.pipeline import batches
from unclip_jax.data.transforms import ToExample
from unclip_jax.stages import make_stage

SIDES = (1024, 1536)  # of the stored pictures: just large enough, and larger
COUNT = 8
SLICES = 5


def photograph(side: int, seed: int) -> np.ndarray:
    """Noise of power 1 / f², the three colours alike for the most part: uint8 (side, side, 3)."""
    rng = np.random.default_rng(seed)
    frequencies = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequencies[0, 0] = np.inf
    planes = [np.fft.irfft2(np.fft.rfft2(rng.standard_normal((side, side))) / frequencies) for _ in range(4)]
    image = np.stack([planes[0] + 0.3 * plane for plane in planes[1:]], axis=-1)
    return np.clip(128 + 50 * image / image.std(), 0, 255).astype(np.uint8)


class Photographs:
    """As a dataset."""

    def __init__(self, side: int):
        self._files = []
        for seed in range(COUNT):
            file = io.BytesIO()
            Image.fromarray(photograph(side, seed)).save(file, "JPEG", quality=90)
            self._files.append(file.getvalue())

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> dict:
        return {"image": self._files[index], "caption": "a picture", "key": str(index)}


def milliseconds(make, seconds: float, slices: int = SLICES) -> dict[str, float]:
    """CPU time of one of the examples that make(k) counts, and its part under the lock: the fastest of `slices`."""
    lock = getattr(ctypes.CDLL(None), "nanoseconds_without_lock", None)
    if lock:
        lock.restype = ctypes.c_longlong
    make(0)
    tries = []
    for _ in range(slices):
        count, began, free = 0, time.process_time(), lock() if lock else 0
        while (taken := time.process_time() - began) < seconds / slices:
            count += make(count)
        held = {"locked": taken - (lock() - free) * 1e-9} if lock else {}
        tries.append({name: round(1e3 * value / count, 2) for name, value in ({"cpu": taken} | held).items()})
    return min(tries, key=lambda found: found["cpu"])


def forward_flops(config) -> float:
    """Of the loss of one patch, as XLA counts them."""
    stage = make_stage(config)
    params = jax.eval_shape(stage.init, jax.random.key(0))
    return jax.jit(stage.loss).lower(params, {}, stage.batch_spec(1), jax.random.key(0)).cost_analysis()["flops"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="of CPU, for each measurement")
    seconds = parser.parse_args().seconds
    config = cli.load_config("configs/upsampler_1024.py:paper")
    m, d = config.model, config.data
    patch = photograph(1024, 0)[: m.patch, : m.patch]

    def degraded(k: int) -> int:
        degrade(patch, m.factor, np.random.default_rng(k))
        return 1

    report = {f"degrade, {m.patch} px": milliseconds(degraded, seconds)}
    for side in SIDES:
        source = Photographs(side)
        plain, whole = (ToExample({"image": m.image_size}, {}, d.crop, m.patch, factor) for factor in (None, m.factor))
        for name, to_example in (("plain example", plain), ("example", whole)):

            def example(k: int, source=source, to_example=to_example) -> int:
                to_example(source[k % COUNT], np.random.default_rng(k))
                return 1

            report[f"{name}, {side} px JPEG"] = milliseconds(example, seconds)
        rows = batches(source, whole, 16, 0, threads=d.threads)
        name = f"pipeline, {d.threads} threads, {side} px JPEG"
        report[name] = milliseconds(lambda k, rows=rows: len(next(rows)["image"]), 4 * seconds, 1)
    for name, found in report.items():
        print(f"{name:40}", ", ".join(f"{key} {value:.2f} ms" for key, value in found.items()), flush=True)
    report["forward_flops"] = forward_flops(config)
    print(f"{report['forward_flops']:.4g} FLOP forward for a patch")
    (Path(__file__).parent / "report.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
