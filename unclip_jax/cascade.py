"""Trained stages chained: caption → prior → decoder → upsamplers (unCLIP, arXiv 2204.06125, figure 2; GLIDE's chain,
2112.10741, is caption → decoder → upsampler).

A cascade is a folder of bundles: decoder/, beside it clip/ and prior/ where the decoder draws CLIP embeddings, and, if
they are there, upsampler_256/, upsampler_1024/ and, to guide the decoder, noised_clip/. Each arrow is one jitted
function of arrays; guidance scales and keys are arguments, so no choice of them compiles anew.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict

import jax
import numpy as np

from unclip_jax.arrays import Key
from unclip_jax.bundle import load_description
from unclip_jax.data.transforms import center_square
from unclip_jax.errors import UserError
from unclip_jax.model import Model
from unclip_jax.paths import to_path
from unclip_jax.pictures import to_float, to_uint8
from unclip_jax.stages.conditions import Conditions

UPSAMPLERS = ("upsampler_256", "upsampler_1024")
PRIORS = ("prior_diffusion", "prior_ar")
DDIM = {"sampler": "ddim", "clip_x0": 0.0}  # clipping would not let it run to and fro
STEPS = 250  # of DDIM, to and fro: what reproduces a picture (arXiv 2105.05233, appendix F)


class Drawn(TypedDict):
    """Result of drawing N pictures."""

    embeddings: np.ndarray | None  # CLIP image embeddings (N, dim) they were drawn from; None from GLIDE
    images: list[np.ndarray]  # uint8 (N, H, W, 3): the decoder's first, the largest last


class Cascade:
    """The whole system. Pictures are uint8 (N, H, W, 3), embeddings float32 (N, dim) of unit norm where the CLIP's are.

    A cascade without a prior draws pictures for embeddings alone, one without a CLIP for captions alone.
    """

    def __init__(
        self,
        clip: Model | None,
        prior: Model | None,
        decoder: Model,
        upsamplers: list[Model],
        noised_clip: Model | None = None,
    ):
        self.clip, self.prior, self.decoder, self.upsamplers = clip, prior, decoder, upsamplers
        self.noised_clip = noised_clip

    @classmethod
    def load(cls, folder: str) -> "Cascade":
        """Reads a folder of bundles, on a disk or gs://...

        Raises UserError for what is missing or does not belong together.
        """
        root = to_path(folder)
        if not root.is_dir():
            raise UserError(f"no bundle at {root}: expected a folder with decoder/ and what it needs")
        clip = prior = noised_clip = None
        if load_description(root / "decoder")["stage"] == "decoder":
            clip = Model.load(root / "clip", ("clip",))
            prior = Model.load(root / "prior", PRIORS, clip) if (root / "prior").exists() else None
        decoder = Model.load(root / "decoder", ("decoder", "glide"), clip)
        if (root / "noised_clip").exists():
            noised_clip = Model.load(root / "noised_clip", ("clip",))
            _check_noised_clip(root, noised_clip, decoder)
        upsamplers = [root / name for name in UPSAMPLERS if (root / name).exists()]
        upsamplers = [Model.load(path, ("upsampler", "glide"), clip) for path in upsamplers]
        return cls(clip, prior, decoder, upsamplers, noised_clip)

    def text_embeddings(self, texts: list[str]) -> np.ndarray:
        """CLIP text embeddings (N, dim)."""
        return self.clip.embed_texts(texts)

    def image_embeddings(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """CLIP image embeddings (N, dim) of the squares in the middle of pictures, uint8 (H, W, 3) of any size.

        Raises UserError where the CLIP is a text tower alone.
        """
        m = self.clip.stage.config.model
        if not m.image:
            raise UserError("this cascade's CLIP reads captions alone: pictures need one that has its image tower too")
        return self.clip.embed_images(np.stack([center_square(image, m.image_size, m.resize) for image in images]))

    def embeddings(self, texts: list[str], key: Key, guidance_scale: float | None = None) -> np.ndarray:
        """Draws image embeddings (N, dim) for captions by the prior. guidance_scale: None is the trained config's."""
        self._check_prior()
        conditions = self._captions(self.prior, texts)._replace(text_embedding=self.text_embeddings(texts))
        return self._draw(self.prior, conditions, key, guidance_scale)

    def decode(
        self, embeddings: np.ndarray | None, texts: list[str], key: Key, guidance_scale: float | None = None
    ) -> np.ndarray:
        """Draws the decoder's pictures for image embeddings (None: GLIDE takes none) and captions ("" for none)."""
        return to_uint8(self._decode(embeddings, texts, key, guidance_scale))

    def upsample(self, images: np.ndarray, texts: list[str], key: Key) -> list[np.ndarray]:
        """Enlarges pictures by each upsampler in turn; gives them after each. texts: read by GLIDE's alone."""
        return [to_uint8(larger) for larger in self._upsample(to_float(images), texts, key)]

    def generate(
        self,
        texts: list[str],
        seed: int,
        guidance_scale: float | None = None,
        prior_guidance_scale: float | None = None,
        clip_guidance_scale: float = 0.0,
        embeddings: np.ndarray | None = None,
    ) -> Drawn:
        """Draws one picture per caption.

        Guidance scales: of the decoder and of the prior, None being the trained config's; clip_guidance_scale is how
        far the noised CLIP's gradient is followed (GLIDE, section 2.4), 0 not at all. embeddings: image embeddings
        (N, dim) in place of the prior's.
        """
        return self._generate(texts, seed, guidance_scale, prior_guidance_scale, clip_guidance_scale, embeddings)

    def encode(self, pictures: Sequence[np.ndarray], steps: int = STEPS) -> tuple[np.ndarray, np.ndarray]:
        """Encodes pictures in the two parts that the decoder draws them from: the CLIP embedding (N, dim) and, by DDIM
        inversion, x_T (N, R, R, 3)."""
        embeddings = self.image_embeddings(pictures)
        model = self.decoder.sampled_by(**DDIM, steps=str(steps))
        conditions = self._captions(model, [""] * len(pictures))._replace(image_embedding=embeddings)
        return embeddings, model.invert(self.clip.params, conditions, to_float(self._squares(pictures)))

    def redraw(
        self,
        embeddings: np.ndarray,
        x_T: np.ndarray,
        seed: int,
        eta: float = 0.0,
        steps: int = STEPS,
        guidance_scale: float = 1.0,
    ) -> Drawn:
        """Draws pictures from embeddings (N, dim) and x_T (N, R, R, 3) by DDIM. eta 0 adds no noise, so that `encode`d
        pictures come out as they were."""
        model = self.decoder.sampled_by(**DDIM, steps=str(steps))
        conditions = self._captions(model, [""] * len(embeddings))
        conditions = conditions._replace(image_embedding=embeddings, x_T=x_T, eta=np.float32(eta))
        key_decoder, key_upsampler = jax.random.split(jax.random.key(seed))
        small = self._draw(model, conditions, key_decoder, guidance_scale)
        larger = self._upsample(small, [""] * len(small), key_upsampler)
        return {"embeddings": embeddings, "images": [to_uint8(images) for images in (small, *larger)]}

    def variations(self, picture: np.ndarray, count: int, eta: float, seed: int, **options: Any) -> Drawn:
        """Draws `count` variations of a picture, which share its CLIP embedding (unCLIP, section 3.1). eta 0 reproduces
        it, 1 keeps its meaning alone.

        options: of `redraw`, here and below.
        """
        embeddings, x_T = self.encode([picture], options.get("steps", STEPS))
        rows = [np.repeat(half, count, axis=0) for half in (embeddings, x_T)]
        return self.redraw(*rows, seed, eta=eta, **options)

    def interpolate(
        self, first: np.ndarray, second: np.ndarray, count: int, seed: int, inverted: bool = True, **options: Any
    ) -> Drawn:
        """Draws `count` pictures on the way from one to the other, embeddings by slerp (section 3.2).

        inverted: x_T goes from the one's to the other's too, so that both ends are reproduced; else one draw of noise
        serves all.
        """
        embeddings, x_T = self.encode([first, second], options.get("steps", STEPS))
        path = [slerp(*embeddings, theta) for theta in np.linspace(0, 1, count)]
        if inverted:
            noise = np.stack([slerp(*x_T, theta) for theta in np.linspace(0, 1, count)])
        else:
            noise = np.repeat(jax.random.normal(jax.random.key(seed), x_T[:1].shape), count, axis=0)
        return self.redraw(np.stack(path), noise, seed, **options)

    def text_diff(
        self, picture: np.ndarray, before: str, after: str, theta: float, count: int, seed: int, **options: Any
    ) -> Drawn:
        """Draws `count` pictures on the way from a picture to one changed as caption `before` is to `after`: embeddings
        by slerp to the normalised difference of the text embeddings, from 0 to `theta` of the way (section 3.3)."""
        embeddings, x_T = self.encode([picture], options.get("steps", STEPS))
        source, target = self.text_embeddings([before, after])
        direction = (target - source) / np.linalg.norm(target - source) * np.linalg.norm(embeddings[0])
        path = [slerp(embeddings[0], direction, share) for share in np.linspace(0, theta, count)]
        return self.redraw(np.stack(path), np.repeat(x_T, count, axis=0), seed, **options)

    def reconstructions(
        self, picture: np.ndarray, statistics: dict[str, np.ndarray], counts: Sequence[int], seed: int, **options: Any
    ) -> Drawn:
        """Draws a picture again for each of `counts`, from that many principal components of its CLIP embedding
        (section 4.2, figure 7), all from one draw of noise.

        statistics: "mean" (dim,) and "components" (N, dim), as an autoregressive prior holds them. Raises UserError
        for a count that is not from 0 to N.
        """
        mean, components = statistics["mean"], statistics["components"]
        for count in counts:
            if not 0 <= count <= len(components):
                raise UserError(f"{count} principal components: expected 0 to {len(components)}, which are known")
        kept = components @ (self.image_embeddings([picture])[0] - mean)
        rows = np.stack([mean + kept[:count] @ components[:count] for count in counts])
        if self.clip.stage.config.model.unit_norm:
            rows = _unit(rows)
        size = self.decoder.stage.config.model.image_size
        noise = np.asarray(jax.random.normal(jax.random.key(seed), (1, size, size, 3)))
        return self.redraw(rows, np.repeat(noise, len(rows), axis=0), seed, **options)

    def inpaint(
        self, picture: np.ndarray, mask: np.ndarray, text: str, count: int, seed: int, **options: Any
    ) -> Drawn:
        """Draws `count` pictures for a caption that change `picture` only where `mask`, bool (H, W), is True.

        A model that was trained to inpaint takes the known pixels as input; others have them put back after every
        step. In the result, at every size, they equal those of `picture` bit for bit. options: of `generate`. Raises
        UserError for a mask of another size than the picture, or that marks all or nothing.
        """
        if mask.shape != picture.shape[:2]:
            sizes = [f"{shape[1]}x{shape[0]}" for shape in (mask.shape, picture.shape)]
            raise UserError(f"the mask is {sizes[0]} pixels, the picture {sizes[1]}: make them the same")
        if mask.all() or not mask.any():
            raise UserError(f"the mask marks {'all' if mask.all() else 'nothing'} of the picture: mark a part of it")
        marked = np.repeat(np.uint8(255) * mask[..., None], 3, axis=-1)

        def known(size: int) -> dict[str, np.ndarray]:
            """Pixels that are kept at a size: those of which no part is marked."""
            kept = center_square(marked, size, "area")[..., :1] == 0
            source = to_float(center_square(picture, size, "area"))
            return {"known_image": np.stack([source] * count), "known": np.stack([kept] * count)}

        drawn = self._generate([text] * count, seed, known=known, **options)
        for i, images in enumerate(drawn["images"]):
            there = known(images.shape[1])
            drawn["images"][i] = np.where(there["known"], to_uint8(there["known_image"]), images)
        return drawn

    def sdedit(
        self, sketch: np.ndarray, text: str, start: float, count: int, seed: int, **options: Any
    ) -> Drawn:
        """Draws `count` pictures for a caption that keep the layout of a sketch (SDEdit, arXiv 2108.01073).

        start: share of the steps that the sketch is noised by first, from 0 to 1; 0.3 to 0.6 is usual. options: of
        `generate`.
        """
        rows = np.repeat(to_float(self._squares([sketch])), count, axis=0)
        decoder = self.decoder.sampled_by(start=start)
        return self._generate([text] * count, seed, decoder=decoder, sketch=rows, **options)

    def similarity(self, images: Sequence[np.ndarray], texts: list[str]) -> np.ndarray:
        """Computes the cosines of CLIP embeddings: (pictures, texts)."""
        both = self.image_embeddings(images), self.text_embeddings(texts)
        pictures, captions = (_unit(z) for z in both)
        return pictures @ captions.T

    def classify(self, picture: np.ndarray, labels: list[str]) -> np.ndarray:
        """Computes CLIP's probability of each label for a picture (zero-shot classification): (labels,)."""
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
        """Crops the squares in the middle of pictures, at the decoder's size: uint8 (N, R, R, 3)."""
        size = self.decoder.stage.config.model.image_size
        return np.stack([center_square(picture, size, "area") for picture in pictures])

    def _check_prior(self) -> None:
        if self.clip and not self.prior:
            raise UserError("this cascade has no prior/: it draws pictures for image embeddings, not for captions")

    def _generate(
        self,
        texts: list[str],
        seed: int,
        guidance_scale: float | None = None,
        prior_guidance_scale: float | None = None,
        clip_guidance_scale: float = 0.0,
        embeddings: np.ndarray | None = None,
        decoder: Model | None = None,
        sketch: np.ndarray | None = None,
        known: Callable[[int], dict[str, np.ndarray]] = lambda size: {},
    ) -> Drawn:
        """Implements `generate`; may replace the decoder, start it from a sketch, and keep known pixels.

        known: side of a picture → its fields `known_image` and `known` of `Conditions`, at that size.
        """
        if clip_guidance_scale and not self.noised_clip:
            raise UserError("CLIP guidance needs a noised CLIP: put its bundle into the cascade, as noised_clip/")
        key_prior, key_decoder, key_upsampler = jax.random.split(jax.random.key(seed), 3)
        if embeddings is None and self.clip:
            embeddings = self.embeddings(texts, key_prior, prior_guidance_scale)
        fields = {"sketch": sketch} | known(self.decoder.stage.config.model.image_size)
        small = self._decode(embeddings, texts, key_decoder, guidance_scale, clip_guidance_scale, decoder, fields)
        larger = self._upsample(small, texts, key_upsampler, known)
        return {"embeddings": embeddings, "images": [to_uint8(images) for images in (small, *larger)]}

    def _decode(
        self,
        embeddings: np.ndarray | None,
        texts: list[str],
        key: Key,
        guidance_scale: float | None,
        clip_guidance_scale: float = 0.0,
        decoder: Model | None = None,
        fields: dict[str, Any] | None = None,
    ) -> np.ndarray:
        """Draws the decoder's pictures, float32. fields: more of its conditions."""
        model = decoder or self.decoder
        conditions = self._captions(model, texts)._replace(image_embedding=embeddings, **(fields or {}))
        if not clip_guidance_scale:
            return self._draw(model, conditions, key, guidance_scale)
        conditions = conditions._replace(clip_scale=np.float32(clip_guidance_scale))
        noised_text = _unit(self.noised_clip.embed_texts(texts))
        return self._draw(model, conditions, key, guidance_scale, self.noised_clip, noised_text)

    def _upsample(
        self,
        images: np.ndarray,
        texts: list[str],
        key: Key,
        known: Callable[[int], dict[str, np.ndarray]] = lambda size: {},
    ) -> list[np.ndarray]:
        """Enlarges float32 pictures by each upsampler in turn. known: as in `_generate`."""
        sizes = []
        for i, model in enumerate(self.upsamplers):
            images = np.clip(images, -1, 1)
            if model.stage.config.model.round_low_res:
                images = to_float(to_uint8(images))
            fields = known(images.shape[1] * model.stage.config.model.factor)
            conditions = self._captions(model, texts)._replace(low_res=images, **fields)
            images = self._draw(model, conditions, jax.random.fold_in(key, i), None)
            sizes.append(images)
        return sizes

    def _captions(self, model: Model, texts: list[str]) -> Conditions:
        """Encodes texts in every form of tokens that the model's stage reads."""
        arrays = {}
        for name, (whose, context, ends) in model.stage.texts.items():
            tokenizer = (model if whose == "own" else self.clip).tokenizer
            arrays[name], arrays[f"{name}_length"] = tokenizer.encode(texts, context, ends)
        return Conditions(**arrays)

    def _draw(
        self,
        model: Model,
        conditions: Conditions,
        key: Key,
        guidance_scale: float | None,
        noised_clip: Model | None = None,
        noised_text: np.ndarray | None = None,
    ) -> np.ndarray:
        """Draws by a model, guided where it can be; guidance_scale None is its config's. Rest: of `Model.draw`."""
        sampling = model.stage.config.sampling
        if "guidance_scale" in sampling:
            scale = sampling.guidance_scale if guidance_scale is None else guidance_scale
            conditions = conditions._replace(guidance_scale=np.float32(scale))
        frozen = self.clip.params if model.stage.needs_clip else {}
        return model.draw(frozen, conditions, key, noised_clip, noised_text)


def slerp(a: np.ndarray, b: np.ndarray, theta: float) -> np.ndarray:
    """Interpolates from a (theta 0) to b (theta 1) on the arc between them; arrays of one shape, taken as vectors."""
    cosine = np.sum(a * b) / (np.linalg.norm(a) * np.linalg.norm(b))
    angle = np.arccos(np.clip(cosine, -1, 1))
    if np.sin(angle) < 1e-6:
        return (1 - theta) * a + theta * b
    return (np.sin((1 - theta) * angle) * a + np.sin(theta * angle) * b) / np.sin(angle)


def _check_noised_clip(root: Path, noised_clip: Model, decoder: Model) -> None:
    m, d = noised_clip.stage.config.model, decoder.stage.config
    theirs, ours = (m.image_size, m.image.timesteps if m.image else 0), (d.model.image_size, d.diffusion.timesteps)
    if theirs != ours:
        raise UserError(f"{root}/noised_clip sees {theirs[0]} px at {theirs[1]} timesteps, the decoder draws {ours[0]} "
                        f"px at {ours[1]}: it must be trained for the decoder")  # fmt: skip


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)
