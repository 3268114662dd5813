"""Downloads while they run: files to the groups, their results to journal, output and bar."""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shpool_cli.credentials import log_in_patiently
from shpool_cli.filereport import FileReport, Traffic, file_of
from shpool_cli.journaling import note_counts, noting
from shpool_cli.output.records import recorded
from shpool_cli.stopping import Stopper

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from shpool.downloads import DownloadResult, FetchGroup, PlannedItem
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
        path = self.journal
        return path is None or self.fresh or not path.exists() or (path.is_file() and not path.stat().st_size)


@dataclass(frozen=True)
class Ends:
    """Where results go.

    Attributes:
        writer: The output.
        journal: The journal, if there is one.
        told: Where the journal finds the report.
        before: Files that former runs have done.
        lost: Indexes of others that they have done and that are not there any more, in order.
    """

    writer: ResultWriter
    journal: Journal | None
    told: list[FileReport]
    before: int
    lost: Sequence[int] = ()


@dataclass
class FileRun:
    """Feed the groups and take their results until they end or are stopped."""

    order: Order
    files: Files
    session: OAuthSession
    ends: Ends
    summary: FileSummary
    _keys: dict[int, str] = field(default_factory=dict)  # of files under way: no more than the groups hold

    def carry(self) -> None:
        """Log in and fetch the files; ``summary.jobs`` is set once that has begun."""
        from shpool.pool import AuthenticatedProcessPool
        from shpool.progress import Progress

        summary, journal = self.summary, self.ends.journal

        def opened() -> AuthenticatedProcessPool:
            gate = self.order.gate.make()
            stack.callback(gate.close)
            return stack.enter_context(
                AuthenticatedProcessPool(self.session, max_workers=self.order.workers, gate=gate)
            )

        def conclude() -> None:
            """Count once the pool has ended: its last login is in it then."""
            stats = pool.stats()
            summary.note(stats)
            if journal is not None:
                note_counts(journal, stats)

        def end_at_once(kind: type[BaseException] | None, *_: object) -> None:
            """Wait for no transfer where its result has nowhere to go."""
            if kind is not None:
                pool.terminate()

        with contextlib.ExitStack() as after, contextlib.ExitStack() as stack:
            pool = log_in_patiently(self.session, opened)
            after.callback(conclude)
            stack.push(end_at_once)
            stack.enter_context(noting(journal, pool))
            summary.jobs, summary.before = self.files.count, self.ends.before
            bar = Progress(
                self.files.count,
                desc="download",
                unit="file",
                enabled=self.order.progress,
                token=lambda: pool.stats().token_remaining,
                note=Traffic(summary, self.files.total),
            )
            with bar, contextlib.ExitStack() as flushed:
                bar.pass_over(self.ends.before)
                report = FileReport(self.ends.writer, summary, bar)
                self.ends.told.append(report)
                if journal is not None:
                    flushed.callback(journal.flush)
                self._fetch(pool, report)
            if summary.is_complete:  # whatever was to end it came too late
                summary.halted = None

    def _fetch(self, pool: AuthenticatedProcessPool, report: FileReport) -> None:
        from shpool.downloads import GroupRun

        order, failed = self.order, 0
        count = self.files.count if order.limit is None else min(order.limit, self.files.count)
        planned = self._claimed(lambda: run.is_stopping, report)
        run: GroupRun = GroupRun(pool, self._group(), planned, count=count, begun=self._begin)
        with contextlib.closing(run), Stopper(run, order.halt, self.files.count, order.max_time) as stopper:
            for result in run:
                failed += self._take(result, report)
                stopper.note_failures(failed)
            stopper.pass_on()
        self.summary.halted = stopper.reason
        if stopper.is_killing:
            pool.terminate()

    def _group(self) -> FetchGroup:
        from shpool.downloads import FetchGroup, FetchSettings
        from shpool.downloads.curling import CurlOptions

        order = self.order
        bundle = None if order.ca_bundle is None else str(order.ca_bundle.absolute())
        curl = CurlOptions(order.transfers, order.stall_timeout, bundle)
        folder = str(order.folder.absolute())
        return FetchGroup(FetchSettings(folder, curl, order.retries, order.timeout, order.overwrite, durable=True))

    def _claimed(self, is_stopping: Callable[[], bool], report: FileReport) -> Iterator[PlannedItem]:
        """Yield the files to fetch."""
        begun = 0
        for job, planned in self.files.planned():
            if begun == self.order.limit or is_stopping():
                return
            if self._is_wanted(job, report):
                begun += 1
                self._keys[job.index] = job.key
                yield planned

    def _is_wanted(self, job: Job, report: FileReport) -> bool:
        journal = self.ends.journal
        if journal is None:
            return True
        lost = self.ends.lost
        place = bisect_left(lost, job.index)
        is_lost = place < len(lost) and lost[place] == job.index
        claim = journal.claim(job, only_failed=self.order.only_failed, redo=is_lost)
        if claim.verdict == "skip":
            report.skip(job.index)
        return claim.verdict == "run"

    def _begin(self, items: Sequence[PlannedItem]) -> None:
        """Note that a worker has these files in hand; it began with as many as it transfers at once."""
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
            report.tell([record])
        else:
            self.ends.journal.end(job, record.result)
        return has_failed
