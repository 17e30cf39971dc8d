"""Makes the arrays of a training example from a record. Pictures stay uint8 until they are on the device."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from unclip_jax.data.bsr import degrade
from unclip_jax.data.decoding import decode
from unclip_jax.data.resampling import apply_separable, resize_matrix
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.errors import UnreadableRecord, UserError

if TYPE_CHECKING:
    from scipy.sparse import csr_array

CROPS = ("center", "dalle")
WHOLE = (slice(None), slice(None))  # window of all rows and columns
ALIGNMENT = 4  # pixels; corners of patches are multiples of it, so that no low-resolution pixel is cut


class Crops(NamedTuple):
    """Random crops of a record's picture, of each of which there is an embedding; training draws one of them."""

    count: int
    seed: tuple[int, int]
    side: int  # in pixels, as `size` of `square_crop`

    def rng(self, number: int) -> np.random.Generator:
        """Returns the generator that crop `number` is drawn by."""
        return np.random.default_rng((*self.seed, number))


class ToExample:
    """Transform (record, rng) → arrays of one example, by name.

    images: name → side in pixels. Each gives a picture, uint8 (side, side, 3); all show the same square crop.
    texts: name → (tokenizer, context, ends), as in `Tokenizer.encode`. Each gives int32 (context,) and "NAME_length",
        int32 (). Of several captions one is drawn at random, the same for all texts.
    crop: "center" or "dalle", as in `square_crop`.
    patch: side in pixels of the random window that "image" is cut to; None for the whole.
    bsr_factor: adds "low_res", the picture "image" BSR-degraded to 1 / bsr_factor of its side.
    kernels: name of a picture → how it is made small, as in `center_square`; those not named by "area".
    vectors: which of "image_embedding" (of the crop drawn) and "text_embedding" (of the caption drawn) to pass on,
        float32 (dim,), from records of an `EmbeddedSource`. Pictures then show the crop that was embedded.
    min_side, max_aspect: pictures whose shorter side is less, or whose longer side is more times as long, are
        unreadable records; 0 for any.

    Raises UserError for an unknown crop and a patch that does not fit.
    """

    def __init__(
        self,
        images: dict[str, int],
        texts: dict[str, tuple[Tokenizer, int, bool]],
        crop: str,
        patch: int | None,
        bsr_factor: int | None = None,
        vectors: Iterable[str] = (),
        kernels: Mapping[str, str] | None = None,
        min_side: int = 0,
        max_aspect: float = 0.0,
    ):
        if crop not in CROPS:
            raise UserError(f"data.crop is {crop!r}: expected one of {', '.join(CROPS)}")
        if patch is not None and not (0 < patch <= images["image"] and patch % ALIGNMENT == 0):
            raise UserError(f"patch is {patch}: expected a multiple of {ALIGNMENT}, at most {images['image']}")
        self.images, self.texts, self.crop, self.patch, self.bsr_factor = images, texts, crop, patch, bsr_factor
        self.vectors, self.kernels = tuple(vectors), dict(kernels or {})
        self.min_side, self.max_aspect = min_side, max_aspect

    def __call__(self, record: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Makes one example. Raises UnreadableRecord where picture or caption cannot be used."""
        crops = record.get("crops")
        crop = int(rng.integers(crops.count)) if crops else 0
        example = {}
        if self.images:
            picture = decode(record["image"])
            self._check_sides(*picture.shape[:2])
            example = self.cut(picture, rng, crops.rng(crop), crops.side) if crops else self.cut(picture, rng)
        elif "sides" in record:
            self._check_sides(*record["sides"])
        drawn = _draw_caption(record["caption"], rng)
        for name, (tokenizer, context, ends) in self.texts.items():
            ids, lengths = tokenizer.encode([captions_of(record)[drawn]], context, ends)
            example[name], example[f"{name}_length"] = ids[0], lengths[0]
        if self.bsr_factor:
            example["low_res"] = degrade(example["image"], self.bsr_factor, rng)
        for name in self.vectors:
            example[name] = record[f"{name}s"][drawn if name == "text_embedding" else crop]
        return example

    def _check_sides(self, height: int, width: int) -> None:
        shorter, longer = sorted((height, width))
        if shorter < self.min_side:
            raise UnreadableRecord(f"its shorter side has {shorter} pixels, less than data.min_side={self.min_side}")
        if self.max_aspect and longer > self.max_aspect * shorter:
            raise UnreadableRecord(f"it has {longer} by {shorter} pixels, beyond data.max_aspect={self.max_aspect}")

    def cut(
        self,
        picture: np.ndarray,
        rng: np.random.Generator,
        crop_rng: np.random.Generator | None = None,
        crop_side: int | None = None,
    ) -> dict[str, np.ndarray]:
        """Cuts a picture, uint8 (H, W, 3), into those of `images`.

        crop_rng, crop_side: that the square is drawn by, in place of `rng` and the largest side of `images`.
        """
        square = square_crop(picture, crop_side or max(self.images.values()), self.crop, crop_rng or rng)
        windows = {"image": _window(self.images["image"], self.patch, rng)} if self.patch else {}
        made, means = {}, square
        for name, size in sorted(self.images.items(), key=lambda item: item[1], reverse=True):
            if self.kernels.get(name, "area") != "area":
                made[name] = center_square(picture if self.crop == "center" else square, size, self.kernels[name])
            elif name in windows or size > square.shape[0]:
                made[name] = area_resize(square, size, windows.get(name, WHOLE))
            else:  # means of means are means, which saves time where one size is a multiple of the next
                means = _area_means(square if means.shape[0] % size else means, size, WHOLE)
                made[name] = _rounded(means)
        return {name: made[name] for name in self.images}


def captions_of(record: dict) -> list[str]:
    """Lists all captions of a record."""
    return [record["caption"]] if isinstance(record["caption"], str) else list(record["caption"])


def _draw_caption(captions: str | list[str], rng: np.random.Generator) -> int:
    """Draws the index of one of a record's captions. Raises UnreadableRecord where there is none."""
    if isinstance(captions, str):
        return 0
    if not captions:
        raise UnreadableRecord("it has no caption")
    return int(rng.integers(len(captions)))


def square_crop(image: np.ndarray, size: int, crop: str, rng: np.random.Generator) -> np.ndarray:
    """Cuts a square out of a picture (H, W, 3). There are no flips, because pictures contain text.

    crop: "center" is the largest square in the middle. "dalle" (arXiv 2102.12092, its data processing) takes a square
    of the shorter side, off the middle by up to an eighth of the slack either way, and of it a window of size / t of
    the side, at a random place, with t drawn uniformly from [size, min(side, 9/8 size)].
    size: side in pixels that the square will be resized to.
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
    """Resizes a square picture to uint8 (size, size, 3): each pixel is the mean of the area that it covers.

    A smaller picture is enlarged by bicubic interpolation. window: rows and columns of the result to return; only these
    are computed.
    """
    return _rounded(_area_means(image, size, window))


def _area_means(image: np.ndarray, size: int, window: tuple[slice, slice]) -> np.ndarray:
    """Does what `area_resize` does before it rounds: returns float32, or what needs no rounding."""
    if image.shape[0] == size:
        return np.ascontiguousarray(image[window])
    if image.shape[0] < size:
        from PIL import Image

        larger = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
        return np.ascontiguousarray(np.asarray(larger)[window])
    # Pillow's box filter is not used: it counts each row as wholly inside or outside of the area.
    rows = columns = resize_matrix(image.shape[0], size, "area")
    if window != WHOLE:
        (top, rows), (left, columns) = (_within(rows[wanted]) for wanted in window)
        image = image[top : top + rows.shape[1], left : left + columns.shape[1]]
    return apply_separable(image, rows, columns)


def _rounded(image: np.ndarray) -> np.ndarray:
    return image if image.dtype == np.uint8 else np.rint(image).astype(np.uint8)


def center_square(image: np.ndarray, size: int, kernel: str) -> np.ndarray:
    """Resizes the square in the middle of a picture, uint8 (H, W, 3), to uint8 (size, size, 3).

    kernel: "area" crops and then averages, as in training; "bicubic" first brings the shorter side to `size` with
    Pillow's antialiased cubic kernel, as OpenAI's CLIP does.
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


def _within(matrix: "csr_array") -> tuple[int, "csr_array"]:
    """Returns the first pixel that a sparse matrix (size, length) weighs, and the matrix of weighed pixels alone."""
    first, last = matrix.indices.min(), matrix.indices.max()
    return first, matrix[:, first : last + 1]


def _window(size: int, side: int, rng: np.random.Generator) -> tuple[slice, slice]:
    """Draws rows and columns of a square of `side` pixels within one of `size` pixels."""
    places = (size - side) // ALIGNMENT + 1
    top, left = ALIGNMENT * rng.integers(places, size=2)
    return slice(top, top + side), slice(left, left + side)
