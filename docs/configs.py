"""Writes docs/configs.md: what every key of a config means, and what it is in the papers.

    python docs/configs.py

The page is made of the comments in unclip_jax/config.py and of the files in configs/, which are read as text.
"""

import ast
import io
import tokenize
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "configs.md"
SHARED = ROOT / "unclip_jax" / "config.py"
CONFIGS = sorted((ROOT / "configs").glob("[!_]*.py"))
SECTIONS = ("", "model", "model.image", "model.text", "model.unet", "init", "clip", "prior", "diffusion", "sampling")
SECTIONS += ("data", "optim", "train", "mesh")

HEAD = """# Configs: every key

<!-- Written by `python docs/configs.py`, from the comments in unclip_jax/config.py and configs/. -->

A file of [configs/](../configs) holds every number of one trained model, in three sizes: `paper`, `small` and `tiny`.
Any key is changed on the command line by its name and section, as in
`--config=configs/decoder.py:tiny --config.optim.learning_rate=1e-4`. Files of one's own are made of the functions in
[unclip_jax/config.py](../unclip_jax/config.py).

Below is what each key means, and its value in the size `paper` of each config that has it. A value without a config is
that of all configs which have the section.
"""


class Key(NamedTuple):
    """A key of a config."""

    section: str  # "train", "model.unet"; "" at the top
    name: str
    meaning: str  # "" where nothing explains it
    shared: bool  # it is explained in unclip_jax/config.py
    value: str  # as it is written; "" of a section

    @property
    def path(self) -> str:
        return f"{self.section}.{self.name}".lstrip(".")


class Function(NamedTuple):
    """A function of unclip_jax/config.py, with the arguments that it passes on."""

    meaning: str  # its docstring, or that of the function which it extends
    arguments: dict[str, str]  # name → comment, "" where there is none


def functions(source: str) -> dict[str, Function]:
    """The functions in the source of unclip_jax/config.py by which sections are made: those of keywords alone."""
    tree, comments = ast.parse(source), _comments(source)
    found = {}
    for node in (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.args.kwonlyargs):
        extended = _extended(node)
        base = found[extended] if extended else Function("", {})
        lines = [argument.lineno for argument in node.args.kwonlyargs]
        own = {a.arg: comments.get(a.lineno, "") * (lines.count(a.lineno) == 1) for a in node.args.kwonlyargs}
        docstring = (ast.get_docstring(node) or base.meaning).partition("\n")[0]
        found[node.name] = Function(docstring, own | base.arguments)
    return found


def _extended(function: ast.FunctionDef) -> str | None:
    """Name of the function that gets the rest of the arguments."""
    call = function.body[-1].value
    return call.args[1].id if isinstance(call, ast.Call) and ast.unparse(call.func) == "_extended" else None


def keys(source: str, shared: dict[str, Function]) -> list[Key]:
    """All keys of PAPER in the source of a config, sections included, in their order."""
    (paper,) = (node.value for node in ast.parse(source).body if _target(node) == "PAPER")
    lines = [node.value.lineno for node in ast.walk(paper) if isinstance(node, ast.keyword) and node.arg]
    comments = _comments(source)
    own = {line: text for line, text in comments.items() if lines.count(line) == 1}
    return list(_within("", paper, source, shared, own))


def _within(section: str, call: ast.Call, source: str, shared: dict[str, Function], comments: dict[int, str]):
    function = shared.get(_function(call), Function("", {}))
    for keyword in call.keywords:
        made = isinstance(keyword.value, ast.Call)
        if keyword.arg is None:  # **config.pictures(image_size=64)
            yield from _within(section, keyword.value, source, shared, comments)
            continue
        told = function.arguments.get(keyword.arg, _meaning(keyword, shared) if made else "")
        known = keyword.arg in function.arguments or bool(told)
        meaning = told if known else comments.get(keyword.value.lineno, "")
        value = "" if made else ast.get_source_segment(source, keyword.value)
        yield Key(section, keyword.arg, meaning, known, value)
        if made:
            yield from _within(f"{section}.{keyword.arg}".lstrip("."), keyword.value, source, shared, comments)


def _meaning(section: ast.keyword, shared: dict[str, Function]) -> str:
    """Docstring of the function that makes a section, or a part of it, or has its name."""
    parts = [section.value, *(keyword.value for keyword in section.value.keywords if keyword.arg is None)]
    names = [*map(_function, parts), section.arg]
    return next((shared[name].meaning for name in names if name in shared and shared[name].meaning), "")


def _function(call: ast.Call) -> str:
    return ast.unparse(call.func).removeprefix("config.")


def _target(node: ast.stmt) -> str:
    return ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else ""


def _comments(source: str) -> dict[int, str]:
    """Line → its comment, where it holds code too."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    found = {token.start[0]: token for token in tokens if token.type == tokenize.COMMENT}
    return {line: token.string.lstrip("# ") for line, token in found.items() if token.line.strip()[0] != "#"}


def page() -> str:
    """The whole page."""
    shared = functions(SHARED.read_text())
    configs = {path.stem: keys(path.read_text(), shared) for path in CONFIGS}
    meanings = {"": ""} | {key.path: key.meaning for found in configs.values() for key in found if not key.value}
    assert meanings.keys() == set(SECTIONS), "SECTIONS is not what configs have"
    return HEAD + "".join(_table(path, meanings[path], configs) for path in SECTIONS)


def _table(section: str, meaning: str, configs: dict[str, list[Key]]) -> str:
    own = {name: [key for key in found if key.section == section] for name, found in configs.items()}
    those = [name for name, found in own.items() if found]
    rows: dict[str, dict[str, dict[str, list[str]]]] = {}  # key → meaning → value → configs
    for name in those:
        for key in (key for key in own[name] if key.value):
            rows.setdefault(key.name, {}).setdefault(key.meaning, {}).setdefault(key.value, []).append(name)

    where = "" if len(those) == len(configs) else f" In {', '.join(those)}."
    lines = ["", f"## {section or 'Top level'}", *([f"\n{meaning}{where}"] if meaning else []), ""]
    lines += ["| key | meaning | `paper` |", "|-|-|-|"]
    for name, meanings in rows.items():
        for text, values in meanings.items():
            cells = (f"`{value}`" + (f": {', '.join(who)}" if who != those else "") for value, who in values.items())
            lines.append(f"| `{name}` | {text} | {'<br>'.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
