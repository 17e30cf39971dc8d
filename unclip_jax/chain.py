"""Trained stages chained: caption → prior → decoder → upsamplers (unCLIP, arXiv 2204.06125, figure 2; GLIDE's chain,
2112.10741, is caption → decoder → upsampler). The decoder may be given less than a prior's draw: see `Chain.source`.

A cascade is a folder of bundles: decoder/, beside it clip/ and prior/ where the decoder draws CLIP embeddings, and, if
they are there, upsampler_256/, upsampler_1024/ and, to guide the decoder, noised_clip/, which may hold a CLIP that saw
no noise too. Each arrow is one jitted function of arrays; guidance scales and keys are arguments, so no choice of them
compiles anew.
"""

import functools
import itertools
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypedDict

import jax
import numpy as np

from unclip_jax.arrays import Key
from unclip_jax.bundle import CONFIG, load_description
from unclip_jax.config_checks import check_sampling
from unclip_jax.data.transforms import center_square
from unclip_jax.errors import UserError
from unclip_jax.evaluation.features import unit
from unclip_jax.keys import RowKeys, seed_key
from unclip_jax.model import Model
from unclip_jax.paths import SHIPPED, to_path
from unclip_jax.pictures import to_float, to_uint8
from unclip_jax.stages.conditions import Conditions
from unclip_jax.watching import Watch

BYTES = 5  # of a colour of a pixel, as a float and as it is stored
UPSAMPLERS = ("upsampler_256", "upsampler_1024")
PRIORS = ("prior_diffusion", "prior_ar")
SOURCES = ("prior", "text", "caption")  # of what a decoder draws from


class Drawn(TypedDict):
    """Result of drawing N pictures."""

    embeddings: np.ndarray | None  # CLIP embeddings (N, dim) they were drawn from; None: of captions alone
    images: list[np.ndarray]  # uint8 (N, H, W, 3): the decoder's first, the largest last


