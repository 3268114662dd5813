from __future__ import annotations

import collections
import itertools
import threading
import time
from concurrent.futures import CancelledError, Future
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import pytest

from shpool.channels import BoardChannel
from shpool.engines.base import BatchResult, Tally, Task
from shpool.engines.slot import Slot
from shpool.errors import UnpicklableError, WorkerLostError
from shpool.lazymap import LazyMap
from shpool.mapsizes import LARGEST_BATCH, MapOptions
from shpool.retry import RetryPolicy
from shpool.worker import call_each, load_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shpool.channels import TokenChannel


class HeldEngine:
    """Keep tasks until a test lets them run; record what was submitted."""

    has_ended = False
    failure = None
    largest_batch: int | None = None
    singles: int = 4
    hears = False

    def __init__(self, workers: int = 2, seconds_per_item: float = 1.0) -> None:
        self.workers = workers
        self.tally = Tally()
        self.on_refused: Callable[[int], None] = lambda _: None
        self.on_end: Callable[[], None] = lambda: None
        self.tasks: list[tuple[Task, Future[Any]]] = []
        self.seconds_per_item = seconds_per_item
        self.runs_at_once = False
        self.drops = 0  # how often it was told that there may be something to drop
        self.loses: list[set[Any]] = []  # for each submission, what it may not contain without losing its worker

    @property
    def channel(self) -> TokenChannel:
        return BoardChannel.__new__(BoardChannel)

    def terminate(self, future: Future[Any]) -> bool:
        return not future.done()

    def recall(self, future: Future[Any]) -> None:
        pass

    @property
    def backlog(self) -> int:
        return sum(not future.done() for _, future in self.tasks)

    def start(self) -> None:
        pass

    def prepare(self, fn: Callable[..., Any], *, serves_many: bool = False) -> Callable[..., Any]:
        return fn

    def submit(self, task: Task, future: Future[Any] | None = None) -> Future[Any]:
        future = Future() if future is None else future
        self.tasks.append((task, future))
        if self.runs_at_once:
            self.run(len(self.tasks) - 1)
        return future

    def drop_abandoned(self) -> None:
        self.drops += 1

    def shutdown(self, *, cancel: bool = False, kill: bool = False) -> None:
        pass

    def join(self, timeout: float | None = None) -> bool:
        return True

    def run(self, index: int) -> None:
        """Do one task and settle its future."""
        task, future = self.tasks[index]
        if not future.set_running_or_notify_cancel():
            return
        is_lost = bool(self.loses) and bool(self.loses.pop(0) & set(task.args))
        if task.batch and is_lost:
            future.set_result(BatchResult([], {}, 0.0, lost=WorkerLostError(task.label, 1)))
        elif is_lost:
            future.set_exception(WorkerLostError(task.label, 1))
        elif task.batch:
            results, errors = call_each(task.fn, task.args, star=task.star)
            loaded = {key: load_error(data) for key, data in errors.items()}
            future.set_result(BatchResult(results, loaded, self.seconds_per_item * len(results)))
        else:
            try:
                future.set_result(task.fn(*task.args))
            except Exception as exc:  # noqa: BLE001 - as an engine
                future.set_exception(exc)

    def run_all(self) -> None:
        for index, (_, future) in enumerate(self.tasks):
            if not future.done():
                self.run(index)

    @property
    def slots(self) -> list[Slot]:
        return [future for _, future in self.tasks if isinstance(future, Slot)]

    @property
    def cancelled(self) -> int:
        return sum(future.cancelled() for _, future in self.tasks)


class Source:
    """An iterable that counts what was pulled from it."""

    def __init__(self, items: Iterator[Any]) -> None:
        self._items = items
        self.pulled = 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> object:
        item = next(self._items)
        self.pulled += 1
        return item


def itself(value: Any) -> Any:
    return value


def running_engine(workers: int = 2, seconds_per_item: float = 1.0) -> HeldEngine:
    engine = HeldEngine(workers, seconds_per_item)
    engine.runs_at_once = True
    return engine


