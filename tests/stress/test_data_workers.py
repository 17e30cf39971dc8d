"""Worker processes of a training run: killed, or left behind by a trainer that was killed."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.stress
WORKERS = ("--config.data.workers=2", "--config.data.threads=4")


def workers_of(run):
    """Processes that a run has started, by their number."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == run.pid and state != "Z":
            found.append(int(stat.parent.name))
    return found


def begun(run, seconds=400):
    """Waits until two workers are at work, and a step is done; returns the workers."""
    end = time.monotonic() + seconds
    while len(workers_of(run)) < 2 or "step" not in run.log.read_text():
        assert run.poll() is None and time.monotonic() < end, run.log.read_text()[-2000:]
        time.sleep(0.01)
    return workers_of(run)


def all_gone(processes, seconds=30):
    end = time.monotonic() + seconds
    while any(Path(f"/proc/{process}").exists() for process in processes) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(Path(f"/proc/{process}").exists() for process in processes)


def test_a_killed_trainer_leaves_no_worker_and_goes_on_with_another_number(runs, straight):
    rng = random.Random(0)
    for turn in range(4):
        run = runs.start("left", *WORKERS)
        workers = begun(run)
        time.sleep(rng.uniform(0, 3))
        run.kill()
        run.wait()
        assert all_gone(workers), f"turn {turn}"
    assert runs.finish("left", "--config.data.workers=3") == straight[0]
    assert runs.losses("left") == straight[1]


def test_killed_workers_are_replaced_and_the_run_ends_the_same(runs, straight):
    run, rng, kills = runs.start("replaced", *WORKERS), random.Random(0), 0
    begun(run)
    while run.poll() is None:
        time.sleep(rng.uniform(1, 3))
        for worker in workers_of(run)[:1]:
            os.kill(worker, signal.SIGKILL)
            kills += 1
    said = run.log.read_text()
    print(f"{kills} kills")
    if run.returncode:  # one that was killed three times before it had made anything is not replaced
        assert "error: data worker 1 of 2 was ended by signal 9 (Killed), 3 times before" in said
        assert runs.finish("replaced", *WORKERS) == straight[0]
    assert kills >= 2 and runs.losses("replaced") == straight[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_ends_a_run_in_good_order(runs, straight, number):
    """As a cluster sends it: the workers go on until the trainer has saved."""
    workdir = f"signalled_{number.name}"
    run = runs.start(workdir, *WORKERS, "--config.train.steps=100000", "--config.train.log_every=5")
    workers = begun(run)
    for process in (*workers, run.pid):
        os.kill(process, number)
    assert run.wait(120) == 128 + number, run.log.read_text()[-3000:]
    assert "saved: the same command goes on from there" in run.log.read_text() and all_gone(workers)
