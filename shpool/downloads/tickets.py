"""Tickets of the account's gate for transfers, without ever waiting for one: those under way must go on."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shpool.downloads.incoming import Incoming
    from shpool.gate import AccountGate, Ticket
    from shpool.retry import RetryAfterUnit


class TicketDesk:
    """Give files their tickets, one at a time.

    One alone waits for its moment: a hundred that wait would keep others from theirs.

    Args:
        gate: The gate; None lets all go.
        unit: What a number in ``Retry-After`` counts.

    Attributes:
        shut_until: Nothing is to be asked with the token before that, by ``time.monotonic``.
    """

    def __init__(self, gate: AccountGate | None, unit: RetryAfterUnit) -> None:
        self._gate = gate
        self._unit = unit
        self._next: Ticket | None = None
        self.shut_until = 0.0

    @property
    def is_shut(self) -> bool:
        """Tell whether nothing is to be begun now."""
        return self.shut_until > time.monotonic()

    def admit(self, incoming: Incoming) -> bool:
        """Give a file leave for its next request; tell whether that can be now."""
        if self._gate is None:
            return True
        self.take_back(incoming)  # that of the request which led here
        self._next = ticket = self._next or self._gate.try_acquire()
        if wait := ticket.due_in():
            self.shut_until = time.monotonic() + wait
            return False
        incoming.ticket, self._next = ticket, None
        return True

    def heed(self, incoming: Incoming) -> None:
        """Do what the answer to a file's request says."""
        if incoming.ticket is not None and incoming.answer is not None:
            incoming.ticket.heed(*incoming.answer, self._unit)

    @staticmethod
    def take_back(incoming: Incoming) -> None:
        """End a file's request."""
        if incoming.ticket is not None:
            incoming.ticket.release()
            incoming.ticket = None

    def close(self) -> None:
        """Give back the ticket that still waits."""
        if self._next is not None:
            self._next.release()
