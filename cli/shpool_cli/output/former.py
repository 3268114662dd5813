"""The output of a former run: whose it is, lest a resumed run replaces somebody else's file.

A run that was killed while the kernel took its first line leaves the beginning of one, and a machine that lost its
power may leave zeros. Such a file holds no whole line of anybody's, and begins as an output does, so it is one.
"""

from __future__ import annotations

import csv
import json
import os
import re
from typing import TYPE_CHECKING, Any

from shpool_cli.output.records import COLUMNS, Csv

if TYPE_CHECKING:
    from pathlib import Path

_PIECE = 1024 * 1024  # bytes
_LONGEST_FIELD = 2**31 - 1  # characters: results may be long, and the csv module's own limit is 128 KiB
_OPENING = b'{"index": 0, "key": "'  # of a line; but for the number
_KEY = re.compile(rb'"key": ("(?:[^"\\]|\\.)*")')


def first_key(path: Path) -> str | None:
    """Return the key of the first job in an output.

    Returns:
        The key; the empty text where there is no job in it yet; None where the file is no output of ours.

    Raises:
        OSError: It cannot be read.
    """
    if _is_all_zeros(path):  # or empty
        return ""
    try:
        if path.suffix.lower() == ".parquet":
            return _first_of_table(path)
        if path.suffix.lower() == ".csv":
            return _first_of_csv(path)
        return _first_of_lines(path)
    except (ValueError, LookupError, TypeError, RecursionError, csv.Error):  # not UTF-8 and ArrowInvalid too
        return None


def _is_all_zeros(path: Path) -> bool:
    with path.open("rb") as file:
        return all(not piece.strip(b"\0") for piece in iter(lambda: file.read(_PIECE), b""))


def _first_of_lines(path: Path) -> str | None:
    with path.open("rb") as lines:
        line = lines.readline()
    if not line.endswith(b"\n"):
        return _key_of_torn(line.rstrip(b"\0"))
    record: Any = json.loads(line)
    return str(record["key"]) if list(record)[:3] == list(COLUMNS[:3]) else None


def _key_of_torn(line: bytes) -> str | None:
    """Return the key in the beginning of a line, empty where it was cut off; None if no line of ours begins so."""
    opening = re.sub(rb"\d+", b"0", line, count=1)
    if not opening.startswith(_OPENING):
        return "" if _OPENING.startswith(opening) else None
    key = _KEY.search(line)
    return "" if key is None else str(json.loads(key[1]))


def _first_of_csv(path: Path) -> str | None:
    with path.open("rb") as file:
        head = file.read(len(Csv.header)).rstrip(b"\0")
        file.seek(-1, os.SEEK_END)
        is_torn = file.read() != b"\n"
    if is_torn and Csv.header.startswith(head) and head != Csv.header:
        return ""
    csv.field_size_limit(_LONGEST_FIELD)
    # A torn file may end with half a character, or with zeros, which Python 3.10 takes for no CSV.
    with path.open(encoding="utf-8", errors="replace", newline="") as lines:
        rows = csv.reader(line.replace("\0", "") for line in lines)
        if next(rows) != list(COLUMNS):
            return None
        row = next(rows, ["", ""])
    return "" if is_torn and len(row) <= COLUMNS.index("key") + 1 else row[1]  # its key may not be whole


def _first_of_table(path: Path) -> str | None:
    from pyarrow import parquet

    table = parquet.ParquetFile(path)
    if table.schema_arrow.names != list(COLUMNS):
        return None
    for batch in table.iter_batches(1, columns=["key"]):
        return str(batch.column(0)[0].as_py())
    return ""
