"""Waits that any signal ends.

CPython looks whether a signal has come, lets other threads run, and then sleeps until the lock is free. A signal that
comes in between, or that the system gives to another thread, is handled when the sleep ends: with tasks of eight
seconds, so much later. So no sleep here lasts longer than a glance.
"""

from __future__ import annotations

import queue
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

_T = TypeVar("_T")

_GLANCE = 0.2  # s; ^C is to end a program within one second


def wait_in_glances(wait: Callable[[float], object], timeout: float | None = None) -> bool:
    """Wait until there is an end to it.

    Args:
        wait: Waits for so many seconds at most, and tells whether that has ended it.
        timeout: Seconds in all; None for as long as it takes.

    Returns:
        Whether it has ended.
    """
    if timeout is None:
        while not wait(_GLANCE):
            pass
        return True
    give_up = time.monotonic() + timeout
    while not wait(max(0.0, min(_GLANCE, give_up - time.monotonic()))):
        if time.monotonic() >= give_up:
            return False
    return True


def get_in_glances(source: queue.SimpleQueue[_T], timeout: float | None = None) -> _T:
    """Take the next one out of a queue.

    Raises:
        queue.Empty: There was none within so many seconds.
    """
    taken: list[_T] = []

    def take(seconds: float) -> bool:
        try:
            taken.append(source.get(timeout=seconds))
        except queue.Empty:
            return False
        return True

    if not wait_in_glances(take, timeout):
        raise queue.Empty
    return taken[0]


class PoolFuture(Future[Any]):
    """A future as the standard library's, but for ^C while a thread waits for it."""

    def result(self, timeout: float | None = None) -> Any:  # noqa: ANN401 - the user's own results
        """Wait for the end; return the result or raise the error."""
        wait_in_glances(self._has_ended_within, timeout)
        try:
            return super().result(0)
        finally:
            self = None  # type: ignore[assignment]  # noqa: PLW0642 - breaks the cycle with the error's traceback

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the end; return the error, None if there is none."""
        wait_in_glances(self._has_ended_within, timeout)
        return super().exception(0)

    def _has_ended_within(self, seconds: float) -> bool:
        with self._condition:
            if not self.done():
                self._condition.wait(seconds)
            return self.done()
