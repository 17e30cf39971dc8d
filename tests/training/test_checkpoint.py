import os
import shutil
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from unclip_jax import __version__
from unclip_jax.errors import StorageError, UserError
from unclip_jax.paths import to_path
from unclip_jax.training import checkpoint
from unclip_jax.training.checkpoint import Checkpointer, SaveClock
from unclip_jax.training.state import Skips, TrainState, abstract_state, digest, init_state, root_key


@pytest.fixture(scope="module")
def run(toy):
    """Trains the toy from `state` by `steps` steps on a mesh."""
    config, compiled = toy.config(), {}

    def run(mesh, steps, state):
        step = compiled.setdefault(mesh, toy.step(toy.Stage(), config, mesh))
        for _ in range(steps):
            state, _ = step(state, {}, toy.batch(int(state.step), mesh), root_key(0))
        return state

    return run


@pytest.fixture(scope="module")
def at_step(toy):
    """A state of the toy that says it is at a step, with numbers that differ from step to step."""
    rng = np.random.default_rng(0)
    start = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(a.dtype), abstract(toy, toy.mesh(1, 1)))

    def at_step(step, mesh):
        state = jax.tree.map(lambda leaf: leaf + leaf.dtype.type(step), start)._replace(step=np.int32(step))
        return jax.tree.map(lambda leaf, a: jax.device_put(leaf, a.sharding), state, abstract(toy, mesh))

    return at_step


def abstract(toy, mesh):
    return abstract_state(toy.Stage(), toy.config(), mesh)


def saved(workdir, *states, keep=3, meta=None):
    checkpointer = Checkpointer(str(workdir), keep)
    for state in states:
        checkpointer.save(state, meta or {})
    checkpointer.close()


def test_resumed_training_equals_uninterrupted_bit_for_bit(toy, run, tmp_path):
    mesh = toy.mesh(2, 4)
    config = toy.config()
    straight = digest(run(mesh, 6, init_state(toy.Stage(), config, mesh, 0)))
    checkpointer = Checkpointer(str(tmp_path), 2)
    halfway = run(mesh, 3, init_state(toy.Stage(), config, mesh, 0))
    at_three = digest(halfway)
    checkpointer.save(halfway, {})
    # Training goes on, in the very buffers that are being written.
    assert digest(run(mesh, 3, halfway)) == straight
    checkpointer.close()
    resumed = Checkpointer(str(tmp_path), 2).restore_latest(abstract(toy, mesh))
    assert int(resumed.step) == 3 and digest(resumed) == at_three
    assert digest(run(mesh, 3, resumed)) == straight


def test_restores_onto_other_meshes(toy, at_step, tmp_path):
    state = at_step(1, toy.mesh(2, 4))
    saved(tmp_path, state)
    for mesh in (toy.mesh(1, 1), toy.mesh(4, 2), toy.mesh(8, 1)):
        target = abstract(toy, mesh)
        restored = Checkpointer(str(tmp_path), 2).restore_latest(target)
        assert digest(restored) == digest(state)
        assert jax.tree.map(lambda a: a.sharding, restored) == jax.tree.map(lambda a: a.sharding, target)


def test_nothing_saved_yet_is_none(toy, tmp_path):
    checkpointer = Checkpointer(str(tmp_path / "new"), 2)
    assert checkpointer.latest_step() is None
    assert checkpointer.restore_latest(abstract(toy, toy.mesh(1, 1))) is None
    assert checkpointer.preempted(0) is False


def test_keeps_the_last_few_and_saves_a_step_once(toy, at_step, tmp_path):
    mesh, checkpointer = toy.mesh(1, 1), Checkpointer(str(tmp_path), 2)
    for step in (1, 2, 3):
        checkpointer.save(at_step(step, mesh), {})
        checkpointer.save(at_step(step, mesh), {})
    checkpointer.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]


def test_saving_behind_the_latest_step_is_an_error(toy, at_step, tmp_path):
    mesh = toy.mesh(1, 1)
    saved(tmp_path, at_step(2, mesh))
    with pytest.raises(UserError, match="already holds step 2, so step 1 was not saved"):
        Checkpointer(str(tmp_path), 2).save(at_step(1, mesh), {})


def test_interrupted_save_is_ignored_and_cleaned_up(toy, at_step, tmp_path):
    state = at_step(1, toy.mesh(1, 1))
    saved(tmp_path, state)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "1", folder / "2.orbax-checkpoint-tmp")
    (folder / "2.orbax-checkpoint-tmp" / "_CHECKPOINT_METADATA").unlink()
    checkpointer = Checkpointer(str(tmp_path), 2)
    assert digest(checkpointer.restore_latest(abstract(toy, toy.mesh(1, 1)))) == digest(state)
    checkpointer.close()
    assert [path.name for path in folder.iterdir()] == ["1"]
    saved(tmp_path, at_step(2, toy.mesh(1, 1)))  # the step that was interrupted can be saved
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


