"""Inputs of a training run: its batches, its held-out batch, its tokenizer, and the CLIP that it is trained against."""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from unclip_jax.arrays import Batch, Params
from unclip_jax.bundle import Bundle
from unclip_jax.config_checks import embedded
from unclip_jax.data.embeddings import EmbeddedSource, Provenance
from unclip_jax.data.pipeline import batches, captions, evaluation_batch
from unclip_jax.data.sources import open_sources
from unclip_jax.data.tokenizer import Tokenizer, train_tokenizer
from unclip_jax.data.transforms import ToExample
from unclip_jax.errors import UserError
from unclip_jax.paths import to_path, write_bytes
from unclip_jax.run_identity import fingerprint
from unclip_jax.stages import Stage
from unclip_jax.stages.base import ClipTowers
from unclip_jax.training import preflight
from unclip_jax.training.metrics import SECONDS_BETWEEN_LINES
from unclip_jax.training.sharding import global_batch, own_rows

FEW_HELD_OUT = 8  # examples, below which a run says so
TOKENIZER_CAPTIONS = 200_000  # more captions would not change a tokenizer's pieces


class Upstream(NamedTuple):
    """The CLIP that a stage is trained against; all empty for a stage that needs none."""

    stage: ClipTowers | None
    params: Params
    tokenizer: Tokenizer | None
    identity: str


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The data of one run, as its stage reads it.

    tokenizer: the stage's own; None where it has none. held_out: numpy arrays of `train.eval_size` examples that are
    never trained on, the same on every process. fingerprints: "examples" and "held out" → digest of its records.
    """

    config: ConfigDict
    source: Any  # of `data.split`: examples by index
    to_example: ToExample
    tokenizer: Tokenizer | None
    held_out: dict
    fingerprints: dict[str, str]

    @classmethod
    def open(
        cls,
        config: ConfigDict,
        stage: Stage,
        upstream: Upstream,
        workdir: str,
        origin: Bundle | None,
        beat: Callable[[], None],
    ) -> "Inputs":
        """Opens the datasets that `config.data` names, and finds or trains the tokenizer. Every process has to call it.

        origin: the trained model that the run starts from, whose tokenizer is kept. beat: is called now and then while
        captions are read, which may take long. Raises UserError where the data cannot be read, and where a tokenizer
        does not belong to the model or to the earlier run in WORKDIR.
        """
        source, unseen = _open_sources(config, upstream.identity)
        plain = (split.plain if embedded(config) else split for split in (source, unseen))
        fingerprints = dict(zip(("examples", "held out"), map(fingerprint, plain), strict=True))
        if len(unseen) < FEW_HELD_OUT and jax.process_index() == 0:
            few = f"only {len(unseen)} example(s) are held out, too few for their numbers to say much"
            print(f"{config.stage}: {few}", file=sys.stderr, flush=True)
        own = _own_tokenizer(config, stage, source, workdir, origin, beat)
        tokenizers = {"own": own, "clip": upstream.tokenizer}
        texts = {name: (tokenizers[owner], context, ends) for name, (owner, context, ends) in stage.texts.items()}
        kernels = {"image": config.model.resize} if "resize" in config.model else {}
        kernels |= {"clip_image": upstream.stage.config.model.resize} if upstream.stage else {}
        to_example = ToExample(
            stage.images, texts, config.data.crop, stage.patch, stage.bsr_factor, stage.vectors, kernels,
            min_side=config.data.min_side, max_aspect=config.data.max_aspect,
        )  # fmt: skip
        held_out = evaluation_batch(unseen, to_example, config.train.eval_size, config.train.seed)
        return cls(config, source, to_example, own, held_out, fingerprints)

    def batches(self, start: int, mesh: Mesh) -> Iterator[Batch]:
        """Yields this process's rows of the batches of steps start + 1, start + 2, …, without end, as `global_batch`
        takes them."""
        return batches(
            self.source,
            self.to_example,
            self.config.train.batch_size,
            self.config.train.seed,
            start,
            rows=own_rows(mesh, self.config.train.batch_size),
            threads=self.config.data.threads,
        )

    def first_batches(self, mesh: Mesh) -> Iterator[Batch]:
        """Yields the batches of the first steps over the mesh, for `Stage.prepare`; reads them when asked, and reports
        progress."""
        said = time.monotonic()
        for k, rows in enumerate(self.batches(0, mesh)):
            if time.monotonic() - said > SECONDS_BETWEEN_LINES and jax.process_index() == 0:
                said = time.monotonic()
                print(f"{self.config.stage}: preparing, {k} training batches read", file=sys.stderr, flush=True)
            yield global_batch(rows, mesh)


def _open_sources(config: ConfigDict, clip_identity: str) -> list[Any]:
    """Opens the split that is trained on and the one that is held out."""
    d, splits = config.data, (config.data.split, config.data.eval_split)
    sources = open_sources(
        d.source, d.weights, splits, d.data_dir, d.image_feature, d.caption_feature, preflight.made_by_first
    )
    if not embedded(config):
        return sources
    provenance = Provenance(clip_identity, d.source, d.image_feature, d.caption_feature)
    return [
        EmbeddedSource(source, to_path(d.embeddings), provenance, split)
        for source, split in zip(sources, splits, strict=True)
    ]


def _own_tokenizer(
    config: ConfigDict, stage: Stage, source: Any, workdir: str, origin: Bundle | None, beat: Callable[[], None]
) -> Tokenizer | None:
    """Finds the stage's own tokenizer: that of the model it starts from, the file named, the one that an earlier run
    left in WORKDIR, or a new one."""
    if "own" not in {owner for owner, _, _ in stage.texts.values()}:
        return None
    vocab_size = (config.model if "vocab_size" in config.model else config.model.text).vocab_size
    stored = to_path(workdir) / "tokenizer.model"
    named = to_path(config.data.tokenizer) if config.data.tokenizer else stored
    # Process 0 decides and the others take its bytes: reading captions again could give them another tokenizer.
    found = b""
    if jax.process_index() == 0:
        if origin:
            found = origin.tokenizer_bytes
            if stored.exists() and stored.read_bytes() != found:
                raise UserError(f"{workdir} holds a run with another tokenizer than init.bundle's: give a new one")
        elif named.exists():
            found = named.read_bytes()
        else:
            found = train_tokenizer(_captions(config, source, beat), vocab_size).model_bytes
        if not named.exists():
            write_bytes(stored, found, alone=True)
    tokenizer = Tokenizer(preflight.from_first(found))
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"{named} has {tokenizer.vocab_size} pieces, more than the model's vocab_size={vocab_size}")
    return tokenizer


def _captions(config: ConfigDict, source: Any, beat: Callable[[], None]) -> Iterator[str | list[str]]:
    """Yields the captions that a tokenizer is trained on; reports progress."""
    count, said = min(len(source), TOKENIZER_CAPTIONS), time.monotonic()
    for k, caption in enumerate(captions(source, count, config.data.threads)):
        beat()
        if time.monotonic() - said > SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            print(f"{config.stage}: {k:,} of {count:,} captions read for the tokenizer", file=sys.stderr, flush=True)
        yield caption
