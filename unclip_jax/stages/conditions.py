"""Conditions that pictures and embeddings are drawn for: an argument of every stage's `sample` and `invert`."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jaxtyping import Bool, Float, Int

from unclip_jax.arrays import Array

CAPTIONS = ("tokens", "tokens_length", "clip_tokens", "clip_tokens_length")  # also names of arrays in a batch


class Conditions(NamedTuple):
    """Conditions of B rows, pictures or embeddings, that are drawn. A field that is None is not given.

    Pictures are in [-1, 1]. Every value may be traced: other captions, scales or pictures compile nothing, while giving
    another choice of fields does.
    """

    # Captions, in the tokens of the stage's own tokenizer and of CLIP's (`Stage.texts` says which are read); a length
    # counts the tokens that are not padding.
    tokens: Int[Array, "B context"] | None = None
    tokens_length: Int[Array, " B"] | None = None
    clip_tokens: Int[Array, "B clip_context"] | None = None
    clip_tokens_length: Int[Array, " B"] | None = None
    # CLIP's embeddings: of the captions, for a prior; of the pictures to be drawn, or of the captions in their place,
    # for unCLIP's decoder, which draws from the captions alone without them.
    text_embedding: Float[Array, "B dim"] | None = None
    image_embedding: Float[Array, "B dim"] | None = None
    # Pictures to be enlarged, for an upsampler.
    low_res: Float[Array, "B h w 3"] | None = None
    # Scale of classifier-free guidance: 1 is the conditional model alone, more is nearer to the condition. Without it
    # nothing is drawn unconditionally, as `Stage.guidance` has it for 1.
    guidance_scale: Float[Array, ""] | None = None
    # Noise to start from, in place of noise drawn from the key.
    x_T: Float[Array, " B *shape"] | None = None
    # Pictures to start from, noised to the share `config.sampling.start` of all steps (SDEdit, arXiv 2108.01073).
    sketch: Float[Array, "B H W 3"] | None = None
    # DDIM's eta, in place of the config's: 0 adds no noise, 1 as much as DDPM does.
    eta: Float[Array, ""] | None = None
    # Inpainting: pictures, and which of their pixels are kept.
    known_image: Float[Array, "B H W 3"] | None = None
    known: Bool[Array, "B H W 1"] | None = None
    # CLIP guidance: (x_t, timesteps) → the gradient of a noised CLIP's similarity by x_t, as a `jax.tree_util.Partial`,
    # and how many times it is followed (GLIDE, arXiv 2112.10741, section 2.4).
    clip_gradient: Callable[..., jax.Array] | None = None
    # In its place, of a CLIP that saw no noise: (x0, timesteps) → the gradient by x0, which is taken at the predicted
    # x0 and led back to x_t through the network.
    x0_gradient: Callable[..., jax.Array] | None = None
    clip_scale: Float[Array, ""] | None = None
    # Steps of the chain to take alone, from the index `first` on, and the state of those before: the result is then a
    # state too, as `samplers.sample_part` has it.
    state: Float[Array, " state *shape"] | None = None
    first: Int[Array, ""] | None = None
    steps: Int[Array, ""] | None = None

    @property
    def branches(self) -> int:
        """Counts how often a network answers for each row: twice where there is a guidance scale, conditional first."""
        return 1 if self.guidance_scale is None else 2


def captions(source: Mapping[str, Array] | Conditions) -> dict[str, Any]:
    """Selects the token arrays, and their lengths, of a batch or of conditions."""
    given = source._asdict() if isinstance(source, Conditions) else source
    return {name: given[name] for name in CAPTIONS if given.get(name) is not None}
