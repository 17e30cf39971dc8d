"""The documents: their commands are read by the commands' own parsers, their Python runs, and what they name exists."""

import ast
import contextlib
import functools
import importlib
import io
import itertools
import re
import shlex
import shutil

import pytest
import yaml
from documents import ROOT, anchors, blocks, cells, commands, links, shell, spans
from shrink import (
    CONFIGS,
    compilation_cache,
    leaves,
    random_params,
    save_cascade,
    small_config,
    tokenizer_bytes,
)

from unclip_jax import __main__ as unclip
from unclip_jax import cli, filter_pictures, plan, train
from unclip_jax.bundle import save_bundle
from unclip_jax.config_checks import check_config
from unclip_jax.errors import UserError
from unclip_jax.planning.chips import parse_topology
from unclip_jax.stages import make_stage

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PAGES}
TEXTS |= {str(path.relative_to(ROOT)): cells(path) for path in sorted((ROOT / "experiments").glob("*/*.ipynb"))}
EXPERIMENTS = sorted((ROOT / "experiments").glob("*/README.md"))
ENTRIES = [importlib.import_module(unclip._module(name)) for name in unclip.COMMANDS]
PACKAGE = ROOT / "unclip_jax"

each_page = pytest.mark.parametrize("page", TEXTS)


def entry(name):
    assert name in unclip.COMMANDS, f"no command {name}"
    return importlib.import_module(unclip._module(name))


def check_unclip(name, arguments):
    """Has a command's own parser read its arguments, and what else can be told without data or devices."""
    module = entry(name)
    arguments = [argument for argument in arguments if argument != "--config.init.model=True"]  # which reads the bundle
    try:
        parsed = module.parse([name, *arguments])
    except SystemExit as exit:
        assert exit.code == 0 and "--help" in arguments
        return
    if module is train:
        check_config(parsed.config, parsed.workdir)
    if module is plan and parsed.topology not in ("", "local"):
        parse_topology(parsed.topology)


@functools.cache
def extras():
    (call,) = (node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if _calls(node, "setup"))
    (extras,) = (keyword.value for keyword in call.keywords if keyword.arg == "extras_require")
    return {key.value for key in extras.keys}


def _calls(node, name):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def check_pip(arguments):
    if arguments == ["freeze"]:
        return
    assert arguments.pop(0) == "install"
    while arguments:
        word = arguments.pop(0)
        if word == "-c":
            assert (ROOT / arguments.pop(0)).is_file()
        elif ours := re.fullmatch(r"(?:\.|unclip_jax)\[(.+)\]", word):
            assert set(ours[1].split(",")) <= extras(), f"no extra {word}"
        else:
            assert word in ("-e", "-q", ".") or re.fullmatch(r"[a-z][\w-]*", word), f"pip install {word}"


def check_pytest(arguments):
    markers = re.findall(r"^    (\w+): ", (ROOT / "pytest.ini").read_text(), re.MULTILINE)
    while arguments:
        word = arguments.pop(0)
        if word == "-m":
            assert arguments.pop(0) in markers
        elif word == "-k":
            arguments.pop(0)
        elif not word.startswith("-"):
            path, _, name = word.partition("::")
            assert (ROOT / path).exists(), f"no {path}"
            assert not name or f"def {name}(" in (ROOT / path).read_text(), f"no {word}"


def check_script(name, arguments):
    assert (ROOT / name).is_file(), f"no {name}"
    if name in ("tpu_scripts/launch.sh", "tpu_scripts/resume.sh", "tpu_scripts/slurm.sbatch"):
        check_unclip("train", arguments)
    else:
        assert set(arguments) <= {"--dry-run"}


FOREIGN = ("mkdir", "cp", "gcloud", "ssh-add", "git", "pre-commit", "hf", "img2dataset", "tfds", "docker", "kubectl")


