"""Files on their way through an executor: in groups to the workers, and back as results.

Workers of a pool of ours tell each result as it is there; of any other executor they come with the end of their group.
How many files a group has is ``sizing``'s to say. The rules:

 1. Files are pulled as groups finish: two groups a worker are out at most.
 2. What a group whose worker died has not told is tried again, then in halves, until one file is left that kills its
    worker.
 3. A full disk ends the run, once the results of what was under way have come.
 4. Towards the end of an input whose length is known groups shrink, so that all workers are busy until then.
"""

from __future__ import annotations

import math
import queue
import time
from collections import deque
from concurrent.futures import BrokenExecutor, CancelledError, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shpool.batch import worker_count
from shpool.downloads.items import DownloadResult, PlannedItem
from shpool.downloads.sizing import GROUPS_PER_WORKER, GroupSizer
from shpool.errors import StorageFullError, TaskError
from shpool.halting import GiveUp
from shpool.submitting import hears, recall, submit_heard, terminate
from shpool.waiting import get_in_glances

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
    from concurrent.futures import Executor, Future

    from shpool.downloads.fetching import FetchedGroup, FetchGroup, GroupNews

_RECALL_AGAIN = 0.25  # s
_MOMENT = 0.5  # s that files under way get to end once nobody takes results any more
_MOST_TRIES = 2  # of a group whose worker died, before it is split


@dataclass(eq=False)
class _Group:
    """Files in a worker's hands.

    Attributes:
        items: Those of which no result has come, by number.
        tries: How often the group was handed out, this time included.
        told: How many results have come.
        under_way: Bytes that have come of the others.
        is_recalled: What is not begun was asked for, so that another worker has something to do.
    """

    items: dict[int, PlannedItem]
    tries: int = 1
    told: int = 0
    under_way: int = 0
    is_recalled: bool = False


