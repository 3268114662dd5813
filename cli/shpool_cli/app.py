"""The entry of the command line: descriptors and signals first, the commands and all they import after that."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType
    from typing import NoReturn

_IMPORTS_WITHIN = 0.4  # s a signal waits for their end; the whole exit must take less than one
_STRIKE_EVERY = 0.001  # s between two looks at whether they have ended


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    Args:
        arguments: Without the program's name; None takes those of this process.
    """
    try:
        _open_descriptors()
        Ending().hear(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        # Imported here: ^C during the first tenth of a second must find the handling in place.
        from shpool_cli.commands import run_command
        from shpool_cli.console import guard_stdout

        guard_stdout()
        code = run_command(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        os.write(2, b"interrupted\n")
        code = 128 + signal.SIGINT
    sys.exit(code)


def _open_descriptors() -> None:
    """Give a process that was started without standard streams, as by ``>&-``, ones that lead nowhere.

    Else the next file to be opened becomes standard output, and ``sys.stdout`` is None.
    """
    for number in range(3):
        if not _is_open(number):
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
            os.set_inheritable(number, True)
    for name, number in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115 - as long as the process, and no path


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


class Terminated(SystemExit):
    """A signal has ended the command, and not a script of the user's that calls ``sys.exit`` when it is imported."""


class Ending:
    """End the command on signals: every ``with`` and ``finally`` on the way out cleans up.

    A signal that comes in the middle of an import strikes again until that is over, for a moment at most. The import
    system is not safe from exceptions: it would print one and forget it, or make another one of it.
    """

    def __init__(self) -> None:
        self._number = 0  # of the signal that waits
        self._strikes_before = 0.0  # whatever is under way; by time.monotonic()

    def hear(self, *numbers: signal.Signals) -> None:
        """Take these signals, but for those that are ignored, as nohup ignores SIGHUP."""
        signal.signal(signal.SIGALRM, self._strike)
        for number in numbers:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._end)

    def _end(self, number: int, _frame: FrameType | None) -> None:
        if not self._number:
            self._number, self._strikes_before = number, time.monotonic() + _IMPORTS_WITHIN
        self._strike()

    def _strike(self, *_: object) -> None:
        if _is_importing() and time.monotonic() < self._strikes_before:
            signal.setitimer(signal.ITIMER_REAL, _STRIKE_EVERY)
            return
        number, self._number = self._number, 0
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if number:  # else this is an alarm of somebody else's
            raise Terminated(128 + number)


def _is_importing() -> bool:
    """Tell whether an import is under way; from a signal's handler."""
    frame: FrameType | None = sys._getframe()  # noqa: SLF001 - the handler's own argument may be a frame that is over
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


if __name__ == "__main__":
    main()
