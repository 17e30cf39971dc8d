"""The U-Net with its text path against the public GLIDE code: four networks of random weights, outputs stored."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.diffusion.corruption import upsample
from unclip_jax.models.transformer import TextTransformer
from unclip_jax.models.unet import UNet

GOLDENS = Path(__file__).parent.parent / "goldens"
sys.path.insert(0, str(GOLDENS))
import golden  # noqa: E402


def conv(w, name):
    return {"kernel": w[f"{name}.weight"].transpose(2, 3, 1, 0), "bias": w[f"{name}.bias"]}


def dense(w, name, heads=1, parts=1):
    """PyTorch linear or 1×1 convolution; outputs go from (heads, parts, channels) to (parts, heads, channels)."""

    def reorder(values):
        split = values.reshape(heads, parts, -1, *values.shape[1:])
        return split.swapaxes(0, 1).reshape(values.shape)

    weight = reorder(w[f"{name}.weight"].reshape(len(w[f"{name}.bias"]), -1))
    return {"kernel": weight.T, "bias": reorder(w[f"{name}.bias"])}


def norm(w, name):
    return {"scale": w[f"{name}.weight"], "bias": w[f"{name}.bias"]}


def res_block(w, name):
    block = {
        "norm_in": norm(w, f"{name}.in_layers.0"),
        "conv_in": conv(w, f"{name}.in_layers.2"),
        "film": dense(w, f"{name}.emb_layers.1"),
        "norm_out": norm(w, f"{name}.out_layers.0"),
        "conv_out": conv(w, f"{name}.out_layers.3"),
    }
    if f"{name}.skip_connection.weight" in w:
        block["skip"] = conv(w, f"{name}.skip_connection")
    return block


def attention_block(w, name, head_channels):
    heads = len(w[f"{name}.norm.weight"]) // head_channels
    return {
        "norm": norm(w, f"{name}.norm"),
        "qkv": dense(w, f"{name}.qkv", heads, 3),
        "context_kv": dense(w, f"{name}.encoder_kv", heads, 2),
        "out": dense(w, f"{name}.proj_out"),
    }


def unet_params(w, config):
    hd, levels, blocks = config["num_head_channels"], len(config["channel_mult"]), config["num_res_blocks"]
    params = {
        "time": {"in": dense(w, "time_embed.0"), "out": dense(w, "time_embed.2")},
        "conv_in": conv(w, "input_blocks.0.0"),
        "middle_0_res": res_block(w, "middle_block.0"),
        "middle_attention": attention_block(w, "middle_block.1", hd),
        "middle_1_res": res_block(w, "middle_block.2"),
        "norm_out": norm(w, "out.0"),
        "conv_out": conv(w, "out.2"),
    }
    n = 1
    for level in range(levels):
        for i in range(blocks):
            params[f"down_{level}_{i}_res"] = res_block(w, f"input_blocks.{n}.0")
            if 2**level in config["attention_resolutions"]:
                params[f"down_{level}_{i}_attention"] = attention_block(w, f"input_blocks.{n}.1", hd)
            n += 1
        if level < levels - 1:
            params[f"down_{level}_resample"] = res_block(w, f"input_blocks.{n}.0")
            n += 1
    n = 0
    for level in reversed(range(levels)):
        attends = 2**level in config["attention_resolutions"]
        for i in range(blocks + 1):
            params[f"up_{level}_{i}_res"] = res_block(w, f"output_blocks.{n}.0")
            if attends:
                params[f"up_{level}_{i}_attention"] = attention_block(w, f"output_blocks.{n}.1", hd)
            if i == blocks and level:
                params[f"up_{level}_resample"] = res_block(w, f"output_blocks.{n}.{1 + attends}")
            n += 1
    return params


def text_params(w, config):
    def block(n):
        name = f"transformer.resblocks.{n}"
        return {
            "norm_1": norm(w, f"{name}.ln_1"),
            "qkv": dense(w, f"{name}.attn.c_qkv", config["xf_heads"], 3),
            "out": dense(w, f"{name}.attn.c_proj"),
            "norm_2": norm(w, f"{name}.ln_2"),
            "mlp_in": dense(w, f"{name}.mlp.c_fc"),
            "mlp_out": dense(w, f"{name}.mlp.c_proj"),
        }

    return {
        "tokens": {"embedding": w["token_embedding.weight"]},
        "positions": w["positional_embedding"],
        "padding": w["padding_embedding"],
        "transformer": {"blocks": jax.tree.map(lambda *a: np.stack(a), *map(block, range(config["xf_layers"])))},
        "norm": norm(w, "final_ln"),
    }


def close(ours, reference):
    np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-4 * float(np.abs(reference).max()))


@pytest.mark.parametrize("name", ["glide_base", "glide_upsample", "glide_inpaint", "glide_upsample_inpaint"])
def test_network_gives_what_the_public_code_gives(name):
    meta, inputs, outputs = golden.load(GOLDENS / f"{name}.npz")
    c, w = meta["config"], golden.weights(meta)
    unet = UNet(
        c["model_channels"], tuple(c["channel_mult"]), c["num_res_blocks"], tuple(c["attention_resolutions"]), True,
        c["num_head_channels"], 32, c["out_channels"], c["dropout"], jnp.float32, False,
    )  # fmt: skip
    text = TextTransformer(c["vocab"], c["text_ctx"], c["xf_width"], c["xf_layers"], c["xf_heads"], jnp.float32, False)

    length = inputs["mask"].sum(axis=1).astype(np.int32)
    np.testing.assert_array_equal(np.arange(c["text_ctx"]) < length[:, None], inputs["mask"])
    context = jax.jit(text.apply)({"params": text_params(w, c)}, inputs["tokens"].astype(np.int32), length)
    close(context.swapaxes(1, 2), outputs["xf_out_ncl"])
    projection = dense(w, "transformer_proj")
    emb = context[:, -1] @ projection["kernel"] + projection["bias"][None]
    close(emb, outputs["xf_proj"])

    channels = [inputs["x"]]
    if "inpaint_image" in inputs:
        channels += [inputs["inpaint_image"] * inputs["inpaint_mask"], inputs["inpaint_mask"]]
    x = np.concatenate(channels, axis=1).transpose(0, 2, 3, 1)
    if "low_res" in inputs:
        x = np.concatenate([x, upsample(inputs["low_res"].transpose(0, 2, 3, 1), x.shape[1:3], "bilinear")], axis=-1)
    t = inputs["timesteps"].astype(np.int32)
    y = jax.jit(unet.apply)({"params": unet_params(w, c)}, x, t, emb, context)
    close(y.transpose(0, 3, 1, 2), outputs["y"])
