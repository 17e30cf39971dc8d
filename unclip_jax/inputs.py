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
from unclip_jax.data.pipeline import batches, evaluation_batch
from unclip_jax.data.sources import open_sources
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.data.transforms import ToExample
from unclip_jax.own_tokenizer import own_tokenizer
from unclip_jax.paths import to_path
from unclip_jax.run_identity import fingerprint
from unclip_jax.stages import Stage
from unclip_jax.stages.base import ClipTowers
from unclip_jax.training import preflight
from unclip_jax.training.metrics import SECONDS_BETWEEN_LINES
from unclip_jax.training.sharding import global_batch, own_rows

FEW_HELD_OUT = 8  # examples, below which a run says so


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
    never trained on, the same on every process. fingerprints: "examples" and "held out" → digest of its records;
    "embeddings" → the form that they are stored in.
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
        source, unseen = _open_sources(config, upstream.identity, bool(stage.images))
        plain = (split.plain if embedded(config) else split for split in (source, unseen))
        fingerprints = dict(zip(("examples", "held out"), map(fingerprint, plain), strict=True))
        if embedded(config):
            fingerprints["embeddings"] = ", ".join(f"{name} {value}" for name, value in source.form._asdict().items())
        if len(unseen) < FEW_HELD_OUT and jax.process_index() == 0:
            few = f"only {len(unseen)} example(s) are held out, too few for their numbers to say much"
            print(f"{config.stage}: {few}", file=sys.stderr, flush=True)
        own = own_tokenizer(config, stage, source, workdir, origin, beat)
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
            workers=self.config.data.workers,
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


def _open_sources(config: ConfigDict, clip_identity: str, pictures: bool) -> list[Any]:
    """Opens the split that is trained on and the one that is held out. pictures: of embedded records are read too."""
    d, splits = config.data, (config.data.split, config.data.eval_split)
    sources = open_sources(
        d.source, d.weights, splits, d.data_dir, d.image_feature, d.caption_feature, preflight.made_by_first
    )
    if not embedded(config):
        return sources
    provenance = Provenance(clip_identity, d.source, d.image_feature, d.caption_feature, d.crop)
    return [
        EmbeddedSource(source, to_path(d.embeddings), provenance, split, pictures)
        for source, split in zip(sources, splits, strict=True)
    ]
