"""What other code bases got wrong before the networks: ranges of pixels, windows, the ids of words."""

import io
from types import SimpleNamespace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from shrink import CONFIGS, fake_clip, random_batch, small_config, tokenizer_bytes

from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.data.transforms import ToExample
from unclip_jax.stages import make_stage
from unclip_jax.stages.base import to_float, to_uint8
from unclip_jax.stages.clip import Clip


def test_pixels_are_bytes_outside_and_between_minus_one_and_one_inside():
    """DALLE2-pytorch#96, #102: pictures in [0, 1] where [-1, 1] was expected, or scaled twice."""
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    inside = np.asarray(to_float(jnp.asarray(levels)))
    np.testing.assert_allclose(inside, levels / 255.0 * 2 - 1, atol=1e-6)
    np.testing.assert_array_equal(to_uint8(jnp.asarray(inside)), levels)
    np.testing.assert_array_equal(to_uint8(jnp.array([-7.0, 7.0])), [0, 255])
    clip = make_stage(small_config("clip"))
    for name in CONFIGS:
        stage = make_stage(small_config(name), clip)
        assert {str(stage.batch_spec(1)[picture].dtype) for picture in stage.images} == {"uint8"}


class Looked(Exception):
    """CLIP was given pictures of this type."""


class SeeingClip(Clip):
    """Notes what its towers are given."""

    seen: ClassVar[list] = []

    def _model(self):
        def apply(variables, images, *others, **options):
            self.seen.append(images)
            z = jnp.mean(images, axis=(1, 2))
            return z if "method" in options else (z, z, jnp.float32(1))

        return SimpleNamespace(apply=apply)


def test_clip_sees_pixels_as_it_was_trained_to():
    """DALLE2-pytorch#96, #102: CLIP was given pictures in another range than its mean and std are of."""
    clip = SeeingClip(small_config("clip"))
    m, batch = clip.config.model, random_batch(clip, 2)
    clip.embed_images({}, batch["image"])
    clip.loss({}, {}, batch, jax.random.key(0))
    expected = (batch["image"] / 255.0 - np.array(m.mean)) / np.array(m.std)
    assert len(clip.seen) == 2
    for images in clip.seen:
        np.testing.assert_allclose(images, expected, atol=1e-5)

    def look(params, images):
        raise Looked(images.dtype)

    for name in ("prior_diffusion", "decoder"):
        stage = make_stage(small_config(name), fake_clip(config=clip.config, dim=clip.dim, embed_images=look))
        with pytest.raises(Looked, match="uint8"):
            stage.loss({}, {}, random_batch(stage, 2), jax.random.key(0))


def test_training_windows_lie_anywhere():
    """DALLE2-pytorch (fixed in 95a512c, 86e692d): the random crop of training was made only half of the time."""
    side, patch, draws = 16, 8, 900
    across, down = np.meshgrid(np.arange(side), np.arange(side))
    file = io.BytesIO()
    Image.fromarray(np.stack([down, across, 0 * down], axis=-1).astype(np.uint8)).save(file, "PNG")
    transform = ToExample({"image": side}, {}, "center", patch)
    record, rng = {"image": file.getvalue(), "caption": ""}, np.random.default_rng(0)
    corners = [tuple(transform(record, rng)["image"][0, 0, :2]) for _ in range(draws)]
    places, counts = np.unique(corners, axis=0, return_counts=True)
    assert places.tolist() == [[y, x] for y in (0, 4, 8) for x in (0, 4, 8)]
    assert np.abs(counts - draws / 9).max() < 4.5 * (draws / 9) ** 0.5


def public_clip_tokenizer():
    """As OpenAI's, cut down to a few words: "!" is id 0, and the start and end tokens are the last two."""
    from tokenizers import Tokenizer as Model
    from tokenizers import models

    vocabulary = {"!": 0, "a": 1, "b": 2, "<|startoftext|>": 3, "<|endoftext|>": 4}
    model = Model(models.BPE(vocabulary, []))
    model.enable_padding(pad_id=0, pad_token="!")
    return Tokenizer(model.to_str().encode())


def test_public_clip_reads_exclamation_marks_between_start_and_end():
    """DALLE2-pytorch f988207: "!" counted as padding; classifier-free-guidance-pytorch!13: neither start nor end."""
    ids, lengths = public_clip_tokenizer().encode(["a!b!!", "", "!!!!!!!!"], 7, ends=True)
    np.testing.assert_array_equal(ids, [[3, 1, 0, 2, 0, 0, 4], [3, 4, 0, 0, 0, 0, 0], [3, 0, 0, 0, 0, 0, 4]])
    np.testing.assert_array_equal(lengths, [7, 2, 7])


@pytest.mark.parametrize("text", ["!!!", "a red apple!", "ünïcödé 🍕 漢字", "<pad> </s>"])
def test_no_text_is_encoded_as_padding(text):
    """DALLE2-pytorch f988207: a mask made of `tokens != 0`, where id 0 is a word."""
    tokenizer = Tokenizer(tokenizer_bytes())
    ids, lengths = tokenizer.encode([text], 64, ends=True)
    assert (ids[0, : lengths[0]] != 0).all() and (ids[0, lengths[0] :] == 0).all()
    assert lengths[0] == tokenizer.count(text) + 2
    assert tokenizer.decode(ids[0, : lengths[0]]) == text
