from __future__ import annotations

import functools
import itertools
import os
import signal
import threading
from concurrent.futures import CancelledError, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import pytest
from interrupting import interrupted
from patience import PATIENCE, in_time, until

from shpool.batch import JOBS_PER_WORKER, run_batch, worker_count
from shpool.jobs import Job, JobResult, make_jobs
from shpool.pool import AuthenticatedProcessPool
from shpool.retry import Backoff
from shpool.session import OAuthSession

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shpool.testing import LoopbackServer


class Immediate(Executor):
    """Run each call inside ``submit``, so that tests need no thread and no waiting."""

    max_workers = 1

    def submit(self, fn: Callable[..., Any], /, *args: object, **kwargs: object) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001 - what every executor does
            future.set_exception(error)
        return future


class Held(Executor):
    """Keep futures pending until a test settles them."""

    max_workers = 2

    def __init__(self) -> None:
        self.futures: list[Future[Any]] = []

    def submit(self, fn: Callable[..., Any], /, *args: object, **kwargs: object) -> Future[Any]:
        future: Future[Any] = Future()
        self.futures.append(future)
        return future


class Cancelling(Executor):
    """Give up every call, as an executor does that is shut down."""

    def submit(self, fn: Callable[..., Any], /, *args: object, **kwargs: object) -> Future[Any]:
        future: Future[Any] = Future()
        future.cancel()
        return future


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


class Flaky:
    """Fail the first ``failures`` calls of each argument with ``error``."""

    def __init__(self, failures: int, error: BaseException) -> None:
        self.failures = failures
        self.error = error
        self.calls: list[int] = []

    def __call__(self, number: int) -> int:
        self.calls.append(number)
        if self.calls.count(number) <= self.failures:
            raise self.error
        return number * 2


class AskedError(ConnectionError):
    """An answer that says when to come back."""

    retry_after = 7.0


def jobs(count: int) -> Iterator[Job]:
    return make_jobs("tests:double", (((number,), {}) for number in range(count)))


def double(number: int) -> int:
    return number * 2


def fail(number: int) -> int:
    message = f"bad tile {number}"
    raise ValueError(message)


def die(number: int) -> int:
    os._exit(number)


def run(
    fn: Callable[..., Any],
    count: int,
    *,
    time: Time | None = None,
    retries: int = 0,
    window: int | None = None,
) -> list[JobResult]:
    time = time or Time()
    batch = run_batch(
        Immediate(),
        fn,
        jobs(count),
        retries=retries,
        backoff=Backoff(base=1.0, factor=1.0, cap=1.0),
        window=window,
        clock=time.clock,
        wall=time.clock,
        sleep=time.sleep,
    )
    return list(batch)


class CountedPickles:
    """A function that becomes ``abs`` on its way, and counts its departures."""

    def __init__(self) -> None:
        self.pickles = 0

    def __call__(self, number: int) -> int:
        return abs(number)

    def __reduce__(self) -> tuple[object, ...]:
        self.pickles += 1
        return functools.partial, (abs,)


def test_every_job_has_one_result() -> None:
    results = run(double, 100)
    assert [result.result for result in results] == [2 * number for number in range(100)]
    assert {result.status for result in results} == {"done"}
    assert {result.attempts for result in results} == {1}
    assert all(result.error is None and result.seconds >= 0 for result in results)


def test_no_jobs_are_no_results() -> None:
    assert run(double, 0) == []


