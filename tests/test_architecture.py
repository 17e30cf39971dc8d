"""The house's rules, held: imports point downwards, Flax stays under models/, files and functions stay small."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "unclip_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# Lower numbers may not import higher ones; equals may.
ENTRIES = ("train", "sample", "edit", "evaluate", "plan", "quickstart", "doctor")
ENTRIES += ("__main__",)  # the command `unclip`, and a package's own
LAYERS = {"errors": 0, "paths": 0, "diffusion": 1, "models": 1, "data": 1, "training": 1, "evaluation": 2, "stages": 2}
LAYERS |= {"config": 0, "bundle": 2, "pictures": 1, "cli": 1, "model": 3, "cascade": 3, "pretrained": 3, "planning": 3}
LAYERS |= dict.fromkeys(ENTRIES, 4)
FORBIDDEN = {("data", "training"), ("training", "data")} | {("models", p) for p in ("data", "training", "diffusion")}
LONG_FUNCTIONS = {"train.py": 120, "models/unet.py": 120}  # the training loop and the U-Net's call; 60 elsewhere


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(path_or_module):
    words = path_or_module.split(".")
    return words[1] if words[0] == "unclip_jax" and len(words) > 1 else None


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_file_keeps_the_rules(path):
    name = str(path.relative_to(PACKAGE))
    text = path.read_text()
    tree = ast.parse(text)
    assert text.count("\n") <= 400, "a noun a file"

    here = "__main__" if path.stem == "__main__" else part(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for module in imported(tree):
        if module.startswith("flax.linen") or module == "flax.nnx":
            assert here == "models", f"{module} outside models/"
        there = part(module)
        if there in LAYERS and here in LAYERS and here != there:
            assert LAYERS[there] <= LAYERS[here], f"{name} imports {module}, which is above it"
            assert (here, there) not in FORBIDDEN, f"{name} imports {module}"
            assert here != "diffusion", f"diffusion imports {module}"

    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= LONG_FUNCTIONS.get(name, 60), f"{name}: {node.name} has {length} lines"


# A docstring opens with a verb or a noun phrase that stands alone.
DEPENDENT = re.compile(r"(What|Of|Those|As|The same|Whose|Such|Whether|How|Where|That|Which|All that|Its?)\b")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_docstrings_stand_alone(path):
    named = (ast.Module, ast.ClassDef, ast.FunctionDef)
    texts = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, named)]
    assert [text.splitlines()[0] for text in texts if DEPENDENT.match(text)] == []


def test_top_level_is_what_was_agreed():
    tracked = {p.name for p in ROOT.iterdir() if not p.name.startswith(".") and p.suffix != ".egg-info"}
    required = {"unclip_jax", "configs", "experiments", "tpu_scripts", "tests", "setup.py", "README.md"}
    assert required <= tracked


# Where a Path is made of something else than what a user named, which `paths.to_path` alone turns into one.
OWN_PATHS = {
    "paths.py": "the one place",
    "planning/compiling.py": "the compiler's dumps, in a temporary folder",
    "planning/trial.py": "a config, in a temporary folder",
}


def decisions(tree):
    """Expressions that decide what a string means as a path: `Path(…)` of other than `__file__`, ~ and schemes."""
    for node in ast.walk(tree):
        text = ast.unparse(node)
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).split(".")[-1]
            made = name == "Path" and not text.endswith("__file__)")
            if made or name in ("expanduser", "abspath") or (name == "startswith" and "://" in text):
                yield text
        elif isinstance(node, ast.Compare) and "://" in text:
            yield text


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_one_module_decides_what_is_a_path(path):
    if str(path.relative_to(PACKAGE)) in OWN_PATHS:
        return
    assert list(decisions(ast.parse(path.read_text()))) == []
