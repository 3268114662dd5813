"""Records in the order of the input, held back until those before them are there."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from shpool_cli.output.records import Record


class InOrder:
    """Hand records on by index.

    Args:
        put: Takes records that are in order.
        first: The index that comes first.
    """

    def __init__(self, put: Callable[[Sequence[Record]], None], first: int = 0) -> None:
        self._put = put
        self._next = first
        self._held: list[tuple[int, Record | None]] = []  # a heap; indexes are unique, so records are never compared

    def take(self, records: Iterable[Record]) -> None:
        """Hold these records, and hand on what is complete with them."""
        for record in records:
            heapq.heappush(self._held, (record.index, record))
        self._hand_on()

    def skip(self, index: int) -> None:
        """Wait for no record of this index."""
        heapq.heappush(self._held, (index, None))
        self._hand_on()

    def flush(self) -> None:
        """Hand on what is held: nothing comes any more of what it waits for."""
        held = [record for _, record in sorted(self._held, key=lambda pair: pair[0]) if record is not None]
        self._held.clear()
        if held:
            self._put(held)

    def _hand_on(self) -> None:
        complete = []
        while self._held and self._held[0][0] <= self._next:
            index, record = heapq.heappop(self._held)
            self._next = max(self._next, index + 1)
            if record is not None:
                complete.append(record)
        if complete:
            self._put(complete)
