"""A run from end to end: check everything, open journal and output, log in, carry jobs to their results."""

from __future__ import annotations

import contextlib
import functools
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from shpool_cli.credentials import log_in_patiently, make_session
from shpool_cli.foresight import foresee
from shpool_cli.inputs import open_input
from shpool_cli.journaling import note_counts, noting, opened_journal, opened_output
from shpool_cli.order import Order, Work, check_work, function_of
from shpool_cli.output.records import recalled, recorded
from shpool_cli.output.results import open_output
from shpool_cli.reporting import Report
from shpool_cli.stopping import Stopper

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shpool.jobs import Job, JobResult
    from shpool.journal import Journal
    from shpool.pool import AuthenticatedProcessPool
    from shpool.session import OAuthSession
    from shpool_cli.output.records import Record
    from shpool_cli.output.results import ResultWriter
    from shpool_cli.summary import Summary

_GRACE = 10.0  # s beyond its timeout that a shell job's worker has to end it in order


def carry_out(order: Order, stdout: BinaryIO, summary: Summary) -> None:
    """Run the jobs; cheap checks come first, and ``summary.jobs`` is set once all of them have passed."""
    function = function_of(order)
    if order.journal is not None:
        from shpool.journal.file import check_place, resolved

        check_place(resolved(order.journal))
    with (
        open_input(order.source, order.form) as source,
        contextlib.ExitStack() as outputs,
        contextlib.ExitStack() as journals,  # ends before the output does: its last words go there
    ):
        work = check_work(order, source, function)
        if order.dry_run:
            foresee(work, stdout)
            summary.jobs = work.count
            return
        session = functools.cache(lambda: make_session(order.login, may_prompt=order.source != "-"))
        writer = None
        if work.is_begun_anew:  # before a journal is made or emptied
            writer = outputs.enter_context(open_output(order.output, stdout))
            if work.count and not order.only_failed:
                session()
        told: list[Report] = []
        journal = None
        if order.journal is not None:
            journal = journals.enter_context(
                opened_journal(order.journal, str(function), told, summary, jobs=work.count, fresh=order.fresh)
            )
        if writer is None:
            writer = outputs.enter_context(opened_output(order.output, stdout, journal))
        former = _catch_up(work, writer, journal, session)
        if former.left:
            _run_jobs(work, session(), _Ends(writer, journal, told, former), summary)
        else:  # nothing to do is no reason to log in
            summary.jobs, summary.before = work.count, former.done
            summary.skipped = work.count - former.done


@dataclass
class _Former:
    """What former runs have left.

    Attributes:
        done: Jobs that are done.
        left: Jobs to run, where equal ones count as many.
        first: The first index that is not in the output for certain.
    """

    done: int = 0
    left: int = 0
    first: int = 0


def _catch_up(
    work: Work, writer: ResultWriter, journal: Journal | None, session: Callable[[], OAuthSession]
) -> _Former:
    """Write what former runs have done; of that, only what comes before any gap where the output is ordered.

    The session is made before the former output is replaced: where it cannot be, all stays as it is.
    """
    from shpool.journal import JournalView

    order = work.order
    if journal is None or journal.run == 1:
        return _Former(left=0 if order.only_failed else work.count)
    former = _Former()

    def before() -> Iterator[Record]:
        for job, record in JournalView(journal.path).lookup(work.jobs()):
            if record is None or record.status != "done":
                former.left += not order.only_failed or (record is not None and record.has_failed)
                continue
            former.done += 1
            is_next = former.first == job.index
            former.first += is_next
            if is_next or not order.ordered:
                yield recalled(job.index, record)
        if former.left:
            session()

    writer.catch_up(before())
    return former


# Running


@dataclass(frozen=True)
class _Ends:
    """Where results go.

    Attributes:
        writer: The output.
        journal: The journal, if there is one.
        told: Where the journal finds the report.
        former: What is there already.
    """

    writer: ResultWriter
    journal: Journal | None
    told: list[Report]
    former: _Former


