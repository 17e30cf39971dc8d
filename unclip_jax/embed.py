"""Embeds a dataset with CLIP, which is what the command `data embed` does.

Every picture and every caption of the training and the held-out split is embedded; `data.embeddings` describes the
files. Where several processes run, each makes files of its own. A record's embeddings depend on how many rows a device
embeds at once, in their last digits, but not on how many processes there are.
"""

import io
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from unclip_jax.data import embeddings
from unclip_jax.data.embeddings import DTYPES, Form, Provenance, Row
from unclip_jax.data.pipeline import Skipped
from unclip_jax.data.sources import Source, open_sources
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.data.transforms import Crops, ToExample, captions_of, decode
from unclip_jax.errors import UnreadableRecord, UserError
from unclip_jax.model import Model
from unclip_jax.models.mesh import jit_on_mesh
from unclip_jax.progress import Progress
from unclip_jax.stages import Stage
from unclip_jax.training import preflight
from unclip_jax.training.sharding import batch_sharding, make_mesh, replicated


def embed_dataset(
    config: ConfigDict, folder: Path, process_index: int, process_count: int, dtype: str, crops: int
) -> None:
    """Writes this process's share of the files of embeddings, apart from those that are there already.

    config: of a stage that is trained on CLIP's embeddings; it names the dataset and the CLIP. folder: to write to.
    dtype: that they are stored in, one of `embeddings.DTYPES`. crops: of each picture; 1 where data.crop is "center".
    Returns when all processes have written theirs. Raises UserError where the stage is not trained on embeddings, where
    processes differ, and where the folder holds other embeddings.
    """
    _check(config, dtype, crops)
    preflight.agree(preflight.facts(config.to_dict()) | {"--out": str(folder), "--dtype": dtype, "--crops": crops})
    clip = Model.load(config.clip.bundle, ("clip",))
    if not clip.stage.images:
        raise UserError(f"clip.bundle {config.clip.bundle} reads captions alone: expected a CLIP that sees pictures")
    d = config.data
    splits = (d.split, d.eval_split)
    opened = open_sources(
        d.source, d.weights, splits, d.data_dir, d.image_feature, d.caption_feature, preflight.made_by_first
    )
    sources = dict(zip(splits, opened, strict=True))

    # This process's files, and those of them that an earlier run has left to do.
    provenance = Provenance(clip.identity, d.source, d.image_feature, d.caption_feature, d.crop)
    form = Form(dtype) if d.crop == "center" else Form(dtype, crops, config.train.seed, clip.stage.images["image"])
    sizes = {split: len(source) for split, source in sources.items()}
    preflight.agree({"CLIP": clip.identity} | {f"records of {split}": size for split, size in sizes.items()})
    mine = embeddings.begin(folder, provenance, form, sizes)[process_index::process_count]
    done = embeddings.finished(folder, mine)
    waiting = [shard for shard in mine if shard not in done]

    # Each process embeds on its own devices, as many rows at once as training would give it.
    mesh = make_mesh(ConfigDict(dict(data=-1, fsdp=1)), jax.local_devices())
    towers = _Towers(clip.stage, clip.params, mesh, config.train.batch_size // process_count)
    read = _Reader(clip.stage, clip.tokenizer, d.crop, form)
    del clip  # its parameters are on the mesh now
    total, before = (sum(shard.stop - shard.start for shard in shards) for shards in (mine, done))
    progress = Progress("embed", total, "records", before, speaks=process_index == 0)
    for shard in waiting:
        records = read(sources[shard.labels["split"]], shard.start, shard.stop, d.threads)
        embeddings.write(shard, *_embedded(records, towers, progress.advance))
    lost = sum(map(embeddings.unreadable, mine))
    progress.say(f"{progress.total:,} records are in {folder}, of which {lost:,} could not be read")
    preflight.agree({"records are embedded": True})  # else the first to end would take the others for dead


def _check(config: ConfigDict, dtype: str, crops: int) -> None:
    """Raises UserError for what cannot be embedded, before anything is loaded."""
    if "embeddings" not in config.data:
        raise UserError(f"{config.stage} is not trained on CLIP's embeddings: give a config of a prior or the decoder")
    if dtype not in DTYPES:
        raise UserError(f"--dtype is {dtype!r}: expected {' or '.join(DTYPES)}")
    if config.data.crop == "center" and crops != 1:
        raise UserError(f"--crops is {crops}, but data.crop is 'center', and a picture has one middle: add "
                        "--config.data.crop=dalle, or leave --crops out")  # fmt: skip
    if config.data.crop != "center" and crops < 2:
        raise UserError(f"data.crop is {config.data.crop!r}, so a picture has many embeddings: say how many to store, "
                        "such as --crops=4, or add --config.data.crop=center")  # fmt: skip
    for name, value in (("data.source", config.data.source), ("clip.bundle", config.clip.bundle)):
        if not value:
            raise UserError(f"{name} is empty: name the dataset and a trained CLIP, as training itself needs them")


class _Read(NamedTuple):
    """A record as CLIP reads it; without captions where it could not be read."""

    images: list[np.ndarray]  # of each crop, uint8 (R, R, 3); black where the record could not be read
    tokens: np.ndarray  # int32 (captions, context)
    lengths: np.ndarray  # int32 (captions,)
    facts: tuple[int, int, int, int]  # checksums and sides, as in `embeddings.Row`


class _Reader:
    """Reads records in order, some of them ahead; those that cannot be read are named in the log."""

    def __init__(self, stage: Stage, tokenizer: Tokenizer, crop: str, form: Form):
        self._size, self._context = stage.images["image"], stage.config.model.text.context
        self._tokenizer, self._form = tokenizer, form
        kernels = {"image": stage.config.model.resize}
        self._to_example = ToExample({"image": self._size}, {}, crop, None, kernels=kernels)
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
            crops = Crops(self._form.crops, (self._form.seed, index), self._size)
            picture = decode(record["image"])
            images = [self._to_example.cut(picture, crops.rng(j))["image"] for j in range(crops.count)]
        except UnreadableRecord as error:
            self._skipped.note(key, error)
            self._skipped.count(0, 1)
            nothing = np.zeros((0, self._context), np.int32)
            black = [np.zeros((self._size, self._size, 3), np.uint8)] * self._form.crops
            return _Read(black, nothing, nothing[:, 0], (0, 0, 0, 0))
        self._skipped.count(1, 0)
        tokens = self._tokenizer.encode(captions_of(record), self._context, ends=True)
        checksums = embeddings.checksum_of_words(record), embeddings.checksum(record)
        return _Read(images, *tokens, (*checksums, *_sides(record["image"])))


def _sides(data: bytes) -> tuple[int, int]:
    """Reads height and width of a picture file, in pixels, from its header."""
    from PIL import Image

    return Image.open(io.BytesIO(data)).size[::-1]

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
    records: Iterable[_Read], towers: _Towers, advance: Callable[[], None]
) -> tuple[np.ndarray, np.ndarray, list[Row]]:
    """Embeds records; returns the arrays "image" and "text" of their shard, in float32, and its rows.

    advance: is called whenever a record has been read.
    """
    rows: list[Row] = []
    captions: list[tuple[np.ndarray, np.ndarray]] = []

    def pictures() -> Iterator[tuple[np.ndarray]]:
        for record in records:
            rows.append(Row(len(captions), len(record.lengths), *record.facts))
            captions.extend(zip(record.tokens, record.lengths, strict=True))
            yield from ((image,) for image in record.images)
            advance()

    image = _through(towers.embed_images, pictures(), towers.rows)
    text = _through(towers.embed_texts, captions, towers.rows) if captions else image[:0]
    return image.reshape(len(rows), -1, image.shape[-1]), text, rows


def _through(tower: Callable[..., jax.Array], inputs: Iterable[tuple[np.ndarray, ...]], rows: int) -> np.ndarray:
    """Embeds inputs by a tower, `rows` at once; returns float32 (inputs, dim)."""
    found: list[Any] = []
    count = 0
    inputs = iter(inputs)
    while chunk := list(itertools.islice(inputs, rows)):
        found.append(tower(*(np.stack(part) for part in zip(*chunk, strict=True))))
        count += len(chunk)
        if len(found) > 1:  # one chunk is read while another is embedded, but no more wait
            found[-2] = np.asarray(found[-2], np.float32)
    return np.concatenate([np.asarray(part, np.float32) for part in found])[:count]
