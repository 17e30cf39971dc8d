"""How many examples of the second upsampler does one core make in a second, BSR degradation included?

    python experiments/bsr_speed/run.py [--seconds 20]

Times `degrade` alone, one record's way to an example, and the whole pipeline as training reads it, on pictures with the
spectrum of photographs (power 1 / f²) stored as JPEG. All in seconds of CPU, which other programs on the machine do not
change. Prints a table and writes report.json beside this file.
"""

import argparse
import io
import json
import sys
import threading
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


def per_second(make, seconds: float) -> float:
    """Calls of make(k) in a second of CPU, over all threads of this process; of SLICES tries, the fastest."""
    make(0)
    fastest = 0.0
    for _ in range(SLICES):
        count, began = 0, time.process_time()
        while (taken := time.process_time() - began) < seconds / SLICES:
            count += make(count)
        fastest = max(fastest, count / taken)
    return fastest


def seconds_under_lock(make, seconds: float) -> float:
    """Seconds for which one call of make(k) holds Python's lock, while no other thread of the process can run Python.

    A thread that only counts runs whenever the lock is free: what it did not count, of what it counts alone, is held.
    """
    counted, stopped = [0], threading.Event()

    def count() -> None:
        while not stopped.is_set():
            counted[0] += 1

    sys.setswitchinterval(1e-4)
    threading.Thread(target=count, daemon=True).start()
    time.sleep(1)
    before, began = counted[0], time.perf_counter()
    time.sleep(seconds / 4)
    alone = (counted[0] - before) / (time.perf_counter() - began)
    held = []
    for _ in range(SLICES):
        before, began, calls = counted[0], time.perf_counter(), 0
        while (taken := time.perf_counter() - began) < seconds / SLICES:
            calls += make(calls)
        held.append((taken - (counted[0] - before) / alone) / calls)
    stopped.set()
    return min(held)


def forward_flops(config) -> float:
    """Of the loss of one patch, as XLA counts them."""
    stage = make_stage(config)
    params = jax.eval_shape(stage.init, jax.random.key(0))
    return jax.jit(stage.loss).lower(params, {}, stage.batch_spec(1), jax.random.key(0)).cost_analysis()["flops"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="of CPU, for each measurement")
    seconds = parser.parse_args().seconds
    config = cli.load_config("configs/upsampler_1024.py:paper")
    m, d = config.model, config.data
    patch = photograph(1024, 0)[: m.patch, : m.patch]

    def degraded(k: int) -> int:
        return len(degrade(patch, m.factor, np.random.default_rng(k))) > 0

    flops = forward_flops(config)
    report = {f"degrade, {m.patch} px": per_second(degraded, seconds)}
    for side in SIDES:
        source = Photographs(side)
        for factor in (m.factor, None):
            to_example = ToExample({"image": m.image_size}, {}, d.crop, m.patch, factor)

            def example(k: int, source=source, to_example=to_example) -> int:
                return len(to_example(source[k % COUNT], np.random.default_rng(k))) > 0

            name = f"example of a {side} px JPEG" + ("" if factor else ", not degraded")
            report[name] = per_second(example, seconds)
            if factor:
                report[f"{name}, under Python's lock"] = 1 / seconds_under_lock(example, seconds)
        to_example = ToExample({"image": m.image_size}, {}, d.crop, m.patch, m.factor)
        for threads in (1, d.threads):
            rows = batches(source, to_example, 16, 0, threads=threads)
            name = f"pipeline on {side} px, {threads} threads"
            report[name] = per_second(lambda k, rows=rows: len(next(rows)["image"]), seconds)
    for name, value in report.items():
        print(f"{name:52} {value:8.1f} a second")
    print(f"{flops:.4g} FLOP forward for a patch")
    rounded = {name: round(value, 1) for name, value in report.items()} | {"forward FLOP": flops}
    (Path(__file__).parent / "report.json").write_text(json.dumps(rounded, indent=2) + "\n")


if __name__ == "__main__":
    main()
