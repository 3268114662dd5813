"""What ends a run early: signals, too many failures, the clock, and an input that is changed under it."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING, Protocol, TypeVar

from shpool.errors import InputError, JournalError, ShpoolError
from shpool.halting import Halt, HaltPolicy
from shpool_cli.console import CommandError, ExitCode, exit_code_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType, TracebackType

    from typing_extensions import Self

_MOMENT = 0.5  # s that running jobs get to end after a signal; the whole exit must take less than one
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


_T = TypeVar("_T")


class Stoppable(Protocol):
    """What runs: a batch, or downloads in groups."""

    def stop(self, within: float = ...) -> None:
        """Begin nothing any more, and wait so many seconds for what runs; from any thread, or a signal handler."""


class Stopper:
    """Stop a batch for the length of a ``with`` block: soon at the first signal, at once at the second.

    Args:
        batch: The batch.
        halt: When failures end it.
        total: Jobs in all.
        seconds: How long jobs may begin; None for as long as there are some.
        noun: What a job is called.

    Attributes:
        reason: Why it was stopped, other than by a signal.
        is_killing: Running jobs are not to be waited for.
    """

    def __init__(
        self, batch: Stoppable, halt: HaltPolicy, total: int, seconds: float | None, noun: str = "job"
    ) -> None:
        self._batch = batch
        self._halt = halt
        self._total = total
        self._noun = noun
        self._signal: int | None = None
        self.reason: str | None = None
        self.is_killing = False
        self._timer = None if seconds is None else threading.Timer(seconds, self._run_out, (seconds,))

    def __enter__(self) -> Self:
        self._former = {
            number: signal.signal(number, self._hear)
            for number in _SIGNALS
            if signal.getsignal(number) != signal.SIG_IGN  # as nohup ignores SIGHUP
        }
        if self._timer is not None:
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def note_failures(self, failed: int) -> None:
        """Stop the batch if these are too many."""
        if self.reason is None and self._halt.is_reached(failed, self._total):
            self.is_killing = self._halt.how is Halt.NOW
            self._stop(f"halted after {failed} failed {self._noun if failed == 1 else self._noun + 's'}")

    def pass_on(self) -> None:
        """End as the signal asks that stopped the batch, if one did.

        Raises:
            KeyboardInterrupt: It was SIGINT.
            SystemExit: It was another one.
        """
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self._signal is not None:
            raise SystemExit(128 + self._signal)

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        is_first, self._signal = self._signal is None, number
        if is_first:
            self._batch.stop(_MOMENT)
        else:
            self.pass_on()

    def _run_out(self, seconds: float) -> None:
        self._stop(f"stopped after --max-time, {seconds:g} s")

    def _stop(self, reason: str) -> None:
        self.reason = self.reason or reason
        self._batch.stop(*([0.0] if self.is_killing else []))


class Intact:
    """Take jobs from an input for as long as it is what was checked; what runs when it is not comes to its end."""

    def __init__(self) -> None:
        self._error: InputError | None = None

    def only(self, jobs: Iterator[_T]) -> Iterator[_T]:
        """Yield the jobs until the input is found to be changed."""
        try:
            yield from jobs
        except InputError as exc:
            self._error = exc

    def pass_on(self) -> None:
        """Raise what was found, if anything was.

        Raises:
            InputError: The input was changed.
        """
        if self._error is not None:
            raise self._error


def code_of(stop: BaseException) -> ExitCode:
    """Return the exit code of what ended a run early."""
    if isinstance(stop, KeyboardInterrupt):
        return ExitCode.INTERRUPTED
    if isinstance(stop, SystemExit):
        return ExitCode.HUNG_UP if stop.code == ExitCode.HUNG_UP else ExitCode.TERMINATED
    if isinstance(stop, (ShpoolError, CommandError)) and not isinstance(stop, JournalError):
        return exit_code_of(stop)
    return ExitCode.FAILED  # a journal was fine when the run began
