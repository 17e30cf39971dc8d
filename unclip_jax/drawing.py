"""Drawing in bulk: a file of captions → pictures, over all devices and hosts, streamed to disk or a bucket, resumable.

Rows are the lines of the file. They are drawn in shards of SHARD_PICTURES, which are written as a whole or not at all,
and each process draws shards of its own on its own devices; so what is drawn does not depend on how many there are, and
a run that was stopped draws the shards that are missing. While a shard is encoded, the next two are being drawn: the
devices compute one, while the host passes the other from model to model.
"""

import collections
import concurrent.futures
import datetime
import hashlib
import io
import json
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unclip_jax import pictures
from unclip_jax.cascade import Cascade
from unclip_jax.errors import UserError
from unclip_jax.foreign import csv_rows, parsed_json
from unclip_jax.model import CHUNK_ROWS, chunk_rows
from unclip_jax.paths import to_path, write_bytes

RUN = "run.json"  # what a run draws, in the folder that it draws to
SHARD_PICTURES = 64  # as many are lost, at most, by each process that is killed
SECONDS_BETWEEN_LINES = 10.0
COLUMNS = ("prompt", "caption", "text")  # names by which .csv and .jsonl may call the caption


class Place(NamedTuple):
    """A picture of a bulk run: its caption, the caption's line (from 0), and its number among that caption's."""

    text: str
    row: int
    draw: int

    @property
    def name(self) -> str:
        return f"{self.row:08d}_{self.draw:03d}"


def read_prompts(name: str) -> list[str]:
    """Reads captions: a line each of .txt; of .jsonl or .csv the field "prompt", "caption" or "text".

    Raises UserError for another kind of file, a missing field, and a line without a caption.
    """
    path = to_path(name)
    if not path.is_file():
        raise UserError(f"--prompts {name}: there is no such file")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts {name} is not text in UTF-8 ({error}): save it as such") from error
    kind = path.suffix.lower()
    if kind == ".txt":
        prompts = [line.strip() for line in text.splitlines()]
    elif kind == ".jsonl":
        prompts = [_field(_object(line, name, i), name, i) for i, line in enumerate(text.splitlines(), 1)]
    elif kind == ".csv":
        try:
            prompts = [_field(row, name, i) for i, row in enumerate(csv_rows(text), 2)]
        except ValueError as error:
            raise UserError(f"--prompts {name} is not CSV ({error})") from error
    else:
        raise UserError(f"--prompts {name}: expected a file that ends in .txt, .jsonl or .csv")
    empty = [i for i, prompt in enumerate(prompts, 1) if not prompt]
    if empty or not prompts:
        raise UserError(f"--prompts {name}: " + (f"caption {empty[0]} is empty" if empty else "it holds no captions"))
    return prompts


def read_run(folder: Path) -> dict[str, Any]:
    """Reads what a run stored of itself in a folder; {} where there is none. Raises UserError for another file."""
    try:
        return dict(parsed_json((folder / RUN).read_text())) if (folder / RUN).is_file() else {}
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder / RUN} is not of a run that drew pictures: give another folder") from error


