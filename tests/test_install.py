"""Installation: versions that fit together, and a wheel that works without the checkout."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from shrink import save_cascade, save_pictures

ROOT = Path(__file__).parent.parent
ENVIRONMENTS = {"oldest": {"python_version": "3.11"}, "newest": {"python_version": "3.13"}}
PINS = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]


@pytest.fixture
def arguments(monkeypatch):
    """What setup.py hands to setuptools."""
    given = {}
    fake = SimpleNamespace(setup=lambda **arguments: given.update(arguments), find_packages=lambda **_: [])
    monkeypatch.setitem(sys.modules, "setuptools", fake)
    runpy.run_path(str(ROOT / "setup.py"))
    return given


def pinned(which):
    pins = (pin for pin in PINS if not pin.marker or pin.marker.evaluate(ENVIRONMENTS[which]))
    return {canonicalize_name(pin.name): pin for pin in pins}


@pytest.mark.parametrize("which", ENVIRONMENTS)
def test_constraints_pin_what_setup_admits(which, arguments):
    lines = arguments["install_requires"] + arguments["extras_require"]["test"]
    assert len(lines) > 20
    for wanted in map(Requirement, lines):
        (version,) = {clause.version for clause in pinned(which)[canonicalize_name(wanted.name)].specifier}
        assert wanted.specifier.contains(version), f"{wanted.name} {version} is outside of {wanted.specifier}"


def test_every_pin_is_one_version_in_each_environment():
    assert all(re.fullmatch(r"==[^,*]+", str(pin.specifier)) for pin in PINS)
    names = [pin.name for pin in PINS if not pin.marker]
    assert len(names) == len(set(names)) and not {pin.name for pin in PINS if pin.marker} & set(names)


def test_oldest_pin_of_jax_is_the_lower_bound_of_setup(arguments):
    (jax,) = (line for line in arguments["install_requires"] if Requirement(line).name == "jax")
    assert str(pinned("oldest")["jax"].specifier) == f"=={jax.removeprefix('jax>=')}"
    extras = [line for lines in arguments["extras_require"].values() for line in lines if line.startswith("jax[")]
    assert {line.partition("]")[2] for line in extras} == {jax.removeprefix("jax")} and len(extras) == 3


def test_orbax_stays_below_its_new_interface(arguments):
    (orbax,) = (Requirement(line) for line in arguments["install_requires"] if line.startswith("orbax"))
    assert not orbax.specifier.contains("1.0.0") and orbax.specifier.contains("0.99")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel of a copy of this checkout, in an environment of its own that sees this one's other packages: (wheel,
    its bin folder)."""
    root = tmp_path_factory.mktemp("install")
    skipped = shutil.ignore_patterns(".git", "build", "*.egg-info", "__pycache__", "tests")
    shutil.copytree(ROOT, root / "copy", ignore=skipped)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(root), str(root / "copy")], check=True)
    (wheel,) = root.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(root / "venv")], check=True)
    python = root / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", str(wheel)], check=True)
    (site,) = (root / "venv" / "lib").glob("python*/site-packages")
    # A path in a .pth comes after the environment's own packages, and .pth files there are not read: an editable
    # installation of this checkout stays unseen.
    (site / "tests.pth").write_text("".join(f"{path}\n" for path in sys.path if path.endswith("-packages")))
    return wheel, root / "venv" / "bin"


@pytest.mark.slow
def test_wheel_holds_the_package_with_configs_and_experiments(installed):
    names = set(zipfile.ZipFile(installed[0]).namelist())
    package = (path for kind in ("py", "html") for path in (ROOT / "unclip_jax").rglob(f"*.{kind}"))
    assert {str(path.relative_to(ROOT)) for path in package} <= names
    for path in [*(ROOT / "configs").glob("*.py"), *(ROOT / "experiments").glob("*/experiment.py")]:
        assert f"unclip_jax/{path.relative_to(ROOT)}" in names


@pytest.mark.slow
def test_commands_run_from_the_wheel_in_an_empty_folder(installed, tmp_path):
    save_pictures(tmp_path / "pictures")
    save_cascade(tmp_path / "cascade")
    (tmp_path / "here").mkdir()
    ours = ("PYTHONPATH", "XLA_FLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in ours} | {"JAX_PLATFORMS": "cpu"}

    def unclip(*words):
        command = [str(installed[1] / "unclip"), *words]
        place = dict(cwd=tmp_path / "here", env=environment)
        done = subprocess.run(command, **place, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "quickstart" in unclip()
    doctor = unclip("doctor")
    assert f"({installed[1].parent}" in doctor and "1 cpu (cpu)" in doctor
    assert "total" in unclip("plan", "--config=configs/upsampler_256.py:tiny")
    data = [f"--config.data.source=folder:{tmp_path / 'pictures'}", "--config.data.threads=1"]
    sizes = ["--config.train.batch_size=2", "--config.train.steps=1", "--config.train.eval_size=2"]
    said = unclip("train", "--config=configs/clip.py:tiny", "--workdir=run", *data, *sizes)
    assert re.search(r"^state sha256 [0-9a-f]+$", said, re.MULTILINE)
    unclip("sample", "--bundle", str(tmp_path / "cascade"), "--prompt", "a red apple", "-n", "1")
    assert sorted(p.name for p in (tmp_path / "here" / "samples").iterdir()) == ["a_red_apple_0_0.png", "grid.png"]
    assert "prior_purpose" in unclip("experiment", "--list")
    assert "usage: unclip quickstart" in unclip("quickstart", "--help")
