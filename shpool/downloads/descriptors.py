"""How many files and sockets a process may have open, and how many transfers that leaves room for.

Half of them are the transfers', two for each: a socket and the file. A quarter is left to the files that wait for the
disk (``press``), and a quarter to all else: idle connections, parts that wait for another attempt, the process itself.
"""

from __future__ import annotations

import resource

_LARGEST_QUARTER = 256  # of the usual limit of 1,024; neither of the two needs more where the limit is higher
_UNLIMITED = 1 << 30


def quarter() -> int:
    """Return how many descriptors one part of a process that is not the transfers may hold."""
    return min(_limit() // 4, _LARGEST_QUARTER)


def most_transfers() -> int:
    """Return how many transfers at once one process has descriptors for."""
    return max((_limit() - 2 * quarter()) // 2, 1)


def enough_for(transfers: int) -> int:
    """Return the limit, as ``ulimit -n`` takes it, that so many transfers need."""
    return 2 * transfers + 2 * min(transfers, _LARGEST_QUARTER)


def _limit() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _UNLIMITED if soft == resource.RLIM_INFINITY else soft
