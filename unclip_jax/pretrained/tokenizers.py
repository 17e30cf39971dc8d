"""The tokenizers of public weights, from the vocabulary files that come with them: CLIP's byte pairs (arXiv 2103.00020)
and GPT-2's, which GLIDE reads captions with (arXiv 2112.10741).

A text is cut into words, a word into its bytes, each written as a printable symbol; then neighbours are merged in the
order of a list. Functions give the bytes of a tokenizer.json, for `data.tokenizer.Tokenizer`. Texts must be cleaned
first, which that class does.
"""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

from unclip_jax.errors import UserError

START, END = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"
SPACE = chr(256 + ord(" "))  # as a symbol
CLIP_MERGES = 49152 - 256 - 2  # of the 262,143 in OpenAI's file
CLIP_FILES = ("bpe_simple_vocab_16e6.txt.gz", "bpe_simple_vocab_16e6.txt")
GPT2_FILES = (("encoder.json", "vocab.bpe"), ("encoder.json.gz", "vocab.bpe.gz"))
HUGGINGFACE_FILES = ("vocab.json", "merges.txt")
# Without regard to case, as the reference's: ſ, which is a lower-case letter, then stands for an s.
CLIP_WORDS = r"(?i:<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+)"

Merges = list[tuple[str, str]]


def clip(folder: Path) -> bytes:
    """CLIP's tokenizer.json; padding is id 0, as OpenAI's.

    Read from the first that `folder` has of: bpe_simple_vocab_16e6.txt.gz or .txt; vocab.json with merges.txt;
    tokenizer.json. Raises UserError where none is there, and for one that is damaged.
    """
    from tokenizers import Regex, decoders, pre_tokenizers

    symbols = byte_symbols()
    symbols += [symbol + END_OF_WORD for symbol in symbols]
    found = [folder / name for name in CLIP_FILES if (folder / name).is_file()]
    if found:
        source = found[0]
        merges = _merges(source, CLIP_MERGES)
        tokens = [*symbols, *(first + second for first, second in merges), START, END]
        vocabulary = {token: n for n, token in enumerate(tokens)}
    else:
        source, vocabulary, merges = _huggingface(folder, CLIP_FILES[0])
    model = _byte_pairs(source, vocabulary, merges, [*symbols, START, END], END_OF_WORD)
    words = pre_tokenizers.Split(Regex(CLIP_WORDS), "removed", invert=True)
    model.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    model.decoder = decoders.Sequence([decoders.Replace(END_OF_WORD, SPACE), decoders.ByteLevel()])
    model.enable_padding(pad_id=0, pad_token=model.id_to_token(0))
    return model.to_str().encode()


def gpt2(folder: Path) -> bytes:
    """GPT-2's tokenizer.json, with GLIDE's padding, <|endoftext|>; it has no start token.

    Read from the first that `folder` has of: encoder.json with vocab.bpe, or both as .gz; vocab.json with merges.txt;
    tokenizer.json. Raises UserError where none is there, and for one that is damaged.
    """
    from tokenizers import decoders, pre_tokenizers

    found = [pair for pair in GPT2_FILES if all((folder / name).is_file() for name in pair)]
    if found:
        source, merges = (folder / name for name in found[0])
        vocabulary, merges = _vocabulary(source, read_json(source)), _merges(merges)
    else:
        source, vocabulary, merges = _huggingface(folder, " with ".join(GPT2_FILES[0]))
    model = _byte_pairs(source, vocabulary, merges, [*byte_symbols(), END], "")
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.enable_padding(pad_id=vocabulary[END], pad_token=END)
    return model.to_str().encode()


def byte_symbols() -> list[str]:
    """The 256 symbols that bytes are written as, in the order of CLIP's vocabulary: first the bytes that are printable
    in Latin-1, as themselves, then the others, as the characters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(n) for n in printable] + [chr(256 + n) for n in range(256 - len(printable))]


def read_json(path: Path) -> Any:
    """Raises UserError for a file that is missing or is not JSON."""
    text = _text(path)
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): download it again") from error


def _text(path: Path) -> str:
    """Reads the text of a file that may be compressed."""
    if not path.is_file():
        raise UserError(f"no {path.name} in {path.parent}: download it there, it comes with the weights")
    data = path.read_bytes()
    try:
        return (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged or cut short ({error}): download it again") from error


def _merges(path: Path, at_most: int | None = None) -> Merges:
    """Pairs of symbols, a line each, below a line that tells the version."""
    lines = _text(path).split("\n")
    first = int("#version" in lines[0])
    while lines and not lines[-1].strip():
        lines.pop()
    lines = lines[first:] if at_most is None else lines[first : first + at_most]
    pairs = [tuple(line.split()) for line in lines]
    for number, pair in enumerate(pairs, first + 1):
        if len(pair) != 2:
            raise UserError(f"{path}, line {number}, is not two symbols to merge: download it again")
    return pairs


def _huggingface(folder: Path, wanted: str) -> tuple[Path, dict[str, int], Merges]:
    """(file, vocabulary, merges), as the transformers library stores them."""
    vocabulary, merges = (folder / name for name in HUGGINGFACE_FILES)
    if vocabulary.is_file():
        return vocabulary, _vocabulary(vocabulary, read_json(vocabulary)), _merges(merges)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            f"no vocabulary in {folder}: expected {wanted}, {' with '.join(HUGGINGFACE_FILES)}, or tokenizer.json"
        )
    content = read_json(path)
    try:
        model = content["model"]
        # Older files write a merge as one string.
        merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
        added = {token["content"]: token["id"] for token in content["added_tokens"]}
        return path, _vocabulary(path, model["vocab"] | added), merges
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a tokenizer.json of byte pairs: download it again") from error


def _vocabulary(path: Path, content: Any) -> dict[str, int]:
    ids = content.values() if isinstance(content, dict) else [None]
    if not all(isinstance(n, int) for n in ids) or sorted(ids) != list(range(len(ids))):
        raise UserError(f"{path} is not a vocabulary: expected tokens numbered from 0, none left out")
    return content


def _byte_pairs(source: Path, vocabulary: dict[str, int], merges: Merges, needed: list[str], suffix: str):
    """A tokenizer that neither cuts a text into words nor puts it together again yet."""
    from tokenizers import Tokenizer, models

    missing = [token for token in needed if token not in vocabulary]
    if missing:
        raise UserError(f"{source} is another model's vocabulary: {len(missing)} tokens lack, {missing[0]!r} first")
    try:
        return Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix=suffix))
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"{source} and its merges do not agree ({error}): download them again") from error
