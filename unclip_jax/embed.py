"""Embeds a dataset with CLIP, which is what the command `data embed` does.

Every picture and every caption of the training and the held-out split is embedded; `data.embeddings` describes the
files. Where several processes run, each makes files of its own.
"""

import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from unclip_jax.data import embeddings
from unclip_jax.data.pipeline import Skipped
from unclip_jax.data.sources import Source, open_sources
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.data.transforms import ToExample, captions_of
from unclip_jax.errors import UnreadableRecord, UserError
from unclip_jax.model import Model
from unclip_jax.models.mesh import jit_on_mesh
from unclip_jax.stages import Stage
from unclip_jax.training import preflight
from unclip_jax.training.metrics import SECONDS_BETWEEN_LINES
from unclip_jax.training.sharding import batch_sharding, make_mesh, replicated


def embed_dataset(config: ConfigDict, folder: Path, process_index: int, process_count: int) -> None:
    """Writes this process's share of the files of embeddings, apart from those that are there already.

    config: of a stage that is trained on CLIP's embeddings; it names the dataset and the CLIP. folder: to write to.
    Raises UserError where the stage is not trained on them, where its pictures are cropped at random, and where the
    folder holds other embeddings.
    """
    if "embeddings" not in config.data:
        raise UserError(f"{config.stage} is not trained on CLIP's embeddings: give a config of a prior or the decoder")
    d = config.data
    if d.crop != "center":
        raise UserError(f"data.crop is {d.crop!r}, so a picture has no single embedding: add --config.data.crop=center")
    for name, value in (("data.source", d.source), ("clip.bundle", config.clip.bundle)):
        if not value:
            raise UserError(f"{name} is empty: name the dataset and a trained CLIP, as training itself needs them")

    clip = Model.load(config.clip.bundle, ("clip",))
    if not clip.stage.images:
        raise UserError(f"clip.bundle {config.clip.bundle} reads captions alone: expected a CLIP that sees pictures")
    splits = (d.split, d.eval_split)
    opened = open_sources(
        d.source, d.weights, splits, d.data_dir, d.image_feature, d.caption_feature, preflight.made_by_first
    )
    sources = dict(zip(splits, opened, strict=True))

    # This process's files, and those of them that an earlier run has left to do.
    provenance = embeddings.Provenance(clip.identity, d.source, d.image_feature, d.caption_feature)
    sizes = {split: len(source) for split, source in sources.items()}
    mine = embeddings.begin(folder, provenance, sizes)[process_index::process_count]
    done = embeddings.finished(folder, mine)
    waiting = [shard for shard in mine if shard not in done]

    # Each process embeds on its own devices, as many rows at once as training would give it.
    mesh = make_mesh(ConfigDict(dict(data=-1, fsdp=1)), jax.local_devices())
    towers = _Towers(clip.stage, clip.params, mesh, config.train.batch_size // process_count)
    read = _Reader(clip.stage, clip.tokenizer)
    del clip  # its parameters are on the mesh now
    progress = _Progress(sum(shard.stop - shard.start for shard in mine), process_index == 0)
    progress.skip(sum(shard.stop - shard.start for shard in done))
    for shard in waiting:
        records = read(sources[shard.labels["split"]], shard.start, shard.stop, d.threads)
        embeddings.write(shard, *_embedded(records, towers, progress.advance))
    lost = sum(map(embeddings.unreadable, mine))
    progress.say(f"embed: {progress.total:,} records are in {folder}, of which {lost:,} could not be read")


class _Read(NamedTuple):
    """A record as CLIP reads it."""

    image: np.ndarray  # uint8 (R, R, 3); black where the record could not be read
    tokens: np.ndarray  # int32 (captions, context); no captions where it could not be read
    lengths: np.ndarray  # int32 (captions,)
    checksum: int  # of the record; 0 where it could not be read


class _Reader:
    """Reads records in order, some of them ahead; those that cannot be read are named in the log."""

    def __init__(self, stage: Stage, tokenizer: Tokenizer):
        self._size, self._context = stage.images["image"], stage.config.model.text.context
        self._tokenizer = tokenizer
        self._to_example = ToExample(
            {"image": self._size}, {}, "center", None, kernels={"image": stage.config.model.resize}
        )
        self._skipped = Skipped()

    def __call__(self, source: Source, start: int, stop: int, threads: int) -> Iterator[_Read]:
        import grain

        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)
        records = grain.MapDataset.range(start, stop).map(lambda index: self._read(source, int(index)))
        return iter(records.to_iter_dataset(options))

    def _read(self, source: Source, index: int) -> _Read:
        key = f"number {index}"
        try:
            record = source[index]
            key = record["key"]
            image = self._to_example(record, np.random.default_rng(0))["image"]
        except UnreadableRecord as error:
            self._skipped.note(key, error)
            nothing = np.zeros((0, self._context), np.int32)
            return _Read(np.zeros((self._size, self._size, 3), np.uint8), nothing, nothing[:, 0], 0)
        tokens = self._tokenizer.encode(captions_of(record), self._context, ends=True)
        return _Read(image, *tokens, embeddings.checksum(record))


