"""Run many jobs on any executor: lazily, with retries, one result per job in the order they finish.

The parts decide apart from each other, so that more policies can join them:

- ``RetryPolicy`` says whether and when a failed attempt is worth another;
- ``_Window`` says whether one more job may be pulled;
- ``_Batch`` only carries attempts between the executor and these two.
"""

from __future__ import annotations

import heapq
import itertools
import os
import queue
import sysconfig
import time
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from shpool.jobs import Job, JobResult
from shpool.retry import Backoff, RetryPolicy

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator
    from concurrent.futures import Executor, Future
    from types import TracebackType

    from typing_extensions import Self

    from shpool.retry import RetryAfterUnit

__all__ = ["Job", "JobResult", "RetryPolicy", "TimedCall", "place_of", "run_batch", "worker_count"]

# Enough that a worker never waits for the parent, few enough that an interrupted batch has little to drop.
JOBS_PER_WORKER = 4

# Jobs that wait for their next attempt hold no worker, so they do not count as in flight; yet while a
# service is down every job fails once, and a lazy input must not pile up in memory.
_WAITING_PER_WINDOW = 16


def run_batch(  # noqa: PLR0913 - the last three are for tests
    executor: Executor,
    fn: Callable[..., Any],
    jobs: Iterable[Job],
    *,
    retries: int = 0,
    backoff: Backoff = Backoff(),  # noqa: B008 - frozen
    window: int | None = None,
    retry_after_unit: RetryAfterUnit = "s",
    clock: Callable[[], float] = time.monotonic,
    wall: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> Generator[JobResult, None, None]:
    """Run the jobs and yield their results as they finish.

    Jobs are pulled as others finish. Closing the generator, or an interruption inside it, cancels what has not
    begun; what runs is the executor's to end.

    Args:
        executor: Any executor; the batch never shuts it down.
        fn: Called with each job's arguments; it must be picklable where the executor has processes.
        jobs: Any iterable, finite or not.
        retries: Further attempts for a job whose error ``is_retryable``.
        backoff: Waits between the attempts of one job; meanwhile others run.
        window: Most jobs in flight; None is 4 per worker of the executor.
        retry_after_unit: What a number in a ``Retry-After`` header counts: seconds (RFC 9110), or milliseconds as
            Sentinel Hub sends them.
        clock: Seconds that never step back, for due times.
        wall: Seconds since the epoch, for dates in ``Retry-After``.
        sleep: Waits while nothing is in flight.

    Raises:
        ValueError: ``retries`` is negative or ``window`` less than 1.
        Exception: What the executor's ``submit`` raises, and what iterating over ``jobs`` raises. A failed job
            raises nothing: it is a ``JobResult``.
    """
    if retries < 0:
        msg = f"retries={retries} must not be negative"
        raise ValueError(msg)
    in_flight = JOBS_PER_WORKER * worker_count(executor) if window is None else window
    if in_flight < 1:
        msg = f"window={window} must be at least 1"
        raise ValueError(msg)
    policy, times = RetryPolicy(retries, backoff, retry_after_unit), _Times(clock, wall, sleep)
    call = TimedCall(fn)  # the same object for every job: an executor may send it once

    def submit(job: Job) -> Future[Any]:
        return executor.submit(call, *job.args, **job.kwargs)

    return _Batch(submit, iter(jobs), policy, in_flight, times).results()


def worker_count(executor: Executor) -> int:
    """Return how many workers an executor has, or the number of processors where it does not tell."""
    for name in ("max_workers", "_max_workers"):  # ours; those of concurrent.futures and loky
        count = getattr(executor, name, None)
        if isinstance(count, int) and count > 0:
            return count
    return os.cpu_count() or 1


class _Times(NamedTuple):
    clock: Callable[[], float]
    wall: Callable[[], float]
    sleep: Callable[[float], None]


@dataclass
class _Attempt:
    """One job on its way through the executor."""

    job: Job
    number: int
    begun: float = 0.0


class _Batch:
    """Carry attempts: from the input or the waiting room to the executor, and back as results.

    Everything here happens in the consumer's thread, but for the queue, which the executor's threads fill.
    """

    def __init__(
        self, submit: Callable[[Job], Future[Any]], jobs: Iterator[Job], policy: RetryPolicy, window: int, times: _Times
    ) -> None:
        self._submit = submit
        self._jobs = jobs
        self._policy = policy
        self._window = window
        self._times = times
        self._is_exhausted = False
        self._in_flight: dict[Future[Any], _Attempt] = {}
        self._waiting: list[tuple[float, int, _Attempt]] = []  # a heap by due time; the number breaks ties
        self._order = itertools.count()
        self._finished: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()

    def results(self) -> Generator[JobResult, None, None]:
        try:
            while True:
                self._fill()
                if self._in_flight:
                    result = self._collect()
                    if result is not None:
                        yield result
                elif self._waiting:
                    self._times.sleep(max(self._waiting[0][0] - self._times.clock(), 0.0))
                else:
                    return
        finally:
            for future in self._in_flight:
                future.cancel()

    def _fill(self) -> None:
        """Submit what the window has room for: attempts that are due first, then new jobs."""
        while len(self._in_flight) < self._window:
            attempt = self._next_attempt()
            if attempt is None:
                return
            attempt.begun = self._times.clock()
            future = self._submit(attempt.job)
            self._in_flight[future] = attempt
            future.add_done_callback(self._finished.put)

    def _next_attempt(self) -> _Attempt | None:
        if self._waiting and self._waiting[0][0] <= self._times.clock():
            return heapq.heappop(self._waiting)[2]
        if self._is_exhausted or len(self._waiting) >= _WAITING_PER_WINDOW * self._window:
            return None
        job = next(self._jobs, None)
        if job is None:
            self._is_exhausted = True
            return None
        return _Attempt(job, 1)

    def _collect(self) -> JobResult | None:
        """Wait for one finished attempt, at most until a waiting one is due; return its job's result if final."""
        timeout = None
        if self._waiting and len(self._in_flight) < self._window:
            timeout = max(self._waiting[0][0] - self._times.clock(), 0.0)
        try:
            future = self._finished.get(timeout=timeout)
        except queue.Empty:
            return None
        attempt = self._in_flight.pop(future)
        error = _error_of(future)
        if error is None:
            value, seconds = future.result()
            return JobResult(attempt.job.index, attempt.job.key, "done", value, None, attempt.number, seconds)
        return self._failed(attempt, error)

    def _failed(self, attempt: _Attempt, error: BaseException) -> JobResult | None:
        now = self._times.clock()
        wait = self._policy.wait_before_retry(error, attempt.number, self._times.wall())
        if wait is not None:
            again = _Attempt(attempt.job, attempt.number + 1)
            heapq.heappush(self._waiting, (now + wait, next(self._order), again))
            return None
        seconds = getattr(error, _SECONDS, now - attempt.begun)
        return JobResult(attempt.job.index, attempt.job.key, "failed", None, error, attempt.number, seconds)


def _error_of(future: Future[Any]) -> BaseException | None:
    """Return what a finished future raised; a future that someone else cancelled has failed."""
    return CancelledError("cancelled by the executor") if future.cancelled() else future.exception()


# Set on errors in the worker; most errors keep their attributes when pickled.
_SECONDS = "_shpool_seconds"
_PLACE = "_shpool_place"


def place_of(error: BaseException) -> str:
    """Return file and line of the user's code that raised a job's error, as ``tiles.py:12``; empty if unknown."""
    return str(getattr(error, _PLACE, ""))


def _place(trace: TracebackType | None) -> str:
    """Return the innermost line that is neither ours nor of an installed package; else the innermost not ours."""
    ours = str(Path(__file__).parent)
    installed = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
    outer = inner = ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not file.startswith((ours, "<frozen ")):
            inner = f"{Path(file).name}:{trace.tb_lineno}"
            outer = outer if file.startswith(installed) else inner
        trace = trace.tb_next
    return outer or inner


class TimedCall:
    """A function that reports how long it took where it ran; as picklable as the function."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self._fn = fn
        has_own_text = "__str__" in vars(type(fn))
        # Executors name tasks by this; the text of a partial may be as long as its arguments.
        self.__qualname__ = getattr(fn, "__qualname__", None) or (str(fn) if has_own_text else type(fn).__name__)

    def __call__(self, /, *args: Any, **kwargs: Any) -> tuple[Any, float]:  # noqa: ANN401 - whatever the function takes
        """Return the function's result and the seconds it took."""
        with _Stopwatch() as watch:
            result = self._fn(*args, **kwargs)
        return result, watch.seconds

    def __repr__(self) -> str:
        return self.__qualname__


class _Stopwatch:
    """Measure a block; an error that leaves it carries the seconds along."""

    seconds = 0.0

    def __enter__(self) -> Self:
        self._begun = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.perf_counter() - self._begun
        if error is not None:
            with suppress(AttributeError, TypeError):  # an error class may refuse attributes
                setattr(error, _SECONDS, self.seconds)
                setattr(error, _PLACE, _place(trace))
