"""The gate: what one account may do, shared by all processes that use it."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shpool.checks import checked_number
from shpool.errors import GateUnusableError
from shpool.gate.limits import Lane, Limits, Usage, cut_rate, grown_rate, preset, usual_burst
from shpool.gate.segment import (
    BUSY,
    CUT,
    CUT_AT,
    EPOCH,
    HAS_LOCKS,
    LAST,
    LEASED,
    NO_LOCKS,
    NOT_BEFORE,
    PASSED,
    PAUSES,
    REFUSALS,
    REQUESTS,
    UNITS,
    WAITED,
    WAITS,
    Segment,
    anonymous_segment,
    named_segment,
    own_descriptor,
)
from shpool.gate.ticket import Terms, Ticket

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

    from shpool.retry import RetryAfterUnit

    Lanes = list[tuple[int, Lane, float]]  # a lane's word, the lane, and what a ticket costs there

logger = logging.getLogger(__name__)

LONGEST_PAUSE = 120.0  # s; a server that asks for more is asked again then, as by the HTTP client and downloads
_WORTH_A_WARNING = 10.0  # s of a pause
SPREAD = 1.0  # s over which those who wait come back after a pause, where no rate keeps them apart
_AHEAD = 0.25  # s; no moment is given out earlier than that: rule 2 of the limits
_LEASED_FOR = 2.0  # s since moments were last given out in advance
_NAP = 0.002  # s between two looks of the first who waits for a slot; the others take their time
_LONG_NAP = 0.02  # s
_LONGEST_NAP = 0.1  # s; of those who wait for a moment: well within _AHEAD, so none is missed when others give up
_LONGEST_SLEEP = 0.5  # s; after that who waits looks whether the gate is still open
_WORTH_COUNTING = 1e-3  # s; a shorter wait is not counted as one


@dataclass(frozen=True)
class GateStats:
    """How a gate stands.

    Attributes:
        requests: The limit of requests per second; None for none.
        units: Processing units per second; None for none.
        connections: Requests at once; None for none.
        learned: Requests per second that refusals have taught, where no limit was given; None for none.
        connected: Connection slots that are taken.
        waits: Requests that had to wait.
        waited: Seconds they waited in all.
        refusals: Answers 429 that were heeded; those to one burst of requests count once.
        pauses: Times a server asked everybody to wait.
        paused_for: Seconds that a pause goes on still.
    """

    requests: float | None
    units: float | None
    connections: int | None
    learned: float | None
    connected: int
    waits: int
    waited: float
    refusals: int
    pauses: int
    paused_for: float


class Gate:
    """Hold requests back so that an account's limits are kept, by all processes together.

    The limits belong to the account, so everybody who uses it must go through the same gate: the workers of a pool
    that was given it, several pools that were given it, and, with a name, other processes of this user.

        with current_session().gate.acquire(cost=2):
            ...

    Without any limit it is a free gate: it lets everything go, until a server refuses a request; then it learns.

    Args:
        requests: Most requests in a time, as ``"300/min"``; units are s, min, h and day. None for no limit.
        units: Most processing units in a time; likewise.
        connections: Most requests at once. None for no limit.
        burst: Requests that may go at once after a silence; None for what the rate allows in a twentieth of a second,
            at least 1. Servers whose bucket is larger may be given more.
        name: Share it with other processes of this user that give the same name and the same limits.

    Raises:
        ValueError: A limit is no such text or number, or out of range.
        GateInUseError: Running processes share the name with other limits.
        GateUnusableError: The shared memory cannot be used, or the system lacks the locks that limits need.

    Attributes:
        retry_after_unit: What a number in ``Retry-After`` counts, where ``ticket.heed`` is not told; a shared session
            sets it to what its provider counts, ``s`` or ``ms``.
    """

    retry_after_unit: RetryAfterUnit = "s"

    def __init__(
        self,
        requests: str | None = None,
        units: str | None = None,
        connections: int | None = None,
        *,
        burst: float | None = None,
        name: str | None = None,
        _clock: Callable[[], float] = time.monotonic,
        _sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        limits = Limits.parse(requests, units, connections, burst)
        if not (HAS_LOCKS or limits.are_none):
            raise GateUnusableError(name or "", NO_LOCKS)
        segment = anonymous_segment(limits, _clock()) if name is None else named_segment(name, limits, _clock())
        self._set_up(segment, _clock, _sleep)

    def _set_up(
        self,
        segment: Segment,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._segment = segment
        self._limits = segment.limits
        self._clock = clock
        self._sleep = sleep
        self._end = weakref.finalize(self, _close, segment, os.getpid())
        _gates.add(self)

    @classmethod
    def preset(cls, preset_name: str, **changes: Any) -> Self:  # noqa: ANN401 - as __init__
        """Return a gate with the limits of a provider: ``cdse`` or ``sentinelhub``.

        Args:
            preset_name: Of the provider.
            **changes: Arguments that replace the preset's.

        Raises:
            ValueError: There is no such preset.
        """
        return cls(**{**preset(preset_name), **changes})

    @classmethod
    def _attached(cls, segment: Segment) -> Self:
        self = cls.__new__(cls)
        self._set_up(segment)
        return self

    def acquire(self, cost: float = 1.0) -> Ticket:
        """Wait until one more request may be sent, and return the leave to do so, a context manager.

        Args:
            cost: Processing units it will cost, as far as that is known.

        Raises:
            ValueError: The cost is less than 0 or not finite, or the gate is closed, maybe while this waits.
            TypeError: It is no number.
        """
        ticket = self.try_acquire(cost)
        try:
            while wait := self.advance(ticket):
                self._sleep(min(wait, _LONGEST_SLEEP))
        except BaseException:
            self.release(ticket)
            raise
        return ticket

    def try_acquire(self, cost: float = 1.0) -> Ticket:
        """Return a ticket at once; its ``due_in()`` tells when it may be used, and it keeps its turn until then.

        Args:
            cost: As for ``acquire``.
        """
        return Ticket(self, checked_number(cost, "cost"))

    def advance(self, ticket: Ticket) -> float:
        """Return the seconds until a ticket may be used, or until it is worth another look; 0 once it may be."""
        epoch = self._segment.integers[EPOCH]
        if not epoch:
            return 0.0
        now = self._clock()
        if ticket.moment is not None:
            if ticket.epoch == epoch:
                if ticket.moment > now:
                    self._segment.check_open()
                return max(0.0, ticket.moment - now)
            self._withdraw(ticket)
        ticket.counted = ticket.counted or now
        with self._segment as segment:
            ticket.number = ticket.number or segment.next_number()
            lanes = self._lanes(ticket, now)
            wait = self._wait_in_queue(ticket, lanes, now)
            if wait:
                ticket.place = segment.stay(ticket.number, ticket.place, now)
                return wait
            if ticket.place >= 0:
                self._leave_queue(ticket)
            self._give_moment(ticket, lanes, now)
        assert ticket.moment is not None
        return max(0.0, ticket.moment - now)

    def _wait_in_queue(self, ticket: Ticket, lanes: Lanes, now: float) -> float:
        """Return how long to wait before another look, 0 for a ticket whose turn has come; it has its slot then."""
        segment = self._segment
        before = segment.waiting_before(ticket.number, now)
        moment = _earliest(lanes, max(now, segment.floats[NOT_BEFORE]))
        # Leases take moments further ahead; who waited for one that is nearer would wait for ever.
        is_leased = now - segment.floats[LEASED] < _LEASED_FOR
        too_early = moment - now - _AHEAD if (lanes or self._limits.connections) and not is_leased else 0.0
        if not before and too_early <= _WORTH_COUNTING:
            if not self._limits.connections:
                return 0.0
            ticket.slot = segment.take_slot(now)
            if ticket.slot >= 0:
                return 0.0
        too_early += before * max((cost / lane.rate for _, lane, cost in lanes), default=0.0)
        return min(max(too_early, min(_NAP * (before + 1), _LONG_NAP)), _LONGEST_NAP)

    def _give_moment(self, ticket: Ticket, lanes: Lanes, now: float) -> None:
        """Say when a ticket may be used, and count it at that moment (rule 2 of the limits); under the mutex."""
        floats = self._segment.floats
        moment = _earliest(lanes, max(now, floats[NOT_BEFORE]))
        if not lanes and moment > now:
            moment += _spread()
        counts = []
        for word, lane, cost in lanes:
            tat = lane.tat_after(moment, cost)
            counts.append((word, lane.tat, tat))
            self._segment.store_tat(word, tat)
        ticket.counts = counts
        if math.isinf(self._limits.requests):
            self._note_usage(min(ticket.counted, moment), moment, now)
        if moment - ticket.counted > _WORTH_COUNTING:
            floats[WAITS] += not ticket.waited
            floats[WAITED] += moment - ticket.counted
            ticket.waited, ticket.counted = True, moment
        ticket.moment, ticket.epoch = moment, self._segment.integers[EPOCH]

    def _note_usage(self, asked: float, moment: float, now: float) -> None:
        """Note what goes, from which a rate may have to be learned, or forgotten."""
        floats = self._segment.floats
        floats[PASSED], floats[BUSY], floats[LAST] = self._usage().with_one(asked, moment)
        if floats[CUT] and self._learned(now) is None:
            floats[CUT] = 0.0

    def _usage(self) -> Usage:
        floats = self._segment.floats
        return Usage(floats[PASSED], floats[BUSY], floats[LAST])

    def _withdraw(self, ticket: Ticket) -> None:
        """Give the slot of a ticket that is to queue again to those before it: they could not go while it waits."""
        self._free_slot(ticket)
        ticket.moment = None

    def _free_slot(self, ticket: Ticket) -> None:
        slot, ticket.slot = ticket.slot, -1
        self._segment.free_slot(slot)

    def _leave_queue(self, ticket: Ticket) -> None:
        place, ticket.place = ticket.place, -1
        self._segment.leave_queue(place)

    def _lanes(self, ticket: Ticket, now: float) -> Lanes:
        """Return the rates a ticket is counted in: the lane's word, the lane, and what the ticket costs there."""
        lanes: Lanes = []
        requests = self._requests_lane(now)
        if requests is not None:
            lanes.append((REQUESTS, requests, 1.0))
        if self._limits.units < math.inf:
            lanes.append((UNITS, self._segment.lane(UNITS), ticket.cost))
        return lanes

    def _requests_lane(self, now: float) -> Lane | None:
        """Return the lane of requests, at the rate that was given or learned; None without one."""
        if self._limits.requests < math.inf:
            return self._segment.lane(REQUESTS)
        learned = self._learned(now)
        if learned is None:
            return None
        floats, burst = self._segment.floats, usual_burst(learned)
        latest = max(floats[LAST], floats[NOT_BEFORE]) + burst / learned  # whatever the rate was when that was counted
        return Lane(learned, burst, min(self._segment.lane(REQUESTS).tat, latest))

    def _units_lane(self) -> Lane | None:
        return self._segment.lane(UNITS) if self._limits.units < math.inf else None

    def _learned(self, now: float) -> float | None:
        """Return the rate that refusals have taught, None where they have not."""
        cut, at = self._segment.floats[CUT], self._segment.floats[CUT_AT]
        return grown_rate(cut, max(0.0, now - at), self._usage().rate(now)) if cut else None

    def settle(self, ticket: Ticket, spent: float) -> None:
        """Count what a request has really cost in place of what was reckoned.

        A refund of what was reckoned before a pause is void with all else of before.

        Raises:
            ValueError: It is less than 0, or not finite.
            TypeError: It is no number.
        """
        spent = checked_number(spent, "spent")
        more, ticket.cost = spent - ticket.cost, spent
        if not more or ticket.moment is None:
            return
        with self._segment:
            units = self._units_lane()
            if units is not None and (more > 0 or ticket.epoch == self._segment.integers[EPOCH]):
                tat = max(units.tat, ticket.moment) if more > 0 else units.tat
                self._segment.store_tat(UNITS, tat + more / units.rate)

    def pause(self, seconds: float, ticket: Ticket | None = None, *, learn: bool = False) -> None:
        """Let no request go for so long, in any process; those that wait are spread behind it.

        Args:
            seconds: From now on; at most 120.
            ticket: Of the request whose answer asked for it. Refusals of requests that were sent before an earlier
                one was heard are its echoes: they may make the pause longer, and teach nothing.
            learn: The rate was too high.

        Raises:
            ValueError: The seconds are less than 0, or not finite.
            TypeError: They are no number.
        """
        seconds = min(checked_number(seconds, "seconds"), LONGEST_PAUSE)
        now = self._clock()
        until = now + seconds
        with self._segment:
            is_news = ticket is None or ticket.epoch == self._segment.integers[EPOCH]
            if is_news:
                self._note_refusal(now, learn=learn)
            if is_news or until > self._segment.floats[NOT_BEFORE]:
                self._hold_until(until, now)
        if is_news:
            level = logging.WARNING if seconds >= _WORTH_A_WARNING else logging.INFO
            logger.log(level, "the account pauses: no request goes for %.1f s", seconds)

    def _note_refusal(self, now: float, *, learn: bool) -> None:
        floats = self._segment.floats
        floats[PAUSES] += 1.0
        floats[REFUSALS] += learn
        if learn and math.isinf(self._limits.requests):
            floats[CUT] = cut_rate(self._learned(now), self._usage().rate(now)) or 0.0
            floats[CUT_AT] = now

    def _hold_until(self, until: float, now: float) -> None:
        """Begin an epoch in which nothing goes before that moment, and all buckets are empty then."""
        floats = self._segment.floats
        floats[NOT_BEFORE] = until = max(until, floats[NOT_BEFORE])
        self._segment.integers[EPOCH] += 1
        for word, lane in ((REQUESTS, self._requests_lane(now)), (UNITS, self._units_lane())):
            if lane is not None:
                self._segment.store_tat(word, lane.tat_if_empty(until))

    def release(self, ticket: Ticket) -> None:
        """Take a ticket back: its request has ended, or is not to be sent. Harmless when repeated.

        One whose moment is still to come is counted no more, unless others were given theirs behind it.
        """
        if ticket.place >= 0:
            self._leave_queue(ticket)
        if ticket.slot >= 0:
            self._free_slot(ticket)
        ticket.number = 0
        if ticket.moment is not None and ticket.moment > self._clock():
            self._count_no_more(ticket)

    def _count_no_more(self, ticket: Ticket) -> None:
        with contextlib.suppress(ValueError), self._segment as segment:
            is_void = ticket.epoch != segment.integers[EPOCH]
            for word, before, after in [] if is_void else ticket.counts:
                if segment.lane(word).tat == after:
                    segment.store_tat(word, before)
        ticket.counts = []

    # For an engine that leases to workers elsewhere

    def terms(self) -> Terms:
        """Return how it stands, for those who lease from it."""
        floats, limits = self._segment.floats, self._limits
        has_units = limits.units < math.inf
        is_rated = limits.requests < math.inf or has_units or floats[REFUSALS] > 0
        return Terms(self._segment.integers[EPOCH], floats[NOT_BEFORE], is_rated, has_units, limits.connections)

    def reserve(self, most: int, cost: float, within: float, lead: float = 0.0) -> tuple[int, list[float]]:
        """Give out moments in advance, at least one; return the epoch, and them, by this gate's clock.

        Args:
            most: How many.
            cost: Processing units of each.
            within: Seconds between the first and the last, and no more than one step beyond.
            lead: Seconds from now until the first.
        """
        now, moments = self._clock() + lead, list[float]()
        with self._segment:
            self._segment.floats[LEASED] = now
            while not moments or (len(moments) < most and moments[-1] <= now + within):
                ticket = Ticket(self, cost)
                ticket.counted = math.inf  # whoever uses it tells what it waited
                self._give_moment(ticket, self._lanes(ticket, now), now)
                assert ticket.moment is not None
                moments.append(ticket.moment)
            return self._segment.integers[EPOCH], sorted(moments)

    def occupy(self, ticket: Ticket) -> float:
        """Give a ticket a connection slot and nothing else; return the seconds until another look, 0 if it has it."""
        now = self._clock()
        with self._segment as segment:
            ticket.number = ticket.number or segment.next_number()
            before = segment.waiting_before(ticket.number, now)
            ticket.slot = -1 if before else segment.take_slot(now)
            if ticket.slot >= 0:
                self._leave_queue(ticket)
                return 0.0
            ticket.place = segment.stay(ticket.number, ticket.place, now)
        return min(_NAP * (before + 1), _LONG_NAP)

    def has_queue(self) -> bool:
        """Tell whether somebody queues."""
        return self._segment.count_waiting(self._clock()) > 0

    def count_waits(self, waits: int, waited: float) -> None:
        """Add what those who lease have waited."""
        with self._segment:
            self._segment.floats[WAITS] += waits
            self._segment.floats[WAITED] += waited

    def stats(self) -> GateStats:
        """Return how the gate stands; without its mutex, so numbers of one moment may differ by a request."""
        floats, limits, now = self._segment.floats, self._limits, self._clock()
        return GateStats(
            requests=_finite(limits.requests),
            units=_finite(limits.units),
            connections=limits.connections or None,
            learned=self._learned(now),
            connected=self._segment.taken,
            waits=int(floats[WAITS]),
            waited=floats[WAITED],
            refusals=int(floats[REFUSALS]),
            pauses=int(floats[PAUSES]),
            paused_for=max(0.0, floats[NOT_BEFORE] - now),
        )

    def __repr__(self) -> str:
        name = f" {self._segment.name!r}" if self._segment.name else ""
        now = self.stats()
        learned = f", learned {now.learned:.3g} requests/s" if now.learned is not None else ""
        paused = f", paused for {now.paused_for:.1f} s" if now.paused_for else ""
        return f"<Gate{name} {self._limits}{learned}{paused}>"

    def held_anew(self) -> Gate:
        """Return a gate of its own over the same memory; closing either leaves the other as it is.

        Raises:
            ValueError: This one is closed.
        """
        self._segment.check_open()
        segment = Segment(own_descriptor(self._segment.descriptor), self._segment.name)
        segment.be_present()
        other = Gate._attached(segment)
        other.retry_after_unit = self.retry_after_unit
        return other

    def handle(self) -> GateHandle:
        """Return what a worker joins with; it pickles only while a process is being spawned."""
        return GateHandle(self._segment.descriptor)

    @property
    def is_closed(self) -> bool:
        """Tell whether this process has let go of it."""
        return self._segment.is_closed

    def close(self) -> None:
        """Let go of it; other processes go on, and so do pools that were given it. Harmless when repeated."""
        self._end()

    def _start_anew(self) -> None:
        self._segment.reopen()
        self._end.detach()
        self._end = weakref.finalize(self, _close, self._segment, os.getpid())