class _Towers:
    """CLIP's two towers on this process's devices, always called with the same number of rows.

    rows: about so many; `self.rows` is the number that the devices share evenly.
    """

    def __init__(self, stage: Stage, params: dict[str, Any], mesh: Mesh, rows: int):
        self.rows = max(1, -(-rows // mesh.size)) * mesh.size
        self._params, self._rows_over_mesh = jax.device_put(params, replicated(mesh)), batch_sharding(mesh)
        towers = stage.embed_images, stage.embed_texts
        self._image_tower, self._text_tower = (
            jit_on_mesh(tower, mesh, stage.tpu_options, stage.config.dtype) for tower in towers
        )

    def embed_images(self, images: np.ndarray) -> jax.Array:
        """Embeds at most `rows` pictures; returns `rows` embeddings, of which those past the pictures mean nothing."""
        return self._call(self._image_tower, images)

    def embed_texts(self, tokens: np.ndarray, lengths: np.ndarray) -> jax.Array:
        """Embeds at most `rows` captions; returns `rows` embeddings, of which those past the captions mean nothing."""
        return self._call(self._text_tower, tokens, lengths)

    def _call(self, tower: Callable, *arrays: np.ndarray) -> jax.Array:
        full = [np.concatenate([a, np.repeat(a[:1], self.rows - len(a), axis=0)]) for a in arrays]
        return tower(self._params, *jax.device_put(full, self._rows_over_mesh))


def _embedded(
    records: Iterable[_Read], towers: _Towers, advance: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeds records; returns the arrays "image", "text" and "records" of their shard.

    advance: is told the number of records whenever some are done.
    """
    table, images, texts, captions = [], [], [], []
    for chunk in _chunks(records, towers.rows):
        images.append(towers.embed_images(np.stack([record.image for record in chunk])))
        jax.block_until_ready(images[-2:-1])  # one chunk is read while another is embedded, but no more wait
        for record in chunk:
            table.append((len(captions), len(record.lengths), record.checksum))
            captions.extend(zip(record.tokens, record.lengths, strict=True))
        advance(len(chunk))
    for chunk in _chunks(captions, towers.rows):
        texts.append(towers.embed_texts(*(np.stack(part) for part in zip(*chunk, strict=True))))
    image = np.concatenate([np.asarray(part, np.float32) for part in images])[: len(table)]
    text = np.concatenate([image[:0], *(np.asarray(part, np.float32) for part in texts)])[: len(captions)]
    return image, text, np.array(table, np.int64)


def _chunks(items: Iterable, size: int) -> Iterator[list]:
    """Yields lists of `size` items, of which the last one may be shorter."""
    items = iter(items)
    while chunk := list(itertools.islice(items, size)):
        yield chunk


class _Progress:
    """Reports on stderr how many records are done and how long the rest will take. speaks: whether it does at all."""

    def __init__(self, total: int, speaks: bool):
        self.total, self._speaks = total, speaks
        self._done = self._skipped = 0
        self._began = self._said = time.monotonic()

    def skip(self, records: int) -> None:
        """Counts records that an earlier run has done."""
        self._done = self._skipped = records
        if records:
            self.say(f"embed: {records:,} of {self.total:,} records were done before")

    def advance(self, records: int) -> None:
        """Counts records that are done now."""
        self._done += records
        now = time.monotonic()
        if now - self._said > SECONDS_BETWEEN_LINES:
            self._said = now
            speed = (self._done - self._skipped) / (now - self._began)
            left = timedelta(seconds=round((self.total - self._done) / speed))
            self.say(f"embed: {self._done:,} of {self.total:,} records, {speed:.4g} records/s, left {left}")

    def say(self, line: str) -> None:
        if self._speaks:
            print(line, file=sys.stderr, flush=True)
