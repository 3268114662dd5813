"""The journal's file in the hands of one run: locked, written to by one thread and looked up in by another."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from shpool.errors import JournalError, JournalFullError
from shpool.journal.file import (
    check_place,
    close_journal,
    connect,
    holds_jobs,
    open_for_writing,
    transaction,
    translated,
)
from shpool.journal.lock import RunLock
from shpool.journal.rows import SELECT_JOB, WRITE_RUN, JobRecord, RunRecord, run_row, write_jobs
from shpool.journal.writer import Batch

if TYPE_CHECKING:
    from pathlib import Path


class RunFile:
    """Hold a journal's file; arguments and errors are those of `Journal`.

    Attributes:
        holds_jobs: Whether there are jobs of earlier runs.
    """

    def __init__(self, path: Path, target: str, key_field: str | None, *, fresh: bool, replaced: str = "") -> None:
        self._path = path
        check_place(path)
        with ExitStack() as held:
            self._lock = RunLock(path)
            held.callback(self._lock.release)
            self._connection = open_for_writing(path, target, key_field, replaced, fresh=fresh)
            held.callback(close_journal, self._connection)
            with translated(path):
                self.holds_jobs = holds_jobs(self._connection)
            self._lookup = connect(path, "ro")
            held.callback(self._lookup.close)
            self._held = held.pop_all()
        self._identity: list[tuple[int, int]] = []

    def enter(self, pid: int, command: str, now: float) -> RunRecord:
        """Write down that a run begins, and return it; a file that takes no more is closed."""
        with ExitStack() as undo:
            undo.callback(self.close)
            with translated(self._path), transaction(self._connection):
                ((last,),) = self._connection.execute("SELECT coalesce(max(id), 0) FROM runs").fetchall()
                run = RunRecord(last + 1, pid, command, now, now, None, None, None, 0, 0, 0, 0, 0.0, None)
                self._connection.execute(WRITE_RUN, run_row(run))
            self._identity = self._identities()
            undo.pop_all()
        return run

    def find(self, key: str) -> JobRecord | None:
        """Return what is durable of a job; from any thread, one at a time."""
        with translated(self._path):
            rows = self._lookup.execute(SELECT_JOB, (key,)).fetchall()  # all of them: that ends the reading
        return JobRecord(*rows[0]) if rows else None

    def write(self, batch: Batch, run: RunRecord) -> None:
        """Write rows and return once they are durable; from any thread, one at a time."""
        with translated(self._path):
            with transaction(self._connection):
                write_jobs(self._connection, batch.ended, ended=True)  # most of them were begun before the others
                write_jobs(self._connection, tuple(batch.begun.values()), ended=False)
                self._connection.execute(WRITE_RUN, run_row(run))
            if self._identities() != self._identity:
                reason = "it was removed or replaced during the run"
                hint = "run the same command again: what it does not hold then runs once more"
                raise JournalError(str(self._path), reason, hint)

    def write_end(self, run: RunRecord) -> None:
        """Write the last of a run; where the disk is full, into the room that was kept for this."""
        try:
            self.write(Batch(), run)
        except JournalFullError:
            self._lock.give_room()
            self.write(Batch(), run)

    def _identities(self) -> list[tuple[int, int]]:
        """Return what tells the files that are written to from others of their names; SQLite does not look."""
        found = []
        for path in (self._path, self._path.with_name(f"{self._path.name}-wal")):
            with suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_dev, status.st_ino))
        return found

    def close(self) -> None:
        """Leave one plain file and let the next run in."""
        self._held.close()
