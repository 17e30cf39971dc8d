"""Decodes picture files."""

import io

import numpy as np

from unclip_jax.errors import UnreadableRecord


def decode(data: bytes) -> np.ndarray:
    """Decodes a picture file to uint8 RGB (H, W, 3), turned upright, on white where it is transparent.

    Raises UnreadableRecord for a damaged file.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        picture = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        if picture.mode.startswith("I;16"):
            # Pillow would clip 16-bit values at 255 instead of scaling them.
            return np.stack([np.asarray(picture) >> 8] * 3, axis=-1).astype(np.uint8)
        if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture)
        return np.asarray(picture.convert("RGB"))
    except UnidentifiedImageError as error:
        raise UnreadableRecord("it is no picture of a known kind") from error
    except Exception as error:  # Pillow's decoders raise nearly anything for a damaged file
        raise UnreadableRecord(f"{type(error).__name__}: {error}") from error
