"""Files on their way through an executor: in groups to the workers, and back as results.

A group is sized by what the last ones took, so that a worker is busy for half a second with it: less and it would idle
between groups, more and a bar would jump. The rules:

 1. Files are pulled as groups finish: two groups a worker are out at most.
 2. A group whose worker died is tried again, then in halves, until one file is left that kills its worker.
 3. A full disk ends the run, once the results of what was under way have come.
"""

from __future__ import annotations

import itertools
import math
import queue
import time
from collections import deque
from concurrent.futures import BrokenExecutor, CancelledError
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shpool.batch import worker_count
from shpool.beginnings import Beginnings
from shpool.downloads.items import DownloadResult, PlannedItem
from shpool.errors import StorageFullError, TaskError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator
    from concurrent.futures import Executor, Future

    from shpool.downloads.fetching import FetchedGroup, FetchGroup

_LONGEST_GROUP = 1024  # files; their results wait for each other
_GROUP_SECONDS = 0.5  # s a worker should be busy with a group
_GROUPS_PER_WORKER = 2  # one running, one waiting
_MOST_TRIES = 2  # of a group whose worker died, before it is split


@dataclass
class GroupSizer:
    """Say how many files make a group, from how long the last groups took.

    Attributes:
        smallest: Files in a group at least: as many as a worker transfers at once. So many has the first.
        largest: Files in a group at most, whatever ``smallest`` says: each worker is to have some of a short input.
    """

    smallest: int
    largest: int = _LONGEST_GROUP
    _size: int = 0

    @property
    def size(self) -> int:
        """Files in the next group."""
        return min(max(self._size, self.smallest), self.largest)

    def learn(self, files: int, seconds: float) -> None:
        """Take note of a finished group.

        Args:
            files: How many it had.
            seconds: How long a worker was busy with it.
        """
        if files < self.smallest:
            return  # the end of the input tells nothing
        ideal = files * _GROUP_SECONDS / max(seconds, 1e-3)
        self._size = int(min(max(ideal, self.size / 4), self.size * 4))


@dataclass
class _Group:
    """Files in a worker's hands."""

    items: list[PlannedItem]
    tries: int = 1


