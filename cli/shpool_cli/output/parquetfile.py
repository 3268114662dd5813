"""Results as a Parquet file, by pyarrow; needs the extra ``parquet``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from shpool_cli.console import CommandError
from shpool_cli.output.draft import Draft
from shpool_cli.output.records import cell
from shpool_cli.output.sinks import refuse_content

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from shpool_cli.output.records import Record

# A row group is held in memory until it is full, and readers like them large. A million small records peaked at 130 MiB
# with groups of 50,000 rows, at 100 with these; pyarrow itself is 61 of them.
_ROWS = 20_000
_TEXT = 8 * 1024 * 1024  # characters of results and errors


class ParquetSink:
    """A Parquet file; readers see it once it is whole, at the end of the run.

    Columns as for CSV, typed: index, attempts and seconds are numbers, all else is text.

    Args:
        path: The file.
        replace: It may exist and is replaced at the end.

    Raises:
        OSError: It cannot be created.
        CommandError: pyarrow is missing, the file holds something, or another run writes to it.
    """

    def __init__(self, path: Path, *, replace: bool) -> None:
        pa, parquet = load_pyarrow(path)
        self.name = str(path)
        if not replace:
            refuse_content(path)
        self._path = path
        self._replace = replace
        self._is_settled = not replace
        self._is_empty = True
        self._rows: list[Record] = []
        self._text = 0
        self._draft = Draft(path)
        self._schema = _schema(pa)
        self._table = pa.Table
        try:
            self._writer = parquet.ParquetWriter(str(self._draft.path), self._schema, compression="zstd")
        except BaseException:
            self._draft.discard()
            os.close(self._draft.descriptor)
            raise

    def put(self, records: Sequence[Record]) -> None:
        """Hold them, and write them once they are many."""
        for record in records:
            self._rows.append(record)
            self._text += len(record.result or "") + len(record.error or "")
            if len(self._rows) >= _ROWS or self._text >= _TEXT:
                self._write()

    def settle(self) -> None:
        """Note that all from before is in; readers see it at the end. If that is nothing, the old file goes at once."""
        if self._replace and self._is_empty and not self._rows:  # else a killed run left what its journal does not know
            self._draft.target.unlink(missing_ok=True)
        self._is_settled = True

    def finish(self, *, failed: bool) -> None:
        """Write the end and take the place of the old file; what an interrupted run has done is kept."""
        try:
            if failed and (not self._is_settled or (self._is_empty and not self._rows)):
                self._draft.discard()
            else:
                self._complete()
        finally:
            os.close(self._draft.descriptor)

    def _complete(self) -> None:
        try:
            self._write()
            self._writer.close()
            if not self._replace:
                refuse_content(self._path)  # somebody may have written it meanwhile
            self._draft.publish()
        except BaseException:
            self._draft.discard()
            raise

    def _write(self) -> None:
        rows, self._rows, self._text = self._rows, [], 0
        if rows:
            self._writer.write_table(self._table.from_pydict(_columns(rows), schema=self._schema))
            self._is_empty = False


def load_pyarrow(path: Path) -> tuple[Any, Any]:
    """Return pyarrow and its module for Parquet.

    Raises:
        CommandError: pyarrow is missing.
    """
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        msg = f"{path}: Parquet needs pyarrow, which is not installed"
        hint = "pip install 'shpool[parquet]', or choose an --output that ends in .jsonl or .csv"
        raise CommandError(msg, hint) from None
    return pa, parquet


def _schema(pa: Any) -> Any:  # noqa: ANN401 - pyarrow ships no types
    text = pa.string()
    return pa.schema(
        [
            ("index", pa.int64()),
            ("key", text),
            ("status", text),
            ("result", text),
            ("error", text),
            ("attempts", pa.int32()),
            ("seconds", pa.float64()),
        ]
    )


def _columns(rows: list[Record]) -> dict[str, list[Any]]:
    return {
        "index": [row.index for row in rows],
        "key": [_encodable(row.key) for row in rows],
        "status": [row.status for row in rows],
        "result": [_encodable(cell(row.result)) for row in rows],
        "error": [_encodable(row.error) for row in rows],
        "attempts": [row.attempts for row in rows],
        "seconds": [row.seconds for row in rows],
    }


def _encodable(text: str | None) -> str | None:
    """Return text that has a UTF-8 form: JSON may hold halves of surrogate pairs."""
    return None if text is None else text.encode(errors="backslashreplace").decode()
