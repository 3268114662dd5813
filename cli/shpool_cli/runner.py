"""A run from end to end: check everything, open journal and output, log in, carry jobs to their results."""

from __future__ import annotations

import contextlib
import functools
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from shpool.timedcall import place_of
from shpool_cli.credentials import check_login, make_session
from shpool_cli.foresight import foresee
from shpool_cli.inputs import open_input
from shpool_cli.journaling import check_place_of, is_former, opened_journal, opened_output
from shpool_cli.order import Order, Work, check_work, function_of
from shpool_cli.output.records import recalled, recorded
from shpool_cli.output.results import check_output
from shpool_cli.pooling import running_pool
from shpool_cli.reporting import Ready, Report
from shpool_cli.stopping import Intact, Stopper

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
    check_place_of(order.journal)
    with (
        open_input(order.source, order.form) as source,
        contextlib.ExitStack() as outputs,
        contextlib.ExitStack() as journals,  # ends before the output does: its last words go there
    ):
        work = check_work(order, source, function)
        if order.dry_run:
            is_replaced = is_former(order.output, order.journal, is_begun_anew=work.is_begun_anew)
            check_output(order.output, replace=is_replaced)
            foresee(work, stdout, functools.partial(check_login, order.login))
            summary.jobs = work.count
            return
        session = functools.cache(lambda: make_session(order.login, may_prompt=order.source != "-"))
        writer = replaced = None
        if work.is_begun_anew:  # before a journal is made or emptied
            writer = outputs.enter_context(opened_output(order.output, stdout, order.journal, is_begun_anew=True))
            replaced = order.output if writer.is_behind else None
            if work.count and not order.only_failed:
                session()
        told: list[Report] = []
        journal = None
        if order.journal is not None:
            journal = journals.enter_context(
                opened_journal(
                    order.journal,
                    str(function),
                    told,
                    summary,
                    jobs=work.count,
                    fresh=order.fresh,
                    replaced=replaced,
                    key_field=order.key,
                )
            )
        if writer is None:
            writer = outputs.enter_context(opened_output(order.output, stdout, order.journal, is_begun_anew=False))
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
        if writer.is_behind:  # what --fresh has found: a journal and its output are emptied together
            writer.catch_up(())
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
    from shpool.progress import Progress

    order, left = work.order, ends.former.left
    jobs = left if order.limit is None else min(left, order.limit)
    opening = running_pool(
        session, order.gate, ends.journal, summary, workers=order.workers, jobs=jobs, engine=order.engine
    )
    with opening as pool:
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
    from shpool.batch import JOBS_PER_WORKER, run_batch, worker_count
    from shpool.halting import Halt
    from shpool.shell import ShellCall

    order, journal, intact, ready = work.order, ends.journal, Intact(), Ready(report)
    jobs = intact.only(_jobs_to_run(work, ends, report, lambda _: not batch.is_stopping))
    timeout = order.timeout
    if timeout is not None and isinstance(work.function, ShellCall):
        timeout += _GRACE
    executor = pool.options(timeout=timeout)
    # Where a failure may end the run, no more jobs begin before it is heard of than have to.
    window = None if order.halt.how is Halt.NEVER else JOBS_PER_WORKER * worker_count(pool)
    batch = run_batch(
        executor,
        work.function,
        jobs,
        retries=order.retries,
        retry_after_unit=session.retry_after_unit,
        window=window,
        begun=None if journal is None else journal.begin,
        before_wait=ready.tell,
    )
    failed = 0
    with contextlib.closing(batch), ready, Stopper(batch, order.halt, work.count, order.max_time) as stopper:
        for result in batch:
            failed += _record(result, journal, ready)
            stopper.note_failures(failed)
        stopper.pass_on()
    summary.halted = stopper.reason
    if stopper.is_killing:
        pool.terminate()
    intact.pass_on()


def _jobs_to_run(work: Work, ends: _Ends, report: Report, goes_on: Callable[[Job], bool]) -> Iterator[Job]:
    """Return the jobs to run, for as long as the batch goes on; tell of those that are done."""
    from shpool_cli.shuffled import shuffled

    order, journal = work.order, ends.journal
    jobs: Iterator[Job] = itertools.takewhile(goes_on, work.jobs())  # else a stop is heard only at the next job to run
    if order.shuffle:
        jobs = itertools.takewhile(goes_on, shuffled(jobs))
    return _limited(jobs, order.limit) if journal is None else _claimed(jobs, ends, journal, report, order)


def _record(result: JobResult, journal: Journal | None, ready: Ready) -> bool:
    """Send a result where it goes; tell whether it is a failure."""
    result, record = recorded(result)
    if journal is None:
        ready.add(record)
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
