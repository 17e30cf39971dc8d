"""Opens sources of records: a TFDS dataset, or a folder of pictures with captions.

A record of any source is {"image": bytes of a picture file, "caption": str or list of str, "key": name of the record}.
Sources have random access: `len(source)` and `source[i]`. Storage fails now and then, and files are damaged: a record
that cannot be read is tried again, and is then an UnreadableRecord, whatever the error was.
"""

import time
from typing import Protocol

from unclip_jax.data.folders import FolderSource
from unclip_jax.data.tfds_source import TfdsSource
from unclip_jax.errors import UnreadableRecord, UserError
from unclip_jax.paths import to_path

RETRY_SECONDS = (0.1, 1.0)  # waits before a record is read again
MAX_IN_A_ROW = 20  # records that cannot be read, after which waiting is in vain


class Source(Protocol):
    """Records with random access."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict: ...


def open_source(spec: str, split: str, data_dir: str, image_feature: str, caption_feature: str) -> Source:
    """Opens one split of a dataset.

    spec: "tfds:NAME[/CONFIG]" or "folder:PATH". data_dir: folder of TFDS datasets, into which emoji scenes are drawn on
    first use. image_feature, caption_feature: names in a TFDS dataset, "a/b" for b within a. Raises UserError for an
    unknown dataset, split or feature, which names what there is, for a folder without pictures and for pictures without
    captions. Reading a record of what is returned raises UnreadableRecord where that fails.
    """
    kind, _, name = spec.partition(":")
    if kind == "folder":
        return Retrying(FolderSource(to_path(name), split))
    if kind == "tfds":
        return Retrying(TfdsSource(name, split, str(to_path(data_dir)), image_feature, caption_feature))
    raise UserError(f"data.source {spec!r}: expected tfds:NAME or folder:PATH")


class Retrying:
    """Source whose records are read again where that fails, RETRY_SECONDS later each time.

    Reading in vain stops it from waiting: after MAX_IN_A_ROW records that could not be read, each is tried only once,
    until one can be read. Raises UnreadableRecord where a record cannot be read, and IndexError past the end.
    """

    def __init__(self, source: Source):
        self._source, self._lost_in_a_row = source, 0

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        waits = list(RETRY_SECONDS) if self._lost_in_a_row < MAX_IN_A_ROW else []
        while True:
            try:
                record = self._source[index]
                break
            except Exception as error:  # libraries of storage and of file formats raise nearly anything
                if not waits:
                    self._lost_in_a_row += 1
                    line = " ".join(str(error).split())
                    raise UnreadableRecord(f"it cannot be read: {type(error).__name__}: {line[:200]}") from error
            time.sleep(waits.pop(0))
        self._lost_in_a_row = 0
        return record
