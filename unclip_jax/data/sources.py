"""Opens sources of records: TFDS datasets, folders of pictures with captions, tars, tables, and mixtures of these.

A record of any source is {"image": bytes of a picture file, "caption": str or list of str, "key": name of the record}.
Sources have random access: `len(source)` and `source[i]`. They can be pickled, and hold no open file then. Storage
fails now and then, and files are damaged: a record that cannot be read is tried again, and is then an UnreadableRecord,
whatever the error was.
"""

import re
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from unclip_jax.data.captions import cleaned
from unclip_jax.data.folders import open_folder
from unclip_jax.data.mixture import Mixture, several
from unclip_jax.data.splits import Records, check_names, split_up, without_picture
from unclip_jax.data.tables import open_tables
from unclip_jax.data.tars import open_tars
from unclip_jax.data.tfds_source import TfdsSource
from unclip_jax.errors import UnreadableRecord, UserError
from unclip_jax.paths import to_path

RETRY_SECONDS = (0.1, 1.0)  # waits before a record is read again
MAX_IN_A_ROW = 20  # records that cannot be read, after which waiting is in vain
SPLIT = "{split}"  # stands in a path for the split's name
KINDS = "tfds:NAME, folder:PATH, tars:PATTERN, parquet:PATTERN or arrow:PATTERN"

First = Callable[[Callable[[], bytes]], bytes]  # calls what it is given in one process, and tells all what came of it


class Source(Protocol):
    """Records with random access."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict: ...


def _alone(make: Callable[[], bytes]) -> bytes:
    return make()


def open_source(spec: str, split: str, data_dir: str, image_feature: str, caption_feature: str) -> Source:
    """Opens one split of a dataset, in a run of one process. Arguments and errors are those of `open_sources`."""
    return open_sources(spec, (), [split], data_dir, image_feature, caption_feature)[0]


def open_sources(
    spec: str,
    weights: Sequence[float],
    splits: Sequence[str],
    data_dir: str,
    image_feature: str,
    caption_feature: str,
    first: First = _alone,
) -> list[Source]:
    """Opens some splits of a dataset, or of several, "A + B", which are mixed. Returns a source for each split.

    spec: one of KINDS. Splits of the last four are "train" and "test", chosen by a hash of names, unless {split}
        stands in the path for the split's name: then all that is found there is of it.
    weights: shares of the mixed datasets in a batch; (): in proportion to their numbers of records.
    splits, image_feature, caption_feature: of a mixture, one for all of it, or "A + B" again.
    data_dir: folder of TFDS datasets, into which emoji scenes are drawn on first use.
    image_feature, caption_feature: names in a TFDS dataset, a table or a JSON file, "a/b" for b within a.
    first: as `preflight.from_first` for whatever takes long and is the same for all processes.

    Raises UserError for an unknown dataset, split or feature, which names what there is, for one without pictures, and
    for pictures without captions. Reading a record of what is returned raises UnreadableRecord where that fails.
    """
    specs = several("data.source", spec)
    images, captions = (
        several(name, text, len(specs))
        for name, text in (("data.image_feature", image_feature), ("data.caption_feature", caption_feature))
    )
    of_specs = zip(*(several("data.split", split, len(specs)) for split in splits), strict=True)
    opened = [
        _open(one, names, data_dir, image, caption, first)
        for one, names, image, caption in zip(specs, of_specs, images, captions, strict=True)
    ]
    if len(specs) == 1 and not weights:
        return opened[0]
    return [Mixture(parts, weights) for parts in zip(*opened, strict=True)]


def _open(spec: str, splits: Sequence[str], data_dir: str, image: str, caption: str, first: First) -> list[Source]:
    """Opens some splits of one dataset."""
    kind, _, name = spec.partition(":")
    if kind == "tfds":
        folder = str(to_path(data_dir))
        return [Retrying(TfdsSource(name, split, folder, image, caption)) for split in splits]
    if kind not in ("folder", "tars", "parquet", "arrow") or not name:
        raise UserError(f"data.source {spec!r}: expected {KINDS}")
    if re.search(r"\{[^}]*(\.\.|,)[^}]*\}", name):
        raise UserError(f"data.source {spec!r}: expected * in place of numbers in braces, within quotes")

    def records(place: str) -> Records:
        if kind == "folder":
            return open_folder(to_path(place), caption, first)
        if kind == "tars":
            return open_tars(place, caption, first)
        return open_tables(kind, place, image, caption, first)

    if SPLIT in name:
        return [Retrying(records(name.replace(SPLIT, split))) for split in splits]
    check_names(splits)
    return [Retrying(part) for part in split_up(records(name), name, splits)]


class Retrying:
    """Source whose records are read again where that fails, RETRY_SECONDS later each time. It cleans their captions.

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
                record["caption"] = cleaned(record["caption"])
                break
            except UnreadableRecord:  # for good
                self._lost_in_a_row = 0
                raise
            except Exception as error:  # libraries of storage and of file formats raise nearly anything
                if not waits:
                    self._lost_in_a_row += 1
                    line = " ".join(str(error).split())
                    raise UnreadableRecord(f"it cannot be read: {type(error).__name__}: {line[:200]}") from error
            time.sleep(waits.pop(0))
        self._lost_in_a_row = 0
        return record
