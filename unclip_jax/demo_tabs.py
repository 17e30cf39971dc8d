"""Functions behind the tabs of the demo's page: what a visitor gives, checked, and what a cascade draws for it.

Pictures are uint8 RGB (H, W, 3). All raise UserError, of one line, for what cannot be drawn. Functions that draw yield
what models predict on the way too. For captions they draw a few pictures at a time, so that the first is shown early: a
picture depends on its seed and number, not on that.
"""

import contextlib
import copy
import functools
import math
import queue
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from unclip_jax.cascade import STEPS, Cascade, check_mask
from unclip_jax.chain import Drawn
from unclip_jax.config_values import SAMPLERS
from unclip_jax.data.transforms import decode
from unclip_jax.errors import UnreadableRecord, UserError
from unclip_jax.paths import to_path
from unclip_jax.pictures import to_uint8
from unclip_jax.watching import PREVIEWS, Watch

MOST_PICTURES = 16  # at once
CAPTIONED = ("draw", "inpaint", "sdedit")  # tabs that draw for a prompt
INVERTED = ("vary", "interpolate", "text_diff")  # tabs that draw by DDIM, to and fro
SOME_STEPS = (10, 20, 50, 100, 250)  # that can be chosen: each compiles the model anew
AT_ONCE = 4  # pictures of a chunk; on a CPU, where several take as long as one after another, 1
DEVICE = threading.Lock()  # held while models draw


class Part(NamedTuple):
    """Pictures, uint8 (N, H, W, 3), the next ones of those asked for: as a model predicts them by now, or `drawn`."""

    images: np.ndarray
    drawn: bool


def tabs(cascade: Cascade) -> list[str]:
    """Lists the tabs for what a cascade can do. Raises UserError for one that can do nothing."""
    found = []
    with contextlib.suppress(UserError):
        source(cascade)
        found += CAPTIONED
    clip = cascade.clip
    if clip and clip.stage.config.model.image:
        if cascade.decoder.stage.config.model.embedding == "image":
            found += INVERTED
        found.append("classify")
    if not found:
        raise UserError("there is nothing to show: this cascade has neither what draws for captions nor a CLIP that "
                        "sees pictures")  # fmt: skip
    return [name for name in ("draw", *INVERTED, "inpaint", "sdedit", "classify") if name in found]


def about(cascade: Cascade) -> str:
    """Says what a cascade draws: its pictures' size, and the public datasets that its decoder was trained on."""
    config = cascade.decoder.stage.config
    side = config.model.image_size * math.prod(model.stage.config.model.factor for model in cascade.upsamplers)
    parts = [part.removeprefix("tfds:") for part in config.data.source.split(" + ") if part.startswith("tfds:")]
    known = f", and knows what is in {' and '.join(parts)}" if parts else ""
    return f"pictures of {side} × {side} pixels{known}"


def source(cascade: Cascade) -> str | None:
    """Finds what a cascade draws from for a caption: what its decoder was trained for, or else "text" or "caption".

    Raises UserError where it draws for no caption.
    """
    for asked in (None, "text", "caption"):
        with contextlib.suppress(UserError):
            return cascade.source(asked)
    return cascade.source()


def samplers(cascade: Cascade) -> list[str]:
    """Lists the samplers that the decoder can be sampled by, its own first."""
    own = cascade.decoder.stage.config.sampling.sampler
    return [own, *(name for name in SAMPLERS if name not in (own, "analytic"))]  # which priors alone have


def steps(cascade: Cascade) -> list[str]:
    """Lists numbers of steps that the decoder can be sampled by, its own first."""
    config = cascade.decoder.stage.config
    own = str(config.sampling.steps)
    return [own, *(str(count) for count in SOME_STEPS if count <= config.diffusion.timesteps and str(count) != own)]


def inversion_steps(cascade: Cascade) -> list[int]:
    """Lists numbers of steps of DDIM, to and fro; the first is that of `unclip edit`, if the chain has as many."""
    some = [STEPS, *(count for count in SOME_STEPS if count != STEPS)]
    timesteps = cascade.decoder.stage.config.diffusion.timesteps
    return [count for count in some if count <= timesteps] or [timesteps]


