"""What is owed: the flights whose futures have no end yet, and what becomes of each attempt.

Whatever an attempt came to, it ends here in one of two ways: the future gets its end, or the flight another attempt.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from shpool.engines.base import BatchResult, Tally
from shpool.engines.messages import Kind
from shpool.engines.slot import Slot, is_abandoned
from shpool.errors import TaskError, TaskTerminatedError, UnpicklableError, WorkerLostError
from shpool.pickling import load
from shpool.retry import carry_attempts, summary_of
from shpool.worker import load_error

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from shpool.engines.dispatch import Dispatch
    from shpool.engines.flight import Flight
    from shpool.engines.messages import Message

logger = logging.getLogger(__name__)


class Ledger:
    """Count flights in, and settle them. Futures' callbacks run here, so never under the lock.

    Args:
        lock: The crew's; it guards the counters.
        dispatch: Where a flight waits for its next attempt.
        on_balance: Called under the lock when nothing is owed any more.

    Attributes:
        tally: What was counted so far.
        is_closed: No flight gets another attempt.
    """

    def __init__(self, lock: AbstractContextManager[Any], dispatch: Dispatch, on_balance: Callable[[], None]) -> None:
        self._lock = lock
        self._dispatch = dispatch
        self._on_balance = on_balance
        self._owed: set[Flight] = set()  # their future is not settled
        self._timed: set[Flight] = set()  # of these, those with a timeout
        self.tally = Tally()
        self.is_closed = False

    @property
    def pending(self) -> int:
        """How many flights have a future that is not settled."""
        return len(self._owed)

    @property
    def timed(self) -> int:
        """How many of these have a timeout."""
        return len(self._timed)

    def open(self, flight: Flight) -> None:
        """Count a flight in; under the lock."""
        if flight.task.timeout is not None:
            self._timed.add(flight)
        self._owed.add(flight)

    def forget(self, flight: Flight) -> None:
        """Count a flight out; under the lock."""
        self._timed.discard(flight)
        self._owed.discard(flight)
        if not self._owed:
            self._on_balance()

    def settle(self, flight: Flight, error: BaseException | None, result: object = None) -> None:
        """Give the future its end."""
        try:
            if error is None:
                flight.future.set_result(result)
            else:
                carry_attempts(error, flight.history)
                flight.future.set_exception(error)
        except BaseException:  # border: concurrent.futures lets a callback's SystemExit through
            logger.exception("a callback of the future of %s has failed", flight.task.label)
        with self._lock:
            self.tally.done += error is None
            self.tally.failed += error is not None
            self.forget(flight)

    def drop(self, flight: Flight, error: BaseException) -> None:
        """End a flight that waits: cancelled if it never ran, else with this error."""
        if flight.is_running or not flight.future.cancel():
            self.settle(flight, error)
            return
        flight.future.set_running_or_notify_cancel()
        with self._lock:
            self.forget(flight)

    def fail(self, flight: Flight, error: BaseException) -> None:
        """End a flight that waits with an error, unless its future was cancelled."""
        if flight.is_running or flight.future.set_running_or_notify_cancel():
            self.settle(flight, error)
        else:
            with self._lock:
                self.forget(flight)

    def take_answer(self, flight: Flight, message: Message) -> None:
        """Act on a worker's answer."""
        if message.kind == Kind.ERROR:
            self._take_error(flight, load_error(bytes(message.payload)))
            return
        try:
            if flight.task.batch:
                self._take_last_part(flight, message)
                result = BatchResult(flight.results, flight.errors, flight.seconds, flight.size)
            else:
                result = load(message.payload)
                if isinstance(flight.future, Slot):
                    flight.future.received = len(message.payload)
        except BaseException as exc:  # noqa: BLE001 - border: unpickling runs the result's own code
            reason = f"it cannot be unpickled in the parent: {type(exc).__name__}: {exc}"
            self.settle(flight, UnpicklableError("result", f"the result of {flight.task.label}", reason))
        else:
            self.settle(flight, None, result)

    def take_part(self, flight: Flight, message: Message) -> None:
        """Keep the first results of a batch, so that they need not come again if its worker is lost."""
        if flight.is_spoiled:
            return  # a gap before these would give each of them another item's place
        try:
            part = load(message.payload)
        except BaseException:  # noqa: BLE001 - border: unpickling runs the results' own code
            flight.is_spoiled = True
        else:
            self._take_part(flight, part, message)

    def _take_last_part(self, flight: Flight, message: Message) -> None:
        """Keep what has come of a batch up to what cannot be unpickled; whoever asked has the rest run again.

        Raises:
            Exception: They are of one call, which is to answer for itself.
        """
        if flight.task.calls == 1:
            self._take_part(flight, load(message.payload), message)
        else:
            self.take_part(flight, message)

    @staticmethod
    def take_told(flight: Flight, message: Message) -> None:
        """Hand on what a task says before it ends; not what a thread says that a former one has left."""
        if flight.task.hear is None or message.number != flight.number:
            return
        try:
            flight.task.hear(load(message.payload))
        except BaseException:  # border: unpickling runs the value's own code
            logger.exception("what %s has told could not be heard", flight.task.label)

    @staticmethod
    def _take_part(flight: Flight, part: tuple[list[Any], dict[int, bytes]], message: Message) -> None:
        results, errors = part
        before = len(flight.results)
        flight.errors |= {before + index: load_error(pickled) for index, pickled in errors.items()}
        flight.results += results
        flight.seconds += message.seconds
        flight.size += len(message.payload)

    def take_loss(self, flight: Flight, error: TaskError) -> None:
        """Act on the end of the worker that was running a flight."""
        if flight.task.batch and not flight.is_unwanted and isinstance(error, WorkerLostError):
            self.settle(flight, None, BatchResult(flight.results, flight.errors, flight.seconds, flight.size, error))
        else:
            self._take_error(flight, error)

    def _take_error(self, flight: Flight, error: BaseException) -> None:
        if flight.is_unwanted:  # it failed just before it was stopped
            self.settle(flight, TaskTerminatedError(flight.task.label))
            return
        attempt = len(flight.history) + 1
        is_last = self.is_closed or is_abandoned(flight.future)
        delay = None if is_last else flight.task.policy.wait_before_retry(error, attempt, time.time())
        if delay is None:
            self.settle(flight, error)
            return
        flight.history.append(summary_of(error, attempt))
        with self._lock:
            self.wait(flight, delay)

    def wait(self, flight: Flight, delay: float) -> None:
        """Let a flight wait for its next attempt; under the lock."""
        self.tally.retried += 1
        if isinstance(flight.future, Slot):
            flight.future.put_off(flight.size)
        self._dispatch.delay(flight, time.monotonic() + delay)
        attempt, most = len(flight.history) + 1, flight.task.policy.retries + 1
        logger.warning("%s: attempt %d of %d in %.1f s %s", flight.task.label, attempt, most, delay, flight.history[-1])
