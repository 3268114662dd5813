"""The entry of the command line: descriptors and signals first, the commands and all they import after that."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType
    from typing import NoReturn


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    Args:
        arguments: Without the program's name; None takes those of this process.
    """
    try:
        _open_descriptors()
        _end_on(signal.SIGTERM, signal.SIGHUP)
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


def _end_on(*numbers: signal.Signals) -> None:
    """End on these signals as on ^C: every ``with`` and ``finally`` on the way out cleans up."""
    for number in numbers:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup ignores SIGHUP
            signal.signal(number, _end)


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()
