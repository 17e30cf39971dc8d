"""Small vocabularies with the structure of CLIP's and GPT-2's, in all the forms that they are published in."""

import functools
import gzip
import json
import random
import unicodedata

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

START, END = "<|startoftext|>", "<|endoftext|>"
VERSION = "#version: 0.2\n"
# Byte symbols in the order of CLIP's vocabulary: those of printable Latin-1 are the bytes themselves and stand first.
SYMBOLS = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda symbol: (ord(symbol) > 255, ord(symbol)))

TEXT = """
a the an of on in with and not photo painting drawing corgi dog cats horse astronaut teapot sunset mountains ocean red
green blue surrealist dream-like vibrant portrait Salvador Dalí robotic half face steampunk cubes wearing hat café naïve
東京 の 夜 猫 北京 Москва зимой кошка كلب 🍕 😀 👩‍🚀 ❤️ 3 14 2024 100 isn't it's they'll we've I'd I'm !!! ... -- :) ((
)) #1 50% $9.99 https://example.com/a?b=c&d=e @someone 1/2 ½ ² İstanbul ΣΊΣΥΦΟΣ straße ǅ
"""
WORDS = TEXT.split()


@functools.cache
def corpus():
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(2000)]


@functools.cache
def clip_merges(count=700):
    return _trained([line.lower() for line in corpus()], pre_tokenizers.WhitespaceSplit(), count, "</w>")


@functools.cache
def gpt2_merges(count=700):
    return _trained([line.lower() for line in corpus()], None, count, "")


def _trained(lines, words, count, suffix):
    """The first `count` merges that byte-pair encoding learns from `lines`, each a pair."""
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=suffix))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_]) if words else bytes_
    options = {"end_of_word_suffix": suffix} if suffix else {}
    trainer = trainers.BpeTrainer(
        vocab_size=10**6, min_frequency=1, initial_alphabet=SYMBOLS, show_progress=False, **options
    )
    tokenizer.train_from_iterator(lines, trainer)
    merges, seen = [], set()
    for pair in json.loads(tokenizer.to_str())["model"]["merges"]:
        if "".join(pair) not in seen and len(merges) < count:  # one way to a token, as in the published vocabularies
            seen.add("".join(pair))
            merges.append(tuple(pair))
    return merges


def clip_vocabulary(merges):
    tokens = [*SYMBOLS, *(symbol + "</w>" for symbol in SYMBOLS), *("".join(pair) for pair in merges), START, END]
    return {token: n for n, token in enumerate(tokens)}


def gpt2_vocabulary(merges):
    return {token: n for n, token in enumerate([*SYMBOLS, *("".join(pair) for pair in merges), END])}


def lines_of(merges):
    return "".join(f"{first} {second}\n" for first, second in merges)


def save_clip(folder, merges, compressed=True):
    """As OpenAI publishes it."""
    text = ("bpe_simple_vocab_16e6.txt" + VERSION + lines_of(merges)).encode()
    name = "bpe_simple_vocab_16e6.txt" + (".gz" if compressed else "")
    (folder / name).write_bytes(gzip.compress(text) if compressed else text)


def save_huggingface(folder, vocabulary, merges):
    """As the transformers library stores it."""
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text(VERSION + lines_of(merges))


def save_gpt2(folder, merges, compressed=True):
    """As GLIDE's repository holds it."""
    files = {"encoder.json": json.dumps(gpt2_vocabulary(merges)), "vocab.bpe": VERSION + lines_of(merges)}
    for name, text in files.items():
        if compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (folder / name).write_text(text)


def odd_texts(count, seed=0):
    """Texts such as nobody trained on: mixed scripts, emoji, HTML, broken encodings, blanks of all kinds, long ones.

    Letters are of those that Unicode has had for years, so that all libraries agree on what is a letter.
    """
    rng = random.Random(seed)
    texts = ["", " ", "\n\t ", "!", "!!!", "'", "''s", "a" * 300, "🍕" * 60, "x " * 200, "0123456789" * 12, "<|", "|>"]
    blanks = (" ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "\u2009", "\u2028", "")
    html = ("&amp;", "&lt;b&gt;", "&amp;lt;", "&quot;", "&#39;", "&eacute;", "<b>", "</w>", "&notit;", "&#x1F600;")
    broken = ("âœ”", "Ã©", "â€™s", "ﬁ", "ｆｕｌｌ", "“quoted”", "it’s", "don’t", "\x1b[31m", "\x00", "\ufeff", "\u200b")

    def piece():
        kind = rng.randrange(8)
        if kind < 3:
            word = rng.choice(WORDS) + rng.choice(("", "", ",", ".", "'s", "'LL"))
            return rng.choice((word, word.upper(), word.title(), word[::-1]))
        if kind == 3:
            return rng.choice(html)
        if kind == 4:
            return rng.choice(broken)
        if kind == 5:
            return "".join(rng.choices("!?.,;:-_#$%&/()[]{}*+=<>|^~`'\"\\", k=rng.randint(1, 5)))
        if kind == 6:
            return str(rng.randrange(10 ** rng.randint(1, 9)))
        return "".join(_letter(rng) for _ in range(rng.randint(1, 6)))

    while len(texts) < count:
        length = rng.choice((1, 2, 5, 12, 60))
        texts.append("".join(piece() + rng.choice(blanks) for _ in range(length)))
    return texts[:count]


def _letter(rng):
    """Of scripts old enough to be in every version of Unicode, some with combining marks."""
    first, last = rng.choice(((0x20, 0x17F), (0x370, 0x3FF), (0x400, 0x4FF), (0x5D0, 0x5EA), (0x620, 0x64A),
                              (0x900, 0x97F), (0xE01, 0xE3A), (0x1F00, 0x1FFF), (0x3041, 0x30FF), (0x4E00, 0x9FA5),
                              (0xAC00, 0xD7A3), (0x300, 0x344), (0x2190, 0x21FF), (0x1F300, 0x1F5FF)))  # fmt: skip
    while unicodedata.category(letter := chr(rng.randint(first, last))) == "Cn":
        pass
    return letter
