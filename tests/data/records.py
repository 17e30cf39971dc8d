"""Small files of the formats that people have pictures and captions in, made by the formats' own libraries."""

import io
import json
import tarfile

import numpy as np
from PIL import Image

from unclip_jax.data.sources import open_source, open_sources


def picture(k, kind="JPEG"):
    """A picture file of one colour, by which it is known again."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (k % 256, 100, 200)).save(file, kind, quality=95)
    return file.getvalue()


def save_tar(path, files):
    """Writes a tar of (name, bytes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def sample(k, caption=None):
    """The three files of record k, as img2dataset writes them."""
    caption = f"caption {k}" if caption is None else caption
    facts = {"caption": caption, "url": f"https://x/{k}.jpg", "key": f"{k:09d}", "status": "success", "width": 8}
    return [(f"{k:09d}.jpg", picture(k)), (f"{k:09d}.json", json.dumps(facts).encode()),
            (f"{k:09d}.txt", caption.encode())]  # fmt: skip


def save_shards(folder, shards=3, of=20):
    """Writes tars such as 00002.tar; returns the captions by keys of records."""
    captions = {}
    for shard in range(shards):
        numbers = range(10000 * shard, 10000 * shard + of)
        save_tar(folder / f"{shard:05d}.tar", [file for k in numbers for file in sample(k)])
        captions |= {f"{shard:05d}.tar/{k:09d}.jpg": f"caption {k}" for k in numbers}
    return captions


def opened(spec, split="train", image="image", caption="caption", data_dir=""):
    return open_source(spec, split, str(data_dir), image, caption)


def both(spec, image="image", caption="caption", weights=(), splits=("train", "test")):
    return open_sources(spec, weights, splits, "", image, caption)


def records(*sources):
    """All records of some sources by key."""
    return {record["key"]: record for source in sources for record in (source[k] for k in range(len(source)))}


def captions(*sources):
    return {key: record["caption"] for key, record in records(*sources).items()}


def red(record):
    return int(np.asarray(Image.open(io.BytesIO(record["image"])))[4, 4, 0])
