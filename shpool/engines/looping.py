"""What the crew and the clusters' engine share: one thread, the loop, between the callers and what carries tasks.

Callers open flights and ask for their ends; the loop settles them. What carries them in between is the subclass's.
"""

from __future__ import annotations

import abc
import itertools
import logging
import os
import threading
import weakref
from typing import TYPE_CHECKING, Any

from shpool.engines.dispatch import Dispatch
from shpool.engines.flight import Flight
from shpool.engines.ledger import Ledger
from shpool.engines.packing import pack_arguments, pack_function
from shpool.errors import InitializerError, TaskTerminatedError, UnpicklableError
from shpool.importing import signals_wait
from shpool.waiting import PoolFuture, wait_in_glances
from shpool.worker import load_error

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from shpool.channels import TokenChannel
    from shpool.engines.base import Tally, Task
    from shpool.engines.flight import PackedFunction

logger = logging.getLogger(__name__)


class LoopingEngine(abc.ABC):
    """An engine with a loop.

    Args:
        name: What the loop's thread is called.
    """

    def __init__(self, name: str) -> None:
        self.on_refused: Callable[[int], None] = lambda _: None
        self.on_end: Callable[[], None] = lambda: None
        self._numbers = itertools.count(1)
        self._is_over_for_good = threading.Event()
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)

        # Guards all that follows, and what the subclass says. It can be taken twice: a forgotten pool is collected in
        # whatever thread makes the garbage collector run, this module's included, and then calls shutdown().
        self._lock = threading.RLock()
        self._dispatch = Dispatch()
        self._ledger = Ledger(self._lock, self._dispatch, self._ring_if_closing)
        self._is_closing = self._is_killing = self._has_ended = self._is_rung = False
        self._has_abandoned = False  # something waits, or did, that nobody wants any more
        self._fatal: Exception | None = None

    @property
    @abc.abstractmethod
    def channel(self) -> TokenChannel:
        """Where the workers' token is published."""

    @property
    def tally(self) -> Tally:
        """What was counted so far."""
        return self._ledger.tally

    @property
    def has_ended(self) -> bool:
        """Tell whether the loop is over."""
        return self._has_ended

    @property
    def backlog(self) -> int:
        """How many tasks are not settled yet."""
        return self._ledger.pending

    @property
    def failure(self) -> Exception | None:
        """Why no task can run any more; None while they can."""
        return self._fatal

    def prepare(self, fn: Callable[..., Any], *, serves_many: bool = False) -> PackedFunction:
        """Pickle a function; see ``Engine.prepare``.

        Raises:
            UnpicklableError: It cannot be pickled.
        """
        return pack_function(fn, serves_many=serves_many)

    def submit(self, task: Task, future: Future[Any] | None = None) -> Future[Any]:
        """Run a task; see ``Engine.submit``."""
        future = PoolFuture() if future is None else future
        try:
            kind, payload = pack_arguments(task)
        except UnpicklableError as exc:
            future.set_running_or_notify_cancel()
            future.set_exception(exc)
            return future
        flight = Flight(task, next(self._numbers), task.fn, kind, payload, future)
        future._shpool_engine = self  # type: ignore[attr-defined]  # noqa: SLF001 - so that terminate() knows its own
        self._take_in(flight)
        return future

    def terminate(self, future: Future[Any]) -> bool:
        """Stop one task; see ``Engine.terminate``."""
        if getattr(future, "_shpool_engine", None) is not self:
            msg = "this future is of no task of this pool"
            raise ValueError(msg)
        if future.cancel():
            return True
        with self._lock:
            if future.done():
                return False
            if self._stop_running(future):
                return True
            waiting = self._dispatch.take_out(future)
            if waiting is not None:
                self._stop_waiting(waiting)
            return waiting is not None  # else it is getting its end at this moment

    def recall(self, future: Future[Any]) -> None:  # noqa: B027 - what most can do
        """Do nothing; see ``Engine.recall``."""

    def drop_abandoned(self) -> None:
        """Have the loop drop it, as the garbage collector may close a map anywhere; see ``Engine.drop_abandoned``."""
        with self._lock:
            self._has_abandoned = True
            self._ring()

    def shutdown(self, *, cancel: bool = False, kill: bool = False) -> None:
        """Take no more tasks; see ``Engine.shutdown``. Returns at once."""
        with self._lock:
            self._is_closing = True
            self._is_killing |= kill
            self._ledger.is_closed |= kill
            dropped = self._dispatch.clear() if cancel or kill else []
            self._ring()
        for flight in dropped:
            self._ledger.drop(flight, TaskTerminatedError(flight.task.label))

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the loop's end."""
        if self._thread.ident is None or threading.current_thread() is self._thread:
            return self._thread.ident is None
        # Not for the thread itself: before Python 3.13 one whose join() was interrupted counts as stopped from then on.
        if wait_in_glances(self._is_over_for_good.wait, timeout):
            self._thread.join(timeout)
        return self._is_over_for_good.is_set()

    def let_go(self) -> None:
        """In a forked child, where no thread of the parent's runs: be over."""
        self._lock = threading.RLock()  # a thread that is not in the child may hold the other one
        if self._has_ended:
            return
        text = "the pool belongs to the process that started it; a forked child needs one of its own"
        self._fatal, self._has_ended = RuntimeError(text), True
        self._close_copies()

    def _start_loop(self) -> None:
        _started.add(self)
        with signals_wait():
            self._thread.start()

    def _close_copies(self) -> None:  # noqa: B027 - a hook, for those who need it
        """Close what a forked child has got without wanting it."""

    # What follows runs under the lock, and calls nobody's code.

    def _open(self, flight: Flight) -> bool:
        """Count a flight in and queue it; tell whether it may go now, or only after a pause."""
        if self._fatal is not None:
            raise self._fatal
        if self._is_closing or self._has_ended:
            msg = "cannot schedule new futures after shutdown"
            raise RuntimeError(msg)
        # In this order, as ^C may come between any two lines: a flight that waits although its caller got no future is
        # run and forgotten, while one that is counted and waits nowhere would keep the pool from ending.
        if not flight.task.history:
            self._dispatch.add(flight)
            self._ledger.open(flight)
            return True
        flight.history.extend(flight.task.history)
        self._ledger.wait(flight, flight.task.delay)
        self._ledger.open(flight)
        return False

    @abc.abstractmethod
    def _stop_running(self, future: Future[Any]) -> bool:
        """Have the task stopped whose future this is; False if it is not running."""

    @abc.abstractmethod
    def _stop_waiting(self, flight: Flight) -> None:
        """Have the loop settle a flight that was taken out of the queue by ``terminate()``."""

    @abc.abstractmethod
    def _ring(self) -> None:
        """Wake the loop."""

    def _ring_if_closing(self) -> None:
        if self._is_closing:
            self._ring()

    # What follows runs outside the lock.

    @abc.abstractmethod
    def _take_in(self, flight: Flight) -> None:
        """Open a flight, and send it or leave that to the loop."""

    # What follows runs in the loop's thread.

    def _loop(self) -> None:
        """Serve until it is over; whatever happens, no future is left waiting."""
        try:
            self._begin()
            while not self._is_over():
                self._turn()
                self._end_abandoned()
        except BaseException as exc:
            logger.exception("the pool's loop has failed")
            self._fail_all(RuntimeError(f"the pool has failed: {type(exc).__name__}: {exc}"))
            raise
        finally:
            try:
                self._wind_up()
            finally:
                self._has_ended = True
                self.on_end()
                self.channel.close()
                self._is_over_for_good.set()

    def _is_over(self) -> bool:
        with self._lock:
            return self._fatal is not None or self._is_killing or (self._is_closing and not self._ledger.pending)

    def _end_abandoned(self) -> None:
        if not self._has_abandoned:  # read without the lock: whoever sets it rings for another turn
            return
        with self._lock:
            self._has_abandoned = False
            abandoned = self._dispatch.take_out_abandoned()
        for flight in abandoned:
            self._ledger.drop(flight, TaskTerminatedError(flight.task.label))

    def _begin(self) -> None:  # noqa: B027 - as above
        """Do what comes before the first turn."""

    @abc.abstractmethod
    def _turn(self) -> None:
        """Wait for something to do, or for a moment when there will be; do all there is."""

    @abc.abstractmethod
    def _wind_up(self) -> None:
        """Settle what is left, and end what carries tasks."""

    def _fail_all(self, error: Exception) -> None:
        """No task can run any more: all futures get this error, and so does every later submit."""
        with self._lock:
            self._fatal = error

    def _fail_unfit(self, payload: bytes | memoryview) -> InitializerError:
        """Fail all for a worker's initializer that raised this; return the error."""
        error = load_error(bytes(payload))
        unfit = InitializerError(f"{type(error).__name__}: {error}")
        unfit.__cause__ = error.__cause__
        self._fail_all(unfit)
        return unfit

    def _ending_of(self, flight: Flight) -> Exception:
        return self._fatal or TaskTerminatedError(flight.task.label)


def _let_go_all() -> None:
    """Run in a forked child, before anything else there."""
    for engine in list(_started):
        engine.let_go()


_started: weakref.WeakSet[LoopingEngine] = weakref.WeakSet()
os.register_at_fork(after_in_child=_let_go_all)
