"""Flags of how `sample` draws: each changes the pictures, is stored in them, and drawing them again heeds it."""

import itertools
import json

import numpy as np
import pytest
from PIL import Image
from shrink import (
    compilation_cache,
    random_params,
    save_cascade,
    small_config,
    small_stage,
    tokenizer_bytes,
)

from unclip_jax import chain, config_values, model, sample
from unclip_jax.bundle import load_description, save_bundle
from unclip_jax.cascade import Cascade
from unclip_jax.errors import UserError
from unclip_jax.keys import RowKeys, seed_key
from unclip_jax.stages import make_stage

PROMPTS = ["a red fox", "a blue tent"]
NAMES = ("a_red_fox_0_0.png", "a_blue_tent_0_1.png")


def without_upsamplers(folder):
    for name in ("upsampler_256", "upsampler_1024"):
        (folder / name).rename(folder / f"no_{name}")  # they take most of the time
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = without_upsamplers(save_cascade(tmp_path_factory.mktemp("cascade")))
    save_stage(folder / "decoder", "decoder", load_description(folder / "clip")["identity"])
    return folder


def save_stage(folder, name, clip, **flat):
    """Writes a random bundle of the shrunk config with these keys changed, beside the CLIP of that identity. A decoder
    listens to x_t more than random ones do, so that it matters how it is sampled."""
    config = small_config(name).unlock()
    config.update_from_flattened_dict(flat)
    stage = make_stage(config.lock(), small_stage("clip")[0])
    params = random_params(stage)
    if "unet" in params:
        params["unet"]["conv_in"]["kernel"] *= 50
    save_bundle(folder, config.stage, config, params, tokenizer_bytes(), clip, {})


@pytest.fixture(scope="module")
def of_text(tmp_path_factory, folder):
    """A cascade whose decoder learned embeddings of captions, without a prior."""
    place = tmp_path_factory.mktemp("of_text")
    (place / "clip").symlink_to(folder / "clip")
    clip = load_description(folder / "clip")["identity"]
    save_stage(place / "decoder", "decoder", clip, **{"model.embedding": "text"})
    return place


@pytest.fixture(scope="module")
def autoregressive(tmp_path_factory, folder):
    """A cascade with an autoregressive prior, whose dot products are spread."""
    place = tmp_path_factory.mktemp("autoregressive")
    for name in ("clip", "decoder"):
        (place / name).symlink_to(folder / name)
    save_stage(place / "prior", "prior_ar", load_description(folder / "clip")["identity"])
    return place


def draw(bundle, out, *flags):
    """Draws both prompts: pictures, and the settings stored in the first."""
    prompts = [f"--prompt={prompt}" for prompt in PROMPTS]
    with pytest.MonkeyPatch.context() as patch, compilation_cache():
        patch.setattr(model, "CHUNK_ROWS", 2)
        assert sample.main(["sample", f"--bundle={bundle}", *prompts, "-n=1", f"--out={out}", *flags]) == 0
    return read(out), stored(out)


def again(picture, out):
    with pytest.MonkeyPatch.context() as patch, compilation_cache():
        patch.setattr(model, "CHUNK_ROWS", 2)
        assert sample.main(["sample", f"--again={picture}", f"--out={out}"]) == 0
    return np.asarray(Image.open(out / picture.name)).astype(int)


def read(out):
    return np.stack([np.asarray(Image.open(out / name)) for name in NAMES]).astype(int)


def stored(out):
    with Image.open(out / NAMES[0]) as picture:
        return json.loads(picture.text["settings"])


@pytest.fixture(scope="module")
def plain(folder, tmp_path_factory):
    return draw(folder, tmp_path_factory.mktemp("plain"))


CHANGES = [  # flags, what they change of the decoder's sampling and of the prior's; None: no prior is sampled
    (["--from=text"], {}, None),
    (["--from=caption"], {}, None),
    (["--steps=2"], {"steps": "2"}, {}),
    (["--sampler=ddpm", "--prior-steps=5"], {"sampler": "ddpm"}, {"steps": "5"}),
    (["--fast", "--steps=3"], {"sampler": "dpm++", "steps": "3"}, {"sampler": "dpm++", "steps": "10"}),
    (["--eta=1", "--steps=ddim4"], {"eta": 1.0, "steps": "ddim4"}, {}),
]


