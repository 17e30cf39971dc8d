"""Functions behind the tabs of the demo's page: what a visitor gives, checked, and what a cascade draws for it.

Pictures are uint8 RGB (H, W, 3). All raise UserError, of one line, for what cannot be drawn. Functions that yield draw
a few pictures at a time, so that the first is shown early: a picture depends on its seed and number, not on that.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from unclip_jax.cascade import STEPS, Cascade, check_mask
from unclip_jax.config_values import SAMPLERS
from unclip_jax.data.transforms import decode
from unclip_jax.errors import UnreadableRecord, UserError
from unclip_jax.paths import to_path

MOST_PICTURES = 16  # at once
CAPTIONED = ("draw", "inpaint", "sdedit")  # tabs that draw for a prompt
INVERTED = ("vary", "interpolate", "text_diff")  # tabs that draw by DDIM, to and fro
SOME_STEPS = (10, 20, 50, 100, 250)  # that can be chosen: each compiles the model anew
AT_ONCE = 4  # pictures of a chunk; on a CPU, where several take as long as one after another, 1


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
) -> Iterator[np.ndarray]:
    """Draws pictures for a prompt: those of `unclip sample`. Yields them in chunks, uint8 (N, H, W, 3).

    guidance, prior_guidance, sampler, steps: of the decoder, and of the prior; None: those of the trained configs.
    """
    given = {"sampler": sampler, "steps": steps}
    cascade = cascade.sampled_by({name: value for name, value in given.items() if value}, {})
    scales = {"guidance_scale": guidance, "prior_guidance_scale": prior_guidance}
    seed, drawn_from = _seed(seed), _checked(cascade, prompt)

    def chunk(numbers: range) -> np.ndarray:
        places = {"rows": [0] * len(numbers), "draws": list(numbers)}
        drawn = cascade.generate([prompt] * len(numbers), seed, source=drawn_from, **scales, **places)
        return drawn["images"][-1]

    yield from _in_chunks(chunk, _count(count), cascade)


def vary(cascade: Cascade, picture: str | None, eta: float, count: int, seed: int, steps: int = STEPS) -> np.ndarray:
    """Draws variations of a picture's file, uint8 (count, H, W, 3). eta: 0 reproduces it, 1 varies it most."""
    return cascade.variations(read(picture), _count(count), float(eta), _seed(seed), steps=int(steps))["images"][-1]


def interpolate(
    cascade: Cascade, first: str | None, second: str | None, count: int, seed: int, steps: int = STEPS
) -> tuple[np.ndarray, list[str]]:
    """Draws frames on the way from one picture's file to another's, uint8 (count, H, W, 3); and a label for each."""
    both = read(first, "first picture"), read(second, "second picture")
    drawn = cascade.interpolate(*both, _count(count), _seed(seed), steps=int(steps))["images"][-1]
    return drawn, [f"{share:.2f}" for share in np.linspace(0, 1, len(drawn))]


def text_diff(
    cascade: Cascade,
    picture: str | None,
    before: str,
    after: str,
    theta: float,
    count: int,
    seed: int,
    steps: int = STEPS,
) -> tuple[np.ndarray, list[str]]:
    """Draws frames from a picture's file to it changed as caption `before` is to `after`, uint8 (count, H, W, 3); and a
    label for each.

    before: may be empty. theta: how far, from 0 to 1.
    """
    image = read(picture)
    before, after = ((text or "").strip() for text in (before, after))
    cascade.check_captions([after, *filter(None, [before])])
    made = cascade.text_diff(image, before, after, float(theta), _count(count), _seed(seed), steps=int(steps))
    drawn = made["images"][-1]
    return drawn, [f"theta {share:.2f}" for share in np.linspace(0, theta, len(drawn))]


def inpaint(
    cascade: Cascade, painted: dict[str, Any] | None, prompt: str, count: int, seed: int, guidance: float | None = None
) -> Iterator[np.ndarray]:
    """Draws the painted part of a picture anew, to match a prompt. Yields pictures in chunks, uint8 (N, H, W, 3).

    painted: an editor's value, its "background" and its "layers" of paint, RGBA. Where nothing was painted, the result
    is the square in the picture's middle, at its own size, bit for bit.
    """
    picture, mask = picture_and_mask(painted)
    check_mask(mask, picture)
    seed, options = _seed(seed), {"guidance_scale": guidance, "source": _checked(cascade, prompt)}

    def chunk(numbers: range) -> np.ndarray:
        drawn = cascade.inpaint(picture, mask, prompt, len(numbers), seed, rows=list(numbers), **options)
        return drawn["images"][-1]

    yield from _in_chunks(chunk, _count(count), cascade)


def sdedit(
    cascade: Cascade,
    sketched: dict[str, Any] | None,
    prompt: str,
    start: float,
    count: int,
    seed: int,
    guidance: float | None = None,
) -> Iterator[np.ndarray]:
    """Draws pictures of a prompt with the layout of a sketch. Yields them in chunks, uint8 (N, H, W, 3).

    sketched: an editor's value, of which the "composite", RGBA, is drawn on white. start: how much noise is added to
    the sketch, from 0 to 1.
    """
    composite = (sketched or {}).get("composite")
    if composite is None or not composite[..., 3].any():
        raise UserError("there is no sketch: draw one, or give a picture")
    sketch = on_white(composite)
    seed, options = _seed(seed), {"guidance_scale": guidance, "source": _checked(cascade, prompt)}

    def chunk(numbers: range) -> np.ndarray:
        drawn = cascade.sdedit(sketch, prompt, float(start), len(numbers), seed, rows=list(numbers), **options)
        return drawn["images"][-1]

    yield from _in_chunks(chunk, _count(count), cascade)


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


def _in_chunks(draw: Callable[[range], np.ndarray], count: int, cascade: Cascade) -> Iterator[np.ndarray]:
    """Draws `count` pictures by their numbers, a chunk of always the same size at a time, so that little compiles."""
    on_cpu = cascade.decoder.mesh.devices.flat[0].platform == "cpu"
    size = 1 if on_cpu else AT_ONCE
    for start in range(0, count, size):
        yield draw(range(start, start + size))[: count - start]
