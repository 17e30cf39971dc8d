"""BSR degradation against its description: the numbers are those of latent diffusion's `bsrgan_light`."""

import io
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
from PIL import Image
from shrink import random_batch, small_config

from unclip_jax import train
from unclip_jax.data import bsr, emoji_scenes
from unclip_jax.data.bsr import blur, degrade, gaussian_kernel, jpeg, noise, noise_root, sampling_kernel, shrink
from unclip_jax.data.pipeline import batches
from unclip_jax.data.sources import open_source
from unclip_jax.data.transforms import ToExample
from unclip_jax.diffusion.corruption import upsample
from unclip_jax.errors import UserError
from unclip_jax.stages import make_stage

METHODS = ("bilinear", "bicubic", "area")


def rng(seed=0):
    return np.random.default_rng(seed)


def picture(height, width, seed=0):
    """Soft blobs, uint8."""
    coarse = Image.fromarray(rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def area(image, factor=4):
    """Means of blocks, float."""
    h, w, _ = image.shape
    return image.reshape(h // factor, factor, w // factor, factor, 3).mean(axis=(1, 3))


def near_share(count, share, n):
    """Within 4.5 standard deviations of what n draws at this share give."""
    return abs(count - share * n) < 4.5 * (share * (1 - share) * n) ** 0.5


def near_uniform(values, low, high):
    """All inside, and in each fifth of the range as many as there should be."""
    counts, _ = np.histogram(values, bins=5, range=(low, high))
    return counts.sum() == len(values) and all(near_share(count, 0.2, len(values)) for count in counts)


@pytest.fixture
def spied(monkeypatch):
    """spied(name, stub) → the calls of bsr's function `name` from now on; `stub`, where given, in its place."""

    def spy(name, stub=None):
        calls, function = [], stub or getattr(bsr, name)
        monkeypatch.setattr(bsr, name, lambda *args: calls.append(args) or function(*args))
        return calls

    return spy


SIZES = [((256, 256), 4, (64, 64)), ((67, 130), 4, (16, 32)), ((33, 31), 2, (16, 15)), ((50, 49), 3, (16, 16)),
         ((16, 16), 8, (2, 2)), ((4, 5), 4, (1, 1))]  # fmt: skip


@pytest.mark.parametrize(("shape", "factor", "expected"), SIZES)
def test_size(shape, factor, expected):
    for seed in range(12):
        small = degrade(picture(*shape), factor, rng(seed))
        assert small.shape == (*expected, 3) and small.dtype == np.uint8


def test_nothing_left():
    with pytest.raises(ValueError, match=r"\(3, 9, 3\).*divided by 4"):
        degrade(np.zeros((3, 9, 3), np.uint8), 4, rng())


def test_same_randomness_same_bytes():
    image = picture(64, 64)
    before = image.copy()
    first = [degrade(image, 4, rng(k)) for k in range(20)]
    for k, small in enumerate(first):
        np.testing.assert_array_equal(degrade(image, 4, rng(k)), small)
    assert len({small.tobytes() for small in first}) == 20
    np.testing.assert_array_equal(image, before)


def test_plain_colours_stay():
    """Up to noise of two levels and JPEG: no operation makes a picture brighter, darker or another colour."""
    moved, colours = [], rng(8).integers(30, 226, (160, 3))
    for k, colour in enumerate(colours):
        small = degrade(np.broadcast_to(colour, (64, 64, 3)).astype(np.uint8), 4, rng(k)).astype(float)
        assert np.abs(small - colour).max() <= 16  # eight standard deviations
        moved.append(small.mean(axis=(0, 1)) - colour)
    assert np.abs(moved).max() < 2.5 and np.abs(np.mean(moved, axis=0)).max() < 0.2
    for extreme in (0, 255):
        small = degrade(np.full((64, 64, 3), extreme, np.uint8), 4, rng(9)).astype(float)
        assert np.abs(small - extreme).mean() < 4


def test_every_operation_once_in_random_order_and_shrink_before_the_final_resize(spied):
    trace, n = [], 3000

    def stub(name, result=lambda image, *_: image):
        spied(name, lambda *args: trace.append((name, *args[1:2])) or result(*args))

    for name in ("shrink", "blur", "noise", "jpeg"):
        stub(name)
    stub("resize", lambda image, size, method: np.zeros((*size, 3), np.float32))
    orders, halved, compressed, generator = {}, 0, 0, rng(1)
    for _ in range(n):
        trace.clear()
        degrade(np.zeros((16, 24, 3), np.uint8), 4, generator)
        half = trace[0] == ("resize", (8, 12))
        halved += half
        assert trace[half:].count(("resize", (4, 6))) == 1
        for name in ("shrink", "blur"):  # told the factor that is left
            assert dict(trace)[name] == (2 if half else 4)
        *names, last = (name for name, *_ in trace[half:])
        assert last == "jpeg"
        compressed += "jpeg" in names
        assert sorted(set(names) - {"jpeg"}) == ["blur", "noise", "resize", "shrink"]
        assert len(names) == 4 + ("jpeg" in names)
        assert names.index("shrink") < names.index("resize")
        if "jpeg" in names:
            orders[tuple(names)] = orders.get(tuple(names), 0) + 1
    assert near_share(halved, 0.25, n) and near_share(compressed, 0.9, n)
    # Of 120 orders of five, those with a given two in one order: 60, equally likely.
    assert len(orders) == 60 and all(near_share(count, 1 / 60, compressed) for count in orders.values())


def test_only_by_four_is_halved_first_and_by_any_method(spied):
    calls, n = spied("resize", lambda image, size, method: np.zeros((*size, 3), np.float32)), 2000
    for name in ("shrink", "blur", "noise", "jpeg"):
        spied(name, lambda image, *_: image)
    generator = rng(2)
    for _ in range(n):
        degrade(np.zeros((16, 16, 3), np.uint8), 4, generator)
    half = [method for _, size, method in calls if size == (8, 8)]
    last = [method for _, size, method in calls if size == (4, 4)]
    assert near_share(half.count("antialiased_bicubic"), 0.5, len(half)) and len(last) == n
    for method in METHODS:
        assert near_share(half.count(method), 1 / 6, len(half)) and near_share(last.count(method), 1 / 3, n)
    calls.clear()
    for factor in (2, 3, 8):
        for _ in range(40):
            degrade(np.zeros((24, 24, 3), np.uint8), factor, generator)
    assert len(calls) == 3 * 40


@pytest.mark.parametrize(("angle", "along", "across"), [(0, 4, 1), (np.pi / 2, 4, 1), (0.7, 5, 1.5), (2.5, 2, 2)])
@pytest.mark.parametrize("size", [34, 35])
def test_kernels_have_the_covariance_asked_for(size, angle, along, across):
    kernel = gaussian_kernel(size, angle, along, across)
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    moments = [(kernel * m).sum() for m in (1, x, y, x * x, x * y, y * y)]
    c, s = np.cos(angle), np.sin(angle)
    xx, xy, yy = along * c * c + across * s * s, (along - across) * c * s, along * s * s + across * c * c
    np.testing.assert_allclose(moments, [1, 0, 0, xx, xy, yy], atol=1e-6)


@pytest.mark.parametrize("variances", [(1e-17, 1e-17), (2, 1e-12)])
@pytest.mark.parametrize("size", [5, 6])
def test_narrowest_kernels_have_sum_one(size, variances):
    assert gaussian_kernel(size, 0.3, *variances).sum() == pytest.approx(1)


@pytest.mark.parametrize("factor", [2, 4])
def test_blur_draws_its_kernels(spied, factor):
    long, round_, n = spied("gaussian_kernel"), spied("blur_matrix"), 2000
    generator = rng(3)
    spied("_convolve", lambda image, kernel: image)
    for _ in range(n):
        blur(np.zeros((4, 4, 3), np.float32), factor, generator)
    assert near_share(len(long), 0.5, n) and 2 * (n - len(long)) == len(round_)
    sizes, angles, along, across = (np.array(values, float) for values in zip(*long, strict=True))
    assert near_uniform(sizes, 4.5, 14.5) and set(sizes) == set(range(5, 15))
    assert near_uniform(angles, 0, np.pi)
    for variances in (along, across):
        assert near_uniform(variances, 0, {2: 1.5, 4: 2.0}[factor])  # (4 + factor) / 4
    weights = [w for _, w in round_[::2]]
    assert {len(w) for w in weights} == {5, 6, 7}
    # The ratio of the middle two of six pixels to those beside them is exp((1.5² - 0.5²) / 2 std²).
    ratios = np.array([w[2] / max(w[1], 1e-300) for w in weights if len(w) == 6])
    assert near_uniform(1 / np.sqrt(np.log(ratios)), 0, {2: 0.6, 4: 0.7}[factor])  # (2 + 0.2 factor) / 4
    np.testing.assert_allclose([w.sum() for w in weights], 1)


def test_blur_is_scipys_convolution_with_the_kernel(spied):
    image = rng(4).random((30, 23, 3)).astype(np.float32)
    long, round_ = spied("gaussian_kernel"), spied("blur_matrix")
    for seed in range(60):
        long.clear(), round_.clear()
        blurred = blur(image, 4, rng(seed))
        kernel = gaussian_kernel(*long[0]) if long else np.outer(round_[0][1], round_[0][1])
        expected = scipy.ndimage.convolve(image, kernel[..., None], mode="mirror")
        np.testing.assert_allclose(blurred, expected, atol=5e-5)


def test_shrink_resizes_four_of_five_to_a_uniform_fraction(spied):
    calls, n, side = spied("resize", lambda image, size, method: image), 2000, 840
    generator, image = rng(5), np.zeros((side, side, 3), np.float32)
    spied("apply_separable", lambda image, *_: image)
    for _ in range(n):
        shrink(image, 4, generator)
    assert near_share(len(calls), 0.8, n)
    assert all(near_share(sum(call[2] == method for call in calls), 1 / 3, len(calls)) for method in METHODS)
    assert all(h == w for _, (h, w), _ in calls)
    assert near_uniform([side / (h + 0.5) for _, (h, _), _ in calls], 1 - 1e-3, 8 + 1e-2)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_sampling_kernel_lies_in_the_middle_of_a_block(factor):
    places = np.arange(25) - 12
    for std in (1.0, 1.7):
        kernel = sampling_kernel(factor, std)
        mean = (kernel * places).sum()
        # Halfway between two pixels, interpolation adds the variance of two points half a pixel off.
        variance = std**2 + (0.25 if factor % 2 == 0 else 0)
        moments = [kernel.sum(), mean, (kernel * (places - mean) ** 2).sum()]
        np.testing.assert_allclose(moments, [1, (factor - 1) / 2, variance], atol=2e-4)


def test_shrink_by_sampling_keeps_every_place(spied):
    """A ramp is its own average: every pixel must show the middle of its block."""
    calls = spied("sampling_kernel")
    ramp = np.broadcast_to(np.linspace(0.1, 0.9, 120, dtype=np.float32), (120, 120))
    image = np.stack([ramp, ramp.T, ramp], axis=-1)
    generator, expected = rng(6), area(image)
    while len(calls) < 40:
        before = len(calls)
        small = shrink(image, 4, generator)
        if len(calls) > before:
            np.testing.assert_allclose(small[4:-4, 4:-4], expected[4:-4, 4:-4], atol=1e-5)
    assert near_uniform([std for _, std in calls], 0.1, 2.4)


def test_noise_is_grey_coloured_or_correlated_at_one_of_two_levels(spied):
    root = np.array([[1, 0, 0], [0.5, 0.5, 0], [0, 2, 1]]) / 255
    roots, generator, n, kinds = spied("noise_root", lambda generator: root), rng(7), 600, []
    for _ in range(n):
        before = len(roots)
        drawn = 255 * (noise(np.full((50, 50, 3), 0.5, np.float32), generator) - 0.5).reshape(-1, 3)
        covariance = drawn.T @ drawn / len(drawn)
        if len(roots) > before:
            kinds.append("correlated")
            np.testing.assert_allclose(covariance, 255**2 * root @ root.T, atol=0.6)
            continue
        level = round(covariance[0, 0] ** 0.5)
        grey = np.array_equal(drawn[:, 0], drawn[:, 2])
        kinds.append(("grey" if grey else "coloured", level))
        np.testing.assert_allclose(covariance / level**2, np.ones((3, 3)) if grey else np.eye(3), atol=0.15)
    assert near_share(kinds.count("correlated"), 0.2, n)
    for kind in ("grey", "coloured"):
        for level in (1, 2):
            assert near_share(kinds.count((kind, level)), 0.2, n)


def test_covariance_of_correlated_noise():
    """|L² Uᵀ D U|: L = 2/255, D diagonal and uniform, U an orthonormal basis of a random 3 x 3 matrix."""
    for seed in range(50):
        same = rng(seed)
        basis, diagonal = scipy.linalg.orth(same.random((3, 3))), np.diag(same.random(3))
        root = noise_root(rng(seed))
        np.testing.assert_allclose(255**2 * root @ root.T, 4 * np.abs(basis.T @ diagonal @ basis), atol=1e-9)


def test_noise_and_resizing_stay_in_range():
    steps = np.zeros((16, 16, 3), np.float32)
    steps[:, 8:] = 1
    for seed in range(30):
        for image in (noise(steps, rng(seed)), shrink(steps, 4, rng(seed)), bsr.resize(steps, (31, 31), "bicubic")):
            assert image.min() >= 0 and image.max() <= 1 and image.dtype == np.float32


def test_jpeg_is_pillows_at_a_uniform_quality(monkeypatch):
    saved, through = [], bsr._through_jpeg

    def spy(image, quality):
        saved.append(quality)
        return through(image, quality)

    monkeypatch.setattr(bsr, "_through_jpeg", spy)
    levels = picture(16, 24)
    results = [jpeg(levels / np.float32(255), rng(seed)) for seed in range(800)]
    assert set(saved) == set(range(80, 96)) and all(near_share(saved.count(q), 1 / 16, 800) for q in set(saved))
    monkeypatch.undo()
    for quality, result in list(zip(saved, results, strict=True))[:40]:
        file = io.BytesIO()
        Image.fromarray(levels).save(file, "JPEG", quality=quality)
        np.testing.assert_allclose(255 * result, np.asarray(Image.open(file)), atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1), (7, 16), (16, 17), (64, 64), (130, 9)])