def _run_jobs(work: Work, session: OAuthSession, ends: _Ends, summary: Summary) -> None:
    from shpool.pool import AuthenticatedProcessPool
    from shpool.progress import Progress

    order = work.order

    def opened() -> AuthenticatedProcessPool:
        gate = order.gate.make()
        stack.callback(gate.close)
        return stack.enter_context(AuthenticatedProcessPool(session, order.workers, engine=order.engine, gate=gate))

    def conclude() -> None:
        """Count once the pool has ended: its last login is in it then."""
        stats = pool.stats()
        summary.note(stats)
        if ends.journal is not None:
            note_counts(ends.journal, stats)

    def end_at_once(kind: type[BaseException] | None, *_: object) -> None:
        """Wait for no running job where its result has nowhere to go."""
        if kind is not None:
            pool.terminate()

    with contextlib.ExitStack() as after, contextlib.ExitStack() as stack:
        pool = log_in_patiently(session, opened)
        after.callback(conclude)
        stack.push(end_at_once)
        stack.enter_context(noting(ends.journal, pool))
        summary.jobs, summary.before = work.count, ends.former.done
        bar = Progress(
            work.count,
            desc="sh" if order.shell is not None else getattr(work.function, "name", ""),
            enabled=order.progress,
            token=lambda: pool.stats().token_remaining,
        )
        with bar, contextlib.ExitStack() as flushed:
            bar.pass_over(ends.former.done)
            report = Report(ends.writer, summary, bar, ordered=order.ordered, first=ends.former.first)
            flushed.callback(report.flush)
            ends.told.append(report)
            if ends.journal is not None:
                flushed.callback(ends.journal.flush)  # the first of the two
            _carry(work, pool, session, ends, report, summary)
        if summary.is_complete:  # whatever was to end it came too late
            summary.halted = None


def _carry(  # noqa: PLR0917, PLR0913 - the parts of a run meet here
    work: Work,
    pool: AuthenticatedProcessPool,
    session: OAuthSession,
    ends: _Ends,
    report: Report,
    summary: Summary,
) -> None:
    """Feed the batch and take its results until it ends or is stopped."""
    from shpool.batch import run_batch
    from shpool.shell import ShellCall
    from shpool_cli.shuffled import shuffled

    order, journal = work.order, ends.journal

    def goes_on(_: Job) -> bool:
        return not batch.is_stopping

    jobs: Iterator[Job] = itertools.takewhile(goes_on, work.jobs())  # else a stop is heard only at the next job to run
    if order.shuffle:
        jobs = itertools.takewhile(goes_on, shuffled(jobs))
    jobs = _limited(jobs, order.limit) if journal is None else _claimed(jobs, ends, journal, report, order)
    timeout = order.timeout
    if timeout is not None and isinstance(work.function, ShellCall):
        timeout += _GRACE
    executor = pool.options(timeout=timeout)
    unit, begun = session.retry_after_unit, None if journal is None else journal.begin
    batch = run_batch(executor, work.function, jobs, retries=order.retries, retry_after_unit=unit, begun=begun)
    failed = 0
    with contextlib.closing(batch), Stopper(batch, order.halt, work.count, order.max_time) as stopper:
        for result in batch:
            failed += _record(result, journal, report)
            stopper.note_failures(failed)
        stopper.pass_on()
    summary.halted = stopper.reason
    if stopper.is_killing:
        pool.terminate()


def _record(result: JobResult, journal: Journal | None, report: Report) -> bool:
    """Send a result where it goes; tell whether it is a failure."""
    from shpool.timedcall import place_of

    result, record = recorded(result)
    if journal is None:
        report.tell([record])
    else:
        place = "" if result.error is None else place_of(result.error)
        journal.end(result, record.result, place=place, worker=result.worker)
    return result.status == "failed"


def _limited(jobs: Iterator[Job], limit: int | None) -> Iterator[Job]:
    for number, job in enumerate(jobs):
        if number == limit:
            return
        yield job


def _claimed(jobs: Iterator[Job], ends: _Ends, journal: Journal, report: Report, order: Order) -> Iterator[Job]:
    """Yield the jobs to run; tell of those that are done."""
    first = ends.former.first
    begun = 0
    for job in jobs:
        claim = journal.claim(job, only_failed=order.only_failed)
        if claim.verdict == "run":
            if begun == order.limit:
                return
            begun += 1
            yield job
        elif claim.verdict == "skip":
            report.skip(job.index)
        elif claim.verdict == "done":
            record = None
            if claim.record is not None and order.ordered and job.index >= first:  # not in the output yet
                record = recalled(job.index, claim.record)
            report.tell_before(job.index, record)
        elif claim.record is not None:  # the same as one that has ended in this run
            report.tell([recalled(job.index, claim.record)])
