"""A save that fails at any file operation never leaves a checkpoint that loads wrong."""

import errno
import os
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from unclip_jax.training.checkpoint import Checkpointer
from unclip_jax.training.state import Skips, TrainState, digest

pytestmark = pytest.mark.stress
OPERATIONS = (
    *("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "os.chmod", "os.utime"),
    *("os.truncate", "shutil.rmtree", "shutil.move", "shutil.copyfile"),
)


class Faults:
    """An audit hook, which sees every file operation of Python, in every thread, and can refuse it."""

    def __init__(self):
        self.folder, self.left, self.lasting, self.hit = None, 0, False, None
        sys.addaudithook(self._hook)

    def arm(self, folder, at, lasting):
        """The operation number `at` from now on below `folder` fails; lasting: and all after it."""
        self.folder, self.left, self.lasting, self.hit = str(folder), at, lasting, None

    def _hook(self, event, arguments):
        if self.folder is None or event not in OPERATIONS or not str(arguments[0]).startswith(self.folder):
            return
        self.left -= 1
        if self.left == 0 or (self.left < 0 and self.lasting):
            self.hit = self.hit or f"{event} {arguments[0]}"
            raise OSError(errno.ENOSPC, "no space left on device (injected)")


@pytest.fixture(scope="module")
def faults():
    return Faults()


def save(folder, state):
    """Saves and waits, as the training loop does at its end; the error, if one came."""
    try:
        checkpointer = Checkpointer(str(folder), 2)
        checkpointer.save(state, {})
        checkpointer.close()
    except Exception as error:
        return error
    return None


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """(a folder that holds step 1, state 1, state 2, how to ask for either)."""
    tree = {"kernel": jnp.arange(10_000.0), "bias": jnp.ones(7)}
    one = TrainState(jnp.int32(1), Skips(*[jnp.int32(0)] * 5), tree, jax.tree.map(jnp.copy, tree), {"mu": tree})
    two = jax.tree.map(lambda leaf: leaf + 1, one)
    folder = tmp_path_factory.mktemp("one")
    assert save(folder, one) is None
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return folder, one, two, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), one)


def newest(folder, abstract):
    checkpointer = Checkpointer(str(folder), 2)
    state = checkpointer.restore_latest(abstract)
    checkpointer.close()
    return int(state.step), digest(state)


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "disk_full"])
def test_error_at_every_operation(states, faults, tmp_path, lasting):
    first, one, two, abstract = states
    expected, failed, at = {1: digest(one), 2: digest(two)}, [], 0
    while True:
        at += 1
        folder = tmp_path / str(at)
        shutil.copytree(first, folder)
        faults.arm(folder, at, lasting)
        error = save(folder, two)
        faults.folder = None  # disarmed
        step, found = newest(folder, abstract)
        assert found == expected[step], f"operation {at} ({faults.hit}): step {step} is not what was saved"
        if error is None and faults.hit is None:
            assert step == 2
            break
        if error is None:
            assert step == 2, f"operation {at} ({faults.hit}) failed in silence, and step 2 is not there"
        failed.append(faults.hit)
        time.sleep(0.3)  # other threads of the save still write; a new process would not meet them
        again = shutil.copytree(folder, tmp_path / f"{at}_again")
        assert save(again, two) is None and newest(again, abstract) == (2, expected[2]), f"{at}: cannot be saved again"
    print(f"{len(failed)} operations refused, of {len(set(failed))} kinds")
    assert len(failed) > 20


LIMITED = """
import resource, signal, sys
import jax, jax.numpy as jnp
from unclip_jax.training.checkpoint import Checkpointer
from unclip_jax.training.state import Skips, TrainState

folder, size = sys.argv[1], int(sys.argv[2])
checkpointer = Checkpointer(folder, 2)
tree = {"kernel": jnp.arange(10_000.0) + 1, "bias": jnp.ones(7) + 1}
state = TrainState(jnp.int32(2), Skips(*[jnp.int32(1)] * 5), tree, tree, {"mu": tree})
jax.block_until_ready(state)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
checkpointer.save(state, {})
checkpointer.close()
"""


@pytest.mark.parametrize("size", [0, 10, 100, 1000, 10_000, 30_000, 50_000, 200_000])
def test_files_cut_short(states, tmp_path, size):
    """Also what is written outside Python: no file may grow beyond `size` bytes."""
    first, one, two, abstract = states
    folder = shutil.copytree(first, tmp_path / "run")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", LIMITED, str(folder), str(size)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    step, found = newest(folder, abstract)
    assert (step, found) == ((2, digest(two)) if run.returncode == 0 else (1, digest(one))), run.stderr[-2000:]
    assert (run.returncode != 0 and "Error" in run.stderr) if size <= 1000 else (run.returncode == 0 or size < 200_000)


FULL = """
import resource, signal, sys
from unclip_jax import cli, train
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
cli.run(train.main)
"""


@pytest.mark.parametrize("size", [100, 3000, 20_000])
def test_training_on_a_full_disk_ends_in_one_line(runs, size):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", FULL, str(size), f"--config={runs.folder / 'small.json'}"]
    command += [f"--workdir={runs.folder / f'full_{size}'}"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    said = run.stderr.splitlines()
    assert run.returncode == 2 and "Traceback" not in run.stderr, run.stderr[-3000:]
    assert said[-1].startswith("error: ") and "File too large; the checkpoints there are kept" in said[-1], said[-5:]
    assert sum(line.startswith("error") for line in said) == 1 and len(said) < 20
