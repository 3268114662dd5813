"""What a leased gate holds of the driver's: moments at which requests may go, and connection slots (see ``leases``).

Decisions, no input and no output; all of it runs under the gate's lock. Times are of this host's clock.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from shpool.engines.leases import LATEST, RECENT, SLICE

if TYPE_CHECKING:
    from collections.abc import Iterable

_MOST_USES = 4096  # that are remembered; a block is never larger
_LINGER = 0.5  # s that a slot stays where nobody uses it


class Moments:
    """Moments, by what their requests cost, and how many are worth having."""

    def __init__(self) -> None:
        self._stock: dict[float, deque[float]] = {}
        self._uses: deque[float] = deque(maxlen=_MOST_USES)

    def add(self, cost: float, moments: Iterable[float]) -> None:
        """Put some into stock."""
        self._stock.setdefault(cost, deque()).extend(moments)

    def clear(self) -> None:
        """Let none be used any more."""
        self._stock.clear()

    def missing(self, cost: float, waiting: int, now: float, not_before: float) -> int:
        """Return how many to ask for, 0 while there are enough; forget those that are void.

        Args:
            cost: Of the requests.
            waiting: How many wait.
            now: The time.
            not_before: All earlier ones are void.
        """
        stock = self._stock.setdefault(cost, deque())
        while stock and stock[0] < max(now - LATEST, not_before):
            stock.popleft()
        while self._uses and self._uses[0] < now - RECENT:
            self._uses.popleft()
        uses = len(self._uses)
        return max(waiting, 1) + uses - len(stock) if len(stock) <= uses // 2 else 0

    def take(self, cost: float, now: float) -> float | None:
        """Use one; None if there is none."""
        stock = self._stock.get(cost)
        if not stock:
            return None
        self._uses.append(now)
        return stock.popleft()


class _Slot:
    """A leased connection slot.

    Attributes:
        until: When the lease ends, unless it is renewed.
        since: When it came here.
        idle_since: When it was last given back here.
    """

    __slots__ = ("idle_since", "since", "until")

    def __init__(self, until: float, now: float) -> None:
        self.until = until
        self.since = self.idle_since = now


class Slots:
    """Slots, by their leases.

    Attributes:
        returned: Leases of those to be given back, of which the driver has not been told.
        is_contended: Others wait for them.
    """

    def __init__(self) -> None:
        self.returned: list[int] = []
        self.is_contended = False
        self._slots: dict[int, _Slot] = {}
        self._idle: list[int] = []  # those that nobody uses

    def __bool__(self) -> bool:
        return bool(self._slots)

    @property
    def held(self) -> tuple[int, ...]:
        """The leases of all that are here."""
        return tuple(self._slots)

    def add(self, leases: Iterable[int], until: float, now: float) -> None:
        """Take in slots that the driver grants."""
        for lease in leases:
            self._slots[lease] = _Slot(until, now)
            self._idle.append(lease)

    def renew(self, leases: Iterable[int], until: float) -> None:
        """Let leases end later."""
        for lease in leases:
            if lease in self._slots:
                self._slots[lease].until = max(self._slots[lease].until, until)

    def take(self, now: float) -> int | None:
        """Use one that nobody uses; None if there is none."""
        while self._idle:
            lease = self._idle.pop()
            if self._slots[lease].until > now:
                return lease
            del self._slots[lease]
        return None

    def put(self, lease: int, now: float) -> bool:
        """Take note that one is not used any more; tell whether it is there for the next."""
        slot = self._slots.get(lease)
        if slot is None:
            return False
        slot.idle_since = now
        if self.is_contended and now - slot.since > SLICE:
            self._give_back(lease)
            return False
        self._idle.append(lease)
        return True

    def tidy(self, now: float, *, is_wanted: bool) -> None:
        """Give back what lies idle, or is not wanted here while others wait; forget what has ended."""
        for lease in list(self._idle):
            is_long = now - self._slots[lease].idle_since > _LINGER
            if is_long or (self.is_contended and not is_wanted):
                self._idle.remove(lease)
                self._give_back(lease)
        for lease, slot in list(self._slots.items()):
            if slot.until <= now and lease not in self._idle:
                del self._slots[lease]

    def _give_back(self, lease: int) -> None:
        del self._slots[lease]
        self.returned.append(lease)
