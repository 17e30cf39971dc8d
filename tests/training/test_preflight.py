"""What a run checks before it compiles anything, alone and with real processes; and what ends a run that hangs."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from shrink import save_pictures, small_config

from unclip_jax.errors import UserError
from unclip_jax.training import preflight

ROOT = Path(__file__).parents[2]


def start(*program):
    """A Python process that knows this package, on one CPU device."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path), "XLA_FLAGS": ""}
    return subprocess.Popen(
        [sys.executable, *program], env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def train_together(tmp_path, *own_arguments, wait=60):
    """Starts one process of a run for each tuple of arguments, of a small CLIP on twelve pictures."""
    source = f"folder:{save_pictures(tmp_path / 'pictures')}"
    config = small_config("clip").unlock()
    config.data.update(dict(source=source, threads=1))
    (tmp_path / "small.py").write_text(
        f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({config.to_dict()!r})\n"
    )
    command = ["-m", "unclip_jax.train", f"--config={tmp_path / 'small.py'}", f"--workdir={tmp_path / 'run'}"]
    command += [f"--coordinator=localhost:{free_port()}", f"--wait={wait}"]
    return [start(*command, f"--process={i}", *own) for i, own in enumerate(own_arguments)]


def test_processes_of_other_configs_end_before_anything_is_compiled(tmp_path):
    two = "--processes=2"
    runs = train_together(tmp_path, [two], [two, "--config.optim.b2=0.5", "--config.train.seed=3"])
    began = time.monotonic()
    for run in runs:
        _, said = run.communicate(timeout=60)
        line = said.splitlines()[-1]
        assert run.returncode == 2 and line.startswith("error: the processes of this run differ: process 1 on ")
        assert "config.optim.b2 = 0.5, process 0 has 0.98" in line and "config.train.seed = 3, process 0 has 0" in line
    assert time.monotonic() - began < 30
    assert not (tmp_path / "run").exists()


def test_a_process_that_waits_in_vain_says_so(tmp_path):
    (run,) = train_together(tmp_path, ["--processes=2"], wait=3)
    _, said = run.communicate(timeout=30)
    line = said.splitlines()[-1]
    assert run.returncode == 1 and line.startswith("error: not all processes of this run came within 3 seconds")


SHARES = """
import hashlib, sys, jax
from unclip_jax.training import preflight
preflight.join(sys.argv[1], 3, int(sys.argv[2]), 60)
made = lambda: print("made") or bytes(range(256)) * 20_000
for got in (preflight.from_first(b"process %d" % jax.process_index()), preflight.from_first(b""),
            preflight.made_by_first(made)):
    print(len(got), got[:9], hashlib.sha256(got).hexdigest())
"""


def test_all_processes_take_the_bytes_of_the_first(tmp_path):
    assert preflight.from_first(b"alone") == preflight.made_by_first(lambda: b"alone") == b"alone"
    (tmp_path / "shares.py").write_text(SHARES)
    address = f"localhost:{free_port()}"
    runs = [start(tmp_path / "shares.py", address, str(process)) for process in range(3)]
    said = [[line for line in run.communicate(timeout=60)[0].splitlines() if "[Gloo]" not in line] for run in runs]
    made = bytes(range(256)) * 20_000
    expected = [f"{len(data)} {data[:9]!r} {hashlib.sha256(data).hexdigest()}" for data in (b"process 0", b"", made)]
    assert said == [["made", *expected], expected, expected]


def test_differences_are_named_by_process_and_value(monkeypatch):
    values = {"code": "a", "config.train.seed": 0, "mesh": [8, 1]}
    everyone = [{"host": f"host-{i}", "values": dict(values)} for i in range(3)]
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(preflight, "gathered", lambda data: [json.dumps(own).encode() for own in everyone])
    preflight.agree(values)
    everyone[2]["values"] |= {"code": "b", "extra": 1}
    with pytest.raises(UserError) as caught:
        preflight.agree(values)
    assert str(caught.value) == (
        "the processes of this run differ: process 2 on host-2 has code = b, process 0 has a; "
        "process 2 on host-2 has extra = 1, process 0 has None"
    )
    for i in range(7):
        everyone[1]["values"][f"k{i}"] = i
    with pytest.raises(UserError, match=r"k4 = 4, process 0 has None; and 4 more$"):
        preflight.agree(values)


def test_facts_tell_code_packages_devices_and_every_key(monkeypatch, tmp_path):
    config = {"train": {"seed": 0, "steps": 3}, "dtype": "float32"}
    facts = preflight.facts(config)
    assert facts["config.train.steps"] == 3 and facts["config.dtype"] == "float32"
    assert facts["jax"] == jax.__version__ and facts["local devices"] == 8
    (tmp_path / "module.py").write_text("x = 1\n")
    monkeypatch.setattr(preflight.unclip_jax, "__file__", str(tmp_path / "__init__.py"))
    one = preflight.facts(config)["code"]
    (tmp_path / "module.py").write_text("x = 2\n")
    assert len({facts["code"], one, preflight.facts(config)["code"]}) == 3


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("host:1", -1, -1), "belong together"),
        (("", 2, 0), "belong together"),
        (("", 0, -1), "belong together"),
        (("", -1, 0), "belong together"),
        (("host:1", 2, 2), "expected HOST:PORT and a process below"),
        (("host", 2, 0), "expected HOST:PORT"),
    ],
)
def test_half_a_cluster_is_refused(given, says):
    with pytest.raises(UserError, match=says):
        preflight.join(*given, 10)


