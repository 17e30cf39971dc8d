"""Makes the notebooks of their .py files, runs them, and stores what they show.

    pip install -e '.[notebooks]'
    python experiments/notebooks/run.py
    python experiments/notebooks/run.py experiments/guidance/notebook.py
    python experiments/notebooks/run.py --bare

NAME.py, in jupytext's percent format, is what people edit; NAME.ipynb beside it holds the same cells and their outputs.
Without names, all notebooks are run, one after another, in runs/notebooks. --bare runs nothing: the notebooks are made
without outputs.
"""

import argparse
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parents[2]


def sources() -> list[Path]:
    """Lists the .py files of all notebooks."""
    own = [path for path in Path(__file__).parent.glob("*.py") if path != Path(__file__)]
    return sorted([*own, *(ROOT / "experiments").glob("*/notebook.py")])


def make(source: Path) -> NotebookNode:
    """Makes a notebook without outputs of its .py file. Cells are named by their numbers, and not by chance."""
    notebook = jupytext.read(source)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def execute(notebook: NotebookNode, folder: Path, settings: str = "") -> NotebookNode:
    """Runs a notebook in a folder and stores the outputs in it. Raises CellExecutionError where a cell fails.

    settings: code that is run after the cell of parameters, and not stored.
    """
    folder.mkdir(parents=True, exist_ok=True)
    metadata = notebook.metadata.copy()
    at = 1 + next(n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    notebook.cells.insert(at, nbformat.v4.new_code_cell(settings))
    where = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=None, kernel_name="python3", resources=where, record_timing=False).execute()
    del notebook.cells[at]
    notebook.metadata = metadata  # without the version of Python
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help=".py files of notebooks; default: all")
    parser.add_argument("--bare", action="store_true", help="make them without outputs, and run nothing")
    args = parser.parse_args()
    for source in args.notebooks or sources():
        began, notebook = time.monotonic(), make(source)
        if not args.bare:
            execute(notebook, ROOT / "runs" / "notebooks")
        nbformat.write(notebook, source.with_suffix(".ipynb"))
        print(f"{source.with_suffix('.ipynb')}: {(time.monotonic() - began) / 60:.1f} minutes", file=sys.stderr)


if __name__ == "__main__":
    main()
