"""The house's rules, held: imports point downwards and in no circle, Flax stays under models/, files stay small."""

import ast
import graphlib
import re
from pathlib import Path

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from unclip_jax.diffusion.process import q_sample
from unclip_jax.diffusion.schedule import make_schedule
from unclip_jax.models.clip import normalize
from unclip_jax.models.transformer import TextTransformer

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "unclip_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# Lower numbers may not import higher ones; equals may. A package's command is an entry, above the package's own layer.
ENTRIES = ("__main__", "train", "sample", "edit", "evaluate", "study", "experiment", "plan", "quickstart", "doctor")
ENTRIES += ("push", "demo", "data.__main__", "pretrained.__main__")
LAYERS = {"__init__": 0, "arrays": 0, "config": 0, "errors": 0, "keys": 0, "paths": 0, "npz": 0, "progress": 0}
LAYERS |= {"diffusion": 1, "models": 1, "data": 1, "training": 1, "cli": 1, "pictures": 1}
LAYERS |= {"foreign": 0, "hub": 0, "shipped": 1, "programs": 1, "watching": 2, "config_checks": 1, "config_values": 1}
LAYERS |= {"evaluation": 2, "stages": 2, "bundle": 2, "inputs": 3, "embed": 3, "filter_pictures": 3}
LAYERS |= {"origin": 3, "run_identity": 2, "held_out": 3, "model": 3, "chain": 3, "cascade": 3, "drawing": 3}
LAYERS |= {"build_dataset": 3, "clip_steps": 3, "own_tokenizer": 3, "demo_page": 3, "demo_tabs": 3}
LAYERS |= {"pretrained": 3, "planning": 3, "trials": 4} | dict.fromkeys(ENTRIES, 4)
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


def dotted(path):
    """A file's name as a module; a package's is that of its __init__.py."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def part(module):
    """A module's place in LAYERS: its own name where it has one there, else the folder that it lies in."""
    package, _, rest = module.partition(".")
    if package == "unclip_jax":
        return rest if rest in LAYERS else rest.split(".")[0]
    return None


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_file_keeps_the_rules(path):
    name = str(path.relative_to(PACKAGE))
    text = path.read_text()
    tree = ast.parse(text)
    assert text.count("\n") <= 400, "a noun a file"

    here = part(dotted(path)) or "__init__"
    assert here in LAYERS, f"{name} has no layer: name it in LAYERS"
    for module in imported(tree):
        if module.startswith("flax.linen") or module == "flax.nnx":
            assert here == "models", f"{module} outside models/"
        there = part(module)
        if there in LAYERS and here != there:
            assert LAYERS[there] <= LAYERS[here], f"{name} imports {module}, which is above it"
            assert (here, there) not in FORBIDDEN, f"{name} imports {module}"
            assert here != "diffusion" or there in ("arrays", "keys"), f"diffusion imports {module}"

    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= LONG_FUNCTIONS.get(name, 60), f"{name}: {node.name} has {length} lines"


def test_imports_make_no_circle():
    """Between files, imports within functions counted too."""
    modules = {dotted(path): path for path in FILES}
    graph = {}
    for module, path in modules.items():
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        for node in nodes:
            if isinstance(node, ast.ImportFrom):
                there = (f"{node.module}.{alias.name}" for alias in node.names)
                names += [name if name in modules else node.module for name in there]
        graph[module] = modules.keys() & set(names)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names a circle


# Least share of arguments that have a type, in percent, by folder; "": of the whole package.
TYPED = {"diffusion": 100, "models": 100, "stages": 100, "training": 100, "": 85}


def arguments(path):
    """Every argument of every function in a file, but self and cls."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
            yield from (argument for argument in every if argument and argument.arg not in ("self", "cls"))


@pytest.mark.parametrize("folder", TYPED)
def test_arguments_have_types(folder):
    found = [(path.stem, argument) for path in (PACKAGE / folder).rglob("*.py") for argument in arguments(path)]
    untyped = [(name, argument.arg) for name, argument in found if not argument.annotation]
    assert 100 * (1 - len(untyped) / len(found)) >= TYPED[folder], untyped


def test_calls_are_checked_against_their_annotations():
    schedule, x = make_schedule("cosine", 10), jnp.zeros((2, 3))
    with pytest.raises(TypeCheckError, match="'noise'"):
        q_sample(schedule, x, 1, jnp.zeros((2, 4)))
    with pytest.raises(TypeCheckError, match="'t'"):
        q_sample(schedule, x, jnp.zeros((3,), jnp.int32), x)
    with pytest.raises(TypeCheckError, match="'x'"):
        normalize(jnp.zeros((2, 3), jnp.int32))
    network = TextTransformer(5, 4, 8, 1, 2, jnp.float32, False)
    with pytest.raises(TypeCheckError, match="'tokens'"):
        network.apply({}, jnp.zeros((2, 3), jnp.int32), jnp.ones((2,), jnp.int32))
    with pytest.raises(TypeCheckError, match="'width'"):
        TextTransformer(5, 4, 8.0, 1, 2, jnp.float32, False)


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
    "hub.py": "the cache of another library",
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
