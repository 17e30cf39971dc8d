"""Public PyTorch weights as bundles: GLIDE, OpenAI's CLIP and Karlo.

Each family has a module with `read_folder(source, options)`, which gives its models one at a time, a cascade's CLIP
before those that need it.
"""

from typing import Any, NamedTuple

from ml_collections import ConfigDict


class Options(NamedTuple):
    """Options that no shape tells of a model, as the user gives them; 0: what the published models have."""

    dtype: str  # of matrix products and convolutions
    head_channels: int  # of every attention
    heads: int  # of the text path or the prior
    image_size: int  # of the pictures drawn


class Converted(NamedTuple):
    """A model, ready to be saved as a bundle."""

    place: str  # folder within the output; "": the output itself
    config: ConfigDict
    params: dict[str, Any]
    tokenizer_bytes: bytes | None
