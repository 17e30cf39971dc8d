"""The whole system: draws pictures for captions, and edits pictures, with a folder of trained models (see chain.py)."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from unclip_jax.chain import Chain, Drawn
from unclip_jax.data.transforms import center_square
from unclip_jax.errors import UserError
from unclip_jax.evaluation.features import unit
from unclip_jax.evaluation.zero_shot import class_embeddings
from unclip_jax.keys import RowKeys, seed_key
from unclip_jax.model import Model
from unclip_jax.pictures import to_float, to_uint8

STEPS = 250  # of DDIM, to and fro: what reproduces a picture (arXiv 2105.05233, appendix F)


def ddim_to_and_fro(steps: int, timesteps: int) -> dict[str, Any]:
    """Settings of sampling by which DDIM runs up from a picture to its x_T and down again.

    Nothing is clipped, which would lose what the way up has found. The noisiest step is left out, as in the paper's
    "first 249" of 250: there, x0 follows from eps by a division by sqrt(alpha_bar), which makes an error in eps 126
    times as large.
    """
    if not isinstance(steps, int | np.integer) or not 3 <= steps <= timesteps:
        raise UserError(f"{steps} steps of DDIM: expected 3 to {timesteps}, those of the model's chain")
    return {"sampler": "ddim", "clip_x0": 0.0, "steps": f"{steps - 1}/{steps}"}


class Cascade(Chain):
    """Pictures for captions, and edits of pictures. Pictures are uint8 (N, H, W, 3)."""

    def generate(
        self,
        texts: list[str],
        seed: int,
        guidance_scale: float | None = None,
        prior_guidance_scale: float | None = None,
        clip_guidance_scale: float = 0.0,
        embeddings: np.ndarray | None = None,
        rows: Sequence[int] | None = None,
        draws: Sequence[int] | None = None,
        source: str | None = None,
    ) -> Drawn:
        """Draws one picture per caption.

        A picture depends on its caption, the seed, and its numbers in `rows` (default: 0, 1, …) and `draws` (0), in
        any company: the k-th picture of a caption may have draws[i] = k.

        Guidance scales: of the decoder and of the prior, None being the trained config's; clip_guidance_scale is how
        far the noised CLIP's gradient is followed (GLIDE, section 2.4), 0 not at all. embeddings: image embeddings
        (N, dim) in place of the prior's. source: what the decoder is given where there are none: "prior", the prior's;
        "text", those of the captions; "caption", none; by default that which it was trained for.
        """
        scales = guidance_scale, prior_guidance_scale, clip_guidance_scale
        return self._generate(texts, seed, *scales, embeddings, source, rows=rows, draws=draws)

    def encode(self, pictures: Sequence[np.ndarray], steps: int = STEPS) -> tuple[np.ndarray, np.ndarray]:
        """Encodes pictures in the two parts that the decoder draws them from: the CLIP embedding (N, dim) and, by DDIM
        inversion, x_T (N, R, R, 3)."""
        model = self._to_and_fro(steps)
        embeddings = self.image_embeddings(pictures)
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
        inverted: bool = True,
    ) -> Drawn:
        """Draws pictures from embeddings (N, dim) and x_T (N, R, R, 3) by DDIM. eta 0 adds no noise, so that `encode`d
        pictures come out as they were.

        inverted: False where x_T is noise that `encode` has not found. There is then nothing to be lost by clipping x0
        as the config says, which keeps errors of eps at the noisiest steps from being drawn.
        """
        model = self._to_and_fro(steps)
        if not inverted:
            model = model.sampled_by(clip_x0=self.decoder.stage.config.sampling.clip_x0)
        conditions = self._captions(model, [""] * len(embeddings))
        conditions = conditions._replace(image_embedding=embeddings, x_T=x_T, eta=np.float32(eta))
        key_decoder, key_upsampler = RowKeys.of(seed_key(seed), len(embeddings)).split(2)
        small = self._draw("decoder", model, conditions, key_decoder, guidance_scale)
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
            noise = np.repeat(jax.random.normal(seed_key(seed), x_T[:1].shape), count, axis=0)
        return self.redraw(np.stack(path), noise, seed, inverted=inverted, **options)

    def text_diff(
        self, picture: np.ndarray, before: str, after: str, theta: float, count: int, seed: int, **options: Any
    ) -> Drawn:
        """Draws `count` pictures on the way from a picture to one changed as caption `before` is to `after`: embeddings
        by slerp to the normalised difference of the text embeddings, from 0 to `theta` of the way (section 3.3).

        before: "" where there is none, as in the paper. Raises UserError where the two are the same to the CLIP.
        """
        source, target = self.text_embeddings([before, after])
        distance = np.linalg.norm(target - source)
        if distance < 1e-4 * np.linalg.norm(source):
            raise UserError(f"{before!r} and {after!r} are the same to this CLIP: say how the picture is to change")
        embeddings, x_T = self.encode([picture], options.get("steps", STEPS))
        direction = (target - source) / distance * np.linalg.norm(embeddings[0])
        path = [slerp(embeddings[0], direction, share) for share in np.linspace(0, theta, count)]
        return self.redraw(np.stack(path), np.repeat(x_T, count, axis=0), seed, **options)

    def reconstructions(
        self, picture: np.ndarray, statistics: dict[str, np.ndarray], counts: Sequence[int], seed: int, **options: Any
    ) -> Drawn:
        """Draws a picture again for each of `counts`, from that many principal components of its CLIP embedding
        (section 4.2, figure 7), all from one draw of noise.

        statistics: "mean" (dim,) and "components" (N, dim), as an autoregressive prior holds them and
        `codes.principal_components` finds them. Raises UserError for a count that is not from 0 to N.
        """
        mean, components = statistics["mean"], statistics["components"]
        for count in counts:
            if not 0 <= count <= len(components):
                raise UserError(f"{count} principal components: expected 0 to {len(components)}, which are known")
        kept = components @ (self.image_embeddings([picture])[0] - mean)
        rows = np.stack([mean + kept[:count] @ components[:count] for count in counts])
        if self.clip.stage.config.model.unit_norm:
            rows = unit(rows)
        size = self.decoder.stage.config.model.image_size
        noise = np.asarray(jax.random.normal(seed_key(seed), (1, size, size, 3)))
        return self.redraw(rows, np.repeat(noise, len(rows), axis=0), seed, inverted=False, **options)

    def inpaint(
        self,
        picture: np.ndarray,
        mask: np.ndarray,
        text: str,
        count: int,
        seed: int,
        implicit: bool = False,
        **options: Any,
    ) -> Drawn:
        """Draws `count` pictures for a caption that change `picture` only where `mask`, bool (H, W), is True.

        A model that was trained to inpaint takes the known pixels as input; others have them put back after every
        step, and so has every model where `implicit` (GLIDE, section 4.3). In the result, at every size, they equal
        those of `picture` bit for bit. options: of `generate`. Raises UserError for a mask of another size than the
        picture, or that marks all or nothing of the square in its middle.
        """
        check_mask(mask, picture)

        def known(size: int) -> dict[str, np.ndarray]:
            kept = ~scaled_mask(mask, size)[..., None]
            source = to_float(center_square(picture, size, "area"))
            return {"known_image": np.stack([source] * count), "known": np.stack([kept] * count)}

        chain = self._implicit() if implicit else self
        drawn = chain._generate([text] * count, seed, known=known, **options)
        for i, images in enumerate(drawn["images"]):
            there = known(images.shape[1])
            drawn["images"][i] = np.where(there["known"], to_uint8(there["known_image"]), images)
        return drawn

    def sdedit(
        self, sketches: Sequence[np.ndarray], texts: list[str], start: float, seed: int, **options: Any
    ) -> Drawn:
        """Draws a picture for each caption that keeps the layout of its sketch (SDEdit, arXiv 2108.01073).

        start: share of the chain of noise that sketches go through first, from 0 to 1; 0.3 to 0.6 is usual. Drawing
        takes the steps from there on. options: of `generate`.
        """
        decoder = self.decoder.sampled_by(start=start)
        return self._generate(texts, seed, decoder=decoder, sketch=to_float(self._squares(sketches)), **options)

    def similarity(self, images: Sequence[np.ndarray], texts: list[str]) -> np.ndarray:
        """Computes the cosines of CLIP embeddings: (pictures, texts)."""
        both = self.image_embeddings(images), self.text_embeddings(texts)
        pictures, captions = (unit(z) for z in both)
        return pictures @ captions.T

    def classify(self, picture: np.ndarray, labels: list[str], templates: Sequence[str] = ("{}",)) -> np.ndarray:
        """Computes CLIP's probability of each label for a picture (zero-shot classification): (labels,).

        templates: captions with {} for the label, such as "a photo of a {}."; the embeddings of a label's captions are
        averaged (arXiv 2103.00020, section 3.1.4). Raises UserError for labels that the CLIP cannot tell apart.
        """
        z_t = class_embeddings(self.text_embeddings, labels, templates)
        similarity = (unit(self.image_embeddings([picture])) @ z_t.T)[0]
        logits = np.exp(self.clip.params["logit_scale"]) * similarity
        weights = np.exp(logits - logits.max())
        return weights / weights.sum()

    def _to_and_fro(self, steps: int) -> Model:
        """Sets the decoder to DDIM up and down. Raises UserError for a number of steps that its chain has not, and for
        a decoder that learned embeddings of captions, to which those of pictures say nothing."""
        if self.clip and self.decoder.stage.config.model.embedding == "text":
            raise UserError("this decoder learned embeddings of captions: edits need one of pictures' embeddings")
        return self.decoder.sampled_by(**ddim_to_and_fro(steps, self.decoder.stage.config.diffusion.timesteps))

    def _implicit(self) -> "Cascade":
        """Makes a cascade of the same models that tells none of them which pixels are known."""
        decoder, *upsamplers = [model.sampled_by(implicit=True) for model in (self.decoder, *self.upsamplers)]
        return Cascade(self.clip, self.prior, decoder, upsamplers, self.noised_clip)

    def _squares(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Crops the squares in the middle of pictures, at the decoder's size: uint8 (N, R, R, 3)."""
        size = self.decoder.stage.config.model.image_size
        return np.stack([center_square(picture, size, "area") for picture in pictures])


