"""Whole pipelines of the diffusers library beside our cascade: the same folder, captions or picture, and noise in, the
same pictures out."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import tiny_unclip
from diffusers.schedulers import scheduling_unclip
from PIL import Image

from unclip_jax.cascade import Cascade
from unclip_jax.errors import UserError
from unclip_jax.keys import RowKeys, draw_rows, fold_in, seed_key, split
from unclip_jax.pretrained.__main__ import main

# Commas, an accent, capitals; more tokens than either variant reads.
CAPTIONS = ["the red apple", "A café, l'eau & 3 BIG apples, cut off in the end"]
SEED = 5
LIMITS = {"exact": 2e-5, "its own": 1e-3}  # 1.0e-5 was seen; how sums are rounded differs between processors


def noises(key, shape, steps):
    """(x_T, the noise of every step but the last, as it is taken) of a stage that is given a key for each row."""
    key_start, key_steps = split(key)
    later = [np.asarray(draw_rows(jax.random.normal, fold_in(key_steps, i), shape)) for i in range(steps)]
    return np.asarray(draw_rows(jax.random.normal, key_start, shape)), later[:0:-1]


def torch_noises(keys, shapes, steps):
    """(every stage's x_T, all later noise in the order that diffusers asks for it), in PyTorch's layout."""
    first, later = [], []
    for key, shape, count in zip(keys, shapes, steps, strict=True):
        x_T, rest = noises(key, shape, count)
        first.append(to_torch(x_T))
        later += [to_torch(noise) for noise in rest]
    return first, later


def to_torch(array):
    return torch.from_numpy(np.moveaxis(array, -1, 1).copy() if array.ndim == 4 else array.copy())


def as_shares(images):
    """[-1, 1] → [0, 1], as diffusers gives pictures out."""
    return np.clip(images / 2 + 0.5, 0, 1)


@pytest.fixture(scope="module", params=tiny_unclip.VARIANTS)
def place(request, tmp_path_factory):
    """(variant, pipelines of diffusers by kind, folder with ours_text/ and ours_image/, our cascades made of them)."""
    folder = tmp_path_factory.mktemp(f"unclip_{request.param}")
    pipelines = dict(zip(("text", "image"), tiny_unclip.pipelines(request.param, folder), strict=True))
    for kind, pipeline in pipelines.items():
        pipeline.save_pretrained(folder / kind)
        assert main(["pretrained", "karlo", str(folder / kind), "--out", str(folder / f"ours_{kind}")]) == 0
    return request.param, pipelines, folder


@pytest.fixture(params=["exact", "its own"])
def tables(request, place, monkeypatch):
    """Which tables diffusers' schedulers have; in float32, as they are, each last step scales a picture by 0.9995."""
    if request.param == "exact":
        for pipeline in place[1].values():
            for part in ("prior_scheduler", "decoder_scheduler", "super_res_scheduler"):
                if hasattr(pipeline, part):
                    scheduler = tiny_unclip.exact_scheduler(**getattr(pipeline, part).config)
                    monkeypatch.setattr(pipeline, part, scheduler)
    return request.param


def shapes(name, rows):
    v = tiny_unclip.VARIANTS[name]
    sides = (v[part]["sample_size"] for part in ("decoder", "super_res"))
    return [(rows, v["dim"]), *((rows, side, side, 3) for side in sides)]


def close(seen, name, ours, reference, tables):
    """Pictures of 0 to 1. Single pixels may differ more, where one that is about to be clipped is not."""
    error = np.abs(ours - reference).mean()
    seen(f"{name}, {tables} tables, mean difference of pictures", error)
    assert error < LIMITS[tables]
    # Not all black and white, nor all one grey.
    assert np.mean((reference > 0.01) & (reference < 0.99)) > 0.5 and reference.std() > 0.02


@pytest.fixture(scope="module")
def from_captions(place):
    """(noise for diffusers, our pictures as floats, and as `generate` gives them): drawn once for all tables."""
    name, _, folder = place
    cascade = Cascade.load(str(folder / "ours_text"))
    keys = RowKeys.of(seed_key(SEED), len(CAPTIONS)).split(3)
    rows = [fold_in(keys[0].make(), 0), keys[1].make(), keys[2].split(1)[0].make()]  # of the prior's only draw, first
    noise = torch_noises(rows, shapes(name, len(CAPTIONS)), (25, 25, 7))
    embeddings = cascade.embeddings(CAPTIONS, keys[0])
    images = cascade._upsample(cascade._decode(embeddings, CAPTIONS, keys[1], None), CAPTIONS, keys[2])[0]
    return noise, as_shares(images), cascade.generate(CAPTIONS, SEED)["images"][1]


def test_captions_to_pictures(place, tables, from_captions, seen, monkeypatch):
    ((prior, decoder, super_res), later), ours, drawn = from_captions
    later = iter(later)
    monkeypatch.setattr(scheduling_unclip, "randn_tensor", lambda *args, **rest: next(later))
    theirs = place[1]["text"](
        CAPTIONS, prior_latents=prior, decoder_latents=decoder, super_res_latents=super_res, output_type="np"
    ).images
    assert next(later, None) is None
    close(seen, "captions to pictures", ours, theirs, tables)
    assert np.abs(drawn - 255 * theirs).mean() < 0.3 + 255 * LIMITS[tables]  # rounding to 8 bits alone makes it 0.25


def test_pictures_to_variations(place, tables, seen, monkeypatch):
    """Karlo's variations: CLIP embedding of a picture, no caption, fresh noise."""
    name, pipelines, folder = place
    cascade = Cascade.load(str(folder / "ours_image"))
    pictures = [_picture(40, 90, 1), _picture(70, 33, 2)]
    pipeline, extractor = pipelines["image"], pipelines["image"].feature_extractor
    pixels = extractor(images=pictures, return_tensors="pt").pixel_values
    embeddings = cascade.image_embeddings([np.asarray(picture) for picture in pictures])
    with torch.no_grad():
        expected = pipeline.image_encoder(pixels).image_embeds.numpy()
    error = np.abs(embeddings - expected).max() / np.abs(expected).max()
    seen("CLIP embeddings of pictures", error)
    assert error < 1e-4

    keys = RowKeys.of(seed_key(SEED), 2).split(2)
    rows = [keys[0].make(), keys[1].split(1)[0].make()]
    (decoder, super_res), later = torch_noises(rows, shapes(name, 2)[1:], (25, 7))
    later = iter(later)
    monkeypatch.setattr(scheduling_unclip, "randn_tensor", lambda *args, **rest: next(later))
    theirs = pipeline(
        pictures, decoder_latents=decoder, super_res_latents=super_res, output_type="np"
    ).images
    assert next(later, None) is None
    small = cascade._decode(embeddings, ["", ""], keys[0], None)
    close(seen, "pictures to variations", as_shares(cascade._upsample(small, ["", ""], keys[1])[0]), theirs, tables)
    rounded = cascade.upsample(cascade.decode(embeddings, ["", ""], keys[0]), ["", ""], keys[1])[0] / 255
    assert np.abs(rounded - theirs).mean() < 3e-3  # the small picture went through 8 bits


def test_text_tower_alone_draws_but_sees_no_pictures(place):
    cascade = Cascade.load(str(place[2] / "ours_text"))
    with pytest.raises(UserError, match="reads captions alone"):
        cascade.image_embeddings([np.zeros((40, 40, 3), np.uint8)])
    with pytest.raises(UserError, match="no prior/"):
        Cascade.load(str(place[2] / "ours_image")).generate(["a red apple"], 0)


def _picture(height, width, seed):
    """Random blots, so that resizing matters but is not all."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3)).astype(np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR)
