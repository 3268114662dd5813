"""A run from end to end: check everything, open journal and output, log in, carry jobs to their results."""

from __future__ import annotations

import contextlib
import inspect
import json
import shlex
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from shpool.errors import InputError
from shpool_cli.console import CommandError, say
from shpool_cli.credentials import log_in_patiently, make_session
from shpool_cli.inputs import open_input
from shpool_cli.output.former import first_key
from shpool_cli.output.records import recalled, recorded
from shpool_cli.output.results import open_output
from shpool_cli.reporting import Report
from shpool_cli.stopping import Stopper

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from shpool.halting import HaltPolicy
    from shpool.jobs import Job, JobResult
    from shpool.journal import Ended, Journal, JournalView
    from shpool.pool import AuthenticatedProcessPool
    from shpool.session import OAuthSession
    from shpool.shell import ShellCall
    from shpool.targets import Target
    from shpool_cli.credentials import LoginOptions
    from shpool_cli.inputs import Call, Format, Input
    from shpool_cli.output.results import ResultWriter
    from shpool_cli.summary import Summary

_GRACE = 10.0  # s beyond its timeout that a shell job's worker has to end it in order


@dataclass(frozen=True)
class Order:
    """What the command line asks for."""

    target: str | None
    shell: str | None
    source: str
    form: Format | None
    output: Path | None
    ordered: bool
    workers: int | None
    retries: int
    timeout: float | None
    halt: HaltPolicy
    max_time: float | None
    limit: int | None
    shuffle: bool
    dry_run: bool
    journal: Path | None
    key: str | None
    only_failed: bool
    fresh: bool
    progress: bool | None
    login: LoginOptions


@dataclass(frozen=True)
class Work:
    """A function and an input, known to be good.

    Attributes:
        function: What workers call.
        name: What the bar calls it.
        source: The input.
        count: Its jobs.
        order: What the command line asks for.
    """

    function: Target | ShellCall
    name: str
    source: Input
    count: int
    order: Order

    def jobs(self) -> Iterator[Job]:
        """Yield the jobs in the order of the input."""
        from shpool.jobs import make_jobs

        return make_jobs(str(self.function), self.source.calls(), key_field=self.order.key)


def carry_out(order: Order, stdout: BinaryIO, summary: Summary) -> None:
    """Run the jobs; cheap checks come first, and ``summary.jobs`` is set once all of them have passed."""
    function, name, checks = _function_of(order)
    if order.key is not None:
        checks.append(_has_field(order.key))
    with open_input(order.source, order.form) as source, contextlib.ExitStack() as stack:
        work = Work(function, name, source, source.check(*checks), order)
        if order.dry_run:
            summary.jobs = work.count
            _foresee(work, stdout, summary)
            return
        _check_output(order)
        told: list[Report] = []
        journal = stack.enter_context(_opened(work, told)) if order.journal is not None else None
        first, writer = _opened_output(work, stdout, journal, stack)
        if work.count in {0, first}:  # nothing to do is no reason to log in
            summary.jobs, summary.before = work.count, first
        else:
            session = make_session(order.login, may_prompt=order.source != "-")
            _run_jobs(work, session, _Ends(writer, journal, told, first), summary)


def _function_of(order: Order) -> tuple[Target | ShellCall, str, list[Callable[[Call], None]]]:
    """Return the function, its name, and the checks that its calls must pass."""
    if order.shell is not None:
        from shpool.shell import ShellCall

        command = ShellCall(order.shell, timeout=order.timeout)
        command.check_syntax()
        return command, "sh", [lambda call: command.check_fields(len(call[0]), call[1])]
    from shpool.targets import load_target

    target = load_target(order.target or "")
    try:
        signature = inspect.signature(target.function)
    except (TypeError, ValueError):  # some built-in functions have none
        return target, target.name, []

    def fits(call: Call) -> None:
        try:
            signature.bind(*call[0], **call[1])
        except TypeError as exc:
            reason = f"the arguments do not fit the function: {exc}"
            raise InputError(target.name, reason, f"the function takes {signature}") from None

    return target, target.name, [fits]


def _has_field(name: str) -> Callable[[Call], None]:
    def check(call: Call) -> None:
        if name not in call[1]:
            there = ", ".join(call[1]) or "none: give objects, or a CSV"
            raise InputError(name, f"there is no field {name!r} for --key", f"the fields are {there}")

    return check


# The journal


@contextlib.contextmanager
def _opened(work: Work, told: list[Report]) -> Iterator[Journal]:
    """Open the journal; what it makes durable goes to the first of the reports, once there is one."""
    from shpool.journal import Journal

    def tell(ended: list[Ended]) -> None:
        told[0].tell([recalled(index, each.record) for each in ended for index in each.indexes])

    path, order = work.order.journal, work.order
    command = shlex.join(["shpool", *sys.argv[1:]])
    with Journal(path or "", str(work.function), fresh=order.fresh, command=command, on_durable=tell) as journal:
        journal.note(jobs=work.count)
        yield journal