class Chain:
    """The models of a cascade, from captions to pictures. Pictures are uint8 (N, H, W, 3), embeddings float32 (N, dim)
    of unit norm where the CLIP's are.

    A cascade without a prior draws pictures for given embeddings or by another `source`, one without a CLIP for
    captions alone. watch: looks on while it draws.
    """

    watch = Watch()

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
    def load(cls, folder: str = SHIPPED, devices: Sequence[jax.Device] | None = None, fsdp: int = 1) -> Self:
        """Reads a folder of bundles, on a disk or gs://...; by default those that come with this package. A GLIDE's own
        bundle is a cascade too, of that model alone.

        devices: which of this process's rows are split over; None: all rows are on the first. fsdp: so many of them, a
        divisor of their number, share one copy of each model's parameters, for models that do not fit one. Raises
        UserError for what is missing or does not belong together.
        """
        root = to_path(folder)
        if not root.is_dir():
            raise UserError(f"no bundle at {root}: expected a folder with decoder/ and what it needs")
        clip = prior = noised_clip = None
        load = functools.partial(Model.load, devices=devices, fsdp=fsdp)
        alone = (root / CONFIG).exists()
        drawing = root if alone else root / "decoder"
        stage = load_description(drawing)["stage"]
        if alone and stage != "glide":
            raise UserError(f"{root} is one model, of stage {stage!r}: expected a folder with decoder/ and what it "
                            "needs")  # fmt: skip
        if stage == "decoder":
            clip = load(root / "clip", ("clip",))
            prior = load(root / "prior", PRIORS, clip) if (root / "prior").exists() else None
        decoder = load(drawing, ("decoder", "glide"), clip)
        if (root / "noised_clip").exists():
            noised_clip = load(root / "noised_clip", ("clip",))
            _check_noised_clip(root, noised_clip, decoder)
        upsamplers = [root / name for name in UPSAMPLERS if (root / name).exists()]
        upsamplers = [load(path, ("upsampler", "glide"), clip) for path in upsamplers]
        return cls(clip, prior, decoder, upsamplers, noised_clip)

    def sampled_by(self, decoder: Mapping[str, Any], prior: Mapping[str, Any]) -> Self:
        """Makes a cascade of the same models, of which decoder and prior have these values in their section `sampling`.

        Raises UserError for a key that the model does not have, and for a value that does not suit it.
        """
        if prior and not self.prior:
            raise UserError("this cascade has no prior/ that could be sampled otherwise")
        changed = _sampled("decoder", self.decoder, decoder), _sampled("prior", self.prior, prior)
        return type(self)(self.clip, changed[1], changed[0], self.upsamplers, self.noised_clip)

    def source(self, asked: str | None = None) -> str | None:
        """Finds what the decoder draws from beside the caption (unCLIP, section 5.1 and figure 8): "prior", the prior's
        embedding; "text", the caption's CLIP embedding in its place; "caption", none. None: GLIDE knows of none.

        asked: one of them; None: the one that the decoder was trained for. Raises UserError for what it cannot draw.
        """
        if not self.clip:
            if asked:
                raise UserError(f"drawing from {asked!r}: this decoder takes captions alone: leave it out")
            return None
        config = self.decoder.stage.config
        found = asked or {"image": "prior", "text": "text"}[config.model.embedding]
        if found not in SOURCES:
            raise UserError(f"drawing from {found!r}: expected one of {', '.join(SOURCES)}")
        if found == "prior" and config.model.embedding == "text":
            raise UserError("drawing from 'prior': this decoder learned embeddings of captions: draw from 'text'")
        if found == "prior" and not self.prior:
            raise UserError("this cascade has no prior/: it draws pictures for given embeddings, and for captions from "
                            "'text' or 'caption' alone")  # fmt: skip
        if found == "caption" and not config.diffusion.drop_embedding:
            raise UserError("drawing from 'caption': this decoder was never trained without an embedding")
        return found

    def text_embeddings(self, texts: list[str]) -> np.ndarray:
        """CLIP text embeddings (N, dim)."""
        with self.watch.stage("clip"):
            return self.clip.embed_texts(texts)

    def image_embeddings(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """CLIP image embeddings (N, dim) of the squares in the middle of pictures, uint8 (H, W, 3) of any size.

        Raises UserError where the CLIP is a text tower alone.
        """
        m = self.clip.stage.config.model
        if not m.image:
            raise UserError("this cascade's CLIP reads captions alone: pictures need one that has its image tower too")
        return self.clip.embed_images(np.stack([center_square(image, m.image_size, m.resize) for image in images]))

    def embeddings(self, texts: list[str], key: Key | RowKeys, guidance_scale: float | None = None) -> np.ndarray:
        """Draws image embeddings (N, dim) for captions by the prior. guidance_scale: None is the trained config's."""
        if not self.prior:
            raise UserError("this cascade has no prior/, which draws embeddings for captions")
        conditions = self._captions(self.prior, texts)._replace(text_embedding=self.text_embeddings(texts))
        return self._draw("prior", self.prior, conditions, key, guidance_scale)

    def decode(
        self, embeddings: np.ndarray | None, texts: list[str], key: Key | RowKeys, guidance_scale: float | None = None
    ) -> np.ndarray:
        """Draws the decoder's pictures for image embeddings (None: GLIDE takes none) and captions ("" for none)."""
        if self.decoder.stage.needs_clip and embeddings is None:
            raise UserError("no embeddings: this decoder draws pictures for CLIP embeddings, which a prior makes")
        return to_uint8(self._decode(embeddings, texts, key, guidance_scale))

    def upsample(self, images: np.ndarray, texts: list[str], key: Key | RowKeys) -> list[np.ndarray]:
        """Enlarges pictures by each upsampler in turn; gives them after each. texts: read by GLIDE's alone."""
        return [to_uint8(larger) for larger in self._upsample(to_float(images), texts, key)]

    def models(self) -> dict[str, Model]:
        """The models that there are, by their folders' names in a cascade."""
        named = {"clip": self.clip, "prior": self.prior, "decoder": self.decoder, "noised_clip": self.noised_clip}
        named |= dict(zip(UPSAMPLERS, self.upsamplers, strict=False))
        return {name: model for name, model in named.items() if model}

    def identities(self) -> dict[str, str]:
        """SHA-256 of each model's bundle, by its folder's name in a cascade."""
        return {name: model.identity for name, model in self.models().items()}

    def check_prompts(self, texts: list[str], source: str | None = None) -> None:
        """Raises UserError for a prompt that is empty or longer than the models read, and where there is no such
        `source` of what to draw."""
        prior = self.prior if self.source(source) == "prior" else None
        limits = {}
        if self.clip:
            limits["CLIP"] = self.clip.tokenizer, self.clip.stage.config.model.text.context - 2
        named = {"the prior": prior, "the decoder": self.decoder} | dict(zip(UPSAMPLERS, self.upsamplers, strict=False))
        for name, model in named.items():
            if model and "tokens" in model.stage.texts:
                limits[name] = model.tokenizer, model.stage.texts["tokens"][1]
        for text in texts:
            _check_text(text, "prompt", limits)

    def check_captions(self, texts: list[str]) -> None:
        """Raises UserError for a text that is empty or longer than the CLIP reads, and where there is no CLIP."""
        if not self.clip:
            raise UserError("this cascade has no clip/, which reads captions: give a cascade of unCLIP")
        for text in texts:
            _check_text(text, "caption", {"CLIP": (self.clip.tokenizer, self.clip.stage.config.model.text.context - 2)})

    def check_clip_guidance(self, scale: float) -> None:
        """Raises UserError where a scale of CLIP's guidance is given, and there is no CLIP that guides."""
        if scale and not self.noised_clip:
            raise UserError("CLIP guidance needs a noised CLIP: put its bundle into the cascade, as noised_clip/")

    def check_room(self, count: int) -> None:
        """Raises UserError for more pictures at once than this machine's memory holds, in all sizes, as floats too."""
        size = self.decoder.stage.config.model.image_size
        factors = (model.stage.config.model.factor for model in self.upsamplers)
        sides = itertools.accumulate(factors, operator.mul, initial=size)
        needed = count * sum(3 * BYTES * side**2 for side in sides)
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > there:
            needs = f"{needed / 2**30:,.0f} GiB of memory, but this machine has {there / 2**30:,.0f}"
            raise UserError(f"{count:,} pictures at once need {needs}: draw fewer, or a file of captions by --prompts")

    def _generate(
        self,
        texts: list[str],
        seed: int,
        guidance_scale: float | None = None,
        prior_guidance_scale: float | None = None,
        clip_guidance_scale: float = 0.0,
        embeddings: np.ndarray | None = None,
        source: str | None = None,
        decoder: Model | None = None,
        sketch: np.ndarray | None = None,
        known: Callable[[int], dict[str, np.ndarray]] = lambda size: {},
        rows: Sequence[int] | None = None,
        draws: Sequence[int] | None = None,
    ) -> Drawn:
        """Implements `generate`; may replace the decoder, start it from a sketch, and keep known pixels.

        known: side of a picture → its fields `known_image` and `known` of `Conditions`, at that size.
        """
        if not texts:
            raise UserError("no captions: give at least one")
        self.check_clip_guidance(clip_guidance_scale)
        keys = RowKeys.of(seed_key(seed), len(texts))
        keys = keys._replace(rows=np.array(keys.rows if rows is None else rows))
        keys = keys._replace(draws=np.array(keys.draws if draws is None else draws))
        key_prior, key_decoder, key_upsampler = keys.split(3)
        found = self.source(source) if embeddings is None else None
        if found == "prior":
            embeddings = self.embeddings(texts, key_prior, prior_guidance_scale)
        elif found == "text":
            embeddings = self.text_embeddings(texts)
        fields = {"sketch": sketch} | known(self.decoder.stage.config.model.image_size)
        small = self._decode(embeddings, texts, key_decoder, guidance_scale, clip_guidance_scale, decoder, fields)
        larger = self._upsample(small, texts, key_upsampler, known)
        return {"embeddings": embeddings, "images": [to_uint8(images) for images in (small, *larger)]}

    def _decode(
        self,
        embeddings: np.ndarray | None,
        texts: list[str],
        key: Key | RowKeys,
        guidance_scale: float | None,
        clip_guidance_scale: float = 0.0,
        decoder: Model | None = None,
        fields: dict[str, Any] | None = None,
    ) -> np.ndarray:
        """Draws the decoder's pictures, float32. fields: more of its conditions."""
        model = decoder or self.decoder
        check_finite(clip_guidance_scale=clip_guidance_scale)
        conditions = self._captions(model, texts)._replace(image_embedding=embeddings, **(fields or {}))
        if not clip_guidance_scale:
            return self._draw("decoder", model, conditions, key, guidance_scale)
        conditions = conditions._replace(clip_scale=np.float32(clip_guidance_scale))
        noised_text = unit(self.noised_clip.embed_texts(texts))
        return self._draw("decoder", model, conditions, key, guidance_scale, self.noised_clip, noised_text)

    def _upsample(
        self,
        images: np.ndarray,
        texts: list[str],
        key: Key | RowKeys,
        known: Callable[[int], dict[str, np.ndarray]] = lambda size: {},
    ) -> list[np.ndarray]:
        """Enlarges float32 pictures by each upsampler in turn. known: as in `_generate`."""
        sizes = []
        keys = RowKeys.of(key, len(images)).split(len(self.upsamplers) or 1)
        for name, own_key, model in zip(UPSAMPLERS, keys, self.upsamplers, strict=False):
            images = np.clip(images, -1, 1)
            if model.stage.config.model.round_low_res:
                images = to_float(to_uint8(images))
            fields = known(images.shape[1] * model.stage.config.model.factor)
            conditions = self._captions(model, texts)._replace(low_res=images, **fields)
            images = self._draw(name, model, conditions, own_key, None)
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
        name: str,
        model: Model,
        conditions: Conditions,
        key: Key | RowKeys,
        guidance_scale: float | None,
        noised_clip: Model | None = None,
        noised_text: np.ndarray | None = None,
    ) -> np.ndarray:
        """Draws by a model, guided where it can be; guidance_scale None is its config's. name: as in `models`.
        Rest: of `Model.draw`."""
        check_finite(guidance_scale=guidance_scale)
        if not model.stage.guided and guidance_scale not in (None, 1.0):
            raise UserError(f"guidance {guidance_scale}: this model was never trained without captions, which guidance "
                            "needs: fine-tune it with --config.diffusion.drop_caption=0.2")  # fmt: skip
        conditions = conditions._replace(guidance_scale=model.stage.guidance(guidance_scale))
        frozen = self.clip.params if model.stage.needs_clip else {}
        with self.watch.stage(name):
            watch = None if name == "prior" else self.watch
            return model.draw(frozen, conditions, key, noised_clip, noised_text, watch)