def check_command(words):
    """Fails for a command that is none, or not read by what it is meant for."""
    name, *arguments = words
    if name == "python" and arguments[0] == "-m" and arguments[1].startswith("unclip_jax."):
        check_unclip(arguments[1].removeprefix("unclip_jax."), arguments[2:])
    elif name == "unclip":
        if arguments:
            check_unclip(arguments[0], arguments[1:])
    elif name == "python":
        assert arguments[:2] == ["-m", "venv"] or (ROOT / arguments[0]).is_file(), words
    elif name == "pip":
        check_pip(arguments)
    elif name == "pytest":
        check_pytest(arguments)
    elif name == "ruff":
        assert arguments[:1] == ["check"]
    elif name == "sbatch":
        script = next(i for i, word in enumerate(arguments) if not word.startswith("--"))
        check_script(arguments[script], arguments[script + 1 :])
    elif name.startswith(("tpu_scripts/", ".ci/")) or "/tpu_scripts/" in name:
        check_script(name, arguments)
    else:
        assert name in FOREIGN, f"unknown command: {shlex.join(words)}"
        files = [b for a, b in itertools.pairwise(arguments) if a == "-f" and "://" not in b]
        assert all((ROOT / file).is_file() for file in files), f"no {files}"


def check_all(found):
    """Checks commands, and says which one is wrong."""
    for words in found:
        try:
            check_command(list(words))
        except (AssertionError, UserError) as error:
            raise AssertionError(f"{shlex.join(words)}: {error}") from error


@each_page
def test_every_command_is_read_by_its_parser(page, tmp_path):
    found = blocks(TEXTS[page])
    assert {block.language for block in found} <= {"bash", "python", "text"}
    check_all(commands("\n".join(map(shell, found)), tmp_path))


def in_docstring(text):
    """Commands of this package that are indented in a text; what is optional, in brackets, counts as given."""
    lines = re.findall(r"^    ((?:python -m unclip_jax\.|unclip )(?:.*\\\n)*.*)$", text, re.MULTILINE)
    return [shlex.split(re.sub(r"\\\n|[][]", " ", line)) for line in lines]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.parent.name)
def test_commands_of_experiments_are_read_by_their_parsers(path, tmp_path):
    script = "".join(re.findall(r"^    (.*\n)", path.read_text(), re.MULTILINE))
    found = commands(re.sub(r"^(cc|LD_PRELOAD|bash).*\n", "", script, flags=re.MULTILINE), tmp_path)
    check_all(words for words in found if "unclip_jax" in " ".join(words[:3]))


@pytest.mark.parametrize("name", [*CONFIGS, *unclip.COMMANDS])
def test_commands_of_docstrings_are_read_by_their_parsers(name, monkeypatch):
    """Their config needs no dataset: that is for whoever reads them."""
    monkeypatch.setattr(importlib.import_module(__name__), "check_config", lambda *_: None)
    path = ROOT / "configs" / f"{name}.py" if name in CONFIGS else ROOT / f"{unclip._module(name).replace('.', '/')}.py"
    found = in_docstring(ast.get_docstring(ast.parse(path.read_text())))
    assert found
    check_all(found)


@functools.cache
def options():
    """Every option of every command, as its --help has it."""
    found = set()
    for name, module in zip(unclip.COMMANDS, ENTRIES, strict=True):
        of_data = [["embed"], ["tokenizer"], ["build"], *(["filter", action] for action in filter_pictures.ACTIONS)]
        actions = of_data if name == "data" else [[]]
        for action in actions:
            with contextlib.redirect_stdout(io.StringIO()) as words, contextlib.suppress(SystemExit):
                module.parse([name, *action, "--help"])
            found |= set(re.findall(r"--(?:\[no\])?([\w-]+)", words.getvalue()))
    return {f"--{name}" for name in found}


@functools.cache
def keys():
    """Every key of every config → values that it has somewhere; sections have none."""
    found = {}
    for name in CONFIGS:
        for key, value in leaves(cli.load_config(f"configs/{name}.py:paper")).items():
            found.setdefault(key, []).append(value)
            for depth in range(1, key.count(".") + 1):
                found.setdefault(key.rsplit(".", depth)[0], [])
    return found


OTHERS_OPTIONS = {"--dry-run": "tpu_scripts/common.sh", "--config": ""}  # ours, of absl
OTHERS_OPTIONS |= dict.fromkeys(("--file_format", "--output_format"), "")  # TFDS's and img2dataset's
OTHERS_OPTIONS |= dict.fromkeys(("--spot", "--gpus-per-task", "--signal"), "")  # gcloud's and SLURM's


def check_key(key, value):
    assert key in keys(), f"no config has a key {key}"
    if value:
        arguments = [f"--config=configs/{name}.py:paper" for name in CONFIGS]
        for config in arguments:
            with contextlib.suppress(UserError):
                return cli.parse(["docs", config, f"--config.{key}={value}"], {})
        raise AssertionError(f"{key}={value}: no config takes this value")


