"""When a batch ends before its jobs do: after too many failures, or as soon as anybody says so."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import Enum

_FORM = re.compile(r"(never|soon|now)(?:,fail=([0-9]{1,18})(%?))?")
_WHOLE = 100  # percent


class Halt(Enum):
    """How a batch ends early."""

    NEVER = "never"
    SOON = "soon"  # begin nothing new, let what runs end
    NOW = "now"  # stop what runs


class GiveUp:
    """Until when what runs is waited for: the earliest moment that anybody has named.

    A timer's thread and a signal's handler may name one at the same time, and a handler may interrupt whoever is about
    to. So nobody reads what he changes: each moment is appended, which happens at once or not yet, and takes no lock
    that a handler would wait for.
    """

    def __init__(self) -> None:
        self._moments: list[float] = []

    def by(self, moment: float) -> None:
        """Wait no longer than until then; from any thread, or from a signal handler."""
        self._moments.append(moment)

    @property
    def is_set(self) -> bool:
        """Whether any moment was named, be it infinity."""
        return bool(self._moments)

    @property
    def moment(self) -> float:
        """The earliest; infinity for as long as none was named."""
        return min(self._moments, default=math.inf)


@dataclass(frozen=True)
class HaltPolicy:
    """Decide after each failure whether the batch goes on.

    Attributes:
        how: What to do when it does not.
        failures: Jobs that may not fail: the batch ends with the one that makes it so many.
        percent: The same as a share of all jobs, in place of ``failures``.
    """

    how: Halt = Halt.NEVER
    failures: int = 1
    percent: int | None = None

    @classmethod
    def parse(cls, text: str) -> HaltPolicy:
        """Read ``never``, ``soon`` or ``now``, the last two also as in ``soon,fail=5`` or ``now,fail=10%``.

        Raises:
            ValueError: It is none of these.

        >>> HaltPolicy.parse("now,fail=10%")
        HaltPolicy(how=<Halt.NOW: 'now'>, failures=1, percent=10)
        """
        match = _FORM.fullmatch(text)
        how, number, sign = match.groups() if match else ("", None, None)
        is_wrong = match is None or (how == Halt.NEVER.value and number is not None)
        if is_wrong or (number is not None and not 1 <= int(number) <= (_WHOLE if sign else math.inf)):
            msg = f"{text!r} is none of never, soon, now, soon,fail=5, now,fail=10%"
            raise ValueError(msg)
        if number is None:
            return cls(Halt(how))
        return cls(Halt(how), percent=int(number)) if sign else cls(Halt(how), failures=int(number))

    def is_reached(self, failed: int, total: int) -> bool:
        """Tell whether so many failures among so many jobs are too many."""
        if self.how is Halt.NEVER or not failed:
            return False
        if self.percent is None:
            return failed >= self.failures
        return failed * _WHOLE >= self.percent * total
