"""The data pipeline over ten thousand steps: flat memory, exact counts."""

import gc
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from shrink import save_pictures

from unclip_jax.data.pipeline import batches
from unclip_jax.data.sources import open_source
from unclip_jax.data.transforms import ToExample

pytestmark = pytest.mark.stress
PICTURES, ROWS, STEPS = 400, 8, 10_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """400 pictures, of which one in a hundred is damaged."""
    folder = save_pictures(tmp_path_factory.mktemp("data") / "pictures", 12)
    for i in range(12, PICTURES):
        (folder / f"{i:03}.png").write_bytes((folder / f"{i % 12:02}.png").read_bytes())
        (folder / f"{i:03}.txt").write_text("a picture")
    for i in range(50, PICTURES, 100):
        (folder / f"{i:03}.png").write_bytes(b"damaged")
    return folder


def resident(processes):
    """Bytes of memory that processes have together."""
    pages = [int(Path(f"/proc/{process}/statm").read_text().split()[1]) for process in processes]
    return sum(pages) * os.sysconf("SC_PAGE_SIZE")


class WithProcess(ToExample):
    """Also tells which process made an example."""

    def __call__(self, record, rng):
        return super().__call__(record, rng) | {"process": np.int32(os.getpid())}


def ten_thousand_steps(folder, workers):
    """(steps, epochs, processes that made examples, bytes of memory in the middle and at the end, damaged pictures, how
    often one was skipped), of whole epochs, so that each damaged picture has come up once in each."""
    source = open_source(f"folder:{folder}", "train", "", "", "")
    epochs = ROWS * -(-STEPS // len(source))
    steps = epochs * len(source) // ROWS
    to_example, processes, skipped = WithProcess({"image": 16}, {}, "center", None), {os.getpid()}, 0
    it = batches(source, to_example, ROWS, 0, threads=2, workers=workers)
    for k in range(1, steps + 1):
        batch = next(it)
        skipped += int(batch["records_skipped"].sum())
        processes |= set(batch["process"].tolist())
        if k == steps // 2:  # the first thousands fill caches
            gc.collect()
            before = resident(processes)
    gc.collect()
    after = resident(processes)
    it.close()
    damaged = sum(source[i]["image"].startswith(b"damaged") for i in range(len(source)))
    return steps, epochs, len(processes), before, after, damaged, skipped


@pytest.mark.parametrize("workers", [0, 2])
def test_ten_thousand_steps(folder, workers):
    """In a process of its own: in this one earlier tests' memory is given back meanwhile."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        steps, epochs, processes, before, after, damaged, skipped = pool.submit(
            ten_thousand_steps, folder, workers
        ).result()
    growth = after / before - 1
    print(f"{steps} steps: {before / 2**20:.0f} MiB, then {growth:+.2%}; {damaged} damaged, skipped {skipped} times")
    assert processes == 1 + workers and growth < 0.01
    # What takes the place of a damaged picture, drawn at random, may be damaged too.
    assert damaged >= 3 and epochs * damaged <= skipped < 1.05 * epochs * damaged
