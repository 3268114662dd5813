"""The journal of a batch: which jobs are done, so that the same command again runs only the others.

A `Journal` is what a run holds:

1. ``claim`` each job of the input: it says whether to run it.
2. ``begin`` it when it is handed to a worker, ``end`` it with its result. Both return at once: a thread writes.
3. ``on_durable`` is called once an end can no longer be lost; only then may it be reported.

`JournalView` (view.py) is for whoever only reads.
"""

from __future__ import annotations

import os
import time
from array import array
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from shpool.errors import JournalError, JournalFullError
from shpool.journal.file import resolved
from shpool.journal.keys import KeyFilter
from shpool.journal.rows import JobRecord, RunRecord
from shpool.journal.run import RunFile
from shpool.journal.texts import arguments_of, error_columns, storable
from shpool.journal.writer import Batch, BatchWriter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

    from typing_extensions import Self

    from shpool.jobs import Job, JobResult

    _ErrorColumns = tuple[str | None, str | None, str | None, str | None]

__all__ = ["Claim", "Ended", "JobRecord", "Journal", "RunRecord"]

_NO_ERROR: _ErrorColumns = (None, None, None, None)

Verdict = Literal["run", "done", "duplicate", "skip"]


class Claim(NamedTuple):
    """What to do with a job of the input.

    Attributes:
        verdict: ``run`` it; it was ``done`` by an earlier run; it is a ``duplicate`` of a job that this run
            claimed before; or ``skip`` it, as it is not among the jobs asked for.
        record: What the journal knows of the job. Of one to run: how it ended before, None for a new one. Of a
            duplicate: how it ended, or None while that is not durable; then it is told with the job itself, see
            ``Ended.indexes``.
    """

    verdict: Verdict
    record: JobRecord | None = None


class Ended(NamedTuple):
    """A job whose end is durable.

    Attributes:
        indexes: Positions in the input: of the job that ran, then of those that were found to be the same meanwhile.
        record: What the journal holds of it.
    """

    indexes: tuple[int, ...]
    record: JobRecord


@dataclass
class _Flight:
    """A job between its claim and its end."""

    indexes: array[int]
    arguments: str
    starts: int  # by runs, this one included
    begun: float
    worker: int | None = None
    is_noted: bool = False  # its beginning was given to the writer