def check_word(word):
    """Checks an option, a key of a config with or without its value, a path or a variable of the environment."""
    name, _, value = word.partition("=")
    sections = "|".join({key.partition(".")[0] for key in keys() if "." in key})
    if name.startswith("--config."):
        check_key(name.removeprefix("--config."), value)
    elif name.startswith("--"):
        assert name in options() or name in OTHERS_OPTIONS, f"no option {name}"
    elif (value and name in keys()) or re.fullmatch(rf"({sections})(\.(?!py\b)\w+)+", name):
        check_key(name, value)
    elif re.match(r"(unclip_jax|tests|configs|docs|experiments|tpu_scripts|\.ci|\.github)/", word):
        assert list(ROOT.glob(word.partition(":")[0].rstrip("/"))), f"no {word}"
    elif re.fullmatch(r"[\w/]+\.(py|sh)(:\w+)?", word):
        places = PACKAGE, ROOT / "configs", ROOT / "tests"
        assert any(list(place.glob(f"**/{word.partition(':')[0]}")) for place in places), f"no {word}"
    elif re.fullmatch(r"[A-Z]+(_[A-Z]+)+", word):
        sources = [*PACKAGE.rglob("*.py"), *(ROOT / "tpu_scripts").glob("*.sh")]
        assert any(re.search(rf"\b{word}\b", path.read_text()) for path in sources), f"nothing reads {word}"


OF_OTHER_PROJECTS = {"setup.sh", "clip/clip.py", "model.safetensors"}  # named in docs/public_weights.md
PROGRAMS = ("unclip", "python", "pip", "pytest", "tpu_scripts")


@each_page
def test_what_is_named_exists(page):
    """Options, keys, files, variables and whole commands in the text. "…" stands for what may follow."""
    for span in spans(TEXTS[page]):
        words = span.split()
        try:
            if len(words) > 1 and words[0] in PROGRAMS and not span.endswith("…") and "NAME" not in span:
                if words[0] == "unclip" and not span.count(" -"):
                    entry(words[1])
                else:
                    check_command(shlex.split(span))
            elif span not in OF_OTHER_PROJECTS:
                for word in words:
                    check_word(word.rstrip(",;…"))
        except (AssertionError, UserError) as error:
            raise AssertionError(f"{page} says `{span}`: {error}") from error


@each_page
def test_links_lead_somewhere(page):
    for target in links(TEXTS[page]):
        name, _, anchor = target.partition("#")
        place = (ROOT / page).parent / name if name else ROOT / page
        assert place.exists(), f"{page}: no {target}"
        assert not anchor or anchor in anchors(place.read_text()), f"{page}: no heading for {target}"


def test_marked_commands_run(tmp_path, capsys):
    marked = [block for text in TEXTS.values() for block in blocks(text) if block.runs]
    assert marked
    for words in commands("\n".join(map(shell, marked)), tmp_path):
        assert words[0] == "unclip"
        if len(words) == 1:
            print(unclip._help())
        else:
            with contextlib.suppress(SystemExit):
                assert entry(words[1]).main(words[1:]) == 0
        assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("page", "bundle"),
    [("README.md", "quickstart/bundle"), pytest.param("docs/editing.md", "cascade", marks=pytest.mark.slow)],
)
def test_python_runs(page, bundle, tmp_path, monkeypatch):
    """On random models without upsamplers, so that little is compiled."""
    monkeypatch.chdir(tmp_path)
    save_cascade(tmp_path / bundle)
    for name in ("upsampler_256", "upsampler_1024"):
        shutil.rmtree(tmp_path / bundle / name)
    found = [block.text for block in blocks(TEXTS[page]) if block.language == "python"]
    assert len(found) == 1
    with compilation_cache():
        exec(compile(found[0], page, "exec"), {})
    assert page != "README.md" or (tmp_path / "variation.png").is_file()


def test_python_on_clips_features_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = small_config("clip")
    save_bundle(tmp_path / "clip", "clip", config, random_params(make_stage(config)), tokenizer_bytes(), "", {})
    found = [block.text for block in blocks(TEXTS["docs/evaluation.md"]) if "zero_shot" in block.text]
    assert len(found) == 1
    with compilation_cache():
        exec(compile(found[0], "docs/evaluation.md", "exec"), {})
    assert capsys.readouterr().out.count(", n = ") == 6