def _check_text(text: str, kind: str, limits: Mapping[str, tuple[Any, int]]) -> None:
    """Raises UserError for a text that is empty, not in UTF-8, or longer than one of the models reads.

    limits: name of a model → its tokenizer, and how many tokens it reads.
    """
    if not text.strip():
        raise UserError(f"the {kind} is empty: write one")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # how Python hands over bytes of the command line that are no UTF-8
        raise UserError(f"the {kind} {text[:40]!a} is not text in UTF-8") from error
    for name, (tokenizer, limit) in limits.items():
        count = tokenizer.count(text)
        if count > limit:
            raise UserError(f"the {kind} {text[:40]!r}… has {count} tokens: {name} reads {limit}; shorten it")


def check_finite(**numbers: float | None) -> None:
    """Raises UserError for a number that is not finite."""
    for name, value in numbers.items():
        if value is not None and not np.isfinite(value):
            raise UserError(f"{name} is {value}: expected a finite number")


def _sampled(name: str, model: Model | None, sampling: Mapping[str, Any]) -> Model | None:
    """The model with other values in its section `sampling`; the same object where none is another."""
    own = model.stage.config.sampling if model else {}
    changes = {key: value for key, value in sampling.items() if own.get(key) != value}
    if not changes:
        return model
    if unknown := sorted(changes.keys() - own.keys()):
        raise UserError(f"sampling.{unknown[0]}: the {name} has none, but {', '.join(sorted(own))}")
    try:
        changed = model.sampled_by(**changes)
    except TypeError as error:
        raise UserError(f"sampling of the {name}: {error}") from error
    check_sampling(config := changed.stage.config)
    if "eta" in changes and config.sampling.sampler != "ddim":
        raise UserError(f"sampling.eta is of ddim, and the {name} is sampled by {config.sampling.sampler}")
    if changes.get("sampler") == "analytic" and "fixed" not in model.params:
        raise UserError(f"sampling.sampler is 'analytic', but the {name} has no variances: train it with that sampler")
    return changed


def _check_noised_clip(root: Path, noised_clip: Model, decoder: Model) -> None:
    """Raises UserError for a CLIP without eyes, and for a noised one of other pictures or noise than the decoder's."""
    m, d = noised_clip.stage.config.model, decoder.stage.config
    if m.image and not m.image.timesteps:
        return  # it saw no noise, and is shown the predicted x0, resized
    theirs, ours = (m.image_size, m.image.timesteps if m.image else 0), (d.model.image_size, d.diffusion.timesteps)
    if theirs != ours:
        raise UserError(f"{root}/noised_clip sees {theirs[0]} px at {theirs[1]} timesteps, the decoder draws {ours[0]} "
                        f"px at {ours[1]}: it must be trained for the decoder")  # fmt: skip
