"""Vocabulary files to tokenizers: ids by the rules of CLIP's vocabulary and GPT-2's, and damaged files."""

import gzip
import json
import pickle
import string
import unicodedata

import numpy as np
import pytest
import vocabularies as v

from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.errors import UserError
from unclip_jax.pretrained import tokenizers

# Ids follow from these alone: 512 byte symbols, then one id a merge, then start and end.
FEW = ["l o", "w e", "lo w</w>", "we r</w>", "lo we", "! !", "Ã ©</w>", "lowe r</w>"]
FEW = [tuple(merge.split()) for merge in FEW]
START, END = 512 + len(FEW), 513 + len(FEW)


def clip(folder, merges=FEW, **options):
    v.save_clip(folder, merges, **options)
    return Tokenizer(tokenizers.read_clip(folder))


def ids(tokenizer, text):
    rows, lengths = tokenizer.encode([text], 100, ends=False)
    return rows[0, : lengths[0]].tolist()


def letter(character, last=False):
    """The id of a printable ASCII character."""
    return ord(character) - ord("!") + 256 * last


def test_clip_ids_by_hand(tmp_path):
    tokenizer = clip(tmp_path)
    assert tokenizer.vocab_size == 514 + len(FEW)
    assert ids(tokenizer, "low") == [514]
    # "we r" is merged before "lo we", for it stands higher.
    assert ids(tokenizer, "Lower low") == [512, 515, 514]
    assert ids(tokenizer, "lowed") == [516, letter("d", True)]
    assert ids(tokenizer, "!!!") == [517, letter("!", True)]
    assert ids(tokenizer, "é 12's") == [518, letter("1", True), letter("2", True), letter("'"), letter("s", True)]
    rows, lengths = tokenizer.encode(["low", "", "low " * 9], 5, ends=True)
    np.testing.assert_array_equal(rows, [[START, 514, END, 0, 0], [START, END, 0, 0, 0], [START, 514, 514, 514, END]])
    np.testing.assert_array_equal(lengths, [3, 2, 5])


def test_every_byte_has_an_id(tmp_path):
    """Bytes of printable Latin-1 come first, then the others; a word's last byte is 256 higher. No text is unknown."""
    tokenizer = clip(tmp_path, merges=[])
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    order = printable + [byte for byte in range(256) if byte not in printable]
    place = {byte: n for n, byte in enumerate(order)}
    letters = [chr(code) for code in [*range(0x41, 0x2000), *range(0x4E00, 0x4F00), *range(0x20000, 0x20100)]]
    letters = [letter for letter in letters if unicodedata.category(letter) in ("Lo", "Nd", "So")]
    letters = [letter for letter in letters if unicodedata.is_normalized("NFC", letter) and not "！" <= letter <= "～"]
    for character in string.ascii_lowercase + string.digits + string.punctuation + "".join(letters):
        *first, last = [place[byte] for byte in character.encode()]
        assert ids(tokenizer, character) == [*first, 256 + last], hex(ord(character))
    assert tokenizer.decode(ids(tokenizer, "漢字 ünd 🍕")) == "漢字 ünd 🍕"


def test_vocabulary_of_the_published_size(tmp_path):
    """OpenAI's file goes on after the merges that CLIP uses: 49,408 ids, start 49,406, end 49,407, padding 0."""
    merges = [(first, second) for first in v.SYMBOLS for second in v.SYMBOLS][: 48_894 + 500]
    tokenizer = clip(tmp_path, merges)
    assert tokenizer.vocab_size == 49_408
    rows, lengths = tokenizer.encode(["~" * 3], 77, ends=True)
    np.testing.assert_array_equal(rows[0, [0, lengths[0] - 1]], [49_406, 49_407])
    assert not rows[0, lengths[0] :].any() and rows.shape == (1, 77)


