"""Notebooks: their two files are one, they install themselves in one way, and they run."""

import importlib.util
import json
import re
import shutil
import types
from pathlib import Path

import nbformat
import pytest
from documents import ROOT
from shrink import save_weights

SPEC = importlib.util.spec_from_file_location("run_notebooks", ROOT / "experiments/notebooks/run.py")
run = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(run)

SOURCES = {str(path.relative_to(ROOT)): path for path in run.sources()}
PLACES = re.compile(r"(?<![\w/.])/(root|home|work|tmp|Users)/")  # of the machine that ran them
each_notebook = pytest.mark.parametrize("name", SOURCES)


def stored(name):
    return nbformat.read(SOURCES[name].with_suffix(".ipynb"), as_version=4)


def install(name):
    return next(cell.source for cell in run.make(SOURCES[name]).cells if cell.cell_type == "code")


def test_every_notebook_has_its_pair():
    files = {str(path.relative_to(ROOT).with_suffix(".py")) for path in ROOT.glob("experiments/*/*.ipynb")}
    assert files == set(SOURCES) and len(files) >= 7


@each_notebook
def test_both_files_are_one_notebook(name):
    """`python experiments/notebooks/run.py` makes the one from the other."""
    made, there = run.make(SOURCES[name]), stored(name)
    nbformat.validate(there)
    assert made.metadata == there.metadata
    assert [(cell.id, cell.cell_type, cell.source, cell.metadata) for cell in made.cells] == [
        (cell.id, cell.cell_type, cell.source, cell.metadata) for cell in there.cells
    ]


@each_notebook
def test_what_is_stored_has_no_errors_and_no_places_of_a_machine(name):
    for cell in stored(name).cells:
        outputs = cell.get("outputs", [])
        assert not [output for output in outputs if output.output_type == "error"]
        assert not PLACES.search(json.dumps(outputs))


@each_notebook
def test_all_are_installed_and_set_in_the_same_way(name):
    assert install(name) == install("experiments/notebooks/quickstart.py")
    (settings,) = (cell.source for cell in run.make(SOURCES[name]).cells if cell.metadata.get("tags") == ["parameters"])
    assert 'SIZE = "default"' in settings and 'OUT = ""' in settings


@pytest.mark.parametrize(
    ("nvidia", "environment", "devices", "extra"),
    [
        (0, {}, [], "cuda12"),
        (9, {}, [], ""),  # nvidia-smi is there, and finds no GPU
        (None, {"COLAB_TPU_1VM": "", "TPU_SKIP_MDS_QUERY": "1"}, [], ""),  # of Colab, of jax
        (None, {"COLAB_TPU_ADDR": "10.0.0.2:8470"}, [], "tpu"),
        (None, {"TPU_ACCELERATOR_TYPE": "v5e-1"}, [], "tpu"),
        (None, {}, ["/dev/vfio/0"], "tpu"),
        (None, {}, ["/dev/accel0"], "tpu"),
    ],
)
def test_the_installation_sees_what_the_machine_has(nvidia, environment, devices, extra, monkeypatch):
    names = {}
    exec(install("experiments/notebooks/quickstart.py"), names)  # everything is here: nothing is installed
    names["shutil"] = types.SimpleNamespace(which=lambda name: None if nvidia is None else f"/usr/bin/{name}")
    names["subprocess"] = types.SimpleNamespace(run=lambda *_, **__: types.SimpleNamespace(returncode=nvidia))
    names["glob"] = types.SimpleNamespace(glob=lambda pattern: [d for d in devices if d.startswith(pattern[:9])])
    names["os"] = types.SimpleNamespace(environ=environment)
    assert names["accelerator"]() == extra


def test_the_installation_is_of_this_checkout_and_asks_for_a_restart(monkeypatch):
    """Pip replaces a NumPy that the session has imported."""
    source = install("experiments/notebooks/quickstart.py")
    commands, versions = [], iter(["1.0", "2.0"])
    monkeypatch.chdir(ROOT / "docs")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("importlib.metadata.version", lambda name: next(versions) if name == "numpy" else "1")
    monkeypatch.setattr("subprocess.run", lambda command, **_: commands.append(command))
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("glob.glob", lambda pattern: [])
    with pytest.raises(SystemExit, match="Restart the session and run all cells again: it holds an older numpy"):
        exec(source, {})
    assert commands[-1][-1] == f"{ROOT}[data,evaluate]"


@pytest.mark.parametrize("name", SOURCES)
def test_the_list_of_notebooks_links_to_each(name):
    text = (ROOT / "experiments/README.md").read_text()
    path = Path(name).with_suffix(".ipynb")
    assert f"]({path.relative_to('experiments')})" in text
    (repository,) = re.findall(r'REPOSITORY = "https://github.com/(.+?)"', install(name))
    assert f"https://colab.research.google.com/github/{repository}/blob/main/{path})" in text


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_weights(tmp_path_factory.mktemp("weights"))


# Run after the cell of parameters: the package has the weights of the fixture, and what is trained is small.
SETTINGS = """
SIZE, OUT, BUNDLE = "smoke", "out", {weights!r}
sys.path.append({tests!r})
from shrink import CHANGES
from unclip_jax import cli, shipped
shipped.FOLDER, shipped.MANIFEST = Path(BUNDLE), Path(BUNDLE) / "manifest.json"
load = cli.load_config

def small(spec):
    config = load(spec).unlock()
    if spec.endswith(":tiny"):
        config.model.update(CHANGES[Path(spec).stem])
    return config.lock()

cli.load_config = small
"""


@pytest.mark.slow
@each_notebook
def test_it_runs(name, weights, tmp_path_factory, tmp_path, monkeypatch):
    cache = tmp_path_factory.getbasetemp() / "compiled"
    cache.mkdir(mode=0o700, exist_ok=True)
    for variable, value in {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": cache, "PYTHONPATH": ROOT}.items():
        monkeypatch.setenv(variable, str(value))
    settings = SETTINGS.format(weights=str(weights), tests=str(ROOT / "tests"))
    done = run.execute(run.make(SOURCES[name]), tmp_path, settings)
    codes = [cell for cell in done.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in codes)
    pictures = [output for cell in codes for output in cell.outputs if "image/png" in output.get("data", {})]
    assert pictures or "public_weights" in name
    assert "public_weights" not in name or "GLIDE is left out" in json.dumps(done)
    shutil.rmtree(tmp_path)
