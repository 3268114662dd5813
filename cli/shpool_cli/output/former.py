"""The output of a former run: whose it is, lest a resumed run replaces somebody else's file."""

from __future__ import annotations

import csv
import json
from typing import TYPE_CHECKING, Any

from shpool_cli.output.records import COLUMNS

if TYPE_CHECKING:
    from pathlib import Path


def first_key(path: Path) -> str | None:
    """Return the key of the first job in an output.

    Returns:
        The key; the empty text where there is no job in it yet; None where the file is no output of ours.

    Raises:
        OSError: It cannot be read.
    """
    if not path.stat().st_size:
        return ""
    try:
        if path.suffix.lower() == ".parquet":
            return _first_of_table(path)
        if path.suffix.lower() == ".csv":
            return _first_of_csv(path)
        return _first_of_lines(path)
    except (ValueError, LookupError, TypeError, RecursionError, csv.Error):  # not UTF-8 and ArrowInvalid too
        return None


def _first_of_lines(path: Path) -> str | None:
    with path.open(encoding="utf-8") as lines:
        record: Any = json.loads(lines.readline())
    return str(record["key"]) if list(record)[:3] == list(COLUMNS[:3]) else None


def _first_of_csv(path: Path) -> str | None:
    with path.open(encoding="utf-8", newline="") as lines:
        rows = csv.reader(lines)
        if next(rows) != list(COLUMNS):
            return None
        return next(rows, ["", ""])[1]


def _first_of_table(path: Path) -> str | None:
    from pyarrow import parquet

    table = parquet.ParquetFile(path)
    if table.schema_arrow.names != list(COLUMNS):
        return None
    for batch in table.iter_batches(1, columns=["key"]):
        return str(batch.column(0)[0].as_py())
    return ""