def test_a_failing_job_is_a_result_and_stops_nobody() -> None:
    results = run(lambda number: 1 // (number - 1), 3)
    assert [result.status for result in results] == ["done", "failed", "done"]
    assert isinstance(results[1].error, ZeroDivisionError)
    assert results[1].result is None


def test_arguments_arrive_by_position_and_by_name() -> None:
    job = Job(0, "key", (1,), {"self": 2, "fn": 3})
    [result] = run_batch(Immediate(), lambda *args, **kwargs: (args, kwargs), [job])
    assert result.result == ((1,), {"self": 2, "fn": 3})


def test_temporary_trouble_is_tried_again() -> None:
    flaky = Flaky(2, ConnectionError("reset"))
    results = run(flaky, 3, retries=2)
    assert sorted(result.result for result in results) == [0, 2, 4]
    assert {result.attempts for result in results} == {3}


def test_retries_end() -> None:
    flaky = Flaky(9, ConnectionError("reset"))
    [result] = run(flaky, 1, retries=2)
    assert (result.status, result.attempts) == ("failed", 3)
    assert isinstance(result.error, ConnectionError)


def test_a_programming_error_is_not_tried_again() -> None:
    flaky = Flaky(1, TypeError("no such argument"))
    [result] = run(flaky, 1, retries=5)
    assert (result.status, result.attempts) == ("failed", 1)


def test_retry_after_is_a_floor_under_the_jitter() -> None:
    time = Time()
    run(Flaky(1, AskedError("busy")), 1, time=time, retries=1)
    assert 7.0 <= sum(time.slept) <= 8.0


def test_a_waiting_job_does_not_block_the_others() -> None:
    time = Time()
    flaky = Flaky(1, AskedError("busy"))
    results = run(lambda number: flaky(number) if number == 0 else number * 2, 50, time=time, retries=1, window=1)
    assert [result.index for result in results] == [*range(1, 50), 0]


def test_jobs_that_wait_are_bounded() -> None:
    """While a service is down a lazy input is not read to its end."""
    pulled = itertools.count()
    source = (Job(next(pulled), "key", (0,)) for _ in range(10_000))
    time = Time()
    calls = 0

    def busy(_: int) -> None:
        nonlocal calls
        calls += 1
        raise AskedError

    def sleep(_: float) -> None:
        raise KeyboardInterrupt

    batch = run_batch(Immediate(), busy, source, retries=1, window=2, clock=time.clock, wall=time.clock, sleep=sleep)
    with pytest.raises(KeyboardInterrupt):
        next(batch)
    assert calls == next(pulled)
    assert calls <= 2 * 16 + 2


def test_input_is_pulled_no_faster_than_the_window() -> None:
    pulled = 0

    def endless() -> Iterator[Job]:
        nonlocal pulled
        for pulled in itertools.count(1):
            yield Job(pulled, "key", (pulled,))

    batch = run_batch(Immediate(), double, endless(), window=3)
    for taken in range(1, 20):
        next(batch)
        assert pulled <= taken + 3
    batch.close()


def test_the_default_window_is_a_few_per_worker() -> None:
    executor = Held()
    batch = run_batch(executor, double, jobs(100))
    consumer = threading.Thread(target=next, args=(batch,))
    consumer.start()
    while len(executor.futures) < JOBS_PER_WORKER * 2:
        threading.Event().wait(0.001)
    executor.futures[0].set_result((0, 0.1, 4711))
    consumer.join(30)
    assert len(executor.futures) == JOBS_PER_WORKER * 2
    batch.close()
    assert [future.cancelled() for future in executor.futures[1:]] == [True] * 7


def test_the_default_window_grows_while_the_workers_run_dry() -> None:
    pulled = 0

    def endless() -> Iterator[Job]:
        nonlocal pulled
        for pulled in itertools.count(1):
            yield Job(pulled, "key", (pulled,))

    batch = run_batch(Immediate(), double, endless())
    ahead = []
    for taken in range(1, 200):
        next(batch)
        ahead.append(pulled - taken)
    batch.close()
    assert ahead[0] < JOBS_PER_WORKER
    assert max(ahead) == 31, "with the one that was taken it makes 32"


@pytest.mark.slow
def test_the_default_window_stays_small_where_results_are_large() -> None:
    """A writer that is slower than the workers would have 32 of them a worker to keep in memory."""
    pulled = 0

    def endless() -> Iterator[Job]:
        nonlocal pulled
        for pulled in itertools.count(1):
            yield Job(pulled, "key", (100_000,))

    with AuthenticatedProcessPool(lambda: {"access_token": "invented", "expires_in": 3600}, 1) as pool:
        batch = run_batch(pool, bytes, endless())
        ahead = []
        for taken in range(1, 50):
            next(batch)
            newest = batch._newest
            assert newest is not None
            until(newest.done)  # the workers have run dry
            ahead.append(pulled - taken)
        batch.close()
    assert max(ahead) < JOBS_PER_WORKER


def test_what_was_put_off_can_be_done_before_each_wait() -> None:
    executor, taken, waits = Queued(), 0, []

    def end_two() -> None:
        waits.append(taken)
        for number in (taken, taken + 1):
            executor.begin(number)
            executor.end(number)

    for _ in run_batch(executor, double, jobs(6), window=6, before_wait=end_two):
        taken += 1
    assert waits == [0, 2, 4], "not while a result was at hand"


def test_results_come_as_they_finish() -> None:
    gate = threading.Event()

    def wait_or_open(number: int) -> int:
        if number == 0:
            assert gate.wait(30)
        elif number == 5:
            gate.set()
        return number

    with ThreadPoolExecutor(2) as executor:
        order = [result.index for result in run_batch(executor, wait_or_open, jobs(6))]
    assert sorted(order) == list(range(6))
    assert order.index(0) > order.index(4)


def test_closing_cancels_what_has_not_begun() -> None:
    begun, release = [], threading.Event()

    def hold(number: int) -> int:
        begun.append(number)
        if number:
            release.wait(10)
        return number

    with ThreadPoolExecutor(1) as executor:
        batch = run_batch(executor, hold, jobs(100), window=50)
        assert next(batch).index == 0
        batch.close()
        release.set()
    assert len(begun) <= 2


def test_an_interruption_inside_cancels_too() -> None:
    """What ``iter(jobs)`` or ``submit`` raises ends the batch and leaves nothing queued."""
    executor = Held()

    def interrupted() -> Iterator[Job]:
        yield from jobs(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(run_batch(executor, double, interrupted()))
    assert all(future.cancelled() for future in executor.futures)


def test_a_future_cancelled_by_the_executor_is_a_failed_job() -> None:
    [result] = run_batch(Cancelling(), double, jobs(1))
    assert isinstance(result.error, CancelledError)


@pytest.mark.parametrize("wrong", [{"retries": -1}, {"window": 0}])
def test_wrong_bounds_are_refused_at_once(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        run_batch(Immediate(), double, jobs(1), **wrong)  # type: ignore[arg-type]  # spread by name


def test_workers_are_counted_on_any_executor() -> None:
    assert worker_count(Immediate()) == 1
    with ThreadPoolExecutor(3) as executor:
        assert worker_count(executor) == 3


@pytest.mark.slow
def test_processes_time_their_jobs_and_bring_errors_home() -> None:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as executor:
        done = list(run_batch(executor, pow, make_jobs("pow", [((2, 10), {}), ((2,), {"exp": 3})])))
        ticks = itertools.count(0.0, 1000.0)  # a clock of the parent's that runs away
        [failed] = run_batch(executor, int, make_jobs("int", [(("x",), {})]), clock=lambda: next(ticks))
    assert sorted(result.result for result in done) == [8, 1024]
    assert isinstance(failed.error, ValueError)
    assert next(ticks) >= 1000.0, "the clock was looked at"
    assert 0 <= failed.seconds < 1000.0, "measured in the worker, not from the submission on"


class Queued(Held):
    """Run what the test says, as an executor whose workers are slow; the others can be cancelled."""

    def begin(self, number: int) -> None:
        assert self.futures[number].set_running_or_notify_cancel()

    def end(self, number: int) -> None:
        self.futures[number].set_result((number, 0.1, 4711))

    def begin_and_end_first(self, waiting: int, running: int) -> threading.Thread:
        """Once so many wait, begin some of them and end the first."""

        def act() -> None:
            until(lambda: len(self.futures) == waiting)
            for number in range(running):
                self.begin(number)
            self.end(0)

        return later(act)


def later(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call)
    thread.start()
    return thread


def test_a_stop_begins_nothing_new_and_waits_for_what_runs() -> None:
    executor = Queued()
    pulled = jobs(100)
    batch = run_batch(executor, double, pulled, window=4)
    ends = executor.begin_and_end_first(4, 3)
    assert next(batch).index == 0
    ends.join(30)
    batch.stop()
    executor.end(2)
    ends = later(lambda: executor.end(1))
    assert [result.index for result in batch] == [2, 1]
    ends.join(30)
    assert executor.futures[3].cancelled()
    assert len(executor.futures) == 4
    assert next(pulled).index == 4, "nothing more was pulled"


def test_a_stop_before_the_first_job_runs_none() -> None:
    executor = Held()
    batch = run_batch(executor, double, jobs(3))
    before = batch.is_stopping
    batch.stop()
    assert (before, batch.is_stopping) == (False, True)
    assert list(batch) == []
    assert executor.futures == []


def test_a_stop_at_once_waits_for_nothing_and_keeps_what_has_ended() -> None:
    executor = Queued()
    batch = run_batch(executor, double, jobs(100), window=4)
    ends = executor.begin_and_end_first(4, 3)
    assert next(batch).index == 0
    ends.join(30)
    executor.end(2)
    batch.stop(0.0)
    assert [result.index for result in batch] == [2]
    assert executor.futures[3].cancelled()
    assert not executor.futures[1].done(), "it runs, and is the executor's to end"


def test_a_stop_within_a_time_takes_what_ends_in_it() -> None:
    executor = Queued()
    now = 0.0
    batch = run_batch(executor, double, jobs(3), window=3, clock=lambda: now)
    ends = executor.begin_and_end_first(3, 3)
    assert next(batch).index == 0
    ends.join(30)
    batch.stop(600.0)
    ends = later(lambda: executor.end(1))
    assert next(batch).index == 1
    ends.join(30)
    now = 600.0
    assert list(batch) == []


def test_a_second_stop_may_only_shorten_the_first() -> None:
    executor = Queued()
    now = 0.0
    batch = run_batch(executor, double, jobs(2), window=2, clock=lambda: now)
    ends = executor.begin_and_end_first(2, 2)
    assert next(batch).index == 0
    ends.join(30)
    batch.stop(0.0)
    batch.stop()
    assert list(batch) == []


def test_another_thread_may_stop_a_batch_that_waits_for_results() -> None:
    executor = Queued()
    batch = run_batch(executor, double, jobs(2))

    def stop() -> None:
        until(lambda: len(executor.futures) == 2)
        executor.begin(0)
        batch.stop(0.0)

    stopping = later(stop)
    assert list(batch) == []
    stopping.join(30)
    assert executor.futures[1].cancelled()


def test_a_signal_handler_may_stop_a_batch_that_waits_for_results() -> None:
    executor = Queued()
    batch = run_batch(executor, double, jobs(2))
    former = signal.signal(signal.SIGUSR1, lambda *_: batch.stop(0.0))

    def send() -> None:
        until(lambda: len(executor.futures) == 2)
        executor.begin(0)
        os.kill(os.getpid(), signal.SIGUSR1)

    try:
        sending = later(send)
        assert list(batch) == []
        sending.join(30)
    finally:
        signal.signal(signal.SIGUSR1, former)


def test_a_stop_while_only_retries_wait_ends_without_them() -> None:
    time = Time()
    calls = 0

    def busy(_: int) -> None:
        nonlocal calls
        calls += 1
        raise AskedError

    def sleep(seconds: float) -> None:
        time.sleep(seconds)
        if time.now > 3.0:
            batch.stop()

    batch = run_batch(Immediate(), busy, jobs(1), retries=5, clock=time.clock, wall=time.clock, sleep=sleep)
    assert list(batch) == []
    assert calls == 1
    assert max(time.slept) <= 0.2, "a stop is heard soon"


def test_a_failure_after_a_stop_is_final() -> None:
    """Its next attempt will not come, so this is what became of it."""
    executor = Queued()
    batch = run_batch(executor, double, jobs(2), retries=5, window=2)
    ends = executor.begin_and_end_first(2, 2)
    assert next(batch).index == 0
    ends.join(30)
    batch.stop()
    fails = later(lambda: executor.futures[1].set_exception(AskedError("busy")))
    [result] = batch
    fails.join(30)
    assert (result.index, result.status, result.attempts) == (1, "failed", 1)


def test_a_job_that_is_read_while_the_stop_comes_is_not_begun() -> None:
    executor = Held()

    def source() -> Iterator[Job]:
        for job in jobs(3):
            if job.index == 1:
                batch.stop(0.0)
            yield job

    batch = run_batch(executor, double, source())
    assert list(batch) == []
    assert len(executor.futures) == 1
    assert executor.futures[0].cancelled()


def test_an_error_tells_of_the_attempts_before_it() -> None:
    errors = iter([ConnectionError("reset"), TimeoutError("slow"), ValueError("bad tile")])

    def fails(_: int) -> None:
        raise next(errors)

    [result] = run(fails, 1, retries=5)
    assert (result.status, result.attempts) == ("failed", 3)
    assert notes_of(result.error) == ["after attempt 1: ConnectionError: reset; attempt 2: TimeoutError: slow"]


def test_an_error_of_the_first_attempt_has_nothing_to_tell() -> None:
    [result] = run(fail, 1, retries=5)
    assert notes_of(result.error) == []


def notes_of(error: BaseException | None) -> list[str]:
    return list(getattr(error, "__notes__", []))


def test_only_what_a_worker_has_taken_is_said_to_have_begun() -> None:
    free = threading.Event()
    begun: list[int] = []

    def note(job: Job) -> None:
        begun.append(job.index)
        free.set()

    with ThreadPoolExecutor(1) as executor:
        batch = run_batch(
            executor, lambda _: free.wait(PATIENCE), make_jobs("f", (((n,), {}) for n in range(4))), begun=note
        )
        assert next(batch).index == 0
        assert begun == [0], "the others waited for the worker"
        assert len(list(batch)) == 3


def test_what_is_over_before_anybody_looked_is_not_said_to_have_begun() -> None:
    begun: list[Job] = []
    assert len(list(run_batch(Immediate(), abs, make_jobs("f", [((1,), {})]), begun=begun.append))) == 1
    assert begun == []


def session_at(server: LoopbackServer) -> OAuthSession:
    return OAuthSession(server.token_url, server.client_id, server.client_secret)


@pytest.mark.slow
def test_a_pool_pickles_the_function_of_a_batch_once(server: LoopbackServer) -> None:
    fn = CountedPickles()
    with AuthenticatedProcessPool(session_at(server), 1) as pool:
        results = list(run_batch(pool, fn, make_jobs("abs", (((-n,), {}) for n in range(20)))))
    assert sorted(result.result for result in results) == list(range(20))
    assert fn.pickles == 1


def test_a_batch_on_a_pool_that_has_ended_is_refused(server: LoopbackServer) -> None:
    pool = AuthenticatedProcessPool(session_at(server), engine="inline")
    with pool:
        batch = run_batch(pool, abs, make_jobs("abs", (((-n,), {}) for n in itertools.count())))
        assert next(batch).result == 0
    with pytest.raises(RuntimeError, match="after shutdown"):
        list(batch)


def test_a_stop_that_interrupts_another_is_heard_wherever_it_does() -> None:
    """As ^C does while the time of --max-time is up: that one waits for ever, this one for nothing."""

    def ends_where_interrupted(step: int) -> bool:
        held = Held()
        more: list[bool] = []

        def jobs() -> Iterator[Job]:
            yield Job(0, "key")
            held.futures[0].set_running_or_notify_cancel()  # it never ends
            more.append(interrupted(batch.stop, step, lambda: batch.stop(within=0.0)))
            if not more[0]:  # it was not interrupted
                batch.stop(within=0.0)

        batch = run_batch(held, print, jobs())
        assert in_time(list, batch) == []
        return more[0]

    assert sum(1 for _ in itertools.takewhile(ends_where_interrupted, itertools.count())) > 0
