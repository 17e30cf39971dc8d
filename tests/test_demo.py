"""The demo without a browser: its functions on random models, what it offers for which cascade, and the command."""

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import demo_server
import numpy as np
import pytest
from PIL import Image
from shrink import compilation_cache, save_cascade, small_stage, tokenizer_bytes

from unclip_jax import demo, demo_tabs
from unclip_jax.bundle import save_bundle
from unclip_jax.cascade import Cascade, scaled_mask
from unclip_jax.data.transforms import center_square
from unclip_jax.errors import UserError
from unclip_jax.watching import PREVIEWS

ROOT = Path(__file__).parent.parent
STEPS = 5
LONG = "a red " * 10  # more tokens than the shrunk CLIP reads


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A cascade without upsamplers, so that little is compiled."""
    root = save_cascade(tmp_path_factory.mktemp("cascade"))
    for name in ("upsampler_256", "upsampler_1024"):
        shutil.rmtree(root / name)
    return root


@pytest.fixture(scope="module")
def cascade(folder):
    with compilation_cache():
        yield Cascade.load(str(folder))


@pytest.fixture(scope="module")
def glide(tmp_path_factory):
    root = tmp_path_factory.mktemp("glide")
    stage, _, params = small_stage("glide")
    save_bundle(root / "decoder", "glide", stage.config, params, tokenizer_bytes(), "", {})
    return Cascade.load(str(root))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = demo_server.save_files(tmp_path_factory.mktemp("files"), (24, 32), (24, 24))
    return {path.stem: str(path) for path in root.iterdir()}


def painted(picture, mask):
    """What an editor gives for a picture, (H, W, 3), with white paint where the mask, bool (H, W), is True."""
    opaque = np.full((*picture.shape[:2], 1), 255, np.uint8)
    layer = np.repeat(np.uint8(255) * mask[..., None], 4, axis=-1)
    background = np.concatenate([picture, opaque], axis=-1)
    return {"background": background, "layers": [layer], "composite": np.where(mask[..., None], layer, background)}


def joined(parts):
    return np.concatenate([part.images for part in parts if part.drawn])


def test_tabs_are_what_a_cascade_can_do(cascade, glide):
    every = ["draw", "vary", "interpolate", "text_diff", "inpaint", "sdedit", "classify"]
    assert demo_tabs.tabs(cascade) == every and demo_tabs.source(cascade) == "prior"
    assert demo_tabs.tabs(glide) == ["draw", "inpaint", "sdedit"] and demo_tabs.source(glide) is None
    without = Cascade(cascade.clip, None, cascade.decoder, [])
    assert demo_tabs.tabs(without) == every and demo_tabs.source(without) == "text"


def test_a_clip_of_captions_alone_sees_no_pictures(cascade):
    config = cascade.clip.stage.config.copy_and_resolve_references().unlock()
    config.model.image = None
    blind = SimpleNamespace(stage=SimpleNamespace(config=config))
    assert demo_tabs.tabs(Cascade(blind, cascade.prior, cascade.decoder, [])) == ["draw", "inpaint", "sdedit"]


def test_drawn_are_the_pictures_of_sample_as_they_come(cascade):
    chunks = [part.images for part in demo_tabs.draw(cascade, "a red fox", 3, 7) if part.drawn]
    assert [len(chunk) for chunk in chunks] == [1, 1, 1]
    for number, chunk in enumerate(chunks):
        expected = cascade.generate(["a red fox"], 7, rows=[0], draws=[number])["images"][-1]
        np.testing.assert_array_equal(chunk, expected)
    assert len({chunk.tobytes() for chunk in chunks}) == 3


def test_chunks_are_of_one_size_and_the_rest_is_left_out():
    asked = []
    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(platform="gpu")]))

    def draw(_, numbers):
        asked.append(numbers)
        return {"images": [np.array(numbers)]}

    parts = demo_tabs._in_chunks(SimpleNamespace(decoder=SimpleNamespace(mesh=mesh)), draw, 6)
    assert [list(part.images) for part in parts] == [[0, 1, 2, 3], [4, 5]]
    assert asked == [range(4), range(4, 8)]


def test_a_cascade_says_what_it_draws_and_no_folder(cascade):
    known = "emoji_scenes/single_64"
    assert demo_tabs.about(cascade) == f"pictures of 8 × 8 pixels, and knows what is in {known}"
    upsampler = SimpleNamespace(stage=SimpleNamespace(config=SimpleNamespace(model=SimpleNamespace(factor=4))))
    config = cascade.decoder.stage.config.copy_and_resolve_references().unlock()
    config.data.source = f"folder:/my/pictures + tfds:{known}"
    decoder = SimpleNamespace(stage=SimpleNamespace(config=config))
    models = SimpleNamespace(decoder=decoder, upsamplers=[upsampler])
    assert demo_tabs.about(models) == f"pictures of 32 × 32 pixels, and knows what is in {known}"
    config.data.source = "folder:/my/pictures"
    assert demo_tabs.about(models) == "pictures of 32 × 32 pixels"


def test_what_is_predicted_comes_before_what_is_drawn(cascade):
    parts = list(demo_tabs.draw(cascade, "a red fox", 2, 7))
    assert [part.drawn for part in parts] == 2 * [False, False, False, True], "the decoder takes three steps"
    first, _, last, drawn = (part.images.astype(int) for part in parts[:4])
    assert np.abs(last - drawn).max() <= 1, "DDIM's last step ends in the x0 that it predicts"
    assert np.abs(first - drawn).max() > 1
    parts = list(demo_tabs.draw(cascade, "a red fox", 1, 7, steps="250"))
    assert len(parts) == 1 + PREVIEWS


def test_drawing_ends_when_nobody_waits_for_it():
    left, ended = threading.Event(), []

    def draw(watched):
        watched.watch.see(np.zeros((1, 8, 8, 3)))
        assert left.wait(60)
        watched.watch.see(np.zeros((1, 8, 8, 3)))
        ended.append("drawn")

    parts = demo_tabs._seen(SimpleNamespace(), draw)
    assert not next(parts).drawn
    assert not demo_tabs.DEVICE.acquire(blocking=False), "the next visitor's pictures wait"
    parts.close()
    left.set()
    with demo_tabs.DEVICE:
        assert not ended


def test_scales_sampler_and_steps_are_heeded(cascade):
    first = joined(demo_tabs.draw(cascade, "a red fox", 1, 7))
    own = cascade.decoder.stage.config.sampling
    same = {"guidance": own.guidance_scale, "sampler": own.sampler, "steps": own.steps}
    np.testing.assert_array_equal(first, joined(demo_tabs.draw(cascade, "a red fox", 1, 7, **same)))
    for changed in ({"guidance": 9.0}, {"prior_guidance": 9.0}, {"sampler": "dpm++"}, {"steps": "10"}):
        assert not np.array_equal(first, joined(demo_tabs.draw(cascade, "a red fox", 1, 7, **changed))), changed
    assert demo_tabs.samplers(cascade)[0] == own.sampler and "analytic" not in demo_tabs.samplers(cascade)
    assert demo_tabs.steps(cascade)[0] == own.steps
    assert demo_tabs.inversion_steps(cascade)[0] == 250


@pytest.mark.slow
def test_edits_are_those_of_the_cascade(cascade, files):
    wide, square = (demo_tabs.read(files[name]) for name in ("wide", "square"))
    varied = joined(demo_tabs.vary(cascade, files["wide"], 0.5, 2, 3, STEPS))
    expected = cascade.variations(wide, 2, 0.5, 3, steps=STEPS)["images"][-1]
    np.testing.assert_array_equal(varied, expected)
    frames = joined(demo_tabs.interpolate(cascade, files["wide"], files["square"], 2, 3, STEPS))
    np.testing.assert_array_equal(frames, cascade.interpolate(wide, square, 2, 3, steps=STEPS)["images"][-1])
    frames = joined(demo_tabs.text_diff(cascade, files["wide"], " ", "a red fox", 0.5, 2, 3, STEPS))
    expected = cascade.text_diff(wide, "", "a red fox", 0.5, 2, 3, steps=STEPS)["images"][-1]
    np.testing.assert_array_equal(frames, expected)


@pytest.mark.parametrize("which", ["cascade", "glide"])
def test_known_pixels_come_back_bit_for_bit(which, files, request):
    models, picture = request.getfixturevalue(which), demo_tabs.read(files["wide"])
    mask = np.zeros(picture.shape[:2], bool)
    mask[:10, 6:20] = True
    drawn = joined(demo_tabs.inpaint(models, painted(picture, mask), "a red fox", 2, 3))
    size = drawn.shape[1]
    known = ~scaled_mask(mask, size)
    assert known.any() and not known.all()
    for image in drawn:
        np.testing.assert_array_equal(image[known], center_square(picture, size, "area")[known])
    assert not np.array_equal(*drawn)


def test_any_paint_counts_and_transparent_pictures_lie_on_white():
    background = np.zeros((4, 6, 4), np.uint8)
    background[:2] = [10, 20, 30, 255]
    layer = np.zeros((4, 6, 4), np.uint8)
    layer[0, 1] = [255, 255, 255, 1]  # the faint edge of a brush
    layer[0, 0] = 255  # beside the square
    picture, mask = demo_tabs.picture_and_mask({"background": background, "layers": [layer], "composite": None})
    assert picture.shape == (4, 4, 3) and (picture[:2] == [10, 20, 30]).all() and (picture[2:] == 255).all()
    assert mask.sum() == 1 and mask[0, 0]


def test_a_sketch_is_drawn_over(cascade, files):
    sketch = painted(demo_tabs.read(files["square"]), np.zeros((24, 24), bool))
    drawn = joined(demo_tabs.sdedit(cascade, sketch, "a red fox", 0.5, 2, 3))
    assert drawn.shape == (2, 8, 8, 3) and not np.array_equal(*drawn)
    strokes = {"background": None, "layers": [], "composite": np.zeros((8, 8, 4), np.uint8)}
    strokes["composite"][2:4] = [200, 0, 0, 255]
    assert len(joined(demo_tabs.sdedit(cascade, strokes, "a red fox", 0.5, 1, 3))) == 1


def test_labels_have_probabilities(cascade, files):
    found = demo_tabs.classify(cascade, files["wide"], "red fox, blue tent,\ngreen whale, red fox", "a {}")
    assert list(found) == ["red fox", "blue tent", "green whale"]
    assert sum(found.values()) == pytest.approx(1, abs=1e-5)
    expected = cascade.classify(demo_tabs.read(files["wide"]), list(found), ["a {}"])
    np.testing.assert_allclose(list(found.values()), expected)


WHOLE, NOTHING = np.ones((24, 24), bool), np.zeros((24, 24), bool)
PLAIN = np.zeros((24, 24, 3), np.uint8)
REFUSED = {
    "draw": [
        (("", 1, 0), "the prompt is empty"),
        ((None, 1, 0), "the prompt is empty"),
        ((LONG, 1, 0), "shorten it"),
        (("a red fox", 0, 0), "0 pictures: expected a whole number from 1 to 16"),
        (("a red fox", None, 0), "None pictures"),
        (("a red fox", 1, None), "seed None: expected a whole number"),
        (("a red fox", 1, -1), "seed -1"),
        (("a red fox", 1, 0.5), "seed 0.5"),
        (("a red fox", 1, 0, None, None, "ddjm"), "sampling.sampler"),
        (("a red fox", 1, 0, None, None, None, "many"), "sampling.steps"),
    ],
    "vary": [((None, 1.0, 1, 0), "there is no picture: give one"), (("{none}", 1.0, 1, 0), "cannot be read")],
    "interpolate": [(("{wide}", None, 2, 0), "there is no second picture")],
    "text_diff": [
        (("{wide}", "a red fox", "", 0.5, 2, 0), "the caption is empty"),
        (("{wide}", "a red fox", "a red fox", 0.5, 2, 0), "are the same to this CLIP"),
    ],
    "inpaint": [
        ((None, "a red fox", 1, 0), "there is no picture"),
        (({"background": None, "layers": [], "composite": None}, "a red fox", 1, 0), "there is no picture"),
        ((painted(PLAIN, NOTHING), "a red fox", 1, 0), "marks nothing of the square"),
        ((painted(PLAIN, WHOLE), "a red fox", 1, 0), "marks all of the square"),
        ((painted(PLAIN, np.eye(24) > 0), "", 1, 0), "the prompt is empty"),
    ],
    "sdedit": [
        ((None, "a red fox", 0.5, 1, 0), "there is no sketch"),
        ((painted(PLAIN, NOTHING), LONG, 0.5, 1, 0), "shorten it"),
    ],
    "classify": [
        ((None, "cat, dog"), "there is no picture"),
        (("{wide}", ""), "give two labels or more"),
        (("{wide}", "cat"), "give two labels or more"),
        (("{wide}", "red fox, blue tent", "a fox"), "{}"),
        (("{wide}", f"cat, {LONG}"), "shorten it"),
    ],
}


@pytest.mark.parametrize(
    ("name", "given", "says"), [(name, *case) for name, cases in REFUSED.items() for case in cases]
)
def test_what_cannot_be_drawn_is_one_line(name, given, says, cascade, files):
    given = [value.format(**files) if name != "draw" and isinstance(value, str) else value for value in given]
    with pytest.raises(UserError) as caught:
        list(getattr(demo_tabs, name)(cascade, *given))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_flags_are_checked():
    parsed = demo.parse(["demo", "--bundle", "b"])
    assert (parsed.host, parsed.port, parsed.share) == ("127.0.0.1", 7860, False)
    for arguments, says in (
        (["--bundle", "b", "--port", "0"], "expected a whole number from 1 to 65,535"),
        (["--bundle", "b", "--port", "x"], "'x'"),
        (["--bundle", "b", "--prot", "1"], "--prot"),
    ):
        with pytest.raises(UserError, match=says):
            demo.parse(["demo", *arguments])


def test_addresses_are_checked_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(demo, "serve", lambda *_: pytest.fail("served"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 is in use: choose another by --port"):
            demo.main(["demo", "--bundle", "b", "--port", str(port)])
    for host in ("nowhere.invalid", "192.0.2.1"):
        with pytest.raises(UserError, match=f"--host {host}: this machine has no such address"):
            demo.main(["demo", "--bundle", "b", "--host", host, "--port", str(port)])

    for host in ("../../x", "a" * 5000, "\udcff"):
        with pytest.raises(UserError, match="no machine can have that name"):
            demo.main(["demo", "--bundle", "b", "--host", host])

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(UserError, match="choose one from 1024"):
        demo.main(["demo", "--bundle", "b", "--port", "80"])


def test_gradio_is_asked_for_before_anything_is_loaded(tmp_path):
    program = "import sys; sys.modules['gradio'] = None; from unclip_jax.__main__ import main; main()"
    arguments = ["demo", "--bundle", str(tmp_path / "none"), "--port", str(demo_server.free_port())]
    command = [sys.executable, "-c", program, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    said = "error: the package gradio is not installed: pip install 'unclip_jax[demo]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


@pytest.mark.parametrize("by", ["SIGINT", "SIGTERM"])
def test_it_serves_until_it_is_interrupted(by, folder, tmp_path):
    pytest.importorskip("gradio")
    with demo_server.serve(folder, tmp_path) as (process, address):
        page = urllib.request.urlopen(address, timeout=60).read().decode()
        assert "unclip_jax" in page and "fonts.googleapis" not in page
        began = time.monotonic()
        process.send_signal(getattr(signal, by))
        out, errors = process.communicate(timeout=60)
    assert (process.returncode, out, errors) == (0, "the demo has ended\n", "")
    assert time.monotonic() - began < 30
    assert not list(tmp_path.iterdir()), "something was left"


def test_every_tab_is_on_the_page(cascade, glide, tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    from unclip_jax import demo_page

    for models, every in ((cascade, True), (glide, False)):
        config = demo_page.build(models).get_config_file()
        labels = [component["props"].get("label") for component in config["components"]]
        tabs = [c["props"]["label"] for c in config["components"] if c["type"] == "tabitem"]
        assert tabs == [demo_page.NAMES[name] for name in demo_tabs.tabs(models)]
        assert ("Guidance of the prior" in labels) == every and "Guidance" in labels
        computing = [call for call in config["dependencies"] if call["queue"] is not False]
        assert len(computing) == len(tabs)


def test_all_that_computes_is_in_one_queue(cascade, monkeypatch, tmp_path):
    pytest.importorskip("gradio")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    from unclip_jax import demo_page

    page = demo_page.build(cascade)
    computing = [function for function in page.fns.values() if function.queue is not False]
    assert len(computing) == 7
    assert {(function.concurrency_id, function.concurrency_limit) for function in computing} == {("device", 1)}
    assert not page.analytics_enabled


def test_files_say_what_drew_them_and_hold_nothing_of_visitors(cascade, files, monkeypatch, tmp_path):
    pytest.importorskip("gradio")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    from unclip_jax import demo_page

    given = {"prompt": "a red fox", "seed": 7, "picture": files["wide"], "guidance": 2.0}
    drawn = np.zeros((2, 8, 8, 3), np.uint8)
    names = demo_page._saved(drawn, cascade, "draw", given, 3)
    assert [os.path.basename(name) for name in names] == ["a_red_fox_7_3.png", "a_red_fox_7_4.png"]
    assert all(str(tmp_path) in name for name in names) and len({os.path.dirname(name) for name in names}) == 2
    told = Image.open(names[1]).text["demo"]
    assert '"seed": 7' in told and '"index": 4' in told and '"guidance": 2.0' in told and "wide" not in told
    assert [demo_page.frame_of(names, number) for number in (1, 2, 5)] == [names[0], names[1], names[1]]
    assert demo_page.frame_of([], 1) is None
