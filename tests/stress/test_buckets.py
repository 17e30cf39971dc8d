"""A small cascade whose every path is in a bucket: trained, killed and gone on with, embedded, sampled and edited."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from shrink import small_config

from unclip_jax.edit import _read
from unclip_jax.paths import copy_folder, files_below, to_path, write_bytes

pytestmark = pytest.mark.stress
ROOT = Path(__file__).parents[2]
STAGES = {
    "clip": "clip",
    "prior": "prior_diffusion",
    "decoder": "decoder",
    "upsampler_256": "upsampler_256",
    "upsampler_1024": "upsampler_1024",
}
STEPS = 12


class Commands:
    """Runs this package's commands in processes of their own, with `{at}` in an argument for a folder of the bucket."""

    def __init__(self, at: str, local: Path):
        self.at, self._local, self.said = at, local, ""

    def start(self, module: str, *arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-m", f"unclip_jax.{module}", *(a.format(at=self.at) for a in arguments)]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            "JAX_COMPILATION_CACHE_DIR": str(self._local / "cache"),
            "UNCLIP_CACHE": str(self._local / "files"),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        # In an empty folder, so that whatever is written to a disk by mistake is seen.
        return subprocess.Popen(command, env=environment, cwd=self._local / "empty", **pipes)

    def run(self, module: str, *arguments: str) -> str:
        """What the command prints; what it says besides is `said`."""
        with self.start(module, *arguments) as process:
            printed, self.said = process.communicate(timeout=600)
        assert process.returncode == 0, self.said[-4000:]
        assert "Traceback" not in self.said, self.said[-4000:]
        return printed

    def train(self, name: str, workdir: str, *flags: str) -> tuple[str, ...]:
        return "train", f"--config={{at}}/configs/{STAGES[name]}.json", f"--workdir={{at}}/{workdir}", *flags


@pytest.fixture
def commands(bucket, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in STAGES.values():
        config = small_config(name).unlock()
        config.data.update(dict(source="tfds:emoji_scenes/single_64", data_dir=f"{bucket}/tfds", threads=2))
        steps = STEPS if name == "clip" else 4
        config.train.update(dict(steps=steps, checkpoint_every=3, sample_every=6, keep=2))
        if "unet" in config.model:
            config.model.unet.channel_mult = (1,)  # half the compilation
            if config.model.unet.get("attention"):
                config.model.unet.attention = (1,)
        if "clip" in config:
            config.clip.bundle = f"{bucket}/runs/clip/bundle"
        text = json.dumps({"config": config.to_dict()})
        write_bytes(to_path(bucket) / "configs" / f"{name}.json", text.encode())
    return Commands(bucket, tmp_path)


def test_cascade_with_every_path_in_a_bucket(commands, tmp_path):
    at = to_path(commands.at)
    *_, digest = commands.run(*commands.train("clip", "runs/clip")).splitlines()
    _train_clip_again_and_kill_it(commands)
    assert commands.run(*commands.train("clip", "runs/killed")).splitlines() == [digest]
    assert re.search(r"clip: .* from step [3-9]", commands.said)
    lines = [(at / "runs" / run / "metrics.jsonl").read_text().splitlines() for run in ("clip", "killed")]
    losses, again = ([(line["step"], line["loss"]) for line in map(json.loads, run)] for run in lines)
    assert losses == again and [step for step, _ in losses] == list(range(1, STEPS + 1))

    commands.run("data", "embed", "--config={at}/configs/prior_diffusion.json", "--out={at}/embeddings")
    tokenizer = "--config.data.tokenizer={at}/runs/prior/tokenizer.model"
    for name in ("prior", "decoder", "upsampler_256", "upsampler_1024"):
        flags = ["--config.data.embeddings={at}/embeddings"] if name in ("prior", "decoder") else []
        flags += [tokenizer] if name == "decoder" else []
        assert "state sha256" in commands.run(*commands.train(name, f"runs/{name}", *flags))
    for name in STAGES:
        assert {"config.json", "metrics.jsonl", "evaluation.jsonl"} <= set(files_below(at / "runs" / name))
        assert any(file.startswith("tensorboard/") for file in files_below(at / "runs" / name))
        copy_folder(at / "runs" / name / "bundle", at / "cascade" / name, "config.json")

    out = ["--bundle={at}/cascade", "-n", "2", "--seed=3"]
    printed = commands.run("sample", *out, "--prompt=a red apple", "--out={at}/samples")
    names = ["a_red_apple_3_0.png", "a_red_apple_3_1.png", "grid.png"]
    assert printed.splitlines() == [f"{commands.at}/samples/{name}" for name in names]
    assert files_below(at / "samples") == names and _read(at / "samples" / names[0]).shape == (128, 128, 3)
    commands.run(
        "edit", "interpolate", *out, "--image={at}/samples/" + names[0], "--image={at}/samples/" + names[1],
        "--steps=3", "--out={at}/edits",
    )  # fmt: skip
    names = ["interpolate_a_red_apple_3_0_3_0.png", "interpolate_a_red_apple_3_0_3_1.png", "path.gif", "sheet.png"]
    assert files_below(at / "edits") == names

    copy_folder(at / "cascade", tmp_path / "cascade", "")
    commands.run("sample", f"--bundle={tmp_path}/cascade", *out[1:], "--prompt=a red apple", f"--out={tmp_path}/out")
    for name in files_below(tmp_path / "out"):
        np.testing.assert_array_equal(_read(tmp_path / "out" / name), _read(at / "samples" / name))
    assert not list((tmp_path / "empty").iterdir()), "written where nothing was asked for"


def _train_clip_again_and_kill_it(commands):
    """After its first checkpoint and before its end."""
    checkpoints = to_path(commands.at) / "runs" / "killed" / "checkpoints"
    with commands.start(*commands.train("clip", "runs/killed")) as process:
        while not (checkpoints / "3" / "commit_success.txt").exists():
            assert process.poll() is None, process.communicate()[1][-4000:]
            time.sleep(0.02)
        process.kill()
        process.communicate()
    assert not (checkpoints / str(STEPS)).exists(), "it ended before it could be killed"
