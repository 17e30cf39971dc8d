"""Draws twenty pictures of something that the shipped models have never seen, and counts drawings that show it.

    python experiments/fine_tuning/own.py pictures my_pictures
    python experiments/fine_tuning/own.py count samples

The first writes pictures of a guitar with their captions, as a folder to train on. The second reads what `unclip
sample` drew for captions of guitars: the scene that a drawing is nearest to, of 49 objects on 8 colours, each in three
sizes, and the colours alone. It prints how often that is a guitar, how often it has the caption's background, and how
often both. docs/fine_tuning.md has the training between the two.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
from PIL import Image

from unclip_jax.data import emoji_scenes
from unclip_jax.data.emoji_scenes import JITTER_SCALES, Scene
from unclip_jax.data.openmoji import colours, objects
from unclip_jax.evaluation.intervals import share
from unclip_jax.evaluation.reading import read_pictures

OBJECT = "guitar"
COUNT = 20
SEEN = ("red", "orange", "yellow", "green", "purple")  # backgrounds of the pictures to train on


def pictures(folder: Path) -> None:
    """Writes pictures of 64 px and their captions."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        shift = tuple(rng.uniform(-emoji_scenes.JITTER_SHIFT, emoji_scenes.JITTER_SHIFT, 2))
        scene = Scene(OBJECT, SEEN[i % len(SEEN)], shift=shift, scale=JITTER_SCALES[i % len(JITTER_SCALES)])
        Image.fromarray(emoji_scenes.render(scene, 64)).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(emoji_scenes.caption(scene, i))


def count(folder: str) -> None:
    """Prints the shares of drawings in a folder with a guitar, with the background of their caption, and with both."""
    drawn = list(read_pictures(folder, None))
    size = drawn[0].image.shape[0]
    each = itertools.product((*objects(), OBJECT), colours(), JITTER_SCALES)
    known = [Scene(name, colour, scale=scale) for name, colour, scale in each]
    plain = [np.broadcast_to(np.uint8(rgb), (size, size, 3)) for rgb in colours().values()]
    rows = np.stack([*(emoji_scenes.render(scene, size) for scene in known), *plain]).astype(np.float32)
    names = [(scene.object, scene.colour) for scene in known] + [("", colour) for colour in colours()]
    nearest = [names[int(np.argmin(np.square(rows - picture.image).mean(axis=(1, 2, 3))))] for picture in drawn]
    guitar = np.array([name == OBJECT for name, _ in nearest])
    background = np.array([colour in picture.caption for (_, colour), picture in zip(nearest, drawn, strict=True)])
    for name, hits in (("a guitar", guitar), ("the background", background), ("both", guitar & background)):
        result = share(name, hits, "drawings")
        print(f"{name}: {result.value:.3f} [{result.low:.3f}, {result.high:.3f}] of {result.n}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("pictures", "count"))
    parser.add_argument("folder")
    args = parser.parse_args()
    if args.command == "pictures":
        pictures(Path(args.folder))
    else:
        count(args.folder)


if __name__ == "__main__":
    main()
