"""The results of a batch: a record per job, to standard output or to a file whose suffix says how."""

from __future__ import annotations

import contextlib
import itertools
from typing import TYPE_CHECKING, BinaryIO

from shpool_cli.console import CommandError
from shpool_cli.output.records import Csv, JsonLines, recorded
from shpool_cli.output.sinks import AppendSink, ReplaceSink, Sink, StreamSink, unwritable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from shpool.jobs import JobResult
    from shpool_cli.output.records import Record

_TOGETHER = 1000  # records a write, where many come at once


class ResultWriter:
    """Write results as they come; an interrupted run keeps every one written so far.

    Args:
        sink: Where they go.
        is_behind: A former run's records come first, by ``catch_up``.

    Attributes:
        is_behind: They have not come yet.
    """

    def __init__(self, sink: Sink, *, is_behind: bool = False) -> None:
        self._sink = sink
        self.is_behind = is_behind

    def write(self, result: JobResult) -> JobResult:
        """Write one result and return it; as a failure when what the function returned has no JSON form.

        Raises:
            CommandError: The output takes no more: the disk is full, or the reader has gone.
        """
        result, record = recorded(result)
        self.write_records([record])
        return result

    def write_records(self, records: Iterable[Record]) -> None:
        """Write records that are made already, many at a time.

        Raises:
            CommandError: As for ``write``.
        """
        if self.is_behind:
            self.catch_up(())
        self._put(records)

    def catch_up(self, records: Iterable[Record]) -> None:
        """Write what former runs have done; once all of it is written, a file takes the place of the old one.

        Args:
            records: Any number of them, in the order they are to stand; pulled as they are written.

        Raises:
            CommandError: As for ``write``; the old file is as it was then.
        """
        self._put(records)
        try:
            self._sink.settle()
        except OSError as exc:
            raise unwritable(self._sink.name, exc) from None
        self.is_behind = False

    def _put(self, records: Iterable[Record]) -> None:
        pending = iter(records)
        while some := list(itertools.islice(pending, _TOGETHER)):
            self._put_some(some)

    def _put_some(self, records: list[Record]) -> None:
        try:
            self._sink.put(records)
        except OSError as exc:
            raise unwritable(self._sink.name, exc) from None


@contextlib.contextmanager
def open_output(path: Path | None, stdout: BinaryIO, *, replace: bool = False) -> Iterator[ResultWriter]:
    """Open where the results go: ``.csv`` is CSV, ``.parquet`` is Parquet, anything else JSON Lines.

    Lines are appended as jobs finish, so that an interruption leaves what is done; a Parquet file is there at the
    end, after an interruption too. A file that got no result because of an error is removed again.

    Args:
        path: A new or empty file, or a device; None is standard output, as JSON Lines.
        stdout: The stream for None.
        replace: The file may hold the results of a former run of the same jobs. It stays as it is until
            ``catch_up`` has written them anew; call that first. Where nothing is ever written, it stays for good.

    Raises:
        CommandError: The file cannot be created, holds something and may not be replaced, or another run writes to
            it; or pyarrow is missing.
    """
    try:
        sink = _sink_for(path, stdout, replace=replace)
    except OSError as exc:
        msg = f"cannot write to {path}: {exc.strerror}"
        raise CommandError(msg, "choose another --output") from None
    writer = ResultWriter(sink, is_behind=replace)
    try:
        yield writer
    except BaseException:
        with contextlib.suppress(OSError):  # what ended the run is what matters
            sink.finish(failed=True)
        raise
    try:
        sink.finish(failed=writer.is_behind)
    except OSError as exc:
        raise unwritable(sink.name, exc) from None


_SUFFIXES = frozenset({"", ".csv", ".json", ".jsonl", ".ndjson", ".parquet", ".txt"})


def _sink_for(path: Path | None, stdout: BinaryIO, *, replace: bool) -> Sink:
    if path is None:
        return StreamSink(stdout, JsonLines(), "standard output")
    is_special = path.exists() and not path.is_file()  # a device or a pipe; a folder is refused when it is opened
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES and not is_special:
        msg = f"--output {path}: no results can be written as {suffix}"
        raise CommandError(msg, f"give a name that ends with {', '.join(sorted(_SUFFIXES - {''}))}")
    if suffix == ".parquet" and not is_special:
        from shpool_cli.output.parquetfile import ParquetSink

        return ParquetSink(path, replace=replace)
    form = Csv() if suffix == ".csv" else JsonLines()
    return ReplaceSink(path, form) if replace and not is_special else AppendSink(path, form)