class Journal:
    """Record one run's jobs in an SQLite file.

    Use it from one thread, as a context manager. A run that is killed loses nothing that ``on_durable`` told.

    Args:
        path: The file; made when missing, readable for this user only.
        target: Text that names the function, as in ``job_key``; another one in the file is refused.
        key_field: The field that names the jobs, as for ``make_jobs``; another one in the file is refused as well.
        fresh: Forget all that the file holds, of whatever target and format.
        replaced: What the caller will replace before the first job begins, as the file begins anew: until then
            ``JournalView.replaced`` has it, also where this run is killed meanwhile.
        command: What to call this run in the file.
        on_durable: Called with jobs whose end is durable, in the order they ended, in the writing thread; it must not
            call the journal. What it raises ends the run as an error of the writing does.
        clock: Wall clock.

    Raises:
        JournalError: The file cannot be used; each class says why and what to do.
    """

    def __init__(  # noqa: PLR0913 - the last is for tests
        self,
        path: Path | str,
        target: str,
        *,
        key_field: str | None = None,
        fresh: bool = False,
        replaced: str = "",
        command: str = "",
        on_durable: Callable[[list[Ended]], None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.path = resolved(path)
        self._on_durable = on_durable
        self._clock = clock
        self._is_open = True
        field = None if key_field is None else storable(key_field)
        self._file = RunFile(self.path, storable(target), field, fresh=fresh, replaced=replaced)
        # Only of a journal without jobs: reading in a million keys would take longer than looking them up.
        self._keys = None if self._file.holds_jobs else KeyFilter()
        self._run = self._file.enter(os.getpid(), storable(command), clock())
        self._writer = BatchWriter(self._save, self._tell)
        # Guarded by the writer's lock, as is self._run.
        self._in_flight: dict[str, _Flight] = {}  # claimed and not ended: no more than the batch's window
        self._unsaved: dict[str, _Flight] = {}  # ended and not durable: no more than the writer's backlog

    @property
    def run(self) -> int:
        """Number of this run, from 1."""
        return self._run.id

    def claim(self, job: Job, *, only_failed: bool = False, redo: bool = False) -> Claim:
        """Say what to do with a job; ask once for each job of the input, and run it where told to.

        Args:
            job: The job, whose position goes into ``Ended.indexes``.
            only_failed: Run only what failed before.
            redo: What an earlier run did is lost: run it again.

        Raises:
            JournalError: The journal cannot be written any more.
        """
        key = storable(job.key)
        with self._writer.lock:
            self._writer.check()
            flight = self._in_flight.get(key) or self._unsaved.get(key)
            if flight is not None:
                flight.indexes.append(job.index)
                return Claim("duplicate")
            record = None if self._keys is not None and key not in self._keys else self._file.find(key)
            if record is not None and record.status != "running":
                if record.run == self._run.id:
                    return Claim("duplicate", record)
                if record.status == "done" and not redo:
                    return Claim("done", record)
            if only_failed and (record is None or not record.has_failed):
                return Claim("skip", record)
            if self._keys is not None:
                self._keys.add(key)
            starts = 1 + (0 if record is None else record.starts)
            self._in_flight[key] = _Flight(array("q", [job.index]), arguments_of(job), starts, self._clock())
            return Claim("run", record)

    def begin(self, job: Job, worker: int | None = None) -> None:
        """Note that a claimed job runs now, so that it is seen to have been cut off if it never ends.

        Args:
            job: The job; again for another attempt, or when its worker gets known.
            worker: The process that runs it.

        Raises:
            JournalError: The journal cannot be written any more.
            ValueError: The job was not claimed.
        """
        key = storable(job.key)
        with self._writer.lock:
            self._writer.wait_for_room()  # before anything changes: an interruption here loses nothing
            flight = self._flight_of(key)
            if not flight.is_noted:
                flight.begun = self._clock()
            flight.worker = worker
            flight.is_noted = True
            ran = (flight.starts, 0, worker, flight.begun, None, None)
            row = JobRecord(key, self._run.id, "running", *ran, *_NO_ERROR, flight.arguments, None)
            self._writer.add_begun(key, row, len(flight.arguments))

    def end(self, result: JobResult, text: str | None = None, *, place: str = "", worker: int | None = None) -> None:
        """Record how a claimed job ended; told by ``on_durable`` once it is durable.

        Args:
            result: What became of the job.
            text: What it returned, or said before it failed, as JSON text.
            place: File and line of the user's code that raised the error.
            worker: The process that ran it, where ``begin`` did not say.

        Raises:
            JournalError: The journal cannot be written any more.
            ValueError: The job was not claimed, or has ended.
        """
        key = storable(result.key)
        text = None if text is None else storable(text)
        error: _ErrorColumns = _NO_ERROR if result.error is None else error_columns(result.error, place)
        with self._writer.lock:
            self._writer.wait_for_room()  # before anything changes: an interruption here loses nothing
            flight = self._flight_of(key)
            now = self._clock()
            # One that was over before anybody saw it run has waited since its claim for a worker, maybe.
            begun = flight.begun if flight.is_noted else max(flight.begun, now - result.seconds)
            ran = (flight.starts, result.attempts, worker or flight.worker, begun, now, result.seconds)
            row = JobRecord(key, self._run.id, result.status, *ran, *error, flight.arguments, text)
            self._unsaved[key] = self._in_flight.pop(key)
            self._writer.take_back(key)
            self._writer.add_ended(row, len(flight.arguments) + len(text or "") + len(error[-1] or ""))

    def _flight_of(self, key: str) -> _Flight:
        try:
            return self._in_flight[key]
        except KeyError:
            msg = f"job {key} is not running; claim each job once, and end it once"
            raise ValueError(msg) from None

    def note(  # noqa: PLR0913 - facts of one row
        self,
        *,
        jobs: int | None = None,
        workers: int | None = None,
        logins: int | None = None,
        waits: int | None = None,
        waited: float | None = None,
        exit_code: int | None = None,
        reason: str | None = None,
    ) -> None:
        """Record facts of the run, as they come; those not given stay as they are.

        Args:
            jobs: Jobs of the input.
            workers: Workers.
            logins: Logins so far.
            waits: How often a task waited for the account's limits, so far.
            waited: Seconds they waited in all.
            exit_code: What the run ends with.
            reason: Why it ends before its jobs do.
        """
        given: dict[str, object] = {
            "jobs": jobs,
            "workers": workers,
            "logins": logins,
            "waits": waits,
            "waited": waited,
        }
        given |= {"exit_code": exit_code, "reason": None if reason is None else storable(reason)}
        facts = {name: value for name, value in given.items() if value is not None}
        with self._writer.lock:
            changed = replace(self._run, **facts)  # type: ignore[arg-type]  # each has its field's type, as given
            if changed != self._run:
                self._run = changed
                self._writer.touch()

    def flush(self) -> None:
        """Return once all that was recorded is durable and told.

        Raises:
            JournalError: The journal cannot be written any more.
            Exception: What ``on_durable`` raised.
        """
        self._writer.flush()

    def close(self) -> None:
        """Make everything durable and tell it, leave one plain file, and let the next run in; harmless when repeated.

        Raises:
            JournalError: The last rows could not be written, which no call has raised yet.
            Exception: What ``on_durable`` raised, likewise.
        """
        if not self._is_open or self._run.pid != os.getpid():  # in a forked child the journal is its parent's
            return
        self._writer.close()
        self._is_open = False
        try:
            self._write_end(self._writer.failure)
        finally:
            self._file.close()
        self._writer.raise_untold()

    def _write_end(self, failure: Exception | None) -> None:
        """Note that the run has ended, also where its rows found no space."""
        run = replace(self._run, updated=self._clock(), ended=self._clock())
        if not isinstance(failure, JournalError):
            self._file.write_end(run)
        elif isinstance(failure, JournalFullError):
            with suppress(JournalError):
                self._file.write_end(replace(run, reason=failure.reason))

    def _save(self, batch: Batch) -> None:
        """Write a batch and return once it is durable; in the writer's thread."""
        done = sum(row.status == "done" for row in batch.ended)
        with self._writer.lock:
            run = self._run
        failed, now = len(batch.ended) - done, self._clock()
        try:
            self._file.write(batch, replace(run, done=run.done + done, failed=run.failed + failed, updated=now))
        except JournalFullError:
            if batch.begun or batch.ended:
                raise
            return  # facts of the run alone come again: with the next rows, or at the end, for which room is kept
        with self._writer.lock:
            self._run = replace(self._run, done=run.done + done, failed=run.failed + failed, updated=now)

    def _tell(self, batch: Batch) -> None:
        """Say what is durable now; in the writer's thread."""
        with self._writer.lock:
            flights = [self._unsaved.pop(row.key) for row in batch.ended]
        if flights and self._on_durable is not None:
            ended = zip(flights, batch.ended, strict=True)
            self._on_durable([Ended(tuple(flight.indexes), row) for flight, row in ended])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
