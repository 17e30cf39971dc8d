"""Reads JSON and CSV that others wrote: whatever is wrong with it is a ValueError."""

import csv
import io
import json
from collections.abc import Iterator
from typing import Any


def parsed_json(text: str | bytes) -> Any:
    """Parses JSON. Raises ValueError for what is none, and for what is nested too deep."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def csv_rows(text: str) -> Iterator[dict]:
    """Yields the rows of a CSV file by the names in its first line. Raises ValueError for what is no CSV."""
    try:
        yield from csv.DictReader(io.StringIO(text))
    except csv.Error as error:
        raise ValueError(str(error)) from error