def test_opencv_changes_nothing(shape, without_opencv):
    images = [picture(*shape, seed) for seed in range(3)]
    fast = [degrade(image, 1, rng(k)) for k, image in enumerate(images)]
    files = [bsr._through_jpeg(image, quality) for image in images for quality in range(80, 96)]
    without_opencv()
    for k, image in enumerate(images):
        np.testing.assert_array_equal(degrade(image, 1, rng(k)), fast[k])
        for quality in range(80, 96):
            np.testing.assert_array_equal(bsr._through_jpeg(image, quality), files[16 * k + quality - 80])


# What the steps of CompVis's code (ldm/modules/image_degradation/bsrgan_light.py, with OpenCV 5.0) do to these patches:
# percentiles of the PSNR in dB to the plain average, over REFERENCE draws.
PSNR, REFERENCE = {2: 15.46, 10: 17.50, 25: 19.31, 50: 22.13, 75: 25.48, 90: 27.86, 98: 30.37}, 300


def emoji_patches():
    """Patches of 256 pixels with much to see in them."""
    scenes = [scene for scene, _ in zip(emoji_scenes.scenes("pair", "train"), range(12), strict=False)]
    for scene, _ in scenes:
        image = emoji_scenes.render(scene, 1024)
        corners = [(y, x) for y in range(0, 769, 64) for x in range(0, 769, 64)]
        patches = [image[y : y + 256, x : x + 256] for y, x in corners]
        yield max(patches, key=lambda patch: patch.astype(float).std())