def check_mask(mask: np.ndarray, picture: np.ndarray) -> None:
    """Raises UserError for a mask, bool (H, W), that is not of the picture's size, marks all or nothing of the square
    in its middle, or anything beside that."""
    if mask.shape != picture.shape[:2]:
        sizes = [f"{shape[1]}x{shape[0]}" for shape in (mask.shape, picture.shape)]
        raise UserError(f"the mask is {sizes[0]} pixels, the picture {sizes[1]}: make them the same")
    square = scaled_mask(mask, min(mask.shape))
    if square.all() or not square.any():
        marked = "all" if square.all() else "nothing"
        raise UserError(f"the mask marks {marked} of the square in the picture's middle: mark a part of it")
    side = min(mask.shape)
    top, left = ((length - side) // 2 for length in mask.shape)
    if mask.sum() > mask[top : top + side, left : left + side].sum():
        raise UserError("the mask marks pixels beside the square in the picture's middle, which alone a model sees: "
                        "crop picture and mask to a square that holds what is to be drawn")  # fmt: skip


def scaled_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """Crops the square in the middle of a mask, bool (H, W), at a size: (size, size), True where any part was."""
    return center_square(np.repeat(np.uint8(255) * mask[..., None], 3, axis=-1), size, "area")[..., 0] > 0


def slerp(a: np.ndarray, b: np.ndarray, theta: float) -> np.ndarray:
    """Interpolates from a (theta 0) to b (theta 1) on the arc between them; arrays of one shape, taken as vectors."""
    cosine = np.sum(a * b) / (np.linalg.norm(a) * np.linalg.norm(b))
    angle = np.arccos(np.clip(cosine, -1, 1))
    if np.sin(angle) < 1e-6:
        return (1 - theta) * a + theta * b
    return (np.sin((1 - theta) * angle) * a + np.sin(theta * angle) * b) / np.sin(angle)
