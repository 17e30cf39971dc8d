"""Every key of every config is explained where it is set, and read by the code that the config is for."""

import ast
import functools
import io
import re
import tokenize
from pathlib import Path
from typing import NamedTuple

import pytest
from shrink import CONFIGS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "unclip_jax"
STAGES = {path.stem for path in (PACKAGE / "stages").glob("*.py")} - {"__init__", "base", "prior", "codes"}


class Key(NamedTuple):
    section: str  # "train", "model.unet"; "" at the top
    name: str
    line: int  # from 1


def keys_of(source):
    """All keys of the paper's config, sections within sections included: those set before the first `if`."""
    body = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)).body
    for node in body[: next(i for i, node in enumerate(body) if isinstance(node, ast.If))]:
        target = node.targets[0]
        if not isinstance(target, ast.Attribute):
            continue  # config = ConfigDict()
        if isinstance(node.value, ast.Call):
            yield from _within(target.attr, node.value.args[0])
        else:
            yield Key("", target.attr, node.lineno)


def _within(section, call):
    for keyword in call.keywords:
        yield Key(section, keyword.arg, keyword.lineno)
        if isinstance(keyword.value, ast.Call):
            yield from _within(f"{section}.{keyword.arg}", keyword.value)


def undocumented(source):
    """Keys without a comment of their own: on their line, where no other key is, or alone on the line above."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    alone = {line for line in comments if source.splitlines()[line - 1].lstrip().startswith("#")}
    keys = list(keys_of(source))
    lines = [key.line for key in keys]
    return [
        f"{key.section}.{key.name}".lstrip(".")
        for key in keys
        if not (lines.count(key.line) == 1 and (comments.get(key.line) or key.line - 1 in alone))
    ]


def unread(source):
    """Keys that nothing reads which a config of this stage meets: not the networks, which see no config, nor the code
    of other stages or of public weights. A section that is passed whole must suit the arguments of what takes it."""
    stage = re.search(r'config\.stage = "(\w+)"', source).group(1)
    files = [path for path in PACKAGE.rglob("*.py") if path.parent.name not in ("models", "pretrained")]
    read = set().union(*(names_read(path) for path in files if path.stem not in STAGES - {stage}))
    whole = passed_whole((PACKAGE / "stages" / f"{stage}.py").read_text())
    found = []
    for section, name, _ in keys_of(source):
        takers = whole.get(section.rpartition(".")[2])
        if not (all(_uses(taker, name) for taker in takers) if takers else name in read):
            found.append(f"{section}.{name}".lstrip("."))
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


@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_is_documented_in_place(name):
    assert undocumented((ROOT / "configs" / f"{name}.py").read_text()) == []


@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_is_read(name):
    assert unread((ROOT / "configs" / f"{name}.py").read_text()) == []


def test_a_key_means_the_same_in_all_configs():
    """Where two sections have a key of one name, the whole path counts."""
    wordings = {}
    for name in CONFIGS:
        source = (ROOT / "configs" / f"{name}.py").read_text()
        for key in keys_of(source):
            comment = source.splitlines()[key.line - 1].partition("  # ")[2]
            wordings.setdefault((key.section, key.name), {}).setdefault(comment, []).append(name)
    differing = {".".join(key) for key, found in wordings.items() if len(found) > 1}
    assert differing == {
        "model.context",  # of the autoregressive prior: positions, not tokens
        "model.factor",  # of GLIDE's base model: none
        "sampling.temperature",  # of the autoregressive prior: of logits, not of noise
    }


CONFIG = """
def get_config(size="paper"):
    config = ConfigDict()
    config.stage = "decoder"  # its kind
    config.train = ConfigDict(dict(
        steps=3,  # of the run
        # examples
        batch_size=8,
    ))
    config.model = ConfigDict(dict(unet=dict(  # the network
        channels=3,  # of it
    )))
    if size == "tiny":
        config.train.steps = 2
"""


def test_what_is_amiss_is_found():
    assert undocumented(CONFIG) == unread(CONFIG) == []
    assert undocumented(CONFIG.replace("steps=3,  # of the run", "steps=3,")) == ["train.steps"]
    assert undocumented(CONFIG.replace("steps=3,", "steps=3, seed=0,")) == ["train.steps", "train.seed"]
    assert undocumented(CONFIG.replace("        # examples\n", "")) == ["train.batch_size"]
    assert unread(CONFIG.replace("steps=3", "stesp=3")) == ["train.stesp"]
    assert unread(CONFIG.replace("channels=3", "chanels=3")) == ["model.unet.chanels"]
    assert unread(CONFIG.replace("steps=3", "num_codes=3")) == ["train.num_codes"]  # that of another stage