def test_distance_to_the_plain_average_is_the_references():
    patches, n, generator = [(patch, area(patch)) for patch in emoji_patches()], 600, rng(10)
    errors = [degrade(patch, 4, generator) - small for patch, small in (patches[k % 12] for k in range(n))]
    found = 10 * np.log10(255**2 / np.mean(np.square(errors), axis=(1, 2, 3)))
    for percent, value in PSNR.items():
        share = percent / 100
        spread = (share * (1 - share) * (1 / n + 1 / REFERENCE)) ** 0.5
        assert np.mean(found < value) == pytest.approx(share, abs=3.5 * spread)


def record(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return {"image": file.getvalue(), "caption": ["one", "two", "three"], "key": "k"}


def test_example_holds_its_picture_degraded_and_is_otherwise_the_same():
    plain = ToExample({"image": 128}, {}, "dalle", 64)
    both = ToExample({"image": 128}, {}, "dalle", 64, 4)
    for seed in range(10):
        one, two = (f(record(picture(150, 170)), rng(seed)) for f in (plain, both))
        assert two["low_res"].shape == (16, 16, 3) and two["low_res"].dtype == np.uint8
        assert one.keys() | {"low_res"} == two.keys()
        np.testing.assert_array_equal(one["image"], two["image"])


def test_batches_are_repeatable_and_low_res_shows_the_patch(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(8):
        Image.fromarray(picture(160, 160, i)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("words")
    source = open_source(f"folder:{folder}", "train", "", "image", "caption")
    to_example = ToExample({"image": 128}, {}, "dalle", 64, 4)

    def third(**options):
        return next(batches(source, to_example, 16, 5, 2, **options))

    batch, again = third(), third(threads=3)
    halves = [third(rows=range(8 * i, 8 * i + 8)) for i in range(2)]
    for name in ("image", "low_res"):
        np.testing.assert_array_equal(batch[name], again[name])
        np.testing.assert_array_equal(batch[name], np.concatenate([half[name] for half in halves]))
    small = np.stack([area(image) for image in batch["image"]])
    assert np.abs(batch["low_res"] - np.roll(small, 1, axis=0)).mean() > 3 * np.abs(batch["low_res"] - small).mean()

    def error(dy, dx):
        return np.square(np.roll(batch["low_res"], (dy, dx), axis=(1, 2)) - small)[:, 2:-2, 2:-2].mean()

    for axis in (0, 1):  # the parabola through three errors has its least near no shift (even kernels move a little)
        before, here, after = (error(*np.roll((shift, 0), axis)) for shift in (-1, 0, 1))
        assert here < min(before, after)
        assert abs((before - after) / (before + after - 2 * here) / 2) < 0.25


def bsr_stage(degradation="bsr"):
    config = small_config("upsampler_1024").unlock()
    config.diffusion.degradation = degradation
    return make_stage(config.lock())


def test_batch_spec_is_what_the_pipeline_makes():
    for degradation in ("bsr", "blur"):
        stage = bsr_stage(degradation)
        to_example = ToExample(stage.images, {}, stage.config.data.crop, stage.patch, stage.bsr_factor)
        example = to_example(record(picture(300, 300)), rng())
        expected = {name: (spec.shape[1:], spec.dtype) for name, spec in stage.batch_spec(2).items()}
        assert {name: (value.shape, value.dtype) for name, value in example.items()} == expected
        assert ("low_res" in expected) == (degradation == "bsr")


def test_loss_is_given_the_degraded_picture_enlarged_and_nothing_else_of_it(monkeypatch):
    """In place of the U-Net: what lies beside x_t is its answer, and the loss the error of that answer."""
    stage = bsr_stage()
    m, echo = stage.config.model, SimpleNamespace(apply=lambda variables, x, *args, **options: x[..., 3:])
    monkeypatch.setattr(type(stage), "_unet", lambda self: echo)
    config = stage.config.copy_and_resolve_references().unlock()
    config.diffusion.update(dict(predicts="x0", learned_variance=False, snr_clip=()))
    stage, batch = make_stage(config.lock()), random_batch(stage, 4)
    beside = upsample(jnp.asarray(batch["low_res"] / 127.5 - 1, jnp.float32), m.patch, m.interpolation)
    loss, _ = jax.jit(stage.loss)({}, {}, batch, jax.random.key(0))
    np.testing.assert_allclose(loss, np.square(beside - (batch["image"] / 127.5 - 1)).mean(), rtol=1e-5)


@pytest.mark.parametrize("name", ["upsampler_256", "upsampler_1024"])
def test_unknown_degradation_is_refused(name, tmp_path):
    config = small_config(name).unlock()
    config.diffusion.degradation = "bsrgan"
    with pytest.raises(UserError, match=r"diffusion.degradation is 'bsrgan'.*blur, bsr"):
        train.check_config(config.lock(), str(tmp_path))
