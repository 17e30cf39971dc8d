"""A decoder so small that a run of it takes seconds, as processes that can be killed."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from shrink import UNET, random_params, save_pictures, small_config, tokenizer_bytes

from unclip_jax.bundle import save_bundle
from unclip_jax.stages import make_stage

ROOT = Path(__file__).parents[2]
STARTED: list[subprocess.Popen] = []  # by the test that runs


class Runs:
    """Starts `unclip_jax.train` on the small decoder; all runs share one cache of compiled programs."""

    def __init__(self, folder: Path):
        self.folder = folder
        clip, config = make_stage(small_config("clip")), small_config("decoder").unlock()
        save_bundle(folder / "clip", "clip", clip.config, random_params(clip), tokenizer_bytes(), "", {})
        config.model.unet.update(UNET | dict(channel_mult=(1,), attention=(1,)))
        config.data.update(dict(source=f"folder:{save_pictures(folder / 'pictures', 40)}", threads=2))
        config.clip.bundle = str(folder / "clip")
        config.train.update(dict(steps=30, batch_size=16, checkpoint_every=3, log_every=1, sample_every=10**6, keep=2))
        (folder / "small.json").write_text(json.dumps({"config": config.to_dict()}))

    def start(self, workdir: str, *flags: str, devices: int = 4, mixed: bool = False) -> subprocess.Popen:
        """A run into `workdir`, a name below this folder; `log` reads what it says. mixed: by other_order.py."""
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "cache"),
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        program = [str(Path(__file__).with_name("other_order.py"))] if mixed else ["-m", "unclip_jax.train"]
        command = [sys.executable, *program, f"--config={self.folder / 'small.json'}"]
        command += [f"--workdir={self.folder / workdir}", *flags]
        index = len(list(self.folder.glob("*.log")))
        with open(self.folder / f"{index}.log", "w") as log:
            run = subprocess.Popen(command, env=environment, cwd=ROOT, text=True, stdout=log, stderr=log)
        STARTED.append(run)
        run.log = Path(log.name)
        return run

    def finish(self, workdir: str, *flags: str, devices: int = 4) -> str:
        """Runs to the end; the digest of the state."""
        run = self.start(workdir, *flags, devices=devices)
        assert run.wait(900) == 0, run.log.read_text()[-3000:]
        return run.log.read_text().splitlines()[-1].removeprefix("state sha256 ")

    def losses(self, workdir: str) -> list[tuple[int, float]]:
        lines = (self.folder / workdir / "metrics.jsonl").read_text().splitlines()
        return [(line["step"], line["loss"]) for line in map(json.loads, lines)]

    def saved(self, workdir: str) -> list[int]:
        """Steps of complete checkpoints."""
        folder = self.folder / workdir / "checkpoints"
        return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []

    def saving(self, workdir: str) -> bool:
        """Whether a checkpoint is being written."""
        folder = self.folder / workdir / "checkpoints"
        return folder.exists() and any("tmp" in path.name for path in folder.iterdir())


@pytest.fixture(autouse=True)
def none_left():
    """A test that fails leaves no run behind that would slow down the next."""
    yield
    while STARTED:
        run = STARTED.pop()
        run.kill()
        run.wait()


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def straight(runs):
    """(digest, losses) of a run that nothing disturbed."""
    return runs.finish("straight"), runs.losses("straight")


@pytest.fixture
def port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


