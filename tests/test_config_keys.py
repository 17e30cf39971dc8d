"""Every key of every config is explained, once, and read by the code that it is for; docs/configs.md has them all."""

import ast
import functools
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
from shrink import CONFIGS, leaves

from unclip_jax import cli

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "unclip_jax"
STAGES = {path.stem for path in (PACKAGE / "stages").glob("*.py")} - {"__init__", "base", "prior", "codes"}
REFERENCE = SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "configs.py")))
SHARED = (PACKAGE / "config.py").read_text()
FUNCTIONS = REFERENCE.functions(SHARED)
SOURCES = {name: (ROOT / "configs" / f"{name}.py").read_text() for name in CONFIGS}
KEYS = {name: REFERENCE.keys(source, FUNCTIONS) for name, source in SOURCES.items()}


def unexplained(keys):
    """Paths of the keys that no sentence explains."""
    return [key.path for key in keys if not re.fullmatch(r'["(A-Z].*\.', key.meaning)]


def unread(keys):
    """Paths of the keys that nothing reads which a config of this stage meets: not the networks, which see no config,
    nor the code of other stages or of public weights. A section that is passed whole must suit what takes it."""
    stage = next(ast.literal_eval(key.value) for key in keys if key.path == "stage")
    files = [path for path in PACKAGE.rglob("*.py") if path.parent.name not in ("models", "pretrained")]
    others = {*(STAGES - {stage}), "config"}
    read = set().union(*(names_read(path) for path in files if path.stem not in others))
    whole = passed_whole((PACKAGE / "stages" / f"{stage}.py").read_text())
    found = []
    for key in keys:
        takers = whole.get(key.section.rpartition(".")[2])
        if not (all(_uses(taker, key.name) for taker in takers) if takers else key.name in read):
            found.append(key.path)
    return found


