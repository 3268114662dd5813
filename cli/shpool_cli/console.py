"""What the command line says: `error:` / `cause:` / `hint:` lines on stderr, exit codes, and a stdout of its own."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from enum import IntEnum
from typing import TYPE_CHECKING, BinaryIO

from shpool.errors import (
    ConfigError,
    InputError,
    JournalError,
    JournalFullError,
    LoginError,
    MissingExtraError,
    ShpoolError,
    TokenUnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Buffer


class ExitCode(IntEnum):
    """How a command ended."""

    OK = 0
    FAILED = 1  # some jobs failed, or shpool itself did
    USAGE = 2  # bad usage or bad input
    LOGIN = 3  # login refused, or no token
    HUNG_UP = 129  # 128 + SIGHUP
    INTERRUPTED = 130  # 128 + SIGINT
    TERMINATED = 143  # 128 + SIGTERM


class CommandError(Exception):
    """Expected trouble, in words for a terminal.

    Args:
        error: What happened.
        hint: What to do.
        code: How the command ends.
    """

    def __init__(self, error: str, hint: str = "", code: ExitCode = ExitCode.USAGE) -> None:
        super().__init__(error, hint, code)
        self.error = error
        self.hint = hint
        self.code = code

    def __str__(self) -> str:
        return self.error


def say(text: str) -> None:
    """Print one line on stderr; control characters, which a server may have sent, are shown and not obeyed."""
    line = "".join(char if char.isprintable() else " " if char.isspace() else repr(char)[1:-1] for char in text)
    with contextlib.suppress(OSError, ValueError):  # nobody listens: the exit code still tells
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def report(error: ShpoolError | CommandError) -> ExitCode:
    """Say what went wrong and return the exit code that goes with it."""
    message, hint = _parts(error)
    say(f"error: {message}")
    cause = error.__cause__
    if cause is not None:
        text = f"{type(cause).__name__}: {(str(cause).splitlines() or [''])[0]}".removesuffix(": ")
        if text not in message:
            say(f"cause: {text}")
    if hint:
        say(f"hint: {hint}")
    return exit_code_of(error)


def _parts(error: ShpoolError | CommandError) -> tuple[str, str]:
    """Split what happened from what to do; our errors join the two by a semicolon."""
    if isinstance(error, CommandError):
        return error.error, error.hint
    if isinstance(error, InputError):
        return f"{error.where}: {error.reason}", error.hint
    message, semicolon, hint = str(error).rpartition("; ")
    return (message, hint) if semicolon else (hint, "")


def exit_code_of(error: ShpoolError | CommandError) -> ExitCode:
    """Return the exit code that goes with an error."""
    if isinstance(error, CommandError):
        return error.code
    bad_usage = (InputError, ConfigError, JournalError, MissingExtraError)
    if isinstance(error, bad_usage) and not isinstance(error, JournalFullError):
        return ExitCode.USAGE
    if isinstance(error, (LoginError, TokenUnavailableError)):
        return ExitCode.LOGIN
    return ExitCode.FAILED


@contextlib.contextmanager
def private_stdout() -> Iterator[BinaryIO]:
    """Yield standard output for our data alone; whatever else is printed meanwhile goes to stderr.

    A user's function, or a library below it, may print in this process or in a worker, and one such line
    would spoil the JSON Lines. So descriptor 1, which workers inherit, becomes a copy of descriptor 2.
    """
    sys.stdout.flush()
    ours = os.dup(1)
    os.dup2(2, 1)
    stream = os.fdopen(os.dup(ours), "wb")
    try:
        yield stream
    finally:
        sys.stdout.flush()
        os.dup2(ours, 1)
        os.close(ours)
        with contextlib.suppress(OSError):  # whoever wrote to it has flushed, and was told
            stream.close()


def guard_stdout() -> None:
    """Replace ``sys.stdout`` by one whose trouble is told as such, whoever prints: we, or the parser its help."""
    usual = sys.stdout
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(_Stdout(1, "wb", closefd=False)),
        encoding=usual.encoding,
        errors=usual.errors,
        line_buffering=usual.isatty(),
    )


class _Stdout(io.FileIO):
    """Descriptor 1. After a failure it leads nowhere, so that nothing fails again at the end of the process."""

    def write(self, content: Buffer) -> int:
        """Write to it; what a reader that has gone, as in ``shpool token | head -1``, does not take is dropped.

        Raises:
            CommandError: It takes no more, as on a full disk.
        """
        try:
            return super().write(content)
        except OSError as exc:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.close(nowhere)
            if exc.errno == errno.EPIPE:
                return memoryview(content).nbytes
            reason = exc.strerror
        msg = f"standard output cannot be written: {reason}"
        raise CommandError(msg, "make room, or send it elsewhere", ExitCode.FAILED)
