"""One record → the arrays of one training example. Pictures stay uint8 until they are on the device."""

import io

import numpy as np

from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.errors import UserError

CROPS = ("center", "dalle")
ALIGNMENT = 4  # corners of patches are multiples of this, so that low-resolution pixels are whole


class ToExample:
    """(record, rng) → {picture name: uint8 (size, size, 3), text name: int32 (context,), NAME_length: int32 ()}.

    images: name → side; all are cut from the same square crop. texts: name → (tokenizer, context, ends).
    crop: "center", or "dalle" (see `square_crop`). patch: side of a random window of the picture named "image".
    """

    def __init__(
        self,
        images: dict[str, int],
        texts: dict[str, tuple[Tokenizer, int, bool]],
        crop: str,
        patch: int | None,
    ):
        if crop not in CROPS:
            raise UserError(f"data.crop is {crop!r}: expected one of {', '.join(CROPS)}")
        self.images, self.texts, self.crop, self.patch = images, texts, crop, patch

    def __call__(self, record: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Raises OSError or ValueError for a picture that cannot be read."""
        square = square_crop(decode(record["image"]), max(self.images.values()), self.crop, rng)
        example = {name: area_resize(square, size) for name, size in self.images.items()}
        if self.patch:
            example["image"] = _window(example["image"], self.patch, rng)
        captions = record["caption"]
        caption = captions if isinstance(captions, str) else captions[rng.integers(len(captions))]
        for name, (tokenizer, context, ends) in self.texts.items():
            ids, lengths = tokenizer.encode([caption], context, ends)
            example[name], example[f"{name}_length"] = ids[0], lengths[0]
        return example


def decode(data: bytes) -> np.ndarray:
    """A picture file's bytes → uint8 RGB (H, W, 3), upright, transparency on white."""
    from PIL import Image, ImageOps

    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return np.asarray(picture.convert("RGB"))


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


def area_resize(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 square → uint8 (size, size, 3), each pixel the mean of what it covers (enlarging: bicubic)."""
    from PIL import Image

    if image.shape[0] == size:
        return np.ascontiguousarray(image)
    kernel = Image.Resampling.BOX if image.shape[0] > size else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(image).resize((size, size), kernel))


def _window(image: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    places = (image.shape[0] - side) // ALIGNMENT + 1
    top, left = ALIGNMENT * rng.integers(places, size=2)
    return np.ascontiguousarray(image[top : top + side, left : left + side])