def lazy(engine: HeldEngine, fn: Callable[..., Any], *iterables: Any, **options: Any) -> LazyMap:
    policy = RetryPolicy(options.pop("retries", 0))
    return LazyMap(engine, fn, iterables, MapOptions(policy=policy, **options))


def test_results_come_in_the_order_of_the_items() -> None:
    assert list(lazy(running_engine(), lambda number: number * 3, range(100)).in_order()) == list(range(0, 300, 3))


def test_no_items_are_no_results() -> None:
    engine = HeldEngine()
    assert list(lazy(engine, itself, []).in_order()) == []
    assert list(lazy(engine, itself, []).as_completed()) == []
    assert engine.tasks == []


def test_the_shortest_iterable_ends_the_map() -> None:
    results = lazy(running_engine(), lambda first, second: first + second, itertools.count(), [10, 20, 30]).in_order()
    assert list(results) == [10, 21, 32]


@pytest.mark.parametrize("unordered", [False, True])
def test_an_infinite_iterable_is_pulled_as_far_as_it_is_used(*, unordered: bool) -> None:
    source = Source(itertools.count())
    mapped = lazy(running_engine(), itself, source, chunksize=1)
    results = mapped.as_completed() if unordered else mapped.in_order()
    assert sorted(itertools.islice(results, 100)) == list(range(100))
    assert source.pulled <= 100 + 2 * 256


@pytest.mark.parametrize("unordered", [False, True])
@pytest.mark.parametrize("buffersize", [1, 2, 7])
def test_never_more_than_buffersize_items_are_pulled_and_not_handed_out(*, buffersize: int, unordered: bool) -> None:
    source = Source(iter(range(300)))
    mapped = lazy(running_engine(seconds_per_item=1e-6), itself, source, buffersize=buffersize)
    results = mapped.as_completed() if unordered else mapped.in_order()
    handed_out = 0
    assert source.pulled == min(buffersize, 5)  # and no more than two batches a worker and one
    for _ in results:
        assert source.pulled - handed_out <= buffersize
        handed_out += 1
    assert handed_out == 300


def test_a_sleeping_consumer_stops_the_input() -> None:
    """Two batches a worker and one: 1 worker, batches of 10."""
    engine, source = running_engine(workers=1), Source(itertools.count())
    results = lazy(engine, itself, source, chunksize=10).in_order()
    assert source.pulled == 30
    next(results)
    assert source.pulled == 30
    list(itertools.islice(results, 10))
    assert source.pulled == 40


def test_adaptive_batches_stop_for_a_sleeping_consumer_too() -> None:
    engine, source = running_engine(workers=1, seconds_per_item=1e-9), Source(itertools.count())
    results = lazy(engine, itself, source).in_order()
    for number in range(50_000):
        assert next(results) == number
    pulled = source.pulled
    assert pulled - 50_000 <= 3 * LARGEST_BATCH
    next(results)
    assert source.pulled - pulled <= 3 * LARGEST_BATCH


def test_items_before_an_error_of_the_input_have_their_results() -> None:
    def broken() -> Iterator[int]:
        yield from range(7)
        raise OSError("the input broke")

    for chunksize in (None, 1, 3, 100):
        results = lazy(running_engine(), itself, broken(), chunksize=chunksize).in_order()
        assert list(itertools.islice(results, 7)) == list(range(7))
        with pytest.raises(OSError, match="the input broke"):
            next(results)


