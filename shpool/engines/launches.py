"""What is under way at a cluster, and how far ahead of what runs there more may go. All under the engine's lock."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future

    from shpool.engines.flight import Flight
    from shpool.errors import TaskError

# s of work to have at each worker beyond what it runs: a cluster takes milliseconds to bring the next call.
_AHEAD = 0.1
_MOST_AHEAD = 64  # calls at a worker beyond the one it runs
_MOST_PACES = 1024  # functions whose pace is remembered
_PACE_MEMORY = 0.2  # share of the newest call's time in the running mean


@dataclass(eq=False)
class Launch:
    """A flight at the cluster.

    Attributes:
        flight: What flies.
        limit: When it has taken too long, by ``time.monotonic``.
        doom: How it is to end once its worker is gone, which was asked for.
        is_unheeded: Its future has its end, and the call could not be stopped.
    """

    flight: Flight
    limit: float = math.inf
    doom: TaskError | None = None
    is_unheeded: bool = False

    @property
    def label(self) -> str:
        """The task's."""
        return self.flight.task.label


class Launches:
    """The launches, by their numbers."""

    def __init__(self) -> None:
        self._launches: dict[int, Launch] = {}

    def __len__(self) -> int:
        return len(self._launches)

    def add(self, number: int, launch: Launch) -> None:
        """Take in a launch."""
        self._launches[number] = launch

    def get(self, number: int) -> Launch | None:
        """Return a launch, unless it has ended."""
        return self._launches.get(number)

    def take_out(self, number: int) -> Launch | None:
        """Return a launch that ends now; None if it has ended."""
        return self._launches.pop(number, None)

    def clear(self) -> dict[int, Launch]:
        """Take all out."""
        launches, self._launches = self._launches, {}
        return launches

    def find(self, future: Future[Any]) -> tuple[int, Launch] | None:
        """Return the launch whose future this is, with its number; None if it is not here."""
        return next((entry for entry in self._launches.items() if entry[1].flight.future is future), None)

    def late(self, now: float) -> list[tuple[int, Launch]]:
        """Return those that take too long."""
        return [(number, launch) for number, launch in self._launches.items() if launch.limit <= now]

    def limits(self) -> Iterator[float]:
        """Return when each will have taken too long."""
        return (launch.limit for launch in self._launches.values())


class Paces:
    """How long each function's calls, or batches of them, take."""

    def __init__(self) -> None:
        self._paces: dict[tuple[bytes, int], float] = {}  # s, by the function's key and the kind

    def ahead(self, flight: Flight) -> float:
        """Return how many of a function's calls each worker may have beyond what it runs."""
        pace = self._paces.get((flight.function.key, flight.kind))
        return 0.0 if pace is None else min(_MOST_AHEAD, _AHEAD / max(pace, 1e-6))

    def note(self, flight: Flight, seconds: float) -> None:
        """Take the time of one into the running mean."""
        key = flight.function.key, flight.kind
        if len(self._paces) >= _MOST_PACES:
            self._paces.clear()
        known = self._paces.get(key, seconds)
        self._paces[key] = known + _PACE_MEMORY * (seconds - known)
