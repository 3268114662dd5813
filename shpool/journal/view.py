"""Reading a journal, while its run is going and after: for `shpool status`, and for whatever is made of the records.

Each call opens the file, reads, and closes it: an open reader would keep a run from tidying up.
"""

from __future__ import annotations

from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from shpool.errorkinds import MOST_KINDS, OTHERS, kind_of_error
from shpool.journal.file import open_for_reading, resolved, transaction, translated
from shpool.journal.lock import live_pid
from shpool.journal.purpose import check_purpose, replaced_by, target_of
from shpool.journal.rows import JOB_COLUMNS, RUN_COLUMNS, SELECT_JOB, JobRecord, JobStatus, RunRecord
from shpool.journal.texts import storable

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator
    from pathlib import Path

    from shpool.jobs import Job

__all__ = ["ErrorKind", "JournalSummary", "JournalView"]

JournalState = Literal["empty", "running", "ended", "cut off"]

_PAGE = 500  # records that are read at once; between two pages nothing is held


@dataclass(frozen=True)
class ErrorKind:
    """Failed jobs with errors of one kind.

    Attributes:
        error_type: Name of the error's class.
        text: The error's text, without what differs between like ones, see ``kind_of_error``.
        count: How many jobs.
        example: The first of them.
    """

    error_type: str
    text: str
    count: int
    example: JobRecord


@dataclass(frozen=True)
class JournalSummary:
    """What a journal holds, as of one moment.

    Attributes:
        target: What it was written for.
        live_pid: The process that runs with it now, 0 when it did not tell; None when there is none.
        runs: All runs, in their order; the last one is the live one, if any is.
        done: Jobs that are done.
        failed: Jobs whose last end was a failure.
        running: Jobs that run now.
        cut_off: Jobs that were begun by a run that did not live to end them.
        first: When the first job was begun, in seconds since the epoch; None without jobs.
        last: When the last job ended.
        slowest: Jobs that took the longest, the slowest first.
        errors: Failed jobs by kind, the most frequent first.
    """

    target: str
    live_pid: int | None
    runs: tuple[RunRecord, ...]
    done: int
    failed: int
    running: int
    cut_off: int
    first: float | None
    last: float | None
    slowest: tuple[JobRecord, ...]
    errors: tuple[ErrorKind, ...]

    @property
    def rate(self) -> float:
        """Jobs ended per second in the last run."""
        return self.runs[-1].rate if self.runs else 0.0

    @property
    def state(self) -> JournalState:
        """What became of the last run: ``cut off`` when it did not live to close the journal."""
        if self.live_pid is not None:
            return "running"
        if not self.runs:
            return "empty"
        return "cut off" if self.runs[-1].ended is None else "ended"

    @property
    def left(self) -> int | None:
        """How many jobs of the last run's input have no end in it; None when the input's length is unknown.

        An estimate: what earlier runs have done is taken to be in the input still, and a line that
        stands there twice counts twice.
        """
        if not self.runs or self.runs[-1].jobs is None:
            return None
        return max(self.runs[-1].jobs - self.done - self.runs[-1].failed, 0)

    @property
    def not_begun(self) -> int | None:
        """How many jobs of the last run's input no run has begun; an estimate as ``left`` is, and None as there."""
        if not self.runs or self.runs[-1].jobs is None:
            return None
        return max(self.runs[-1].jobs - self.done - self.failed - self.running - self.cut_off, 0)

    @property
    def seconds_left(self) -> float | None:
        """How long the live run will go on at its rate; None when there is none, or nothing to tell it by."""
        if self.state != "running" or self.left is None or self.rate == 0:
            return None
        return self.left / self.rate

    @property
    def logins(self) -> int:
        """Logins of all runs."""
        return sum(run.logins for run in self.runs)

    @property
    def waits(self) -> int:
        """How often tasks waited for the account's limits, in all runs."""
        return sum(run.waits for run in self.runs)

    @property
    def waited(self) -> float:
        """Seconds they waited in all."""
        return sum(run.waited for run in self.runs)


