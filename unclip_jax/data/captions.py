"""Reads captions as people store them: text files of several encodings, and JSON, CSV and tables with named values."""

import codecs
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from unclip_jax.errors import UnreadableRecord
from unclip_jax.foreign import csv_rows, parsed_json

TEXTS = (".txt", ".json")  # endings of the files of captions
METADATA = ("metadata.jsonl", "metadata.csv")  # Hugging Face's files of captions, of all pictures of a folder
USUAL = "caption"  # data.caption_feature, where text files come first, and "text" will do as well
MARKS = (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32")
MARKS += (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")  # after UTF-32's, which begins alike
# Characters that no caption needs, NUL and its like, and halves of characters, which no tokenizer takes.
CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f\ud800-\udfff]")


def decoded(data: bytes) -> str:
    """Decodes a text: UTF-8, UTF-16 or UTF-32 with a byte order mark, or else Windows-1252, without control characters.

    Raises UnreadableRecord for bytes that are no text.
    """
    for mark, encoding in MARKS:
        if data.startswith(mark):
            return CONTROLS.sub("", data.decode(encoding, errors="replace"))
    try:
        return CONTROLS.sub("", data.decode("utf-8"))
    except UnicodeDecodeError:
        text = data.decode("cp1252", errors="replace")
    if CONTROLS.search(text):
        raise UnreadableRecord("its caption is no text")
    return text


def captions_in(data: bytes) -> list[str]:
    """Lists the captions in a text file, one a line. Raises UnreadableRecord for bytes that are no text."""
    return [line.strip() for line in decoded(data).splitlines() if line.strip()]


def captions_in_json(data: bytes, feature: str) -> list[str]:
    """Lists the captions in a JSON file, by their name. Raises UnreadableRecord where there is no such name."""
    try:
        record = parsed_json(decoded(data))
    except ValueError as error:
        raise UnreadableRecord(f"its JSON file cannot be read: {error}") from error
    return captions_named(record, feature)


def captions_named(record: Any, feature: str) -> list[str]:
    """Lists the captions that a record holds under a name.

    feature: "a/b" for b within a. Where it is USUAL, "text" will do as well. Raises UnreadableRecord where the record
    has no such name.
    """
    names = (feature, "text") if feature == USUAL else (feature,)
    for name in names:
        try:
            return texts_in(value_at(record, name.split("/")))
        except (KeyError, TypeError):
            continue
    there = ", ".join(map(str, record)) if isinstance(record, Mapping) else type(record).__name__
    raise UnreadableRecord(f"it has no {feature!r} (data.caption_feature): it has {there}")


def value_at(record: Any, names: Sequence[str]) -> Any:
    """Value within others; of each, where they are a sequence. Raises KeyError or TypeError where there is none."""
    for name in names:
        record = record[name] if isinstance(record, Mapping) else [item[name] for item in record]
    return record


def texts_in(value: Any) -> list[str]:
    """Lists the texts that a value is or holds, as str or bytes, in lists of any kind; none for None."""
    if isinstance(value, bytes):
        return [value.decode("utf-8", errors="replace")]
    if isinstance(value, str):
        return [value]
    return [] if value is None else [text for item in value for text in texts_in(item)]


def cleaned(captions: str | list[str]) -> str | list[str]:
    """Removes control characters from captions, and the captions that are empty. Raises UnreadableRecord if all are."""
    if isinstance(captions, str):
        kept = CONTROLS.sub("", captions)
        if not kept.strip():
            raise UnreadableRecord("it has no caption")
        return kept
    several = [text for text in (CONTROLS.sub("", caption) for caption in captions) if text.strip()]
    if not several:
        raise UnreadableRecord("it has no caption")
    return several


def rows_of_metadata(name: str, data: bytes) -> Iterator[dict | None]:
    """Yields the rows of a file named in METADATA; None for a line that cannot be read."""
    text = decoded(data)
    if name.endswith(".csv"):
        try:
            yield from csv_rows(text)
        except ValueError:
            yield None
        return
    for line in text.split("\n"):  # not splitlines: JSON may hold other ends of lines
        if line.strip():
            try:
                row = parsed_json(line)
            except ValueError:
                row = None
            yield row if isinstance(row, dict) else None


def folded(name: str) -> str:
    """Writes a file's name in the one form in which names are compared: small letters, composed accents."""
    return unicodedata.normalize("NFC", name).lower()
