"""Runs the commands of this package: `unclip train …` is `python -m unclip_jax.train …`."""

import ast
import difflib
import importlib
import sys
from pathlib import Path

from unclip_jax import __version__

COMMANDS = ("quickstart", "train", "sample", "edit", "evaluate", "study", "experiment", "plan", "doctor", "data")
COMMANDS += ("pretrained", "push", "demo")


def main() -> None:
    """Runs the console script `unclip`. It imports only the command that is asked for, because each takes seconds."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h", "help"):
        print(_help())
    elif name == "--version":
        print(f"unclip_jax {__version__}")
    elif name in COMMANDS:
        from unclip_jax import cli

        sys.argv[1:2] = []
        cli.run(lambda argv: importlib.import_module(_module(name)).main(argv))
    else:
        nearest = difflib.get_close_matches(name, COMMANDS, 1, 0)[0]
        print(f"error: no command {name!r}: the nearest is {nearest!r}; unclip --help lists all", file=sys.stderr)
        sys.exit(2)


def _module(name: str) -> str:
    """Returns the name of a command's module, which for a package such as `data` is its `__main__`."""
    package = Path(__file__).with_name(name).is_dir()
    return f"unclip_jax.{name}.__main__" if package else f"unclip_jax.{name}"


def _help() -> str:
    lines = ["usage: unclip COMMAND …      unclip COMMAND --help      unclip --version", ""]
    return "\n".join(lines + [f"  {name:11} {_summary(name)}" for name in COMMANDS])


def _summary(name: str) -> str:
    """Reads the first line of a command's docstring without importing it."""
    path = Path(__file__).parent.parent / f"{_module(name).replace('.', '/')}.py"
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).splitlines()[0]


if __name__ == "__main__":
    main()