class JournalView:
    """Read a journal without creating or blocking anything; every method may raise what the constructor raises.

    Args:
        path: The journal's file.

    Raises:
        JournalNotFoundError: There is no such file.
        NotAJournalError: It is something else.
        JournalError: It cannot be read.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = resolved(path)
        with self._reading() as connection:
            self.target = target_of(connection)

    def check_purpose(self, target: str, key_field: str | None = None) -> None:
        """Refuse it as a run would that records this target's jobs, named by this field.

        Raises:
            JournalMismatchError: It was written for something else.
        """
        with self._reading() as connection:
            check_purpose(connection, self.path, storable(target), None if key_field is None else storable(key_field))

    def live_pid(self) -> int | None:
        """Return the process that runs with the journal now, 0 when it did not tell; None when there is none."""
        return live_pid(self.path)

    def replaced(self) -> str:
        """Return what the run that emptied the journal was to replace and may not have; empty once a job has begun."""
        with self._reading() as connection:
            return replaced_by(connection)

    def summary(self, slowest: int = 5) -> JournalSummary:
        """Return all that the journal comes to, as of this moment.

        Args:
            slowest: How many of the slowest jobs to name.
        """
        pid = self.live_pid()  # before the rows: jobs of a run that ends meanwhile have an end in them
        with self._reading() as connection:
            runs = _runs(connection)
            live = 0 if pid is None or not runs else runs[-1].id
            counts_and_times = _counts_and_times(connection, live)
            by_time = "seconds IS NOT NULL ORDER BY seconds DESC, id LIMIT ?"
            slow = tuple(_records(connection, by_time, slowest))
            errors = _kinds_of_errors(connection)
            return JournalSummary(target_of(connection), pid, runs, *counts_and_times, slow, errors)

    def runs(self) -> tuple[RunRecord, ...]:
        """Return all runs, in their order; the last one is the live one, if any is."""
        with self._reading() as connection:
            return _runs(connection)

    def record(self, key: str) -> JobRecord | None:
        """Return what the journal knows of one job, None when nothing."""
        with self._reading() as connection:
            rows = connection.execute(SELECT_JOB, (storable(key),)).fetchall()
        return JobRecord(*rows[0]) if rows else None

    def lookup(self, jobs: Iterator[Job]) -> Iterator[tuple[Job, JobRecord | None]]:
        """Pair jobs with what the journal knows of them, lazily: for a dry run, or for results in the input's order."""
        while page := [job for _, job in zip(range(_PAGE), jobs, strict=False)]:
            with self._reading() as connection:
                found = [connection.execute(SELECT_JOB, (storable(job.key),)).fetchall() for job in page]
            for job, rows in zip(page, found, strict=True):
                yield job, JobRecord(*rows[0]) if rows else None

    def records(self, status: JobStatus | None = None) -> Iterator[JobRecord]:
        """Return the records in the order in which the jobs were first begun, lazily.

        Args:
            status: Only those with this status.
        """
        condition = "id > ? AND status = coalesce(?, status) ORDER BY id LIMIT ?"
        last = 0
        while True:
            with self._reading() as connection:
                rows = connection.execute(
                    f"SELECT id, {JOB_COLUMNS} FROM jobs WHERE {condition}",  # noqa: S608 - names, and the text above
                    (last, status, _PAGE),
                ).fetchall()
            for number, *row in rows:
                last = number
                yield JobRecord(*row)
            if len(rows) < _PAGE:
                return

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """Open the journal for one consistent look."""
        with (
            closing(open_for_reading(self.path)) as connection,
            translated(self.path),
            transaction(connection, "DEFERRED"),
        ):
            yield connection


def _runs(connection: sqlite3.Connection) -> tuple[RunRecord, ...]:
    return tuple(RunRecord(*row) for row in connection.execute(f"SELECT {RUN_COLUMNS} FROM runs ORDER BY id"))  # noqa: S608 - names of columns


def _counts_and_times(
    connection: sqlite3.Connection, live: int
) -> tuple[int, int, int, int, float | None, float | None]:
    """Return how many jobs are done, failed, running and cut off, when the first was begun and the last ended."""
    # One statement: each reads the whole table, which is most of the time of a summary.
    ((done, failed, running, cut_off, first, last),) = connection.execute(
        "SELECT count(*) FILTER (WHERE status = 'done'), count(*) FILTER (WHERE status = 'failed'), "
        "count(*) FILTER (WHERE status = 'running' AND run = :live), "
        "count(*) FILTER (WHERE status = 'running' AND run != :live), min(begun), max(ended) FROM jobs",
        {"live": live},
    ).fetchall()
    return done, failed, running, cut_off, first, last


def _records(connection: sqlite3.Connection, condition: str, *values: Any) -> Iterator[JobRecord]:  # noqa: ANN401 - SQLite's
    query = f"SELECT {JOB_COLUMNS} FROM jobs WHERE {condition}"  # noqa: S608 - from this file
    return (JobRecord(*row) for row in connection.execute(query, values))


def _kinds_of_errors(connection: sqlite3.Connection) -> tuple[ErrorKind, ...]:
    counts: dict[tuple[str, str], int] = {}
    examples: dict[tuple[str, str], int] = {}
    failures = connection.execute("SELECT id, error_type, substr(error, 1, 1000) FROM jobs WHERE status = 'failed'")
    for number, error_type, text in failures:
        kind = (error_type or "", kind_of_error(text or ""))
        if kind not in counts and len(counts) >= MOST_KINDS:
            kind = ("", OTHERS)
        counts[kind] = counts.get(kind, 0) + 1
        examples.setdefault(kind, number)
    return tuple(
        ErrorKind(*kind, count, next(_records(connection, "id = ?", examples[kind])))
        for kind, count in sorted(counts.items(), key=lambda item: -item[1])
    )
