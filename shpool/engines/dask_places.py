"""Which call goes to which worker of Dask, and which is taken back: decisions, no input and no output.

The pool places each call itself, in the order of their numbers. Beyond what a worker runs it gets some ahead, since the
way there takes milliseconds; where these come to wait behind one that takes long, and there is room elsewhere, they
are taken back. All of it runs in the event loop of the pool's client.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from shpool.engines.sealed import Call

STUCK_AFTER = 0.05  # s; nothing waits behind what has run so long while there is room elsewhere
DEPTH = 65  # calls at each thread of a worker


@dataclass(eq=False)
class Placed:
    """A call that was launched and has not ended.

    Attributes:
        call: The call.
        ticket: Of its stay at a worker; 0 while it is at none.
        member: The worker.
        future: Dask's.
        is_held: It waits for a place.
        is_unwanted: It is to be stopped as soon as one knows where it is.
    """

    call: Call
    ticket: int = 0
    member: Member | None = None
    future: Any = None
    is_held: bool = False
    is_unwanted: bool = False


@dataclass(eq=False)
class Member:
    """A worker with an outpost of the pool's.

    Attributes:
        address: Its address.
        threads: How many calls it runs at once.
        pid: Its process id.
        nanny: The address of its nanny, which can tell what it did and starts it again when it is killed; "" for none.
        logbook: Where its logbook is; "" for none.
        calls: What is there and has not ended, by ticket, oldest first.
        strangers: How many tasks of others it has.
        quiet_since: When it last ended a call, or got one while it had none.
        is_stuck: It was found behind calls that take long, and has ended none since.
        is_asked: It is asked what has not begun at this moment.
        is_doomed: It is to be killed, or is about to close.
        begun: Tickets of what has begun there, which it tells when it closes in order.
    """

    address: str
    threads: int
    pid: int
    nanny: str = ""
    logbook: str = ""
    calls: dict[int, Placed] = field(default_factory=dict)
    strangers: int = 0
    quiet_since: float = 0.0
    is_stuck: bool = False
    is_asked: bool = False
    is_doomed: bool = False
    begun: list[int] | None = None

    @property
    def room(self) -> int:
        """How many calls can run here at once beside what others have here."""
        return max(0, self.threads - self.strangers)

    @property
    def most(self) -> int:
        """How many calls may be here; none ahead where nobody could tell later which of them had begun."""
        if self.is_doomed:
            return 0
        can_tell = self.nanny and self.logbook
        return (self.room or self.threads) * (DEPTH if can_tell and not self.is_stuck else 1)

    @property
    def load(self) -> float:
        """What tells who is next to get a call."""
        return len(self.calls) / (self.room or self.threads)

    @property
    def has_room(self) -> bool:
        """Tell whether a call would run here at once."""
        return not self.is_doomed and len(self.calls) < self.room


class Places:
    """The workers, and what was launched and has not ended."""

    def __init__(self) -> None:
        self.members: dict[str, Member] = {}
        self._placed: dict[int, Placed] = {}
        self._held: list[int] = []  # a heap of numbers; some may have a place, or have ended, meanwhile
        self._tickets = itertools.count(1)

    @property
    def capacity(self) -> int:
        """What can run at once: beside the tasks of others, or with them, where they are everywhere."""
        members = self.members.values()
        return sum(member.room for member in members) or sum(member.threads for member in members)

    @property
    def numbers(self) -> list[int]:
        """The numbers of all calls."""
        return list(self._placed)

    @property
    def has_calls_ahead(self) -> bool:
        """Tell whether some wait at a worker."""
        return any(len(member.calls) > member.threads for member in self.members.values())

    def count_strangers(self, strangers: Mapping[str, int]) -> None:
        """Take note of how many tasks of others each worker has."""
        for member in self.members.values():
            member.strangers = strangers.get(member.address, 0)

    def find(self, number: int) -> Placed | None:
        """Return what was launched under this number, unless it has ended."""
        return self._placed.get(number)

    def add(self, call: Call) -> None:
        """Take in a call; it is held until it is placed."""
        placed = self._placed[call.number] = Placed(call)
        self.hold([placed])

    def hold(self, calls: Iterable[Placed]) -> None:
        """Let calls wait for a place, again; none of them is at a worker any more."""
        for placed in calls:
            self._leave_place(placed)
            placed.is_held = True
            heapq.heappush(self._held, placed.call.number)

    def place(self, now: float) -> dict[str, list[Placed]]:
        """Give those held a place, as far as there is any; return what is to be sent to which worker."""
        groups: dict[str, list[Placed]] = {}
        while self._held:
            placed = self._placed.get(self._held[0])
            if placed is None or not placed.is_held:
                heapq.heappop(self._held)
                continue
            member = self._roomiest()
            if member is None:
                break
            heapq.heappop(self._held)
            if not member.calls:
                member.quiet_since = now
            placed.is_held, placed.member, placed.ticket = False, member, next(self._tickets)
            member.calls[placed.ticket] = placed
            groups.setdefault(member.address, []).append(placed)
        return groups

    def end(self, number: int, now: float) -> Placed | None:
        """Take out a call that has ended."""
        placed = self._placed.pop(number, None)
        if placed is not None and placed.member is not None:
            placed.member.quiet_since = now
            placed.member.is_stuck = False
            self._leave_place(placed)
        return placed

    def dismiss(self, address: str) -> tuple[Member, dict[int, Placed]] | None:
        """Take out a worker; return it with what it had, by the tickets of then."""
        member = self.members.pop(address, None)
        if member is None:
            return None
        calls = dict(member.calls)
        for placed in calls.values():
            self._leave_place(placed)
        return member, calls

    def stuck(self, now: float) -> list[Member]:
        """Return the workers to ask for what has not begun, as it could run elsewhere."""
        members = self.members.values()
        if self._held or not any(member.has_room for member in members):
            return []
        return [
            member
            for member in members
            if len(member.calls) > member.threads
            and not (member.is_asked or member.is_doomed)
            and now - member.quiet_since >= STUCK_AFTER
        ]

    def _roomiest(self) -> Member | None:
        members = [member for member in self.members.values() if member.room] or self.members.values()
        usable = [member for member in members if len(member.calls) < member.most]
        return min(usable, key=lambda member: member.load, default=None)

    @staticmethod
    def _leave_place(placed: Placed) -> None:
        if placed.member is not None:
            placed.member.calls.pop(placed.ticket, None)
        placed.member, placed.ticket = None, 0
