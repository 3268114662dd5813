"""Download files in parallel, safely: the public face of the transfer modules.

Items are planned in the parent (names, checks, duplicates), grouped, and fetched in the pool's workers by
``FetchGroup``. A group is sized by what the last ones took, so that a worker is busy for half a second with it: less
and it would idle between groups, more and a bar would jump.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sized
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shpool.batch import worker_count
from shpool.downloads.curling import CurlOptions, load_pycurl
from shpool.downloads.fetching import FetchGroup, close_loop
from shpool.downloads.items import DownloadItem, DownloadResult, FetchSettings, PlannedItem, Planner, as_item
from shpool.errors import StorageFullError, TargetPathError, TaskError

if TYPE_CHECKING:
    import os

    from shpool.downloads.fetching import FetchedGroup
    from shpool.sources import Session

__all__ = ["DownloadItem", "DownloadResult", "FetchGroup", "FetchSettings", "GroupSizer", "Planner", "download"]

_LONGEST_GROUP = 1024  # files; their results wait for each other
_GROUP_SECONDS = 0.5  # s a worker should be busy with a group
_GROUPS_PER_WORKER = 2  # one running, one waiting
_MOST_TRIES = 2  # of a group whose worker died, before it is split


def download(  # noqa: PLR0913 - all but three are keyword-only, each with its default
    pool: Executor | Session,
    items: Iterable[str | Mapping[str, Any] | DownloadItem],
    to: str | os.PathLike[str],
    *,
    connections: int = 8,
    retries: int = 3,
    stall_timeout: float = 120.0,
    overwrite: bool = False,
    durable: bool = True,
    authenticated: bool = True,
    ca_bundle: str | None = None,
    max_workers: int | None = None,
) -> Generator[DownloadResult, None, None]:
    """Fetch files into a folder and yield one result for each, as they finish; a failed file raises nothing.

    A file appears under its name only once it is complete, verified and on disk; until then it is ``NAME.part``, from
    which a later run goes on. A right file that is there is skipped: right by size and checksum where they are given,
    else by the server's word on its size.

    Args:
        pool: An ``AuthenticatedProcessPool``, or a session to open one with for as long as this takes.
        items: URLs, mappings with the fields of ``DownloadItem``, or these; lazily read.
        to: The folder; made if need be. Nothing is written outside.
        connections: Transfers at once in each worker. More than the server allows brings 429s.
        retries: Further attempts for a file after one that brought no progress.
        stall_timeout: Seconds without a byte after which a transfer counts as broken.
        overwrite: Fetch files that are there already.
        durable: Write data and names to disk before a file is reported done.
        authenticated: Send the session's token.
        ca_bundle: File of the authorities to trust; None for the environment's, else certifi's.
        max_workers: Of the pool that is opened for a session; None for one per processor.

    Raises:
        MissingExtraError: pycurl is not installed: ``pip install 'shpool[download]'``.
        InputError: An item is no URL, or has unknown or impossible fields.
        ValueError: A setting is out of range.
        StorageFullError: The disk is full: after the results of what was under way.
        LoginError: The pool was opened, and the login failed.
    """
    if connections < 1 or retries < 0 or not stall_timeout > 0:
        msg = "connections must be at least 1, stall_timeout more than 0 seconds, and retries not negative"
        raise ValueError(msg)
    load_pycurl()
    curl = CurlOptions(connections, stall_timeout, ca_bundle)
    settings = FetchSettings(
        str(Path(to).absolute()), curl, retries, overwrite, durable, authenticated=authenticated, begun=time.time()
    )
    return _run(pool, Planner(), items, settings, max_workers)


def _run(
    pool: Executor | Session,
    planner: Planner,
    items: Iterable[str | Mapping[str, Any] | DownloadItem],
    settings: FetchSettings,
    max_workers: int | None,
) -> Generator[DownloadResult, None, None]:
    with contextlib.ExitStack() as stack:
        if isinstance(pool, Executor):
            executor = pool
        else:
            from shpool.pool import AuthenticatedProcessPool

            executor = stack.enter_context(AuthenticatedProcessPool(pool, max_workers))
        stack.callback(close_loop)  # of the inline engine, which works in this thread
        yield from _Run(executor, FetchGroup(settings), planner).results(items)


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
    begun: float = field(default=0.0)


class _Run:
    """Carry groups between the planner and the executor; everything happens in the consumer's thread."""

    def __init__(self, executor: Executor, fetch: FetchGroup, planner: Planner) -> None:
        self._executor = executor
        self._fetch = fetch
        self._planner = planner
        self._sizer = GroupSizer(fetch.settings.curl.connections)
        self._window = _GROUPS_PER_WORKER * worker_count(executor)
        self._in_flight: dict[Future[Any], _Group] = {}
        self._again: deque[_Group] = deque()
        self._full: StorageFullError | None = None

    def results(self, items: Iterable[str | Mapping[str, Any] | DownloadItem]) -> Iterator[DownloadResult]:
        numbered = enumerate(items)
        if isinstance(items, Sized):
            self._sizer.largest = min(max(len(items) // self._window, 1), _LONGEST_GROUP)
        try:
            while True:
                yield from self._fill(numbered)
                if not self._in_flight:
                    break
                done, _ = wait(self._in_flight, return_when=FIRST_COMPLETED)
                for future in done:
                    yield from self._take(future)
        finally:
            for future in self._in_flight:
                future.cancel()
        if self._full is not None:
            raise self._full

    def _fill(self, numbered: Iterator[tuple[int, Any]]) -> Iterator[DownloadResult]:
        """Submit what the window has room for; yield the results of items that cannot be fetched at all."""
        while len(self._in_flight) < self._window and self._full is None:
            if self._again:
                group = self._again.popleft()
            else:
                group = _Group([])
                for index, item in itertools.islice(numbered, self._sizer.size):
                    planned = self._planned(index, item)
                    if isinstance(planned, PlannedItem):
                        group.items.append(planned)
                    else:
                        yield planned
                if not group.items:
                    return
            self._in_flight[self._executor.submit(self._fetch, group.items)] = group

    def _planned(self, index: int, item: Any) -> PlannedItem | DownloadResult:  # noqa: ANN401 - see download()
        try:
            return self._planner.plan(index, item)
        except TargetPathError as exc:
            return _failed(index, as_item(item).url, exc)

    def _take(self, future: Future[Any]) -> Iterator[DownloadResult]:
        group = self._in_flight.pop(future)
        error = future.exception()
        if isinstance(error, (TaskError, BrokenExecutor)):
            yield from self._after_loss(group, error)
        elif error is not None:
            raise error
        else:
            fetched: FetchedGroup = future.result()
            self._sizer.learn(len(fetched.results), fetched.seconds)
            for result in fetched.results:
                if isinstance(result.error, StorageFullError):
                    self._full = result.error
                yield result

    def _after_loss(self, group: _Group, error: Exception) -> Iterator[DownloadResult]:
        """Try a group again whose worker died; then in halves, until one file is left that kills its worker."""
        if group.tries < _MOST_TRIES:
            self._again.append(_Group(group.items, group.tries + 1))
        elif len(group.items) > 1:
            middle = len(group.items) // 2
            self._again.extend(_Group(half, group.tries) for half in (group.items[:middle], group.items[middle:]))
        else:
            [planned] = group.items
            yield _failed(planned.number, planned.item.url, error)


def _failed(index: int, url: str, error: Exception) -> DownloadResult:
    return DownloadResult(index, url, None, "failed", 0, 0, 0, 0.0, error)
