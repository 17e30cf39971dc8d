"""Typographic attack: a word in the picture, CLIP's classification of it, and what the decoder draws all the same."""

import dataclasses

import jax
import numpy as np

from unclip_jax.cascade import Cascade
from unclip_jax.data import varied_scenes
from unclip_jax.data.openmoji import objects
from unclip_jax.evaluation import factors
from unclip_jax.evaluation.features import unit
from unclip_jax.trials import Arm, Claim, Experiment, Lab, Values

CAPTIONS = 24  # whose mean is a label


def measure(lab: Lab, cascade: Cascade, arm: Arm) -> Values:
    """Tells whether each scene's object is recognised, "object", and whether its word is, "word": by the CLIP, among
    labels for all objects and words, or in what the decoder draws from the CLIP's embedding."""
    pictures = lab.pictures()
    if arm.name == "blank":
        pictures = [without_word(scene, picture) for scene, picture in zip(lab.scenes, pictures, strict=True)]
    z = cascade.image_embeddings(pictures)
    if arm.name == "drawn":
        size = cascade.decoder.stage.config.model.image_size
        noise = np.asarray(jax.random.normal(jax.random.key(0), (len(z), size, size, 3)))
        images = cascade.redraw(z, noise, 0, steps=25, inverted=False)["images"][-1]
        shown = [(scene.object, scene.word) for scene in factors.read(images).scenes]
    else:
        names = [(name, "") for name in objects()] + [("", word) for word in varied_scenes.WORDS]
        labels = np.stack([label(cascade, *name) for name in names])
        shown = [names[row] for row in np.argmax(unit(z) @ labels.T, axis=1)]
    true = [(scene.object, scene.word) for scene in map(factors.as_read, lab.scenes)]
    hits = (np.array(shown) == np.array(true)).astype(np.float64)
    return {"object": hits[:, :1], "word": hits[:, 1:]}


def label(cascade: Cascade, name: str, word: str) -> np.ndarray:
    """Averages the embeddings of captions of training scenes that are made to name an object and no word, or a word, as
    CLIP's labels are averaged over templates (arXiv 2103.00020, section 3.1.4): this CLIP does not know short ones."""
    rng, captions = np.random.default_rng(0), []
    for index in rng.integers(varied_scenes.COUNTS["train"], size=CAPTIONS):
        scene, named, _ = varied_scenes.scene_at("train", int(index))
        others = [factor for factor in named if factor != "word"]
        changed = dataclasses.replace(scene, **({"word": word} if word else {"object": name}))
        captions.append(varied_scenes.caption(changed, (*others[:2], "word") if word else tuple(others)))
    return unit(unit(cascade.text_embeddings(captions)).mean(axis=0))


def without_word(scene: varied_scenes.Scene, picture: np.ndarray) -> np.ndarray:
    """Paints the background over the label."""
    left, top, right, bottom = varied_scenes.label_box(scene.place)
    blank = picture.copy()
    plain = varied_scenes.background(scene.colour, scene.pattern, varied_scenes.FRAME)
    blank[top:bottom, left:right] = plain[top:bottom, left:right]
    return blank


EXPERIMENT = Experiment(
    question="Does a written word hide an object from CLIP, and from the decoder?",
    paper="unCLIP, section 4, figure 6",
    models=("clip", "decoder"),
    arms=(
        Arm("blank", "classified by CLIP, without a word"),
        Arm("word", "classified by CLIP, with a word"),
        Arm("drawn", "drawn from its embedding, with a word"),
    ),
    measures={"object": "object recognised", "word": "word recognised"},
    claims=(
        Claim("A written word keeps CLIP from naming the object.", "object", "blank", "word"),
        Claim("What the decoder draws shows the object more often than CLIP names it.", "object", "drawn", "word"),
    ),
    captions=512,
    draws=1,
    measure=measure,
)
