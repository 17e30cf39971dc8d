"""Real processes, joined by `jax.distributed` over gloo."""

import os
import signal
import time

import numpy as np
import pytest

pytestmark = pytest.mark.stress


def start(runs, workdir, count, port, *flags, **options):
    together = [f"--coordinator=localhost:{port}", f"--processes={count}", *flags]
    return [runs.start(workdir, *together, f"--process={i}", devices=4 // count, **options) for i in range(count)]


def wait_for_a_checkpoint(runs, workdir, processes):
    while not runs.saved(workdir):
        for run in processes:
            assert run.poll() is None, run.log.read_text()[-3000:]
        time.sleep(0.1)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("mixed", [False, True])
def test_losses_are_those_of_one_process(runs, straight, port, count, mixed):
    workdir = f"of_{count}{'_mixed' * mixed}"
    processes = start(runs, workdir, count, port, mixed=mixed)
    for run in processes:
        assert run.wait(900) == 0, run.log.read_text()[-3000:]
    assert len({run.log.read_text().splitlines()[-1] for run in processes}) == 1, "one digest"
    steps, losses = zip(*runs.losses(workdir), strict=True)
    assert steps == tuple(range(1, 31))
    np.testing.assert_allclose(losses, [loss for _, loss in straight[1]], rtol=1e-5)


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_is_killed_the_other_ends_with_a_clear_line(runs, port, victim):
    processes = start(runs, f"one_killed_{victim}", 2, port, "--config.train.steps=100000")
    wait_for_a_checkpoint(runs, f"one_killed_{victim}", processes)
    processes[victim].kill()
    died = time.monotonic()
    survivor = processes[1 - victim]
    assert survivor.wait(120) == 1
    assert time.monotonic() - died < 30
    line = survivor.log.read_text().splitlines()[-1]
    assert line.startswith("error: another process of this run has died") and "from the last checkpoint" in line


def test_when_one_hangs_the_other_ends(runs, port):
    processes = start(runs, "one_hangs", 2, port, "--config.train.steps=100000")
    wait_for_a_checkpoint(runs, "one_hangs", processes)
    os.kill(processes[1].pid, signal.SIGSTOP)
    stopped = time.monotonic()
    assert processes[0].wait(120) == 1
    assert time.monotonic() - stopped < 45
    assert processes[0].log.read_text().splitlines()[-1].startswith("error: ")
    processes[1].kill()


def test_sigterm_to_one_saves_and_ends_all(runs, straight, port):
    processes = start(runs, "told", 2, port)
    wait_for_a_checkpoint(runs, "told", processes)
    processes[1].terminate()
    for run in processes:
        assert run.wait(120) == 143, run.log.read_text()[-3000:]
    step = runs.saved("told")[-1]
    assert step < 30 and not runs.saving("told")
    runs.finish("told")
    np.testing.assert_allclose([x for _, x in runs.losses("told")], [x for _, x in straight[1]], rtol=1e-5)
