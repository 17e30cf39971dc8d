"""Record to example: decoding, the two crops, area averages, windows."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image, ImageOps

from unclip_jax.data import decoding
from unclip_jax.data.tokenizer import train_tokenizer
from unclip_jax.data.transforms import ToExample, area_resize, decode, square_crop
from unclip_jax.errors import UnreadableRecord, UserError


def encoded(picture, kind="PNG", **options):
    out = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(out, kind, **options)
    return out.getvalue()


def coordinates(height, width):
    """A picture whose red is each pixel's row and whose green is its column."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, 0 * rows], axis=-1).astype(np.uint8)


RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (40, 30, 3), dtype=np.uint8)


def test_decodes_as_stored():
    np.testing.assert_array_equal(decode(encoded(NOISE)), NOISE)
    np.testing.assert_array_equal(decode(encoded(NOISE[..., 0])), NOISE[..., [0, 0, 0]])
    palette = Image.fromarray(NOISE).quantize(16)
    np.testing.assert_array_equal(decode(encoded(palette)), np.asarray(palette.convert("RGB")))
    for kind in ("JPEG", "WEBP", "BMP", "GIF", "TIFF"):
        assert decode(encoded(NOISE, kind)).shape == (40, 30, 3)
    assert decode(encoded(Image.fromarray(NOISE).convert("CMYK"), "JPEG")).shape == (40, 30, 3)


def test_transparency_is_on_white():
    alpha = np.full((4, 4, 4), (200, 0, 100, 0), np.uint8)
    alpha[0, 0, 3], alpha[0, 1, 3] = 255, 51
    picture = decode(encoded(alpha))
    assert tuple(picture[3, 3]) == (255, 255, 255) and tuple(picture[0, 0]) == (200, 0, 100)
    np.testing.assert_allclose(picture[0, 1], [244, 204, 224], atol=1)  # 0.2 of the colour + 0.8 of white
    gray = Image.fromarray(np.array([[[10, 0], [10, 255]]], np.uint8), "LA")
    np.testing.assert_array_equal(decode(encoded(gray))[0, :, 0], [255, 10])
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([1, 2, 3, 4, 5, 6])
    np.testing.assert_array_equal(decode(encoded(palette, transparency=0))[0], [[255] * 3, [4, 5, 6]])


def test_camera_turned_sideways():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera's top is the picture's right: turn clockwise to see it
    picture = decode(encoded(NOISE, exif=exif.tobytes()))
    np.testing.assert_array_equal(picture, np.rot90(NOISE, -1))


def test_sixteen_bits_are_scaled():
    levels = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    np.testing.assert_array_equal(decode(encoded(levels))[0, :, 1], [0, 0, 1, 128, 255])


@pytest.mark.parametrize("data", [b"", b"no picture", encoded(NOISE)[:300], encoded(NOISE, "JPEG")[:400]])
def test_damaged(data):
    with pytest.raises(UnreadableRecord):
        decode(data)


def test_damaged_in_the_middle():
    data = bytearray(encoded(NOISE))
    data[300:320] = bytes(20)
    with pytest.raises(UnreadableRecord):
        decode(bytes(data))


def test_pictures_too_large_to_be_true(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnreadableRecord, match="DecompressionBomb"):
        decode(encoded(NOISE))


def pillows(data):
    """As Pillow alone decodes a file."""
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


