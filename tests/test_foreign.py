"""JSON and CSV that others wrote: read, or a ValueError whatever is wrong."""

import pytest

from unclip_jax.foreign import csv_rows, parsed_json


@pytest.mark.parametrize("text", ["{", "", "\\", b"\x80", "[" * 100_000, '{"a":' * 100_000])
def test_what_is_no_json(text):
    with pytest.raises(ValueError):
        parsed_json(text)
    assert parsed_json('{"a": [1]}') == {"a": [1]}


def test_what_is_no_csv():
    assert list(csv_rows('a,b\n1,"2\n3"\n')) == [{"a": "1", "b": "2\n3"}]
    with pytest.raises(ValueError, match="field larger than"):
        list(csv_rows("a\n" + "x" * 200_000))
