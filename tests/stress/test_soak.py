"""20,000 steps on a bucket and a disk that fail now and then, killed at random: the run that nothing disturbed."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_gcs
import pytest
from shrink import CAPTIONS, save_pictures, small_config

pytestmark = pytest.mark.stress
ROOT = Path(__file__).parents[2]
STEPS = int(os.environ.get("SOAK_STEPS", 20_000))
NETWORK, DISK = 0.003, 0.002  # shares of requests and of operations on files that fail
LIFE = 10_000  # steps: a run is killed before it has gone on by more, at the pace of the one that nothing disturbs


def start(tmp_path, source, workdir, program, **environment):
    config = small_config("clip").unlock()
    config.data.update(dict(source=source, threads=4))
    train = dict(steps=STEPS, batch_size=8, checkpoint_every=250, log_every=50, sample_every=10**6, keep=2)
    config.train.update(train)
    (tmp_path / f"{workdir}.json").write_text(json.dumps({"config": config.to_dict()}))
    words = [f"--config={tmp_path}/{workdir}.json", f"--workdir={tmp_path}/{workdir}"]
    places = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "JAX_COMPILATION_CACHE_DIR": f"{tmp_path}/cache"}
    places |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "UNCLIP_CACHE": f"{tmp_path}/files"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    return subprocess.Popen([sys.executable, *program, *words], env=os.environ | places | environment, **pipes)


def digest(said):
    return re.search(r"^state sha256 ([0-9a-f]+)$", said, re.MULTILINE)[1]


def losses(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, lines)]


def pace(workdir, seconds):
    """Seconds until the first step of a run that took so many, and of a step. Kills keep to them, however busy the
    machine is."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    first, last = ((line["step"], line["seconds"]) for line in (lines[0], lines[-1]))
    a_step = (last[1] - first[1]) / (last[0] - first[0])
    return seconds - STEPS * a_step, a_step


def test_faults_of_disk_and_network_and_kills_change_nothing(tmp_path):
    pictures = save_pictures(tmp_path / "pictures", len(CAPTIONS))
    began = time.monotonic()
    with start(tmp_path, f"folder:{pictures}", "straight", ["-m", "unclip_jax.train"]) as run:
        straight = run.communicate(timeout=600 + STEPS)[0]
    assert run.returncode == 0, straight[-2000:]
    to_begin, a_step = pace(tmp_path / "straight", time.monotonic() - began)

    rng, ends = random.Random(0), {"killed": 0, "disk": 0, "bucket": 0}
    with fake_gcs.serve(faults=NETWORK) as server:
        places = {**server.environment, "FAULTS": str(DISK)}
        upload(server, pictures)
        for _ in range(200):
            program = [str(Path(__file__).with_name("faulty_train.py"))]
            with start(tmp_path, "folder:gs://bucket/pictures", "disturbed", program, **places) as run:
                try:
                    said = run.communicate(timeout=rng.uniform(to_begin / 2, to_begin + LIFE * a_step))[0]
                except subprocess.TimeoutExpired:
                    run.send_signal(signal.SIGKILL)
                    said = run.communicate()[0]
                    ends["killed"] += 1
                    continue
            if run.returncode == 0:
                break
            assert "Traceback" not in said and run.returncode == 2, said[-3000:]
            ends["disk" if "Input/output error" in said or "is not whole" in said else "bucket"] += 1
    print(f"{STEPS} steps: {ends}, {(time.monotonic() - began) / 60:.0f} minutes")
    assert run.returncode == 0, f"not at its end after 200 starts: {ends}"
    assert digest(said) == digest(straight)
    assert losses(tmp_path / "disturbed") == losses(tmp_path / "straight")
    assert STEPS < 20_000 or min(ends["killed"], ends["disk"]) >= 3


def upload(server, folder):
    """Copies pictures and captions into the bucket, in a process that finds the server by its environment."""
    program = "import sys; from unclip_jax.paths import copy_folder, to_path\n"
    program += "copy_folder(to_path(sys.argv[1]), to_path('gs://bucket/pictures'), '00.txt')"
    environment = os.environ | server.environment | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for _ in range(20):
        if subprocess.run([sys.executable, "-c", program, str(folder)], env=environment).returncode == 0:
            return
    raise AssertionError("the pictures could not be copied")
