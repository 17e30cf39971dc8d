"""Draws the default dataset, emoji scenes: one or two drawings on a plain background, with a caption.

Every picture depends on (config, split, index) alone, and can be drawn at any resolution. The test split holds out
*combinations* (an object with a colour, or two objects together), never an object or a colour by itself: a test caption
asks for something that was never seen, of which every part was. As the true drawings are known, a model's pictures can
be scored without any network (`unclip_jax.evaluation.alignment`).

The TFDS builder writes `varied_scenes` too.
"""

import dataclasses
import io
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from unclip_jax.data import varied_scenes
from unclip_jax.data.openmoji import colours, draw, objects, with_article

# Place of the first object relative to the second: direction (right, down), and the words for it.
_RELATIONS = {
    "left of": ((-1, 0), ("to the left of", "left of")),
    "right of": ((1, 0), ("to the right of", "right of")),
    "above": ((0, -1), ("above", "over")),
    "below": ((0, 1), ("below", "under")),
}

_SINGLE_WORDINGS = (
    "{object} on {background}",
    "{background} with {object}",
    "{object} in front of {background}",
    "a picture of {object} on {background}",
    "{object} against {background}",
    "a drawing of {object} on {colour}",
    "{object} on {colour}",
    "{background} behind {object}",
)
_PAIR_WORDINGS = (
    "{object} {relation} {other}",
    "{object} {relation} {other} on {background}",
    "{background} with {object} {relation} {other}",
    "a picture of {object} {relation} {other}",
    "{object} {relation} {other} against {background}",
    "a drawing of {object} {relation} {other} on {colour}",
)

SINGLE_SIDE, PAIR_SIDE = 0.8, 0.42  # side of an object in a scene of one or two, as a fraction of the frame's
PAIR_OFFSET = 0.24  # from the middle of the frame to the middle of either object of a pair, as a fraction
JITTER_SCALES = (0.95, 1.0, 1.05)  # only a few, so that each drawing is rendered only a few times
JITTER_SHIFT = 0.03  # largest shift, as a fraction of the frame


@dataclasses.dataclass(frozen=True)
class Scene:
    """One object in the middle or, with `relation` and `other`, two objects, such as `object` "left of" `other`.

    shift: moves all objects (right, down), as fractions of the frame. scale: multiplies the objects' sides.
    """

    object: str
    colour: str
    relation: str = ""
    other: str = ""
    shift: tuple[float, float] = (0.0, 0.0)
    scale: float = 1.0


def relations() -> tuple[str, ...]:
    """Lists the relations that the first object of a pair can have to the second."""
    return tuple(_RELATIONS)


def places(relation: str) -> tuple[tuple[float, float], ...]:
    """Returns the middles of the objects, (right, down) as fractions of the frame: one for relation "", else two."""
    if not relation:
        return ((0.5, 0.5),)
    (x, y), _ = _RELATIONS[relation]
    return (0.5 + x * PAIR_OFFSET, 0.5 + y * PAIR_OFFSET), (0.5 - x * PAIR_OFFSET, 0.5 - y * PAIR_OFFSET)


def render(scene: Scene, size: int) -> np.ndarray:
    """Renders a scene as uint8 RGB (size, size, 3)."""
    picture = np.empty((size, size, 3), np.uint8)
    picture[:] = colours()[scene.colour]
    side = round((PAIR_SIDE if scene.relation else SINGLE_SIDE) * scene.scale * size)
    for name, middle in zip((scene.object, scene.other), places(scene.relation), strict=False):
        left, top = (round((at + shift) * size - side / 2) for at, shift in zip(middle, scene.shift, strict=True))
        drawing = draw(name, side)
        alpha = drawing[..., 3:].astype(np.float32) / 255
        patch = picture[top : top + side, left : left + side]
        patch[:] = np.rint(patch + alpha * (drawing[..., :3].astype(np.float32) - patch))
    return picture


def caption(scene: Scene, wording: int = 0) -> str:
    """Describes a scene in words. wording: number of the wording, 0 or higher; 0 is the plainest."""
    words = {
        "object": with_article(scene.object),
        "background": with_article(f"{scene.colour} background"),
        "colour": scene.colour,
    }
    if not scene.relation:
        return _SINGLE_WORDINGS[wording % len(_SINGLE_WORDINGS)].format(**words)
    turn, template = divmod(wording, len(_PAIR_WORDINGS))
    phrases = _RELATIONS[scene.relation][1]
    words |= {"other": with_article(scene.other), "relation": phrases[turn % len(phrases)]}
    return _PAIR_WORDINGS[template].format(**words)


def scenes(kind: str, split: str) -> Iterator[tuple[Scene, str]]:
    """Yields all (scene, caption) of a split in order of index. kind: "single" or "pair". split: "train" or "test"."""
    plain = _single_scenes(split) if kind == "single" else _pair_scenes(split)
    for index, (scene, wording) in enumerate(plain):
        if split == "train":
            right, down, scale = _spread(index)[:3]
            shift = ((2 * right - 1) * JITTER_SHIFT, (2 * down - 1) * JITTER_SHIFT)
            scene = dataclasses.replace(scene, shift=shift, scale=JITTER_SCALES[int(scale * len(JITTER_SCALES))])
        yield scene, caption(scene, wording)


