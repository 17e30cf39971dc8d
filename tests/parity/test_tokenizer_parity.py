"""Tokenizers against transformers' CLIPTokenizer and GPT2Tokenizer, and CLIP's against its rules in plain Python."""

import html
import itertools

import pytest
import vocabularies

from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.pretrained import tokenizers

transformers = pytest.importorskip("transformers")
ftfy = pytest.importorskip("ftfy")
regex = pytest.importorskip("regex")

CONTEXT = 77
TEXTS = vocabularies.odd_texts(500)


def cleaned(text):
    """OpenAI's cleaning. transformers' tokenizer does less: it neither repairs encodings nor unescapes HTML, and its
    lower-casing knows no final sigma; so it is given cleaned text."""
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return regex.sub(r"\s+", " ", text).strip().lower()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """(ours, transformers', the merges), of one vocabulary in the two forms."""
    folder, merges = tmp_path_factory.mktemp("clip"), vocabularies.clip_merges()
    vocabularies.save_clip(folder, merges)
    ours = Tokenizer(tokenizers.read_clip(folder))
    vocabularies.save_huggingface(folder, vocabularies.clip_vocabulary(merges), merges)
    return ours, transformers.CLIPTokenizer.from_pretrained(folder), merges


def test_clip(clip):
    ours, theirs, _ = clip
    ids, lengths = ours.encode(TEXTS, CONTEXT, ends=True)
    texts = [cleaned(text) for text in TEXTS]
    expected = theirs(texts, truncation=True, max_length=CONTEXT)["input_ids"]
    for text, row, length, want in zip(texts, ids, lengths, expected, strict=True):
        assert row[:length].tolist() == want, repr(text)
        assert (row[length:] == 0).all()
    assert (lengths == CONTEXT).sum() > 50 and (lengths == 2).sum() >= 3
    assert set(ids[lengths == CONTEXT, -1]) == {theirs.eos_token_id}
    counts = [ours.count(text) for text in TEXTS]
    assert counts == [len(row) - 2 for row in theirs(texts)["input_ids"]] and max(counts) > 200


def by_the_rules(text, ranks, vocabulary):
    """CLIP's ids of raw text: words by its pattern; in each, the pair that stands highest is merged, until none is."""
    pattern = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order = printable + [byte for byte in range(256) if byte not in printable]
    ids = []
    for word in regex.findall(pattern, cleaned(text), regex.IGNORECASE):
        if word in (vocabularies.START, vocabularies.END):
            ids.append(vocabulary[word])
            continue
        parts = [vocabularies.SYMBOLS[order.index(byte)] for byte in word.encode()]
        parts[-1] += "</w>"
        while True:
            first = min(itertools.pairwise(parts), key=lambda pair: ranks.get(pair, len(ranks)), default=None)
            if first not in ranks:
                break
            merged, i = [], 0
            while i < len(parts):
                both = tuple(parts[i : i + 2]) == first
                merged.append("".join(first) if both else parts[i])
                i += 1 + both
            parts = merged
        ids += [vocabulary[part] for part in parts]
    return ids


def test_clip_by_the_rules(clip):
    """Raw text, with marks written out and letters whose case other libraries treat otherwise."""
    ours, _, merges = clip
    ranks, vocabulary = {pair: n for n, pair in enumerate(merges)}, vocabularies.clip_vocabulary(merges)
    marks = ["<|endoftext|>", "<|STARTOFTEXT|>", "&lt;|endoftext|&gt;", "<|endoftext|", "<|ſtartoftext|>", "it'ſ", "'S",
             "e&#x301;", "ΣΊΣΥΦΟΣ", "İ", "\u212a", "\u0345"]  # fmt: skip
    around = list(zip(TEXTS[20:60], TEXTS[60:100], strict=True))
    for text in TEXTS + [f"{before}{mark}{after}" for mark in marks for before, after in around]:
        ids, lengths = ours.encode([text], 2000, ends=False)
        assert ids[0, : lengths[0]].tolist() == by_the_rules(text, ranks, vocabulary), repr(text)


def test_gpt2(tmp_path):
    """Ids of lower-cased text as it is, padded with the end token; no marks are added, and a written one is text."""
    merges = vocabularies.gpt2_merges()
    vocabularies.save_gpt2(tmp_path, merges)
    ours = Tokenizer(tokenizers.read_gpt2(tmp_path))
    theirs = transformers.GPT2Tokenizer(vocab=vocabularies.gpt2_vocabulary(merges), merges=merges)
    ids, lengths = ours.encode(TEXTS, 128, ends=False)
    expected = theirs([text.lower() for text in TEXTS], truncation=True, max_length=128)["input_ids"]
    for text, row, length, want in zip(TEXTS, ids, lengths, expected, strict=True):
        assert row[:length].tolist() == want, repr(text)
        assert (row[length:] == theirs.eos_token_id).all()
        if length < 128:
            assert ours.decode(row[:length]) == text.lower()
    assert lengths.min() == 0 and (lengths == 128).sum() > 20