def test_all_forms_of_a_vocabulary_are_one(tmp_path):
    merges, found = v.clip_merges(), []
    for form in ("gz", "txt", "huggingface", "json", "old json"):
        folder = tmp_path / form
        folder.mkdir()
        if form in ("gz", "txt"):
            v.save_clip(folder, merges, compressed=form == "gz")
        elif form == "huggingface":
            v.save_huggingface(folder, v.clip_vocabulary(merges), merges)
        else:
            vocabulary = v.clip_vocabulary(merges)
            added = [{"id": vocabulary.pop(mark), "content": mark} for mark in (v.START, v.END)]
            pairs = [" ".join(pair) for pair in merges] if form == "old json" else merges
            content = {"added_tokens": added, "model": {"vocab": vocabulary, "merges": pairs}}
            (folder / "tokenizer.json").write_text(json.dumps(content))
        found.append(Tokenizer(tokenizers.read_clip(folder)).encode(v.odd_texts(60), 77, ends=True)[0])
    for rows in found[1:]:
        np.testing.assert_array_equal(rows, found[0])
    assert len(np.unique(found[0])) > 300


def test_text_comes_back(tmp_path):
    tokenizer = clip(tmp_path, v.clip_merges())
    for text in ("a photo of a corgi wearing a hat", "猫 und ünïcödé 🍕", "lower ! case", "!?", ""):
        assert tokenizer.decode(ids(tokenizer, f"  {text.upper()}  ")) == text
        rows, lengths = tokenizer.encode([text], 77, ends=True)
        assert tokenizer.decode(rows[0, : lengths[0]]) == text
    assert ids(pickle.loads(pickle.dumps(tokenizer)), "a corgi") == ids(tokenizer, "a corgi")
    assert tokenizer.count("a corgi") == len(ids(tokenizer, "a corgi")) == 2


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (" A \t\n b\u3000c ", "a b c"),
        ("<b> &amp;lt; &eacute;", "<b> < é"),  # escaped twice; where there is a <, ftfy leaves it
        ("cafe\u0301 ﬁne “x” it’s", 'café fine "x" it\'s'),
        ("schÃ¶n âœ”", "schön ✔"),  # UTF-8 read as Latin-1
        ("ΣΊΣΥΦΟΣ İ", "σίσυφος i̇"),
    ],
)
def test_clip_cleans(tmp_path, text, clean):
    tokenizer = clip(tmp_path, v.clip_merges())
    words = [part for word in clean.split(" ") for part in ids(tokenizer, word)]
    assert ids(tokenizer, text) == words
    assert tokenizer.decode(words).replace(" ", "") == clean.replace(" ", "")


def test_written_out_marks(tmp_path):
    """As in OpenAI's code: marks where they are whole words, which symbols before them prevent; CLIP reads the first
    end token's place."""
    tokenizer = clip(tmp_path)
    low, end = [514], [END]
    assert ids(tokenizer, "low<|endoftext|>low") == low + end + low
    assert ids(tokenizer, "<|STARTOFTEXT|> low <|EndOfText|><|endoftext|>") == [START, *low, *end, *end]
    assert ids(tokenizer, "3<|endoftext|>!") == [letter("3", True), *end, letter("!", True)]
    swallowed = ids(tokenizer, "!<|endoftext|>")
    assert END not in swallowed and swallowed[:3] == [letter("!"), letter("<"), letter("|", True)]
    assert END not in ids(tokenizer, "<|endoftext|") and END not in ids(tokenizer, "!<|endoftext|><|endoftext|>")
    rows, lengths = tokenizer.encode(["low<|endoftext|>low", "low"], 8, ends=True)
    np.testing.assert_array_equal(rows[0], [START, *low, *end, *low, *end, 0, 0, 0])
    np.testing.assert_array_equal(lengths, [3, 3])


