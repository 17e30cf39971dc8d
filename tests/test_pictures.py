"""PNG files with their prompt inside, and grids whose pictures and captions lie where they should."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unclip_jax.errors import UserError
from unclip_jax.pictures import GAP, PAPER, add_file, file_name, grid, save_png, shown, to_uint8

DEJAVU = "/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf"


def noise(count, height=6, width=10, seed=0):
    return np.random.default_rng(seed).integers(0, 200, (count, height, width, 3)).astype(np.uint8)


def test_png_keeps_pixels_and_text_of_any_script(tmp_path):
    image = noise(1)[0]
    metadata = {"prompt": "un œuf à la 京都 🍳", "settings": {"n": 2, "guidance": 1.5}}
    save_png(tmp_path / "new" / "folder" / "a.png", image, metadata)
    with Image.open(tmp_path / "new" / "folder" / "a.png") as file:
        assert file.format == "PNG"
        np.testing.assert_array_equal(np.asarray(file), image)
        assert file.text == {"prompt": metadata["prompt"], "settings": '{"n": 2, "guidance": 1.5}'}


def test_png_is_readable_by_others_and_alone_in_its_folder(tmp_path):
    for seed in (0, 1):  # the second replaces the first
        save_png(str(tmp_path / "a.png"), noise(1, seed=seed)[0])
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").stat().st_mode & 0o777 == 0o644
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), noise(1, seed=1)[0])


def test_what_is_no_picture_leaves_the_old_one_and_nothing_beside_it(tmp_path):
    save_png(tmp_path / "a.png", noise(1)[0])
    with pytest.raises(TypeError):
        save_png(tmp_path / "a.png", np.zeros((4, 4, 3)))
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), noise(1)[0])


@pytest.mark.parametrize(
    ("count", "columns", "shape"), [(5, 3, (2, 3)), (9, None, (3, 3)), (10, None, (3, 4)), (1, 4, (1, 4))]
)
def test_grid_puts_each_picture_in_its_place(count, columns, shape):
    images = noise(count)
    sheet = grid(images, columns).copy()
    assert sheet.dtype == np.uint8
    assert sheet.shape == (shape[0] * (6 + GAP) + GAP, shape[1] * (10 + GAP) + GAP, 3)
    for i, image in enumerate(images):
        row, column = divmod(i, shape[1])
        top, left = GAP + row * (6 + GAP), GAP + column * (10 + GAP)
        place = np.s_[top : top + 6, left : left + 10]
        np.testing.assert_array_equal(sheet[place], image)
        sheet[place] = PAPER
    assert (sheet == PAPER).all(), "nothing is drawn between pictures"


def test_captions_stand_under_their_own_picture():
    side, gray = 96, np.full((4, 96, 96, 3), 128, np.uint8)
    captions = ["an apple", "", "a long caption that takes several lines to say", "x"]
    sheet = grid(gray, 2, captions)
    plain = grid(gray, 2)
    assert sheet.shape[1] == plain.shape[1] and sheet.shape[0] > plain.shape[0]
    cell = (sheet.shape[0] - GAP) // 2

    def ink(i):
        top, left = GAP + i // 2 * cell, GAP + i % 2 * (side + GAP)
        assert (sheet[top : top + side, left : left + side] == 128).all(), "text lies over a picture"
        return int((sheet[top + side : top + cell, left : left + side] < 128).sum())

    assert ink(1) == 0 < ink(3) < ink(0) < ink(2)
    gaps = [sheet[:, :GAP], sheet[:, GAP + side : 2 * GAP + side], sheet[:, -GAP:]]
    assert all((gap == PAPER).all() for gap in gaps), "text leaves its column"


def test_pictures_of_few_pixels_have_room_for_their_captions():
    images = noise(2, 32, 32)
    sheet = grid(images, 2, ["a red apple on a blue background"] * 2)
    np.testing.assert_array_equal(sheet[GAP : GAP + 96 : 3, GAP : GAP + 96 : 3], images[0])
    assert sheet.shape[1] == 2 * 96 + 3 * GAP
    assert (sheet[:, 96 + GAP : 96 + 2 * GAP] == PAPER).all(), "text leaves its column"


def test_small_pictures_are_shown_large():
    images = noise(2, 32, 32)
    sheet = np.asarray(shown(images, columns=2))
    np.testing.assert_array_equal(sheet[GAP : GAP + 128 : 4, GAP : GAP + 128 : 4], images[0])
    assert sheet.shape == (128 + 2 * GAP, 256 + 3 * GAP, 3)
    assert shown(noise(1, 200, 200)).size == (200 + 2 * GAP, 200 + 2 * GAP), "large ones stay as they are"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_no_picture(value):
    image = np.zeros((2, 4, 4, 3), np.float32)
    assert (to_uint8(image) == 128).all()
    image[1, 2, 3, 0] = value
    with pytest.raises(UserError, match="a picture holds numbers that are not finite"):
        to_uint8(image)


def test_letters_that_no_font_has_are_named(capsys):
    grid(noise(2, 64, 64), 2, ["café", "red"])
    assert "no font here has é" not in capsys.readouterr().err or not Path(DEJAVU).exists()
    grid(noise(2, 64, 64), 2, ["a \U000f1234 cat", "red"])
    assert "no font here has \\U000f1234: captions show boxes for them" in capsys.readouterr().err
    grid(noise(2, 64, 64), 2, ["a cat", "red, with 3 dots ..."])
    assert capsys.readouterr().err == ""


def test_other_files_are_not_overwritten(tmp_path):
    names = [add_file(tmp_path / "a" / "x.y.png", content).name for content in (b"1", b"1", b"2", b"3", b"2", b"1")]
    assert names == ["x.y.png", "x.y.png", "x.y-2.png", "x.y-3.png", "x.y-2.png", "x.y.png"]
    assert sorted(path.read_bytes() for path in (tmp_path / "a").iterdir()) == [b"1", b"2", b"3"]


def test_names_of_files_are_cut_by_bytes(tmp_path):
    assert file_name("a red fox, on a sofa!") == "a_red_fox_on_a_sofa" and file_name("🦊/../x") == "x"
    for text in ("猫" * 300, "𠮷" * 300, "é" * 300, "a" * 300, "no \udcff UTF-8"):
        name = file_name(text)
        assert len(name.encode()) <= 120 and name and text.replace(" ", "_").startswith(name[:3])
        add_file(tmp_path / f"{name}_{2**64}_1000.png", b"")
