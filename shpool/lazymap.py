"""``map`` over an engine: lazy, bounded, and in batches sized by what tasks were measured to take.

Items are pulled while fewer than the window's are under way or waiting for the consumer, so an infinite generator
is welcome and a consumer that sleeps stops the input. A batch grows as long as its tasks prove to be tiny; what a
lost worker leaves unanswered runs again one by one, so that a task which kills its worker takes nobody along. Where no
order is kept, an item that waits for its next attempt does so beside the window, within a bound of its own.
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

from shpool.engines.base import BatchResult, Engine, Task
from shpool.engines.slot import Slot
from shpool.errors import UnpicklableError
from shpool.mapsizes import BATCH_SIZE, BatchSizer
from shpool.retry import summary_of
from shpool.waiting import get_in_glances

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator
    from concurrent.futures import Future

    from shpool.mapsizes import MapOptions

_BATCHES_PER_WORKER = 2  # one running and one at hand
_MOST_SINGLES = 256  # items a worker under way where each is a message, if fewer starve it
_ASIDE = 4  # times the window's items: so many may wait beside it for their next attempts, and _MOST_SINGLES a worker
_ASIDE_SIZE = 2 * BATCH_SIZE  # bytes a worker of these


@dataclass(eq=False)  # comparing batches would compare the user's items
class _Batch:
    items: list[Any]
    future: Slot
    is_lone: bool = False  # one item, whose result the future has
    is_taken: bool = False  # its results are handed out, where no order is kept


class LazyMap:
    """One call of ``map``: pulls, submits, and hands out."""

    def __init__(
        self, engine: Engine, fn: Callable[..., Any], iterables: tuple[Iterable[Any], ...], options: MapOptions
    ) -> None:
        self._engine = engine
        self._fn = engine.prepare(fn, serves_many=True)
        self._label = getattr(fn, "__qualname__", None) or type(fn).__name__
        self._star = len(iterables) != 1
        self._items: Iterator[Any] = zip(*iterables) if self._star else iter(iterables[0])  # noqa: B905 - as builtin map: the shortest ends it
        self._options = options
        self._give_up = math.inf if options.timeout is None else time.monotonic() + options.timeout
        expected = [operator.length_hint(iterable, -1) for iterable in iterables]
        workers = max(1, engine.workers)  # on a cluster there may be some later
        self._sizer = BatchSizer(
            workers,
            1 if options.goes_singly else options.chunksize,
            min(expected) if min(expected) >= 0 else None,
            engine.largest_batch,
        )
        self._batches_at_most = max(workers * _BATCHES_PER_WORKER + 1, 2)
        self._batches_ever = self._batches_at_most
        if options.goes_singly:
            self._batches_at_most, self._batches_ever = engine.singles * workers, _MOST_SINGLES * workers
        self._under_way: deque[_Batch] = deque()
        self._again: set[_Batch] = set()  # lone items that run again, where no order is kept: nothing waits for them
        self._aside_at_most, self._aside_size = _MOST_SINGLES * workers, _ASIDE_SIZE * workers
        self._pulled = 0
        self._held = 0  # items pulled and not yet handed out
        self._input_error: BaseException | None = None
        self._is_exhausted = False
        self._told: queue.SimpleQueue[_Batch] = queue.SimpleQueue()  # what has landed, or waits for another attempt
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
                yield from self._results_of(batch, self._mend)
                self._under_way.popleft()
                self._held -= len(batch.items)
                self._fill()
            self._raise_input_error()
        finally:
            self._abandon_rest()

    def _as_completed(self) -> Iterator[Any]:
        for batch in self._under_way:
            self._announce(batch)
        try:
            yield None
            while self._under_way or self._again:
                batch = self._next_told()
                if not batch.future.done():
                    self._set_aside(batch)
                elif not batch.is_taken:  # else it was told of twice, as put off and as landed
                    batch.is_taken = True
                    (self._again if batch in self._again else self._under_way).remove(batch)
                    yield from self._results_of(batch, self._hand_out)
                    self._held -= len(batch.items)
                for new in self._fill():
                    self._announce(new)
            self._raise_input_error()
        finally:
            self._abandon_rest()

    def _fill(self) -> list[_Batch]:
        """Pull and submit as much as the window allows; return the new batches."""
        new = []
        if self._under_way and self._batches_at_most < self._batches_ever and self._under_way[-1].future.done():
            self._batches_at_most = min(self._batches_at_most * 2, self._batches_ever)  # the workers ran dry
        at_most = self._batches_at_most - (self._places_kept() if self._again else 0)
        while not self._is_exhausted and len(self._under_way) < at_most:
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

    def _places_kept(self) -> int:
        """Return how many of the items that run again count as under way: what is more than may wait beside that."""
        most = min(_ASIDE * self._batches_at_most * self._sizer.size, self._aside_at_most)
        if len(self._again) - most >= self._batches_at_most:
            return len(self._again) - most  # and no need to look at each
        fitting, room = 0, self._aside_size
        for batch in self._again:
            if batch.future.size <= room:  # one that is too large by itself takes nobody's place but its own
                room -= batch.future.size
                fitting += 1
        return len(self._again) - min(fitting, most)

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
            return _Batch(items, self._submit_one(items[0]), is_lone=True)
        brief = self._sizer.is_brief(len(items))
        task = Task(self._fn, items, label=self._label, batch=True, star=self._star, brief=brief)
        slot = Slot()
        self._engine.submit(task, slot)
        return _Batch(items, slot)

    def _submit_one(self, item: Any, failed: BaseException | None = None, delay: float = 0.0) -> Slot:  # noqa: ANN401 - the user's own items
        """Submit an item by itself; again, after so many seconds, when it has failed in its batch."""
        args = item if self._star else (item,)
        history = () if failed is None else (summary_of(failed, 1),)
        slot = Slot()
        self._engine.submit(
            Task(
                self._fn,
                args,
                label=self._label,
                policy=self._options.policy,
                timeout=self._options.task_timeout,
                history=history,
                delay=delay,
            ),
            slot,
        )
        return slot

    def _results_of(self, batch: _Batch, mend: Callable[[list[Any], BatchResult], Iterator[Any]]) -> Iterable[Any]:
        """Return a batch's results, mended if something failed or went unanswered.

        A tuple or list where it can be: a generator more between it and the consumer costs 8 % of a map of no-ops.
        """
        if batch.is_lone:
            return (self._wait(batch.future),)
        try:
            outcome: BatchResult = self._wait(batch.future)
        except UnpicklableError:
            if len(batch.items) == 1:
                raise
            outcome = BatchResult([], {}, 0.0)  # one item spoils the batch; alone, each answers for itself
        # Not of what failed, which says nothing of what a batch would take: a refusal comes at once.
        self._sizer.note(len(outcome.results) - len(outcome.errors), outcome.seconds, outcome.size)
        if not outcome.errors and len(outcome.results) == len(batch.items):
            return outcome.results
        return mend(batch.items, outcome)

    def _run_again(self, items: list[Any], outcome: BatchResult) -> tuple[dict[int, Slot], dict[int, Any]]:
        """Run what failed retryably or went unanswered again, item by item; return that, and the errors that stay."""
        again: dict[int, Slot] = {}
        failed: dict[int, BaseException] = dict(outcome.errors)
        if outcome.lost is not None and len(items) == 1:
            failed[0] = outcome.lost
        for index, error in list(failed.items()):
            delay = self._options.policy.wait_before_retry(error, 1, time.time())
            if delay is not None:
                again[index] = self._submit_one(items[index], failed.pop(index), delay)
        for index in range(len(outcome.results), len(items)):
            if index not in again and index not in failed:
                again[index] = self._submit_one(items[index])
        return again, failed

    def _mend(self, items: list[Any], outcome: BatchResult) -> Iterator[Any]:
        """Yield the results in the order of the items."""
        again, failed = self._run_again(items, outcome)
        try:
            for index in range(len(items)):
                if index in again:
                    result = self._wait(again[index])  # not taken out yet: as in _in_order()
                    del again[index]
                    yield result
                elif index in failed:
                    raise failed[index]
                else:
                    yield outcome.results[index]
        finally:
            self._abandon(again.values())

    def _hand_out(self, items: list[Any], outcome: BatchResult) -> Iterator[Any]:
        """Yield what there is; what runs again lands by itself."""
        again, failed = self._run_again(items, outcome)
        for index, future in again.items():
            batch = _Batch([items[index]], future, is_lone=True)
            self._held += 1
            self._again.add(batch)
            self._announce(batch)
        for index, result in enumerate(outcome.results):
            if index not in again and index not in failed:
                yield result
        for error in failed.values():
            raise error

    def _wait(self, future: Future[Any]) -> Any:  # noqa: ANN401 - the user's own results
        if self._give_up == math.inf:
            return future.result()
        try:
            return future.result(max(0.0, self._give_up - time.monotonic()))
        except futures.TimeoutError:  # before Python 3.11 not the built-in one
            if future.done():
                raise  # the task's own
            raise TimeoutError from None

    def _set_aside(self, batch: _Batch) -> None:
        """Let a lone item that waits for its next attempt no longer count as under way."""
        if batch not in self._again:
            self._under_way.remove(batch)
            self._again.add(batch)

    def _next_told(self) -> _Batch:
        try:
            # What has landed in time is handed out, however late the consumer comes for it.
            left = None if self._give_up == math.inf else max(0.0, self._give_up - time.monotonic())
            return get_in_glances(self._told, left)
        except queue.Empty:
            raise TimeoutError from None

    def _announce(self, batch: _Batch) -> None:
        batch.future.watch(lambda _: self._told.put(batch))

    def _raise_input_error(self) -> None:
        if self._input_error is not None:
            raise self._input_error

    def _abandon_rest(self) -> None:
        self._abandon([batch.future for batch in (*self._under_way, *self._again)])

    def _abandon(self, slots: Collection[Slot]) -> None:
        """Give up what nobody wants any more; what runs may end, and that is all."""
        for slot in slots:
            slot.abandon()
        if slots:
            self._engine.drop_abandoned()


def _begun(results: Iterator[Any]) -> Iterator[Any]:
    """Return the generator past its first yield: one that was never begun would not clean up when it is closed."""
    next(results)
    return results
