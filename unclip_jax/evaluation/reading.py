"""Reads pictures and their captions from folders: picture files, or tars of them as `sample --prompts` draws."""

import io
import tarfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from unclip_jax.data.captions import captions_in
from unclip_jax.data.folders import pictures_among
from unclip_jax.data.transforms import center_square, decode
from unclip_jax.errors import UnreadableRecord, UserError
from unclip_jax.paths import files_below, to_path


class Picture(NamedTuple):
    """A picture, uint8 (R, R, 3), and its caption, or "" where it has none."""

    image: np.ndarray
    caption: str


class PictureFile(NamedTuple):
    """A picture's file as it is stored, and the text file beside it, b"" where there is none."""

    name: str
    data: bytes
    beside: bytes

    @property
    def caption(self) -> str:
        """The first caption beside the picture, else the prompt inside it, else ""."""
        return self._read(lambda data: next(iter(captions_in(self.beside)), "") or _prompt(data))

    def square(self, size: int | None) -> np.ndarray:
        """Returns the square in the picture's middle, uint8 (size, size, 3); None: of the shorter side."""
        image = self._read(decode)
        return center_square(image, size or min(image.shape[:2]), "area")

    def _read(self, read: Callable[[bytes], Any]) -> Any:
        try:
            return read(self.data)
        except (UnreadableRecord, OSError) as error:
            raise UserError(f"{self.name} is not a picture that can be read ({error})") from error


def _prompt(data: bytes) -> str:
    with Image.open(io.BytesIO(data)) as file:
        return getattr(file, "text", {}).get("prompt", "")


def read_pictures(place: str, size: int | None) -> Iterator[Picture]:
    """Yields the pictures of a folder, and of tars in it, by name: squares of `size`, or of the first's shorter side.

    Raises UserError where there are none, and for a picture that cannot be read.
    """
    for file in picture_files(place):
        image = file.square(size)
        yield Picture(image, file.caption)
        size = len(image)


def picture_files(place: str) -> Iterator[PictureFile]:
    """Yields the picture files of a folder, and of tars in it, by name. Raises UserError where there is none."""
    folder, found = to_path(place), False
    if not folder.is_dir():
        raise UserError(f"{place} is no folder: expected one of pictures, or of tars of them")
    for name in files_below(folder):
        if name.endswith(".tar"):
            try:
                with (folder / name).open("rb") as file, tarfile.open(fileobj=file) as archive:
                    files = {member.name: archive.extractfile(member).read() for member in archive if member.isfile()}
                    archive.fileobj.seek(archive.offset)
                    if archive.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                        raise tarfile.ReadError("it is cut off")  # between two files, which tarfile takes for its end
            except (tarfile.TarError, EOFError, OSError) as error:
                raise UserError(f"{folder / name} is damaged or no tar ({error}): draw or copy it anew") from error
            for inner in pictures_among(sorted(files)):
                found = True
                beside = files.get(f"{inner.rpartition('.')[0]}.txt", b"")
                yield PictureFile(f"{name}/{inner}", files[inner], beside)
        elif pictures_among([name]) and name != "grid.png":
            found = True
            text = folder / f"{name.rpartition('.')[0]}.txt"
            yield PictureFile(name, (folder / name).read_bytes(), text.read_bytes() if text.exists() else b"")
    if not found:
        raise UserError(f"no pictures in {place}: expected files such as NAME.png or NAME.jpg, or tars of them")
