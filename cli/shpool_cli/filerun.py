"""Downloads while they run: files to the groups, their results to journal, output and bar."""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from shpool_cli.filereport import FileReport, Traffic, file_of
from shpool_cli.journaling import is_begun_anew
from shpool_cli.output.records import recalled, recorded
from shpool_cli.places import own_files
from shpool_cli.pooling import running_pool
from shpool_cli.stopping import Intact, Stopper

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from shpool.downloads import DownloadResult, FetchGroup, GroupRun, PlannedItem
    from shpool.halting import HaltPolicy
    from shpool.jobs import Job
    from shpool.journal import Journal
    from shpool.pool import AuthenticatedProcessPool
    from shpool.session import OAuthSession
    from shpool_cli.credentials import LoginOptions
    from shpool_cli.filelist import Files
    from shpool_cli.filereport import FileSummary
    from shpool_cli.inputs import Format
    from shpool_cli.options import GateOptions
    from shpool_cli.output.results import ResultWriter


@dataclass(frozen=True)
class Order:
    """What the command line asks for."""

    source: str
    folder: Path
    form: Format | None
    output: Path | None
    workers: int | None
    transfers: int
    retries: int
    timeout: float | None
    stall_timeout: float
    overwrite: bool
    ca_bundle: Path | None
    halt: HaltPolicy
    max_time: float | None
    limit: int | None
    journal: Path | None
    only_failed: bool
    fresh: bool
    progress: bool | None
    login: LoginOptions
    gate: GateOptions

    @property
    def target(self) -> str:
        """What the journal calls these downloads: files in another folder are others."""
        return f"download to {self.folder.absolute()}"

    @property
    def is_begun_anew(self) -> bool:
        """Whether no former run matters: then an output that holds something cannot be of these files."""
        return is_begun_anew(self.journal, fresh=self.fresh)


@dataclass(frozen=True)
class Ends:
    """Where results go.

    Attributes:
        writer: The output.
        journal: The journal, if there is one.
        told: Where the journal finds the report.
        before: Files that former runs have done.
        bytes_before: Bytes of these.
        lost: Indexes of others that they have done and that are not there any more, in order.
        since: The first run whose files count as done; those of runs before it are fetched anew.
    """

    writer: ResultWriter
    journal: Journal | None
    told: list[FileReport]
    before: int
    bytes_before: int = 0
    lost: Sequence[int] = ()
    since: int = 0


@dataclass
class FileRun:
    """Feed the groups and take their results until they end or are stopped."""

    order: Order
    files: Files
    session: OAuthSession
    ends: Ends
    summary: FileSummary
    _keys: dict[int, str] = field(default_factory=dict)  # of files under way: no more than the groups hold
    _run: GroupRun | None = field(default=None, init=False)

    def carry(self) -> None:
        """Log in and fetch the files; ``summary.jobs`` is set once that has begun."""
        from shpool.progress import Progress

        order, summary, journal = self.order, self.summary, self.ends.journal
        jobs = self._left if order.limit is None else min(order.limit, self._left)
        with running_pool(self.session, order.gate, journal, summary, workers=order.workers, jobs=jobs) as pool:
            summary.jobs, summary.before = self.files.count, self.ends.before
            is_all = not order.only_failed and order.limit is None
            total = self.files.total if is_all else 0
            traffic = Traffic(summary, total, self.ends.bytes_before, self._under_way)
            bar = Progress(
                self.files.count,
                desc="download",
                unit="file",
                enabled=order.progress,
                token=lambda: pool.stats().token_remaining,
                notes=traffic.words,
                size=total,
                moved=traffic.moved,
            )
            with bar, contextlib.ExitStack() as flushed:
                bar.pass_over(self.ends.before, self.ends.bytes_before)
                report = FileReport(self.ends.writer, summary, bar)
                self.ends.told.append(report)
                if journal is not None:
                    flushed.callback(journal.flush)
                self._fetch(pool, report)
            if summary.is_complete:  # whatever was to end it came too late
                summary.halted = None

    def _fetch(self, pool: AuthenticatedProcessPool, report: FileReport) -> None:
        from shpool.downloads import GroupRun

        order, intact, failed = self.order, Intact(), 0
        planned = intact.only(self._claimed(lambda: run.is_stopping, report))
        run = self._run = GroupRun(pool, self._group(), planned, count=self._left, limit=order.limit, begun=self._begin)
        with contextlib.closing(run), Stopper(run, order.halt, self.files.count, order.max_time, "file") as stopper:
            for result in run:
                failed += self._take(result, report)
                stopper.note_failures(failed)
            stopper.pass_on()
        self.summary.halted = stopper.reason
        if stopper.is_killing:
            pool.terminate()
        intact.pass_on()

    @property
    def _left(self) -> int:
        """How many files there are that former runs have not done."""
        return self.files.count - self.ends.before

    def _under_way(self) -> int:
        return 0 if self._run is None else self._run.bytes_under_way

    def _group(self) -> FetchGroup:
        from shpool.downloads import FetchGroup, FetchSettings
        from shpool.downloads.curling import CurlOptions

        order = self.order
        bundle = None if order.ca_bundle is None else str(order.ca_bundle.absolute())
        curl = CurlOptions(order.transfers, order.stall_timeout, bundle)
        folder = str(order.folder.absolute())
        reserved = own_files(order.source, order.output, order.journal)
        return FetchGroup(
            FetchSettings(folder, curl, order.retries, order.timeout, order.overwrite, durable=True, reserved=reserved)
        )

    def _claimed(self, is_stopping: Callable[[], bool], report: FileReport) -> Iterator[PlannedItem]:
        """Yield the files to fetch."""
        for job, planned in self.files.planned():
            if is_stopping():
                return
            if self._is_wanted(job, report):
                self._keys[job.index] = job.key
                yield planned

    def _is_wanted(self, job: Job, report: FileReport) -> bool:
        journal = self.ends.journal
        if journal is None:
            return not self.files.is_copy(job.index)  # it is told with the first
        lost = self.ends.lost
        place = bisect_left(lost, job.index)
        is_lost = place < len(lost) and lost[place] == job.index
        claim = journal.claim(job, only_failed=self.order.only_failed, redo=is_lost)
        if claim.verdict == "done" and claim.record is not None and claim.record.run < self.ends.since:
            claim = journal.claim(job, redo=True)
        if claim.verdict == "skip":
            report.skip(job.index)
        elif claim.verdict == "duplicate" and claim.record is not None:  # of one that has ended in this run
            report.tell([recalled(job.index, claim.record)], again=True)
        return claim.verdict == "run"

    def _begin(self, items: Sequence[PlannedItem]) -> None:
        """Note that a worker has begun these files."""
        from shpool.jobs import Job

        if self.ends.journal is not None:
            for each in items:
                self.ends.journal.begin(Job(each.number, self._keys[each.number]))

    def _take(self, result: DownloadResult, report: FileReport) -> bool:
        """Send a result where it goes; tell whether it is a failure."""
        from shpool.jobs import JobResult

        has_failed = result.status == "failed"
        job = JobResult(
            result.index,
            self._keys.pop(result.index),
            "failed" if has_failed else "done",
            None if has_failed else file_of(result),
            result.error,
            result.attempts,
            result.seconds,
        )
        job, record = recorded(job)
        if self.ends.journal is None:
            copies = self.files.copies_of(record.index)
            report.tell([record, *(replace(record, index=index) for index in copies)])
        else:
            self.ends.journal.end(job, record.result)
        return has_failed
