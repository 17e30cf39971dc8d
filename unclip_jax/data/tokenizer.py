"""Turns text into token ids and back.

A tokenizer is a sentencepiece model trained on a dataset's own captions, or the byte-pair encoding that came with
public weights. CLIP reads start + tokens + end (arXiv 2103.00020), GLIDE the bare tokens (arXiv 2112.10741). Lengths,
not the padding's id, tell real tokens from padding.
"""

import html
import io
import re
import unicodedata
from collections.abc import Iterable

import numpy as np

from unclip_jax.errors import UserError

PAD, UNKNOWN, START, END = 0, 1, 2, 3
MOST_BYTES = 4192  # of a caption that a tokenizer is trained on; far more than any model's context
WRITTEN_MARKS = re.compile(r"<\|startoftext\|>|<\|endoftext\|>")


class Tokenizer:
    """Tokenizer of lower-cased text, as in the papers. It can be pickled.

    model_bytes: a sentencepiece model or, with public weights, a tokenizer.json of the `tokenizers` library. Raises
    UserError for anything else.
    """

    def __init__(self, model_bytes: bytes):
        self.model_bytes = model_bytes
        self._model = _BytePairs(model_bytes) if is_json(model_bytes) else _SentencePieces(model_bytes)

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[bytes]]:
        return Tokenizer, (self.model_bytes,)

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size

    def count(self, text: str) -> int:
        """Counts the tokens of a text, without start and end."""
        return len(self._model.encode(text))

    def encode(self, texts: list[str], context: int, ends: bool) -> tuple[np.ndarray, np.ndarray]:
        """Encodes texts; returns ids, int32 (N, context), padded on the right, and real lengths, int32 (N,).

        ends: add start and end tokens, and cut a text that is too long before its end token; else cut the bare tokens.
        Only CLIP's own tokenizer recognises an end token that is written out in a text; the length then ends there,
        because CLIP takes the embedding from the first end token. Raises UserError for ends from a tokenizer without
        start and end tokens.
        """
        if ends and self._model.start is None:
            raise UserError("this tokenizer has no start token, and CLIP's captions need one: give CLIP's vocabulary")
        room = context - 2 if ends else context
        ids = np.full((len(texts), context), self._model.pad, np.int32)
        lengths = np.zeros(len(texts), np.int32)
        for row, text in enumerate(texts):
            tokens = self._model.encode(text)[:room]
            tokens = [self._model.start, *tokens, self._model.end] if ends else tokens
            ids[row, : len(tokens)] = tokens
            lengths[row] = tokens.index(self._model.end) + 1 if ends else len(tokens)
        return ids, lengths

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the lower-cased text of ids without padding."""
        marks = (self._model.start, self._model.end)
        return self._model.decode([int(i) for i in ids if i not in marks])


def is_json(model_bytes: bytes) -> bool:
    """Tells whether a tokenizer's bytes are a tokenizer.json instead of a sentencepiece model."""
    return model_bytes.lstrip()[:1] == b"{"


class _SentencePieces:
    """This library's own tokenizer. It falls back to bytes, so that no text is unknown."""

    pad, start, end = PAD, START, END

    def __init__(self, model_bytes: bytes):
        from sentencepiece import SentencePieceProcessor

        try:
            self._processor = SentencePieceProcessor(model_proto=model_bytes)
        except RuntimeError as error:
            raise UserError("the tokenizer is not a sentencepiece model: give sentencepiece's .model file") from error
        self.vocab_size = self._processor.vocab_size()
        self.encode = self._processor.encode
        self.decode = self._processor.decode


class _BytePairs:
    """Byte-pair encoding of bytes: CLIP's, which has start and end tokens, or GPT-2's, as GLIDE uses it.

    It pads with the id that the file names.
    """

    def __init__(self, model_bytes: bytes):
        from tokenizers import Tokenizer as Model

        try:
            self._model = Model.from_str(model_bytes.decode())
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(f"the tokenizer is not a tokenizer.json: {error}") from error
        if self._model.padding is None:
            raise UserError("the tokenizer.json names no padding: give one of a bundle made by unclip_jax.pretrained")
        self.vocab_size = self._model.get_vocab_size()
        self.start, self.end = (self._model.token_to_id(mark) for mark in ("<|startoftext|>", "<|endoftext|>"))
        self.pad = self._model.padding["pad_id"]
        self._model.no_padding()

    def encode(self, text: str) -> list[int]:
        return self._ids(text.lower()) if self.start is None else self._clip_ids(text)

    def _clip_ids(self, text: str) -> list[int]:
        """Encodes a text as CLIP does: cleaned first, and with start and end tokens where they are written out."""
        import ftfy

        text = " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()
        ids, done = [], 0
        for mark in WRITTEN_MARKS.finditer(text):
            before = text[done : mark.start()]
            # Symbols side by side are one word, so that a symbol before a mark swallows the mark's first two.
            if before and not (before[-1].isspace() or unicodedata.category(before[-1])[0] in "LN"):
                continue
            ids += [*self._ids(before), self._model.token_to_id(mark.group())]
            done = mark.end()
        return ids + self._ids(text[done:])

    def _ids(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        text = self._model.decode(ids, skip_special_tokens=False)
        return text if self.start is None else text.rstrip()  # CLIP's words end in a space


def _cut(text: str) -> str:
    """Cuts a text to the bytes that sentencepiece takes, which would leave out longer ones as a whole."""
    return text.encode()[:MOST_BYTES].decode(errors="ignore")


def train_tokenizer(captions: Iterable[str | list[str]], vocab_size: int, key: str = "vocab_size") -> Tokenizer:
    """Trains a byte-pair encoding of at most `vocab_size` pieces; the same captions give the same pieces.

    captions: one or several of each record. key: name of `vocab_size` in a config. Raises UserError where there are no
    captions, and where `vocab_size` has no room for 256 bytes, 4 marks and their letters.
    """
    from sentencepiece import SentencePieceTrainer

    texts = (text for record in captions for text in ([record] if isinstance(record, str) else record))
    captions = [line for text in texts if (line := _cut(" ".join(text.split())))]
    if not captions:
        raise UserError("no captions to train a tokenizer on: the dataset has none")
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(captions),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            hard_vocab_limit=False,
            byte_fallback=True,
            normalization_rule_name="nmt_nfkc_cf",
            pad_id=PAD,
            unk_id=UNKNOWN,
            bos_id=START,
            eos_id=END,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        said = " ".join(str(error).split())
        if too_small := re.search(r"required_chars\D*\d+ vs (\d+)", said):
            raise UserError(f"{key}={vocab_size} has no room for the letters of these captions: set it to "
                            f"{too_small[1]} at least, or to some thousands for whole words") from error  # fmt: skip
        raise UserError(f"no tokenizer of {key}={vocab_size}: {said}") from error
    return Tokenizer(model.getvalue())