def draw_file(
    cascade: Cascade,
    prompts: Sequence[str],
    out: Path,
    pictures_each: int,
    seed: int,
    options: Mapping[str, Any],
    settings: dict[str, Any],
    kind: str,
    process: int = 0,
    processes: int = 1,
) -> int:
    """Draws `pictures_each` pictures for each caption that are not in `out` yet; returns how many it drew.

    options: scales and source, of `Cascade.generate`. settings: what pictures depend on, stored in each. kind: "tar"
    for WebDataset shards, "png" for a file each. process: which of `processes` this is. Raises UserError where `out`
    holds a run of other captions or settings.
    """
    places = [Place(text, row, draw) for row, text in enumerate(prompts) for draw in range(pictures_each)]
    _check_same_run(out, prompts, settings | {"seed": seed, "n": pictures_each, "format": kind}, process)
    starts = range(0, len(places), SHARD_PICTURES)
    shards = {k: places[start : start + SHARD_PICTURES] for k, start in enumerate(starts)}
    mine = [k for k in shards if k % processes == process]
    missing = [k for k in mine if not _last_file(out, k, shards[k], kind).exists()]
    devices = cascade.decoder.mesh.size
    at_once = max(1, devices * CHUNK_ROWS // SHARD_PICTURES)  # shards: fewer rows would leave devices idle
    groups = [mine[i : i + at_once] for i in range(0, len(mine), at_once)]
    # A group is drawn as a whole, whatever of it is missing: a row's place among others may change how it is rounded.
    groups = [group for group in groups if not set(group).isdisjoint(missing)]

    def draw(group: Sequence[int]) -> np.ndarray:
        texts, rows, draws = zip(*(place for k in group for place in shards[k]), strict=True)
        return cascade.generate(list(texts), seed, **options, rows=rows, draws=draws)["images"][-1]

    progress = _Progress(sum(len(shards[k]) for k in mine), sum(len(shards[k]) for k in missing))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        ahead = collections.deque(pool.submit(draw, group) for group in groups[:1])
        concurrent.futures.wait(ahead)  # the first alone, as it compiles
        for i, group in enumerate(groups):
            ahead.extend(pool.submit(draw, later) for later in groups[i + len(ahead) : i + 3])
            images = ahead.popleft().result()
            about, start = settings | {"batch": chunk_rows(len(images), devices)}, 0
            for k in group:
                stop = start + len(shards[k])
                if k in missing:
                    _write(out, k, shards[k], images[start:stop], start, seed, about, kind)
                    progress.add(stop - start)
                start = stop
    return progress.done


def _last_file(out: Path, shard: int, places: Sequence[Place], kind: str) -> Path:
    """Names the file that appears when a shard is complete."""
    return out / (f"{shard:06d}.tar" if kind == "tar" else f"{places[-1].name}.png")


def _write(
    out: Path,
    shard: int,
    places: Sequence[Place],
    images: np.ndarray,
    start: int,
    seed: int,
    settings: dict[str, Any],
    kind: str,
) -> None:
    """Writes a shard: pictures that hold what drew them; in a tar, captions and numbers beside them.

    start: place of the first picture among those that were drawn with it.
    """
    files = {}
    for i, (place, image) in enumerate(zip(places, images, strict=True), start):
        numbers = {"seed": str(seed), "row": str(place.row), "draw": str(place.draw)}
        stored = {"prompt": place.text, **numbers, "position": str(i % settings["batch"]), "settings": settings}
        files[f"{place.name}.png"] = pictures.png(image, stored)
        if kind == "tar":
            files[f"{place.name}.txt"] = place.text.encode()
            files[f"{place.name}.json"] = json.dumps({"prompt": place.text, **numbers}).encode()
    if kind == "tar":
        write_bytes(out / f"{shard:06d}.tar", _tar(files))
    else:
        for name, content in files.items():
            write_bytes(out / name, content)


def _tar(files: dict[str, bytes]) -> bytes:
    """Packs files; the same files give the same bytes."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def _check_same_run(out: Path, prompts: Sequence[str], settings: dict[str, Any], process: int) -> None:
    """Stores what the run draws in OUT/run.json, or compares it with what an earlier run stored there."""
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    # The models count, not where they lie nor which version draws.
    settings = {name: value for name, value in settings.items() if name not in ("bundle", "version")}
    ours = json.loads(json.dumps(settings | {"prompts": len(prompts), "prompts_sha256": digest}))
    path = out / RUN
    if path.exists():
        theirs = read_run(out)
        changed = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
        if changed:
            raise UserError(f"{out} holds a run that differs in {', '.join(changed)}: give another --out")
    elif process == 0:
        write_bytes(path, (json.dumps(ours, indent=2) + "\n").encode())


class _Progress:
    """Counts pictures; says on stderr every SECONDS_BETWEEN_LINES how many there are and how long the rest takes."""

    def __init__(self, total: int, missing: int):
        self.done, self._total, self._missing = 0, total, missing
        self._began = self._said = time.monotonic()
        if total > missing:
            print(f"{total - missing} of {total} pictures are there already", file=sys.stderr, flush=True)

    def add(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self._said < SECONDS_BETWEEN_LINES and self.done < self._missing:
            return
        self._said, rate = now, self.done / (now - self._began)
        left = datetime.timedelta(seconds=round((self._missing - self.done) / rate))
        there = self._total - self._missing + self.done
        print(f"{there} of {self._total} pictures, {rate:.3g} a second, {left} left", file=sys.stderr, flush=True)


def _object(line: str, name: str, number: int) -> Any:
    try:
        return parsed_json(line)
    except ValueError as error:
        raise UserError(f"--prompts {name}, line {number} is not JSON ({error})") from error


def _field(record: Any, name: str, number: int) -> str:
    """Finds the caption of a line."""
    found = [record[key] for key in COLUMNS if isinstance(record, dict) and isinstance(record.get(key), str)]
    if not found:
        raise UserError(f"--prompts {name}, line {number} has no {' or '.join(COLUMNS)}: name the captions so")
    return found[0].strip()