@pytest.mark.parametrize(
    ("flags", "decoder", "prior"),
    [
        pytest.param(*change, id=" ".join(change[0]), marks=[pytest.mark.slow] * (i in (1, 3, 4)))
        for i, change in enumerate(CHANGES)
    ],
)
def test_flag_changes_the_pictures_and_they_can_be_drawn_again(folder, plain, tmp_path, flags, decoder, prior):
    images, settings = draw(folder, tmp_path / "out", *flags)
    assert not np.array_equal(images, plain[0])  # which they would be if the flag said nothing: the program is the same
    before = plain[1]["sampling"]
    assert settings["sampling"]["decoder"] == before["decoder"] | decoder
    assert settings["sampling"].get("prior") == (None if prior is None else before["prior"] | prior)
    assert (plain[1]["from"], settings["from"]) == ("prior", flags[0][7:] if "from" in flags[0] else "prior")
    np.testing.assert_array_equal(again(tmp_path / "out" / NAMES[1], tmp_path / "again"), images[1])
    assert stored(tmp_path / "out")["models"] == plain[1]["models"]


@pytest.mark.slow
def test_a_file_of_prompts_heeds_the_flags_too(folder, tmp_path):
    (tmp_path / "captions.txt").write_text("\n".join(PROMPTS))
    flags = ["--from=caption", "--steps=2", "--sampler=ddpm", "--format=png", "-n=1"]
    bulk = ["sample", f"--bundle={folder}", f"--prompts={tmp_path / 'captions.txt'}", f"--out={tmp_path / 'bulk'}"]
    with compilation_cache():
        assert sample.main([*bulk, *flags]) == 0
        with pytest.raises(UserError, match="differs in sampling: give another --out"):
            sample.main([*bulk, *flags, "--steps=3"])
        with pytest.raises(UserError, match="differs in from: "):
            sample.main([*bulk, *flags, "--from=text"])
    images, _ = draw(folder, tmp_path / "out", *flags[:3])
    for row, image in enumerate(images):
        drawn = np.asarray(Image.open(tmp_path / "bulk" / f"{row:08d}_000.png")).astype(int)
        assert np.abs(drawn - image).max() <= 1


def test_sources_are_what_they_are_called(folder):
    """The decoder is given the text's embedding, or none, where the prior's would be."""
    with compilation_cache():
        cascade = Cascade.load(str(folder))
        z_t = cascade.text_embeddings(PROMPTS)
        drawn = {source: cascade.generate(PROMPTS, 3, source=source) for source in (None, "prior", "text", "caption")}
        given = cascade.generate(PROMPTS, 3, embeddings=z_t)
        key = RowKeys.of(seed_key(3), 2).split(3)[1]
        nothing = cascade._decode(None, PROMPTS, key, None)
    np.testing.assert_array_equal(drawn["prior"]["images"][0], drawn[None]["images"][0])
    np.testing.assert_array_equal(drawn["text"]["embeddings"], z_t)
    np.testing.assert_array_equal(drawn["text"]["images"][0], given["images"][0])
    assert drawn["caption"]["embeddings"] is None
    expected = np.clip(np.round((nothing + 1) * 127.5), 0, 255)
    np.testing.assert_array_equal(drawn["caption"]["images"][0], expected)


def test_decoder_of_text_embeddings_needs_no_prior(of_text, tmp_path):
    images, settings = draw(of_text, tmp_path / "out")
    assert settings["from"] == "text" and settings["sampling"].keys() == {"decoder"}
    caption, _ = draw(of_text, tmp_path / "caption", "--from=caption")
    assert not np.array_equal(caption, images)
    np.testing.assert_array_equal(again(tmp_path / "out" / NAMES[1], tmp_path / "again"), images[1])
    picture = np.zeros((16, 16, 3), np.uint8)
    with pytest.raises(UserError, match="edits need one of pictures' embeddings"):
        Cascade.load(str(of_text)).variations(picture, 1, 1.0, 0, steps=3)


def test_without_a_prior_text_and_caption_can_be_drawn(folder, tmp_path):
    for name in ("clip", "decoder"):
        (tmp_path / name).symlink_to(folder / name)
    with pytest.raises(UserError, match=r"no prior/: .*'text' or 'caption'"):
        draw(tmp_path, tmp_path / "out")
    assert draw(tmp_path, tmp_path / "out", "--from=caption")[1]["from"] == "caption"


def test_dot_percentile_is_of_the_autoregressive_prior(autoregressive, tmp_path):
    _, settings = draw(autoregressive, tmp_path / "out", "--dot-percentile=99", "--from=prior", "--fast")
    assert settings["sampling"]["decoder"]["sampler"] == "dpm++"
    assert settings["sampling"]["prior"]["dot_percentile"] == 99.0
    cascade = Cascade.load(str(autoregressive))
    assert cascade.sampled_by({}, {"dot_percentile": 99.0}).prior.stage.config.sampling.dot_percentile == 99.0
    with pytest.raises(UserError, match=r"sampling.steps: the prior has none, but dot_percentile, guidance_scale"):
        draw(autoregressive, tmp_path / "out", "--prior-steps=3")
    with pytest.raises(UserError, match=r"--dot-percentile: '101': expected a number from 0 to 100"):
        draw(autoregressive, tmp_path / "out", "--dot-percentile=101")


