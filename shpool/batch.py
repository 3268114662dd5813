"""Run many jobs on any executor: lazily, with retries, one result per job in the order they finish."""

from __future__ import annotations

import heapq
import itertools
import math
import queue
import time
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from shpool.beginnings import Beginnings
from shpool.halting import GiveUp
from shpool.jobs import Job, JobResult
from shpool.processors import processor_count
from shpool.retry import Backoff, RetryPolicy, carry_attempts, summary_of
from shpool.submitting import caller
from shpool.timedcall import TimedCall, seconds_of, worker_of
from shpool.waiting import get_in_glances

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
    from concurrent.futures import Executor, Future

    from shpool.retry import RetryAfterUnit

# Enough that a worker never waits for the parent, few enough that an interrupted batch has little to drop.
JOBS_PER_WORKER = 4

# While that proves too few: of jobs that take no time each one else wakes three threads and a worker for itself alone.
_MOST_PER_WORKER = 32
_LARGE = 2**16  # bytes: results that are larger fill the memory if so many of them wait to be written

# Jobs that wait for their next attempt hold no worker, so they do not count as in flight; yet while a
# service is down every job fails once, and a lazy input must not pile up in memory.
_WAITING_PER_WINDOW = 16
_LONGEST_DOZE = 0.2  # s


