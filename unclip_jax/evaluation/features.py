"""Features of pictures that the metrics are computed from: Inception-v3's, and a CLIP's.

    inception = features.inception("inception", names=("pool", "spatial"))
    for batch in inception.batches(pictures): batch["pool"], batch["spatial"]

The card of what made them goes with the numbers: features of other weights are not to be compared.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from unclip_jax.bundle import check_params, load_bundle
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.data.transforms import center_square
from unclip_jax.errors import UserError
from unclip_jax.evaluation.devices import OnDevices
from unclip_jax.models.clip import normalize
from unclip_jax.models.inception import Inception, parameter_shapes
from unclip_jax.stages import make_stage

INCEPTION = "inception"  # what its folder has in the place of a stage's name
NAMES = ("pool", "spatial", "logits")
ROWS = 32  # pictures that each device takes at once


class Features:
    """Pictures → {name: float32 (N, numbers)}, the same for any batches and for any number of devices.

    card: which network, and its sha256. prepare: pictures of one size → (N, R, R, 3) as the network takes them, which
    it makes of all that it is given; to prepared ones it does nothing.
    """

    def __init__(self, run: OnDevices, card: dict[str, Any], prepare: Callable[[np.ndarray], np.ndarray] = np.asarray):
        self.card = card
        self._run, self.prepare = run, prepare

    def batches(self, pictures: np.ndarray | Iterable[np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        """Features of uint8 RGB (N, H, W, 3), or of batches of such, a batch at a time and in order.

        Raises UserError for what is no such pictures and, by Inception, for pictures of several sizes.
        """
        batches = [pictures] if isinstance(pictures, np.ndarray) else pictures
        return self._run(self.prepare(_checked(batch)) for batch in batches)

    def __call__(self, pictures: np.ndarray | Iterable[np.ndarray]) -> dict[str, np.ndarray]:
        """Features as of `batches`, all at once. Raises UserError where there is no picture, too."""
        batches = list(self.batches(pictures))
        if not batches:
            raise UserError("no pictures: there is nothing to measure")
        return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


class Clip(NamedTuple):
    """A CLIP's embeddings of unit norm."""

    pictures: Features  # gives "image", (N, dim): of the square in each picture's middle
    captions: Callable[[list[str]], np.ndarray]  # → (N, dim)


def inception(
    folder: str | Path, names: tuple[str, ...] = ("pool",), rows: int = ROWS, devices: list[jax.Device] | None = None
) -> Features:
    """The features `names` of the Inception-v3 that `python -m unclip_jax.pretrained inception` wrote to a folder.

    "pool", 2,048 numbers, for FID, KID, precision and recall; "spatial", 2,023, for sFID; "logits", 1,008, for the
    Inception Score. Raises UserError where the folder holds something else, is damaged or changed.
    """
    if unknown := set(names) - set(NAMES):
        raise UserError(f"no features {', '.join(sorted(unknown))}: expected some of {', '.join(NAMES)}")
    bundle = load_bundle(folder)
    if bundle.stage != INCEPTION:
        raise UserError(f"{folder} holds a model of stage {bundle.stage!r}: expected an Inception-v3")
    check_params(bundle.params, parameter_shapes())

    def network(params, images):
        features = Inception().apply({"params": params}, images)
        return {name: features[name] for name in names}

    card = {"network": "Inception-v3 of 2015", "weights": bundle.identity}
    return Features(OnDevices(network, bundle.params, rows, devices), card)


def clip(folder: str | Path, rows: int = ROWS, devices: list[jax.Device] | None = None) -> Clip:
    """A CLIP's embeddings, computed in float32. Raises UserError where the bundle is no CLIP of plain pictures."""
    bundle = load_bundle(folder)
    if bundle.stage != "clip" or not bundle.config.model.image or bundle.config.model.image.timesteps:
        raise UserError(f"{folder} is no CLIP that embeds pictures: expected stage clip, not noised and not text alone")
    config = bundle.config.copy_and_resolve_references().unlock()
    config.dtype = "float32"
    stage, model = make_stage(config.lock()), config.model
    check_params(bundle.params, jax.eval_shape(stage.init, jax.random.key(0)))
    tokenizer = Tokenizer(bundle.tokenizer_bytes)

    def embed_image(params, images):
        return {"image": normalize(stage.embed_images(params, images))}

    def embed_text(params, rows):
        return normalize(stage.embed_texts(params, rows[:, :-1], rows[:, -1]))

    def squares(images):
        return np.stack([center_square(image, model.image_size, model.resize) for image in images])

    def captions(texts):
        if not texts:
            raise UserError("no captions: there is nothing to embed")
        ids, lengths = tokenizer.encode(texts, model.text.context, ends=True)
        return np.concatenate(list(run_texts([np.column_stack([ids, lengths])])))

    run_images, run_texts = (OnDevices(f, bundle.params, rows, devices) for f in (embed_image, embed_text))
    card = {"network": "CLIP", "weights": bundle.identity}
    return Clip(Features(run_images, card, squares), captions)


def unit(rows: np.ndarray) -> np.ndarray:
    """Brings rows (n, d) to unit norm. Raises UserError for rows that have no direction: of zeros, or not finite."""
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    if wrong := int(np.sum(~(np.isfinite(norms) & (norms > 0)))):
        raise UserError(f"{wrong} of {len(rows)} embeddings are zero or not finite: what made them?")
    return rows / norms


def _checked(batch: np.ndarray) -> np.ndarray:
    if getattr(batch, "dtype", None) != np.uint8 or batch.ndim != 4 or batch.shape[-1] != 3:
        found = f"{batch.dtype} {batch.shape}" if isinstance(batch, np.ndarray) else type(batch).__name__
        raise UserError(f"pictures are {found}: expected uint8 RGB (N, H, W, 3)")
    return batch
