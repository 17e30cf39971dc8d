"""Killed builders of datasets: nothing is lost, nothing comes twice, and nothing half done is taken for whole."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unclip_jax.data.sources import open_source
from unclip_jax.errors import UserError

pytestmark = pytest.mark.stress
pytest.importorskip("apache_beam", reason="needs the extra [build]")
ROOT, PICTURES, FIRST, SECOND = Path(__file__).parents[2], 4000, "examined", "done"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Each picture four times, with another caption."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for k in range(PICTURES // 4):
        small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
        small.resize((64, 48)).save(folder / f"{k:05}.png")
    for k in range(PICTURES):
        if k >= PICTURES // 4:
            shutil.copy(folder / f"{k % (PICTURES // 4):05}.png", folder / f"{k:05}.png")
        (folder / f"{k:05}.txt").write_text(f"caption {k}")
    return folder


class Builder:
    """A build in a process of its own, of which others are children."""

    def __init__(self, pictures, out, *words):
        self.parts, self.log = out / "mine/1.0.0/parts", out.parent / f"{time.monotonic_ns()}.log"
        command = [sys.executable, "-m", "unclip_jax.data", "build", f"--source=folder:{pictures}", f"--out={out}"]
        command += ["--name=mine", "--held-out=0.1", *words]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True, env=environment
            )

    def wait_for(self, name, count):
        """Waits until so many files of a name are there, or the build is over."""
        while self.process.poll() is None and len(list(self.parts.glob(f"{name}-*.json"))) < count:
            time.sleep(0.02)

    def finish(self):
        assert self.process.wait(300) == 0, self.log.read_text()[-3000:]

    def workers(self):
        """Processes of the build's session but the build itself."""
        found = subprocess.run(["ps", "-o", "pid=,comm=", "-s", str(self.process.pid)], capture_output=True, text=True)
        rows = [line.split() for line in found.stdout.splitlines()]
        return [int(pid) for pid, comm in rows if int(pid) != self.process.pid and "python" in comm]


def captions(out):
    found = []
    for split in ("train", "test"):
        source = open_source("tfds:mine", split, str(out), "image", "caption")
        found += [(split, tuple(source[k]["caption"])) for k in range(len(source))]
    return found


@pytest.fixture(scope="module")
def straight(pictures, tmp_path_factory):
    """Records of builds that nothing disturbed, without and with a step that compares all records."""
    out = tmp_path_factory.mktemp("straight")
    found = {}
    for words in ((), ("--near-duplicates=0",)):
        Builder(pictures, out / str(len(words)), *words).finish()
        found[words] = captions(out / str(len(words)))
    assert sorted(text for _, texts in found[()] for text in texts) == sorted(f"caption {k}" for k in range(PICTURES))
    assert 0.9 < len(found[("--near-duplicates=0",)]) / (PICTURES / 4) <= 1
    return found


@pytest.mark.parametrize("words", [(), ("--near-duplicates=0",)])
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_again_and_again(pictures, straight, tmp_path, words, workers):
    """At random moments of both passes; once at a worker alone."""
    rng, kills, out = random.Random(workers), 0, tmp_path / "out"
    flags = (*words, f"--workers={workers}")
    for name in (FIRST, SECOND) if words else (SECOND,):
        for share in (0.1, 0.4, 0.8):
            build = Builder(pictures, out, *flags)
            build.wait_for(name, share * 63)
            time.sleep(rng.random() * 0.2)
            if build.process.poll() is not None:
                break
            build.process.kill()
            build.process.wait()
            kills += 1
            with pytest.raises(UserError, match="no dataset 'mine'"):
                captions(out)
            deadline = time.monotonic() + 60
            while build.workers() and time.monotonic() < deadline:
                time.sleep(0.1)
            assert not build.workers(), "workers outlive their build"
    assert kills >= 2
    Builder(pictures, out, *flags).finish()
    assert captions(out) == straight[words]
    assert sorted(path.name for path in (out / "mine/1.0.0").iterdir() if "array_record" not in path.name) == [
        "build.json", "dataset_info.json", "features.json"
    ]  # fmt: skip


def test_a_killed_worker_ends_the_build_which_goes_on(pictures, straight, tmp_path):
    build = Builder(pictures, tmp_path / "out", "--workers=2")
    build.wait_for(SECOND, 10)
    os.kill(build.workers()[-1], signal.SIGKILL)
    assert build.process.wait(300) == 2
    assert "what is done is kept: the same command goes on" in build.log.read_text().splitlines()[-1]
    again = Builder(pictures, tmp_path / "out", "--workers=1")
    again.finish()
    assert captions(tmp_path / "out") == straight[()]