def test_colab_cells_are_python():
    for block in blocks(TEXTS["docs/colab.md"]):
        if block.language == "python" and not block.text.startswith(("!", "%")):
            ast.parse(block.text)


def test_readme_is_short():
    lines = TEXTS["README.md"].splitlines()
    assert len(lines) <= 130
    test = [line for line in lines if line.startswith("pip install -e '.[test]' && pytest")]
    assert len(test) == 1, ".ci/run runs this one line"


def test_slices_are_described_by_the_variables_that_scripts_read():
    read = set(re.findall(r"\$\{(UNCLIP_[A-Z_]+):-", (ROOT / "tpu_scripts/common.sh").read_text()))
    others = "".join(path.read_text() for path in (ROOT / "tpu_scripts").glob("*.sh") if path.stem != "common")
    assert not re.findall(r"\$\{([A-Z_]+):-", others), "variables are read in one place"
    text = TEXTS["docs/tpu.md"]
    exported = re.findall(r"^export (.+)$", text, re.MULTILINE)
    assert exported and {word.partition("=")[0] for line in exported for word in line.split()} <= read
    assert {span.partition("=")[0] for span in spans(text)} >= read


def test_tree_of_files_is_the_packages():
    (tree,) = (block.text for block in blocks(TEXTS["docs/architecture.md"]) if "unclip_jax/" in block.text)
    own = tree.partition("configs/  ")[0]
    listed = set(re.findall(r"^  (\S+)", own, re.MULTILINE))
    there = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"}
    assert listed == there | {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    assert all((ROOT / name).exists() for name in re.findall(r"^(\S+)", tree, re.MULTILINE))


def test_costs_are_of_the_configs():
    """Parameters as another test counts them, steps and batches, of the papers' models."""
    counted = (ROOT / "tests/models/test_models.py").read_text()
    row = r"^\| `(\w+)\.py` \| ([\d,]+) \| [\d.]+ GB \| ([\d,]+) × ([\d,]+) \|"
    rows = re.findall(row, TEXTS["docs/costs.md"], re.MULTILINE)
    assert len(rows) == 5
    for name, parameters, *numbers in rows:
        config = cli.load_config(f"configs/{name}.py:paper")
        assert f'"{name}", {parameters.replace(",", "_")})' in counted
        assert [f"{number:,}" for number in (config.train.steps, config.train.batch_size)] == numbers


def test_rows_of_plans_can_be_planned():
    """Config, devices and keys of each row in the tables of docs/gpu.md and docs/costs.md."""
    row = r"^\| `(\w+\.py)(:\w+)?` \| `(\w+:[\dx]+)` \| (.*?) \|"
    rows = re.findall(row, TEXTS["docs/gpu.md"] + TEXTS["docs/costs.md"], re.MULTILINE)
    assert len(rows) > 40
    for name, size, topology, settings in rows:
        keys = [f"--config.{word}" for word in re.findall(r"`([\w.]+=[^`]+)`", settings)]
        check_all([["unclip", "plan", f"--config=configs/{name}{size or ':paper'}", f"--topology={topology}", *keys]])


GITHUB = ROOT / ".github"


def test_github_files_are_sound():
    """CI runs .ci/run; reports ask for what `unclip doctor` prints; pre-commit lints as CI does."""
    ci = yaml.safe_load((GITHUB / "workflows/ci.yml").read_text())
    steps = ci["jobs"]["test"]["steps"]
    assert steps[-1]["run"] == ".ci/run"
    versions = next(step["with"]["python-version"] for step in steps if "setup-python" in step.get("uses", ""))
    assert versions.split() == ["3.11", "3.13"]
    form = yaml.safe_load((GITHUB / "ISSUE_TEMPLATE/bug.yml").read_text())
    assert {"name", "description", "body"} <= set(form)
    fields = {field["id"]: field for field in form["body"] if "id" in field}
    assert "unclip doctor" in fields["doctor"]["attributes"]["label"] + fields["doctor"]["attributes"]["description"]
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repo["hooks"] == [{"id": "ruff-check"}]
    assert f"\nruff=={repo['rev'].removeprefix('v')}\n" in (ROOT / "constraints.txt").read_text()