class GateHandle:
    """Carries a gate's descriptor to a process being spawned, and becomes a ``Gate`` there."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __reduce__(self) -> tuple[Callable[..., Gate], tuple[object, ...]]:
        from multiprocessing.reduction import DupFd  # here: the login need not wait for it

        return _join_handed_over, (DupFd(self._descriptor),)


def _join_handed_over(duplicate: Any) -> Gate:  # noqa: ANN401 - multiprocessing's DupFd has no type
    handed_over = duplicate.detach()
    try:
        segment = Segment(own_descriptor(handed_over))
    finally:
        os.close(handed_over)
    segment.be_present()
    return Gate._attached(segment)  # noqa: SLF001 - this module's own class


def _close(segment: Segment, owner: int) -> None:
    if os.getpid() == owner and segment.descriptor >= 0:
        segment.close()


def _earliest(lanes: Lanes, moment: float) -> float:
    """Return the first moment from the given one on that all lanes allow."""
    for _, lane, _ in lanes:
        moment = lane.earliest(moment)
    return moment


def _spread() -> float:
    """Return a random wait, lest all come back at once; random itself takes long to import."""
    return int.from_bytes(os.urandom(4), "big") / 2**32 * SPREAD


def _finite(rate: float) -> float | None:
    return None if math.isinf(rate) else rate


def _start_anew() -> None:
    for gate in list(_gates):
        gate._start_anew()  # noqa: SLF001 - this module's own class


_gates: weakref.WeakSet[Gate] = weakref.WeakSet()
os.register_at_fork(after_in_child=_start_anew)