def draw(
    cascade: Cascade,
    prompt: str,
    count: int,
    seed: int,
    guidance: float | None = None,
    prior_guidance: float | None = None,
    sampler: str | None = None,
    steps: str | None = None,
) -> Iterator[Part]:
    """Draws pictures for a prompt: those of `unclip sample`.

    guidance, prior_guidance, sampler, steps: of the decoder, and of the prior; None: those of the trained configs.
    """
    given = {"sampler": sampler, "steps": steps}
    cascade = cascade.sampled_by({name: value for name, value in given.items() if value}, {})
    scales = {"guidance_scale": guidance, "prior_guidance_scale": prior_guidance}
    seed, drawn_from = _seed(seed), _checked(cascade, prompt)

    def chunk(watched: Cascade, numbers: range) -> Drawn:
        places = {"rows": [0] * len(numbers), "draws": list(numbers)}
        return watched.generate([prompt] * len(numbers), seed, source=drawn_from, **scales, **places)

    yield from _in_chunks(cascade, chunk, _count(count))


def vary(
    cascade: Cascade, picture: str | None, eta: float, count: int, seed: int, steps: int = STEPS
) -> Iterator[Part]:
    """Draws variations of a picture's file. eta: 0 reproduces it, 1 varies it most."""
    given = read(picture), _count(count), float(eta), _seed(seed)
    yield from _seen(cascade, lambda watched: watched.variations(*given, steps=int(steps)))


def interpolate(
    cascade: Cascade, first: str | None, second: str | None, count: int, seed: int, steps: int = STEPS
) -> Iterator[Part]:
    """Draws frames on the way from one picture's file to another's."""
    given = read(first, "first picture"), read(second, "second picture"), _count(count), _seed(seed)
    yield from _seen(cascade, lambda watched: watched.interpolate(*given, steps=int(steps)))


def text_diff(
    cascade: Cascade,
    picture: str | None,
    before: str,
    after: str,
    theta: float,
    count: int,
    seed: int,
    steps: int = STEPS,
) -> Iterator[Part]:
    """Draws frames from a picture's file to it changed as caption `before` is to `after`.

    before: may be empty. theta: how far, from 0 to 1.
    """
    image = read(picture)
    before, after = ((text or "").strip() for text in (before, after))
    cascade.check_captions([after, *filter(None, [before])])
    given = image, before, after, float(theta), _count(count), _seed(seed)
    yield from _seen(cascade, lambda watched: watched.text_diff(*given, steps=int(steps)))


def inpaint(
    cascade: Cascade, painted: dict[str, Any] | None, prompt: str, count: int, seed: int, guidance: float | None = None
) -> Iterator[Part]:
    """Draws the painted part of a picture anew, to match a prompt.

    painted: an editor's value, its "background" and its "layers" of paint, RGBA. Where nothing was painted, the result
    is the square in the picture's middle, at its own size, bit for bit.
    """
    picture, mask = picture_and_mask(painted)
    check_mask(mask, picture)
    seed, options = _seed(seed), {"guidance_scale": guidance, "source": _checked(cascade, prompt)}

    def chunk(watched: Cascade, numbers: range) -> Drawn:
        return watched.inpaint(picture, mask, prompt, len(numbers), seed, rows=list(numbers), **options)

    yield from _in_chunks(cascade, chunk, _count(count))


def sdedit(
    cascade: Cascade,
    sketched: dict[str, Any] | None,
    prompt: str,
    start: float,
    count: int,
    seed: int,
    guidance: float | None = None,
) -> Iterator[Part]:
    """Draws pictures of a prompt with the layout of a sketch.

    sketched: an editor's value, of which the "composite", RGBA, is drawn on white. start: how much noise is added to
    the sketch, from 0 to 1.
    """
    composite = (sketched or {}).get("composite")
    if composite is None or not composite[..., 3].any():
        raise UserError("there is no sketch: draw one, or give a picture")
    sketch = on_white(composite)
    seed, options = _seed(seed), {"guidance_scale": guidance, "source": _checked(cascade, prompt)}

    def chunk(watched: Cascade, numbers: range) -> Drawn:
        return watched.sdedit(
            [sketch] * len(numbers), [prompt] * len(numbers), float(start), seed, rows=list(numbers), **options
        )

    yield from _in_chunks(cascade, chunk, _count(count))


def classify(cascade: Cascade, picture: str | None, labels: str, template: str = "{}") -> dict[str, float]:
    """Computes the probability that CLIP gives each label of a picture's file.

    labels: with commas or line ends between them. template: caption with {} for a label.
    """
    image = read(picture)
    named = list(dict.fromkeys(filter(None, (label.strip() for label in re.split(r"[,\n]", labels or "")))))
    if len(named) < 2:
        raise UserError("give two labels or more, with commas between them")
    template = (template or "").strip() or "{}"
    cascade.check_captions([template.replace("{}", label) for label in named])
    probabilities = cascade.classify(image, named, [template])
    return {label: float(probability) for label, probability in zip(named, probabilities, strict=True)}


