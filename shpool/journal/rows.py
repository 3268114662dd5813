"""What a journal's rows are: the values, the tables, and the statements that turn one into the other."""

from __future__ import annotations

import shlex
from dataclasses import astuple, dataclass, fields
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Sequence

JobStatus = Literal["running", "done", "failed"]


class JobRecord(NamedTuple):
    """What a journal knows of one job, and a row of its table: a tuple is made in a tenth of a frozen dataclass's time.

    Attributes:
        key: Names the job by its content.
        run: The run that wrote this, from 1.
        status: ``running`` while it runs, and for ever when its run was killed meanwhile.
        starts: How many runs have begun it, as far as they lived to write that down.
        attempts: Attempts in ``run``; 0 while it runs.
        worker: Process that ran it, None when unknown.
        begun: When it was begun, in seconds since the epoch.
        ended: When it ended; None while it runs.
        seconds: Time of its last attempt; None while it runs.
        error_type: Name of the error's class; kept of an earlier run while it runs again.
        error: The error's text.
        place: File and line of the user's code that raised it; may be empty.
        traceback: The error's traceback.
        arguments: Positional and keyword arguments, as the JSON text of an array and an object in an array.
        result: JSON text of what it returned; when it failed, of what a shell command said, else None.
    """

    key: str
    run: int
    status: JobStatus
    starts: int
    attempts: int
    worker: int | None
    begun: float
    ended: float | None
    seconds: float | None
    error_type: str | None
    error: str | None
    place: str | None
    traceback: str | None
    arguments: str
    result: str | None

    @property
    def has_failed(self) -> bool:
        """Whether its last known end is a failure, also where a run that tried again was killed."""
        return self.status != "done" and self.error_type is not None


@dataclass(frozen=True)
class RunRecord:
    """What a journal knows of one run.

    Attributes:
        id: Number of the run, from 1.
        pid: Its process.
        command: The command line, or whatever the caller calls it.
        begun: When it began, in seconds since the epoch.
        updated: When it last wrote.
        ended: When it closed the journal; None while it lives, and when it was killed.
        jobs: Jobs of its input, None when unknown.
        workers: Workers it had, None when unknown.
        done: Jobs it brought to a good end.
        failed: Jobs that failed in it.
        logins: Logins it has cost.
        waits: How often a task waited for the account's limits.
        waited: Seconds they waited in all.
        exit_code: What it ended with; None as for ``ended``.
        reason: Why it ended before its jobs did; None where they all came to their end, and as for ``ended``.
    """

    id: int
    pid: int
    command: str
    begun: float
    updated: float
    ended: float | None
    jobs: int | None
    workers: int | None
    done: int
    failed: int
    logins: int
    waits: int
    waited: float
    exit_code: int | None
    reason: str | None = None

    @property
    def words(self) -> list[str]:
        """The words of its command; none where no shell would take it: a program may call its run anything."""
        try:
            return shlex.split(self.command)
        except ValueError:
            return []

    @property
    def is_over(self) -> bool:
        """Whether all its jobs came to a good end."""
        return self.ended is not None and self.reason is None and not self.failed

    @property
    def rate(self) -> float:
        """Jobs ended per second, up to the last writing."""
        seconds = self.updated - self.begun
        return (self.done + self.failed) / seconds if seconds > 0 else 0.0


# Jobs lie in the order they were begun, and keys in an index beside: a table ordered by keys, which are
# hashes, costs a quarter more per job (run: 100,000 and 300,000 rows). Long texts come last in a row.
SCHEMA = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    """CREATE TABLE runs (
        id INTEGER PRIMARY KEY, pid INTEGER NOT NULL, command TEXT NOT NULL, begun REAL NOT NULL,
        updated REAL NOT NULL, ended REAL, jobs INTEGER, workers INTEGER, done INTEGER NOT NULL,
        failed INTEGER NOT NULL, logins INTEGER NOT NULL, waits INTEGER NOT NULL, waited REAL NOT NULL,
        exit_code INTEGER, reason TEXT)""",
    """CREATE TABLE jobs (
        id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, run INTEGER NOT NULL, status TEXT NOT NULL,
        starts INTEGER NOT NULL, attempts INTEGER NOT NULL, worker INTEGER, begun REAL NOT NULL, ended REAL,
        seconds REAL, error_type TEXT, error TEXT, place TEXT, traceback TEXT, arguments TEXT NOT NULL, result TEXT)""",
)

JOB_COLUMNS = ", ".join(JobRecord._fields)
RUN_COLUMNS = ", ".join(field.name for field in fields(RunRecord))

SELECT_JOB = f"SELECT {JOB_COLUMNS} FROM jobs WHERE key = ?"  # noqa: S608 - names of columns, from above

# A job that failed before and runs again keeps its error until it ends: were this run killed, it has still failed.
_OF_BEGUN = ("run", "status", "starts", "attempts", "worker", "begun", "ended", "seconds")
_OF_ENDED = tuple(name for name in JobRecord._fields if name != "key")

# Rows that one statement writes. SQLite's module takes Python's interpreter lock again after every statement, for
# which it waits up to 5 ms where another thread computes; a statement per row would make the writer crawl.
_CHUNKS = (256, 16, 1)  # 256 rows of 15 columns are within the 32,766 parameters that SQLite takes


def _insert(rows: int, columns: tuple[str, ...]) -> str:
    row = f"({', '.join('?' * len(JobRecord._fields))})"
    changes = ", ".join(f"{name} = excluded.{name}" for name in columns)
    return (
        f"INSERT INTO jobs ({JOB_COLUMNS}) VALUES {', '.join([row] * rows)} "  # noqa: S608 - as above
        f"ON CONFLICT (key) DO UPDATE SET {changes}"
    )


_WRITE_BEGUN = {rows: _insert(rows, _OF_BEGUN) for rows in _CHUNKS}
_WRITE_ENDED = {rows: _insert(rows, _OF_ENDED) for rows in _CHUNKS}

WRITE_RUN = (
    f"INSERT OR REPLACE INTO runs ({RUN_COLUMNS}) "  # noqa: S608 - as above
    f"VALUES ({', '.join('?' * len(fields(RunRecord)))})"
)


def write_jobs(connection: sqlite3.Connection, rows: Sequence[JobRecord], *, ended: bool) -> None:
    """Write the rows of jobs that have begun, or of jobs that have ended, inside a transaction."""
    statements = _WRITE_ENDED if ended else _WRITE_BEGUN
    position = 0
    for size in _CHUNKS:
        while position + size <= len(rows):
            chunk = rows[position : position + size]
            connection.execute(statements[size], list(chain.from_iterable(chunk)))
            position += size


def run_row(run: RunRecord) -> tuple[Any, ...]:
    """Return a run in the order of ``RUN_COLUMNS``."""
    return astuple(run)
