"""Leave to send one request, and what a gate must offer: the seam for gates of any kind."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from types import TracebackType

    from typing_extensions import Self

    from shpool.retry import RetryAfterUnit

    class Fields(Protocol):
        """Header fields of an answer: a mapping of names to values."""

        def get(self, name: str, /) -> str | None:
            """Return a field, None where there is none."""

        def items(self) -> Iterable[tuple[str, str]]:
            """Return names and values."""


_UNTOLD = 1.0  # s; a 429 that does not say how long, and one that says it by a date before that is read
_TOO_MANY, _UNAVAILABLE = 429, 503
_RETRY_AFTER = "retry-after"
_SPENT = "x-processingunits-spent"  # as Sentinel Hub and the Copernicus Data Space name it


class Terms(NamedTuple):
    """How a gate stands, for those who lease from it.

    Attributes:
        epoch: In which what it gives out is good; 0 while there is nothing to obey.
        not_before: When the pause ends, by its clock.
        is_rated: Requests are counted, so each needs a moment.
        has_units: Costs are counted.
        connections: Requests at once; 0 for no limit.
    """

    epoch: int
    not_before: float
    is_rated: bool
    has_units: bool
    connections: int


class AccountGate(Protocol):
    """What holds requests back; the one in shared memory, or what an engine brings elsewhere.

    Attributes:
        retry_after_unit: What a number in ``Retry-After`` counts, where an answer's ticket is not told.
    """

    retry_after_unit: RetryAfterUnit

    def acquire(self, cost: float = 1.0) -> Ticket:
        """Wait until one more request may be sent; return the leave to do so."""

    def try_acquire(self, cost: float = 1.0) -> Ticket:
        """Return a ticket at once; its ``due_in()`` tells when it may be used."""

    def advance(self, ticket: Ticket) -> float:
        """Return the seconds until a ticket may be used, or until it is worth another look; 0 once it may be."""

    def settle(self, ticket: Ticket, spent: float) -> None:
        """Count what a request has really cost in place of what was reckoned."""

    def pause(self, seconds: float, ticket: Ticket | None = None, *, learn: bool = False) -> None:
        """Let no request go for so long.

        Args:
            seconds: From now on.
            ticket: Of the request whose answer asked for it; echoes of one refusal are known by it.
            learn: The rate was too high.
        """

    def release(self, ticket: Ticket) -> None:
        """Take a ticket back: its request has ended, or is not to be sent. Harmless when repeated."""


class Ticket:
    """Leave to send one request, now or soon; a context manager that ends with the request.

    Attributes:
        cost: Processing units it was reckoned to cost; once it is settled, what it did cost.
        moment: When it may be used, None before that is known. Like the following, for the gate alone.
        epoch: In which that was so.
        slot: The connection slot it holds; -1 for none.
        number: Its turn in the queue; 0 before it has asked.
        place: In the queue; -1 for none.
        counts: What it moved when it was counted: the lane, its theoretical arrival time before, and after.
        counted: Until when its waiting is counted.
        waited: Whether it is counted among those that waited.
    """

    moment: float | None = None  # of the class, as these are until a gate says otherwise: a free gate never does
    epoch = 0
    slot = place = -1
    number = 0
    counts: Sequence[tuple[int, float, float]] = ()
    counted = 0.0
    waited = False

    def __init__(self, gate: AccountGate, cost: float) -> None:
        self._gate = gate
        self.cost = cost

    @property
    def is_connected(self) -> bool:
        """Tell whether it holds a connection slot, which is to be given back as soon as the body is read."""
        return self.slot >= 0

    def due_in(self) -> float:
        """Return the seconds until it may be used, or until this is worth another call; 0 once it may be."""
        return self._gate.advance(self)

    def settle(self, spent: float) -> None:
        """Count what the request has really cost, in processing units."""
        self._gate.settle(self, spent)

    def heed(self, status: int, fields: Fields, unit: RetryAfterUnit | None = None) -> None:
        """Do what an answer says: settle the cost, or pause everybody.

        Args:
            status: HTTP status.
            fields: Header fields; names compare without case.
            unit: What a number in ``Retry-After`` counts at this provider; None for what the gate says.
        """
        spent = _number(_field(fields, _SPENT))
        if spent is not None:
            self._gate.settle(self, spent)
        if status not in {_TOO_MANY, _UNAVAILABLE}:
            return
        text, learn = _field(fields, _RETRY_AFTER), status == _TOO_MANY
        seconds = _number(text)
        if seconds is not None:
            is_ms = (unit or self._gate.retry_after_unit) == "ms"
            self._gate.pause(seconds / 1000.0 if is_ms else seconds, self, learn=learn)
        elif learn or text:
            self._gate.pause(_UNTOLD, self, learn=learn)  # at once: what reads dates takes long to import
            self._heed_date(text)

    def _heed_date(self, text: str | None) -> None:
        """Make the pause as long as a date says; the gate knows this for an echo."""
        if text:
            from shpool.retry import parse_retry_after

            self._gate.pause(parse_retry_after(text, now=time.time()) or 0.0, self)

    def release(self) -> None:
        """Give it back: the request has ended. Harmless when repeated."""
        self._gate.release(self)

    def __reduce__(self) -> tuple[object, ...]:
        return type(None), ()  # leave is this process's alone; a request in an error that travels goes without

    def __del__(self) -> None:
        if self.slot >= 0 or self.number:  # forgotten, as by a request that failed
            self.moment = None  # it stays counted: that would take the gate's mutex, which this thread may have
            self._gate.release(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._gate.release(self)


class Unanswered(threading.local):
    """The ticket of the request a thread has sent and not heard of, where nobody tells when a request fails.

    So it is given back when the thread sends another, when its task has ended, and when the thread has.
    """

    _holder: _Holder | None = None

    def expect(self, ticket: Ticket) -> None:
        """Take note that an answer is to come."""
        self._holder = _Holder(ticket)  # whose end gives the former ticket back

    def has_come(self) -> None:
        """Leave the ticket to the answer."""
        if self._holder is not None:
            self._holder.ticket = None

    def give_back(self) -> None:
        """Expect no answer any more."""
        self._holder = None


class _Holder:
    def __init__(self, ticket: Ticket) -> None:
        self.ticket: Ticket | None = ticket

    def __del__(self) -> None:
        if self.ticket is not None:
            self.ticket.release()


unanswered = Unanswered()


def _field(fields: Fields, name: str) -> str | None:
    """Return a field by its name in lower case; a plain dict may hold it in another."""
    value = fields.get(name)
    if value is None and isinstance(fields, dict):
        value = next((other for key, other in fields.items() if key.lower() == name), None)
    return value


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if 0.0 <= number < float("inf") else None
