"""Reads Markdown: blocks of code, the commands in them as words, spans of code, links and anchors."""

import json
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
RUNS = "<!-- runs -->"  # above a block whose commands a test runs


class Block(NamedTuple):
    """A fenced block of code."""

    language: str
    text: str
    runs: bool  # marked by RUNS


def blocks(text: str) -> list[Block]:
    """Every fenced block of a Markdown text."""
    found = re.finditer(rf"^({RUNS}\n)?```(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE)
    return [Block(match[2].strip(), match[3], bool(match[1])) for match in found]


def cells(path: Path) -> str:
    """The Markdown of a notebook."""
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in found if cell["cell_type"] == "markdown") + "\n"


def prose(text: str) -> str:
    """The text without its fenced blocks."""
    return re.sub(r"^```.*\n(?:.*\n)*?```$", "", text, flags=re.MULTILINE)


def spans(text: str) -> list[str]:
    """Every `span of code` outside of blocks, as one line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(text))]


def links(text: str) -> list[str]:
    """Targets of links and pictures that are no addresses of the web."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(text))
    return [target for target in targets if not re.match("https?://", target)]


def anchors(text: str) -> set[str]:
    """Names by which GitHub links to the headings."""
    titles = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def shell(block: Block) -> str:
    """The shell commands of a block: all of it, or of a notebook's cell the lines that begin with "!"."""
    if block.language == "bash":
        return block.text
    lines = re.findall(r"^!((?:.*\\\n)*.*\n)", block.text, re.MULTILINE)
    return "".join(lines)


# Every command that is found nowhere, which is any, is noted instead of run; so are scripts of this project.
PRELUDE = """
PATH=/nowhere
command_not_found_handle() { printf '%s\\0' "$@" >&3; printf '\\1' >&3; }
"""
NOTES = "#!/bin/bash\nprintf '%s\\0' \"$0\" \"$@\" >&3\nprintf '\\1' >&3\n"


def commands(script: str, folder: Path) -> list[list[str]]:
    """Words of every command that bash would run for a script: variables, arrays and loops are expanded.

    folder: an empty one, to run it in. Raises AssertionError where bash objects.
    """
    for path in [*(ROOT / "tpu_scripts").glob("*.sh"), ROOT / ".ci/run"]:
        stub = folder / path.relative_to(ROOT)
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(NOTES)
        stub.chmod(0o755)
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/activate").touch()
    notes = folder / "notes"
    command = ["/bin/bash", "-euc", f"exec 3>>{notes}\n{PRELUDE}{script}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return [part.split("\0")[:-1] for part in notes.read_text().split("\1")[:-1]]
