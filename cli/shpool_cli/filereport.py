"""Files on the bar and in the summary: jobs that have bytes."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from shpool.progress import shown_bytes
from shpool_cli.reporting import Report
from shpool_cli.summary import Summary

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shpool.downloads import DownloadResult
    from shpool.progress import Progress
    from shpool_cli.output.records import Record
    from shpool_cli.output.results import ResultWriter


@dataclass
class FileSummary(Summary):
    """What a run of downloads came to; its jobs are files.

    Attributes:
        present: Of the files that are done, those that were there already and were not fetched.
        by_size: Of these, those of which only the size says that they are right.
        lost: Files that an earlier run had done, by the journal, and that were gone or of another size.
        bytes: Size of those that are done in this run, present ones included; of a file that several lines name, once.
        received: Bytes that were transferred for them.
    """

    _noun: ClassVar[str] = "file"

    present: int = 0
    by_size: int = 0
    lost: int = 0
    bytes: int = 0
    received: int = 0

    def _amounts(self) -> list[str]:
        alone = f" ({self.by_size} by size alone)" if self.by_size else ""
        there = [f"{self.present} were there{alone}"] if self.present else []
        return [shown_bytes(self.bytes), *there, *([f"{self.lost} lost since"] if self.lost else [])]


class FileReport(Report):
    """Write, count and show files; arguments are those of `Report`."""

    def __init__(self, writer: ResultWriter, summary: FileSummary, bar: Progress) -> None:
        super().__init__(writer, summary, bar)
        self._files = summary

    def tell(self, records: Sequence[Record], *, again: bool = False) -> None:
        """Write and count records of this run, each with what ``file_of`` says.

        Args:
            records: Those of one file, named by several lines, stand together: its bytes count once.
            again: The files were told before, and their bytes are counted.
        """
        told = [(record.key, json.loads(record.result)) for record in records if record.result is not None]
        once = [] if again else dict(told).values()
        with self._lock:  # first, as the bar shows them
            self._files.present += sum(each["was_there"] for _, each in told)
            self._files.by_size += sum(each["by_size"] for _, each in told)
            self._files.bytes += sum(each["bytes"] for each in once)
            self._files.received += sum(each["received"] for each in once)
        super().tell(records)


class Traffic:
    """Say for the bar how many files and bytes have come, and how fast.

    Args:
        summary: Where they are counted.
        total: Bytes of all files; 0 where that is not known, or not all of them are asked for.
        before: Bytes of these that former runs have fetched.
        under_way: Returns the bytes that have come of files that are not over.
    """

    def __init__(
        self, summary: FileSummary, total: int = 0, before: int = 0, under_way: Callable[[], int] = int
    ) -> None:
        self._summary = summary
        self._total = total
        self._before = before
        self._under_way = under_way
        self._began = time.monotonic()

    def moved(self) -> int:
        """Return the bytes that are there."""
        return self._before + self._summary.bytes + self._under_way()

    def words(self) -> list[str]:
        """Return what the bar does not say by itself."""
        summary = self._summary
        if self._total:
            return [f"{summary.before + summary.done + summary.failed}/{summary.jobs} files"]
        rate = (summary.received + self._under_way()) / max(time.monotonic() - self._began, 1e-3)
        return [shown_bytes(summary.bytes + self._under_way()), f"{shown_bytes(rate)}/s"]


def file_of(result: DownloadResult) -> dict[str, Any]:
    """Return what the output says of a file that is done."""
    from shpool.origins import shown_url

    return {
        "url": shown_url(result.url),
        "path": result.path,
        "bytes": result.bytes,
        "received": result.received,
        "was_there": result.status == "skipped",
        "by_size": result.by_size,
    }