def _opened_output(
    work: Work, stdout: BinaryIO, journal: Journal | None, stack: contextlib.ExitStack
) -> tuple[int, ResultWriter]:
    """Open the output and write what earlier runs have done.

    Returns:
        The first index that is not in it for certain, and the writer.
    """
    from shpool.journal import JournalView

    output = work.order.output
    if journal is None or journal.run == 1:
        return 0, stack.enter_context(open_output(output, stdout))
    view = JournalView(journal.path)
    is_there = output is not None and output.is_file()
    if output is not None and is_there and not _is_former(output, view):
        msg = f"{output} exists and is no output of the runs in {journal.path}"
        raise CommandError(msg, "choose another --output, or remove the file")
    writer = stack.enter_context(open_output(output, stdout, replace=is_there))
    first = 0

    def before() -> Iterator[Any]:
        nonlocal first
        for job, record in view.lookup(work.jobs()):
            if record is not None and record.status == "done":
                first += first == job.index
                yield recalled(job.index, record)
            elif work.order.ordered:
                return

    writer.catch_up(before())
    return first, writer


def _check_output(order: Order) -> None:
    """Refuse an output that holds something and cannot be of this run, before a journal is made or emptied."""
    path = order.output
    is_begun_anew = order.journal is None or order.fresh or not order.journal.exists()
    if path is not None and is_begun_anew and path.is_file() and path.stat().st_size:
        msg = f"{path} exists and is not empty"
        raise CommandError(msg, "choose another --output, or remove the file")


def _is_former(output: Path, view: JournalView) -> bool:
    try:
        key = first_key(output)
    except OSError as exc:
        msg = f"{output} cannot be read: {exc.strerror}"
        raise CommandError(msg, "choose another --output") from None
    return key is not None and (not key or view.record(key) is not None)


def _foresee(work: Work, stdout: BinaryIO, summary: Summary) -> None:
    """Say for each job what a run would do with it."""
    from shpool.journal import JournalView

    path, order = work.order.journal, work.order
    pairs: Iterator[tuple[Job, Any]] = ((job, None) for job in work.jobs())
    if path is not None and path.exists() and not order.fresh:
        view = JournalView(path)
        if view.target != str(work.function):
            from shpool.errors import JournalMismatchError

            raise JournalMismatchError(str(path), "target", view.target, str(work.function))
        pairs = view.lookup(work.jobs())
    left = work.count if order.limit is None else order.limit
    would = 0
    for job, record in pairs:
        state = "new" if record is None else {"running": "cut off"}.get(record.status, record.status)
        is_wanted = state != "done" and (not order.only_failed or (record is not None and record.has_failed))
        runs = is_wanted and would < left
        would += runs
        summary.before += state == "done"
        line = {"index": job.index, "key": job.key, "status": state, "would_run": runs}
        stdout.write(f"{json.dumps(line)}\n".encode())
    stdout.flush()
    say(f"dry run: {would} of {work.count} jobs would run, {summary.before} are done")


# Running


@dataclass(frozen=True)
class _Ends:
    """Where results go.

    Attributes:
        writer: The output.
        journal: The journal, if there is one.
        told: Where the journal finds the report.
        first: The first index that is not in the output for certain.
    """

    writer: ResultWriter
    journal: Journal | None
    told: list[Report]
    first: int


def _run_jobs(work: Work, session: OAuthSession, ends: _Ends, summary: Summary) -> None:
    from shpool.pool import AuthenticatedProcessPool
    from shpool.progress import Progress

    order = work.order

    def opened() -> AuthenticatedProcessPool:
        return stack.enter_context(AuthenticatedProcessPool(session, max_workers=order.workers))

    def conclude() -> None:
        """Count once the pool has ended: its last login is in it then."""
        stats = pool.stats()
        summary.note(stats)
        if ends.journal is not None:
            ends.journal.note(logins=stats.logins, workers=stats.workers)

    with contextlib.ExitStack() as after, contextlib.ExitStack() as stack:
        pool = log_in_patiently(session, opened)
        after.callback(conclude)
        summary.jobs = work.count
        bar = Progress(
            work.count,
            desc=work.name,
            enabled=order.progress,
            token=lambda: pool.stats().token_remaining,
        )
        with bar:
            report = Report(ends.writer, summary, bar, ordered=order.ordered, first=ends.first)
            ends.told.append(report)
            try:
                _carry(work, pool, session, ends, report, summary)
            finally:
                if ends.journal is not None:
                    ends.journal.flush()
                report.flush()


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
    jobs = shuffled(work.jobs()) if order.shuffle else work.jobs()
    jobs = _limited(jobs, order.limit) if journal is None else _claimed(jobs, ends, journal, report, order)
    timeout = order.timeout
    if timeout is not None and isinstance(work.function, ShellCall):
        timeout += _GRACE
    executor = pool.options(timeout=timeout)
    batch = run_batch(executor, work.function, jobs, retries=order.retries, retry_after_unit=session.retry_after_unit)
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
    first = ends.first
    begun = 0
    for job in jobs:
        claim = journal.claim(job, only_failed=order.only_failed)
        if claim.verdict == "run":
            if begun == order.limit:
                return
            begun += 1
            journal.begin(job)
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
