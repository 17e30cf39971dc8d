"""Converts public PyTorch weights into bundles: GLIDE, OpenAI's CLIP and Karlo.

Each family has a module with a function `read_folder(source, options)`, which yields its models one at a time, a
cascade's CLIP before the models that need it.
"""

from typing import Any, NamedTuple

from ml_collections import ConfigDict


class Options(NamedTuple):
    """Facts about a model that the shapes of its tensors do not tell, as the user gives them."""

    dtype: str  # of matrix products and convolutions: "float32" or "bfloat16"
    head_channels: int  # channels of each attention head
    heads: int  # attention heads of the text path or the prior; 0: as the published models have
    image_size: int  # side in pixels of the pictures drawn; 0: as the published models have


class Converted(NamedTuple):
    """A model, ready to be saved as a bundle."""

    subfolder: str  # of the output folder; "": the output folder itself
    config: ConfigDict
    params: dict[str, Any]
    tokenizer_bytes: bytes | None  # None: the model reads no text by a tokenizer of its own
