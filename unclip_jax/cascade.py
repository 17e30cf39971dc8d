"""Trained stages chained: caption → prior → decoder → upsamplers (unCLIP, arXiv 2204.06125, figure 2; GLIDE's chain,
2112.10741, is caption → decoder → upsampler).

A cascade is a folder of bundles: decoder/, beside it clip/ and prior/ where the decoder draws CLIP embeddings, and, if
they are there, upsampler_256/ and upsampler_1024/. Each arrow is one jitted function of arrays; guidance scales and
keys are arguments, so no choice of them compiles anew.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.bundle import check_params, load_bundle, load_description
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.data.transforms import center_square
from unclip_jax.errors import UserError
from unclip_jax.stages import Stage, make_stage

UPSAMPLERS = ("upsampler_256", "upsampler_1024")
PRIORS = ("prior_diffusion", "prior_ar")
DDIM = {"sampler": "ddim", "clip_x0": 0.0}  # clipping would not let it run to and fro
STEPS = 250  # of DDIM, to and fro: what reproduces a picture (arXiv 2105.05233, appendix F)
ROWS = 16  # at most so many pictures at once: bounds memory, and keeps the shapes few


@dataclasses.dataclass(frozen=True)
class Model:
    """One trained stage, ready to be called."""

    stage: Stage
    params: Any
    tokenizer: Tokenizer | None
    identity: str

    @functools.cached_property
    def sample(self):
        """Jitted (params, frozen, conditions, key) → what the stage draws."""
        return jax.jit(self.stage.sample)

    @functools.cached_property
    def invert(self):
        """Jitted (params, frozen, conditions, images) → the noise that they are drawn from."""
        return jax.jit(self.stage.invert)


class Cascade:
    """The whole system. Pictures are uint8 (N, H, W, 3), embeddings float32 (N, dim) of unit norm where the CLIP's are.

    A cascade without a prior draws pictures for embeddings alone, one without a CLIP for captions alone.
    """

    def __init__(self, clip: Model | None, prior: Model | None, decoder: Model, upsamplers: list[Model]):
        self.clip, self.prior, self.decoder, self.upsamplers = clip, prior, decoder, upsamplers
        self._variants: dict[tuple, Model] = {}
        if clip:
            self._embed_texts = jax.jit(clip.stage.embed_texts)
            self._embed_images = jax.jit(clip.stage.embed_images)

    @classmethod
    def load(cls, folder: str) -> "Cascade":
        """Reads a folder of bundles. Raises UserError for what is missing or was trained against another CLIP."""
        root = Path(folder).expanduser()
        if not root.is_dir():
            raise UserError(f"no bundle at {root}: expected a folder with decoder/ and what it needs")
        clip = prior = None
        if load_description(root / "decoder")["stage"] == "decoder":
            clip = _load(root / "clip", ("clip",), None)
            prior = _load(root / "prior", PRIORS, clip) if (root / "prior").exists() else None
        decoder = _load(root / "decoder", ("decoder", "glide"), clip)
        upsamplers = [root / name for name in UPSAMPLERS if (root / name).exists()]
        return cls(clip, prior, decoder, [_load(path, ("upsampler", "glide"), clip) for path in upsamplers])

    def text_embeddings(self, texts: list[str]) -> np.ndarray:
        """CLIP text embeddings."""
        arrays = self.clip.tokenizer.encode(texts, self.clip.stage.config.model.text.context, ends=True)
        rows = [self._embed_texts(self.clip.params, *chunk) for chunk in _chunks(*arrays)]
        return np.concatenate(rows)[: len(texts)]

    def image_embeddings(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """CLIP image embeddings of pictures, uint8 (H, W, 3) of any size: the square in their middle is looked at.

        Raises UserError where the CLIP is a text tower alone.
        """
        m = self.clip.stage.config.model
        if not m.image:
            raise UserError("this cascade's CLIP reads captions alone: pictures need one that has its image tower too")
        squares = np.stack([center_square(image, m.image_size, m.resize) for image in images])
        rows = [self._embed_images(self.clip.params, *chunk) for chunk in _chunks(squares)]
        return np.concatenate(rows)[: len(squares)]

    def embeddings(self, texts: list[str], key, guidance_scale: float | None = None) -> np.ndarray:
        """The prior's image embeddings for captions. guidance_scale: None is the trained config's."""
        self._check_prior()
        conditions = self._captions(self.prior, texts) | {"text_embedding": self.text_embeddings(texts)}
        return self._draw(self.prior, conditions, key, guidance_scale)

    def decode(
        self, embeddings: np.ndarray | None, texts: list[str], key, guidance_scale: float | None = None
    ) -> np.ndarray:
        """The decoder's pictures for image embeddings (None: GLIDE takes none) and captions ("" for none)."""
        return _to_uint8(self._decode(embeddings, texts, key, guidance_scale))

    def upsample(self, images: np.ndarray, texts: list[str], key) -> list[np.ndarray]:
        """The pictures after each upsampler in turn. texts: read by GLIDE's alone."""
        return [_to_uint8(larger) for larger in self._upsample(_to_float(images), texts, key)]

    def generate(
        self,
        texts: list[str],
        seed: int,
        guidance_scale: float | None = None,
        prior_guidance_scale: float | None = None,
    ) -> dict[str, Any]:
        """One picture per caption: {"embeddings" (None of GLIDE), "images": list of arrays, the decoder's first, the
        largest last}."""
        key_prior, key_decoder, key_upsampler = jax.random.split(jax.random.key(seed), 3)
        embeddings = self.embeddings(texts, key_prior, prior_guidance_scale) if self.clip else None
        small = self._decode(embeddings, texts, key_decoder, guidance_scale)
        larger = self._upsample(small, texts, key_upsampler)
        return {"embeddings": embeddings, "images": [_to_uint8(images) for images in (small, *larger)]}

    def encode(self, pictures: Sequence[np.ndarray], steps: int = STEPS) -> tuple[np.ndarray, np.ndarray]:
        """The two halves of what the decoder draws pictures from: CLIP embedding and, by DDIM inversion, x_T."""
        embeddings = self.image_embeddings(pictures)
        model = self._sampled_by(self.decoder, **DDIM, steps=str(steps))
        small = _to_float(self._squares(pictures))
        conditions = self._captions(model, [""] * len(small)) | {"image_embedding": embeddings}
        parts = [
            model.invert(model.params, self.clip.params, dict(zip(conditions, rows, strict=True)), images)
            for images, *rows in _chunks(small, *conditions.values())
        ]
        return embeddings, np.concatenate(parts)[: len(small)]

    def redraw(
        self,
        embeddings: np.ndarray,
        x_T: np.ndarray,
        seed: int,
        eta: float = 0.0,
        steps: int = STEPS,
        guidance_scale: float = 1.0,
    ) -> dict[str, Any]:
        """Pictures for embeddings (N, dim) and x_T (N, R, R, 3), by DDIM: what variations, interpolations and
        text diffs are made of. eta 0 adds no noise, so that `encode`d pictures come out as they were."""
        model = self._sampled_by(self.decoder, **DDIM, steps=str(steps))
        conditions = self._captions(model, [""] * len(embeddings)) | {"image_embedding": embeddings, "x_T": x_T}
        key_decoder, key_upsampler = jax.random.split(jax.random.key(seed))
        small = self._draw(model, conditions | {"eta": np.float32(eta)}, key_decoder, guidance_scale)
        larger = self._upsample(small, [""] * len(small), key_upsampler)
        return {"embeddings": embeddings, "images": [_to_uint8(images) for images in (small, *larger)]}

    def variations(self, picture: np.ndarray, count: int, eta: float, seed: int, **options) -> dict[str, Any]:
        """Pictures of what CLIP sees in a picture (unCLIP, section 3.1). eta 0 reproduces it, 1 keeps its meaning.

        options: of `redraw`, here and below.
        """
        embeddings, x_T = self.encode([picture], options.get("steps", STEPS))
        rows = [np.repeat(half, count, axis=0) for half in (embeddings, x_T)]
        return self.redraw(*rows, seed, eta=eta, **options)

    def interpolate(
        self, first: np.ndarray, second: np.ndarray, count: int, seed: int, inverted: bool = True, **options
    ) -> dict[str, Any]:
        """`count` pictures on the way from one to the other (section 3.2), embeddings by slerp. inverted: x_T goes from
        the one's to the other's, so that both ends are reproduced; else one draw of noise serves all."""
        embeddings, x_T = self.encode([first, second], options.get("steps", STEPS))
        path = [slerp(*embeddings, theta) for theta in np.linspace(0, 1, count)]
        if inverted:
            noise = np.stack([slerp(*x_T, theta) for theta in np.linspace(0, 1, count)])
        else:
            noise = np.repeat(jax.random.normal(jax.random.key(seed), x_T[:1].shape), count, axis=0)
        return self.redraw(np.stack(path), noise, seed, **options)

    def text_diff(
        self, picture: np.ndarray, before: str, after: str, theta: float, count: int, seed: int, **options
    ) -> dict[str, Any]:
        """`count` pictures from a picture towards what changes it from caption `before` to `after` (section 3.3), by
        slerp to the normalised difference of the text embeddings, from 0 to `theta`, a share of the way."""
        embeddings, x_T = self.encode([picture], options.get("steps", STEPS))
        source, target = self.text_embeddings([before, after])
        direction = (target - source) / np.linalg.norm(target - source) * np.linalg.norm(embeddings[0])
        path = [slerp(embeddings[0], direction, share) for share in np.linspace(0, theta, count)]
        return self.redraw(np.stack(path), np.repeat(x_T, count, axis=0), seed, **options)

    def inpaint(
        self,
        picture: np.ndarray,
        mask: np.ndarray,
        text: str,
        count: int,
        seed: int,
        guidance_scale: float | None = None,
        prior_guidance_scale: float | None = None,
    ) -> np.ndarray:
        """`count` pictures in which only what `mask`, bool (H, W), marks is drawn anew, after the caption.

        A model that was trained to inpaint is told the known pixels; others have them put back after every step. In
        the result, at the size of the last upsampler, they are those of `picture` bit for bit. Raises UserError for a
        mask of another size than the picture, or that marks all or nothing.
        """
        if mask.shape != picture.shape[:2]:
            sizes = [f"{shape[1]}x{shape[0]}" for shape in (mask.shape, picture.shape)]
            raise UserError(f"the mask is {sizes[0]} pixels, the picture {sizes[1]}: make them the same")
        if mask.all() or not mask.any():
            raise UserError(f"the mask marks {'all' if mask.all() else 'nothing'} of the picture: mark a part of it")
        marked = np.repeat(np.uint8(255) * mask[..., None], 3, axis=-1)

        def known(size):
            """What an array of pictures keeps at a size: the pixels of which no part is marked."""
            kept = center_square(marked, size, "area")[..., :1] == 0
            source = _to_float(center_square(picture, size, "area"))
            return {"known_image": np.stack([source] * count), "known": np.stack([kept] * count)}

        texts = [text] * count
        key_prior, key_decoder, key_upsampler = jax.random.split(jax.random.key(seed), 3)
        embeddings = self.embeddings(texts, key_prior, prior_guidance_scale) if self.clip else None
        more = known(self.decoder.stage.config.model.image_size)
        images = self._decode(embeddings, texts, key_decoder, guidance_scale, more)
        images = [images, *self._upsample(images, texts, key_upsampler, known)][-1]
        last = known(images.shape[1])
        return np.where(last["known"], _to_uint8(last["known_image"]), _to_uint8(images))

    def sdedit(
        self,
        sketch: np.ndarray,
        text: str,
        start: float,
        count: int,
        seed: int,
        guidance_scale: float | None = None,
        prior_guidance_scale: float | None = None,
    ) -> list[np.ndarray]:
        """`count` pictures of a caption that keep the layout of a sketch (SDEdit, arXiv 2108.01073), at every size.

        start: how far the sketch is noised first, from 0 to 1; 0.3 to 0.6 is usual.
        """
        texts = [text] * count
        key_prior, key_decoder, key_upsampler = jax.random.split(jax.random.key(seed), 3)
        embeddings = self.embeddings(texts, key_prior, prior_guidance_scale) if self.clip else None
        more = {"sketch": np.repeat(_to_float(self._squares([sketch])), count, axis=0)}
        model = self._sampled_by(self.decoder, start=start)
        small = self._decode(embeddings, texts, key_decoder, guidance_scale, more, model)
        return [_to_uint8(images) for images in (small, *self._upsample(small, texts, key_upsampler))]

    def similarity(self, images: Sequence[np.ndarray], texts: list[str]) -> np.ndarray:
        """Cosines (pictures, texts) of CLIP embeddings."""
        both = self.image_embeddings(images), self.text_embeddings(texts)
        pictures, captions = (z / np.linalg.norm(z, axis=-1, keepdims=True) for z in both)
        return pictures @ captions.T

    def classify(self, picture: np.ndarray, labels: list[str]) -> np.ndarray:
        """CLIP's probability of each label for a picture, without training for them."""
        logits = np.exp(self.clip.params["logit_scale"]) * self.similarity([picture], labels)[0]
        weights = np.exp(logits - logits.max())
        return weights / weights.sum()

    def check_prompts(self, texts: list[str]) -> None:
        """Raises UserError for a prompt that is empty or longer than the models read, and without a prior."""
        self._check_prior()
        limits = {}
        if self.clip:
            limits["CLIP"] = self.clip.tokenizer, self.clip.stage.config.model.text.context - 2
        for name, model in {"the prior": self.prior, "the decoder": self.decoder}.items():
            if model and "tokens" in model.stage.texts:
                limits[name] = model.tokenizer, model.stage.texts["tokens"][1]
        for text in texts:
            if not text.strip():
                raise UserError("the prompt is empty: say what to draw")
            for name, (tokenizer, limit) in limits.items():
                count = tokenizer.count(text)
                if count > limit:
                    raise UserError(f"the prompt {text[:40]!r}… has {count} tokens: {name} reads {limit}; shorten it")

    def _squares(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """The squares in the middle of pictures, at the decoder's size."""
        size = self.decoder.stage.config.model.image_size
        return np.stack([center_square(picture, size, "area") for picture in pictures])

    def _sampled_by(self, model: Model, **sampling) -> Model:
        """The model with `sampling` changed; the same object every time, so that it compiles once."""
        key = id(model), *sampling.items()
        if key not in self._variants:
            config = model.stage.config.copy_and_resolve_references().unlock()
            config.sampling.update(sampling)
            stage = dataclasses.replace(model.stage, config=config.lock())
            self._variants[key] = dataclasses.replace(model, stage=stage)
        return self._variants[key]

    def _check_prior(self):
        if self.clip and not self.prior:
            raise UserError("this cascade has no prior/: it draws pictures for image embeddings, not for captions")

    def _decode(self, embeddings, texts, key, guidance_scale, more=None, model=None):
        model = model or self.decoder
        conditions = self._captions(model, texts) | (more or {})
        if embeddings is not None:
            conditions["image_embedding"] = embeddings
        return self._draw(model, conditions, key, guidance_scale)

    def _upsample(self, images, texts, key, known=lambda size: {}):
        sizes = []
        for i, model in enumerate(self.upsamplers):
            images = np.clip(images, -1, 1)
            if model.stage.config.model.round_low_res:
                images = _to_float(_to_uint8(images))
            conditions = self._captions(model, texts) | {"low_res": images}
            conditions |= known(images.shape[1] * model.stage.config.model.factor)
            images = self._draw(model, conditions, jax.random.fold_in(key, i), None)
            sizes.append(images)
        return sizes

    def _captions(self, model: Model, texts: list[str]) -> dict[str, np.ndarray]:
        """The texts in every form of tokens that the model's stage reads."""
        arrays = {}
        for name, (whose, context, ends) in model.stage.texts.items():
            tokenizer = (model if whose == "own" else self.clip).tokenizer
            arrays[name], arrays[f"{name}_length"] = tokenizer.encode(texts, context, ends)
        return arrays

    def _draw(self, model: Model, conditions: dict[str, np.ndarray], key, guidance_scale: float | None):
        """What the model draws, a row for each row of the conditions; single numbers among them go to all rows."""
        scalars = {name: value for name, value in conditions.items() if not np.ndim(value)}
        arrays = {name: value for name, value in conditions.items() if np.ndim(value)}
        if "guidance_scale" in model.stage.config.sampling:
            scale = model.stage.config.sampling.guidance_scale if guidance_scale is None else guidance_scale
            scalars["guidance_scale"] = jnp.float32(scale)
        frozen, drawn = self.clip.params if model.stage.needs_clip else {}, []
        for i, rows in enumerate(_chunks(*arrays.values())):
            chunk = dict(zip(arrays, rows, strict=True)) | scalars
            drawn.append(np.asarray(model.sample(model.params, frozen, chunk, jax.random.fold_in(key, i))))
        return np.concatenate(drawn)[: len(next(iter(arrays.values())))]


def slerp(a: np.ndarray, b: np.ndarray, theta: float) -> np.ndarray:
    """From a (theta 0) to b (theta 1) on the arc between them; arrays of one shape, taken as vectors."""
    cosine = np.sum(a * b) / (np.linalg.norm(a) * np.linalg.norm(b))
    angle = np.arccos(np.clip(cosine, -1, 1))
    if np.sin(angle) < 1e-6:
        return (1 - theta) * a + theta * b
    return (np.sin((1 - theta) * angle) * a + np.sin(theta * angle) * b) / np.sin(angle)


def _load(folder: Path, stages: tuple[str, ...], clip: Model | None) -> Model:
    bundle = load_bundle(str(folder))
    if bundle.stage not in stages:
        raise UserError(f"{folder} holds a model of stage {bundle.stage!r}: expected {' or '.join(stages)}")
    if bundle.clip_identity and bundle.clip_identity != clip.identity:
        raise UserError(f"{folder} was trained against another CLIP than the one beside it: use the CLIP it knows")
    stage = make_stage(bundle.config, clip.stage if clip else None)
    check_params(bundle.params, jax.eval_shape(stage.init, jax.random.key(0)))
    tokenizer = Tokenizer(bundle.tokenizer_bytes) if bundle.tokenizer_bytes else None
    return Model(stage, jax.device_put(bundle.params), tokenizer, bundle.identity)


def _to_uint8(images: np.ndarray) -> np.ndarray:
    return np.clip(np.rint((images + 1) * 127.5), 0, 255).astype(np.uint8)


def _to_float(images: np.ndarray) -> np.ndarray:
    return images.astype(np.float32) / 127.5 - 1


def _chunks(*arrays):
    """Rows in chunks of ROWS (fewer where there are fewer in all), the last filled up with its own first row."""
    count = len(arrays[0])
    size = min(count, ROWS)
    for start in range(0, count, size):
        parts = [np.asarray(a[start : start + size]) for a in arrays]
        fill = size - len(parts[0])
        yield [np.concatenate([p, np.repeat(p[:1], fill, axis=0)]) if fill else p for p in parts]
