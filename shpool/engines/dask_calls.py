"""A pool's calls on Dask from their launch to their end; all of it in the event loop.

What waits at a worker behind calls that take long is taken back, and goes where there is room.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from shpool.engines.cluster import Unbegun
from shpool.engines.dask_border import words_of
from shpool.engines.dask_link import now
from shpool.engines.dask_logbook import TakenBack
from shpool.engines.dask_outpost import take_back
from shpool.engines.dask_places import STUCK_AFTER, Placed, Places
from shpool.engines.dask_sender import Sender

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from shpool.engines.cluster import Events
    from shpool.engines.dask_link import Link
    from shpool.engines.dask_places import Member
    from shpool.engines.sealed import Call

logger = logging.getLogger(__name__)

_ALONE_AFTER = 5.0  # s without any worker, while there is something to do, after which that is told


class Calls:
    """The calls.

    Args:
        link: The connection.
        events: What the engine is told.

    Attributes:
        places: Which call is where.
    """

    def __init__(self, link: Link, events: Events) -> None:
        self.places = Places()
        self._link = link
        self._events = events
        self._sender = Sender(link, self.end)
        self._is_alone = False  # there is something to do and no worker, which is told after a while
        self._is_minding = False  # a look at what waits at the workers is due
        self._marker: Any = None  # a task that shows a cluster which grows on demand that there is something to do

    def launch(self, calls: Sequence[Call]) -> None:
        """Take in calls, and send those that have a place."""
        for call in calls:
            self.places.add(call)
        self.place()
        self._sender.release()

    def place(self) -> None:
        """Send what there is a place for."""
        if self._link.client is None:
            return
        for address, group in self.places.place(now()).items():
            self._sender.send(address, group)
        if not self.places.members and self.places.numbers and not self._is_alone:
            self._is_alone = True
            self._marker = self._link.client.submit(int, key=self._link.key("wanted"), pure=False)
            asyncio.get_running_loop().call_later(_ALONE_AFTER, self._warn_if_alone)
        if self.places.has_calls_ahead and not self._is_minding:
            self._is_minding = True
            asyncio.get_running_loop().call_later(STUCK_AFTER / 2, self._mind_the_stuck)

    def greet(self) -> None:
        """Take note that there is a worker, and use it."""
        self._marker, self._is_alone = None, False
        self.place()

    def end(self, number: int, outcome: bytes | Exception) -> None:
        """Tell the end of a call, once; let go of its result."""
        placed = self.places.end(number, now())
        if placed is None:
            return
        self._sender.let_go(placed)
        self._events.ended(number, outcome)
        self.place()

    def drop(self, numbers: Iterable[int]) -> None:
        """Let go of calls: they are not to run any more, and nobody is told of them."""
        dropped = [self.places.end(number, now()) for number in numbers]
        self.forget(placed for placed in dropped if placed is not None)

    def forget(self, calls: Iterable[Placed]) -> None:
        """Have Dask forget calls that it has not done."""
        self._sender.cancel(calls)

    def release(self) -> None:
        """Have Dask forget the results of those that have ended."""
        self._sender.release()

    def go_again(self, calls: Sequence[Placed]) -> None:
        """Place calls anew that were taken from a worker, and have not begun."""
        self.places.hold(placed for placed in calls if not placed.is_unwanted)
        for placed in calls:
            if placed.is_unwanted:
                self.end(placed.call.number, Unbegun())
        self.place()

    async def take_back(self, member: Member, least: float) -> TakenBack | Exception:
        """Have a worker give back what it has not begun, and hold that; see ``Logbook.take_back``."""
        tickets = list(member.calls)
        outcome = await self._link.ask(take_back, self._link.pool, tickets, least, worker=member.address)
        if isinstance(outcome, Exception):
            return outcome
        answer = TakenBack(*outcome)
        calls = [member.calls[ticket] for ticket in answer.taken if ticket in member.calls]
        self.forget(calls)
        self.places.hold(calls)
        return answer

    def _warn_if_alone(self) -> None:
        if self._is_alone and self._link.client is not None:
            text = "tasks wait for a worker: no worker of %s has taken part for %.0f s; start one (dask worker %s)"
            logger.warning(text, self._link.address, _ALONE_AFTER, self._link.address)

    def _mind_the_stuck(self) -> None:
        self._is_minding = False
        for member in self.places.stuck(now()):
            self._link.spawn(self._relieve(member))
        self.place()

    async def _relieve(self, member: Member) -> None:
        """Take from a worker what waits there behind others, if these take long."""
        member.is_asked = True
        try:
            outcome = await self.take_back(member, STUCK_AFTER)
            if isinstance(outcome, Exception):  # it may be gone, or busy
                logger.debug("a worker cannot be asked what it has not begun: %s", words_of(outcome))
            else:
                member.is_stuck |= bool(outcome.taken)
        finally:
            member.is_asked, member.quiet_since = False, now()
        self.place()
