"""Edits by decoders that predict eps and learn their variance, as the papers' and Karlo's do: the whole way from a
picture to its x_T, back, and through an upsampler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import DATA, decibels, network
from goldens import golden
from PIL import Image
from shrink import compilation_cache, random_params, small_config, small_stage, tokenizer_bytes

from unclip_jax import cascade as module
from unclip_jax import edit
from unclip_jax.bundle import save_bundle
from unclip_jax.cascade import Cascade, ddim_to_and_fro
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.errors import UserError
from unclip_jax.model import Model
from unclip_jax.pictures import to_float, to_uint8
from unclip_jax.pretrained.karlo_stages import convert_decoder, convert_prior, convert_upsampler
from unclip_jax.pretrained.state_dict import StateDict
from unclip_jax.stages import make_stage
from unclip_jax.stages.decoder import Decoder

PICTURES = to_uint8(DATA[:6])


class ExactDecoder(Decoder):
    """Draws the pictures of `exact.DATA`, for any embedding."""

    def condition(self, *_):
        return None

    def _network(self, params, conditioning):
        def eps_and_variance(x_t, t):
            eps = network(x_t, t)
            return jnp.concatenate([eps, jnp.zeros_like(eps)], axis=-1)

        return eps_and_variance


@pytest.fixture(scope="module")
def cascade():
    """An exact decoder with the papers' settings of sampling, between a random CLIP and a random upsampler."""
    config = small_config("decoder").unlock()
    config.diffusion.update(dict(predicts="eps", learned_variance=True, snr_clip=()))
    config.sampling.update(dict(sampler="ddpm", steps="250", clip_x0=1.0))
    tokenizer = Tokenizer(tokenizer_bytes())
    clip_stage, _, clip_params = small_stage("clip")
    decoder = Model(ExactDecoder(config.lock(), clip_stage), {}, tokenizer, "d")
    upsampler, _, params = small_stage("upsampler_256")
    with compilation_cache():
        clip = Model(clip_stage, clip_params, tokenizer, "c")
        yield Cascade(clip, None, decoder, [Model(upsampler, params, None, "u")])


def to_and_fro(cascade, eta=0.0):
    """Pictures encoded and drawn again: (uint8 pictures, PSNR of each)."""
    drawn = cascade.redraw(*cascade.encode(PICTURES), seed=0, eta=eta)["images"]
    assert [images.shape for images in drawn] == [(6, 8, 8, 3), (6, 32, 32, 3)]
    return drawn[0], decibels(to_float(drawn[0]), to_float(PICTURES))


def saturated(images):
    """Share of the values that are at an end of their range."""
    return np.mean((images == 0) | (images == 255))


@pytest.mark.parametrize("changed", [{}, {"steps": "250"}, {"clip_x0": 1.0}])
def test_pictures_come_back(cascade, monkeypatch, changed):
    """Not so with the noisiest step, or clipped."""
    monkeypatch.setattr(module, "ddim_to_and_fro", lambda *numbers: ddim_to_and_fro(*numbers) | changed)
    drawn, reached = to_and_fro(cascade)
    print(changed, reached, saturated(drawn), saturated(PICTURES))
    assert saturated(drawn) < 0.01 if not changed else True
    assert reached.min() > 25 if not changed else reached.min() < 25


def test_fresh_noise(cascade):
    drawn = cascade.redraw(np.zeros((6, 8), np.float32), jax.random.normal(jax.random.key(5), (6, 8, 8, 3)), 0)["images"][0]
    print(saturated(drawn), decibels(to_float(drawn)[:, None].reshape(6,1,8,8,3).repeat(24,1).reshape(-1,8,8,3), np.tile(DATA,(6,1,1,1))).reshape(6,24).max(1))
    d, r = to_and_fro(cascade, 1.0)
    print(saturated(d), r)
