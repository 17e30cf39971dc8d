"""Finds or makes the tokenizer by which a model reads captions itself, and not through CLIP.

It is trained on the captions of a dataset, without the pictures, by process 0 alone.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from ml_collections import ConfigDict

from unclip_jax.bundle import Bundle
from unclip_jax.data.pipeline import captions
from unclip_jax.data.sources import Source, open_source
from unclip_jax.data.tokenizer import Tokenizer, train_tokenizer
from unclip_jax.errors import UserError
from unclip_jax.paths import to_path, write_bytes
from unclip_jax.progress import Progress
from unclip_jax.stages import Stage
from unclip_jax.training import preflight

MOST_CAPTIONS = 200_000  # records; more captions would not change a tokenizer's pieces


def own_tokenizer(
    config: ConfigDict, stage: Stage, source: Source, workdir: str, origin: Bundle | None, beat: Callable[[], None]
) -> Tokenizer | None:
    """Finds the stage's own tokenizer: that of the model it starts from, the file named, the one that an earlier run
    left in WORKDIR, or a new one. None where the stage has none.

    beat: is called now and then while captions are read. Every process has to call this function. Raises UserError
    where the tokenizer does not fit the model or the earlier run.
    """
    if "own" not in {owner for owner, _, _ in stage.texts.values()}:
        return None
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
            found = _new_tokenizer(config, source, beat)
        if not named.exists():
            write_bytes(stored, found, alone=True)
    tokenizer = Tokenizer(preflight.from_first(found))
    key, vocab_size = _vocabulary(config)
    if tokenizer.vocab_size > vocab_size:
        pieces = tokenizer.vocab_size
        raise UserError(f"{named} has {pieces} pieces, more than the model's vocab_size={vocab_size}: give another, or "
                        f"set --config.{key}={pieces}")  # fmt: skip
    return tokenizer


def make_tokenizer(config: ConfigDict, file: Path) -> None:
    """Trains the tokenizer of a config on its training split, and writes it to a file. Every process has to call it.

    Raises UserError where the config's model reads no captions itself, and where there is such a file.
    """
    if "tokenizer" not in config.data or config.model.get("caption", "own") != "own":
        raise UserError(f"this {config.stage} reads no captions itself, and needs no tokenizer: CLIP's comes with CLIP")
    if file.exists():
        folder = "is a folder: name a file in it, such as tokenizer.model"
        what = folder if file.is_dir() else "is there already: name another, or delete it"
        raise UserError(f"--out {file} {what}")
    d = config.data
    if not d.source:
        raise UserError("data.source is empty: name a dataset, such as --config.data.source=folder:/my/pictures")
    source = open_source(d.source, d.split, d.data_dir, d.image_feature, d.caption_feature)
    made = b""
    if jax.process_index() == 0:
        made = _new_tokenizer(config, source, lambda: None)
        write_bytes(file, made, alone=True)
        pieces = Tokenizer(made).vocab_size
        print(f"tokenizer: {pieces:,} pieces, in {file}", file=sys.stderr)
    preflight.from_first(made)  # the others wait


def _new_tokenizer(config: ConfigDict, source: Source, beat: Callable[[], None]) -> bytes:
    """Trains a tokenizer on captions of a dataset. Says so where they have fewer pieces than the model has room for."""
    key, vocab_size = _vocabulary(config)
    progress = Progress("tokenizer", min(len(source), MOST_CAPTIONS), "captions")

    def read() -> Iterator[str | list[str]]:
        for caption in captions(source, progress.total, config.data.threads):
            beat()
            progress.advance()
            yield caption

    found = train_tokenizer(read(), vocab_size, key)
    if found.vocab_size < vocab_size:
        progress.say(f"these captions have {found.vocab_size:,} pieces, fewer than {key}={vocab_size:,}: the model is "
                     f"smaller with --config.{key}={found.vocab_size}")  # fmt: skip
    return found.model_bytes


def _vocabulary(config: ConfigDict) -> tuple[str, int]:
    """Returns the key of a model's vocabulary and its value, the most pieces that it has room for."""
    if "vocab_size" in config.model:
        return "model.vocab_size", config.model.vocab_size
    return "model.text.vocab_size", config.model.text.vocab_size