def test_a_run_never_falls_back_to_the_cpu(monkeypatch):
    monkeypatch.setattr(preflight.jax.config, "update", lambda *_: None)
    with pytest.raises(UserError, match="--platform=gpi: expected one of tpu, gpu, cpu"):
        preflight.check_platform("gpi")
    preflight.check_platform("cpu")
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: name == "libtpu")
    preflight.check_platform("")  # JAX_PLATFORMS says cpu
    monkeypatch.setattr(type(jax.config), "jax_platforms", None)
    with pytest.raises(UserError, match=r"libtpu is installed, but JAX finds no device .* --platform=cpu"):
        preflight.check_platform("")
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    preflight.check_platform("")


def test_a_platform_that_is_not_there_is_refused():
    program = "from unclip_jax import cli, train; cli.run(train.main)"
    run = start("-c", program, "--config=configs/clip.py:tiny", "--workdir=/tmp/none", "--platform=gpu")
    _, said = run.communicate(timeout=60)
    assert run.returncode == 2 and said.splitlines()[-1].startswith("error: --platform=gpu, but JAX finds none: ")


SILENT = """
import sys, threading, time
from unclip_jax.training.preflight import Watchdog

def standing_still():
    {wait}

with Watchdog(2 / 60) as dog:
    for _ in range(4):
        time.sleep(0.7)
        dog.beat()
    print("beats were heard", flush=True)
    standing_still()
"""


@pytest.mark.parametrize(
    ("wait", "says"),
    [
        ("time.sleep(60)", "error: no step for 0.0"),
        # `sum` over a range never lets go of Python's lock.
        ("sys.setswitchinterval(1000); sum(range(10**11))", "Timeout (0:00:04)!"),
    ],
)
def test_watchdog_ends_a_silent_run_and_shows_where_it_stood(wait, says):
    run = start("-c", SILENT.format(wait=wait))
    out, said = run.communicate(timeout=40)
    assert "beats were heard" in out and run.returncode == 1
    assert says in said and "in standing_still" in said


def test_watchdog_of_zero_minutes_never_bites():
    run = start("-c", SILENT.replace("2 / 60", "0").format(wait="time.sleep(1)"))
    assert run.communicate(timeout=40) and run.returncode == 0
