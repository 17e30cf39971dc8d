"""The command `unclip`, and where configs are found."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from unclip_jax import __main__ as unclip
from unclip_jax import __version__, cli, sample
from unclip_jax.errors import UserError

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "unclip_jax"


def call(monkeypatch, *arguments, program="/venv/bin/unclip"):
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    try:
        unclip.main()
    except SystemExit as exit:
        return exit.code
    return 0


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",), ("help",)])
def test_lists_every_command_with_a_line(arguments, monkeypatch, capsys):
    assert call(monkeypatch, *arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines if line.startswith("  ")}
    entries = [path for path in PACKAGE.glob("*.py") if "cli.run(main)" in path.read_text()]
    entries = {path.stem: path for path in entries} | {p.parent.name: p for p in PACKAGE.glob("*/__main__.py")}
    del entries["planning"]  # the process that `plan` starts for a trial, which is no command of users
    texts = {name: ast.get_docstring(ast.parse(path.read_text())) for name, path in entries.items()}
    assert listed == {name: text.splitlines()[0] for name, text in texts.items()}
    assert max(map(len, lines)) <= 120


def test_listing_imports_nothing_heavy():
    program = "import sys; from unclip_jax import __main__ as m; sys.argv = ['unclip']; m.main(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {"jax", "numpy", "ml_collections", "absl"}.isdisjoint(done.stdout.splitlines()[-1].split())


def test_version(monkeypatch, capsys):
    assert call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"unclip_jax {__version__}\n"


def test_unknown_command_names_the_nearest(monkeypatch, capsys):
    assert call(monkeypatch, "sampel", "--n=1") == 2
    said = capsys.readouterr().err
    assert said == "error: no command 'sampel': the nearest is 'sample'; unclip --help lists all\n"


@pytest.mark.parametrize(
    ("program", "form"), [("/venv/bin/unclip", "unclip sample"), ("x/__main__.py", "python -m unclip_jax.sample")]
)
def test_a_command_speaks_of_itself_as_it_was_called(program, form, monkeypatch, capsys):
    assert call(monkeypatch, "sample", "--prompt", program=program) == 2
    said = capsys.readouterr().err
    assert said == f"error: argument --prompt: expected one argument ({form} --help lists the options)\n"
    assert call(monkeypatch, "sample", "--help", program=program) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: {form} ") and f"    {form} --bundle OUT/bundle" in shown
    assert form.startswith("python") or "python" not in shown


def test_a_command_gets_its_arguments_as_the_module_would(monkeypatch):
    seen = []
    monkeypatch.setattr(sample, "main", lambda argv: seen.append(argv))
    assert call(monkeypatch, "sample", "--prompt=a b", "-n", "2") == 0
    assert seen == [["/venv/bin/unclip", "--prompt=a b", "-n", "2"]]


@pytest.mark.parametrize(
    ("module", "extra"), [("emoji", "data"), ("tensorflow_datasets", "data"), ("ftfy", "pretrained")]
)
def test_a_missing_optional_package_is_one_line_that_installs_it(module, extra, monkeypatch, capsys):
    def main(argv):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(sample, "main", main)
    assert call(monkeypatch, "sample") == 2
    said = capsys.readouterr().err
    assert said == f"error: the package {module} is not installed: pip install 'unclip_jax[{extra}]'\n"
    module = "elsewhere"
    with pytest.raises(ModuleNotFoundError):
        call(monkeypatch, "sample")


def test_quickstart_asks_for_its_packages_before_anything_else(tmp_path):
    program = "import sys; sys.modules['tensorflow_datasets'] = None; from unclip_jax.__main__ import main; main()"
    command = [sys.executable, "-c", program, "quickstart"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    said = "error: the package tensorflow_datasets is not installed: pip install 'unclip_jax[data]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)
    assert not list(tmp_path.iterdir())


def test_every_optional_package_is_one_of_setup():
    text = (ROOT / "setup.py").read_text()
    packages = {"sklearn": "scikit-learn", "faiss": "faiss-cpu"}
    written = (packages.get(name, name.replace("_", "-")) for name in cli.OPTIONAL)
    assert all(f'"{name}>=' in text or f'"{name.replace("-", "_")}>=' in text for name in written)


def test_config_is_found_here_then_where_it_came_with_the_package(tmp_path, monkeypatch):
    def place(folder, stage):
        (folder / "configs").mkdir(parents=True)
        text = f"from ml_collections import ConfigDict\ndef get_config(): return ConfigDict(dict(stage={stage!r}))\n"
        (folder / "configs" / "mine.py").write_text(text)

    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert cli.load_config("configs/clip.py:tiny").stage == "clip"  # of this checkout

    monkeypatch.setattr(cli, "__file__", str(tmp_path / "root" / "unclip_jax" / "cli.py"))
    place(tmp_path / "root", "beside")
    assert cli.load_config("configs/mine.py").stage == "beside"
    place(tmp_path / "root" / "unclip_jax", "inside")  # a wheel; what lies beside it is another package's then
    assert cli.load_config("configs/mine.py").stage == "inside"
    place(tmp_path / "here", "here")
    monkeypatch.chdir(tmp_path / "here")
    assert cli.load_config("configs/mine.py").stage == "here"
    with pytest.raises(UserError, match=r"no config file configs/other\.py: .*\(there are mine\.py\)"):
        cli.load_config("configs/other.py")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_a_config_needs_unclip_jax_alone(path):
    """It may be copied to any folder and run from there."""
    imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or node.names[0].name for node in imports}
    assert names <= {"unclip_jax"}
