"""A clock for tests: it stands still until it is told to move."""

from __future__ import annotations

import threading

from shpool.tokens import Instant


class FakeClock:
    """Tell the time a test has set; safe to move while other threads read it.

    Args:
        wall: Start of the wall clock, seconds since the epoch. The default is in January 2027.
        boot: Start of the boot clock, seconds since boot.

    >>> clock = FakeClock(wall=100.0, boot=10.0)
    >>> clock.advance(5.0)
    >>> clock.step_wall(-60.0)
    >>> clock.now()
    Instant(wall=45.0, boot=15.0)
    """

    def __init__(self, wall: float = 1_800_000_000.0, boot: float = 1_000.0) -> None:
        self._lock = threading.Lock()  # two reads and a write of _now would lose moves
        self._now = Instant(wall, boot)

    def now(self) -> Instant:
        """Return the moment the clock stands at."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Let time pass: both clocks move by ``seconds``.

        Raises:
            ValueError: ``seconds`` is negative; time does not run backwards, only the wall clock is stepped.
        """
        if seconds < 0:
            msg = f"time cannot advance by {seconds} s; step_wall() moves the wall clock backwards"
            raise ValueError(msg)
        self._move(seconds, seconds)

    def step_wall(self, seconds: float) -> None:
        """Step the wall clock alone, either way, as an administrator or NTP would."""
        self._move(seconds, 0.0)

    def _move(self, wall: float, boot: float) -> None:
        with self._lock:
            self._now = Instant(self._now.wall + wall, self._now.boot + boot)

    def __repr__(self) -> str:
        return f"<FakeClock wall={self._now.wall:.3f} boot={self._now.boot:.3f}>"
