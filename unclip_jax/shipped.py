"""The weights that come with this package: a cascade of emoji scenes, and what its experiments need beside it.

    weights/MODEL/          a bundle of each model, in float16
    weights/manifest.json   how each was trained: digest of its config, sha256 of its files, what was measured of it

The folder is called "shipped:", and is the cascade of commands that are given none. It is made by
experiments/weights/make.py.
"""

import json
from pathlib import Path
from typing import Any

from unclip_jax.paths import SHIPPED, to_path

FOLDER = to_path(SHIPPED)
MANIFEST = FOLDER / "manifest.json"


def manifest() -> dict[str, dict[str, Any]]:
    """Reads the manifest: model → "digest", "sha256" and what else is known of it."""
    return json.loads(MANIFEST.read_text()) if MANIFEST.exists() else {}


def find(digest: str) -> Path | None:
    """Finds the bundle of the model that was trained by a config of this digest (`trials.digest`); else None."""
    return next((FOLDER / name for name, known in manifest().items() if known["digest"] == digest), None)
