"""Stored outputs of the public PyTorch code, one test per file of tests/goldens (or of $UNCLIP_GOLDENS).

Networks are built from a file's own configuration and loaded by the code that loads public weights; those of diffusion
files are formulas. Agreement: 1e-4 of the output's own scale for networks, 2e-4 for whole sampling chains.
"""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import diffusion, golden

from unclip_jax.diffusion.corruption import upsample
from unclip_jax.models.unet import UNet
from unclip_jax.pretrained import adm, glide, karlo_stages
from unclip_jax.pretrained.state_dict import StateDict
from unclip_jax.stages import make_stage
from unclip_jax.stages.conditions import Conditions

FOLDER = Path(os.environ.get("UNCLIP_GOLDENS") or Path(__file__).parent / "goldens")
FILES = sorted(FOLDER.glob("*.npz"))
TOLERANCE = 1e-4


def nhwc(array):
    return jnp.asarray(np.moveaxis(array, 1, -1))


def check(ours, reference):
    ours = np.asarray(ours)
    np.testing.assert_allclose(ours, reference, rtol=0, atol=TOLERANCE * float(np.abs(reference).max()))


def lengths(mask):
    """Real tokens of each row; they stand in front."""
    length = mask.astype(bool).sum(axis=1).astype(np.int32)
    np.testing.assert_array_equal(np.arange(mask.shape[1]) < length[:, None], mask.astype(bool))
    return jnp.asarray(length)


def attention_heads(config):
    """The reference's three numbers as our two."""
    down = config["num_heads"]
    up = down if config["num_heads_upsample"] == -1 else config["num_heads_upsample"]
    return max(config["num_head_channels"], 0), (down, up)


def check_glide(meta, inputs, outputs):
    c = meta["config"]
    head_channels, heads = attention_heads(c)
    size = inputs["x"].shape[-1]
    weights = StateDict(golden.weights(meta), meta["model"])
    config, params = glide.convert(weights, size, "float32", head_channels, heads, c["xf_heads"])
    config.model.unet.dropout = c["dropout"]
    assert tuple(config.model.unet.channel_mult) == tuple(c["channel_mult"])
    assert set(config.model.unet.attention) == set(c["attention_resolutions"]) & {2**i for i in range(10)}
    stage = make_stage(config)
    conditions = Conditions()
    if "low_res" in inputs:
        conditions = conditions._replace(low_res=nhwc(inputs["low_res"]))
    if "inpaint_mask" in inputs:
        known, image = nhwc(inputs["inpaint_mask"]) > 0.5, nhwc(inputs["inpaint_image"])
        conditions = conditions._replace(known=known, known_image=image)

    @jax.jit
    def run(params, x, t, tokens, length):
        conditioning = stage.condition(params, tokens, length)
        return conditioning, stage.apply(params, conditioning, stage._extra_channels(conditions, x.shape), x, t)

    t, tokens = inputs["timesteps"].astype(np.int32), inputs["tokens"].astype(np.int32)
    conditioning, y = run(params, nhwc(inputs["x"]), t, tokens, lengths(inputs["mask"]))
    check(conditioning.context.swapaxes(1, 2), outputs["xf_out_ncl"])
    check(conditioning.emb, outputs["xf_proj"])
    check(jnp.moveaxis(y, -1, 1), outputs["y"])


