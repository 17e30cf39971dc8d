"""Reads prepared TFDS datasets, and draws emoji scenes where they are asked for the first time."""

import contextlib
import difflib
import functools
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from unclip_jax.data.captions import texts_in, value_at
from unclip_jax.errors import UserError
from unclip_jax.paths import copy_folder, is_remote, to_path

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

DESCRIPTION = "dataset_info.json"  # of a TFDS dataset


class TfdsSource:
    """A prepared TFDS dataset in a format with random access (ArrayRecord). Raises UserError as `open_source` says."""

    def __init__(self, name: str, split: str, data_dir: str, image_feature: str, caption_feature: str):
        builder = _builder(name, data_dir)
        if split.partition("[")[0] not in builder.info.splits:  # "train[:99%]" is a split of TFDS too
            raise UserError(f"{name} has no split {split!r}: it has {', '.join(builder.info.splits)}")
        import tensorflow_datasets as tfds

        known = _features(builder.info.features)
        for feature in (image_feature, caption_feature):
            if feature not in known:
                raise UserError(f"{name} has no feature {feature!r}: it has {', '.join(known)}")
        if not isinstance(known[image_feature], tfds.features.Image):
            found = type(known[image_feature]).__name__
            raise UserError(f"{name} has no picture in {image_feature!r}: it holds {found}")
        self._name, self._split = name, split
        self._image, self._caption = image_feature.split("/"), caption_feature.split("/")
        undecoded = functools.reduce(lambda inner, key: {key: inner}, self._image[::-1], tfds.decode.SkipDecoding())
        try:
            self._records = builder.as_data_source(split, decoders=undecoded)
        except NotImplementedError as error:
            raise UserError(f"{name} has no random access: build it again with file_format=array_record") from error
        except ValueError as error:
            raise UserError(f"{name} cannot give split {split!r}: {' '.join(str(error).split())}") from error
        if not len(self._records):
            raise UserError(f"split {split!r} of {name} is empty")
        if not _is_text(known[caption_feature]):
            found = type(known[caption_feature]).__name__
            raise UserError(f"{name} has no text in {caption_feature!r}: it holds {found}")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict:
        record = self._records[index]
        return {
            "image": bytes(value_at(record, self._image)),
            "caption": _text(value_at(record, self._caption)),
            "key": f"{self._name}/{self._split}/{index}",
        }


def _features(features: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Features by name, those within others as "outer/inner"."""
    found = {}
    for name, feature in features.items():
        found[f"{prefix}{name}"] = feature
        if hasattr(feature, "items"):
            found |= _features(feature, f"{prefix}{name}/")
    return found


def _is_text(feature: Any) -> bool:
    """Tells whether a feature holds a text or a sequence of them."""
    return not hasattr(feature, "items") and feature.np_dtype == np.object_ and len(feature.shape) <= 1


def _text(value: Any) -> str | list[str]:
    """Decodes a caption that TFDS returns as bytes, or several in a sequence."""
    return texts_in(value)[0] if isinstance(value, bytes | str) else texts_in(value)


def _builder(name: str, data_dir: str) -> "tfds.core.DatasetBuilder":
    """Finds a prepared TFDS dataset, or draws emoji scenes. Raises UserError, with advice, where there is none."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError("tfds:... needs tensorflow-datasets: pip install 'unclip_jax[data]'") from error
    from unclip_jax.data.emoji_scenes import EmojiScenes

    dataset, _, config = name.partition("/")
    if dataset == EmojiScenes.name:
        if config not in EmojiScenes.builder_configs:
            raise UserError(f"{dataset} has no config {config!r}: it has {', '.join(EmojiScenes.builder_configs)}")
        builder = EmojiScenes(config=config, data_dir=data_dir, file_format="array_record")
        if not (builder.data_path / DESCRIPTION).exists():
            _draw(builder)
            builder = EmojiScenes(config=config, data_dir=data_dir, file_format="array_record")
        return builder
    # From the files alone: the code of TFDS's own datasets imports TensorFlow.
    from tensorflow_datasets.core import read_only_builder

    try:
        return read_only_builder.builder_from_files(name, data_dir=data_dir)
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        builtin = tfds.list_builders(with_community_datasets=False)  # the others are listed on the network
        if dataset in builtin:
            advice = f"run tfds build {name} --file_format=array_record --data_dir={data_dir}"
        else:
            near = difflib.get_close_matches(dataset, [EmojiScenes.name, *builtin])
            advice = f"of like name are {', '.join(near) or 'none'}"
        there = ", ".join(sorted(p.name for p in to_path(data_dir).glob("*") if p.is_dir())) or "none"
        raise UserError(f"no dataset {name!r} in {data_dir}, where there are: {there}; {advice}") from error


def _draw(builder: "tfds.core.DatasetBuilder") -> None:
    """Draws emoji scenes into the builder's folder."""
    import tensorflow_datasets as tfds

    if is_remote(builder.data_path):  # ArrayRecord can read from a bucket, but write only to a disk
        with tempfile.TemporaryDirectory() as folder:
            local = type(builder)(config=builder.builder_config.name, data_dir=folder, file_format="array_record")
            _draw(local)
            copy_folder(to_path(local.data_path), builder.data_path, DESCRIPTION)
        return
    print(f"drawing {builder.info.full_name} into {builder.data_path}", file=sys.stderr, flush=True)
    tfds.disable_progress_bar()
    try:
        with _quiet():
            builder.download_and_prepare()
    except OSError:
        # Several processes may draw at once: TFDS renames a finished folder into place, where only the first one fits.
        if not builder.data_path.exists():
            raise


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS from logging every step."""
    from absl import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)
