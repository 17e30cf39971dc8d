"""The chain of stages: shapes, seeds, guidance without compiling, chunks, and bundles that do not belong together."""

import json

import jax
import numpy as np
import pytest
from shrink import compilation_cache, save_cascade

from unclip_jax import model as module
from unclip_jax.cascade import Cascade
from unclip_jax.errors import UserError

TEXTS = ["a red apple", "one blue whale"]
SIDES = (8, 32, 128)  # the shrunk decoder's, and four times the side after each upsampler


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_cascade(tmp_path_factory.mktemp("cascade"))


@pytest.fixture(scope="module")
def cascade(folder):
    """The whole cascade, in chunks of two rows: every test shares one shape, compiled once."""
    with pytest.MonkeyPatch.context() as patch, compilation_cache():
        patch.setattr(module, "CHUNK_ROWS", 2)
        yield Cascade.load(str(folder))


@pytest.fixture(scope="module")
def small(cascade):
    """The same models without the upsamplers, which listen to no guidance."""
    return Cascade(cascade.clip, cascade.prior, cascade.decoder, [])


@pytest.fixture(scope="module")
def drawn(cascade):
    return cascade.generate(TEXTS, seed=0)


def test_pictures_of_every_size(drawn):
    assert [image.shape for image in drawn["images"]] == [(2, side, side, 3) for side in SIDES]
    assert all(image.dtype == np.uint8 for image in drawn["images"])
    np.testing.assert_allclose(np.linalg.norm(drawn["embeddings"], axis=-1), 1, rtol=1e-5)


def test_a_seed_is_a_picture(cascade, drawn):
    again, other = cascade.generate(TEXTS, seed=0), cascade.generate(TEXTS, seed=1)
    for first, same, different in zip(drawn["images"], again["images"], other["images"], strict=True):
        np.testing.assert_array_equal(first, same)
        assert not np.array_equal(first, different)
    assert not np.allclose(drawn["embeddings"], other["embeddings"])


def test_captions_of_one_batch_are_drawn_apart(small):
    both = small.generate(TEXTS, 0, 300.0)  # at no scale do random models make much of a caption
    swapped = small.generate([TEXTS[0], "a green tent"], 0, 300.0)
    np.testing.assert_array_equal(both["images"][0][0], swapped["images"][0][0])
    assert not np.array_equal(both["images"][0][1], swapped["images"][0][1])
    copies = small.generate([TEXTS[0]] * 2, seed=0)["images"][0]
    assert not np.array_equal(*copies), "two pictures of one caption must differ"


def test_each_guidance_scale_reaches_its_own_model(small, drawn):
    trained = small.prior.stage.config.sampling.guidance_scale, small.decoder.stage.config.sampling.guidance_scale
    named = small.generate(TEXTS, 0, prior_guidance_scale=trained[0], guidance_scale=trained[1])
    np.testing.assert_array_equal(named["images"][0], drawn["images"][0])
    decoder = small.generate(TEXTS, 0, guidance_scale=trained[1] + 4)
    np.testing.assert_array_equal(decoder["embeddings"], drawn["embeddings"])
    assert not np.array_equal(decoder["images"][0], drawn["images"][0])
    prior = small.generate(TEXTS, 0, prior_guidance_scale=trained[0] + 4)
    assert not np.allclose(prior["embeddings"], drawn["embeddings"])


def test_guidance_scales_seeds_and_prompts_compile_nothing(cascade, small, drawn):
    """Once there is a program that guides, and one that does not, for a scale of 1."""
    compiled = []
    for scale in (1.0, 2.0):
        small.generate(TEXTS, 0, scale, scale)

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    jax.jit(lambda x: x + 1)(np.float32(0))
    assert compiled, "the listener must hear a compilation"
    compiled.clear()
    for scale in (0.0, 1.0, 1.25, 3.0, 8.0):
        for seed in (1, 2, 3):
            small.generate(["one green fox", "a blue tent"], seed, scale, 1 + scale)
    cascade.generate(["one green fox", "a blue tent"], 4, 2.0)
    assert not compiled


def test_numbers_that_are_not_finite_become_no_picture(small):
    with pytest.raises(UserError, match="a model computed numbers that are not finite"):
        small.generate(TEXTS, 0, embeddings=np.full((2, 8), np.nan, np.float32))


@pytest.mark.parametrize("memory", [2 * 15 * (8**2 + 32**2 + 128**2), 2 * 15 * (8**2 + 32**2 + 128**2) - 1])
def test_no_more_pictures_than_memory_holds(cascade, monkeypatch, memory):
    """Of three colours, four bytes as a float and one as it is stored, in all three sizes."""
    monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": memory, "SC_PAGE_SIZE": 1}.get)
    if memory % 2:
        with pytest.raises(UserError, match="2 pictures at once need 0 GiB of memory, but this machine has 0: draw"):
            cascade.check_room(2)
    else:
        cascade.check_room(2)


def test_seventeen_prompts_are_seventeen_pictures(small):
    texts = [
        f"a {colour} {thing}" for colour in ("red", "blue", "green") for thing in ("fox", "tent", "lemon", "ghost")
    ]
    texts += texts[:5]
    many = small.generate(texts, seed=0)
    assert many["embeddings"].shape == (17, 8) and many["images"][0].shape == (17, 8, 8, 3)
    first = small.generate(texts[:2], seed=0)
    np.testing.assert_array_equal(many["images"][0][:2], first["images"][0])
    assert len({image.tobytes() for image in many["images"][0]}) == 17, "each chunk needs noise of its own"
    embeddings, pair = small.text_embeddings(texts), small.text_embeddings([texts[16], texts[0]])
    assert embeddings.shape == (17, 8)
    np.testing.assert_allclose(embeddings[[16, 0]], pair, rtol=1e-5, atol=1e-6)
    assert small.image_embeddings(np.zeros((3, 16, 16, 3), np.uint8)).shape == (3, 8)