def read(path: str | None, what: str = "picture") -> np.ndarray:
    """Reads a picture's file as uint8 RGB (H, W, 3)."""
    if not path:
        raise UserError(f"there is no {what}: give one")
    try:
        return decode(to_path(path).read_bytes())
    except UnreadableRecord as error:
        raise UserError(f"the {what} cannot be read ({error})") from error


def picture_and_mask(painted: dict[str, Any] | None) -> tuple[np.ndarray, np.ndarray]:
    """Takes an editor's value apart: the square in the picture's middle, uint8 (S, S, 3), and its mask, bool (S, S),
    True wherever there is any paint."""
    background = (painted or {}).get("background")
    if background is None:
        raise UserError("there is no picture: give one, then paint over what is to be drawn anew")
    height, width = background.shape[:2]
    mask = np.zeros((height, width), bool)
    for layer in painted["layers"]:
        alpha = Image.fromarray(layer[..., 3]).resize((width, height), Image.Resampling.NEAREST)
        mask |= np.asarray(alpha) > 0
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = slice(top, top + side), slice(left, left + side)
    return on_white(background)[square], mask[square]


def on_white(image: np.ndarray) -> np.ndarray:
    """Lays a picture, uint8 RGBA (H, W, 4), on white: uint8 (H, W, 3). Opaque pixels stay as they are."""
    alpha = image[..., 3:].astype(np.float32) / 255
    return np.uint8(np.rint(image[..., :3] * alpha + 255 * (1 - alpha)))


def _checked(cascade: Cascade, prompt: str) -> str | None:
    """Checks a prompt; finds what is drawn from."""
    found = source(cascade)
    cascade.check_prompts([prompt or ""], found)
    return found


def _count(value: float | None) -> int:
    """Checks a number of pictures: from 1 to MOST_PICTURES."""
    if value is None or value != int(value) or not 1 <= value <= MOST_PICTURES:
        raise UserError(f"{value} pictures: expected a whole number from 1 to {MOST_PICTURES}")
    return int(value)


def _seed(value: float | None) -> int:
    """Checks a seed: a whole number from 0 to 2^64 - 1."""
    if value is None or value != int(value) or not 0 <= value < 2**64:
        raise UserError(f"seed {value}: expected a whole number, 0 or greater")
    return int(value)


def _in_chunks(cascade: Cascade, draw: Callable[[Cascade, range], Drawn], count: int) -> Iterator[Part]:
    """Draws `count` pictures by their numbers, a chunk of always the same size at a time, so that little compiles."""
    on_cpu = cascade.decoder.mesh.devices.flat[0].platform == "cpu"
    size = 1 if on_cpu else AT_ONCE
    for start in range(0, count, size):
        numbers = range(start, start + size)
        for part in _seen(cascade, functools.partial(draw, numbers=numbers)):
            yield part._replace(images=part.images[: count - start])


class _Eye(Watch):
    """Puts what models predict on the way into a queue."""

    sees = True

    def __init__(self) -> None:
        self.seen: queue.SimpleQueue[np.ndarray | None] = queue.SimpleQueue()
        self.closed = False

    def at_once(self, steps: int) -> int:
        return -(-steps // PREVIEWS)

    def see(self, x0: np.ndarray) -> None:
        if self.closed:
            raise _Left
        self.seen.put(to_uint8(x0))


class _Left(Exception):
    """Nobody waits for the pictures any more."""


def _seen(cascade: Cascade, draw: Callable[[Cascade], Drawn]) -> Iterator[Part]:
    """Draws in a thread; yields what the models predict on the way, then the largest pictures that are drawn.

    Where the rest is not asked for, as by a visitor who has left, drawing ends at the next that would be yielded.
    """
    watched, eye = copy.copy(cascade), _Eye()
    watched.watch = eye

    def drawn() -> np.ndarray:
        with DEVICE:
            return draw(watched)["images"][-1]

    pool = ThreadPoolExecutor(1)
    future = pool.submit(drawn)
    future.add_done_callback(lambda _: eye.seen.put(None))
    try:
        while (images := eye.seen.get()) is not None:
            yield Part(images, drawn=False)
        yield Part(future.result(), drawn=True)
    finally:
        eye.closed = True
        pool.shutdown(wait=False)
