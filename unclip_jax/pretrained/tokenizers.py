"""Makes tokenizers from the vocabulary files that come with public weights.

There are two: CLIP's (arXiv 2103.00020), and GPT-2's, by which GLIDE reads captions (arXiv 2112.10741). Both are
byte-pair encodings: a text is cut into words and a word into its bytes, each written as a printable symbol; then pairs
of neighbours are merged in the order of a list. The result is a tokenizer.json, as bytes for the class
`data.tokenizer.Tokenizer`, which also cleans texts as CLIP's own code does.
"""

import gzip
import io
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unclip_jax.errors import UserError
from unclip_jax.foreign import parsed_json

if TYPE_CHECKING:
    import tokenizers

START, END = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"
SPACE = chr(256 + ord(" "))  # symbol of the byte " "
CLIP_MERGES = 49152 - 256 - 2  # of the 262,143 in OpenAI's file
CLIP_FILES = ("bpe_simple_vocab_16e6.txt.gz", "bpe_simple_vocab_16e6.txt")
GPT2_FILES = (("encoder.json", "vocab.bpe"), ("encoder.json.gz", "vocab.bpe.gz"))
HUGGINGFACE_FILES = ("vocab.json", "merges.txt")
MOST_BYTES = 2**26  # of a vocabulary's text; a small gzipped file can hold any number
# Upper and lower case are the same here, as in the reference, where ſ, a lower-case letter, therefore matches an s.
CLIP_WORDS = r"(?i:<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+)"

Merges = list[tuple[str, str]]


def read_clip(folder: Path) -> bytes:
    """Makes CLIP's tokenizer.json; it pads with id 0, as OpenAI's code does.

    It is read from the first of these that `folder` has: bpe_simple_vocab_16e6.txt.gz or .txt; vocab.json with
    merges.txt; tokenizer.json. Raises UserError where there is none, and for a damaged one.
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


def read_gpt2(folder: Path) -> bytes:
    """Makes GPT-2's tokenizer.json, without a start token; it pads with <|endoftext|>, as GLIDE's code does.

    It is read from the first of these that `folder` has: encoder.json with vocab.bpe, or both as .gz; vocab.json with
    merges.txt; tokenizer.json. Raises UserError where there is none, and for a damaged one.
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
    """Lists the 256 symbols that stand for bytes, in the order of CLIP's vocabulary.

    First come the bytes that are printable characters of Latin-1, as themselves, then the others, as the characters
    from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(n) for n in printable] + [chr(256 + n) for n in range(256 - len(printable))]


def read_json(path: Path) -> Any:
    """Reads a JSON file, which may be gzipped. Raises UserError for one that is missing, damaged or not JSON."""
    text = _text(path)
    try:
        return parsed_json(text)
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): download it again") from error


def _text(path: Path) -> str:
    """Reads the text of a file, which may be gzipped. Raises UserError for one that is missing or damaged."""
    if not path.is_file():
        raise UserError(f"no {path.name} in {path.parent}: download it there, it comes with the weights")
    data = path.read_bytes()
    try:
        if data[:2] == b"\x1f\x8b":
            data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise UserError(f"{path} holds more than {MOST_BYTES:,} bytes of text: it is no vocabulary")
        return data.decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged or cut short ({error}): download it again") from error


def _merges(path: Path, at_most: int | None = None) -> Merges:
    """Reads pairs of symbols, one pair a line, below a line that may tell the version."""
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
    """Reads (file, vocabulary, merges) as the transformers library stores them. wanted: other files, for the error."""
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


def _vocabulary(path: Path, content: object) -> dict[str, int]:
    """Returns a file's content if it maps tokens to the ids 0, 1, 2, …; else raises UserError."""
    ids = content.values() if isinstance(content, dict) else [None]
    if not all(isinstance(n, int) for n in ids) or sorted(ids) != list(range(len(ids))):
        raise UserError(f"{path} is not a vocabulary: expected tokens numbered from 0, none left out")
    return content


def _byte_pairs(
    source: Path, vocabulary: dict[str, int], merges: Merges, needed: list[str], suffix: str
) -> "tokenizers.Tokenizer":
    """Makes a tokenizer that merges symbols; how it cuts a text into words and joins them again is set later.

    source: file of the vocabulary. needed: tokens that must be in it. suffix: symbol that ends a word, or "". Raises
    UserError where vocabulary and merges do not belong together.
    """
    from tokenizers import Tokenizer, models

    missing = [token for token in needed if token not in vocabulary]
    if missing:
        raise UserError(
            f"{source} is another model's vocabulary: it lacks {len(missing)} tokens, such as {missing[0]!r}; download "
            "the one that comes with the weights"
        )
    try:
        return Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix=suffix))
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"{source} and its merges do not agree ({error}): download them again") from error
