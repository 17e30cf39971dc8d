"""However a run is ended and started again, it is the run that nothing disturbed."""

import os
import random
import signal
import time

import numpy as np
import pytest

pytestmark = pytest.mark.stress
KILLS = 20


def wait_until(condition, run, seconds=400):
    """Until it holds or the run has ended."""
    end = time.monotonic() + seconds
    while not condition() and run.poll() is None:
        assert time.monotonic() < end, run.log.read_text()[-2000:]
        time.sleep(0.002)


def test_killed_twenty_times_it_ends_the_same(runs, straight):
    """Half of the kills fall into a save, the others anywhere; four kills a run, on average."""
    rng, kills, during_save, turn = random.Random(0), 0, 0, 0
    while kills < KILLS:
        workdir, turn = f"killed_{turn}", turn + 1
        while True:
            run = runs.start(workdir)
            if rng.random() < 0.2:  # to its end
                break
            saved = runs.saved(workdir)
            if rng.random() < 0.5:
                wait_until(lambda: runs.saved(workdir) != saved and runs.saving(workdir), run)  # noqa: B023
                time.sleep(rng.uniform(0, 0.02))
            else:
                time.sleep(rng.uniform(0, 10))
            saving = runs.saving(workdir)
            run.kill()
            kills, during_save = kills + (run.wait() == -signal.SIGKILL), during_save + saving
        assert run.wait(900) == 0, run.log.read_text()[-3000:]
        assert run.log.read_text().splitlines()[-1] == f"state sha256 {straight[0]}"
        assert runs.losses(workdir) == straight[1]
        assert not runs.saving(workdir), "what was left half written is gone"
    print(f"{kills} kills, {during_save} during a save, {turn} runs")
    assert during_save >= 3


def test_on_other_meshes_the_losses_are_the_same(runs, straight):
    """Eight devices, then four, then two by two, each killed on the way."""
    meshes = [(8, []), (4, []), (4, ["--config.mesh.fsdp=2"])]
    for devices, flags in meshes[:2]:
        run, saved = runs.start("meshes", *flags, devices=devices), runs.saved("meshes")
        wait_until(lambda: len(set(runs.saved("meshes")) - set(saved)) >= 2, run)  # noqa: B023
        run.kill()
        run.wait()
    assert 0 < runs.saved("meshes")[-1] < 30, "it ended before it could be killed"
    runs.finish("meshes", *meshes[2][1], devices=meshes[2][0])
    steps, losses = zip(*runs.losses("meshes"), strict=True)
    assert steps == tuple(range(1, 31))
    np.testing.assert_allclose(losses, [loss for _, loss in straight[1]], rtol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_sigterm_at_any_time_saves_and_exits_143(runs, straight, seed):
    """Once training has begun: before that, nothing is there to save."""
    workdir, rng = f"terminated_{seed}", random.Random(seed)
    run = runs.start(workdir)
    wait_until(lambda: "from step 0" in run.log.read_text(), run)
    time.sleep(rng.uniform(0, 4))
    told = time.monotonic()
    run.terminate()
    status = run.wait(120)
    took, said = time.monotonic() - told, run.log.read_text()
    assert status == (0 if "state sha256" in said else 143), said[-3000:]
    if status:  # else it had ended by itself
        step = int(said.split("stopped at step ")[1].split()[0])
        assert runs.saved(workdir)[-1] == step and not runs.saving(workdir)
    assert took < 40
    assert runs.finish(workdir) == straight[0] and runs.losses(workdir) == straight[1]


def test_sigterm_while_reading_hangs_saves_and_ends(runs, straight):
    """A picture becomes a pipe that nobody writes to: whoever reads it waits for ever."""
    run = runs.start("hung", "--config.train.watchdog_minutes=60")
    wait_until((runs.folder / "hung" / "metrics.jsonl").exists, run)
    picture = next((runs.folder / "pictures").glob("*.png"))
    content = picture.read_bytes()
    picture.unlink()
    os.mkfifo(picture)
    try:
        logged = -1
        while logged != (logged := len(runs.losses("hung"))):  # until nothing moves any more
            time.sleep(15)
        assert run.poll() is None and logged < 30
        told = time.monotonic()
        run.terminate()
        assert run.wait(120) == 143, run.log.read_text()[-3000:]
        assert time.monotonic() - told < 40
        assert "stopped at step" in run.log.read_text()
    finally:
        picture.unlink()
        picture.write_bytes(content)
    assert runs.finish("hung") == straight[0] and runs.losses("hung") == straight[1]