def run_batch(  # noqa: PLR0913 - the last three are for tests
    executor: Executor,
    fn: Callable[..., Any],
    jobs: Iterable[Job],
    *,
    retries: int = 0,
    backoff: Backoff = Backoff(),  # noqa: B008 - frozen
    window: int | None = None,
    retry_after_unit: RetryAfterUnit = "s",
    begun: Callable[[Job], None] | None = None,
    before_wait: Callable[[], object] | None = None,
    clock: Callable[[], float] = time.monotonic,
    wall: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> Batch:
    """Run the jobs; iterate over what this returns for their results, as they finish.

    Jobs are pulled as others finish. Closing the batch, or an interruption inside it, cancels what has not
    begun; what runs is the executor's to end.

    Args:
        executor: Any executor; the batch never shuts it down.
        fn: Called with each job's arguments; it must be picklable where the executor has processes. A pool of ours
            pickles it once, with what it holds at the first job.
        jobs: Any iterable, finite or not.
        retries: Further attempts for a job whose error ``is_retryable``.
        backoff: Waits between the attempts of one job; meanwhile others run.
        window: Most jobs in flight; None is 4 per worker of the executor, and up to 32 once they prove too few, as long
            as no result is larger than 64 KiB.
        retry_after_unit: What a number in a ``Retry-After`` header counts: seconds (RFC 9110), or milliseconds as
            Sentinel Hub sends them.
        begun: Called with each job that is seen to run, some time after a worker took it; not with those that are over
            before. Jobs that wait for a worker have not begun.
        before_wait: Called where the iteration is about to wait, as no result is at hand: what was put off while some
            were can be done now.
        clock: Seconds that never step back, for due times.
        wall: Seconds since the epoch, for dates in ``Retry-After``.
        sleep: Waits while nothing is in flight.

    Raises:
        ValueError: ``retries`` is negative or ``window`` less than 1.
        Exception: From the iteration: what the executor's ``submit`` raises, and what iterating over ``jobs`` raises.
            A failed job raises nothing: it is a ``JobResult``.
    """
    if retries < 0:
        msg = f"retries={retries} must not be negative"
        raise ValueError(msg)
    if window is not None and window < 1:
        msg = f"window={window} must be at least 1"
        raise ValueError(msg)
    bounds = _Window.of(worker_count(executor)) if window is None else _Window(window, window)
    policy, times = RetryPolicy(retries, backoff, retry_after_unit), _Times(clock, wall, sleep)
    return Batch(caller(executor, TimedCall(fn)), iter(jobs), policy, bounds, times, begun, before_wait)


def worker_count(executor: Executor) -> int:
    """Return how many workers an executor has, or the number of processors where it does not tell."""
    for name in ("max_workers", "_max_workers"):  # ours; those of concurrent.futures and loky
        count = getattr(executor, name, None)
        if isinstance(count, int) and count > 0:
            return count
    return processor_count()


class _Window(NamedTuple):
    """How many jobs are in flight: at first, and at most."""

    first: int
    most: int

    @classmethod
    def of(cls, workers: int) -> _Window:
        return cls(JOBS_PER_WORKER * workers, _MOST_PER_WORKER * workers)


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
    history: list[str] = field(default_factory=list)  # a line for each attempt that failed


class Batch:
    """Jobs on their way: from the input or the waiting room to the executor, and back as results.

    Everything here happens in the consumer's thread, but for ``stop`` and the queue, which others fill.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - made by ``run_batch`` alone
        self,
        submit: Callable[[tuple[Any, ...], Mapping[str, Any]], Future[Any]],
        jobs: Iterator[Job],
        policy: RetryPolicy,
        window: _Window,
        times: _Times,
        begun: Callable[[Job], None] | None,
        before_wait: Callable[[], object] | None,
    ) -> None:
        self._before_wait = before_wait
        self._submit = submit
        self._jobs = jobs
        self._policy = policy
        self._narrowest, self._widest = window
        self._window = self._narrowest
        self._most_waiting = _WAITING_PER_WINDOW * self._window
        self._newest: Future[Any] | None = None  # of those submitted
        self._times = times
        self._is_exhausted = False
        self._has_cancelled = False  # what had not begun when it was told to stop
        self._give_up = GiveUp()  # set by stop()
        self._in_flight: dict[Future[Any], _Attempt] = {}
        self._beginnings: Beginnings[Job] = Beginnings(begun, times.clock)
        self._waiting: list[tuple[float, int, _Attempt]] = []  # a heap by due time; the number breaks ties
        self._order = itertools.count()
        self._finished: queue.SimpleQueue[Future[Any] | None] = queue.SimpleQueue()  # None: look again
        self._results = self._run()

    def __iter__(self) -> Iterator[JobResult]:
        return self._results

    def __next__(self) -> JobResult:
        return next(self._results)

    def close(self) -> None:
        """Cancel what has not begun; no more results come."""
        self._results.close()

    @property
    def is_stopping(self) -> bool:
        """Tell whether ``stop`` was called: what yields the jobs may end, too."""
        return self._give_up.is_set

    def stop(self, within: float = math.inf) -> None:
        """Begin no job and no attempt any more, and let what runs end; from any thread, or from a signal handler.

        Args:
            within: Seconds to wait for what runs; after that the iteration ends without it.
        """
        self._give_up.by(self._times.clock() + within)
        self._finished.put(None)

    def _run(self) -> Generator[JobResult, None, None]:
        try:
            while not self._is_over():
                self._fill()
                if self._before_wait is not None and self._finished.empty():
                    self._before_wait()
                if self._in_flight:
                    result = self._collect()
                    if result is not None:
                        yield result
                elif self._waiting:
                    self._doze()
        finally:
            self._cancel()

    def _is_over(self) -> bool:
        if not self.is_stopping:
            return self._is_exhausted and not self._in_flight and not self._waiting
        self._waiting.clear()
        if not self._has_cancelled:  # once, as nothing is submitted any more
            self._has_cancelled = True
            self._cancel()
        self._beginnings.look(at_once=True)  # what runs may be stopped now, and is then cut off
        if self._times.clock() < self._give_up.moment:
            return not self._in_flight
        return not any(future.done() for future in self._in_flight)  # what has ended is a result

    def _cancel(self) -> None:
        """Drop what has not begun."""
        for future in [future for future in self._in_flight if future.cancel()]:
            del self._in_flight[future]
            self._beginnings.forget(future)

    def _doze(self) -> None:
        """Wait for the next due attempt while nothing is in flight; in short steps, so that ``stop`` is heard."""
        self._times.sleep(min(max(self._waiting[0][0] - self._times.clock(), 0.0), _LONGEST_DOZE))

    def _fill(self) -> None:
        """Submit what the window has room for: attempts that are due first, then new jobs."""
        if self._window < self._widest and self._newest is not None and self._newest.done():
            self._window = min(self._window * 2, self._widest)  # the workers ran dry
        while len(self._in_flight) < self._window and not self.is_stopping:
            attempt = self._next_attempt()
            if attempt is None or self.is_stopping:  # told to stop while the input was read
                return
            attempt.begun = self._times.clock()
            future = self._submit(attempt.job.args, attempt.job.kwargs)
            self._newest = future
            self._in_flight[future] = attempt
            self._beginnings.expect(future, attempt.job)
            future.add_done_callback(self._finished.put)

    def _next_attempt(self) -> _Attempt | None:
        if self._waiting and self._waiting[0][0] <= self._times.clock():
            return heapq.heappop(self._waiting)[2]
        if self._is_exhausted or len(self._waiting) >= self._most_waiting:
            return None
        job = next(self._jobs, None)
        if job is None:
            self._is_exhausted = True
            return None
        return _Attempt(job, 1)

    def _collect(self) -> JobResult | None:
        """Wait for one finished attempt, at most until there is something else to do; return a final result."""
        moments = [moment for moment in (self._give_up.moment,) if moment < math.inf]
        if self._waiting and len(self._in_flight) < self._window:
            moments.append(self._waiting[0][0])
        if self._beginnings.look():
            moments.append(self._beginnings.next_look)
        timeout = max(min(moments) - self._times.clock(), 0.0) if moments else None
        try:
            future = get_in_glances(self._finished, timeout)
        except queue.Empty:
            return None
        if future is None or future not in self._in_flight:  # told to stop, or cancelled by that
            return None
        attempt = self._in_flight.pop(future)
        self._beginnings.forget(future)
        if getattr(future, "received", 0) > _LARGE:
            self._window = self._widest = self._narrowest
        error = _error_of(future)
        if error is not None:
            return self._failed(attempt, error)
        job, (value, seconds, worker) = attempt.job, future.result()
        return JobResult(job.index, job.key, "done", value, None, attempt.number, seconds, worker)

    def _failed(self, attempt: _Attempt, error: BaseException) -> JobResult | None:
        now = self._times.clock()
        wait = self._policy.wait_before_retry(error, attempt.number, self._times.wall())
        if wait is not None and not self.is_stopping:
            attempt.history.append(summary_of(error, attempt.number))
            again = _Attempt(attempt.job, attempt.number + 1, history=attempt.history)
            heapq.heappush(self._waiting, (now + wait, next(self._order), again))
            return None
        carry_attempts(error, attempt.history)
        seconds, job = seconds_of(error), attempt.job
        seconds = now - attempt.begun if seconds is None else seconds
        return JobResult(job.index, job.key, "failed", None, error, attempt.number, seconds, worker_of(error))


def _error_of(future: Future[Any]) -> BaseException | None:
    """Return what a finished future raised; a future that someone else cancelled has failed."""
    return CancelledError("cancelled by the executor") if future.cancelled() else future.exception()
