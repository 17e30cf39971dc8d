"""`data embed` in real processes: shared, killed and run again, its files are those of one process, byte for byte."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from shrink import random_params, save_pictures, small_config, tokenizer_bytes

from unclip_jax.bundle import save_bundle
from unclip_jax.stages import make_stage

pytestmark = pytest.mark.stress
ROOT = Path(__file__).parents[2]
SHARD_RECORDS = 8
PICTURES = 200  # some 25 files
KILLS = 12
# The command, with shards so small that a run makes many.
PROGRAM = f"""
import sys
from unclip_jax import cli
from unclip_jax.data import __main__ as command, embeddings
embeddings.SHARD_RECORDS = {SHARD_RECORDS}
cli.run(command.main)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dataset, a random CLIP and a config that names both."""
    folder = tmp_path_factory.mktemp("embed")
    clip, config = make_stage(small_config("clip")), small_config("prior_diffusion").unlock()
    save_bundle(folder / "clip", "clip", clip.config, random_params(clip), tokenizer_bytes(), "", {})
    save_pictures(folder / "pictures", 12)
    for i in range(12, PICTURES):
        for ending in ("png", "txt"):
            (folder / "pictures" / f"{i:03}.{ending}").write_bytes(
                (folder / "pictures" / f"{i % 12:02}.{ending}").read_bytes()
            )
    (folder / "pictures" / "077.png").write_bytes(b"no picture")
    config.data.update(dict(source=f"folder:{folder / 'pictures'}", threads=2, crop="dalle"))
    config.clip.bundle = str(folder / "clip")
    (folder / "small.json").write_text(json.dumps({"config": config.to_dict()}))
    return folder


def start(folder, out, *flags, devices=4, cluster=None):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        **(cluster or {}),
    }
    command = [sys.executable, "-c", PROGRAM, "embed", f"--config={folder / 'small.json'}", "--crops=2"]
    command += [f"--out={folder / out}", *flags]
    return subprocess.Popen(command, env=environment, cwd=ROOT, text=True, stderr=subprocess.PIPE)


def said(process, status=0):
    """What a process says until its end."""
    _, errors = process.communicate(timeout=900)
    assert process.returncode == status, errors[-3000:]
    return errors


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def straight(folder):
    """Files of a run that nothing disturbed."""
    said(start(folder, "straight"))
    return content(folder / "straight")


def pair(folder, out, port):
    together = [f"--coordinator=localhost:{port}", "--processes=2"]
    return [start(folder, out, *together, f"--process={i}", devices=2) for i in range(2)]


def test_two_processes_make_the_files_of_one(folder, straight, port):
    lines = [said(process) for process in pair(folder, "of_two", port)]
    assert content(folder / "of_two") == straight
    assert "embed: " in lines[0] and "embed: " not in lines[1]


def test_processes_of_slurm_find_each_other(folder, straight, port):
    """Told by the variables that srun sets, and by no flag."""
    processes = []
    for i in range(2):
        slurm = {"JOB_ID": str(port), "STEP_NODELIST": "localhost", "NTASKS": "2", "STEP_NUM_TASKS": "2"}
        slurm |= {"PROCID": str(i), "LOCALID": str(i)}
        cluster = {f"SLURM_{name}": value for name, value in slurm.items()}
        processes.append(start(folder, "of_slurm", devices=2, cluster=cluster))
    for process in processes:
        said(process)
    assert content(folder / "of_slurm") == straight


def test_killed_at_any_time_it_makes_the_same_files(folder, straight):
    rng, turn, kills = random.Random(0), 0, 0
    while kills < KILLS:
        out, turn = folder / f"killed_{turn}", turn + 1
        while True:
            process = start(folder, out.name)
            there, wanted = len(list(out.glob("*"))), rng.randrange(1, 12)
            while process.poll() is None and len(list(out.glob("*"))) < there + wanted:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.02))
            process.kill()
            process.communicate()
            if process.returncode != -signal.SIGKILL:
                assert process.returncode == 0
                break
            kills += 1
        assert content(out) == straight
    assert turn < KILLS, "runs were killed more than once"


def test_when_one_is_killed_the_other_ends_and_both_go_on(folder, straight, port):
    processes = pair(folder, "one_killed", port)
    while len(list((folder / "one_killed").glob("*"))) < 4:
        assert processes[0].poll() is None, said(processes[0])
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGSTOP)  # so that it is not at its end
    processes[1].kill()
    processes[1].communicate()
    assert "another process of this run has died" in said(processes[0], 1)
    for process in pair(folder, "one_killed", port):
        said(process)
    assert content(folder / "one_killed") == straight


def test_processes_with_other_data_are_refused(folder, port):
    together = [f"--coordinator=localhost:{port}", "--processes=2"]
    others = ["--crops=2", "--crops=3"]
    processes = [start(folder, "differ", *together, f"--process={i}", others[i], devices=2) for i in range(2)]
    for process in processes:
        assert "the processes of this run differ: process 1" in said(process, 2)
    assert not (folder / "differ").exists()