def _single_scenes(split: str) -> Iterator[tuple[Scene, int]]:
    """Yields (scene, wording) of scenes of one object.

    In "train" each (object, colour) that is not held out comes once in each wording, in "test" each one that is held
    out comes once, in the first wording.
    """
    names = list(colours())
    # 64 of the 384 combinations: each colour 8 times; each object once, the first 16 objects twice.
    held_out = {(k % len(objects()), (3 * k + 1 + 3 * (k // len(objects()))) % len(names)) for k in range(64)}
    for i, name in enumerate(objects()):
        for j, colour in enumerate(names):
            if ((i, j) in held_out) == (split == "test"):
                for wording in range(len(_SINGLE_WORDINGS) if split == "train" else 1):
                    yield Scene(name, colour), wording


def _pair_scenes(split: str) -> Iterator[tuple[Scene, int]]:
    """Yields (scene, wording) of scenes of two objects, which are held out together.

    In "train" all other two come in both orders and all relations, in "test" the held-out two in one order and all
    relations. Two are held out in both orders, because "a left of b" and "b right of a" are one picture.
    """
    n, names = len(objects()), list(colours())
    held_out = {(i, (i + step) % n) for i in range(n) for step in (5, 17)}  # each object in 4 of the 96
    seen = [(i, j) for i in range(n) for j in range(n) if i != j and not {(i, j), (j, i)} & held_out]
    twos = seen if split == "train" else sorted(held_out)
    for index, (i, j, relation) in enumerate((i, j, relation) for i, j in twos for relation in _RELATIONS):
        colour, wording = _spread(index)[3:]
        scene = Scene(objects()[i], names[int(colour * len(names))], relation, objects()[j])
        yield scene, int(wording * 2 * len(_PAIR_WORDINGS)) if split == "train" else 0


def _spread(index: int) -> np.ndarray:
    """Returns five numbers in [0, 1), spread evenly over the indices: Weyl's sequence, which never changes."""
    return np.modf((index + 1) * np.sqrt([2.0, 3.0, 5.0, 7.0, 11.0]))[0]


def encode_png(picture: np.ndarray) -> bytes:
    """Encodes a picture, uint8 RGB (height, width, 3), as PNG, quickly rather than in few bytes."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(picture).save(out, format="PNG", compress_level=1)
    return out.getvalue()


@dataclasses.dataclass
class ScenesConfig(tfds.core.BuilderConfig):
    """Config of TFDS: kind of scenes ("single", "pair" or "varied") and side of their pictures in pixels."""

    kind: str = "single"
    size: int = 64


class EmojiScenes(tfds.core.GeneratorBasedBuilder):
    """Emoji in plain scenes, with captions that name them, their places and colours.

    All drawings are by OpenMoji (https://openmoji.org), the open-source emoji and icon project.
    License: CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/), which pictures made from them inherit.

    Each record: image (PNG), caption, index. Single and pair scenes: also object, other, relation (both "" where there
    is one object), colour. Varied scenes: also the eight factors, and "named", the factors that the caption names
    besides the object, with commas between them.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "OpenMoji 17."}
    # Nothing is downloaded. (To find that out, TFDS 4.9.10 would import a package that it does not require.)
    url_infos: ClassVar = {}
    BUILDER_CONFIGS: ClassVar = [
        ScenesConfig(name=f"{kind}_{size}", description=f"{kind} scenes, {size} pixels", kind=kind, size=size)
        for kind in ("single", "pair", "varied")
        for size in (64, 256, 1024)
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        size = self.builder_config.size
        names = ("object", "colour", "relation", "other")
        if self.builder_config.kind == "varied":
            names = (*varied_scenes.factors(), "named")
        texts = {name: tfds.features.Text() for name in ("caption", *names)}
        features = {"image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"), "index": np.int64}
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features | texts),
            homepage="https://openmoji.org",
            license="CC BY-SA 4.0",
        )

    def _split_generators(self, dl_manager: "tfds.download.DownloadManager") -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in ("train", "test")}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        examples = _varied_examples if self.builder_config.kind == "varied" else _plain_examples
        for index, (picture, texts) in enumerate(examples(self.builder_config, split)):
            yield index, {"image": io.BytesIO(encode_png(picture)), "index": index} | texts


def _plain_examples(config: ScenesConfig, split: str) -> Iterator[tuple[np.ndarray, dict[str, str]]]:
    """Yields (picture, texts) of single or pair scenes in order of index."""
    for scene, text in scenes(config.kind, split):
        texts = {name: getattr(scene, name) for name in ("object", "colour", "relation", "other")}
        yield render(scene, config.size), texts | {"caption": text}


def _varied_examples(config: ScenesConfig, split: str) -> Iterator[tuple[np.ndarray, dict[str, str]]]:
    """Yields (picture, texts) of varied scenes in order of index."""
    for scene, named, text in varied_scenes.scenes(split):
        texts = dataclasses.asdict(scene) | {"named": ",".join(named), "caption": text}
        yield varied_scenes.render(scene, config.size), texts
