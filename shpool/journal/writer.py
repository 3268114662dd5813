"""The journal's hot path: rows are gathered in memory, and one thread writes them in batches."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from shpool.journal.rows import JobRecord

_COMMIT_SECONDS = 0.1  # s a row waits for others: ten waits for the disk a second are lost in any run's time
_MANY_ENDS = 100  # in a batch: from 1,000 a second on they wait so long, ends that come one by one hardly at all
_BATCH_ROWS = 2000  # rows that are written at once; more of them make a row no cheaper (run: 2,000 against 20,000)
_BATCH_BYTES = 4 * 2**20  # of text in them, which bounds memory where results are large
_BACKLOG = 2  # batches that may gather while one is being written; then whoever brings more waits for the disk


@dataclass
class Batch:
    """Rows to be written in one transaction.

    Attributes:
        begun: Rows of jobs that have begun and not ended, by key.
        ended: Rows of jobs that have ended, in that order.
        weight: Characters of text in all of them.
    """

    begun: dict[str, JobRecord] = field(default_factory=dict)
    ended: list[JobRecord] = field(default_factory=list)
    weight: int = 0

    def is_beyond(self, batches: int) -> bool:
        """Tell whether this is at least so many times what is written at once."""
        rows = len(self.begun) + len(self.ended)
        return rows >= batches * _BATCH_ROWS or self.weight >= batches * _BATCH_BYTES


class BatchWriter:
    """Write batches in a thread; one error ends it, and is raised to whoever comes next.

    Args:
        save: Writes a batch, and returns once it is durable.
        tell: Is called after that, in the same order.

    Attributes:
        lock: Guards the rows, and may guard what its user keeps beside them.
    """

    def __init__(self, save: Callable[[Batch], None], tell: Callable[[Batch], None]) -> None:
        self.lock = threading.Lock()
        self._save = save
        self._tell = tell
        self._work = threading.Condition(self.lock)  # for the thread: there is something to do
        self._room = threading.Condition(self.lock)  # for the others: a batch has been saved
        # All guarded by the lock.
        self._gathering = Batch()
        self._is_pressed = False  # something is to be written without waiting for more
        self._is_changed = False  # something beside the rows is to be written
        self._is_saving = False
        self._is_closing = False
        self._is_told = False  # the failure was raised to somebody
        self._lately = 0  # ends in the last batch
        self.failure: Exception | None = None
        self._thread = threading.Thread(target=self._write_loop, name="shpool-journal", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what has ended the writing, if anything has; with the lock held, as all that follows."""
        if self.failure is not None:
            self._is_told = True
            raise self.failure

    def add_begun(self, key: str, row: JobRecord, weight: int) -> None:
        """Have it written that a job has begun."""
        self._gathering.begun[key] = row
        self._added(weight)

    def take_back(self, key: str) -> None:
        """Forget that a job has begun, where that is not written yet."""
        self._gathering.begun.pop(key, None)

    def add_ended(self, row: JobRecord, weight: int) -> None:
        """Have it written that a job has ended."""
        self._gathering.ended.append(row)
        self._added(weight)

    def touch(self) -> None:
        """Have a batch written soon, even one without rows."""
        self._is_changed = True
        self._work.notify()

    def wait_for_room(self) -> None:
        """Wait while too much waits for the disk, then do as ``check``; at every row, before it is added."""
        while self._gathering.is_beyond(_BACKLOG) and self.failure is None:
            self._room.wait()
        self.check()

    def _added(self, weight: int) -> None:
        was_empty = not self._is_changed
        self._is_changed = True
        self._gathering.weight += weight
        if was_empty or len(self._gathering.ended) == 1 or self._gathering.is_beyond(1):
            self._work.notify()

    def flush(self) -> None:
        """Return once all rows so far are durable and told; without the lock held, as what follows.

        Raises:
            Exception: What ended the writing.
        """
        with self.lock:
            self._is_pressed = True
            self._work.notify()
            while (self._is_changed or self._is_saving) and self.failure is None:
                self._room.wait()
            self._is_pressed = False
            self.check()

    def close(self) -> None:
        """Write what is left and end the thread; raises nothing."""
        with self.lock:
            self._is_closing = True
            self._work.notify()
        self._thread.join()

    def raise_untold(self) -> None:
        """Raise what ended the writing, unless somebody has got it already."""
        with self.lock:
            if not self._is_told:
                self.check()

    def _write_loop(self) -> None:
        has_saved = True
        while has_saved and (batch := self._next_batch()) is not None:
            has_saved = self._attempt(self._save, batch)
            # Once telling has failed nobody is told any more; what has ended is still written down.
            if has_saved and self.failure is None:
                self._attempt(self._tell, batch)
            with self.lock:
                self._is_saving = False
                self._room.notify_all()

    def _next_batch(self) -> Batch | None:
        """Wait for rows, and a little longer for more of them; None is the end.

        A kill costs what runs, and what has ended and is not written yet. So ends wait the less for others, the
        fewer of them there were lately, and beginnings alone wait longest.
        """
        with self.lock:
            while not self._is_changed:
                if self._is_closing:
                    return None
                self._work.wait()
            self._work.wait_for(lambda: self._gathering.ended or self._is_due(), _COMMIT_SECONDS)
            self._work.wait_for(self._is_due, _COMMIT_SECONDS * min(self._lately / _MANY_ENDS, 1.0))
            batch, self._gathering = self._gathering, Batch()
            self._lately = len(batch.ended)
            self._is_changed = False
            self._is_saving = True
            return batch

    def _is_due(self) -> bool:
        return self._is_pressed or self._is_closing or self._gathering.is_beyond(1)

    def _attempt(self, step: Callable[[Batch], None], batch: Batch) -> bool:
        try:
            step(batch)
        except Exception as exc:  # noqa: BLE001 - a border: nobody else sees what ends this thread
            with self.lock:
                self.failure = self.failure or exc
                self._room.notify_all()
            return False
        return True
