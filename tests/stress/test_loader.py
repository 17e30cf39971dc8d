"""The data pipeline over ten thousand steps: flat memory, exact counts."""

import gc
import os
from pathlib import Path

import pytest
from shrink import save_pictures

from unclip_jax.data.pipeline import batches
from unclip_jax.data.sources import open_source
from unclip_jax.data.transforms import ToExample

pytestmark = pytest.mark.stress
PICTURES, ROWS, STEPS = 400, 8, 10_000


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """400 pictures, of which one in a hundred is damaged."""
    folder = save_pictures(tmp_path_factory.mktemp("data") / "pictures", 12)
    for i in range(12, PICTURES):
        (folder / f"{i:03}.png").write_bytes((folder / f"{i % 12:02}.png").read_bytes())
        (folder / f"{i:03}.txt").write_text("a picture")
    for i in range(50, PICTURES, 100):
        (folder / f"{i:03}.png").write_bytes(b"damaged")
    return open_source(f"folder:{folder}", "train", "", "", "")


def resident():
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_ten_thousand_steps(source):
    """Whole epochs, so that each damaged picture has come up once in each."""
    epochs = ROWS * -(-STEPS // len(source))
    steps = epochs * len(source) // ROWS
    it, skipped = batches(source, ToExample({"image": 16}, {}, "center", None), ROWS, 0, threads=2), 0
    for k in range(1, steps + 1):
        skipped += int(next(it)["records_skipped"].sum())
        if k == steps // 10:
            gc.collect()
            before = resident()
    gc.collect()
    growth = resident() / before - 1
    damaged = sum(source[i]["image"].startswith(b"damaged") for i in range(len(source)))
    print(f"{steps} steps: {before / 2**20:.0f} MiB, then {growth:+.2%}; {damaged} damaged, skipped {skipped} times")
    assert growth < 0.01
    assert damaged >= 3 and skipped == epochs * damaged
