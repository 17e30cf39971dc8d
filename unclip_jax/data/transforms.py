"""One record → the arrays of one training example. Pictures stay uint8 until they are on the device."""

import io
from collections.abc import Iterable

import numpy as np

from unclip_jax.data.bsr import degrade
from unclip_jax.data.resampling import resize_matrix, separable
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.errors import UserError

CROPS = ("center", "dalle")
WHOLE = (slice(None), slice(None))
ALIGNMENT = 4  # corners of patches are multiples of this, so that low-resolution pixels are whole


class UnreadableRecord(Exception):
    """The record's picture or caption cannot be used: says why."""


class ToExample:
    """(record, rng) → {picture name: uint8 (size, size, 3), text name: int32 (context,), NAME_length: int32 ()}.

    And "low_res", where there is a `bsr_factor`: "image" BSR-degraded to so many times less. And `vectors`, float32
    (dim,): "image_embedding", "text_embedding", of records that come with embeddings, of the caption drawn.

    images: name → side; all are cut from the same square crop. texts: name → (tokenizer, context, ends).
    crop: "center", or "dalle" (see `square_crop`). patch: side of a random window of the picture named "image".
    """

    def __init__(
        self,
        images: dict[str, int],
        texts: dict[str, tuple[Tokenizer, int, bool]],
        crop: str,
        patch: int | None,
        bsr_factor: int | None = None,
        vectors: Iterable[str] = (),
    ):
        if crop not in CROPS:
            raise UserError(f"data.crop is {crop!r}: expected one of {', '.join(CROPS)}")
        if patch is not None and not (0 < patch <= images["image"] and patch % ALIGNMENT == 0):
            raise UserError(f"patch is {patch}: expected a multiple of {ALIGNMENT}, at most {images['image']}")
        self.images, self.texts, self.crop, self.patch, self.bsr_factor = images, texts, crop, patch, bsr_factor
        self.vectors = tuple(vectors)

    def __call__(self, record: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Raises UnreadableRecord."""
        if self.vectors and "image_embedding" not in record:
            raise UnreadableRecord("it could not be read when the embeddings were made")
        example = self._pictures(record["image"], rng) if self.images else {}
        drawn = _one_of(record["caption"], rng)
        for name, (tokenizer, context, ends) in self.texts.items():
            ids, lengths = tokenizer.encode([captions_of(record)[drawn]], context, ends)
            example[name], example[f"{name}_length"] = ids[0], lengths[0]
        if self.bsr_factor:
            example["low_res"] = degrade(example["image"], self.bsr_factor, rng)
        for name in self.vectors:
            example[name] = record["text_embeddings"][drawn] if name == "text_embedding" else record[name]
        return example

    def _pictures(self, data: bytes, rng: np.random.Generator) -> dict[str, np.ndarray]:
        square = square_crop(decode(data), max(self.images.values()), self.crop, rng)
        windows = {"image": _window(self.images["image"], self.patch, rng)} if self.patch else {}
        return {name: area_resize(square, size, windows.get(name, WHOLE)) for name, size in self.images.items()}


def captions_of(record: dict) -> list[str]:
    """All captions of a record."""
    return [record["caption"]] if isinstance(record["caption"], str) else list(record["caption"])


def _one_of(captions: str | list[str], rng: np.random.Generator) -> int:
    """Place of one of a record's captions, drawn where there are several."""
    if isinstance(captions, str):
        return 0
    if not captions:
        raise UnreadableRecord("it has no caption")
    return int(rng.integers(len(captions)))


def decode(data: bytes) -> np.ndarray:
    """A picture file's bytes → uint8 RGB (H, W, 3), upright, transparency on white. Raises UnreadableRecord."""
    from PIL import Image, ImageOps

    try:
        picture = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        if picture.mode.startswith("I;16"):
            # Pillow would clip 16 bits to the lowest 8 instead of scaling them.
            return np.stack([np.asarray(picture) >> 8] * 3, axis=-1).astype(np.uint8)
        if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture)
        return np.asarray(picture.convert("RGB"))
    except Exception as error:  # Pillow's decoders raise nearly anything for a damaged file
        raise UnreadableRecord(f"{type(error).__name__}: {error}") from error


def square_crop(image: np.ndarray, size: int, crop: str, rng: np.random.Generator) -> np.ndarray:
    """A square of the picture.

    "center": the largest one in the middle. "dalle" (arXiv 2102.12092, its data processing): a square of the shorter
    side, off the middle by up to an eighth of the slack either way; then a window of size/t of it, t drawn uniformly
    from [size, min(side, 9/8 size)], at a random place. No flips: pictures contain text.
    """
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) / 2, (width - side) / 2
    if crop == "dalle":
        top, left = (rng.uniform(3 / 8, 5 / 8) * (length - side) for length in (height, width))
        scaled = rng.integers(size, max(size, min(side, 9 * size // 8)) + 1)
        window = max(1, round(side * size / scaled))
        top, left = (offset + rng.integers(side - window + 1) for offset in (top, left))
        side = window
    top, left = int(top), int(left)
    return image[top : top + side, left : left + side]


def area_resize(image: np.ndarray, size: int, window: tuple[slice, slice] = WHOLE) -> np.ndarray:
    """uint8 square → uint8 (size, size, 3), each pixel the mean of what it covers (enlarging: bicubic).

    window: the rows and columns of the result that are wanted; no more than these is computed.
    """
    if image.shape[0] == size:
        return np.ascontiguousarray(image[window])
    if image.shape[0] < size:
        from PIL import Image

        larger = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
        return np.ascontiguousarray(np.asarray(larger)[window])
    # (Pillow's box filter takes each row as wholly in or out.)
    matrix = resize_matrix(image.shape[0], size, "area")
    (top, rows), (left, columns) = (_within(matrix[wanted]) for wanted in window)
    part = image[top : top + rows.shape[1], left : left + columns.shape[1]]
    return np.rint(separable(part, rows, columns)).astype(np.uint8)


def center_square(image: np.ndarray, size: int, kernel: str) -> np.ndarray:
    """uint8 (H, W, 3) → the square in its middle, uint8 (size, size, 3).

    "area": crop, then average, as in training. "bicubic": the shorter side is first brought to `size` by Pillow's
    antialiased cubic kernel, as OpenAI's CLIP does.
    """
    if kernel == "area":
        return area_resize(square_crop(image, size, "center", np.random.default_rng(0)), size)
    from PIL import Image

    height, width = image.shape[:2]
    shorter = min(height, width)
    height, width = (size * side // shorter for side in (height, width))
    resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    return resized[top : top + size, left : left + size]


def _within(matrix):
    """First of the pixels that a sparse (size, length) matrix weighs, and the matrix of these pixels alone."""
    first, last = matrix.indices.min(), matrix.indices.max()
    return first, matrix[:, first : last + 1]


def _window(size: int, side: int, rng: np.random.Generator) -> tuple[slice, slice]:
    """Rows and columns of a random square of `side` pixels in one of `size`."""
    places = (size - side) // ALIGNMENT + 1
    top, left = ALIGNMENT * rng.integers(places, size=2)
    return slice(top, top + side), slice(left, left + side)
