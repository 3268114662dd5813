"""Which flight goes to which worker, and when: decisions on the crew's queues, no input and no output.

Everything here is called under the crew's lock.
"""

from __future__ import annotations

import collections
import heapq
import time
from typing import TYPE_CHECKING, Any

from shpool.engines.slot import is_abandoned

if TYPE_CHECKING:
    from collections.abc import Iterable
    from concurrent.futures import Future

    from shpool.engines.base import Task
    from shpool.engines.flight import Flight
    from shpool.engines.member import Member

TINY = 0.002  # s; only while a function's calls are shorter does more than one travel to a worker at a time
STUCK_AFTER = 0.02  # s; nothing waits behind a call that has run so long, whatever was measured before
_AHEAD = 0.005  # s of work to have at a worker: as long as Python may keep the loop's thread from running
_DEEPEST = 256  # calls at a worker
_BATCHES = 2  # brief ones at a worker: one running, and one at hand when that is done
_PRIMED = 2  # tiny calls at a worker to which submit() sends by itself; beyond that the loop sends many at once
_MOST_PACES = 1024  # functions whose pace is remembered
_PACE_MEMORY = 0.2  # share of the newest call's time in the running mean


class Dispatch:
    """The flights that wait, and the measured paces that tell how many may be under way."""

    def __init__(self) -> None:
        self._queue: collections.deque[Flight] = collections.deque()
        self._delayed: list[tuple[float, int, Flight]] = []  # a heap by due time; the number breaks ties
        self._paces: dict[bytes, float] = {}  # seconds a call takes, by the function's key
        self._is_saturated = False  # the queue's head found no room, and no worker has got any since

    def __bool__(self) -> bool:
        return bool(self._queue)

    @property
    def is_saturated(self) -> bool:
        """Tell whether the flight that is next is known to find no room."""
        return self._is_saturated

    @property
    def next_due(self) -> float | None:
        """When the next delayed flight is due, by ``time.monotonic``."""
        return self._delayed[0][0] if self._delayed else None

    @property
    def head(self) -> Flight | None:
        """The flight that is next."""
        return self._queue[0] if self._queue else None

    def take_head(self) -> Flight:
        """Take out the flight that is next."""
        return self._queue.popleft()

    def add(self, flight: Flight) -> None:
        """Queue a flight behind the others."""
        self._queue.append(flight)

    def put_back(self, flights: Iterable[Flight]) -> None:
        """Queue flights before the others, in their order."""
        self._queue.extendleft(reversed(list(flights)))

    def delay(self, flight: Flight, until: float) -> None:
        """Queue a flight later."""
        heapq.heappush(self._delayed, (until, flight.number, flight))

    def release_due(self, now: float) -> None:
        """Queue the delayed flights whose time has come."""
        while self._delayed and self._delayed[0][0] <= now:
            self._queue.append(heapq.heappop(self._delayed)[2])

    def clear(self) -> list[Flight]:
        """Take out all that waits."""
        flights = [*self._queue, *(flight for _, _, flight in self._delayed)]
        self._queue.clear()
        self._delayed.clear()
        return flights

    def take_out(self, future: Future[Any]) -> Flight | None:
        """Take the flight of a future out of what waits; None if it is not there."""
        for flight in self._queue:
            if flight.future is future:
                self._queue.remove(flight)
                return flight
        for entry in self._delayed:
            if entry[2].future is future:
                self._delayed.remove(entry)
                heapq.heapify(self._delayed)
                return entry[2]
        return None

    def take_out_abandoned(self) -> set[Flight]:
        """Take out all that waits and nobody wants any more."""
        waiting = [*self._queue, *(flight for _, _, flight in self._delayed)]
        abandoned = {flight for flight in waiting if is_abandoned(flight.future)}
        if abandoned:
            self._queue = collections.deque(flight for flight in self._queue if flight not in abandoned)
            self._delayed = [entry for entry in self._delayed if entry[2] not in abandoned]
            heapq.heapify(self._delayed)
        return abandoned

    def note_room(self) -> None:
        """Take note that a worker has more room than before."""
        self._is_saturated = False

    def note_pace(self, flight: Flight, seconds: float) -> None:
        """Take the time of one call into its function's running mean."""
        if len(self._paces) >= _MOST_PACES:
            self._paces.clear()
        known = self._paces.setdefault(flight.function.key, seconds)
        self._paces[flight.function.key] = known + _PACE_MEMORY * (seconds - known)

    def next_pair(self, members: Iterable[Member], *, fill: bool) -> tuple[Flight, Member] | None:
        """Take the next flight out of the queue with the worker to send it to; None while nobody has room.

        Args:
            members: The workers.
            fill: Give busy workers as many tiny calls as they may have, not just enough to keep them going.
        """
        if not self._queue or (self._is_saturated and not fill):
            return None
        depth = self._depth(self._queue[0])
        member = _roomiest(members, depth if fill else min(depth, _PRIMED), self._queue[0].task)
        if member is None:
            self._is_saturated = True
            return None
        return self._queue.popleft(), member

    def _depth(self, flight: Flight) -> int:
        """Return how many calls of this function may be at a worker; what is sent cannot be cancelled any more."""
        if flight.task.timeout is not None:
            return 1  # to stop it costs its worker, and that must not be running another one by then
        if flight.task.batch:
            return _BATCHES if flight.task.brief else 1
        pace = self._paces.get(flight.function.key, TINY)
        return 1 if pace >= TINY else min(_DEEPEST, 1 + int(_AHEAD / max(pace, 1e-6)))


def _roomiest(members: Iterable[Member], depth: int, task: Task) -> Member | None:
    """Return an idle worker, else the least busy one with fewer flights than ``depth`` and a head that just began.

    A worker that may not make so many calls any more makes way for a fresh one.
    """
    best, fewest = None, depth
    for member in members:
        if not member.is_usable:
            continue
        if member.calls_left < task.calls:
            member.is_retiring = True
            continue
        flying = len(member.flights)
        if not flying:
            return member
        if flying < fewest and _may_follow(task, member.flights[0]) and not member.is_full and _has_just_begun(member):
            best, fewest = member, flying
    return best


def _may_follow(task: Task, head: Flight) -> bool:
    """Tell whether a task may wait at a worker behind one of its like, which nobody is to stop."""
    running = head.task
    if running.timeout is not None or head.is_unwanted:
        return False
    return running.brief and task.brief if running.batch else not task.batch


def _has_just_begun(member: Member) -> bool:
    return time.monotonic() - member.head_since < STUCK_AFTER
