"""Dask workers that come and go: what they tell, what they are told, and what becomes of the calls of those gone.

A worker's logbook says which of its calls had ended, which had begun, and which may go elsewhere; the engine decides
about another attempt. All of it runs in the event loop.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from shpool.engines.cluster import Lost
from shpool.engines.dask_border import words_of
from shpool.engines.dask_logbook import Record, read_logbook
from shpool.engines.dask_outpost import take_grant, take_parcel
from shpool.engines.dask_places import Member

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shpool.engines.cluster import Events
    from shpool.engines.dask_calls import Calls
    from shpool.engines.dask_link import Link
    from shpool.engines.dask_places import Placed
    from shpool.engines.parcels import Parcel

    Message = dict[str, Any]

logger = logging.getLogger(__name__)

_READ_WITHIN = 3.0  # s for a lost worker's logbook


class Workers:
    """The workers with an outpost of the pool's.

    Args:
        link: The connection.
        calls: What they run.
        events: What the engine is told.

    Attributes:
        capacity: How many calls can run at once; read in any thread.
    """

    def __init__(self, link: Link, calls: Calls, events: Events) -> None:
        self.capacity = 0
        self._link = link
        self._calls = calls
        self._places = calls.places
        self._events = events
        self._parcel: Parcel | None = None

    # What they are told

    def push(self, parcel: Parcel) -> None:
        """Bring a parcel to all that there are, and keep it for those to come."""
        self._parcel = parcel
        if self._places.members:
            self._bring(take_parcel, parcel.resealed(), list(self._places.members))

    def post(self, worker: str | None, note: bytes) -> None:
        """Bring a note to the gate of one, or of all."""
        addresses = list(self._places.members) if worker is None else [worker]
        if addresses:
            self._bring(take_grant, note, addresses)

    def _answer(self, message: Message) -> None:
        if self._parcel is not None:
            self._bring(take_parcel, self._parcel.resealed(message["clock"]), [message["ask"]])

    def _bring(self, function: Callable[[str, Any], None], thing: object, addresses: Sequence[str]) -> None:
        self._link.spawn(self._link.bring(function, thing, addresses))

    # What they tell, and what the scheduler tells of them

    def hear(self, event: tuple[float, Message]) -> None:
        """Heed what an outpost tells."""
        message = event[1]
        if "hello" in message:
            self.admit(message)
        elif "ask" in message:
            self._answer(message)
        elif "lease" in message:
            self._events.asked(message["lease"], message["note"])
        elif "refused" in message:
            self._events.refused(message["refused"])
        elif "bye" in message:
            self._part_with(message)
        elif "begun" in message:
            self._events.begun(message["begun"])

    def hear_of(self, event: tuple[float, Message]) -> None:
        """Heed what the scheduler tells of its workers."""
        message = event[1]
        if isinstance(message, dict) and message.get("action") == "remove-worker":
            self._dismiss(message)

    def admit(self, hello: Message) -> None:
        """Take in a worker, unless it is known, and bring it the token."""
        address = hello["hello"]
        if address not in self._places.members:
            self._places.members[address] = Member(
                address, hello["threads"], hello["pid"], hello["nanny"], hello["logbook"]
            )
            self.recount()
            self._calls.greet()
        self._events.joined(address)
        self._answer({"ask": address, "clock": hello["clock"]})

    def recount(self) -> None:
        """Tell the engine what room there is, beside the tasks of others."""
        self._places.count_strangers(self._link.strangers)
        self.capacity = self._places.capacity
        self._events.changed()

    def _part_with(self, bye: Message) -> None:
        member = self._places.members.get(bye["bye"])
        if member is not None:
            member.is_doomed, member.begun = True, list(bye["begun"])

    def _dismiss(self, message: Message) -> None:
        """Take a worker out, and with it what it had.

        What has begun goes again if it was sent away in order, as Dask's own tasks do then.
        """
        dismissed = self._places.dismiss(message["worker"])
        if dismissed is None:
            return
        member, calls = dismissed
        self._calls.forget(calls.values())  # at once: Dask would run them again on a worker of the same address
        self.recount()
        self._events.left(member.address)
        is_expected = bool(message.get("expected"))
        if not is_expected:
            self._events.lost_worker(member.pid)
        self._link.spawn(self._settle_loss(member, calls, is_expected=is_expected))

    async def _settle_loss(self, member: Member, calls: dict[int, Placed], *, is_expected: bool) -> None:
        """Tell what became of the calls of a worker that is gone; where nobody knows, all of them may have begun."""
        record = await self._record_of(member, list(calls))
        again = []
        for ticket, placed in calls.items():
            if record is not None and ticket in record.answers:
                self._calls.end(placed.call.number, record.answers[ticket])
            elif is_expected or (record is not None and ticket not in record.begun):
                again.append(placed)
            else:
                self._calls.end(placed.call.number, Lost(member.pid))
        self._calls.go_again(again)

    async def _record_of(self, member: Member, tickets: Sequence[int]) -> Record | None:
        """Have the nanny read the logbook; where it cannot, a worker that took its leave has told the most of it."""
        known = None if member.begun is None else Record(member.begun, {})
        if not member.logbook:
            return known
        seconds = _READ_WITHIN if known is None else _READ_WITHIN / 3
        outcome: Record | Exception | None = await self._link.ask(
            read_logbook, member.logbook, tickets, worker=member.nanny, seconds=seconds
        )
        if isinstance(outcome, Exception):  # the nanny may be gone with its host
            logger.debug("a lost worker's logbook cannot be read: %s", words_of(outcome))
            return known
        return outcome or known
