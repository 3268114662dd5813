"""What the driver's clock says, on a worker's host."""

from __future__ import annotations

import math

from shpool.engines.leases import DRIFT, LONGEST_LEAD

_LATENESS_MEMORY = 0.8  # of it that is left at the next message


class DriversClock:
    """What the driver's clock says, by this host's; see rule 3 of ``leases``."""

    def __init__(self) -> None:
        self.lateness = 0.0  # s that messages take beyond the quickest; the longest of late
        self._ahead = math.inf  # this host's clock less the driver's, and what the quickest message took
        self._at = 0.0

    def hear(self, sent: float, received: float, asked: float | None) -> None:
        """Take note of a message.

        Args:
            sent: The driver's clock.
            received: This host's.
            asked: This host's when it asked for it, None if it has not.
        """
        ahead = min(self._ahead + (received - self._at) * DRIFT, received - sent)
        if asked is not None and ahead < asked - sent:  # one of the two hosts has slept
            ahead = received - sent
        self._ahead, self._at = ahead, received
        self.lateness = min(max(received - sent - ahead, _LATENESS_MEMORY * self.lateness), LONGEST_LEAD)

    def here(self, moment: float) -> float:
        """Return a moment of the driver's by this host's clock."""
        return moment + self._ahead
