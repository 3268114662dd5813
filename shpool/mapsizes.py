"""How much of a map goes at a time: what its caller has said, and what its tasks were measured to take."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shpool.engines.base import NO_RETRIES

if TYPE_CHECKING:
    from shpool.retry import RetryPolicy

BATCH_SECONDS = 0.03  # what a batch should take: long against a message, short against a person's patience
BATCH_SIZE = 2**20  # bytes a batch and its results should come to: larger ones arrive late and then all at once
LARGEST_BATCH = 32_768  # items; beyond it batches cost memory and gain nothing
_GROWTH = 8  # times; one batch of tiny tasks says little about the next
_END_GAME = 3  # batches each worker should still get of what is known to be left


@dataclass(frozen=True)
class MapOptions:
    """How a map runs.

    Attributes:
        chunksize: Items a batch; None adapts.
        buffersize: Most items pulled and not yet handed out; None for two batches a worker and one.
        timeout: Seconds from the call within which each result must have come; None for no limit.
        policy: How many more attempts which errors of an item are worth.
        task_timeout: Seconds one attempt of one item may take.
    """

    chunksize: int | None = None
    buffersize: int | None = None
    timeout: float | None = None
    policy: RetryPolicy = NO_RETRIES
    task_timeout: float | None = None

    def __post_init__(self) -> None:
        limit = self.timeout
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, (int, float)) or math.isnan(limit)):
            msg = f"timeout must be a number of seconds or None, not {limit!r}"
            raise ValueError(msg)
        for name in ("chunksize", "buffersize"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                msg = f"{name} must be an integer >= 1 or None, not {value!r}"
                raise ValueError(msg)

    @property
    def goes_singly(self) -> bool:
        """Tell whether each item must be a message of its own: a timeout or a crash then hits just one."""
        return self.chunksize == 1 or self.task_timeout is not None


class BatchSizer:
    """Decide how many items the next batch takes."""

    def __init__(self, workers: int, chunksize: int | None, expected: int | None, most: int | None = None) -> None:
        self._workers = workers
        self._most = min(most or LARGEST_BATCH, LARGEST_BATCH)
        self._fixed = chunksize if chunksize is None or most is None else min(chunksize, most)
        self._expected = expected
        self._size = 1
        self._seconds_per_item: float | None = None

    @property
    def size(self) -> int:
        """How many items a batch takes while there are plenty of them."""
        return self._size if self._fixed is None else self._fixed

    def next_size(self, pulled: int) -> int:
        """Return the size of the next batch, after so many items were pulled."""
        if self._fixed is not None:
            return self._fixed
        if self._expected is None:
            return self._size
        left = max(self._expected - pulled, 1)
        return max(1, min(self._size, math.ceil(left / (self._workers * _END_GAME))))

    def is_brief(self, items: int) -> bool:
        """Tell whether so many items should not take much longer than a batch is meant to."""
        return self._seconds_per_item is not None and items * self._seconds_per_item <= 2 * BATCH_SECONDS

    def note(self, items: int, seconds: float, size: int = 0) -> None:
        """Learn from a batch that took so long, and so many bytes both ways."""
        if not items:
            return
        measured = seconds / items
        known = self._seconds_per_item
        self._seconds_per_item = measured if known is None else (known + measured) / 2
        wanted = int(BATCH_SECONDS / max(self._seconds_per_item, 1e-9))
        fitting = int(BATCH_SIZE / max(size / items, 1.0))
        self._size = max(1, min(wanted, fitting, items * _GROWTH, self._most))