@functools.cache
def names_read(path):
    """Attributes, which are neither called nor the object's own, and texts of one word: `config.train.steps`, or
    "steps", which is looked up."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    attributes = [node for node in nodes if isinstance(node, ast.Attribute) and id(node) not in called]
    own = {node.attr for node in attributes if not (isinstance(node.value, ast.Name) and node.value.id == "self")}
    return own | {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def passed_whole(code):
    """Section → names of the modules that get it as `**…section`."""
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    whole = {}
    for call in calls:
        for keyword in call.keywords:
            if keyword.arg is None and isinstance(keyword.value, ast.Attribute):
                whole.setdefault(keyword.value.attr, set()).add(call.func.id)
    return whole


def _uses(module, name):
    """Whether the network `module` has a field `name` and uses it."""
    for path in (PACKAGE / "models").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name == module:
                fields = {field.target.id for field in node.body if isinstance(field, ast.AnnAssign)}
                return name in fields and re.search(rf"\bself\.{name}\b", ast.unparse(node)) is not None
    raise AssertionError(f"no network {module}")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_is_explained(name):
    assert all(re.fullmatch(r'["(A-Z].*\.', text) for text in FUNCTIONS[name].arguments.values())


def test_arguments_are_keywords_without_defaults():
    """So that a number stands in a config or nowhere."""
    for node in ast.walk(ast.parse(SHARED)):
        if isinstance(node, ast.FunctionDef) and node.name in FUNCTIONS:
            assert not node.args.args and not node.args.posonlyargs and not node.args.vararg
            assert node.args.kw_defaults == [None] * len(node.args.kwonlyargs)


def test_every_function_makes_a_part_of_a_config():
    text = "\n".join([*SOURCES.values(), *re.findall(r"_extended\(.*\)", SHARED)])
    assert [name for name in FUNCTIONS if not re.search(rf"(config\.|locals\(\), ){name}\b", text)] == []


@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_is_explained(name):
    assert unexplained(KEYS[name]) == []


@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_is_read(name):
    assert unread(KEYS[name]) == []


@pytest.mark.parametrize("name", CONFIGS)
def test_keys_are_those_of_the_config(name):
    """The source as it is read here says what Python makes of it."""
    found = {key.path: key.value for key in KEYS[name] if key.value}
    assert len(found) == sum(bool(key.value) for key in KEYS[name])
    config = leaves(cli.load_config(f"configs/{name}.py"))
    assert {path: eval(value) for path, value in found.items()} == config


def test_a_key_means_the_same_in_all_configs():
    """Where two sections have a key of one name, the whole path counts."""
    meanings = {}
    for key in (key for keys in KEYS.values() for key in keys):
        meanings.setdefault(key.path, set()).add(key.meaning)
    assert {path for path, found in meanings.items() if len(found) > 1} == {
        "model.context",  # of the autoregressive prior: positions, not tokens
        "model.factor",  # of GLIDE's base model: none
        "sampling.guidance_scale",  # of the autoregressive prior: of logits
        "sampling.temperature",  # likewise
    }


def test_what_is_explained_in_a_config_is_of_that_config_alone():
    """What two configs have is explained for both in unclip_jax/config.py."""
    own = [key.path for keys in KEYS.values() for key in keys if not key.shared]
    assert len(own) > 10 and sorted(own) == sorted(set(own))


def test_page_is_what_the_comments_say():
    assert REFERENCE.PAGE.read_text() == REFERENCE.page(), "write it again: python docs/configs.py"


def test_page_has_every_key_and_value():
    text = REFERENCE.PAGE.read_text()
    for part in text.split("\n## ")[1:]:
        rows = [line for line in part.splitlines() if line.startswith("| `")]
        assert rows and all(row.count(" | ") == 2 and row.endswith(" |") for row in rows)
    tables = dict(part.split("\n", 1) for part in text.split("\n## ")[1:])
    for name, keys in KEYS.items():
        for key in (key for key in keys if key.value):
            rows = [row for row in tables[key.section or "Top level"].splitlines() if f"| `{key.name}` |" in row]
            (cell,) = [row.split(" | ")[2] for row in rows if key.meaning in row]
            assert any(
                re.fullmatch(rf"`{re.escape(key.value)}`(: (.*, )?{name}(, .*)?)?( \|)?", value)
                for value in cell.split("<br>")
            )


SECTIONS = '''
def recipe(
    *,
    stage: str,  # Kind of model.
    train: dict,  # Length of the run.
    model: dict,  # Network.
) -> dict:
    return locals()
def train(
    *,
    steps: int,  # Steps.
    batch_size: int,  # Examples in a step.
) -> dict:
    return locals()
def memory(*, remat: bool) -> dict:  # Less memory.
    return locals()
def unet(
    *,
    channels: int,  # Channels.
    **rest,
) -> dict:
    """The network."""
    return _extended(locals(), memory)
'''
CONFIG = """
PAPER = config.recipe(
    stage="decoder",
    train=config.train(steps=3, batch_size=8),
    model=dict(
        image_tokens=4,  # Tokens.
        unet=config.unet(channels=3, remat=True),
    ),
)
"""


def test_what_is_amiss_is_found():
    def keys(config=CONFIG, sections=SECTIONS):
        return REFERENCE.keys(config, REFERENCE.functions(sections))

    paths = ["stage", "train", "train.steps", "train.batch_size", "model", "model.image_tokens", "model.unet"]
    assert [key.path for key in keys()] == [*paths, "model.unet.channels", "model.unet.remat"]
    assert unexplained(keys()) == unread(keys()) == []
    assert unexplained(keys(sections=SECTIONS.replace("  # Steps.", ""))) == ["train.steps"]
    assert unexplained(keys(sections=SECTIONS.replace("  # Less memory.", ""))) == ["model.unet.remat"]
    crowded = SECTIONS.replace("steps: int,  # Steps.\n    batch", "steps: int, batch")
    assert unexplained(keys(sections=crowded)) == ["train.steps", "train.batch_size"]
    assert unexplained(keys(sections=SECTIONS.replace("# Steps.", "# of the run"))) == ["train.steps"]
    assert unexplained(keys(sections=SECTIONS.replace('    """The network."""\n', ""))) == ["model.unet"]
    assert unexplained(keys(CONFIG.replace("  # Tokens.", ""))) == ["model.image_tokens"]
    assert unexplained(keys(CONFIG.replace("=4,  #", "=4, seed=0,  #"))) == ["model.image_tokens", "model.seed"]
    # A remark on a value explains no key.
    remark = CONFIG.replace("train(steps=3, batch_size=8)", "train(\n    stesp=3,\n    batch_size=8)")
    assert unexplained(keys(remark)) == ["train.stesp"]

    assert unread(keys(CONFIG.replace("image_tokens", "image_tonkes"))) == ["model.image_tonkes"]
    assert unread(keys(CONFIG.replace("(channels", "(chanels"))) == ["model.unet.chanels"]
    assert unread(keys(CONFIG.replace("image_tokens", "num_codes"))) == ["model.num_codes"]  # that of another stage
