"""Limits as people write them, and the arithmetic of rates. Pure: no clock, no memory, no lock.

The rules:

 1. A rate is kept by the generic cell rate algorithm (GCRA, ITU-T I.371): one number for each limit, the
    theoretical arrival time (TAT) of the next request if all came evenly spaced. It says what a leaky bucket does, yet
    nothing has to run for it to refill, and one store of eight bytes moves it on: whoever dies leaves it whole.
 2. A request is given the earliest moment at which every limit, and the pause, lets it go; all limits then count it at
    that moment. No moment is given out further ahead than a quarter of a second: who would have to wait longer queues
    (rule 8 of the segment). So moments go in the order in which they are asked for, none starves, and who dies or
    gives up takes at most one moment along. That much ahead, so that sleepers who wake late miss none of theirs. Who
    gives its moment back before it has come takes its count out again, where nobody was counted after it. Only leases
    to a cluster's workers go further ahead; while there are any, nobody here waits to come near, or it never would.
 3. ``burst`` requests may go at once after a silence; the default is what the rate allows in a twentieth of a second.
    That makes up for sleepers that wake late. More would be credit, which a server that counts otherwise may not give:
    "unused processing units and requests do not accumulate" (Sentinel Hub, Rate limiting).
 4. A cost beyond the burst is paid afterwards: the request goes as soon as what came before is paid for, and what
    comes next waits the longer. Nothing is too dear to go at all.
 5. A pause empties every bucket at its end: what was reckoned before is void, as the server knows better; and after
    it requests go at the rate, without a burst.
 6. Where no rate was given, refusals teach one: a refusal cuts it to 70 % of what the server took until then, and
    without one it grows by as much as doubles it in 15 s (additive increase, multiplicative decrease: Chiu and Jain
    1989). What waits follows it: no wait is reckoned at a rate of before. A rate that was given is kept to as it is.
 7. What the server took is counted over busy time: from when somebody asked to its moment, so pauses count, and at most
    a second of each silence in which nobody asked. It is what went lately: both counts are halved from 10 s on. Fewer
    than 8 requests tell nothing.
 8. A rate that has grown to 8 times what is used is forgotten: it holds nobody back.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

MOST_CONNECTIONS = 1024
_BURST_SECONDS = 0.05  # s; rule 3
_RATE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*/\s*([a-z]+)\s*")
_SECONDS = {
    **dict.fromkeys(("s", "sec", "second"), 1.0),
    **dict.fromkeys(("m", "min", "minute"), 60.0),
    **dict.fromkeys(("h", "hour"), 3600.0),
    **dict.fromkeys(("d", "day"), 86400.0),
}
_HIGHEST = 1e6  # per second; far beyond what one machine sends

_CUT = 0.7
_DOUBLES_IN = 15.0  # s
_LEAST = 1 / 60  # per second: what a learned rate never falls below
_LEAST_SPAN = 1.0  # s in which what a server took is measured, lest a burst passes for a rate
_LONGEST_IDLE = 1.0  # s; rule 7, as the following
_WINDOW = 10.0  # s
_LEAST_SAMPLE = 8.0  # requests
_FORGOTTEN_AT = 8.0  # times what is used; rule 8


def parse_rate(text: str, name: str = "rate") -> float:
    """Return a rate per second.

    Args:
        text: A number and a unit, as in ``300/min``: s, min, h or day.
        name: What to call it in errors.

    Raises:
        ValueError: It is no such text, or not more than 0.

    >>> parse_rate("300/min"), parse_rate("2.5/s")
    (5.0, 2.5)
    """
    match = _RATE.fullmatch(text) if isinstance(text, str) else None
    seconds = _SECONDS.get(match[2]) if match else None
    if match is None or seconds is None:
        msg = f"{name} must be a number a time, such as '300/min', '5/s' or '1000/h', not {text!r}"
        raise ValueError(msg)
    rate = float(match[1]) / seconds
    if not 0 < rate <= _HIGHEST:
        msg = f"{name} must be more than 0 and at most {_HIGHEST:.0f}/s, not {text!r}"
        raise ValueError(msg)
    return rate


@dataclass(frozen=True)
class Limits:
    """What an account may do.

    Attributes:
        requests: Requests per second; infinite for no limit.
        units: Processing units per second; infinite for no limit.
        connections: Requests at once; 0 for no limit.
        burst: Requests at once after a silence.
        units_burst: Units at once after a silence.
    """

    requests: float = math.inf
    units: float = math.inf
    connections: int = 0
    burst: float = 1.0
    units_burst: float = 1.0

    @classmethod
    def parse(
        cls,
        requests: str | None = None,
        units: str | None = None,
        connections: int | None = None,
        burst: float | None = None,
    ) -> Limits:
        """Return limits; see ``Gate`` for the arguments.

        Raises:
            ValueError: One is out of range.
            TypeError: One is of another type.
        """
        requests_rate = math.inf if requests is None else parse_rate(requests, "requests")
        units_rate = math.inf if units is None else parse_rate(units, "units")
        if burst is not None and requests is None:
            msg = "burst goes with requests: it says how many may go at once after a silence"
            raise ValueError(msg)
        return cls(
            requests_rate,
            units_rate,
            _checked_connections(connections),
            usual_burst(requests_rate) if burst is None else _checked_burst(burst),
            usual_burst(units_rate),
        )

    def __str__(self) -> str:
        parts = [
            *([f"{self.requests:g} requests/s"] if self.requests < math.inf else []),
            *([f"{self.units:g} units/s"] if self.units < math.inf else []),
            *([f"{self.connections} connections"] if self.connections else []),
        ]
        return ", ".join(parts) or "no limits"

    @property
    def are_none(self) -> bool:
        """Tell whether nothing is limited."""
        return math.isinf(self.requests) and math.isinf(self.units) and not self.connections


def usual_burst(rate: float) -> float:
    """Return how many may go at once where nothing was said (rule 3).

    >>> usual_burst(5.0), usual_burst(50.0), usual_burst(2000.0)
    (1.0, 2.5, 100.0)
    """
    return 1.0 if math.isinf(rate) else max(1.0, rate * _BURST_SECONDS)


# Copernicus Data Space: documentation.dataspace.copernicus.eu, Quotas: 4 concurrent connections for general users
# (429 "Max session number 4 exceeded"), Sentinel Hub APIs 300 requests/min and 300 processing units/min.
# Sentinel Hub: www.sentinel-hub.com/pricing: 300 requests/min and 300 processing units/min in the smallest plan.
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "cdse": MappingProxyType({"requests": "300/min", "units": "300/min", "connections": 4}),
        "sentinelhub": MappingProxyType({"requests": "300/min", "units": "300/min"}),
    }
)


def preset(name: str) -> Mapping[str, Any]:
    """Return the arguments of ``Gate`` that stand for a provider's limits.

    Raises:
        ValueError: No preset has that name.
    """
    if name not in PRESETS:
        msg = f"no gate {name!r}; there are {', '.join(PRESETS)}"
        raise ValueError(msg)
    return PRESETS[name]


class Lane(NamedTuple):
    """One rate, as it stands.

    Attributes:
        rate: Per second; infinite for no limit.
        burst: How many may go at once after a silence.
        tat: The theoretical arrival time of the next request.
    """

    rate: float
    burst: float
    tat: float = 0.0

    def earliest(self, now: float) -> float:
        """Return the first moment from now on at which a request may go.

        >>> Lane(rate=2.0, burst=1.0, tat=10.5).earliest(10.0), Lane(rate=2.0, burst=3.0, tat=10.5).earliest(10.0)
        (10.5, 10.0)
        """
        return max(now, self.tat - (self.burst - 1.0) / self.rate)

    def tat_after(self, moment: float, cost: float) -> float:
        """Return the theoretical arrival time after a request of that cost at that moment."""
        return max(self.tat, moment) + cost / self.rate

    def tat_if_empty(self, moment: float) -> float:
        """Return the theoretical arrival time that lets one request go at that moment, and then the rate (rule 5)."""
        return moment + (self.burst - 1.0) / self.rate


class Usage(NamedTuple):
    """What the server took lately (rule 7).

    Attributes:
        passed: Requests that went.
        busy: Seconds of busy time in which they did.
        last: The last one's moment; 0 for none.
    """

    passed: float = 0.0
    busy: float = 0.0
    last: float = 0.0

    def with_one(self, asked: float, moment: float) -> Usage:
        """Return it with one request more.

        Args:
            asked: When somebody asked to send it.
            moment: When it may go.

        >>> Usage(passed=3, busy=2.0, last=10.0).with_one(asked=600.0, moment=600.5)
        Usage(passed=4.0, busy=3.5, last=600.5)
        """
        busy = self.busy + self._busy_until(asked, moment)
        fading = 0.5 if busy > _WINDOW and self.passed > 2 * _LEAST_SAMPLE else 1.0
        return Usage(self.passed * fading + 1.0, busy * fading, max(self.last, moment))

    def rate(self, now: float) -> float | None:
        """Return requests per second of busy time, None where too few went to tell."""
        if self.passed < _LEAST_SAMPLE:
            return None
        return self.passed / max(self.busy + self._busy_until(now, now), _LEAST_SPAN)

    def _busy_until(self, asked: float, moment: float) -> float:
        if not self.last:
            return 0.0
        idle = max(0.0, asked - self.last)
        return min(idle, _LONGEST_IDLE) + max(0.0, moment - max(asked, self.last))


def cut_rate(learned: float | None, taken: float | None) -> float | None:
    """Return the rate after a refusal (rule 6), None where nothing is known of one.

    Args:
        learned: The rate it came at, per second; None where none was known.
        taken: What the server took; None where that is not known.

    >>> cut_rate(None, taken=10.0)
    7.0
    """
    known = [rate for rate in (learned, taken) if rate is not None]
    return max(_CUT * min(known), _LEAST) if known else None


def grown_rate(cut: float, seconds: float, used: float | None = None) -> float | None:
    """Return what a rate has grown to so long after a cut (rule 6), None for one that is to be forgotten (rule 8).

    Args:
        cut: To which it was cut.
        seconds: Since then.
        used: Requests per second that go; None where that is not known.

    >>> grown_rate(7.0, 15.0)
    14.0
    """
    grown = cut * (1.0 + seconds / _DOUBLES_IN)
    return grown if grown < _FORGOTTEN_AT * max(cut, used or 0.0) else None


def _checked_connections(connections: int | None) -> int:
    if connections is None:
        return 0
    if isinstance(connections, bool) or not isinstance(connections, int):
        msg = f"connections must be an integer or None, not {type(connections).__name__}"
        raise TypeError(msg)
    if not 1 <= connections <= MOST_CONNECTIONS:
        msg = f"connections must be from 1 to {MOST_CONNECTIONS}, not {connections}"
        raise ValueError(msg)
    return connections


def _checked_burst(burst: float) -> float:
    if isinstance(burst, bool) or not isinstance(burst, (int, float)) or not 1 <= burst < math.inf:
        msg = f"burst must be a number of at least 1, not {burst!r}"
        raise ValueError(msg)
    return float(burst)
