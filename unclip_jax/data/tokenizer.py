"""Text → ids: a sentencepiece tokenizer trained on a dataset's own captions, or the byte-pair encoding that came with
public weights.

Two conventions: CLIP's, start + tokens + end (arXiv 2103.00020), and GLIDE's, the bare tokens (arXiv 2112.10741).
Padding is never told by its id: lengths say what is real.
"""

import html
import io
import re
import unicodedata
from collections.abc import Iterable

import numpy as np

from unclip_jax.errors import UserError

PAD, UNKNOWN, START, END = 0, 1, 2, 3
WRITTEN_MARKS = re.compile(r"<\|startoftext\|>|<\|endoftext\|>")


class Tokenizer:
    """Text → ids and back, of lower-cased text, as in the papers. Picklable.

    model_bytes: a sentencepiece model or, of imported models, a tokenizer.json of the `tokenizers` library.
    """

    def __init__(self, model_bytes: bytes):
        self.model_bytes = model_bytes
        self._model = _BytePairs(model_bytes) if is_json(model_bytes) else _SentencePieces(model_bytes)

    def __reduce__(self):
        return Tokenizer, (self.model_bytes,)

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size

    def count(self, text: str) -> int:
        """Number of tokens, start and end not counted."""
        return len(self._model.encode(text))

    def encode(self, texts: list[str], context: int, ends: bool) -> tuple[np.ndarray, np.ndarray]:
        """ids int32 (N, context) padded on the right, real lengths int32 (N,).

        ends: start and end tokens are added, and a text that is too long is cut before its end token; else the bare
        tokens are cut. Only CLIP's own tokenizer reads an end token that is written out in a text; the length is then
        up to there, where CLIP looks. Raises UserError for a tokenizer that knows no ends.
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
        """The (lower-cased) text of real ids."""
        marks = (self._model.start, self._model.end)
        return self._model.decode([int(i) for i in ids if i not in marks])


def is_json(model_bytes: bytes) -> bool:
    """Tells whether a tokenizer's bytes are a tokenizer.json; else they are a sentencepiece model."""
    return model_bytes.lstrip()[:1] == b"{"


class _SentencePieces:
    """Ours: falls back to bytes, so that no text is unknown."""

    pad, start, end = PAD, START, END

    def __init__(self, model_bytes: bytes):
        from sentencepiece import SentencePieceProcessor

        try:
            self._processor = SentencePieceProcessor(model_proto=model_bytes)
        except RuntimeError as error:
            raise UserError("the tokenizer is not a sentencepiece model: give a .model file of it") from error
        self.vocab_size = self._processor.vocab_size()
        self.encode = self._processor.encode
        self.decode = self._processor.decode


class _BytePairs:
    """Byte-level byte-pair encoding: CLIP's, which knows a start and an end token, or GPT-2's, as GLIDE uses it.

    The padding id is the one stored in the file.
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
        """CLIP cleans a text, which GPT-2 does not, and knows its marks where they are written out as words."""
        import ftfy

        text = " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()
        ids, done = [], 0
        for mark in WRITTEN_MARKS.finditer(text):
            before = text[done : mark.start()]
            # Neighbouring symbols are one word, and so swallow a mark's first two.
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


def train_tokenizer(captions: Iterable[str | list[str]], vocab_size: int) -> Tokenizer:
    """Byte-pair encoding of at most `vocab_size` pieces; the same captions give the same pieces.

    captions: of each record, one or several. Raises UserError where there are none, and where `vocab_size` has no room
    for 256 bytes, 4 marks and the captions' letters.
    """
    from sentencepiece import SentencePieceTrainer

    texts = (text for record in captions for text in ([record] if isinstance(record, str) else record))
    captions = [line for text in texts if (line := " ".join(text.split()))]
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
        raise UserError(f"no tokenizer of vocab_size={vocab_size}: {' '.join(str(error).split())}") from error
    return Tokenizer(model.getvalue())