def photograph(height, width):
    """Soft shapes with noise, whose colours a JPEG file stores apart from their brightness."""
    coarse = Image.fromarray(RNG.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((width, height))
    return np.clip(np.asarray(coarse) + RNG.normal(0, 9, (height, width, 3)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("shape", [(40, 30), (1, 1), (17, 9), (33, 64), (200, 131)])
@pytest.mark.parametrize(
    "options",
    [dict(subsampling=k, quality=q) for k in (0, 1, 2) for q in (30, 96)] + [dict(progressive=True), {}],
)
def test_plain_jpegs_are_pillows_to_the_last_bit(shape, options, monkeypatch):
    """And take OpenCV's way alone, grey ones too."""
    pytest.importorskip("cv2")
    photo = photograph(*shape)
    files = [encoded(photo, "JPEG", **options), encoded(photo[..., 1], "JPEG", **options)]
    expected = [pillows(data) for data in files]
    monkeypatch.setattr(decoding, "_upright", None)
    for data, pixels in zip(files, expected, strict=True):
        np.testing.assert_array_equal(decode(data), pixels)


def test_all_other_pictures_are_pillows(without_opencv):
    """CMYK, turned by EXIF or by XMP, damaged but whole, with an end after the end."""
    photo, exif = photograph(40, 30), Image.Exif()
    exif[0x0112] = 8
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="3"/></x:xmpmeta>'
    plain = encoded(photo, "JPEG")
    files = {
        "CMYK": encoded(Image.fromarray(photo).convert("CMYK"), "JPEG"),
        "EXIF": encoded(photo, "JPEG", exif=exif.tobytes()),
        "XMP": plain[:2] + b"\xff\xe1" + (len(xmp) + 2).to_bytes(2) + xmp + plain[2:],
        "zeros": plain[:700] + bytes(9) + plain[709:],
        "more": plain + bytes(100) + plain,
    }
    found = {name: decode(data) for name, data in files.items()}
    assert found["EXIF"].shape == (30, 40, 3)
    np.testing.assert_array_equal(found["XMP"], decode(plain)[::-1, ::-1])
    without_opencv()
    for name, data in files.items():
        np.testing.assert_array_equal(found[name], decode(data), err_msg=name)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.99])
def test_files_cut_off_are_unreadable(share):
    data = encoded(photograph(100, 90), "JPEG")
    for cut in (data[: int(share * len(data))], data[:-2], data[:-1]):
        with pytest.raises(UnreadableRecord, match="truncated"):
            decode(cut)


def area_weights(side, size):
    """How much of each old pixel lies in each new one."""
    edges = np.linspace(0, side, size + 1)
    overlap = np.minimum(edges[1:, None], np.arange(side) + 1) - np.maximum(edges[:-1, None], np.arange(side))
    return np.clip(overlap, 0, None) * size / side


@pytest.mark.parametrize(("side", "sizes"), [(101, (16, 64)), (150, (20, 64))] + [(n, (16, 64)) for n in (64, 40, 10)])
@pytest.mark.parametrize("order", [1, -1])
def test_two_sizes_are_both_means_of_the_picture(side, sizes, order):
    """Whether the smaller is made of the larger or not; what is enlarged is not made small again."""
    picture = RNG.integers(0, 256, (side, side, 3), dtype=np.uint8)
    images = dict(zip(("image", "clip_image"), sizes[::order], strict=True))
    example = ToExample(images, {}, "center", None)({"image": encoded(picture), "caption": ""}, RNG)
    assert list(example) == ["image", "clip_image"]
    for name, size in images.items():
        assert example[name].shape == (size, size, 3) and example[name].dtype == np.uint8
        if size <= side:
            weights = area_weights(side, size)
            expected = np.einsum("ai,bj,ijc->abc", weights, weights, picture)
            assert np.abs(example[name] - expected).max() <= 0.501
        else:
            np.testing.assert_array_equal(example[name], area_resize(picture, size))


@pytest.mark.parametrize(("side", "size"), [(80, 64), (66, 64), (64, 64), (100, 7), (128, 32), (65, 1)])
def test_area_average(side, size):
    """Against the exact weights: how much of each old pixel lies in each new one."""
    picture = RNG.integers(0, 256, (side, side, 3), dtype=np.uint8)
    weights = area_weights(side, size)
    expected = np.einsum("ai,bj,ijc->abc", weights, weights, picture)
    result = area_resize(picture, size)
    assert result.dtype == np.uint8 and result.shape == (size, size, 3)
    assert np.abs(result - expected).max() <= 0.501


@pytest.mark.parametrize("side", [50, 64, 100])
def test_a_window_is_a_part_of_the_whole(side):
    picture, window = RNG.integers(0, 256, (side, side, 3), dtype=np.uint8), (slice(8, 40), slice(0, 16))
    np.testing.assert_array_equal(area_resize(picture, 64, window), area_resize(picture, 64)[window])


def test_enlarging_keeps_plain_colour_and_size():
    assert (area_resize(np.full((5, 5, 3), 77, np.uint8), 64) == 77).all()
    assert area_resize(coordinates(5, 5), 64).shape == (64, 64, 3)


def test_center_crop():
    picture = square_crop(coordinates(40, 101), 16, "center", RNG)
    assert picture.shape == (40, 40, 3)
    assert picture[0, 0, 0] == 0 and picture[0, 0, 1] == 30


def test_dalle_crop():
    """s = 100, slack 100, R = 64: t in 64..72, so a window of 100 · 64/72 = 89 to 100 pixels."""
    crops = [square_crop(coordinates(100, 200), 64, "dalle", np.random.default_rng(k)) for k in range(3000)]
    assert all(c.shape[0] == c.shape[1] for c in crops)
    sides, tops, lefts = (np.array(x) for x in zip(*[(len(c), *c[0, 0, :2]) for c in crops], strict=True))
    expected = {round(100 * 64 / t) for t in range(64, 73)}
    assert set(sides) == expected and np.bincount(sides)[89] / 3000 == pytest.approx(1 / 9, abs=0.03)
    whole = sides == 100
    assert set(tops[whole]) == {0}
    assert lefts[whole].min() >= 37 and lefts[whole].max() <= 62 and np.ptp(lefts[whole]) > 20
    smallest = sides == 89
    assert set(tops[smallest]) == set(range(12))
    assert np.mean(lefts[smallest]) == pytest.approx(50 + 5.5, abs=2)


@pytest.mark.parametrize("side", [1, 30, 64])
def test_dalle_crop_of_small_pictures_is_all_of_them(side):
    assert square_crop(coordinates(side, side), 64, "dalle", RNG).shape == (side, side, 3)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a pizza on a blue background"] * 9, 300)


def test_example(tokenizer):
    texts = {"t": (tokenizer, 6, True), "g": (tokenizer, 9, False)}
    transform = ToExample({"image": 8, "clip_image": 24}, texts, "center", None)
    transform = pickle.loads(pickle.dumps(transform))
    record = {"image": encoded(RNG.integers(0, 256, (30, 24, 3), dtype=np.uint8)), "caption": "a pizza", "key": "k"}
    example = transform(record, np.random.default_rng(0))
    shapes = {name: (value.shape, value.dtype.name) for name, value in example.items()}
    assert shapes == {
        "image": ((8, 8, 3), "uint8"), "clip_image": ((24, 24, 3), "uint8"),
        "t": ((6,), "int32"), "t_length": ((), "int32"), "g": ((9,), "int32"), "g_length": ((), "int32"),
    }  # fmt: skip
    np.testing.assert_array_equal(example["clip_image"], decode(record["image"])[3:27])
    # One and the same square: the smaller picture is the larger one, averaged.
    average = example["clip_image"].reshape(8, 3, 8, 3, 3).mean(axis=(1, 3))
    assert np.abs(example["image"] - average).max() <= 0.501
    np.testing.assert_array_equal(example["t"], tokenizer.encode(["a pizza"], 6, True)[0][0])
    assert example["g_length"] == tokenizer.count("a pizza")


def test_both_pictures_show_the_same_random_square(tokenizer):
    transform = ToExample({"image": 16, "clip_image": 64}, {}, "dalle", None)
    record = {"image": encoded(NOISE.repeat(6, axis=0).repeat(6, axis=1)), "caption": "", "key": "k"}
    for seed in range(5):
        example = transform(record, np.random.default_rng(seed))
        average = example["clip_image"].reshape(16, 4, 16, 4, 3).mean(axis=(1, 3))
        assert np.abs(example["image"] - average).max() <= 1
    again = transform(record, np.random.default_rng(4))
    np.testing.assert_array_equal(example["image"], again["image"])


def test_patch_starts_at_a_low_resolution_pixel():
    transform = ToExample({"image": 64}, {}, "center", 16)
    record = {"image": encoded(coordinates(64, 64)), "caption": "", "key": "k"}
    corners = set()
    for seed in range(600):
        patch = transform(record, np.random.default_rng(seed))["image"]
        assert patch.shape == (16, 16, 3)
        corners.add(tuple(int(v) for v in patch[0, 0, :2]))
    assert {r for r, _ in corners} == {c for _, c in corners} == set(range(0, 49, 4))


def test_one_of_several_captions(tokenizer):
    transform = ToExample({"image": 8}, {"t": (tokenizer, 12, False)}, "center", None)
    record = {"image": encoded(NOISE), "caption": ["a pizza", "blue"], "key": "k"}
    said = [tokenizer.decode(transform(record, np.random.default_rng(k))["t"]) for k in range(100)]
    assert set(said) == {"a pizza", "blue"} and 30 < said.count("blue") < 70
    with pytest.raises(UnreadableRecord, match="no caption"):
        transform(record | {"caption": []}, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("height", "width", "limits", "says"),
    [
        (40, 63, dict(min_side=40), ""),
        (39, 63, dict(min_side=40), "39 pixels, less than data.min_side=40"),
        (63, 39, dict(min_side=40), "39 pixels, less than data.min_side=40"),
        (30, 60, dict(max_aspect=2.0), ""),
        (60, 29, dict(max_aspect=2.0), "60 by 29 pixels, beyond data.max_aspect=2.0"),
    ],
)
def test_pictures_too_small_or_too_long_are_unreadable(height, width, limits, says):
    record = {"image": encoded(coordinates(height, width)), "caption": "", "key": "k"}
    transform = ToExample({"image": 64}, {}, "center", None, **limits)
    if not says:
        assert transform(record, np.random.default_rng(0))["image"].shape == (64, 64, 3)
        return
    with pytest.raises(UnreadableRecord, match=says):
        transform(record, np.random.default_rng(0))
    assert ToExample({"image": 64}, {}, "center", None)(record, np.random.default_rng(0))


def test_errors():
    with pytest.raises(UserError, match=r"'middle'.*center, dalle"):
        ToExample({"image": 64}, {}, "middle", None)
    for patch in (0, 18, 68):
        with pytest.raises(UserError, match=f"patch is {patch}.*64"):
            ToExample({"image": 64}, {}, "center", patch)


@pytest.mark.parametrize("crop", ["center", "dalle"])
def test_a_clip_s_pictures_are_made_as_it_is_shown_pictures(crop):
    """OpenAI's CLIP: Pillow's bicubic kernel, of the shorter side and before the crop; the others are averaged."""
    picture = RNG.integers(0, 256, (45, 30, 3), dtype=np.uint8)
    record = {"image": encoded(picture), "caption": "", "key": "k"}
    images = {"image": 10, "clip_image": 15}
    plain = ToExample(images, {}, crop, None)(record, np.random.default_rng(0))
    example = ToExample(images, {}, crop, None, kernels={"clip_image": "bicubic"})(record, np.random.default_rng(0))
    np.testing.assert_array_equal(example["image"], plain["image"])
    assert not np.array_equal(example["clip_image"], plain["clip_image"])
    if crop == "center":
        whole = np.asarray(Image.fromarray(picture).resize((15, 22), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(example["clip_image"], whole[3:18])
    else:
        square = square_crop(picture, 15, crop, np.random.default_rng(0))
        expected = np.asarray(Image.fromarray(square).resize((15, 15), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(example["clip_image"], expected)
