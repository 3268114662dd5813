"""``map`` over an engine: lazy, bounded, and in batches sized by what tasks were measured to take.

Items are pulled while fewer than the window's are under way or waiting for the consumer, so an infinite generator
is welcome and a consumer that sleeps stops the input. A batch grows as long as its tasks prove to be tiny; what a
lost worker leaves unanswered runs again one by one, so that a task which kills its worker takes nobody along.
"""

from __future__ import annotations

import itertools
import math
import operator
import queue
import time
from collections import deque
from concurrent import futures
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shpool.engines.base import NO_RETRIES, BatchResult, Engine, Task
from shpool.engines.slot import Slot
from shpool.errors import UnpicklableError
from shpool.retry import summary_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from concurrent.futures import Future

    from shpool.retry import RetryPolicy

BATCH_SECONDS = 0.03  # what a batch should take: long against a message, short against a person's patience
BATCH_SIZE = 2**20  # bytes a batch and its results should come to: larger ones arrive late and then all at once
LARGEST_BATCH = 32_768  # items; beyond it batches cost memory and gain nothing
_GROWTH = 8  # times; one batch of tiny tasks says little about the next
_BATCHES_PER_WORKER = 2  # one running and one at hand
_MOST_SINGLES = 256  # items a worker under way where each is a message, if fewer starve it
_END_GAME = 3  # batches each worker should still get of what is known to be left


