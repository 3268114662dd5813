"""A future for one reader: what ``map`` waits for, at a third of the cost."""

from __future__ import annotations

import functools
import os
import threading
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TYPE_CHECKING, Any

from shpool.waiting import wait_in_glances

if TYPE_CHECKING:
    from collections.abc import Callable

_PENDING, _RUNNING, _CANCELLED, _DONE = range(4)
_turn = threading.Lock()  # guards the step from pending to running or cancelled, of all slots


def _renew_lock() -> None:
    """Run in a forked child: a thread that is not there may have held it."""
    global _turn  # noqa: PLW0603 - one for all
    _turn = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


class Slot(Future[Any]):
    """A future whose end one thread waits for. It has no condition: making and notifying one costs most of a future.

    The setter stores the outcome and then looks for a waiting reader; the reader leaves a lock and then looks for the
    outcome. Whichever comes second sees what the other has done.

    Attributes:
        is_abandoned: Nobody will look at its end.
        size: Bytes of the arguments that wait for another attempt; 0 while there was only one.
        received: Bytes of the pickled result; 0 while there is none, and for a batch.
    """

    is_abandoned = False
    size = 0
    received = 0
    _is_watched = False

    def __init__(self) -> None:  # the condition of the base class is what is spared
        self._stage = _PENDING
        self._value: Any = None
        self._error: BaseException | None = None
        self._reader: Any = None  # a lock that is held until the outcome is there
        self._callback: Callable[[Future[Any]], object] | None = None

    def cancel(self) -> bool:
        """Cancel it if it does not run yet."""
        with _turn:
            if self._stage == _PENDING:
                self._stage = _CANCELLED
        if self._stage == _CANCELLED:
            self._wake()
        return self._stage == _CANCELLED

    def abandon(self) -> None:
        """Cancel it, or have it know that it is worth no other attempt; the engine is to be told after that."""
        self.is_abandoned = True
        self.cancel()

    def put_off(self, size: int) -> None:
        """Note that it waits for another attempt, for which so many bytes are kept."""
        self.size = size
        callback = self._callback
        if self._is_watched and callback is not None:
            callback(self)

    def cancelled(self) -> bool:
        """Tell whether it was cancelled."""
        return self._stage == _CANCELLED

    def running(self) -> bool:
        """Tell whether it runs."""
        return self._stage == _RUNNING

    def done(self) -> bool:
        """Tell whether it has ended."""
        return self._stage >= _CANCELLED

    def set_running_or_notify_cancel(self) -> bool:
        """Let it run, unless it was cancelled."""
        with _turn:
            if self._stage == _PENDING:
                self._stage = _RUNNING
        return self._stage == _RUNNING

    def set_result(self, result: Any) -> None:  # noqa: ANN401 - the user's own results
        """End it with a result."""
        self._value = result
        self._stage = _DONE
        self._wake()

    def set_exception(self, exception: BaseException | None) -> None:
        """End it with an error."""
        self._error = exception
        self._stage = _DONE
        self._wake()

    def result(self, timeout: float | None = None) -> Any:  # noqa: ANN401 - the user's own results
        """Wait for the end; return the result or raise the error."""
        error = self.exception(timeout)
        if error is None:
            return self._value
        try:
            raise error
        finally:
            self = error = None  # type: ignore[assignment]  # noqa: PLW0642 - breaks the cycle with the traceback

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the end; return the error, None if there is none."""
        if self._stage < _CANCELLED:
            self._wait(timeout)
        if self._stage == _CANCELLED:
            raise CancelledError
        return self._error

    def add_done_callback(self, fn: Callable[[Future[Any]], object]) -> None:
        """Call ``fn`` at the end; there can be one such function."""
        self._callback = fn
        if self._stage >= _CANCELLED:
            self._call_back()

    def watch(self, fn: Callable[[Future[Any]], object]) -> None:
        """Call ``fn`` at the end and each time that it is put off, at least once for all that came before this call.

        In the engine's thread, which may hold its lock: ``fn`` must not wait, nor submit.
        """
        self._is_watched = True
        self._callback = fn
        if self._stage >= _CANCELLED:
            self._call_back()
        elif self.size:
            fn(self)

    def _wait(self, timeout: float | None) -> None:
        reader = threading.Lock()
        reader.acquire()
        self._reader = reader
        if self._stage < _CANCELLED and not wait_in_glances(functools.partial(reader.acquire, True), timeout):
            raise FutureTimeoutError

    def _wake(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.release()
        self._call_back()

    def _call_back(self) -> None:
        callback, self._callback = self._callback, None
        if callback is not None:
            callback(self)


def is_abandoned(future: Future[Any]) -> bool:
    """Tell whether nobody will look at a future's end."""
    return isinstance(future, Slot) and future.is_abandoned
