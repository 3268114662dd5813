"""The gate on a cluster: what the driver, which holds it, and the workers, which lease from it, tell each other.

The rules, and why they are so:

 1. The driver's gate is the only one that counts. It is the same as on one machine, so a pool on a cluster and one
    here can share it. A worker holds leases: moments at which a request may go, and connection slots.
 2. Moments are leased in blocks, as a message takes milliseconds: as many as wait for one, and as many more as the
    worker has used in the last quarter of a second. The driver stops a block at the first moment that is more than
    half a second ahead. So a worker that has stopped leaves no more than that unused, and nobody else waits for longer.
 3. A moment is of the driver's clock, and a worker reckons it by its own: the difference is the least that a message
    has taken, plus what the clocks may have drifted apart since. So a request goes late by the quickest message, and
    never early. A moment that nobody has taken when it is past by a twentieth of a second is void: blocks that come
    late would meet those of others, and together exceed the rate. So a worker says how late messages come at present,
    and its block begins no earlier than that.
 4. A slot is leased to a worker for five seconds and renewed each second. What the worker does not name as held is not
    renewed, so that a lost message, a lost worker or a driver that is gone costs five seconds and no slot; if the
    cluster tells that a worker is gone, its slots are free at once. A worker counts the five seconds from when it last
    asked, the driver from when it heard: the worker's end comes first. A request that lives on then is without a slot.
 5. Between requests a slot stays where it is for a moment, to spare two messages. If others wait, the driver says so,
    and slots come back with the end of each request, or after a tenth of a second where many in one process wait.
 6. A worker that is refused stops at once, and tells the driver, which tells all. Moments of before are void, as on one
    machine, by the number of the epoch; and by it the driver knows echoes of one refusal.
 7. What requests have cost, and how long they have waited, is told with the next question, or a quarter of a second
    later.
 8. A worker that has not been told the terms asks for them. Where nothing is limited, it is told so when it joins, and
    asks nothing ever after, until a refusal: then it keeps the pause itself, and asks from the first 429 on, as that
    may teach a rate.
 9. Questions are repeated each second, and whoever waits and hears nothing for ten gets an error.
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from shpool.gate import Terms

WITHIN = 0.5  # s; a block ends with the first moment beyond (rule 2)
RECENT = 0.25  # s whose use says how many moments to ask for
LONGEST_LEAD = 2.0  # s; where messages take longer than that, few moments are in time
LATEST = 0.05  # s after which a moment that nobody has taken is void (rule 3); as a gate's usual burst
DRIFT = 1e-3  # twice what clocks are steered by at most (adjtimex(2): 500 ppm)
LEASE = 5.0  # s (rule 4)
REPEAT = 1.0  # s between renewals, and between repeated questions
SLICE = 0.1  # s (rule 5)
LONGEST_SILENCE = 10.0  # s (rule 9)


class Ask(NamedTuple):
    """What a worker tells the driver.

    Attributes:
        clock: The worker's, when it asked.
        moments: How many it wants, by cost.
        slots: How many slots it waits for.
        held: Leases of slots to renew.
        returned: Leases of slots that it gives back.
        spent: Units beyond those reckoned, by epoch.
        waits: Requests that had to wait, since it last told.
        waited: Seconds they waited.
        pause: Seconds, epoch of the request, and whether to learn of it: a refusal.
        lead: Seconds that messages take at present beyond the quickest.
    """

    clock: float
    moments: tuple[tuple[float, int], ...] = ()
    slots: int = 0
    held: tuple[int, ...] = ()
    returned: tuple[int, ...] = ()
    spent: tuple[tuple[int, float], ...] = ()
    waits: int = 0
    waited: float = 0.0
    pause: tuple[float, int, bool] | None = None
    lead: float = 0.0

    @property
    def is_question(self) -> bool:
        """Tell whether an answer is waited for; an empty one asks for the terms."""
        return bool(self.moments or self.slots or self.held) or not (self.returned or self.spent or self.pause)

    def to_bytes(self) -> bytes:
        """Return it as it travels."""
        return pickle.dumps(tuple(self), protocol=5)

    @classmethod
    def from_bytes(cls, data: bytes) -> Ask:
        """Read what ``to_bytes`` wrote."""
        return cls(*pickle.loads(data))


class Grant(NamedTuple):
    """What the driver tells a worker.

    Attributes:
        serial: Number of the grant; terms older than those at hand are passed over.
        sent: The driver's clock.
        echo: The worker's clock in its last question, None if it has asked nothing.
        terms: How the gate stands.
        moments: Leased ones by cost, of the driver's clock.
        slots: Leases of slots that are new.
        held: All leases of slots that the worker has.
        is_wanted: Others wait for slots.
    """

    serial: int
    sent: float
    echo: float | None
    terms: Terms
    moments: tuple[tuple[float, tuple[float, ...]], ...] = ()
    slots: tuple[int, ...] = ()
    held: tuple[int, ...] = ()
    is_wanted: bool = False

    def to_bytes(self) -> bytes:
        """Return it as it travels."""
        return pickle.dumps(tuple(self), protocol=5)

    @classmethod
    def from_bytes(cls, data: bytes) -> Grant:
        """Read what ``to_bytes`` wrote."""
        return cls(*pickle.loads(data))
