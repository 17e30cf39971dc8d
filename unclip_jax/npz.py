"""Arrays in an .npz with a card that says where they are from, as JSON. No pickle: nothing in it is executed."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from unclip_jax.errors import UserError
from unclip_jax.foreign import parsed_json
from unclip_jax.paths import to_path, write_bytes


def save(path: str | Path, card: dict[str, Any], **arrays: np.ndarray | float | int) -> None:
    """Writes arrays and their card: on a disk or gs://..., all of the file or nothing."""
    file = io.BytesIO()
    np.savez(file, card=json.dumps(card), **arrays)
    write_bytes(to_path(path), file.getvalue())


def load(path: str | Path, kind: str, names: tuple[str, ...]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads the arrays `names` and the card that `save` wrote. Raises UserError, which calls them `kind`, for anything
    else."""
    path = to_path(path)
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            return {name: file[name] for name in names}, dict(parsed_json(str(file["card"])))
    except FileNotFoundError as error:
        raise UserError(f"no {kind} at {path}: there is no such file") from error
    except (KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} holds no {kind}: expected an .npz of {', '.join(names)} and card") from error
