"""The results of a batch: a record per job, to standard output or to a file whose suffix says how."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
from typing import TYPE_CHECKING, BinaryIO

from shpool_cli.console import CommandError
from shpool_cli.output.records import Csv, JsonLines, recorded
from shpool_cli.output.sinks import AppendSink, ReplaceSink, Sink, StreamSink, refuse_content, unwritable

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
        is_on_terminal: Whoever sits there sees them at once.

    Attributes:
        is_behind: They have not come yet.
        is_on_terminal: As given.
    """

    def __init__(self, sink: Sink, *, is_behind: bool = False, is_on_terminal: bool = False) -> None:
        self._sink = sink
        self.is_behind = is_behind
        self.is_on_terminal = is_on_terminal

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
    writer = ResultWriter(sink, is_behind=replace, is_on_terminal=path is None and stdout.isatty())
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


def check_output(path: Path | None, *, replace: bool = False) -> None:
    """Refuse what ``open_output`` would refuse, as far as that shows without making anything; arguments as there.

    Raises:
        CommandError: As there, but for another run that writes to it.
    """
    if path is None:
        return
    if not _is_special(path):
        _check_suffix(path)
    reason = _obstacle(path, is_draft_needed=replace or path.suffix.lower() == ".parquet")
    if reason is not None:
        msg = f"cannot write to {path}: {os.strerror(reason)}"
        raise CommandError(msg, "choose another --output")
    if path.suffix.lower() == ".parquet":
        from shpool_cli.output.parquetfile import load_pyarrow

        load_pyarrow(path)
    if not replace:
        refuse_content(path)


def _obstacle(path: Path, *, is_draft_needed: bool) -> int | None:
    """Return the number of the error that opening a file would end with, None where nothing stands in its way."""
    target = path.resolve()
    folder = target.parent
    if target.is_dir():
        return errno.EISDIR
    if not folder.is_dir():
        return errno.ENOTDIR if folder.exists() else errno.ENOENT
    if target.exists() and not os.access(target, os.W_OK):
        return errno.EACCES
    makes_a_file = not target.exists() or (is_draft_needed and target.is_file())
    return errno.EACCES if makes_a_file and not os.access(folder, os.W_OK | os.X_OK) else None


_SUFFIXES = frozenset({"", ".csv", ".json", ".jsonl", ".ndjson", ".parquet", ".txt"})


def _sink_for(path: Path | None, stdout: BinaryIO, *, replace: bool) -> Sink:
    if path is None:
        return StreamSink(stdout, JsonLines(), "standard output")
    is_special = _is_special(path)
    if not is_special:
        _check_suffix(path)
    suffix = path.suffix.lower()
    if suffix == ".parquet" and not is_special:
        from shpool_cli.output.parquetfile import ParquetSink

        return ParquetSink(path, replace=replace)
    form = Csv() if suffix == ".csv" else JsonLines()
    return ReplaceSink(path, form) if replace and not is_special else AppendSink(path, form)


def _is_special(path: Path) -> bool:
    """Tell whether this is a device or a pipe, or a folder, which is refused when it is opened."""
    return path.exists() and not path.is_file()


def _check_suffix(path: Path) -> None:
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        msg = f"--output {path}: no results can be written as {suffix}"
        raise CommandError(msg, f"give a name that ends with {', '.join(sorted(_SUFFIXES - {''}))}")