class GroupRun:
    """Fetch files in groups; iterate over it for their results, as they finish.

    Everything happens in the consumer's thread, but for ``stop`` and the queue, which others fill. Closing it, or an
    interruption inside it, cancels what has not begun; what runs is the executor's to end.

    Args:
        executor: Any executor; it is not shut down.
        fetch: Called in the workers.
        planned: The files; a result among them, of one that cannot be fetched at all, is handed on. Lazily read.
        count: How many files there are, where that is known.
        begun: Called with the files of each group that is seen to run; not of those that are over before.
    """

    def __init__(
        self,
        executor: Executor,
        fetch: FetchGroup,
        planned: Iterable[PlannedItem | DownloadResult],
        *,
        count: int | None = None,
        begun: Callable[[list[PlannedItem]], None] | None = None,
    ) -> None:
        self._executor = executor
        self._fetch = fetch
        self._planned = iter(planned)
        workers, connections = worker_count(executor), fetch.settings.curl.connections
        self._window = _GROUPS_PER_WORKER * workers
        self._sizer = GroupSizer(connections)
        if count is not None:  # a worker's share of a short input goes to it at once, up to what it has connections for
            share = min(-(-count // workers), connections)
            self._sizer.largest = min(max(count // self._window, share, 1), _LONGEST_GROUP)
        self._is_exhausted = False
        self._give_up: float | None = None  # set by stop(): until when results are waited for
        self._in_flight: dict[Future[Any], _Group] = {}
        self._beginnings: Beginnings[list[PlannedItem]] = Beginnings(begun, time.monotonic)
        self._again: deque[_Group] = deque()
        self._finished: queue.SimpleQueue[Future[Any] | None] = queue.SimpleQueue()  # None: look again
        self._full: StorageFullError | None = None
        self._results = self._run()

    def __iter__(self) -> Iterator[DownloadResult]:
        return self._results

    def __next__(self) -> DownloadResult:
        return next(self._results)

    def close(self) -> None:
        """Cancel what has not begun; no more results come."""
        self._results.close()

    @property
    def is_stopping(self) -> bool:
        """Tell whether ``stop`` was called: what yields the files may end, too."""
        return self._give_up is not None

    def stop(self, within: float = math.inf) -> None:
        """Begin no group any more, and let what runs end; from any thread, or from a signal handler.

        Args:
            within: Seconds to wait for what runs; after that the iteration ends without it.
        """
        self._give_up = min(time.monotonic() + within, math.inf if self._give_up is None else self._give_up)
        self._finished.put(None)

    def _run(self) -> Generator[DownloadResult, None, None]:
        try:
            while not self._is_over():
                yield from self._fill()
                if self._in_flight:
                    yield from self._collect()
        finally:
            self._cancel()
        if self._full is not None:
            raise self._full

    def _is_over(self) -> bool:
        if self._give_up is None:
            has_more = not self._is_exhausted or self._again
            return not self._in_flight and (self._full is not None or not has_more)
        self._again.clear()
        self._cancel()
        self._beginnings.look(at_once=True)  # what runs may be stopped now, and is then cut off
        if time.monotonic() < self._give_up:
            return not self._in_flight
        return not any(future.done() for future in self._in_flight)  # what has ended has results

    def _cancel(self) -> None:
        """Drop what has not begun."""
        for future in [future for future in self._in_flight if future.cancel()]:
            del self._in_flight[future]
            self._beginnings.forget(future)

    def _fill(self) -> Iterator[DownloadResult]:
        """Submit what the window has room for; yield the results of items that cannot be fetched at all."""
        while len(self._in_flight) < self._window and self._full is None and not self.is_stopping:
            if self._again:
                group = self._again.popleft()
            elif self._is_exhausted:
                return
            else:
                group = _Group([])
                yield from self._pull(group.items)
            if group.items and not self.is_stopping:
                future = self._executor.submit(self._fetch, group.items)
                self._in_flight[future] = group
                self._beginnings.expect(future, group.items)
                future.add_done_callback(self._finished.put)

    def _pull(self, items: list[PlannedItem]) -> Iterator[DownloadResult]:
        """Put the next files into a list."""
        number = 0
        for number, each in enumerate(itertools.islice(self._planned, self._sizer.size), 1):  # noqa: B007 - the last one counts
            if isinstance(each, PlannedItem):
                items.append(each)
            else:
                yield each
        self._is_exhausted = number == 0

    def _collect(self) -> Iterator[DownloadResult]:
        """Wait for one finished group, at most until there is something else to do."""
        moments = [self._give_up] if self._give_up is not None and self._give_up < math.inf else []
        if self._beginnings.look():
            moments.append(self._beginnings.next_look)
        timeout = max(min(moments) - time.monotonic(), 0.0) if moments else None
        try:
            future = self._finished.get(timeout=timeout)
        except queue.Empty:
            return
        if future is None or future not in self._in_flight:  # told to stop, or cancelled by that
            return
        group = self._in_flight.pop(future)
        self._beginnings.forget(future)
        error = CancelledError("cancelled by the executor") if future.cancelled() else future.exception()
        if error is None:
            yield from self._take(future.result())
        elif isinstance(error, (TaskError, BrokenExecutor)):
            yield from self._after_loss(group, error)
        else:
            raise error

    def _take(self, fetched: FetchedGroup) -> Iterator[DownloadResult]:
        self._sizer.learn(len(fetched.results), fetched.seconds)
        for result in fetched.results:
            if isinstance(result.error, StorageFullError):
                self._full = result.error
            yield result

    def _after_loss(self, group: _Group, error: Exception) -> Iterator[DownloadResult]:
        """Apply rule 2."""
        if group.tries < _MOST_TRIES:
            self._again.append(_Group(group.items, group.tries + 1))
        elif len(group.items) > 1:
            middle = len(group.items) // 2
            self._again.extend(_Group(half, group.tries) for half in (group.items[:middle], group.items[middle:]))
        else:
            [planned] = group.items
            yield unfetched(planned.number, planned.item.url, error)


def unfetched(index: int, url: str, error: Exception) -> DownloadResult:
    """Return the result of a file for which nothing was asked, or whose worker could not tell."""
    return DownloadResult(index, url, None, "failed", 0, 0, 0, 0.0, error)