def test_an_input_that_fails_at_once_gives_its_error_at_the_first_next() -> None:
    broken = (1 // number for number in [0])
    results = lazy(running_engine(), itself, broken).as_completed()
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_an_interrupt_inside_the_input_is_not_kept_waiting() -> None:
    """It is no error of the input: what is under way may take hours."""

    def interrupted() -> Iterator[int]:
        yield from range(6)
        raise KeyboardInterrupt

    engine = HeldEngine(workers=1)
    engine.runs_at_once = True
    results = lazy(engine, itself, interrupted(), chunksize=1, buffersize=2).in_order()
    with pytest.raises(KeyboardInterrupt):
        list(results)


def test_an_error_comes_after_the_results_before_it() -> None:
    def fail_at_5(number: int) -> int:
        if number == 5:
            raise ValueError(number)
        return number

    for chunksize in (None, 1, 4):
        results = lazy(running_engine(), fail_at_5, range(10), chunksize=chunksize).in_order()
        assert list(itertools.islice(results, 5)) == list(range(5))
        with pytest.raises(ValueError, match="5"):
            next(results)
        with pytest.raises(StopIteration):
            next(results)


@pytest.mark.parametrize("unordered", [False, True])
def test_closing_the_iterator_cancels_what_has_not_begun(*, unordered: bool) -> None:
    engine = HeldEngine(workers=2)
    mapped = lazy(engine, itself, itertools.count(), chunksize=1)
    results = mapped.as_completed() if unordered else mapped.in_order()
    engine.run(0)
    next(results)
    results.close()  # type: ignore[attr-defined]  # a generator, as the executors' maps return
    assert engine.cancelled == len(engine.tasks) - 1
    assert engine.drops == 1


@pytest.mark.parametrize("unordered", [False, True])
def test_an_iterator_that_was_never_used_cancels_its_tasks_too(*, unordered: bool) -> None:
    engine = HeldEngine(workers=2)
    mapped = lazy(engine, itself, itertools.count(), chunksize=1)
    results = mapped.as_completed() if unordered else mapped.in_order()
    del results
    assert engine.cancelled == len(engine.tasks) > 0


def test_an_error_cancels_what_has_not_begun() -> None:
    engine = HeldEngine(workers=2)
    results = lazy(engine, lambda _: 1 // 0, itertools.count(), chunksize=1).in_order()
    engine.run(0)
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert engine.cancelled == len(engine.tasks) - 1


@pytest.mark.parametrize("unordered", [False, True])
def test_a_timeout_is_raised_by_the_iterator_and_cancels_the_rest(*, unordered: bool) -> None:
    engine = HeldEngine()
    mapped = lazy(engine, itself, range(5), timeout=0.01)
    with pytest.raises(TimeoutError):
        next(mapped.as_completed() if unordered else mapped.in_order())
    assert engine.cancelled == len(engine.tasks)


def test_what_has_landed_in_time_is_handed_out_after_the_timeout() -> None:
    engine = HeldEngine(1)
    results = lazy(engine, itself, range(3), timeout=0.0, chunksize=1).as_completed()
    for index in range(3):
        engine.run(index)
    assert sorted(results) == [0, 1, 2]


def test_the_timeout_counts_from_the_call() -> None:
    engine = HeldEngine()
    mapped = lazy(engine, itself, range(5), timeout=0.05)
    time.sleep(0.06)
    waits: list[float | None] = []
    first = engine.tasks[0][1]
    first.result = lambda timeout=None: waits.append(timeout) or type(first).result(first, timeout)  # type: ignore[method-assign,func-returns-value]  # notes how long it is waited for
    with pytest.raises(TimeoutError):
        next(mapped.in_order())
    assert waits == [0.0]


def test_a_timeout_error_of_a_task_is_the_tasks_own() -> None:
    def fail(_: int) -> NoReturn:
        raise TimeoutError("the site is slow")

    with pytest.raises(TimeoutError, match="the site is slow"):
        list(lazy(running_engine(), fail, range(3), timeout=10, chunksize=1).in_order())


def test_a_task_timeout_sends_items_one_by_one() -> None:
    engine = HeldEngine()
    lazy(engine, itself, range(100), chunksize=50, task_timeout=1.0, retries=2)
    assert {(task.batch, len(task.args), task.timeout, task.retries) for task, _ in engine.tasks} == {
        (False, 1, 1.0, 2)
    }


def test_unordered_results_come_as_they_are_ready() -> None:
    engine = HeldEngine(workers=2)
    results = lazy(engine, itself, range(5), chunksize=1).as_completed()
    for index in (3, 0, 4):
        engine.run(index)
        assert next(results) == index


def test_unordered_items_that_cannot_be_compared_are_welcome() -> None:
    """Two numpy arrays have no truth value of being equal."""
    engine = HeldEngine(workers=2)
    results = lazy(engine, itself, [np.zeros(3), np.ones(3), np.arange(3)], chunksize=1).as_completed()
    for index in (2, 1, 0):
        engine.run(index)
    assert [array.sum() for array in results] == [3.0, 3.0, 0.0]


def test_stop_iteration_of_the_function_does_not_end_the_map_silently() -> None:
    for chunksize in (None, 1, 3):
        with pytest.raises(RuntimeError, match="StopIteration"):
            list(lazy(running_engine(), lambda _: next(iter(())), range(5), chunksize=chunksize).in_order())


# Batches that came back incomplete


def test_what_a_lost_worker_left_unanswered_runs_again_one_by_one() -> None:
    engine = running_engine()
    engine.loses = [{0, 1, 2, 3}]
    assert list(lazy(engine, itself, range(4), chunksize=4).in_order()) == [0, 1, 2, 3]
    assert [(task.batch, list(task.args)) for task, _ in engine.tasks] == [
        (True, [0, 1, 2, 3]),
        (False, [0]),
        (False, [1]),
        (False, [2]),
        (False, [3]),
    ]


def test_the_item_that_kills_its_worker_is_the_one_that_fails() -> None:
    engine = running_engine()
    engine.loses = [{2}] * 10
    results = lazy(engine, itself, range(4), chunksize=4).in_order()
    assert list(itertools.islice(results, 2)) == [0, 1]
    with pytest.raises(WorkerLostError):
        next(results)


def test_a_lost_batch_of_one_costs_one_of_the_retries() -> None:
    engine = running_engine(workers=1)
    engine.loses = [{0}]
    assert list(lazy(engine, itself, [0], retries=2).in_order()) == [0]
    assert [(task.retries, len(task.history)) for task, _ in engine.tasks] == [(0, 0), (2, 1)]


def test_a_lost_batch_of_one_fails_without_retries() -> None:
    engine = running_engine(workers=1)
    engine.loses = [{0}]
    with pytest.raises(WorkerLostError):
        list(lazy(engine, itself, [0]).in_order())


def test_a_retryable_error_inside_a_batch_runs_again_alone() -> None:
    calls = collections.Counter[int]()

    def flaky(number: int) -> int:
        calls[number] += 1
        if number == 1 and calls[number] == 1:
            raise ConnectionError("reset")
        return number

    engine = running_engine()
    assert list(lazy(engine, flaky, range(3), chunksize=3, retries=1).in_order()) == [0, 1, 2]
    assert calls == {0: 1, 1: 2, 2: 1}


def test_a_programming_error_inside_a_batch_does_not_run_again() -> None:
    calls = collections.Counter[int]()

    def wrong(number: int) -> None:
        calls[number] += 1
        raise KeyError(number)

    with pytest.raises(KeyError):
        list(lazy(running_engine(), wrong, range(3), chunksize=3, retries=5).in_order())
    assert calls == {0: 1, 1: 1, 2: 1}


class UnreadableBatches(HeldEngine):
    """The parent can unpickle no answer of this engine."""

    def run(self, index: int) -> None:
        task, future = self.tasks[index]
        if not task.batch and list(task.args) != [1]:
            super().run(index)
        else:
            future.set_running_or_notify_cancel()
            future.set_exception(UnpicklableError("result", "x", "y"))


def test_one_item_that_cannot_travel_does_not_spoil_its_batch() -> None:
    engine = UnreadableBatches()
    engine.runs_at_once = True
    results = lazy(engine, itself, range(3), chunksize=3).in_order()
    assert next(results) == 0
    with pytest.raises(UnpicklableError):
        next(results)


def test_a_batch_of_one_that_cannot_travel_does_not_run_twice() -> None:
    engine = UnreadableBatches()
    engine.runs_at_once = True
    with pytest.raises(UnpicklableError):
        list(lazy(engine, itself, [1]).in_order())
    assert len(engine.tasks) == 1


def test_a_cancelled_batch_raises() -> None:
    engine = HeldEngine()
    results = lazy(engine, itself, range(3)).in_order()
    engine.tasks[0][1].cancel()
    with pytest.raises(CancelledError):
        next(results)


# The sizer


def test_the_input_is_pulled_in_the_consumers_own_thread() -> None:
    """A generator may hold a database cursor or a file that belongs to one thread."""
    pulling = set()

    def source() -> Iterator[int]:
        for number in range(50):
            pulling.add(threading.current_thread())
            yield number

    list(lazy(running_engine(), itself, source()).as_completed())
    assert pulling == {threading.current_thread()}


def test_an_item_that_failed_in_its_batch_waits_for_its_next_attempt() -> None:
    """As ``Retry-After`` asks, and as one attempt made."""

    class BusyError(ConnectionError):
        retry_after = 7.0

    tried: list[int] = []

    def busy(number: int) -> int:
        tried.append(number)
        if tried == [0, 1]:
            raise BusyError
        return number

    engine = running_engine()
    assert list(lazy(engine, busy, range(3), chunksize=3, retries=2).in_order()) == [0, 1, 2]
    [again] = [task for task, _ in engine.tasks if not task.batch]
    assert again.delay >= 7.0
    assert [line.partition(":")[0] for line in again.history] == ["attempt 1"]
    assert again.retries == 2


class _Held(HeldEngine):
    """Runs batches at once; what runs again waits until a test lets it."""

    def __init__(self, workers: int = 2, seconds_per_item: float = 1.0, size: int = 10) -> None:
        super().__init__(workers, seconds_per_item)
        self.size = size  # bytes of an item

    def submit(self, task: Task, future: Future[Any] | None = None) -> Future[Any]:
        self.runs_at_once = task.batch
        if isinstance(future, Slot) and not task.batch:
            future.put_off(self.size)
        return super().submit(task, future)


def _fail_first(*numbers: int) -> Callable[[int], int]:
    left = set(numbers)

    def fail(number: int) -> int:
        if number in left:
            left.remove(number)
            raise ConnectionError
        return number

    return fail


def test_where_no_order_is_kept_nothing_waits_for_an_item_that_runs_again() -> None:
    """Its next attempt may be minutes away; meanwhile the workers have work, and the consumer results."""
    engine = _Held()
    source = Source(itertools.count())
    results = lazy(engine, _fail_first(1, 4), source, chunksize=3, retries=1).as_completed()
    assert list(itertools.islice(results, 40)) == [0, 2, 3, 5, *range(6, 42)]
    engine.run_all()
    assert set(itertools.islice(results, 40)) >= {1, 4}


def test_what_runs_again_ends_an_unordered_map() -> None:
    """It has landed before the input's end is told."""
    engine = running_engine()
    engine.loses = [set(), {4}]
    results = lazy(engine, _fail_first(1), range(6), chunksize=3, retries=1).as_completed()
    assert sorted(results) == list(range(6))


def _fail_odd(number: int) -> int:
    if number % 2:
        raise ConnectionError
    return number


def _refuse(_: object) -> NoReturn:
    raise ConnectionError


@pytest.mark.parametrize(
    ("workers", "chunksize", "fn", "at_most"),
    [
        (1, 2, _fail_odd, 2 * (4 * 3 * 2 + 3)),  # three batches of two, and of the others four times as many
        (2, None, _refuse, 4 * 5 + 5),  # what is refused at once does not make batches grow
        (1, 1000, _fail_odd, 2 * 256 + 3 * 1000),
    ],
)
def test_items_that_run_again_stop_the_input_when_there_are_too_many(
    workers: int, chunksize: int | None, fn: Callable[[int], int], at_most: int
) -> None:
    """Else an outage would have all of an endless input pulled."""
    engine, source = _Held(workers, seconds_per_item=0.0), Source(itertools.count())
    results = lazy(engine, fn, source, chunksize=chunksize, retries=9, timeout=0.0).as_completed()
    with pytest.raises(TimeoutError):  # all has landed that was submitted, but for what waits
        collections.deque(results, maxlen=0)
    assert at_most * 0.7 < source.pulled <= at_most


def test_large_items_that_run_again_keep_their_places_in_the_window() -> None:
    """A few of 2 MB may wait beside it; an outage must not fill the memory."""
    engine, source = _Held(workers=2, size=2_000_000), Source(itertools.count())
    results = lazy(engine, _refuse, source, retries=9, timeout=0.0).as_completed()
    with pytest.raises(TimeoutError):
        next(results)
    assert source.pulled == 5 + 2


def test_one_large_item_that_runs_again_leaves_the_window_to_the_others() -> None:
    engine = _Held(workers=1, size=2**30)
    results = lazy(engine, _fail_first(1), range(100), chunksize=1 + 1, retries=1).as_completed()
    assert list(itertools.islice(results, 99)) == [0, *range(2, 100)]


def test_an_error_of_an_unordered_batch_comes_after_its_results() -> None:
    """And cancels what was to run again."""
    engine = _Held()

    def wrong(number: int) -> int:
        if number == 1:
            raise KeyError(number)
        if number == 2:
            raise ConnectionError
        return number

    results = lazy(engine, wrong, range(4), chunksize=4, retries=1).as_completed()
    assert [next(results), next(results)] == [0, 3]
    with pytest.raises(KeyError):
        next(results)
    assert engine.cancelled == 1


@pytest.mark.parametrize("options", [{"chunksize": 1}, {"task_timeout": 60.0}])
@pytest.mark.parametrize("is_late", [False, True])
def test_lone_items_that_wait_for_another_attempt_leave_the_window(options: dict[str, Any], *, is_late: bool) -> None:
    """All of the first window do so, be it before its ends are listened to or after."""
    engine = HeldEngine(workers=2)
    mapped = lazy(engine, itself, itertools.count(), retries=1, **options)
    results = mapped.as_completed() if is_late else None
    assert len(engine.slots) == 8
    for slot in engine.slots:
        slot.put_off(10)
    engine.runs_at_once = True
    results = results or mapped.as_completed()
    assert list(itertools.islice(results, 100)) == list(range(8, 108))
    engine.run_all()
    assert set(itertools.islice(results, 1000)) >= set(range(8))  # behind those that had landed before


def test_what_was_put_off_and_has_landed_since_is_handed_out_once() -> None:
    engine = HeldEngine(workers=2)
    results = lazy(engine, itself, range(8), retries=1, chunksize=1).as_completed()
    for slot in engine.slots:
        slot.put_off(10)
        slot.put_off(10)
    engine.run_all()
    assert list(results) == list(range(8))


def test_lone_items_that_wait_stop_the_input_when_there_are_too_many() -> None:
    """As those that have failed in a batch do."""

    class Refusing(HeldEngine):
        def submit(self, task: Task, future: Future[Any] | None = None) -> Future[Any]:
            future = super().submit(task, future)
            self.slots[-1].put_off(10)
            return future

    source = Source(itertools.count())
    results = lazy(Refusing(workers=2), itself, source, retries=1, chunksize=1, timeout=0.0).as_completed()
    with pytest.raises(TimeoutError):
        next(results)
    assert source.pulled == 8 + 4 * 8


def test_an_ordered_map_keeps_what_waits_in_its_window() -> None:
    """Whose results it would have to keep meanwhile."""
    engine, source = HeldEngine(workers=2), Source(itertools.count())
    results = lazy(engine, itself, source, retries=1, chunksize=1, timeout=0.0).in_order()
    for slot in engine.slots:
        slot.put_off(10)
    with pytest.raises(TimeoutError):
        next(results)
    assert source.pulled == 8
