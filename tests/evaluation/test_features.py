"""Features of pictures: equal for every batch and number of devices; what is refused."""

import json

import jax
import numpy as np
import pytest
from shrink import CAPTIONS, random_params, small_config, tokenizer_bytes

from unclip_jax.bundle import load_bundle, save_bundle
from unclip_jax.data.transforms import center_square
from unclip_jax.errors import UserError
from unclip_jax.evaluation import features
from unclip_jax.evaluation.devices import OnDevices, rebatched
from unclip_jax.models.inception import resize
from unclip_jax.stages import make_stage


def pictures(n, side=20, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3)).astype(np.uint8)


def test_rows_come_back_in_order_for_every_batch_and_device():
    def function(shared, rows):
        return {"sum": shared + rows.sum(axis=1), "rows": rows}

    values = np.arange(46, dtype=np.float32).reshape(23, 2)
    for devices in (1, 3, 8):
        for rows in (1, 4):
            run = OnDevices(function, np.float32(100), rows, jax.devices()[:devices])
            for size in (1, 5, 23):
                batches = list(run(values[i : i + size] for i in range(0, 23, size)))
                found = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
                np.testing.assert_array_equal(found["rows"], values)
                np.testing.assert_array_equal(found["sum"], 100 + values.sum(axis=1))
    assert list(run([])) == []


def test_each_device_takes_its_own_rows_alone():
    seen = []
    run = OnDevices(lambda shared, rows: seen.append(rows.shape) or rows, np.float32(0), 3)
    assert len(np.concatenate(list(run([np.zeros((50, 2), np.float32)])))) == 50
    assert seen == [(3, 2)]  # traced once, for the rows of one device


def test_rebatched():
    parts = [np.arange(n) for n in (3, 0, 9, 1)]
    batches = list(rebatched(parts, 4))
    assert [len(batch) for batch in batches] == [4, 4, 4, 1]
    np.testing.assert_array_equal(np.concatenate(batches), np.concatenate(parts))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (7, 400), (299, 299), (500, 1), (300, 298)])
def test_resize_is_tensorflow_1s(height, width):
    """Its rule, pixel by pixel: i * length / 299, and the fraction of the way to the next pixel or the last."""
    images = np.random.default_rng(0).integers(0, 256, (2, height, width, 3)).astype(np.float32)
    found = np.asarray(resize(images, 299))
    assert found.shape == (2, 299, 299, 3)
    rng = np.random.default_rng(1)
    for y, x in [(0, 0), (298, 298), *rng.integers(0, 299, (40, 2))]:
        v, u = y * height / 299, x * width / 299
        top, left = int(v), int(u)
        down, right = min(top + 1, height - 1), min(left + 1, width - 1)
        a = images[:, top, left] * (1 - (u - left)) + images[:, top, right] * (u - left)
        b = images[:, down, left] * (1 - (u - left)) + images[:, down, right] * (u - left)
        np.testing.assert_allclose(found[:, y, x], a * (1 - (v - top)) + b * (v - top), atol=0.02)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    config = small_config("clip")
    folder = tmp_path_factory.mktemp("clip") / "clip"
    config = config.copy_and_resolve_references().unlock()
    config.dtype = "bfloat16"  # what it was trained in; it is measured in float32
    save_bundle(folder, "clip", config, random_params(make_stage(config)), tokenizer_bytes(), "", {})
    return folder


def test_clip_embeds_pictures_and_captions(clip_folder):
    clip = features.clip(clip_folder, rows=2)
    images = pictures(11)
    found = clip.pictures(images)["image"]
    assert found.shape == (11, 8) and found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)
    assert clip.pictures.card["network"] == "CLIP" and len(clip.pictures.card["weights"]) == 64
    batches = (images[i : i + 3] for i in range(0, 11, 3))
    np.testing.assert_array_equal(clip.pictures(batches)["image"], found)
    one = features.clip(clip_folder, rows=2, devices=jax.devices()[:1])
    np.testing.assert_array_equal(one.pictures(images)["image"], found)
    stage, params = make_stage(small_config("clip")), load_bundle(clip_folder).params
    squares = np.stack([center_square(image, 16, "area") for image in images])
    np.testing.assert_allclose(found, jax.jit(stage.embed_images)(params, squares), atol=1e-5)  # in float32

    texts = clip.captions(CAPTIONS[:5])
    np.testing.assert_array_equal(texts[3], clip.captions(CAPTIONS[3:4])[0])
    np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1, rtol=1e-6)


def test_what_cannot_be_embedded_is_refused(clip_folder, tmp_path):
    clip = features.clip(clip_folder)
    for wrong, says in (
        (pictures(2).astype(np.float32), r"pictures are float32 \(2, 20, 20, 3\): expected uint8"),
        (pictures(2)[0], r"pictures are uint8 \(20, 20, 3\)"),
        ([[1, 2]], "pictures are list"),
        ([], "no pictures"),
    ):
        with pytest.raises(UserError, match=says):
            clip.pictures(wrong)
    with pytest.raises(UserError, match="no captions"):
        clip.captions([])
    with pytest.raises(UserError, match="stage 'clip': expected an Inception-v3"):
        features.inception(clip_folder)
    with pytest.raises(UserError, match="no features pol: expected some of pool, spatial, logits"):
        features.inception(clip_folder, names=("pool", "pol"))

    noised = small_config("clip_noised")
    save_bundle(tmp_path / "noised", "clip", noised, random_params(make_stage(noised)), None, "", {})
    with pytest.raises(UserError, match="no CLIP that embeds pictures"):
        features.clip(tmp_path / "noised")


@pytest.mark.slow
def test_inception_is_the_same_for_every_batch_and_number_of_devices(inception_folder):
    names = features.NAMES
    images = pictures(5, 32)
    eight = features.inception(inception_folder, names, rows=1)
    found = eight(images)
    assert {name: value.shape for name, value in found.items()} == dict(
        pool=(5, 2048), spatial=(5, 2023), logits=(5, 1008)
    )
    assert all(value.dtype == np.float32 and value.std(axis=0).mean() > 1e-3 for value in found.values())
    again = eight(images[i : i + 2] for i in (0, 2, 4))
    one = features.inception(inception_folder, names, rows=1, devices=jax.devices()[:1])(images)
    for name in names:
        np.testing.assert_array_equal(again[name], found[name])
        np.testing.assert_array_equal(one[name], found[name])

    identity = json.loads((inception_folder / "config.json").read_text())["identity"]
    assert eight.card == {"network": "Inception-v3 of 2015", "weights": identity}
    with pytest.raises(UserError, match="bring all to one size"):
        eight([images, pictures(2, 40)])
