"""Previews and traces of drawing: pictures are the same when they are watched."""

import jax
import numpy as np
import pytest
from PIL import Image
from shrink import compilation_cache, save_cascade
from training.test_tracking import traced

from unclip_jax import model, sample
from unclip_jax.cascade import Cascade
from unclip_jax.keys import RowKeys, seed_key
from unclip_jax.model import Model
from unclip_jax.watching import Preview, Watch

STEPS = 3  # of each model
SHOWN = [2, 2, 2, 1, 1, 1]  # pictures in a model's previews: two chunks of two rows, of which one row is a filling


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_cascade(tmp_path_factory.mktemp("cascade"))
    for name in ("prior", "upsampler_1024"):
        (folder / name).rename(folder / f"no_{name}")
    return folder


@pytest.fixture
def draw(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "CHUNK_ROWS", 2)

    def drawn(*flags):
        argv = ["sample", f"--bundle={folder}", f"--out={tmp_path / 'out'}", "--prompt=a red fox", "--from=caption"]
        with compilation_cache():
            assert sample.main([*argv, "-n=3", *flags]) == 0
        return {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.png")}

    return drawn


def test_previews_show_what_becomes_of_the_same_pictures(draw, tmp_path, monkeypatch):
    seen, see = [], Preview.see

    def shown(self, x0):
        see(self, x0)
        with Image.open(tmp_path / "out" / "preview.png") as picture:
            seen.append((x0, picture.width))

    monkeypatch.setattr(Preview, "see", shown)
    plain = draw()
    assert not seen and draw("--preview") == plain  # bit for bit, or there were a second of each
    assert [len(x0) for x0, _ in seen] == 2 * SHOWN, "of the decoder, then of the upsampler"
    assert all(width > x0.shape[2] * len(x0) for x0, width in seen)
    ends = [x0 for x0, _ in seen][STEPS - 1 :: STEPS]
    drawn = [np.asarray(Image.open(tmp_path / "out" / f"a_red_fox_0_{i}.png")).astype(int) for i in range(3)]
    last = np.clip(np.rint((np.concatenate(ends[2:]) + 1) * 127.5), 0, 255)
    assert np.abs(last - drawn).max() <= 1, "DDIM's last step ends in the x0 that it predicts"
    assert not np.array_equal(seen[0][0], seen[1][0])


def test_a_preview_does_not_stay_when_drawing_fails(tmp_path):
    with pytest.raises(RuntimeError), Preview(tmp_path) as preview:
        preview.see(np.zeros((1, 4, 4, 3), np.float32))
        assert [path.name for path in tmp_path.iterdir()] == ["preview.png"]
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_profile_names_models_and_steps_and_holds_no_compilation(draw, tmp_path):
    assert draw("--profile") == draw()
    found = traced(tmp_path / "out" / "profile")
    assert [found.count(f"{name} step") for name in ("decoder", "upsampler_256")] == [2 * STEPS, 2 * STEPS]
    assert found.count("decoder") == found.count("upsampler_256") == 1
    assert not [name for name in found if "compile_or_get_cached" in name], "JAX's way to every program"
    draw(f"--profile={tmp_path / 'mine'}")
    assert traced(tmp_path / "mine").count("decoder") == 1


def test_rows_on_two_devices_are_seen_in_their_order(folder):
    class Eye(Watch):
        sees, seen = True, ()

        def at_once(self, steps):
            return 2

        def see(self, x0):
            self.seen = (*self.seen, x0)

    decoder = Model.load(folder / "decoder", ("decoder",), Model.load(folder / "clip", ("clip",)), jax.devices()[:2])
    conditions = Cascade(None, None, decoder, [])._captions(decoder, ["a red fox"] * 4)
    conditions = conditions._replace(guidance_scale=np.float32(1.5))
    keys, eye = RowKeys.of(seed_key(1), 4), Eye()
    drawn = decoder.draw({}, conditions, keys)
    np.testing.assert_allclose(decoder.draw({}, conditions, keys, watch=eye), drawn, atol=1e-5)
    assert len(eye.seen) == 2
    np.testing.assert_allclose(eye.seen[-1], drawn, atol=1e-5)