def test_every_nth_step_stays_beside_the_last(toy, at_step, tmp_path):
    checkpointer, state = Checkpointer(str(tmp_path), 2, keep_every=3), at_step(1, toy.mesh(1, 1))
    for step in range(1, 9):
        checkpointer.save(state._replace(step=jnp.int32(step)), {})
    checkpointer.close()
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [3, 6, 7, 8]


def test_run_killed_while_saving_leaves_the_step_before(tmp_path):
    program = textwrap.dedent("""
        import os, signal, sys
        import jax, jax.numpy as jnp
        from unclip_jax.training.checkpoint import Checkpointer
        from unclip_jax.training.state import Skips, TrainState
        none = Skips(*[jnp.int32(0)] * 5)
        weights = {"w": jnp.arange(2.0**24)}
        checkpointer = Checkpointer(sys.argv[1], 2)
        checkpointer.save(TrainState(jnp.int32(1), none, weights, weights, weights), {})
        checkpointer.wait()
        checkpointer.save(TrainState(jnp.int32(2), none, weights, weights, weights), {})
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert any("tmp" in path.name for path in (tmp_path / "checkpoints").iterdir())
    checkpointer = Checkpointer(str(tmp_path), 2)
    assert checkpointer.latest_step() == 1
    like = jax.ShapeDtypeStruct((2**24,), jnp.float32, sharding=SingleDeviceSharding(jax.devices()[0]))
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=like.sharding)
    weights = {"w": like}
    state = checkpointer.restore_latest(TrainState(count, Skips(*[count] * 5), weights, weights, weights))
    assert np.array_equal(state.ema["w"], np.arange(2.0**24)) and int(state.step) == 1


def test_save_that_fails_behind_the_back_is_raised(toy, at_step, tmp_path, monkeypatch):
    mesh, rename = toy.mesh(1, 1), os.rename

    def disk_full(source, target, **options):
        if str(target).endswith("checkpoints/1"):
            raise OSError("disk full")
        rename(source, target, **options)

    state = at_step(1, mesh)
    for find in ("check", "wait", "close"):
        checkpointer = Checkpointer(str(tmp_path / find), 2)
        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", disk_full)
            patch.setattr(os, "replace", disk_full)
            checkpointer.save(state, {})
            with pytest.raises(OSError, match="disk full"):
                while True:
                    getattr(checkpointer, find)()
                    assert find == "check"
        assert checkpointer.latest_step() is None


def test_a_save_that_lost_a_part_in_silence_ends_in_one_line(toy, at_step, tmp_path, monkeypatch):
    """Storage failed where Orbax takes an error for "nothing is there"."""
    checkpointer = Checkpointer(str(tmp_path), 2)
    checkpointer.save(at_step(1, toy.mesh(1, 1)), {})
    monkeypatch.setattr(checkpoint, "_complete", lambda manager, step: False)
    with pytest.raises(StorageError, match=r"checkpoint .*/1 is not whole.*: the same command goes on from the one"):
        checkpointer.wait()


def test_checkpoint_of_another_model_is_an_error_that_lists_the_leaves(toy, at_step, tmp_path):
    mesh = toy.mesh(2, 4)
    saved(tmp_path, at_step(1, mesh))
    target = abstract(toy, mesh)
    target.params["hidden"]["bias"] = jax.ShapeDtypeStruct((7,), jnp.float32)
    target.params["more"] = target.ema.pop("out")
    with pytest.raises(UserError) as error:
        Checkpointer(str(tmp_path), 2).restore_latest(target)
    for part in ("missing params/more/kernel (256, 16)", "unexpected ema/out/kernel (256, 16)",
                 "params/hidden/bias is (256,), expected (7,)"):
        assert part in str(error.value)


def test_half_copied_checkpoint_is_an_error(toy, at_step, tmp_path):
    saved(tmp_path, at_step(1, toy.mesh(1, 1)))
    shutil.rmtree(tmp_path / "checkpoints" / "1" / "opt_state")
    with pytest.raises(UserError, match=r"checkpoints/1 is damaged \(it lacks opt_state\), and no older one is good"):
        Checkpointer(str(tmp_path), 2).restore_latest(abstract(toy, toy.mesh(1, 1)))


@pytest.mark.slow
def test_flipped_bits_are_noticed_wherever_they_are(toy, at_step, tmp_path, capsys):
    """A bit of each file of the newest checkpoint is flipped, file after file. The checkpoint before it is taken then,
    unless that bit does not matter."""
    mesh, rng = toy.mesh(2, 4), np.random.default_rng(0)
    older, newer = at_step(1, mesh), at_step(2, mesh)
    saved(tmp_path / "good", older, newer)
    files = sorted(path for path in (tmp_path / "good" / "checkpoints" / "2").rglob("*") if path.is_file())
    taken = []
    for number, path in enumerate(files * 3):
        workdir = tmp_path / str(number)
        shutil.copytree(tmp_path / "good", workdir)
        spoiled = workdir / path.relative_to(tmp_path / "good")
        content = bytearray(spoiled.read_bytes())
        if not content:
            continue
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        spoiled.write_bytes(content)
        state = Checkpointer(str(workdir), 2).restore_latest(abstract(toy, mesh))
        said = capsys.readouterr().err
        assert digest(state) == digest(older if int(state.step) == 1 else newer), path
        assert ("is damaged" in said and said.count("\n") == 1) == (int(state.step) == 1), said
        assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["1", "2"][: int(state.step)]
        taken.append(int(state.step))
    assert taken.count(1) > len(taken) / 3, "many bits matter"


def test_change_of_one_element_is_named(toy, at_step, tmp_path, monkeypatch):
    """Storage that gives other numbers, with no error of its own."""
    mesh = toy.mesh(2, 4)
    saved(tmp_path, at_step(1, mesh))
    restore = checkpoint._restore

    def spoiled(*arguments):
        trees = restore(*arguments)
        kernel = trees["ema"]["hidden"]["kernel"]
        trees["ema"]["hidden"]["kernel"] = kernel.at[3, 5].set(jnp.nextafter(kernel[3, 5], jnp.inf))
        return trees

    monkeypatch.setattr(checkpoint, "_restore", spoiled)
    with pytest.raises(UserError, match=r"checkpoints/1 is damaged \(ema/hidden/kernel was changed\)"):
        Checkpointer(str(tmp_path), 2).restore_latest(abstract(toy, mesh))


def test_checkpoint_of_a_time_before_checksums_is_read(toy, at_step, tmp_path, monkeypatch):
    mesh = toy.mesh(2, 4)
    monkeypatch.setattr(checkpoint, "checksums", lambda tree: {})
    monkeypatch.setattr(checkpoint, "_sha256", lambda meta: None)
    saved(tmp_path, at_step(1, mesh))
    monkeypatch.undo()
    state = Checkpointer(str(tmp_path), 2).restore_latest(abstract(toy, mesh))
    assert digest(state) == digest(at_step(1, mesh))


def test_copied_run_under_a_relative_path_restores(toy, at_step, tmp_path, monkeypatch):
    state = at_step(1, toy.mesh(1, 1))
    saved(tmp_path / "here", state)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    shutil.rmtree(tmp_path / "here")
    monkeypatch.chdir(tmp_path)
    restored = Checkpointer("there", 2).restore_latest(abstract(toy, toy.mesh(2, 4)))
    assert digest(restored) == digest(state)


def test_meta_is_read_alone(toy, at_step, tmp_path):
    state = at_step(2, toy.mesh(2, 4))
    saved(tmp_path, state, meta={"config": toy.config().to_dict()})
    for tree in ("params", "ema", "opt_state"):
        shutil.rmtree(tmp_path / "checkpoints" / "2" / tree)
    meta = Checkpointer(str(tmp_path), 2).latest_meta()
    assert meta["step"] == 2 and meta["version"] == __version__ and meta["config"]["optim"]["b2"] == 0.99


def test_in_a_bucket_checkpoints_are_kept_and_restored(toy, at_step, bucket):
    """Arrays by TensorStore's own client, the rest by gcsfs: neither may keep what the other changed."""
    mesh = toy.mesh(2, 4)
    states = [at_step(step, mesh) for step in (1, 2, 3)]
    saved(f"{bucket}/run", *states, keep=2, meta={"config": {"a": [1, 2]}})
    checkpointer = Checkpointer(f"{bucket}/run/", 2)
    assert sorted(checkpointer._manager.all_steps()) == [2, 3] and checkpointer.latest_step() == 3
    assert digest(checkpointer.restore_latest(abstract(toy, toy.mesh(8, 1)))) == digest(states[-1])
    checkpointer.close()
    (to_path(bucket) / "run" / "checkpoints" / "3" / "ema" / "manifest.ocdbt").unlink()
    checkpointer = Checkpointer(f"{bucket}/run", 2)
    assert digest(checkpointer.restore_latest(abstract(toy, mesh))) == digest(states[1])
    saved(f"{bucket}/run", states[2], keep=2)
    assert Checkpointer(f"{bucket}/run", 2).latest_meta()["step"] == 3
    checkpointer.close()


def test_checkpoints_are_due_by_time(toy, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now)
    clock, never = (SaveClock(minutes, toy.mesh(2, 4)) for minutes in (1.0, 0.0))
    now += 59
    assert not clock.due(ask=True) and not clock.due(ask=True), "it is not time"
    now += 2
    assert not clock.due(ask=False), "as it was when asked"
    assert not clock.due(ask=False), "nobody has asked"
    assert not clock.due(ask=True)
    assert clock.due(ask=True)
    clock.restart()
    assert not clock.due(ask=True) and not clock.due(ask=True)
    assert not never.due(ask=True) and not never.due(ask=True)
