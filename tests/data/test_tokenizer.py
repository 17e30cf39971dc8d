"""Text to ids: nothing is lost, and the two conventions of cutting."""

import pickle
import re

import numpy as np
import pytest

from unclip_jax.data.tokenizer import END, PAD, START, UNKNOWN, Tokenizer, train_tokenizer
from unclip_jax.errors import UserError

CAPTIONS = [f"a {thing} on a {colour} background" for thing in ("pizza", "red apple") for colour in ("blue", "green")]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CAPTIONS * 20, 300)


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("a pizza on a blue background", None),
        ("A  Pizza\ton a BLUE background ", "a pizza on a blue background"),
        ("!!! 100% <s> </s> <pad> <unk> &amp;", None),
        ("漢字 und ünïcödé 🍕", None),
        ("ﬁne ①", "fine 1"),
        ("", None),
    ],
)
def test_any_text_comes_back(tokenizer, text, normalized):
    ids, lengths = tokenizer.encode([text], 80, ends=False)
    assert tokenizer.decode(ids[0, : lengths[0]]) == (text if normalized is None else normalized)
    assert lengths[0] == tokenizer.count(text) < 80
    # Written-out marks are text: they give no mark's id, and nothing is unknown.
    assert (ids[0, : lengths[0]] > END).all() and (ids[0, lengths[0] :] == PAD).all()


def test_clip_keeps_the_end_and_glide_is_bare(tokenizer):
    text = "a pizza on a blue background"
    full = tokenizer.encode([text], 80, ends=False)[0][0, : tokenizer.count(text)]
    assert len(full) > 6
    ids, lengths = tokenizer.encode([text, text, ""], 6, ends=True)
    np.testing.assert_array_equal(ids[0], [START, *full[:4], END])
    np.testing.assert_array_equal(ids[2], [START, END, PAD, PAD, PAD, PAD])
    np.testing.assert_array_equal(lengths, [6, 6, 2])
    assert ids.dtype == lengths.dtype == np.int32 and ids.shape == (3, 6)
    ids, lengths = tokenizer.encode([text, ""], 6, ends=False)
    np.testing.assert_array_equal(ids, [full[:6], [PAD] * 6])
    np.testing.assert_array_equal(lengths, [6, 0])
    exact = len(full) + 2
    np.testing.assert_array_equal(tokenizer.encode([text], exact, ends=True)[0][0], [START, *full, END])


def test_same_captions_same_model(tokenizer):
    assert train_tokenizer(iter(CAPTIONS * 20), 300).model_bytes == tokenizer.model_bytes
    assert train_tokenizer(["x y z"] * 20, 300).model_bytes != tokenizer.model_bytes


def test_learns_words_and_no_more_than_there_are(tokenizer):
    large = train_tokenizer(CAPTIONS * 20, 5000)
    assert tokenizer.vocab_size == 300 < large.vocab_size < 1000
    assert large.count("a pizza on a blue background") == 6


def test_several_captions_a_record():
    assert train_tokenizer([CAPTIONS[:2], CAPTIONS[2:]] * 20, 300).vocab_size == 300
    assert train_tokenizer([CAPTIONS] * 20, 300).model_bytes == train_tokenizer(CAPTIONS * 20, 300).model_bytes


def test_long_captions_are_learned_from():
    """sentencepiece itself leaves out lines of more than 4,192 bytes."""
    tokenizer = train_tokenizer(["pizza " * 2000, "ü" * 5000], 400)
    assert tokenizer.count("pizza pizza") == 2
    assert UNKNOWN not in tokenizer.encode(["ü"], 5, ends=False)[0]
    assert tokenizer.encode(["ü"], 5, ends=False)[1] < 1 + len("ü".encode())


def test_pickles(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.model_bytes == tokenizer.model_bytes
    np.testing.assert_array_equal(copy.encode(CAPTIONS, 20, True)[0], tokenizer.encode(CAPTIONS, 20, True)[0])


def test_errors():
    with pytest.raises(UserError, match="no captions"):
        train_tokenizer(["", " "], 300)
    with pytest.raises(UserError, match=r"vocab_size=100 has no room .* set it to ([0-9]+) at least") as caught:
        train_tokenizer(CAPTIONS, 100)
    least = int(re.search("to ([0-9]+) at", str(caught.value))[1])
    assert least == 4 + 256 + len(set("".join(CAPTIONS).replace(" ", "▁")))
    assert train_tokenizer(CAPTIONS, least).vocab_size == least
    with pytest.raises(UserError, match="no room"):
        train_tokenizer(CAPTIONS, least - 1)
    with pytest.raises(UserError, match="not a sentencepiece model"):
        Tokenizer(b"what is this")
