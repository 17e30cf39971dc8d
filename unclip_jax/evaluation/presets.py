"""Studies that others report too, by name: which captions are drawn and how large pictures are when compared.

All are of COCO's validation set of 2014, in the folder that its own archives unpack to (val2014/ and annotations/).
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from unclip_jax.errors import UserError
from unclip_jax.foreign import parsed_json

ANNOTATIONS, PICTURES = "annotations/captions_val2014.json", "val2014"  # within COCO's folder


class Preset(NamedTuple):
    """A study: one caption of each of so many pictures; the reference is all pictures, centre-cropped to `size`.

    upsample: False draws the decoder's pictures alone.
    """

    captions: int
    size: int
    upsample: bool


PRESETS = {
    "coco30k": Preset(30_000, 256, upsample=True),  # zero-shot FID of both papers
    "glide64": Preset(30_000, 64, upsample=False),  # GLIDE's figure 6
    "small": Preset(2_000, 64, upsample=False),  # to tell models apart sooner; FID is higher than of more pictures
}


def read_captions(folder: Path, count: int, seed: int) -> list[str]:
    """Draws one caption of each of `count` pictures of COCO, both at random by the seed.

    Raises UserError where the annotations are missing, are of another form, or have fewer pictures.
    """
    path = folder / ANNOTATIONS
    try:
        found = parsed_json(path.read_text())["annotations"]
        rows = [(int(row["image_id"]), int(row["id"]), str(row["caption"])) for row in found]
    except FileNotFoundError as error:
        raise UserError(f"no {ANNOTATIONS} in {folder}: give the folder of COCO's 2014 archives") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds no captions of COCO ({error!r}): take it from COCO's 2014 archives") from error
    captions: dict[int, list[str]] = {}
    for image, _, text in sorted(rows):
        captions.setdefault(image, []).append(" ".join(text.split()))
    if len(captions) < count:
        raise UserError(f"{path} has captions of {len(captions):,} pictures: expected at least {count:,}")
    rng = np.random.default_rng(seed)
    images = sorted(rng.choice(sorted(captions), count, replace=False).tolist())
    return [captions[image][rng.integers(len(captions[image]))] for image in images]