def test_chunks_fill_up_the_last_and_stay_small(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ROWS", 16)
    numbers, squares = np.arange(17), np.arange(17) ** 2
    chunks = list(module.chunks(numbers, squares, size=16))
    assert [[len(part) for part in chunk] for chunk in chunks] == [[16, 16], [16, 16]]
    np.testing.assert_array_equal(chunks[1][1], [256] * 16)
    assert [module.chunk_rows(count) for count in (3, 16, 17)] == [3, 16, 16]
    assert [module.chunk_rows(count, 8) for count in (3, 16, 17, 200)] == [8, 16, 24, 128]


def test_without_upsamplers_the_decoders_picture_is_the_last(small):
    assert [image.shape for image in small.generate(TEXTS, 0)["images"]] == [(2, 8, 8, 3)]


@pytest.mark.parametrize("missing", ["clip", "decoder"])
def test_missing_stage_is_named(tmp_path, folder, missing):
    for name in {"clip", "prior", "decoder"} - {missing}:
        (tmp_path / name).symlink_to(folder / name)
    with pytest.raises(UserError, match=f"/{missing}"):
        Cascade.load(str(tmp_path))


def test_without_a_prior_pictures_are_drawn_for_embeddings_only(tmp_path, folder):
    for name in ("clip", "decoder"):
        (tmp_path / name).symlink_to(folder / name)
    cascade = Cascade.load(str(tmp_path))
    with pytest.raises(UserError, match="no prior/"):
        cascade.check_prompts(["a red apple"])
    assert cascade.decode(np.eye(8, dtype=np.float32)[:1], [""], jax.random.key(0)).shape == (1, 8, 8, 3)


def test_missing_folder_says_what_is_expected(tmp_path):
    with pytest.raises(UserError, match="expected a folder with decoder/ and what it needs"):
        Cascade.load(str(tmp_path / "nothing"))


def test_one_model_is_no_cascade_unless_it_is_a_glide(folder):
    with pytest.raises(UserError, match=r"decoder is one model, of stage 'decoder': expected a folder with decoder/"):
        Cascade.load(str(folder / "decoder"))


def test_decoder_of_another_clip_is_refused(tmp_path):
    with pytest.raises(UserError, match="decoder was trained against another CLIP"):
        Cascade.load(str(save_cascade(tmp_path, clip_of_decoder="f" * 64)))


@pytest.mark.parametrize(("place", "holds"), [("clip", "decoder"), ("decoder", "prior"), ("upsampler_256", "clip")])
def test_stage_in_anothers_place_is_refused(tmp_path, folder, place, holds):
    for name in {"clip", "prior", "decoder"} - {place}:
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / place).symlink_to(folder / holds)
    stage = json.loads((folder / holds / "config.json").read_text())["stage"]
    with pytest.raises(UserError, match=f"{place} holds a model of stage '{stage}'"):
        Cascade.load(str(tmp_path))


@pytest.mark.parametrize(
    ("prompt", "says"),
    [("", "empty"), (" \n", "empty"), ("a red apple " * 834, "tokens: CLIP reads 10"), ("q" * 10_000, "shorten it")],
)
def test_prompts_that_cannot_be_drawn(cascade, prompt, says):
    with pytest.raises(UserError, match=says) as caught:
        cascade.check_prompts(["a red apple", prompt])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda c: c.generate([], 0), "no captions"),
        (lambda c: c.generate(TEXTS, 2**70), "expected a whole number from 0 to"),
        (lambda c: c.generate(TEXTS, 0, float("nan")), "guidance_scale is nan"),
        (lambda c: c.generate(TEXTS, 0, embeddings=np.eye(8, dtype=np.float32)[:3]), "give as many of each"),
        (lambda c: c.decode(None, TEXTS, jax.random.key(0)), "no embeddings: this decoder draws"),
        (lambda c: c.decode(np.eye(8, dtype=np.float32)[:2], TEXTS, 0), "key 0: expected a key of JAX"),
        (lambda c: c.redraw(np.eye(8)[:2], np.zeros((2, 8, 8, 3)), 0, steps=1), "1 steps of DDIM: expected 3 to 1000"),
    ],
)
def test_what_python_callers_get_wrong_is_named(small, call, says):
    with pytest.raises(UserError, match=says) as caught:
        call(small)
    assert "\n" not in str(caught.value)


def test_good_prompts_pass(cascade):
    cascade.check_prompts(["a red apple", "RED", "🍎", "un œuf"])


def test_a_picture_is_the_same_in_any_company(small):
    """Alone, among others, and in another order; numbers of a caption and of its picture alone count."""
    texts, rows, draws = [*TEXTS, "a green tent"], [0, 1, 7], [0, 0, 3]
    together = small.generate(texts, 5, rows=rows, draws=draws)
    for order in ([2], [1, 0], [2, 1, 0]):
        chosen = ([values[i] for i in order] for values in (texts, rows, draws))
        apart = small.generate(next(chosen), 5, rows=next(chosen), draws=next(chosen))
        np.testing.assert_allclose(apart["embeddings"], together["embeddings"][order], atol=1e-5)
        difference = apart["images"][0].astype(int) - together["images"][0][order]
        assert np.abs(difference).max() <= 1, "programs of other shapes may round otherwise"
    other = small.generate(texts, 5, rows=rows, draws=[1, 0, 3])
    assert not np.array_equal(other["images"][0][0], together["images"][0][0])
    np.testing.assert_array_equal(other["images"][0][1:], together["images"][0][1:])
