"""Where results end up: the output, the summary and the bar."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

from shpool_cli.output.ordered import InOrder

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from typing_extensions import Self

    from shpool.progress import Progress
    from shpool_cli.output.records import Record
    from shpool_cli.output.results import ResultWriter
    from shpool_cli.summary import Summary

_TOGETHER = 32  # records a write at most, lest the first wait long for the last
_LONG = 4096  # characters of a result that is not kept waiting, as it would fill the memory


class Report:
    """Write, count and show each record; from the run's thread and from the journal's.

    Args:
        writer: The output.
        summary: Where they are counted.
        bar: Where they are shown.
        ordered: Write in the order of the input.
        first: With ``ordered``, the first index that is not in the output yet.
    """

    def __init__(
        self, writer: ResultWriter, summary: Summary, bar: Progress, *, ordered: bool = False, first: int = 0
    ) -> None:
        self._lock = threading.Lock()  # guards all that follows
        self._writer = writer
        self._summary = summary
        self._bar = bar
        self._in_order = InOrder(self._put, first) if ordered else None

    def tell(self, records: Sequence[Record]) -> None:
        """Write and count records of this run."""
        with self._lock:
            self._write(records)
            failures = [record for record in records if record.status == "failed"]
            for record in failures:
                self._summary.note_failure(record)
            failed = len(failures)
            self._summary.done += len(records) - failed
            self._bar.failed(failed)
            self._bar.done(len(records) - failed)

    def tell_before(self, index: int, record: Record | None) -> None:
        """Write a job that was done in an earlier run, and is counted as such, unless it is in the output: None."""
        with self._lock:
            if record is not None:
                self._write([record])
            elif self._in_order is not None:
                self._in_order.skip(index)

    def skip(self, index: int) -> None:
        """Count a job that is not asked for."""
        with self._lock:
            if self._in_order is not None:
                self._in_order.skip(index)
            self._summary.skipped += 1
            self._bar.pass_over()

    def flush(self) -> None:
        """Write what waits for others, in order."""
        with self._lock:
            if self._in_order is not None:
                self._in_order.flush()

    def _write(self, records: Sequence[Record]) -> None:
        if self._in_order is not None:
            self._in_order.take(records)
        else:
            self._put(records)

    def _put(self, records: Iterable[Record]) -> None:
        """Write them; where the bar is on the same terminal, it makes room for them."""
        with self._bar.hidden() if self._writer.is_on_terminal else contextlib.nullcontext():
            self._writer.write_records(records)


class Ready:
    """Records of results that come at once, told at once; whoever adds them says when no more are at hand.

    Leaving its ``with`` block tells the last of them.

    Args:
        report: Where they go.
    """

    def __init__(self, report: Report) -> None:
        self._report = report
        self._records: list[Record] = []

    def add(self, record: Record) -> None:
        """Take a record, and tell all there are if they are many or this one is long."""
        self._records.append(record)
        if len(self._records) >= _TOGETHER or len(record.result or "") > _LONG:
            self.tell()

    def tell(self) -> None:
        """Tell what there is."""
        records, self._records = self._records, []  # first: what an interruption cuts off must not be told twice
        if records:
            self._report.tell(records)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.tell()
