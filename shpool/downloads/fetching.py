"""Fetch a group of files in one process: many transfers at once, the token of the moment for each request.

The rules, besides those of ``transfer`` and ``partfile``:

 1. The token is read for each request. It goes where ``bearer`` allows, and stays behind once a redirect has led to
    another origin.
 2. A 401 means that a generation was refused: it is reported once, and everything waits for the next one. Transfers
    under way go on meanwhile. The second refusal in a row of one file is a failed attempt.
 3. A ``Retry-After`` holds back all requests to that origin, not only the file that met it.
 4. A full disk fails what has not begun, without asking for it.
 5. A file is reported once it is durable, at once where the parent listens, else with the others of its group.
 6. A request with the token goes through the account's gate; the transfers under way go on meanwhile. Its ticket is
    the file's until the answer has been read, be it that of a redirect to another origin.
 7. Files for which nothing was asked when the parent recalls them go back to it, those that wait for leave included.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import random
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from shpool.bearer import TokenDesk
from shpool.downloads.curling import CurlLoop
from shpool.downloads.filenames import Folder
from shpool.downloads.incoming import Incoming
from shpool.downloads.items import DownloadResult, FetchSettings
from shpool.downloads.partfile import translated
from shpool.downloads.press import Arrived, Press
from shpool.downloads.tickets import TicketDesk
from shpool.downloads.transfer import MOST_REDIRECTS, Failure, Redirect, Refused, StartOver
from shpool.errors import (
    ContentError,
    DownloadError,
    DownloadTimeoutError,
    InsecureUrlError,
    StorageFullError,
    TokenUnavailableError,
    TransferError,
)
from shpool.origins import origin_of, shown_url
from shpool.talk import is_recalled, tell

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from shpool.bearer import TokenHolder
    from shpool.downloads.curling import CurlOptions, CurlTrouble
    from shpool.downloads.items import PlannedItem
    from shpool.downloads.transfer import Verdict
    from shpool.gate import AccountGate
    from shpool.retry import RetryAfterUnit

_LOOK_AGAIN = 0.05  # s between two looks for a newer token
_MOST_WAITING = 128  # files that wait for a token or for another attempt; each may hold a descriptor
_LONGEST_POLL = 0.1  # s until the parent is heard
_HURRY = 0.01  # s between two looks at files that are being made durable
# s between two reports to the parent, each of which costs it as much as a few files do. Results wait the less the fewer
# there were lately: a kill costs those that wait.
_TELL_EVERY = 0.1
_TELL_RESULTS = 0.02
_MANY_RESULTS = 64  # in a report: they wait the longest
_BEGUN_SINCE = 0.25  # s; files that are over before need not be told of twice


class GroupNews(NamedTuple):
    """What has become of a group lately.

    Attributes:
        results: Of files that are over, in that order.
        under_way: Bytes that have come so far of files that are not.
        begun: Numbers of files that are not, and were asked for a while ago; each is told once.
    """

    results: list[DownloadResult]
    under_way: int
    begun: Sequence[int] = ()


class FetchedGroup(NamedTuple):
    """What became of a group.

    Attributes:
        results: One for each file that was begun and not told of before, in the order they finished.
        seconds: How long the worker was busy with it.
        left: Files that were not begun, since the parent has asked for them.
    """

    results: list[DownloadResult]
    seconds: float
    left: Sequence[PlannedItem] = ()


@dataclass(frozen=True)
class FetchGroup:
    """Fetch a group of files in the worker it is called in. Picklable, for any executor.

    Connections stay open from one group to the next of the same thread.
    """

    settings: FetchSettings

    def __call__(self, group: Sequence[PlannedItem]) -> FetchedGroup:
        """Return what became of each file, as far as that was not told before.

        Raises:
            MissingExtraError: pycurl is not installed.
            NoSessionError: The token is to be sent, and this is no worker of a pool.
        """
        holder: TokenHolder | None = None
        gate: AccountGate | None = None
        if self.settings.authenticated:
            from shpool.shared import current_session

            holder = session = current_session()
            gate = session.gate
        begun = time.monotonic()
        results, left = GroupFetch(self.settings, open_loop(self.settings.curl), holder, gate).run(group)
        return FetchedGroup(results, time.monotonic() - begun, left)


class GroupFetch:
    """Fetch one group of files.

    Args:
        settings: How.
        loop: Carries the transfers; its connections outlive the group.
        holder: Whose token to send; None for none.
        gate: What requests with the token go through; None for nothing.
    """

    def __init__(
        self, settings: FetchSettings, loop: CurlLoop, holder: TokenHolder | None, gate: AccountGate | None = None
    ) -> None:
        self._settings = settings
        self._loop = loop
        self._folder = Folder(settings.folder, settings.reserved)
        self._desk = None if holder is None else TokenDesk(holder)
        self._unit: RetryAfterUnit = getattr(holder, "retry_after_unit", "s")
        self._tickets = TicketDesk(gate, self._unit)
        self._ready: deque[Incoming] = deque()
        self._waiting: list[tuple[float, int, Incoming]] = []  # a heap by due time; the number breaks ties
        self._order = itertools.count()
        self._held: dict[str, float] = {}  # origins that asked to wait, and until when
        self._press: Press[Incoming] = Press(self._folder, durable=settings.durable)
        self._full: StorageFullError | None = None
        self._under_way: set[Incoming] = set()
        self._results: list[DownloadResult] = []  # to be told
        self._told = time.monotonic()  # when some were
        self._lately = 0  # how many were then
        self._known_under_way = 0  # bytes, to the parent
        self._known_begun: set[Incoming] = set()  # likewise
        self._is_recalled = False

    def run(self, group: Sequence[PlannedItem]) -> tuple[list[DownloadResult], list[PlannedItem]]:
        """Return the results that were not told before, and the files that were not begun."""
        queue = deque(group)
        left: list[PlannedItem] = []
        try:
            while queue or self._under_way:
                if not self._is_recalled and is_recalled():
                    self._is_recalled = True
                    left = [*self._take_unbegun(), *queue]
                    queue.clear()
                    self._tell(since=0.0)  # the parent may not wait for the rest to end
                self._start_some(queue)
                if self._loop.busy:
                    for incoming, trouble in self._loop.poll(self._until_due()):
                        self._conclude(incoming, trouble)
                elif (self._waiting or self._ready) and self._press.is_empty:
                    time.sleep(self._until_due())
                self._take_finished()
                if time.monotonic() >= self._next_report:
                    self._tell()
        finally:
            self._abandon()
        return self._results, left

    def _take_unbegun(self) -> Iterator[PlannedItem]:
        """Let go of the files that wait, and for which nothing was asked yet."""
        for incoming in (*self._ready, *(waiting[2] for waiting in self._waiting)):
            if not incoming.has_begun:
                self._under_way.discard(incoming)
                incoming.close()
                yield incoming.planned
        self._ready = deque(each for each in self._ready if each.has_begun)
        self._waiting = [waiting for waiting in self._waiting if waiting[2].has_begun]
        heapq.heapify(self._waiting)

    @property
    def _next_report(self) -> float:
        share = min(self._lately / _MANY_RESULTS, 1.0) if self._results else 1.0
        return self._told + max(_TELL_EVERY * share, _TELL_RESULTS)

    def _tell(self, since: float = _BEGUN_SINCE) -> None:
        """Tell the parent what is over, how far the rest has come, and what of it was begun so many seconds ago."""
        now = time.monotonic()
        under_way = sum(incoming.received for incoming in self._under_way)
        begun = {incoming for incoming in self._under_way if incoming.has_begun and now - incoming.begun >= since}
        begun -= self._known_begun
        self._lately = len(self._results)
        is_new = self._results or begun or under_way != self._known_under_way
        if is_new and tell(GroupNews(self._results, under_way, [each.planned.number for each in begun])):
            self._results, self._known_under_way = [], under_way
            self._known_begun |= begun
        self._told = now

    def _end(self, incoming: Incoming, result: DownloadResult) -> None:
        self._under_way.discard(incoming)
        self._known_begun.discard(incoming)
        self._results.append(result)

    # Starting

    def _start_some(self, queue: deque[PlannedItem]) -> None:
        now = time.monotonic()
        while self._waiting and self._waiting[0][0] <= now:
            self._ready.append(heapq.heappop(self._waiting)[2])
        while self._loop.has_room and self._press.has_room and not self._tickets.is_shut:
            if self._ready:
                self._ask(self._ready.popleft())
            elif len(self._waiting) >= _MOST_WAITING or not queue:
                return
            else:
                self._begin(queue.popleft())

    def _begin(self, planned: PlannedItem) -> None:
        settings = self._settings
        incoming = Incoming(planned, self._folder, settings, self._unit)
        self._under_way.add(incoming)
        if self._full is not None:
            self._give_up(incoming, self._full)
            return
        try:
            found = incoming.look()
        except OSError as exc:
            error = exc if isinstance(exc, DownloadError) else translated(exc, str(planned.path))
            self._give_up(incoming, error)
        except DownloadError as exc:
            self._give_up(incoming, exc)
        else:
            if found is None:
                self._ask(incoming)
            else:
                self._follow(incoming, found)

    def _ask(self, incoming: Incoming) -> None:
        """Send a file's next request, or let it wait for the token or the server."""
        if self._held and (pause := self._held.get(_place(incoming.url), 0.0) - time.monotonic()) > 0:
            self._wait(incoming, pause + random.uniform(0.0, min(pause, 1.0)))  # noqa: S311 - not all at the same moment
            return
        token = None
        if self._desk is not None and not incoming.is_astray:
            try:
                token = self._desk.token_for(incoming.url)
            except TokenUnavailableError as exc:
                if self._desk.is_overdue():
                    self._give_up(incoming, exc)
                else:
                    self._wait(incoming, _LOOK_AGAIN)
                return
            except InsecureUrlError as exc:
                self._give_up(incoming, exc)
                return
        if token is not None and not self._tickets.admit(incoming):
            self._ready.appendleft(incoming)
            return
        fields = incoming.request_fields()
        incoming.generation = None
        if token is not None:
            incoming.generation = token.generation
            fields.append(f"Authorization: Bearer {token.access_token}")
        self._loop.start(incoming.url, fields, incoming, incoming.deadline)

    def _wait(self, incoming: Incoming, seconds: float) -> None:
        heapq.heappush(self._waiting, (time.monotonic() + seconds, next(self._order), incoming))

    def _until_due(self) -> float:
        if not self._press.is_empty:
            return _HURRY
        due = time.monotonic() + _LONGEST_POLL
        if self._results:
            due = min(due, self._next_report)
        if self._waiting:
            due = min(due, self._waiting[0][0])
        if self._ready:
            due = min(due, self._tickets.shut_until)
        return max(due - time.monotonic(), 0.0)

    # Concluding

    def _conclude(self, incoming: Incoming, trouble: CurlTrouble | Exception | None) -> None:
        self._tickets.heed(incoming)
        outcome = incoming.conclude(trouble)
        if not isinstance(outcome, Redirect):
            self._tickets.take_back(incoming)
        self._follow(incoming, outcome)

    def _follow(self, incoming: Incoming, outcome: Verdict | DownloadResult | Arrived) -> None:
        """Do what an answer means."""
        if isinstance(outcome, Arrived):
            self._press.add(incoming, outcome)
        elif isinstance(outcome, DownloadResult):
            incoming.close()
            self._end(incoming, outcome)
        elif isinstance(outcome, Redirect):
            self._redirect(incoming, outcome)
        elif isinstance(outcome, Refused):
            self._take_refusal(incoming, outcome.error)
        elif isinstance(outcome, StartOver) and outcome.is_free:
            incoming.go_back()
            self._ready.append(incoming)
        elif isinstance(outcome, StartOver):
            error = ContentError(shown_url(incoming.planned.item.url), outcome.reason)
            self._retry(incoming, Failure(error), at_once=True)
        elif isinstance(outcome, Failure):
            self._retry(incoming, outcome)

    def _redirect(self, incoming: Incoming, redirect: Redirect) -> None:
        incoming.redirects += 1
        if incoming.redirects > MOST_REDIRECTS:
            reason = f"more than {MOST_REDIRECTS} redirects"
            self._give_up(incoming, TransferError(shown_url(incoming.planned.item.url), reason, None, None, False))
            return
        if _place(redirect.url) != _place(incoming.url):
            incoming.is_astray = True
        incoming.url = redirect.url
        self._ready.appendleft(incoming)

    def _take_refusal(self, incoming: Incoming, error: DownloadError) -> None:
        """Apply the 401 rule."""
        incoming.refusals += 1
        if self._desk is None or incoming.generation is None:
            self._give_up(incoming, error)
            return
        if incoming.refusals == 1:
            self._desk.report_refused(incoming.generation)
            incoming.go_back()
            self._ready.append(incoming)
        elif self._retry(incoming, Failure(error)):  # revoked again since, maybe
            self._desk.report_refused(incoming.generation)

    def _retry(self, incoming: Incoming, failure: Failure, *, at_once: bool = False) -> bool:
        """Queue another attempt and return true, or give up."""
        if isinstance(failure.error, StorageFullError):
            self._full = failure.error
        is_pause, is_late = failure.pause is not None, isinstance(failure.error, DownloadTimeoutError)
        has_more = incoming.patience.has_more(incoming.bytes_kept, is_pause=is_pause, is_late=is_late)
        if failure.is_final or not has_more:
            self._give_up(incoming, failure.error)
            return False
        if failure.pause is not None:
            until = time.monotonic() + failure.pause
            origin = _place(incoming.url)
            self._held[origin] = max(until, self._held.get(origin, 0.0))
        incoming.go_back()
        if at_once:
            self._ready.append(incoming)
        else:
            self._wait(incoming, (failure.pause or 0.0) + self._settings.backoff.delay(incoming.patience.failures))
        return True

    def _give_up(self, incoming: Incoming, error: Exception) -> None:
        self._end(incoming, incoming.failed(error))

    def _take_finished(self) -> None:
        hurry = not self._loop.busy and (not self._ready or self._tickets.is_shut)
        for incoming, arrived in self._press.take(hurry=hurry):
            if arrived.error is None:
                self._end(incoming, incoming.done(arrived.part.size))
            else:
                self._retry(incoming, Failure(arrived.error, is_final=True))

    def _abandon(self) -> None:
        """Keep what is unfinished for another run; nothing is left to do in a run that ended well."""
        unfinished = [*self._loop.cancel(), *self._ready, *(incoming for _, _, incoming in self._waiting)]
        self._tickets.close()
        for incoming in unfinished:
            self._tickets.take_back(incoming)
            with contextlib.suppress(OSError, DownloadError):  # the run ends for another reason already
                incoming.close()
        self._press.close()


def open_loop(options: CurlOptions) -> CurlLoop:
    """Return this thread's loop for such transfers, with the connections it still has open."""
    known = getattr(_local, "loop", None)
    if known is not None:
        owner, loop = known
        if owner == os.getpid() and loop.options == options:
            return loop  # type: ignore[no-any-return]  # thread-locals have no types
        if owner == os.getpid():
            loop.close()
        else:
            _of_parents.append(loop)  # after a fork its sockets are the parent's: closing would speak on them
    _local.loop = (os.getpid(), CurlLoop(options))
    return _local.loop[1]  # type: ignore[no-any-return]  # as above


def close_loop() -> None:
    """Close the connections this thread has kept open; a worker that ends does so by itself."""
    known = getattr(_local, "loop", None)
    if known is not None and known[0] == os.getpid():
        known[1].close()
        _local.loop = None


def _place(url: str) -> str:
    """Return an origin in a form that compares: lower case, without a name and password."""
    scheme, _, host = origin_of(url).partition("://")
    return f"{scheme}://{host.rpartition('@')[2]}".lower()


_local = threading.local()
_of_parents: list[CurlLoop] = []
