"""Text → ids: a sentencepiece tokenizer trained on a dataset's own captions.

Two conventions: CLIP's, start + tokens + end (arXiv 2103.00020), and GLIDE's, the bare tokens (arXiv 2112.10741).
Padding is never told by its id: lengths say what is real.
"""

import io
from collections.abc import Iterable

import numpy as np

from unclip_jax.errors import UserError

PAD, UNKNOWN, START, END = 0, 1, 2, 3


class Tokenizer:
    """Lower-cases, as the papers do, and falls back to bytes, so that no text is unknown. Picklable."""

    def __init__(self, model_bytes: bytes):
        from sentencepiece import SentencePieceProcessor

        self.model_bytes = model_bytes
        try:
            self._processor = SentencePieceProcessor(model_proto=model_bytes)
        except RuntimeError as error:
            raise UserError("the tokenizer is not a sentencepiece model: give a .model file of it") from error

    def __reduce__(self):
        return Tokenizer, (self.model_bytes,)

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size()

    def count(self, text: str) -> int:
        """Number of tokens, start and end not counted."""
        return len(self._processor.encode(text))

    def encode(self, texts: list[str], context: int, ends: bool) -> tuple[np.ndarray, np.ndarray]:
        """ids int32 (N, context) padded on the right, real lengths int32 (N,).

        ends: start and end tokens are added, and a text that is too long is cut before its end token; else the bare
        tokens are cut.
        """
        room = context - 2 if ends else context
        ids = np.full((len(texts), context), PAD, np.int32)
        lengths = np.zeros(len(texts), np.int32)
        for row, text in enumerate(texts):
            tokens = self._processor.encode(text)[:room]
            tokens = [START, *tokens, END] if ends else tokens
            ids[row, : len(tokens)] = tokens
            lengths[row] = len(tokens)
        return ids, lengths

    def decode(self, ids: Iterable[int]) -> str:
        """The (lower-cased) text of real ids."""
        return self._processor.decode([int(i) for i in ids if i not in (PAD, START, END)])


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
