"""The worker's side of leases: a gate that asks the driver's for moments and slots in advance (see ``leases``)."""

from __future__ import annotations

import contextlib
import math
import os
import queue
import random
import threading
import time
import weakref
from typing import TYPE_CHECKING

from shpool.checks import checked_number
from shpool.engines.drivers_clock import DriversClock
from shpool.engines.holdings import Moments, Slots
from shpool.engines.leases import LATEST, LEASE, LONGEST_SILENCE, RECENT, REPEAT, Ask, Grant
from shpool.errors import GateUnreachableError
from shpool.gate import Ticket
from shpool.gate.gate import LONGEST_PAUSE, SPREAD

if TYPE_CHECKING:
    from collections.abc import Callable

    from shpool.gate import Terms
    from shpool.retry import RetryAfterUnit

_NAP = 0.02  # s until a ticket that waits for an answer is worth another look; a thread that waits is woken before
_TICK = 0.1  # s between two rounds while there are slots or costs
_WAITS, _QUEUES = 1, 2  # numbers of tickets that have no moment: with a slot, or without
_NOTHING = (-1, 0)  # to take back
_UNKNOWN = -1  # the epoch between a refusal here and the driver's word


class LeasedGate:
    """Hold requests back as the driver's gate says, and ask it rarely. An ``AccountGate``.

    Args:
        tell: Sends an ``Ask`` to the driver; called in any thread, must not wait.
    """

    retry_after_unit: RetryAfterUnit = "s"

    def __init__(self, tell: Callable[[bytes], object], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._tell = tell
        self._clock = clock
        self._is_free = False  # nothing is to be obeyed: all that a request looks at then
        self._inbox: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()  # takes tickets back
        self._is_over = ""  # why nothing can be asked any more
        self._set_up()
        _gates.add(self)

    def _set_up(self) -> None:
        self._change = threading.Condition(threading.Lock())  # guards all that follows; notified of each grant
        self._thread: threading.Thread | None = None
        self._driver = DriversClock()
        self._serial = 0
        self._terms: Terms | None = None
        self._epoch = _UNKNOWN
        self._not_before = -math.inf  # by this host's clock
        self._heard = self._told = -math.inf  # when the driver last spoke, and was last asked
        self._is_answered = True
        self._least_epoch = 0  # whatever is of an earlier one was sent before a refusal was heard of
        self._moments = Moments()
        self._slots = Slots()
        self._waiting = self._queued = 0  # tickets without a moment, and among them those without a slot
        self._wanted = 0  # slots that were asked for and have not come
        self._spent: dict[int, float] = {}
        self._waits, self._waited = 0, 0.0

    # For requests; see ``AccountGate``

    def acquire(self, cost: float = 1.0) -> Ticket:
        """Wait until one more request may be sent; return the leave to do so.

        Args:
            cost: Processing units it will cost.

        Raises:
            ValueError: The cost is less than 0, or not finite.
            TypeError: It is no number.
            GateUnreachableError: The driver does not answer.
        """
        ticket = self.try_acquire(cost)
        try:
            while wait := self.advance(ticket):
                with self._change:
                    self._change.wait(wait)
        except BaseException:
            self.release(ticket)
            raise
        return ticket

    def try_acquire(self, cost: float = 1.0) -> Ticket:
        """Return a ticket at once; its ``due_in()`` tells when it may be used."""
        return Ticket(self, checked_number(cost, "cost"))

    def advance(self, ticket: Ticket) -> float:
        """Return the seconds until a ticket may be used, or until it is worth another look; 0 once it may be.

        Raises:
            GateUnreachableError: The driver does not answer.
        """
        if self._is_free:
            return 0.0
        with self._change:
            now = self._clock()
            if ticket.moment is not None and ticket.epoch == self._epoch:
                return max(0.0, ticket.moment - now)
            self._begin(ticket, now)
            moment = self._moment_for(ticket, now)
            if moment is None:
                self._check(ticket, now)
                return _NAP
            self._let_go(ticket, moment)
            return max(0.0, moment - now)

    def settle(self, ticket: Ticket, spent: float) -> None:
        """Count what a request has really cost in place of what was reckoned; the driver hears of it soon."""
        spent = checked_number(spent, "spent")
        more, ticket.cost = spent - ticket.cost, spent
        terms = self._terms
        if more and ticket.moment is not None and terms is not None and terms.has_units:
            with self._change:
                self._spent[ticket.epoch] = self._spent.get(ticket.epoch, 0.0) + more
            self._inbox.put(_NOTHING)

    def pause(self, seconds: float, ticket: Ticket | None = None, *, learn: bool = False) -> None:
        """Let no request go for so long: at once here, and a message later everywhere."""
        seconds = min(checked_number(seconds, "seconds"), LONGEST_PAUSE)
        with self._change:
            epoch = self._epoch if ticket is None else ticket.epoch
            until = self._clock() + seconds
            if epoch == self._epoch or until > self._not_before:
                self._not_before = max(until, self._not_before)
                self._least_epoch = max(self._least_epoch, self._epoch + 1)
                self._epoch, self._is_free = _UNKNOWN, False
                self._moments.clear()
            self._send(Ask(self._clock(), pause=(seconds, epoch, learn)))

    def release(self, ticket: Ticket) -> None:
        """Take a ticket back. Called by finalizers, in the midst of anything: so a thread does the rest."""
        if ticket.slot >= 0 or ticket.number:
            slot, number = ticket.slot, ticket.number
            ticket.slot, ticket.number = -1, 0
            self._inbox.put((slot, number))

    # Under the lock

    def _begin(self, ticket: Ticket, now: float) -> None:
        if self._is_over:
            raise GateUnreachableError(self._is_over)
        if not ticket.number:
            ticket.number, ticket.counted = _WAITS, ticket.counted or now
            self._waiting += 1
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="shpool-leases", daemon=True)
            self._thread.start()

    def _let_go(self, ticket: Ticket, moment: float) -> None:
        ticket.moment, ticket.epoch, ticket.number = moment, self._epoch, 0
        self._waiting -= 1
        if moment - ticket.counted > LATEST / 10:
            self._waits += not ticket.waited
            self._waited += moment - ticket.counted
            ticket.waited, ticket.counted = True, moment

    def _check(self, ticket: Ticket, now: float) -> None:
        if now - max(self._heard, ticket.counted) > LONGEST_SILENCE:
            reason = f"the pool's parent has not answered for {LONGEST_SILENCE:.0f} s"
            raise GateUnreachableError(reason)

    def _moment_for(self, ticket: Ticket, now: float) -> float | None:
        """Return when a ticket may be used; None while that is not known, which is asked for."""
        terms = self._terms
        if terms is None:
            self._ask(now)
            return None
        if terms.connections and ticket.slot < 0 and not self._take_slot(ticket, now):
            if ticket.number == _WAITS:
                ticket.number = _QUEUES
                self._queued += 1
            self._ask(now)
            return None
        if not terms.is_rated:
            return now if now >= self._not_before else self._not_before + random.uniform(0.0, SPREAD)  # noqa: S311 - no secret
        if self._epoch == _UNKNOWN:
            self._ask(now)
            return None
        return self._take_moment(ticket.cost, now)

    def _take_moment(self, cost: float, now: float) -> float | None:
        missing = self._moments.missing(cost, self._waiting, now, self._not_before)
        if missing:
            self._ask(now, cost, missing)
        return self._moments.take(cost, now)

    def _take_slot(self, ticket: Ticket, now: float) -> bool:
        lease = self._slots.take(now)
        if lease is None:
            return False
        self._queued -= ticket.number == _QUEUES
        ticket.slot, ticket.number = lease, _WAITS
        return True

    def _ask(self, now: float, cost: float = 1.0, count: int = 0) -> None:
        """Ask for what is missing, unless that was done a moment ago."""
        is_news = self._queued > self._wanted or (count > 0 and self._is_answered)
        if is_news or now - self._told >= REPEAT:
            self._report(now, ((cost, count),) if count else ())

    def _report(self, now: float, moments: tuple[tuple[float, int], ...] = ()) -> None:
        """Tell the driver all that it is to know."""
        ask = Ask(
            clock=now,
            moments=moments,
            slots=self._queued,
            held=self._slots.held,
            returned=tuple(self._slots.returned),
            spent=tuple(self._spent.items()),
            waits=self._waits,
            waited=self._waited,
            lead=self._driver.lateness,
        )
        self._slots.returned.clear()
        self._spent.clear()
        self._waits, self._waited = 0, 0.0
        if ask.is_question:
            self._told, self._is_answered, self._wanted = now, False, self._queued
        self._send(ask)

    def _send(self, ask: Ask) -> None:
        with contextlib.suppress(Exception):  # border: the cluster's own code; its silence is minded
            self._tell(ask.to_bytes())

    # What the driver tells

    def take(self, note: bytes) -> None:
        """Take a ``Grant``."""
        grant = Grant.from_bytes(note)
        with self._change:
            now = self._clock()
            self._driver.hear(grant.sent, now, grant.echo)
            self._heard = now
            self._is_answered |= grant.echo is not None and grant.echo >= self._told
            if grant.serial > self._serial:
                self._serial = grant.serial
                self._take_terms(grant.terms)
                self._slots.is_contended = grant.is_wanted
            if grant.echo is not None:
                self._take_slots(grant, grant.echo + LEASE, now)
            if grant.terms.epoch == self._epoch:
                for cost, moments in grant.moments:
                    self._moments.add(cost, map(self._driver.here, moments))
            self._change.notify_all()
        if self._slots:
            self._inbox.put(_NOTHING)

    def _take_terms(self, terms: Terms) -> None:
        if terms.epoch < self._least_epoch:
            return
        if terms.epoch != self._epoch:
            self._moments.clear()
            self._epoch = terms.epoch
        if terms.not_before:
            self._not_before = max(self._not_before, self._driver.here(terms.not_before))
        self._terms = terms
        self._is_free = not terms.epoch

    def _take_slots(self, grant: Grant, until: float, now: float) -> None:
        self._slots.renew(grant.held, until)
        self._slots.add(grant.slots, until, now)
        self._wanted = max(0, self._wanted - len(grant.slots))

    def close(self, reason: str = "the pool has ended") -> None:
        """Let nothing go any more that has not been let go."""
        with self._change:
            self._is_over = reason
            self._change.notify_all()
        self._inbox.put(None)

    def let_go(self) -> None:
        """In a forked child: ask nothing, as the way to the driver is the parent's."""
        self._set_up()
        self._is_over = "a forked child cannot ask the parent of the pool"

    # In the thread, which begins with the first request that must ask

    def _run(self) -> None:
        while True:
            with self._change:
                nap = _TICK if self._slots or self._slots.returned or self._spent else None
            with contextlib.suppress(queue.Empty):
                told = self._inbox.get(timeout=nap)
                if told is None:
                    return
                self._take_back(*told)
            with self._change:
                self._go_round(self._clock())

    def _take_back(self, lease: int, number: int) -> None:
        with self._change:
            self._waiting -= number > 0
            self._queued -= number == _QUEUES
            if self._slots.put(lease, self._clock()):
                self._change.notify_all()

    def _go_round(self, now: float) -> None:
        """Give back what lies idle; renew the rest, and tell what the driver does not know."""
        self._slots.tidy(now, is_wanted=self._queued > 0)
        silence = now - self._told
        if self._slots.returned or (self._spent and silence > RECENT) or (self._slots and silence > REPEAT):
            self._report(now)


def _let_go_all() -> None:
    for gate in list(_gates):
        gate.let_go()


_gates: weakref.WeakSet[LeasedGate] = weakref.WeakSet()
os.register_at_fork(after_in_child=_let_go_all)