@pytest.mark.parametrize("compressed", [True, False])
def test_gpt2(tmp_path, compressed):
    """Blanks belong to the next word, marks are text, and only the end token, which pads, has an id of its own."""
    merges = [("Ġ", "l"), ("Ġl", "o"), ("Ġlo", "w"), ("l", "o"), ("lo", "w")]
    v.save_gpt2(tmp_path, merges, compressed)
    tokenizer = Tokenizer(tokenizers.read_gpt2(tmp_path))
    assert tokenizer.vocab_size == 262
    assert ids(tokenizer, "LOW low  low") == [260, 258, v.SYMBOLS.index("Ġ"), 258]
    assert ids(tokenizer, "&amp;") == [letter(c) for c in "&amp;"]
    assert 261 not in ids(tokenizer, v.END) and tokenizer.decode(ids(tokenizer, f" Ü {v.END}")) == f" ü {v.END}"
    rows, lengths = tokenizer.encode(["low", "", "low low low low"], 3, ends=False)
    np.testing.assert_array_equal(rows, [[260, 261, 261], [261, 261, 261], [260, 258, 258]])
    np.testing.assert_array_equal(lengths, [1, 0, 3])
    with pytest.raises(UserError, match="no start token"):
        tokenizer.encode(["low"], 5, ends=True)


def test_missing_files(tmp_path):
    clip, gpt2 = "bpe_simple_vocab_16e6.txt.gz", "encoder.json with"
    for make, wanted in ((tokenizers.read_clip, clip), (tokenizers.read_gpt2, gpt2)):
        with pytest.raises(UserError, match=f"no vocabulary in {tmp_path}: expected {wanted}.*tokenizer.json"):
            make(tmp_path)
        (tmp_path / "vocab.json").write_text(json.dumps(v.gpt2_vocabulary(FEW)))
        with pytest.raises(UserError, match=r"no merges\.txt in"):
            make(tmp_path)
        (tmp_path / "vocab.json").unlink()


def test_damaged_files(tmp_path):
    path = tmp_path / "bpe_simple_vocab_16e6.txt.gz"

    def fails(content, message):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            tokenizers.read_clip(tmp_path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)

    v.save_clip(tmp_path, v.clip_merges())
    whole = path.read_bytes()
    fails(whole[: len(whole) // 2], "damaged or cut short")
    fails(whole[:-1], "damaged or cut short")
    fails(b"\xff\xfe", "damaged or cut short")
    fails(gzip.compress(bytes(tokenizers.MOST_BYTES + 1)), "holds more than 67,108,864 bytes of text")
    fails(b"<html>\n404 not found\n</html>", "line 1, is not two symbols to merge")
    fails(b"#version: 0.2\nl o\nlow\n", "line 3, is not two symbols to merge")
    fails("#version: 0.2\nl o\n猫 o\n".encode(), "do not agree")


def test_wrong_json(tmp_path):
    def fails(message, make=tokenizers.read_clip):
        with pytest.raises(UserError, match=message):
            make(tmp_path)

    v.save_huggingface(tmp_path, v.clip_vocabulary(FEW), FEW)
    vocabulary = tmp_path / "vocab.json"
    whole = vocabulary.read_text()
    vocabulary.write_text(whole[:-9])
    fails(r"vocab\.json is not JSON")
    for content in ("[]", '{"a": 1}', '{"a": "0"}', '{"a": [0]}'):
        vocabulary.write_text(content)
        fails(r"vocab\.json is not a vocabulary")
    vocabulary.write_text(json.dumps(v.gpt2_vocabulary(FEW)))
    fails(r"another model's vocabulary: it lacks 257 tokens, such as '!</w>'")
    vocabulary.write_text(json.dumps(v.clip_vocabulary(FEW[:-1])))
    fails("do not agree")
    vocabulary.unlink()
    tokenizer = tmp_path / "tokenizer.json"
    for content in ("[]", "{}", '{"model": {"type": "Unigram", "vocab": [["a", 0.0]]}, "added_tokens": []}'):
        tokenizer.write_text(content)
        fails(r"tokenizer\.json is not a tokenizer\.json of byte pairs", tokenizers.read_gpt2)
    with pytest.raises(UserError, match="names no padding"):
        Tokenizer(json.dumps(json.loads(clip(tmp_path).model_bytes) | {"padding": None}).encode())
    with pytest.raises(UserError, match=r"not a tokenizer\.json"):
        Tokenizer(b"{}")


def test_compressed_or_not_is_told_by_the_content(tmp_path):
    path = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    v.save_clip(tmp_path, FEW)
    expected = tokenizers.read_clip(tmp_path)
    path.write_bytes(gzip.decompress(path.read_bytes()))
    assert tokenizers.read_clip(tmp_path) == expected
