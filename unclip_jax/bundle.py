"""Saves and loads bundles: trained models on a disk or in a bucket, which need no other file to be used.

    DIR/config.json           stage, config, identity of the CLIP, and the sha256 of the whole
    DIR/weights.safetensors   float32 arrays, named by their "/"-joined paths in the parameters; or float16 ones, which
                              are read as float32 and then are the same model
    DIR/tokenizer.model       for models that read text: sentencepiece; or tokenizer.json, a byte-pair encoding

There is no pickle, and a bundle loads as a whole or not at all: names, shapes and checksum must agree.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from ml_collections import ConfigDict

import unclip_jax
from unclip_jax.cli import lists_to_tuples
from unclip_jax.config import completed
from unclip_jax.data.tokenizer import is_json
from unclip_jax.errors import UserError
from unclip_jax.foreign import parsed_json
from unclip_jax.paths import copy_folder, is_remote, local_copy, to_path
from unclip_jax.training.leaves import differences, named_leaves

FORMAT = 1  # goes up when an older reader would misread the folder
CONFIG, WEIGHTS, TOKENIZERS = "config.json", "weights.safetensors", ("tokenizer.model", "tokenizer.json")


class Bundle(NamedTuple):
    """A loaded model."""

    stage: str  # name of its stage
    config: ConfigDict  # locked; sequences are tuples
    params: dict[str, Any]  # nested dict of float32 NumPy arrays
    tokenizer_bytes: bytes | None  # None: it reads no text by a tokenizer of its own
    clip_identity: str  # identity of the CLIP that it was trained with; "": none
    identity: str  # hex sha256 of stage, config, weights and tokenizer, by which stages find their CLIP
    extra: dict[str, Any]  # anything else that was stored with it


def save_bundle(
    directory: str | Path,
    stage_name: str,
    config: ConfigDict,
    params: Any,
    tokenizer_bytes: bytes | None,
    clip_identity: str,
    extra: dict[str, Any],
    half: bool = False,
) -> str:
    """Writes a bundle and returns its identity, a hex sha256. Either all of it appears at `directory` or nothing does.

    directory: on a disk, or gs://...; an older bundle there is replaced. params: nested dict of arrays that this
    process can read as a whole; stored as float32. half: round them to float16 and store them as such; the identity is
    that of the rounded model. The others are as in `Bundle`.
    Raises UserError where anything but a bundle is at `directory`, for a config or extra that JSON cannot hold, and for
    weights not finite or beyond float16, before anything is written.
    """
    target = to_path(directory)
    if target.exists() and not (target / CONFIG).exists() and not _is_empty_folder(target):
        raise UserError(f"{target} exists and is not a bundle: give a new folder")
    if is_remote(target):
        with tempfile.TemporaryDirectory() as local:
            place = to_path(local) / "bundle"
            identity = save_bundle(place, stage_name, config, params, tokenizer_bytes, clip_identity, extra, half)
            _upload(place, target)
        return identity
    target = target.absolute()
    config = config.to_dict()
    description = {
        "format": FORMAT,
        "library": f"unclip_jax {unclip_jax.__version__}",
        "stage": stage_name,
        "identity": "",  # filled in when the weights are written
        "clip": clip_identity,
        "config": config,
        "extra": extra,
    }
    _to_json(description)  # raises before anything is written
    leaves = named_leaves(params)
    for name, leaf in leaves.items():
        _check_finite(name, leaf)
        if half and np.abs(leaf).max(initial=0) > np.finfo(np.float16).max:
            raise UserError(f"{name} holds numbers beyond float16: store this model in float32")

    target.parent.mkdir(parents=True, exist_ok=True)
    beside = _folder_beside(target)
    try:
        new, old = beside / "new", beside / "old"
        new.mkdir()
        with open(new / WEIGHTS, "wb") as file:
            weights = _written(file, leaves, "F16" if half else "F32")
            description["identity"] = _identity(stage_name, config, weights, tokenizer_bytes)
        if tokenizer_bytes is not None:
            (new / TOKENIZERS[is_json(tokenizer_bytes)]).write_bytes(tokenizer_bytes)
        (new / CONFIG).write_text(_to_json(description, indent=2) + "\n")
        _replace(target, new, old)
    finally:
        shutil.rmtree(beside)
    return description["identity"]


def _folder_beside(target: Path) -> Path:
    """Makes a folder beside a bundle to write it to, because a rename is atomic only within one file system. Deletes
    those of processes that were killed while they saved it."""
    prefix = f".{target.name}.saving-"
    for left in target.parent.iterdir():
        if left.name.startswith(prefix):
            shutil.rmtree(left, ignore_errors=True)
    return to_path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))


def _replace(target: Path, new: Path, old: Path) -> None:
    """Renames the folder `new` to `target`. An older folder there is moved to `old`, and back again if that fails."""
    if target.exists():
        os.rename(target, old)
    try:
        os.rename(new, target)
    except OSError:
        if old.exists():
            os.rename(old, target)
        raise


def load_bundle(directory: str | Path) -> Bundle:
    """Loads a bundle as a whole and checks it against its checksum. directory: on a disk, or gs://...

    Raises UserError where there is no such folder or no bundle in it, where a file is missing, cut short or changed
    since it was written, for weights that are no finite floats, and where a newer version of this library wrote it.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    folder = to_path(directory)
    description = load_description(folder)
    try:
        with local_copy(folder / WEIGHTS) as file:
            stored = load_file(file)
    except FileNotFoundError as error:
        raise UserError(f"bundle {folder} lacks {WEIGHTS}: copy it again") from error
    except SafetensorError as error:
        raise UserError(f"{folder / WEIGHTS} is damaged or cut short ({error}): copy it again") from error
    for name, value in stored.items():
        if value.dtype not in (np.float32, np.float16):
            raise UserError(f"{folder / WEIGHTS} holds {name} as {value.dtype}: expected float32 or float16")
        _check_finite(name, value)
    weights = {name: stored.pop(name).astype(np.float32, copy=False) for name in sorted(stored)}
    tokenizers = [folder / name for name in TOKENIZERS if (folder / name).exists()]
    tokenizer = tokenizers[0].read_bytes() if tokenizers else None
    identity = _identity(description["stage"], description["config"], weights.items(), tokenizer)
    if identity != description["identity"]:
        raise UserError(f"bundle {folder} is not what was written: its sha256 differs from the one in {CONFIG}")
    return Bundle(
        stage=description["stage"],
        config=completed(ConfigDict(lists_to_tuples(description["config"]))).lock(),
        params=_nested(weights),
        tokenizer_bytes=tokenizer,
        clip_identity=description["clip"],
        identity=identity,
        extra=lists_to_tuples(description["extra"]),
    )


