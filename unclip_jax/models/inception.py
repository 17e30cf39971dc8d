"""Inception-v3 as TensorFlow's graph of 2015 has it: the network that FID and its relatives are defined by.

The architecture is that of arXiv 1512.00567. This one graph differs from later releases: 1,008 classes, means that
leave padding out, a maximum instead of the last block's mean, and pictures resized without half-pixel centres. Batch
normalisation is folded into the convolutions' kernels and biases. Names are those of the public PyTorch files.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

SIDE = 299  # pixels that every picture is resized to
CLASSES = 1008
SPATIAL = 7  # channels of mixed_6/conv, of 17 x 17 places each: nearly as many numbers as the pooled features

# A step of a branch: (name, channels, kernel side or sides, stride if not 1), a pooling, or steps side by side.
POOLS = {
    "mean": lambda x: nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False),
    "max": lambda x: nn.max_pool(x, (3, 3), padding="SAME"),
    "halve": lambda x: nn.max_pool(x, (3, 3), strides=(2, 2)),
}


def _block_5(pooled: int) -> tuple:
    """Branches at 35 x 35."""
    return (
        [("branch1x1", 64, 1)],
        [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
        ["mean", ("branch_pool", pooled, 1)],
    )


def _block_6(narrow: int) -> tuple:
    """Branches at 17 x 17."""
    row, column = (1, 7), (7, 1)
    double = [(f"branch7x7dbl_{i}", narrow, side) for i, side in enumerate((1, column, row, column), 1)]
    return (
        [("branch1x1", 192, 1)],
        [("branch7x7_1", narrow, 1), ("branch7x7_2", narrow, row), ("branch7x7_3", 192, column)],
        [*double, ("branch7x7dbl_5", 192, row)],
        ["mean", ("branch_pool", 192, 1)],
    )


def _block_7(pool: str) -> tuple:
    """Branches at 8 x 8."""
    row, column = (1, 3), (3, 1)
    return (
        [("branch1x1", 320, 1)],
        [("branch3x3_1", 384, 1), [("branch3x3_2a", 384, row), ("branch3x3_2b", 384, column)]],
        [
            *[("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3)],
            [("branch3x3dbl_3a", 384, row), ("branch3x3dbl_3b", 384, column)],
        ],
        [pool, ("branch_pool", 192, 1)],
    )


HALVE_5 = (
    [("branch3x3", 384, 3, 2)],
    [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)],
    ["halve"],
)
HALVE_6 = (
    [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
    [
        *[("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1))],
        ("branch7x7x3_4", 192, 3, 2),
    ],
    ["halve"],
)
BLOCKS = {
    "Mixed_5b": _block_5(32),
    "Mixed_5c": _block_5(64),
    "Mixed_5d": _block_5(64),
    "Mixed_6a": HALVE_5,
    "Mixed_6b": _block_6(128),
    "Mixed_6c": _block_6(160),
    "Mixed_6d": _block_6(160),  # the graph's mixed_6
    "Mixed_6e": _block_6(192),
    "Mixed_7a": HALVE_6,
    "Mixed_7b": _block_7("mean"),
    "Mixed_7c": _block_7("max"),
}


class Inception(nn.Module):
    """Pictures, uint8 (B, H, W, 3) of any size → float32 features by name.

    "pool": pool_3, (B, 2048). "spatial": the first 7 channels of mixed_6/conv, (B, 17 * 17 * 7). "logits": of the
    classes, without the bias, (B, 1008).
    """

    @nn.compact
    def __call__(self, images):
        x = (resize(images.astype(jnp.float32), SIDE) - 128) / 128
        x = _conv("Conv2d_1a_3x3", 32, 3, 2)(x)
        x = _conv("Conv2d_2a_3x3", 32, 3, padding="VALID")(x)
        x = _conv("Conv2d_2b_3x3", 64, 3)(x)
        x = POOLS["halve"](x)
        x = _conv("Conv2d_3b_1x1", 80, 1)(x)
        x = _conv("Conv2d_4a_3x3", 192, 3, padding="VALID")(x)
        x = POOLS["halve"](x)
        features = {}
        for name, branches in BLOCKS.items():
            x = Block(branches, name=name)(x)
            if name == "Mixed_6d":  # whose first branch is that convolution
                features["spatial"] = x[..., :SPATIAL].reshape(len(x), -1)
        features["pool"] = jnp.mean(x, axis=(1, 2))
        features["logits"] = nn.Dense(CLASSES, use_bias=False, name="fc")(features["pool"])
        return features


def parameter_shapes() -> dict[str, Any]:
    """Shapes of Inception's parameters."""
    images = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.uint8)
    return jax.eval_shape(Inception().init, jax.random.key(0), images)["params"]


class Block(nn.Module):
    """Branches side by side: x (B, H, W, C) → their outputs, joined along the channels."""

    branches: tuple

    @nn.compact
    def __call__(self, x):
        return jnp.concatenate([self._branch(x, branch) for branch in self.branches], axis=-1)

    def _branch(self, x, steps):
        for step in steps:
            if isinstance(step, str):
                x = POOLS[step](x)
            elif isinstance(step[0], str):
                x = _conv(*step)(x)
            else:
                x = jnp.concatenate([_conv(*part)(x) for part in step], axis=-1)
        return x


def _conv(name: str, channels: int, sides: int | tuple[int, int], stride: int = 1, padding: str = ""):
    """A convolution and ReLU; with a stride of 2 there is no padding."""
    sides = (sides, sides) if isinstance(sides, int) else sides
    padding = padding or ("SAME" if stride == 1 else "VALID")
    conv = nn.Conv(channels, sides, stride, padding=padding, name=name)
    return lambda x: nn.relu(conv(x))


def resize(images, side: int):
    """float32 (B, H, W, C) → (B, side, side, C), as TensorFlow 1's `resize_bilinear` does without half-pixel centres.

    Pixel i lies at i * length / side. Nothing is averaged where the picture shrinks, and the last pixels of one that
    grows repeat. (With half-pixel centres, grey levels of noise differ by up to 33.)
    """
    for axis in (2, 1):
        length = images.shape[axis]
        places = np.arange(side, dtype=np.float32) * np.float32(length / side)
        before = places.astype(np.int32)
        after = np.minimum(before + 1, length - 1)
        share = np.expand_dims(places - before, [i for i in range(4) if i != axis])
        one, other = (jnp.take(images, places, axis=axis) for places in (before, after))
        images = one + (other - one) * share
    return images
