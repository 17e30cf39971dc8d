"""The architecture of an ADM U-Net read back from its state dict's names and shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.errors import UserError
from unclip_jax.models.unet import UNet
from unclip_jax.pretrained import adm
from unclip_jax.pretrained.state_dict import StateDict
from unclip_jax.training.leaves import differences


def state_dict(channels, mult, blocks, attention, middle, scale_shift, resample_blocks, inputs, outputs, context):
    """Names and random tensors in the order and by the rules of guided-diffusion's constructor."""
    rng, tensors, emb = np.random.default_rng(0), {}, 4 * channels

    def add(name, *shape):
        tensors[f"{name}.weight"] = rng.normal(size=shape).astype(np.float32)
        tensors[f"{name}.bias"] = rng.normal(size=shape[:1]).astype(np.float32)

    def res(name, c_in, c_out):
        add(f"{name}.in_layers.0", c_in)
        add(f"{name}.in_layers.2", c_out, c_in, 3, 3)
        add(f"{name}.emb_layers.1", 2 * c_out if scale_shift else c_out, emb)
        add(f"{name}.out_layers.0", c_out)
        add(f"{name}.out_layers.3", c_out, c_out, 3, 3)
        if c_in != c_out:
            add(f"{name}.skip_connection", c_out, c_in, 1, 1)

    def attend(name, c):
        add(f"{name}.norm", c)
        add(f"{name}.qkv", 3 * c, c, 1)
        if context:
            add(f"{name}.encoder_kv", 2 * c, context, 1)
        add(f"{name}.proj_out", c, c, 1)

    def resample(name, c, part):
        if resample_blocks:
            res(name, c, c)
        else:
            add(f"{name}.{part}", c, c, 3, 3)

    add("time_embed.0", emb, channels)
    add("time_embed.2", emb, emb)
    ch = channels * mult[0]
    add("input_blocks.0.0", ch, inputs, 3, 3)
    chans, ds, n = [ch], 1, 0
    for level, m in enumerate(mult):
        for _ in range(blocks):
            n += 1
            res(f"input_blocks.{n}.0", ch, channels * m)
            ch = channels * m
            if ds in attention:
                attend(f"input_blocks.{n}.1", ch)
            chans.append(ch)
        if level < len(mult) - 1:
            n += 1
            resample(f"input_blocks.{n}.0", ch, "op")
            chans.append(ch)
            ds *= 2
    res("middle_block.0", ch, ch)
    if middle:
        attend("middle_block.1", ch)
    res(f"middle_block.{2 if middle else 1}", ch, ch)
    n = 0
    for level in reversed(range(len(mult))):
        for i in range(blocks + 1):
            parts = 1
            res(f"output_blocks.{n}.0", ch + chans.pop(), channels * mult[level])
            ch = channels * mult[level]
            if ds in attention:
                attend(f"output_blocks.{n}.1", ch)
                parts += 1
            if level and i == blocks:
                resample(f"output_blocks.{n}.{parts}", ch, "conv")
                ds //= 2
            n += 1
    add("out.0", ch)
    add("out.2", outputs, ch, 3, 3)
    return tensors


ARCHITECTURES = {
    "adm": (8, (1, 2, 3), 2, (2, 4), True, True, True, 3, 6, 12),
    "equal widths, no attention": (8, (1, 1, 2, 2), 2, (), False, False, True, 6, 3, 0),
    "plain resampling": (8, (1, 2), 1, (1, 2), True, True, False, 7, 6, 5),
    "plain resampling, shift only, one block": (8, (2, 2, 4), 1, (4,), True, False, False, 3, 3, 0),
    "one level": (8, (1,), 3, (1,), True, True, True, 3, 6, 0),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture_is_read_from_shapes(name):
    channels, mult, blocks, attention, middle, scale_shift, resample_blocks, inputs, outputs, context = (
        ARCHITECTURES[name]
    )
    weights = StateDict(state_dict(*ARCHITECTURES[name]), name)
    args = adm.unet_config(weights, 4, (1, 1), 4)
    expected = dict(channels=channels, channel_mult=mult, res_blocks=blocks, attention=attention)
    expected |= dict(middle_attention=middle, scale_shift=scale_shift, resample_blocks=resample_blocks)
    assert {key: args[key] for key in expected} == expected
    params = adm.unet_params(weights, args, inputs, outputs, context)
    weights.finish()

    unet = UNet(**args, out_channels=outputs, dtype=jnp.float32)
    x, t = jnp.zeros((1, 8, 8, inputs)), jnp.zeros((1,), jnp.int32)
    beside = (None, jnp.zeros((1, 3, context)) if context else None)
    shapes = jax.eval_shape(lambda: unet.init(jax.random.key(0), x, t, *beside))["params"]
    assert differences(params, shapes) == ""


def test_heads_by_number_differ_on_the_way_up():
    tensors = state_dict(*ARCHITECTURES["adm"])
    args = adm.unet_config(StateDict(tensors, "adm"), 0, (2, 4), 4)
    params = adm.unet_params(StateDict(tensors, "adm"), args, 3, 6, 12)
    # Head by head, each head's query, key and value side by side: with 2 heads of 16 channels the first head's query
    # has 8 rows, with 4 heads 4; ours has all queries first.
    places = ("input_blocks.4.1", "down_1_0_attention", 8), ("output_blocks.3.1", "up_1_0_attention", 4)
    for name, ours, head in places:
        reference = tensors[f"{name}.qkv.bias"]
        np.testing.assert_array_equal(params[ours]["qkv"]["bias"][:head], reference[:head])
        np.testing.assert_array_equal(params[ours]["qkv"]["bias"][head : 2 * head], reference[3 * head : 4 * head])


def test_all_that_is_wrong_is_listed_at_once():
    tensors = state_dict(*ARCHITECTURES["adm"])
    args = adm.unet_config(StateDict(tensors, "adm"), 4, (1, 1), 4)
    del tensors["out.0.bias"]
    tensors["out.2.weight"] = np.zeros((6, 8, 1, 1), np.float32)
    tensors["label_emb.weight"] = np.zeros((1000, 32), np.float32)
    weights = StateDict(tensors, "base.pt")
    adm.unet_params(weights, args, 3, 6, 12)
    with pytest.raises(UserError) as caught:
        weights.finish()
    assert str(caught.value) == (
        "base.pt does not fit the model: missing out.0.bias; out.2.weight is (6, 8, 1, 1), expected (6, 8, 3, 3); "
        "unexpected label_emb.weight"
    )
