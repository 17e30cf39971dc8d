"""Edits by decoders that predict eps and learn their variance, as the papers' and Karlo's do: the whole way from a
picture to its x_T, back, and through an upsampler."""

from pathlib import Path

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

MEANS, SPREAD = 0.8 * DATA, np.float32(0.1)  # pictures are one of the means, with noise: few values are at an end
PICTURES = to_uint8(MEANS[:6] + SPREAD * np.random.default_rng(3).normal(size=(6, 8, 8, 3)))
NOISE = np.random.default_rng(4).normal(size=(6, 8, 8, 3)).astype(np.float32)


class ExactDecoder(Decoder):
    """Draws such pictures, for any embedding, by an eps that is off by 0.03."""

    def condition(self, *_):
        return None

    def _network(self, params, conditioning):
        def eps_and_variance(x_t, t):
            eps = network(x_t, t, MEANS, SPREAD)
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


def saturated(images):
    """Share of the values that are at an end of their range."""
    return np.mean((images == 0) | (images == 255))


def psnr(images, truth):
    return decibels(to_float(images), to_float(truth))


@pytest.mark.parametrize("changed", [{}, {"steps": "250"}])
def test_pictures_come_back_but_for_the_noisiest_step(cascade, monkeypatch, changed):
    """One of the six, between two means, comes back as the other one's: 17 dB."""
    monkeypatch.setattr(module, "ddim_to_and_fro", lambda *numbers: ddim_to_and_fro(*numbers) | changed)
    embeddings, x_T = cascade.encode(PICTURES)
    drawn = cascade.redraw(embeddings, x_T, 0)["images"]
    varied = cascade.redraw(embeddings, x_T, 0, eta=1.0)["images"][0]
    fresh = cascade.redraw(embeddings, NOISE, 0, inverted=False)["images"][0]
    assert [images.shape for images in drawn] == [(6, 8, 8, 3), (6, 32, 32, 3)]
    if changed:
        assert psnr(drawn[0], PICTURES).mean() < 25 and saturated(drawn[0]) > 0.1
    else:
        assert psnr(drawn[0], PICTURES).mean() > 25
        assert max(map(saturated, (drawn[0], varied, fresh))) < 0.01


# Karlo's form: the decoder, prior and upsampler of the public code, small and with random weights.


def karlo(name):
    meta, _, _ = golden.load(Path(__file__).parent / "goldens" / f"karlo_{name}.npz")
    return StateDict(golden.weights(meta), name)


def save_karlo(folder):
    """A cascade of Karlo's decoder, prior and upsampler beside a CLIP of their width."""
    config = small_config("clip").unlock()
    config.model.update(dict(dim=24, unit_norm=False))
    config.model.text.update(dict(width=24, context=7))
    clip = make_stage(config.lock())
    identity = save_bundle(folder / "clip", "clip", config, random_params(clip, 7), tokenizer_bytes(), "", {})
    zero, one = np.zeros(24, np.float32), np.ones(24, np.float32)
    stages = {
        "prior": ("prior_diffusion", *convert_prior(karlo("prior"), zero, one, heads=4), identity),
        "decoder": ("decoder", *convert_decoder(karlo("decoder"), 16, head_channels=16), identity),
        "upsampler_256": ("upsampler", *convert_upsampler(karlo("super_res"), karlo("super_res"), 64), ""),
    }
    for name, (stage, config, params, clip) in stages.items():
        save_bundle(folder / name, stage, config, params, None, clip, {})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_karlo(tmp_path_factory.mktemp("karlo"))


@pytest.mark.slow
def test_karlos_decoder_goes_to_and_fro_by_the_same_settings(folder, tmp_path, monkeypatch):
    """What random weights draw says nothing of how near trained ones come; how they are called does."""
    used = {"invert": [], "draw": []}

    def spied(name):
        method = getattr(Model, name)

        def spy(model, *given):
            if model.stage.config.stage == "decoder":
                used[name].append(model.stage.config.sampling.to_dict())
            return method(model, *given)

        return spy

    for name in used:
        monkeypatch.setattr(Model, name, spied(name))
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    one, two = (f"--image={tmp_path / name}" for name in ("0.png", "1.png"))
    commands = [["variations", one, "--eta=0"], ["variations", one, "--eta=1"], ["interpolate", one, two]]
    commands += [["text_diff", one, "--after=a red apple"]]
    with compilation_cache():
        for i, (command, *options) in enumerate(commands):
            given = [f"--bundle={folder}", "--steps=5", "-n", "2", "--out", str(tmp_path / str(i))]
            assert edit.main(["edit", command, *options, *given]) == 0
            drawn = [np.asarray(Image.open(path)) for path in sorted((tmp_path / str(i)).glob(f"{command}_*.png"))]
            assert len(drawn) == 2 and all(image.shape == (64, 64, 3) and image.std() > 0 for image in drawn)
    assert len(used["invert"]) == len(used["draw"]) == len(commands)
    ours = convert_decoder(karlo("decoder"), 16, head_channels=16)[0].sampling.to_dict()
    assert ours["clip_x0"] == 1.0 and ours["sampler"] == "ddpm"
    for settings in used["invert"] + used["draw"]:
        assert settings == ours | {"sampler": "ddim", "clip_x0": 0.0, "steps": "4/5"}
    with pytest.raises(UserError, match="reconstruct needs principal components: name by --pca the bundle of an auto"):
        edit.main(["edit", "reconstruct", one, f"--bundle={folder}", "--components=3", "--out", str(tmp_path / "no")])
