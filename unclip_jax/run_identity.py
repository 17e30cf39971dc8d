"""Identity of a training run: what it was started with, which it must have again when it goes on.

A resumed run continues one run, so its model, its data and its randomness may not change. What only changes how the run
is done, or how fast it learns, may, and is said.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from unclip_jax.config import PLACES, completed, flat_items
from unclip_jax.data.sources import Source
from unclip_jax.data.transforms import captions_of
from unclip_jax.errors import UnreadableRecord, UserError
from unclip_jax.training.preflight import versions

# Sections and keys that a resumed run may change, and keys of those sections that it may not.
MAY_CHANGE = ("dtype", "optim.", "train.", "mesh.", "sampling.", "data.threads", "data.workers")
MAY_NOT_CHANGE = ("optim.frozen", "optim.lora_rank", "train.seed", "train.batch_size")
HASHED_RECORDS = 16
PRNG = ("jax_default_prng_impl", "jax_threefry_partitionable", "jax_enable_x64")


def identity(config: ConfigDict, found: Mapping[str, Any]) -> dict[str, Any]:
    """Collects what a run is started with, as values that JSON can hold.

    found: further facts by name, such as what lies at the places that the config names.
    """
    prng = {name: str(getattr(jax.config, name)) for name in PRNG}
    facts = {"config": config.to_dict(), "found": {**found, **prng}, "versions": versions()}
    return json.loads(json.dumps(facts))


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Compares two identities of a run, and lists what changed and may, a line each.

    Raises UserError for the first thing that changed and may not, with both values. A key that only one of them has is
    not compared: another version of this library added or removed it.
    """
    stored = json.loads(json.dumps(completed(ConfigDict(before["config"])).to_dict()))
    pairs = [("", before["found"], now["found"]), ("", dict(flat_items(stored)), dict(flat_items(now["config"])))]
    pairs.append(("version of ", before["versions"], now["versions"]))
    said = []
    for label, was, is_now in pairs:
        for key in was:
            if key not in is_now or was[key] == is_now[key] or key in PLACES:
                continue
            line = f"{label}{key} was {_short(was[key])}, now it is {_short(is_now[key])}"
            if not label and not _may_change(key):
                raise UserError(f"this run was started with other values: {line}; give what it was started with, or a "
                                "new workdir")  # fmt: skip
            said.append(line)
    return said


def fingerprint(source: Source) -> str:
    """Computes a digest of a split of a dataset: its size, and names, pictures and captions of some of its records."""
    sha, count = hashlib.sha256(f"{len(source)}".encode()), min(len(source), HASHED_RECORDS)
    for k in range(count):
        index = k * (len(source) - 1) // max(count - 1, 1)
        try:
            record = source[index]
        except UnreadableRecord:
            sha.update(b"\nunreadable")
            continue
        words = "\n".join(["", str(record["key"]), *captions_of(record), ""])
        sha.update(words.encode(errors="surrogateescape"))  # names of files may be no UTF-8
        sha.update(hashlib.sha256(record["image"]).digest())
    return f"{len(source)} records, {sha.hexdigest()[:16]}"


def _may_change(key: str) -> bool:
    return key.endswith(".remat") or (key.startswith(MAY_CHANGE) and key not in MAY_NOT_CHANGE)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