def check_params(params: Any, abstract: Any) -> None:
    """Raises one UserError that lists every missing, unexpected and misshapen leaf of `params`.

    abstract: the ShapeDtypeStructs that the model expects, as `jax.eval_shape` of its init returns them.
    """
    wrong = differences(params, abstract)
    if wrong:
        raise UserError(f"the weights do not fit the model: {wrong}")


def load_description(folder: Path) -> dict[str, Any]:
    """Reads the keys "stage", "identity", "clip", "config" and "extra" of a bundle's config.json.

    Raises UserError where the folder is not there or no bundle, and where a newer version of this library wrote it.
    """
    if not folder.is_dir():
        raise UserError(f"no bundle at {folder}: there is no such folder")
    if not (folder / CONFIG).exists():
        raise UserError(f"{folder} is not a bundle: it has no {CONFIG}")
    try:
        description = parsed_json((folder / CONFIG).read_text())
        if description["format"] > FORMAT:
            raise UserError(
                f"bundle {folder} has format {description['format']} and was written by {description['library']}; "
                f"this library reads up to {FORMAT}: upgrade unclip_jax"
            )
        return {key: description[key] for key in ("stage", "identity", "clip", "config", "extra")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is not a bundle: its {CONFIG} cannot be read ({error!r})") from error


def _check_finite(name: str, value: Any) -> None:
    """Raises UserError for a leaf with numbers that are not finite."""
    if wrong := int(np.count_nonzero(~np.isfinite(value))):
        raise UserError(f"{name} has {wrong} values not finite: these are not the weights of a model that works")


def _upload(local: Path, target: Path) -> None:
    """Copies a bundle from a disk to a bucket."""
    for name in (CONFIG, *TOKENIZERS):
        (target / name).unlink(missing_ok=True)
    # A bucket cannot rename folders. Its description is deleted first and copied last: without it there is no bundle.
    copy_folder(local, target, CONFIG)


def _written(file: BinaryIO, leaves: dict[str, Any], kind: str) -> Iterator[tuple[str, np.ndarray]]:
    """Writes leaves as a safetensors file, and yields each name and its array of float32 after it is written.

    kind: "F32" or "F16". One leaf at a time, because the safetensors library would hold all the weights in memory a
    second time, as bytes.
    """
    dtype = np.dtype({"F32": np.float32, "F16": np.float16}[kind])
    header, end = {}, 0
    for name, leaf in leaves.items():
        start, end = end, end + dtype.itemsize * int(np.prod(leaf.shape, dtype=np.int64))
        header[name] = {"dtype": kind, "shape": list(leaf.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name, leaf in leaves.items():
        value = np.asarray(leaf, dtype, order="C")
        file.write(value.reshape(-1).view(np.uint8).data)
        yield name, value.astype(np.float32, copy=False)


def _identity(stage: str, config: dict, weights: Iterable[tuple[str, np.ndarray]], tokenizer: bytes | None) -> str:
    """Computes the hex sha256 that identifies a bundle. weights: sorted by name."""
    sha = hashlib.sha256()
    sha.update(_to_json({"stage": stage, "config": config}, sort_keys=True).encode())
    for name, value in weights:
        sha.update(f"\n{name} {value.dtype} {value.shape}\n".encode())
        sha.update(value.reshape(-1).view(np.uint8))
    sha.update(b"\ntokenizer\n" + tokenizer if tokenizer is not None else b"")
    return sha.hexdigest()


def _to_json(value: Any, **options: bool | int) -> str:
    """Returns a value as JSON. Raises UserError where JSON cannot hold it, such as NaN or a function."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"the config or extra of a bundle holds what JSON cannot ({error})") from error


def _nested(flat: dict[str, np.ndarray]) -> dict[str, Any]:
    """Makes nested dicts of arrays from arrays named by "/"-joined paths."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *folders, leaf = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = value
    return tree


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
