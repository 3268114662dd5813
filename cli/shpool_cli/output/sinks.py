"""Where records go: a stream, a file of lines, a Parquet file.

A file of lines grows by one ``write`` of whole lines at a time, to a descriptor that appends. No reader sees
what a program holds back in a buffer, and no kill between two writes tears a line. Only while the kernel is copying
may a reader see the beginning of a line: its line end comes last, and until then it does not count.
"""

from __future__ import annotations

import contextlib
import os
import stat
from typing import TYPE_CHECKING, BinaryIO, Protocol

from shpool_cli.console import CommandError, ExitCode
from shpool_cli.output.draft import Draft, hold_new

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from shpool_cli.output.records import LineForm, Record


class Sink(Protocol):
    """Takes records; all of its methods raise OSError when they cannot."""

    name: str

    def put(self, records: Sequence[Record]) -> None:
        """Write them."""

    def settle(self) -> None:
        """Show what was written to readers: all that was there before is in. From now on ``put`` shows at once."""

    def finish(self, *, failed: bool) -> None:
        """End; ``failed`` when an error or an interruption ended the run."""


class StreamSink:
    """Standard output."""

    def __init__(self, stream: BinaryIO, form: LineForm, name: str) -> None:
        self._stream = stream
        self._form = form
        self.name = name

    def put(self, records: Sequence[Record]) -> None:
        """Write them and flush."""
        self._stream.write(self._form.lines(records))
        self._stream.flush()

    def settle(self) -> None:
        """Do nothing: readers have seen it."""

    def finish(self, *, failed: bool) -> None:
        """Do nothing: the stream is its owner's to close."""


class _Lines:
    """A descriptor to which whole lines are appended."""

    def __init__(self, descriptor: int, form: LineForm) -> None:
        self._descriptor = descriptor
        self._form = form
        self._is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        self.is_empty = True

    def put(self, records: Sequence[Record]) -> None:
        header = self._form.header if self.is_empty else b""
        self._append(header + self._form.lines(records))

    def begin(self) -> None:
        """Write the header if nothing was written."""
        if self.is_empty and self._form.header:
            self._append(self._form.header)

    def _append(self, content: bytes) -> None:
        """Write all of it, or, to a file, nothing: what a full disk took of it is taken back."""
        size = os.fstat(self._descriptor).st_size
        left = memoryview(content)
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
        except BaseException:
            if self._is_file and len(left) < len(content):
                os.ftruncate(self._descriptor, size)
            raise
        self.is_empty = False

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a last write that failed was reported
            os.close(self._descriptor)


class AppendSink:
    """A new or empty file, or a device; what is written is there at once.

    Raises:
        OSError: It cannot be opened.
        CommandError: It holds something, or another run writes to it.
    """

    def __init__(self, path: Path, form: LineForm) -> None:
        self.name = str(path)
        self._path = path
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        try:
            descriptor, self._is_new = os.open(path, flags | os.O_EXCL, 0o666), True
        except FileExistsError:
            descriptor, self._is_new = os.open(path, flags, 0o666), False
        try:
            if path.is_file():
                hold_new(descriptor, path)
            refuse_content(path)
        except BaseException:
            if self._is_new:
                path.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        self._lines = _Lines(descriptor, form)

    def put(self, records: Sequence[Record]) -> None:
        """Write them."""
        self._lines.put(records)

    def settle(self) -> None:
        """Do nothing: readers have seen it."""

    def finish(self, *, failed: bool) -> None:
        """Close it; a new file that got nothing because of an error is removed again."""
        try:
            if not failed:
                self._lines.begin()
            elif self._is_new and self._lines.is_empty:
                self._path.unlink(missing_ok=True)
        finally:
            self._lines.close()


class ReplaceSink:
    """A file that is replaced, once all that belongs into it from before is written, and then appended to.

    Raises:
        OSError: It cannot be created.
        CommandError: Another run writes to it.
    """

    def __init__(self, path: Path, form: LineForm) -> None:
        self.name = str(path)
        self._draft: Draft | None = Draft(path)
        self._lines = _Lines(self._draft.descriptor, form)

    def put(self, records: Sequence[Record]) -> None:
        """Write them."""
        self._lines.put(records)

    def settle(self) -> None:
        """Replace the file by what was written."""
        if self._draft is not None:
            self._lines.begin()
            self._draft.publish()
            self._draft = None

    def finish(self, *, failed: bool) -> None:
        """Close it; the old file stays where the new one was never settled and the run failed."""
        try:
            if not failed:
                self.settle()
            elif self._draft is not None:
                self._draft.discard()
        finally:
            self._lines.close()


def refuse_content(path: Path) -> None:
    """Raise a CommandError if a file holds something."""
    if path.is_file() and path.stat().st_size:
        msg = f"{path} exists and is not empty"
        raise CommandError(msg, "choose another --output, or remove the file")


def unwritable(name: str, exc: OSError) -> CommandError:
    """Return the error for an output that takes no more."""
    message = f"cannot write results to {name}: {exc.strerror or exc}"
    return CommandError(
        message,
        "mend that and run the same command again; without --journal the jobs after this one are lost",
        ExitCode.FAILED,
    )
