"""Opens sources of records: a TFDS dataset, or a folder of pictures with captions.

A record of any source is {"image": bytes of a picture file, "caption": str or list of str, "key": name of the record}.
Sources have random access: `len(source)` and `source[i]`. Storage fails now and then, and files are damaged: a record
that cannot be read is tried again, and is then an UnreadableRecord, whatever the error was.
"""

import contextlib
import difflib
import functools
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from unclip_jax.errors import UnreadableRecord, UserError
from unclip_jax.paths import copy_folder, files_below, is_remote, to_path

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
DESCRIPTION = "dataset_info.json"  # of a TFDS dataset
ONE_HELD_OUT_IN = 50  # pictures of a folder
RETRY_SECONDS = (0.1, 1.0)  # waits before a record is read again
MAX_IN_A_ROW = 20  # records that cannot be read, after which waiting is in vain


class Source(Protocol):
    """Records with random access."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict: ...


def without_picture(source: Source, index: int) -> dict:
    """Reads a record without its picture: "caption" and "key" alone.

    A source that can do so without reading the picture's bytes has a method `without_picture`, which takes the index.
    """
    if hasattr(source, "without_picture"):
        return source.without_picture(index)
    record = source[index]
    return {name: record[name] for name in ("caption", "key")}


def open_source(spec: str, split: str, data_dir: str, image_feature: str, caption_feature: str) -> Source:
    """Opens one split of a dataset.

    spec: "tfds:NAME[/CONFIG]" or "folder:PATH". data_dir: folder of TFDS datasets, into which emoji scenes are drawn on
    first use. image_feature, caption_feature: names in a TFDS dataset, "a/b" for b within a. Raises UserError for an
    unknown dataset, split or feature, which names what there is, for a folder without pictures and for pictures without
    captions. Reading a record of what is returned raises UnreadableRecord where that fails.
    """
    kind, _, name = spec.partition(":")
    if kind == "folder":
        return _Retrying(FolderSource(to_path(name), split))
    if kind == "tfds":
        return _Retrying(TfdsSource(name, split, str(to_path(data_dir)), image_feature, caption_feature))
    raise UserError(f"data.source {spec!r}: expected tfds:NAME or folder:PATH")


class _Retrying:
    """Source whose records are read again where that fails, RETRY_SECONDS later each time.

    Reading in vain stops it from waiting: after MAX_IN_A_ROW records that could not be read, each is tried only once,
    until one can be read. Raises UnreadableRecord where a record cannot be read, and IndexError past the end.
    """

    def __init__(self, source: Source):
        self._source, self._lost_in_a_row = source, 0

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        return self._tried(lambda: self._source[index], index)

    def without_picture(self, index: int) -> dict:
        return self._tried(lambda: without_picture(self._source, index), index)

    def _tried(self, read: Callable[[], dict], index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        waits = list(RETRY_SECONDS) if self._lost_in_a_row < MAX_IN_A_ROW else []
        while True:
            try:
                record = read()
                break
            except Exception as error:  # libraries of storage and of file formats raise nearly anything
                if not waits:
                    self._lost_in_a_row += 1
                    line = " ".join(str(error).split())
                    raise UnreadableRecord(f"it cannot be read: {type(error).__name__}: {line[:200]}") from error
            time.sleep(waits.pop(0))
        self._lost_in_a_row = 0
        return record


class FolderSource:
    """Pictures anywhere below a folder, each with its captions beside it, in cat.txt or cat.jpg.txt for cat.jpg.

    Each line of the file is a caption, of which training draws one at a time.

    Whether a picture is in the split "train" or "test" depends on a hash of its name, so that this does not change when
    pictures are added. In a bucket each record takes several requests: a TFDS dataset is faster there. Raises UserError
    for another split and for a folder with fewer than two captioned pictures.
    """

    def __init__(self, folder: Path, split: str):
        if not folder.is_dir():
            raise UserError(f"no folder {folder}: data.source=folder:PATH needs one with pictures and .txt captions")
        if split not in ("train", "test"):
            raise UserError(f"a folder has no split {split!r}: expected train or test")
        files = files_below(folder)
        pictures = pictures_among(files)
        if not pictures:
            raise UserError(f"{folder} has no pictures: expected files ending in {', '.join(PICTURES)}")
        texts = {name.lower(): name for name in files if name.lower().endswith(".txt")}
        captions = {}
        for name in pictures:
            for beside in (str(PurePosixPath(name).with_suffix(".txt")), f"{name}.txt"):
                if beside.lower() in texts:
                    captions[name] = texts[beside.lower()]
                    break
        names = list(captions)
        if not names:
            raise UserError(f"{folder} has {len(pictures)} pictures but no captions: put NAME.txt beside NAME.png")
        self.uncaptioned = len(pictures) - len(names)
        if self.uncaptioned:
            print(f"{folder}: {self.uncaptioned} of {len(pictures)} pictures have no caption: skipped", file=sys.stderr)
        if len(names) == 1:
            raise UserError(f"{folder} has one captioned picture: at least two are needed, one of them to hold out")
        held_out = _held_out(names)
        self._folder, self._captions = folder, captions
        self._names = [name for name in names if (name in held_out) == (split == "test")]

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> dict:
        image = (self._folder / self._names[index]).read_bytes()
        return {"image": image} | self.without_picture(index)

    def without_picture(self, index: int) -> dict:
        name = self._names[index]
        captions = captions_in((self._folder / self._captions[name]).read_bytes()) or [""]
        return {"caption": captions[0] if len(captions) == 1 else captions, "key": name}


def pictures_among(files: Iterable[str]) -> list[str]:
    """Selects the names of pictures, without hidden files and folders, and __MACOSX, which macOS puts into archives."""
    return [
        name
        for name in files
        if name.lower().endswith(PICTURES)
        and not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
    ]


def captions_in(text: bytes) -> list[str]:
    """Lists the captions in a text file, one a line. Bytes that are not UTF-8 become U+FFFD."""
    return [line.strip() for line in text.decode("utf-8-sig", errors="replace").splitlines() if line.strip()]


def _held_out(names: list[str]) -> set[str]:
    """Chooses about one picture in ONE_HELD_OUT_IN by its name alone, at least one, and never all of them."""

    def draw(name: str) -> float:
        # Without the ending, so that two pictures with one caption are in one split.
        return int.from_bytes(hashlib.sha256(os.path.splitext(name)[0].encode()).digest()[:8]) / 2**64

    chosen = {name for name in names if draw(name) < 1 / ONE_HELD_OUT_IN} or {min(names, key=draw)}
    return chosen if len(chosen) < len(names) else chosen - {max(names, key=draw)}


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
            "image": bytes(_at(record, self._image)),
            "caption": _text(_at(record, self._caption)),
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


def _at(record: Any, names: Sequence[str]) -> Any:
    """Value of a feature within others; of each, where they are a sequence."""
    for name in names:
        record = record[name] if isinstance(record, Mapping) else [item[name] for item in record]
    return record


def _text(value: Any) -> str | list[str]:
    """Decodes a caption that TFDS returns as bytes, or several in a sequence."""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return value if isinstance(value, str) else [_text(v) for v in value]


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