def check_noised_clip(meta, inputs, outputs):
    c, weights = meta["config"], golden.weights(meta)
    image, text = (StateDict(weights, meta["model"], f"{part}_encoder/") for part in ("image", "text"))
    config, params = glide.convert_noised_clip(image, text, "float32", c["n_head_state"], c["logit_scale"])
    assert config.model.image_size == c["image_size"] and config.model.image.heads == c["n_head"]
    t, length = inputs["timesteps"].astype(np.int32), jnp.asarray(inputs["text_len"].astype(np.int32))
    tokens = inputs["tokens"].astype(np.int32)
    unscaled = config.copy_and_resolve_references()
    unscaled.model.unit_norm = False
    raw = make_stage(unscaled)
    check(jax.jit(raw.embed_noised)(params, nhwc(inputs["image"]), t), outputs["z_image"])
    z_t = jax.jit(raw.embed_texts)(params, tokens, length)
    check(z_t, outputs["z_text"])

    stage = make_stage(config)

    @jax.jit
    @jax.grad
    def gradient(x_t):
        z_i, z_t = stage.embed_noised(params, x_t, t), stage.embed_texts(params, tokens, length)
        return jnp.exp(params["logit_scale"]) * jnp.sum(z_i * z_t)

    check(jnp.moveaxis(gradient(nhwc(inputs["image"])), -1, 1), outputs["guidance_grad"])


def check_karlo_prior(meta, inputs, outputs):
    c = meta["config"]
    zero, one = np.zeros(c["clip_dim"], np.float32), np.ones(c["clip_dim"], np.float32)
    weights = StateDict(golden.weights(meta), meta["model"])
    config, params = karlo_stages.convert_prior(weights, zero, one, heads=c["xf_heads"])
    stage = make_stage(config)
    network, mean, std = stage._whitening(params)
    np.testing.assert_array_equal(std - mean, 1)
    t, x, text = inputs["timesteps"].astype(np.int32), inputs["x"], inputs["text_emb"]
    y = jax.jit(stage._model().apply)({"params": network}, x, t, inputs["text_enc"], lengths(inputs["mask"]), text)
    check(y, outputs["y"])


def check_karlo_decoder(meta, inputs, outputs):
    c = meta["config"]
    head_channels, heads = attention_heads(c)
    weights = StateDict(golden.weights(meta), meta["model"])
    config, params = karlo_stages.convert_decoder(weights, inputs["x"].shape[-1], "float32", head_channels, heads)
    stage = make_stage(config)

    @jax.jit
    def run(params, x, t, states, length, text, image):
        has = jnp.ones(len(x), bool)
        conditioning = stage.conditioner().apply({"params": params["conditioner"]}, states, length, text, image, has)
        return stage._unet().apply({"params": params["unet"]}, x, t, *conditioning)

    caption = inputs["text_seq"], lengths(inputs["mask"]), inputs["text_feat"]
    y = run(params, nhwc(inputs["x"]), inputs["timesteps"].astype(np.int32), *caption, inputs["image_emb"])
    check(jnp.moveaxis(y, -1, 1), outputs["y"])


def check_karlo_super_res(meta, inputs, outputs):
    weights = StateDict(golden.weights(meta), meta["model"])
    args = adm.unet_config(weights, 0, (1, 1), 32)
    params = adm.unet_params(weights, args, 6, outputs["y"].shape[1], 0)
    weights.finish()
    unet = UNet(**args, out_channels=outputs["y"].shape[1], dtype=jnp.float32)
    low_res = upsample(nhwc(inputs["low_res"]), inputs["x"].shape[2:], "bilinear")
    x = jnp.concatenate([nhwc(inputs["x"]), low_res], axis=-1)
    y = jax.jit(unet.apply)({"params": params}, x, inputs["timesteps"].astype(np.int32))
    check(jnp.moveaxis(y, -1, 1), outputs["y"])


CHECKS = {
    "Text2ImUNet": check_glide,
    "SuperResText2ImUNet": check_glide,
    "InpaintText2ImUNet": check_glide,
    "SuperResInpaintText2ImUnet": check_glide,
    "noised CLIP": check_noised_clip,
    "Karlo PriorTransformer": check_karlo_prior,
    "Karlo PLMImUNet": check_karlo_decoder,
    "Karlo SuperResUNetModel": check_karlo_super_res,
}


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_gives_what_the_public_code_gave(path):
    meta, inputs, outputs = golden.load(path)
    (diffusion.check if "cases" in meta else CHECKS[meta["model"]])(meta, inputs, outputs)


def test_there_are_goldens():
    assert FILES, f"no goldens in {FOLDER}"