REFUSED = [
    (["--steps=0"], "expected between 1 and 1000 in section 1, not 0"),
    (["--steps=1001"], "expected between 1 and 1000 in section 1, not 1001"),
    (["--prior-steps=0"], "expected between 1 and 1000 in section 1, not 0"),
    (["--sampler=analytic"], "'analytic', which decoder does not estimate variances for"),
    (["--sampler=euler"], "invalid choice: 'euler'"),
    (["--sampler=ddpm", "--eta=0.5"], "sampling.eta is of ddim, and the decoder is sampled by ddpm"),
    (["--eta=2"], "--eta: '2': expected a number from 0 to 1"),
    (["--eta=nan"], "'nan': expected a finite number"),
    (["--dot-percentile=50"], "sampling.dot_percentile: the prior has none, but"),
    (["--from=text", "--prior-steps=3"], "--prior-steps is of a prior, which this run does not draw from"),
    (["--from=caption", "--prior-guidance=3"], "--prior-guidance is of a prior, which"),
    (["--from=picture"], "invalid choice: 'picture'"),
    (["--clip-guidance=2"], "CLIP guidance needs a noised CLIP"),
]


@pytest.mark.parametrize(("flags", "says"), REFUSED, ids=[" ".join(flags) for flags, _ in REFUSED])
def test_what_cannot_be_drawn_is_one_line(folder, tmp_path, flags, says):
    with pytest.raises(UserError, match=says) as caught:
        draw(folder, tmp_path / "out", *flags)
    assert "\n" not in str(caught.value) and not list((tmp_path / "out").glob("*.png"))


def test_a_file_of_prompts_that_cannot_be_drawn_begins_nothing(folder, tmp_path):
    (tmp_path / "captions.txt").write_text(PROMPTS[0])
    words = [f"--bundle={folder}", f"--prompts={tmp_path / 'captions.txt'}", f"--out={tmp_path / 'out'}"]
    with pytest.raises(UserError, match="CLIP guidance needs a noised CLIP"):
        sample.main(["sample", *words, "--clip-guidance=2"])
    assert not (tmp_path / "out").exists()


def test_source_that_the_decoder_never_learned_is_refused(of_text, tmp_path, folder):
    with pytest.raises(UserError, match="drawing from 'prior': this decoder learned embeddings of captions"):
        draw(of_text, tmp_path / "out", "--from=prior")
    cascade = Cascade.load(str(of_text))
    with pytest.raises(UserError, match="drawing from 'picture': expected one of prior, text, caption"):
        cascade.generate(PROMPTS, 0, source="picture")
    with cascade.decoder.stage.config.unlocked():
        cascade.decoder.stage.config.diffusion.drop_embedding = 0.0
    with pytest.raises(UserError, match="drawing from 'caption': this decoder was never trained without"):
        cascade.generate(PROMPTS, 0, source="caption")
    alone = Cascade(None, None, cascade.decoder, [])  # as GLIDE's is
    assert alone.source() is None
    with pytest.raises(UserError, match="drawing from 'text': this decoder takes captions alone"):
        alone.check_prompts(PROMPTS, "text")


def test_sampler_that_a_prior_was_not_trained_for_is_refused(folder, tmp_path):
    for name in ("clip", "decoder"):
        (tmp_path / name).symlink_to(folder / name)
    clip = load_description(folder / "clip")["identity"]
    save_stage(tmp_path / "prior", "prior_diffusion", clip, **{"sampling.sampler": "ddpm"})
    with pytest.raises(UserError, match="the prior has no variances: train it with that sampler"):
        Cascade.load(str(tmp_path)).sampled_by({}, {"sampler": "analytic"})


def test_the_choices_of_flags_are_those_of_the_library():
    """They are written down twice, so that reading the command line imports no JAX."""
    assert sample.SOURCES == chain.SOURCES and sample.SAMPLERS == config_values.SAMPLERS


def test_pictures_come_from_what_the_source_says(folder):
    cascade = Cascade.load(str(folder))
    with compilation_cache():
        drawn = {source: cascade.generate(PROMPTS, 0, source=source) for source in chain.SOURCES}
    np.testing.assert_array_equal(drawn["text"]["embeddings"], cascade.text_embeddings(PROMPTS))
    assert drawn["caption"]["embeddings"] is None and drawn["prior"]["embeddings"] is not None
    for one, other in itertools.combinations(drawn.values(), 2):
        assert not np.array_equal(one["images"][0], other["images"][0])
