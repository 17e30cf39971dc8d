"""Messages of errors: one line, which steers no terminal."""

import pytest

from unclip_jax.errors import StorageError, UnreadableRecord, UserError, one_line


@pytest.mark.parametrize(("text", "line"), [
    ("plain, Grüße, 猫 🦊", "plain, Grüße, 猫 🦊"),
    ("two\nlines\r\n\tand  tabs\n", "two lines and tabs"),
    ("\x1b[31mred\x1b[0m\x07", r"\x1b[31mred\x1b[0m\x07"),
    ("turned \u202egnp.exe", r"turned \u202egnp.exe"),
    ("no UTF-8 \udcff, \x9b", r"no UTF-8 \udcff, \x9b"),
    ("", ""),
])  # fmt: skip
def test_line(text, line):
    assert one_line(text) == line
    for kind in (UserError, StorageError, UnreadableRecord):
        assert str(kind(text)) == line
