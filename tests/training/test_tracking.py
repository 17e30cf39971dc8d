"""Traces of some steps of a run, and runs at Weights & Biases, whose package stands in here."""

import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from shrink import save_pictures, small_config

from unclip_jax import train
from unclip_jax.errors import UserError
from unclip_jax.training import tracking
from unclip_jax.training.tracking import Profiler, tracked


def traced(folder):
    """Names of all events in the traces below a folder, which are as many as there were."""
    found = []
    for path in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for line in plane.lines:
                found += [event.name for event in line.events]
    return found


@pytest.mark.parametrize(("start", "count"), [(0, 3), (100, 1)])
def test_as_many_steps_are_traced_as_were_asked_for(tmp_path, start, count):
    profiler, x = Profiler(str(tmp_path), start, count), jnp.ones(3)

    @jax.jit
    def watched_step(x):
        return x + 1

    for k in range(start + 1, start + 20):
        with profiler.step(k, x):
            x = watched_step(x)
    profiler.close(x)
    found = traced(tmp_path / "profile")
    assert found.count(tracking.STEP) == count and "PjitFunction(watched_step)" in found


def test_a_trace_that_the_run_s_end_cuts_is_written(tmp_path):
    profiler = Profiler(str(tmp_path), 0, 100)
    for k in range(1, 13):
        profiler.step(k, None)
    profiler.close(None)
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_no_trace_without_being_asked(tmp_path):
    profiler = Profiler(str(tmp_path), 0, 0)
    for k in range(1, 20):
        profiler.step(k, None)
    profiler.close(None)
    assert list(tmp_path.iterdir()) == []


def test_a_trace_goes_to_a_folder_whose_name_is_no_utf_8(tmp_path):
    profiler = Profiler(str(tmp_path / "caf\udce9"), 0, 1)
    for k in range(1, 13):
        profiler.step(k, None)
    assert list(tmp_path.glob("caf*/profile/**/*.xplane.pb"))


def test_a_trace_of_a_run_in_a_bucket_is_copied_there(bucket, tmp_path, monkeypatch):
    from unclip_jax.paths import files_below, to_path

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    profiler = Profiler(bucket, 0, 1)
    for k in range(1, 13):
        profiler.step(k, None)
    assert any(name.endswith(".xplane.pb") for name in files_below(to_path(bucket) / "profile"))
    assert not list(tmp_path.iterdir()), "nothing stays on the disk"


@pytest.fixture
def started(monkeypatch):
    """What `wandb.init` was given, and which runs have ended."""
    calls = []

    def init(**given):
        if given["project"] == "refused":
            raise RuntimeError("no tensorboard package")
        calls.append(given)
        return SimpleNamespace(finish=lambda exit_code: calls.append(["ended", "failed"][exit_code]))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=RuntimeError))
    return calls


def test_a_resumed_run_goes_on_under_its_first_id(tmp_path, started):
    config = small_config("clip")
    for _ in range(2):
        with tracked("pictures", str(tmp_path / "run"), config):
            assert started[-1] != "ended"
        assert started[-1] == "ended"
    first, _, second, _ = started
    assert first == second and first["resume"] == "allow" and first["sync_tensorboard"]
    assert (first["project"], first["name"], first["config"]) == ("pictures", "run", config.to_dict())
    with tracked("pictures", str(tmp_path / "other"), config):
        assert started[-1]["id"] != first["id"]


def test_a_run_that_fails_is_not_said_to_have_ended_well(tmp_path, started):
    with pytest.raises(ValueError, match="lost"), tracked("pictures", str(tmp_path), small_config("clip")):
        raise ValueError("lost")
    assert started[-1] == "failed"
    with pytest.raises(UserError, match="--wandb refused: no tensorboard package"):
        tracked("refused", str(tmp_path), small_config("clip")).__enter__()


def test_nobody_is_told_without_a_project(tmp_path, started):
    with tracked("", str(tmp_path), small_config("clip")):
        assert started == [] and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_training_run_is_traced_and_told(tmp_path, started, monkeypatch):
    """The trace knows parts of the model by their names; no secret of the environment is stored."""
    monkeypatch.setenv("WANDB_API_KEY", "5ecre7" * 6)
    config = small_config("clip").unlock()
    config.data.source = f"folder:{save_pictures(tmp_path / 'pictures')}"
    config.train.steps = tracking.BEFORE + 3
    train.run(config.lock(), str(tmp_path / "run"), profile=2, wandb="pictures")
    assert traced(tmp_path / "run" / "profile").count(tracking.STEP) == 2
    assert started[0]["project"] == "pictures" and started[1] == "ended"
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 5 and not any(b"5ecre7" in path.read_bytes() for path in files)
