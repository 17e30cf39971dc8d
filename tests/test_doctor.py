"""`doctor`: what it advises for drivers, plugins and jaxlib, and that nothing that is broken ends it."""

import json
import os
import re
import sys

import pytest

from unclip_jax import cli, doctor

BOTH = "NVIDIA-SMI 1  {driver} Version: 550.54.15  CUDA{umd} Version: {cuda}"
INSTALLED = dict.fromkeys(doctor.PACKAGES, "0.12.0")
CUDA12, CUDA13 = {"jax-cuda12-plugin": "0.12.0"}, {"jax-cuda13-plugin": "0.12.0"}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine: machine(packages, what nvidia-smi prints or None, its exit status)."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(doctor, "_devices", lambda: ["1 gpu (Tesla T4)"])

    def make(packages, says=None, status=0):
        monkeypatch.setattr(doctor, "_version", packages.get)
        monkeypatch.setattr(doctor.shutil, "which", lambda name: str(tmp_path / name) if says else None)
        if says:
            script = f'#!/bin/sh\n[ "$1" ] && echo "Tesla T4, 15360 MiB" || echo "{says}"\nexit {status}\n'
            (tmp_path / "nvidia-smi").write_text(script)
            (tmp_path / "nvidia-smi").chmod(0o755)
        return doctor.examine()

    return make


def smi(cuda, new=False):
    return BOTH.format(driver="KMD" if new else "Driver", umd=" UMD" if new else "", cuda=cuda)


@pytest.mark.parametrize(
    ("plugins", "says", "advice"),
    [
        (CUDA12, smi("12.4"), None),
        (CUDA12, smi("13.0"), None),
        (CUDA13, smi("13.1", new=True), None),
        (
            CUDA13,
            smi("12.4"),
            "runs CUDA 12.4, jax-cuda13-plugin needs 13: pip uninstall .*install 'unclip_jax.cuda12.'",
        ),
        ({}, smi("12.4"), "cannot use the GPU: pip install 'unclip_jax.cuda12.'"),
        ({}, smi("13.0"), "cannot use the GPU: pip install 'unclip_jax.cuda.'"),
        (CUDA12, smi("11.8"), "runs CUDA 11.8, JAX needs 12 or 13: install a newer driver"),
        (CUDA12 | CUDA13, smi("13.0"), "two CUDA plugins"),
        (CUDA13, None, "nvidia-smi is not"),
        (
            {"jax-cuda12-plugin": "0.7.2"},
            smi("12.4"),
            "0.7.2 does not belong to jaxlib 0.12.0: pip install 'unclip_jax",
        ),
        ({}, None, None),
        ({"jax": None}, None, "jax is not installed"),
    ],
)
def test_advice_fits_driver_plugin_and_jaxlib(machine, plugins, says, advice):
    found = machine(INSTALLED | plugins, says)
    if advice is None:
        assert found["advice"] == [] and "none, everything fits" in doctor._table(found)
    else:
        (line,) = found["advice"]
        assert re.search(advice, line)
    if says:
        assert found["nvidia"]["driver"] == "550.54.15" and found["nvidia"]["gpus"] == "Tesla T4, 15360 MiB"


def test_a_driver_that_fails_says_its_own_words(machine):
    found = machine(INSTALLED | CUDA12, "couldn't communicate with the NVIDIA driver", status=9)
    assert "couldn't communicate" in found["nvidia"] and "couldn't communicate" in found["advice"][0]


def test_a_gpu_that_jax_does_not_use_is_said(machine, monkeypatch):
    monkeypatch.setattr(doctor, "_devices", lambda: ["1 cpu (cpu)", "JAX says: no"])
    assert "JAX uses the CPU" in machine(INSTALLED | CUDA12, smi("12.4"))["advice"][0]


def test_devices_that_do_not_start_are_one_line(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    said = doctor._devices()
    assert said.startswith("JAX does not start: ") and "\n" not in said and "Traceback" not in said
    monkeypatch.setattr(doctor, "SECONDS_FOR_DEVICES", 0.01)
    assert "does another process use it" in doctor._devices()


def test_devices_are_counted(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=3")
    assert doctor._devices() == ["3 cpu (cpu)"]


def test_one_broken_look_hides_no_other(machine, monkeypatch, capsys):
    def broken(*arguments):
        raise RuntimeError("broken\nin two lines")

    for look in ("_memory", "_missing", "_cache", "_nvidia", "_own_version", "_advice"):
        monkeypatch.setattr(doctor, look, broken)
    found = machine(INSTALLED)
    assert found["memory"] == "unknown: RuntimeError: broken in two lines"
    assert found["packages"]["jax"] == "0.12.0" and found["devices"] == ["1 gpu (Tesla T4)"]
    assert "broken" in doctor._table(found)


def test_cache_is_looked_into(machine, monkeypatch, tmp_path):
    cache = tmp_path / "cache"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
    assert f"{cache}: 0 files, 0.0 MiB, writable" in machine(INSTALLED)["compilation cache"]
    cache.mkdir()
    (cache / "program").write_bytes(bytes(2**20))
    assert "1 files, 1.0 MiB, writable" in machine(INSTALLED)["compilation cache"]
    monkeypatch.setattr(doctor.os, "access", lambda *arguments: False)
    assert "JAX_COMPILATION_CACHE_DIR to a folder that can be written" in machine(INSTALLED)["advice"][0]
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://bucket/cache")
    assert machine(INSTALLED)["compilation cache"] == "gs://bucket/cache"


@pytest.mark.parametrize("own", [None, "0.5", "0.9"])
def test_environment_is_what_the_user_set(machine, monkeypatch, capsys, own):
    """`cli.run` gives JAX nine tenths of a GPU where the user says nothing."""
    name = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    monkeypatch.setattr(cli, "SET_BY_US", set())
    monkeypatch.setenv(name, own or "")  # which is undone afterwards, whatever the command sets
    if own is None:
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "argv", ["doctor", "--json"])
    machine(INSTALLED)
    with pytest.raises(SystemExit):
        cli.run(doctor.main)
    assert os.environ[name] == (own or "0.9")
    assert json.loads(capsys.readouterr().out)["environment"].get(name) == own


def test_what_is_not_installed_is_named_with_its_extra(machine, monkeypatch):
    lines = ["jax>=0.10", 'emoji>=2; extra == "data"', 'jax[cuda13]>=1; extra == "cuda"', "x[y]; extra == 'test'"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: lines)
    found = machine(INSTALLED | CUDA12)
    assert found["missing"] == {"data": ["emoji"], "cuda": ["jax-cuda13-plugin"]}
    assert "emoji: pip install 'unclip_jax[data]'" in doctor._table(found)
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: None)
    assert machine(INSTALLED)["missing"] == {}


def test_json_holds_what_the_table_shows(machine, capsys):
    machine(INSTALLED | CUDA13, smi("13.0"))
    assert doctor.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert doctor.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in found.keys() - {"missing"})
    assert found["packages"]["jax"] in shown and found["nvidia"]["gpus"] in shown