class GroupRun:
    """Fetch files in groups; iterate over it for their results, as they finish.

    Everything happens in the consumer's thread, but for ``stop`` and the queue, which others fill. Closing it, or an
    error inside it, takes back what has not begun.

    Args:
        executor: Any executor; it is not shut down.
        fetch: Called in the workers.
        planned: The files; a result among them, of one that cannot be fetched at all, is handed on. Lazily read.
        count: How many files there are, where that is known.
        limit: How many to fetch at most; those that were there do not count, lest it never gets past them.
        begun: Called with files that a worker tells it has begun, a moment after it has; not with those that are over
            before, nor with those that wait in its group.
    """

    def __init__(  # noqa: PLR0913 - what there is to fetch, how, and where
        self,
        executor: Executor,
        fetch: FetchGroup,
        planned: Iterable[PlannedItem | DownloadResult],
        *,
        count: int | None = None,
        limit: int | None = None,
        begun: Callable[[list[PlannedItem]], None] | None = None,
    ) -> None:
        self._executor = executor
        self._fetch = fetch
        self._planned = iter(planned)
        self._workers = worker_count(executor)
        self._window = GROUPS_PER_WORKER * self._workers
        self._sizer = GroupSizer(fetch.settings.curl.connections, self._workers)
        self._left = math.inf if count is None else count
        self._room = math.inf if limit is None else limit  # for so many more files
        self._is_exhausted = False
        self._give_up = GiveUp()  # set by stop()
        self._next_recall = 0.0
        self._in_flight: dict[Future[Any], _Group] = {}
        self._begun = begun
        self._again: deque[_Group] = deque()
        self._returned: deque[PlannedItem] = deque()  # by workers that had not begun them
        # Futures that are over, what groups tell before that, and None: look again.
        self._news: queue.SimpleQueue[Future[Any] | tuple[_Group, GroupNews] | None] = queue.SimpleQueue()
        self._full: StorageFullError | None = None
        self._results = self._run()

    def __iter__(self) -> Iterator[DownloadResult]:
        return self._results

    def __next__(self) -> DownloadResult:
        return next(self._results)

    def close(self) -> None:
        """Take back what has not begun, and stop what does not end in a moment; no more results come.

        Then the files are nobody's any more. Not so with executors that do not hear, whose groups come to their end,
        and after ``stop``, which says itself how long to wait.
        """
        self._results.close()

    @property
    def is_stopping(self) -> bool:
        """Tell whether ``stop`` was called: what yields the files may end, too."""
        return self._give_up.is_set

    @property
    def bytes_under_way(self) -> int:
        """Bytes that have come of files that are not over; from any thread."""
        return sum(group.under_way for group in list(self._in_flight.values()))

    def stop(self, within: float = math.inf) -> None:
        """Begin no file any more, and let those under way end; from any thread, or from a signal handler.

        Args:
            within: Seconds to wait for what runs; after that the iteration ends without it.
        """
        self._give_up.by(time.monotonic() + within)
        self._news.put(None)

    def _run(self) -> Generator[DownloadResult, None, None]:
        try:
            while not self._is_over():
                yield from self._fill()
                if self._in_flight:
                    yield from self._collect()
        except GeneratorExit:
            if not self.is_stopping:
                self._let_go()
            raise
        finally:
            self._cancel()
            self._recall_all()
        if self._full is not None:
            raise self._full

    def _is_over(self) -> bool:
        if not self.is_stopping:
            return not self._in_flight and (self._full is not None or not (self._again or self._has_more()))
        self._again.clear()
        self._returned.clear()
        self._cancel()
        self._recall_all()
        if time.monotonic() < self._give_up.moment:
            return not self._in_flight
        return not any(future.done() for future in self._in_flight)  # what has ended has results

    def _has_more(self) -> bool:
        """Tell whether there are files to hand out now."""
        return bool(self._returned) or (not self._is_exhausted and self._room > 0)

    def _cancel(self) -> None:
        """Drop what has not begun."""
        for future in [future for future in self._in_flight if future.cancel()]:
            del self._in_flight[future]

    def _let_go(self) -> None:
        """Bring what runs to its end; the parts of what is stopped are kept."""
        self._cancel()
        give_up = time.monotonic() + _MOMENT
        while self._sizer.is_heard and (running := [future for future in self._in_flight if not future.done()]):
            if time.monotonic() >= give_up:
                for future in running:
                    terminate(self._executor, future)
                wait(running, _MOMENT)  # for the processes, which have the parts locked
                return
            self._recall_all()
            wait(running, _RECALL_AGAIN)

    def _recall_all(self) -> None:
        """Ask for all that has not begun, again and again: a group that just arrives at its worker does not hear."""
        now = time.monotonic()
        if self._next_recall <= now:
            self._next_recall = now + _RECALL_AGAIN
            for future in self._in_flight:
                recall(self._executor, future)

    def _fill(self) -> Iterator[DownloadResult]:
        """Submit what the window has room for; yield the results of items that cannot be fetched at all."""
        while len(self._in_flight) < self._window and self._full is None and not self.is_stopping:
            if self._again:
                group = self._again.popleft()
            elif not self._has_more():
                self._spread()
                return
            else:
                group = _Group({})
                yield from self._pull(group.items)
            if group.items and not self.is_stopping:
                self._submit(group)

    def _submit(self, group: _Group) -> None:
        items = list(group.items.values())
        future = submit_heard(self._executor, lambda told: self._news.put((group, told)), self._fetch, items)
        self._sizer.is_heard = hears(self._executor)  # now that it has started
        self._in_flight[future] = group
        future.add_done_callback(self._news.put)

    def _note_begun(self, group: _Group, numbers: Iterable[int]) -> None:
        # A further attempt of the executor's tells of files that the former one has brought to their end.
        begun = [group.items[number] for number in numbers if number in group.items]
        if self._begun is not None and begun:
            self._begun(begun)

    def _spread(self) -> None:
        """Let a worker that has nothing to do have some of what others have not begun (rule 4).

        Of small groups a worker is to have all under way soon: what waits for the gate there would only wait elsewhere.
        """
        if len(self._in_flight) < self._workers:
            for future, group in self._in_flight.items():
                if not group.is_recalled and len(group.items) > self._sizer.smallest:
                    group.is_recalled = True
                    recall(self._executor, future)

    def _pull(self, items: dict[int, PlannedItem]) -> Iterator[DownloadResult]:
        """Take the next files."""
        to_come = min(self._left, self._room)
        for _ in range(self._sizer.next_size(None if math.isinf(to_come) else int(to_come))):
            if not self._has_more():
                return
            each = self._returned.popleft() if self._returned else next(self._planned, None)
            if each is None:
                self._is_exhausted = True
                return
            self._left = max(self._left - 1, 0)
            self._room -= 1
            if isinstance(each, PlannedItem):
                items[each.number] = each
            else:
                yield each

    def _collect(self) -> Iterator[DownloadResult]:
        """Wait for news, at most until there is something else to do."""
        moments = [min(self._give_up.moment, self._next_recall)] if self.is_stopping else []
        timeout = max(min(moments) - time.monotonic(), 0.0) if moments else None
        try:
            news = get_in_glances(self._news, timeout)
        except queue.Empty:
            return
        if isinstance(news, tuple):
            group, told = news
            group.under_way = told.under_way
            self._note_begun(group, told.begun)
            yield from self._take(group, told.results)
        elif news is not None and news in self._in_flight:  # else told to stop, or cancelled by that
            group = self._in_flight.pop(news)
            yield from self._conclude(news, group)

    def _conclude(self, future: Future[FetchedGroup], group: _Group) -> Iterator[DownloadResult]:
        error = CancelledError("cancelled by the executor") if future.cancelled() else future.exception()
        if error is None:
            fetched = future.result()
            for each in fetched.left:
                del group.items[each.number]
            self._returned.extend(fetched.left)
            self._left += len(fetched.left)
            self._room += len(fetched.left)
            yield from self._take(group, fetched.results)
            self._sizer.learn(group.told, fetched.seconds)
        elif isinstance(error, (TaskError, BrokenExecutor)):
            yield from self._after_loss(group, error)
        else:
            raise error

    def _take(self, group: _Group, results: Sequence[DownloadResult]) -> Iterator[DownloadResult]:
        for result in results:
            if group.items.pop(result.index, None) is None:
                continue  # a further attempt of the executor's tells of the files of the former one again
            group.told += 1
            self._room += result.status == "skipped"
            if isinstance(result.error, StorageFullError):
                self._full = result.error
            yield result

    def _after_loss(self, group: _Group, error: Exception) -> Iterator[DownloadResult]:
        """Apply rule 2."""
        items = list(group.items.values())
        if group.tries < _MOST_TRIES:
            self._put_again(items, group.tries + 1)
        elif len(items) > 1:
            middle = len(items) // 2
            for half in (items[:middle], items[middle:]):
                self._put_again(half, group.tries)
        else:
            for each in items:
                yield unfetched(each.number, each.item.url, error)

    def _put_again(self, items: Iterable[PlannedItem], tries: int) -> None:
        if again := {each.number: each for each in items}:
            self._again.append(_Group(again, tries))


def unfetched(index: int, url: str, error: Exception) -> DownloadResult:
    """Return the result of a file for which nothing was asked, or whose worker could not tell."""
    return DownloadResult(index, url, None, "failed", 0, 0, 0, 0.0, error)