@dataclass(frozen=True)
class MapOptions:
    """How a map runs.

    Attributes:
        chunksize: Items a batch; None adapts.
        buffersize: Most items pulled and not yet handed out; None for two batches a worker and one.
        timeout: Seconds from the call within which each result must have come; None for no limit.
        policy: How many more attempts which errors of an item are worth.
        task_timeout: Seconds one attempt of one item may take.
    """

    chunksize: int | None = None
    buffersize: int | None = None
    timeout: float | None = None
    policy: RetryPolicy = NO_RETRIES
    task_timeout: float | None = None

    def __post_init__(self) -> None:
        limit = self.timeout
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, (int, float)) or math.isnan(limit)):
            msg = f"timeout must be a number of seconds or None, not {limit!r}"
            raise ValueError(msg)
        for name in ("chunksize", "buffersize"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                msg = f"{name} must be an integer >= 1 or None, not {value!r}"
                raise ValueError(msg)

    @property
    def goes_singly(self) -> bool:
        """Tell whether each item must be a message of its own: a timeout or a crash then hits just one."""
        return self.chunksize == 1 or self.task_timeout is not None


class BatchSizer:
    """Decide how many items the next batch takes."""

    def __init__(self, workers: int, chunksize: int | None, expected: int | None, most: int | None = None) -> None:
        self._workers = workers
        self._most = min(most or LARGEST_BATCH, LARGEST_BATCH)
        self._fixed = chunksize if chunksize is None or most is None else min(chunksize, most)
        self._expected = expected
        self._size = 1
        self._seconds_per_item: float | None = None

    def next_size(self, pulled: int) -> int:
        """Return the size of the next batch, after so many items were pulled."""
        if self._fixed is not None:
            return self._fixed
        if self._expected is None:
            return self._size
        left = max(self._expected - pulled, 1)
        return max(1, min(self._size, math.ceil(left / (self._workers * _END_GAME))))

    def is_brief(self, items: int) -> bool:
        """Tell whether so many items should not take much longer than a batch is meant to."""
        return self._seconds_per_item is not None and items * self._seconds_per_item <= 2 * BATCH_SECONDS

    def note(self, items: int, seconds: float, size: int = 0) -> None:
        """Learn from a batch that took so long, and so many bytes both ways."""
        if not items:
            return
        measured = seconds / items
        known = self._seconds_per_item
        self._seconds_per_item = measured if known is None else (known + measured) / 2
        wanted = int(BATCH_SECONDS / max(self._seconds_per_item, 1e-9))
        fitting = int(BATCH_SIZE / max(size / items, 1.0))
        self._size = max(1, min(wanted, fitting, items * _GROWTH, self._most))


@dataclass(eq=False)  # comparing batches would compare the user's items
class _Batch:
    items: list[Any]
    future: Future[Any]


class LazyMap:
    """One call of ``map``: pulls, submits, and hands out."""

    def __init__(
        self, engine: Engine, fn: Callable[..., Any], iterables: tuple[Iterable[Any], ...], options: MapOptions
    ) -> None:
        self._engine = engine
        self._fn = engine.prepare(fn)
        self._label = getattr(fn, "__qualname__", None) or type(fn).__name__
        self._star = len(iterables) != 1
        self._items: Iterator[Any] = zip(*iterables) if self._star else iter(iterables[0])  # noqa: B905 - as builtin map: the shortest ends it
        self._options = options
        self._give_up = math.inf if options.timeout is None else time.monotonic() + options.timeout
        expected = [operator.length_hint(iterable, -1) for iterable in iterables]
        self._sizer = BatchSizer(
            engine.workers,
            1 if options.goes_singly else options.chunksize,
            min(expected) if min(expected) >= 0 else None,
            engine.largest_batch,
        )
        self._batches_at_most = max(engine.workers * _BATCHES_PER_WORKER + 1, 2)
        self._batches_ever = self._batches_at_most
        if options.goes_singly:
            self._batches_at_most, self._batches_ever = engine.singles * engine.workers, _MOST_SINGLES * engine.workers
        self._under_way: deque[_Batch] = deque()
        self._pulled = 0
        self._held = 0  # items pulled and not yet handed out
        self._input_error: BaseException | None = None
        self._is_exhausted = False
        self._landed: queue.SimpleQueue[_Batch] = queue.SimpleQueue()
        self._fill()

    def in_order(self) -> Iterator[Any]:
        """Yield the results in the order of the items."""
        return _begun(self._in_order())

    def as_completed(self) -> Iterator[Any]:
        """Yield the results as they come."""
        return _begun(self._as_completed())

    def _in_order(self) -> Iterator[Any]:
        try:
            yield None
            while self._under_way:
                batch = self._under_way[0]  # not taken out yet: it too is cancelled when the wait for it is given up
                yield from self._results_of(batch)
                self._under_way.popleft()
                self._held -= len(batch.items)
                self._fill()
            self._raise_input_error()
        finally:
            self._cancel_rest()

    def _as_completed(self) -> Iterator[Any]:
        for batch in self._under_way:
            self._announce(batch)
        try:
            yield None
            while self._under_way:
                batch = self._next_landed()
                self._under_way.remove(batch)
                yield from self._results_of(batch)
                self._held -= len(batch.items)
                for new in self._fill():
                    self._announce(new)
            self._raise_input_error()
        finally:
            self._cancel_rest()

    def _fill(self) -> list[_Batch]:
        """Pull and submit as much as the window allows; return the new batches."""
        new = []
        if self._under_way and self._batches_at_most < self._batches_ever and self._under_way[-1].future.done():
            self._batches_at_most = min(self._batches_at_most * 2, self._batches_ever)  # the workers ran dry
        while not self._is_exhausted and len(self._under_way) < self._batches_at_most:
            size = self._sizer.next_size(self._pulled)
            if self._options.buffersize is not None:
                size = min(size, self._options.buffersize - self._held)
            if size < 1:
                break
            items = self._pull(size)
            if items:
                new.append(self._submit(items))
                self._under_way.append(new[-1])
        return new

    def _pull(self, size: int) -> list[Any]:
        items: list[Any] = []
        try:
            items.extend(itertools.islice(self._items, size))
        except Exception as exc:  # noqa: BLE001 - raised where the consumer has taken what came before it
            self._input_error = exc
        if len(items) < size:
            self._is_exhausted = True
        self._pulled += len(items)
        self._held += len(items)
        return items

    def _submit(self, items: list[Any]) -> _Batch:
        if self._options.goes_singly:
            return _Batch(items, self._submit_one(items[0]))
        brief = self._sizer.is_brief(len(items))
        task = Task(self._fn, items, label=self._label, batch=True, star=self._star, brief=brief)
        return _Batch(items, self._engine.submit(task, Slot()))

    def _submit_one(self, item: Any, failed: BaseException | None = None, delay: float = 0.0) -> Future[Any]:  # noqa: ANN401 - the user's own items
        """Submit an item by itself; again, after so many seconds, when it has failed in its batch."""
        args = item if self._star else (item,)
        history = () if failed is None else (summary_of(failed, 1),)
        return self._engine.submit(
            Task(
                self._fn,
                args,
                label=self._label,
                policy=self._options.policy,
                timeout=self._options.task_timeout,
                history=history,
                delay=delay,
            ),
            Slot(),
        )

    def _results_of(self, batch: _Batch) -> Iterator[Any]:
        """Yield a batch's results; what failed retryably or went unanswered runs again, item by item."""
        if self._options.goes_singly:
            yield self._wait(batch.future)
            return
        try:
            outcome: BatchResult = self._wait(batch.future)
        except UnpicklableError:
            if len(batch.items) == 1:
                raise
            outcome = BatchResult([], {}, 0.0)  # one item spoils the batch; alone, each answers for itself
        self._sizer.note(len(outcome.results), outcome.seconds, outcome.size)
        if not outcome.errors and len(outcome.results) == len(batch.items):
            yield from outcome.results
        else:
            yield from self._mend(batch.items, outcome)

    def _mend(self, items: list[Any], outcome: BatchResult) -> Iterator[Any]:
        again: dict[int, Future[Any]] = {}
        failed = dict(outcome.errors)
        if outcome.lost is not None and len(items) == 1:
            failed[0] = outcome.lost
        for index, error in failed.items():
            delay = self._options.policy.wait_before_retry(error, 1, time.time())
            if delay is not None:
                again[index] = self._submit_one(items[index], error, delay)
        for index in range(len(outcome.results), len(items)):
            if index not in failed:
                again[index] = self._submit_one(items[index])
        try:
            for index in range(len(items)):
                if index in again:
                    yield self._wait(again.pop(index))
                elif index in failed:
                    raise failed[index]
                else:
                    yield outcome.results[index]
        finally:
            for future in again.values():
                future.cancel()

    def _wait(self, future: Future[Any]) -> Any:  # noqa: ANN401 - the user's own results
        if self._give_up == math.inf:
            return future.result()
        try:
            return future.result(max(0.0, self._give_up - time.monotonic()))
        except futures.TimeoutError:  # before Python 3.11 not the built-in one
            if future.done():
                raise  # the task's own
            raise TimeoutError from None

    def _next_landed(self) -> _Batch:
        try:
            return self._landed.get(timeout=None if self._give_up == math.inf else self._give_up - time.monotonic())
        except (queue.Empty, ValueError):
            raise TimeoutError from None

    def _announce(self, batch: _Batch) -> None:
        batch.future.add_done_callback(lambda _: self._landed.put(batch))

    def _raise_input_error(self) -> None:
        if self._input_error is not None:
            raise self._input_error

    def _cancel_rest(self) -> None:
        for batch in self._under_way:
            batch.future.cancel()


def _begun(results: Iterator[Any]) -> Iterator[Any]:
    """Return the generator past its first yield: one that was never begun would not clean up when it is closed."""
    next(results)
    return results
