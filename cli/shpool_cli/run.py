"""`shpool run`: call a function once for every line of an input, in workers that share one login."""

from __future__ import annotations

import contextlib
import inspect
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from shpool.errors import ShpoolError
from shpool_cli.console import CommandError, ExitCode, private_stdout, report, say
from shpool_cli.credentials import (
    ClientIdOption,
    LoginOptions,
    ProfileOption,
    ScopeOption,
    SecretFileOption,
    TokenUrlOption,
    log_in_patiently,
    make_session,
)
from shpool_cli.inputs import Format, Input, open_input
from shpool_cli.options import at_least
from shpool_cli.output.results import ResultWriter, open_output

if TYPE_CHECKING:
    from collections.abc import Callable

    from shpool.jobs import JobResult
    from shpool.pool import PoolStats
    from shpool.progress import Progress
    from shpool.session import OAuthSession
    from shpool.targets import Target


@dataclass
class Summary:
    """What a run came to: the last line on stderr, and the object of --json."""

    jobs: int | None = None  # None until TARGET and INPUT are known to be good
    done: int = 0
    failed: int = 0
    logins: int = 0
    refreshes: int = 0
    seconds: float = 0.0
    exit_code: int = ExitCode.OK

    def count(self, result: JobResult) -> None:
        """Count one result."""
        if result.status == "done":
            self.done += 1
        else:
            self.failed += 1
            self.exit_code = ExitCode.FAILED

    def note(self, stats: PoolStats) -> None:
        """Take over the pool's counters."""
        self.logins, self.refreshes = stats.logins, stats.refreshes

    def __str__(self) -> str:
        word = {
            ExitCode.HUNG_UP: "hung up: ",
            ExitCode.INTERRUPTED: "interrupted: ",
            ExitCode.TERMINATED: "terminated: ",
        }
        finished = self.done + self.failed
        jobs = (
            _counted(finished, "job") if finished == self.jobs else f"{finished} of {_counted(self.jobs or 0, 'job')}"
        )
        logins, refreshes = _counted(self.logins, "login"), _counted(self.refreshes, "refresh", "refreshes")
        counts = f"{jobs}, {self.failed} failed, {logins}, {refreshes}, {self.seconds:.1f} s"
        return word.get(ExitCode(self.exit_code), "") + counts


def _counted(number: int, noun: str, nouns: str = "") -> str:
    return f"{number} {noun if number == 1 else nouns or noun + 's'}"


@dataclass(frozen=True)
class _Order:
    """What the command line asks for."""

    target: str
    source: str
    form: Format | None
    output: Path | None
    workers: int | None
    retries: int
    progress: bool | None
    login: LoginOptions


def run(  # noqa: PLR0913 - options of a command line
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="package.module:function or path/to/file.py:function")
    ],
    source: Annotated[str, typer.Argument(metavar="INPUT", help="A file, or - for standard input.")],
    *,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            "-w",
            parser=at_least(1),
            metavar="INTEGER",
            help="Worker processes, at least 1.",
            show_default="one per processor",
        ),
    ] = None,
    retries: Annotated[
        int,
        typer.Option(
            "--retries",
            parser=at_least(0),
            metavar="INTEGER",
            help="Further attempts for a job that met a lost worker, a broken connection, a timeout, "
            "or HTTP 408, 425, 429 or 5xx.",
        ),
    ] = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="File for the results; one that holds something is refused.",
            show_default="standard output",
        ),
    ] = None,
    form: Annotated[
        Format | None, typer.Option("--format", help="How to read INPUT.", show_default="by suffix")
    ] = None,
    progress: Annotated[
        bool | None, typer.Option("--progress/--no-progress", help="Bar on stderr.", show_default="on a terminal")
    ] = None,
    profile: ProfileOption = None,
    token_url: TokenUrlOption = None,
    client_id: ClientIdOption = None,
    client_secret_file: SecretFileOption = None,
    scope: ScopeOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Summary as one JSON object: on stdout with --output, else on stderr.")
    ] = False,
) -> None:
    """Call a function for every line of an input, in workers that share a login.

    TARGET is imported with the current folder, or the file's own, on the import path. What it prints goes to stderr.

    INPUT is JSON Lines (an object becomes keyword arguments, an array positional ones, anything else the
    single argument), CSV with a header (keyword arguments, all text) or plain text (one argument a line). The
    suffix tells: .jsonl, .ndjson, .json; .csv; else text. Standard input is JSON Lines. Blank lines are
    skipped. All of it is checked before the login and before anything runs.

    Results are JSON Lines in the order the jobs finish: index, key, status, result or error, attempts, seconds. Each
    line is written at once, so an interrupted run keeps them. Dates, paths, bytes (base64), dataclasses and NumPy
    values are converted, NaN becomes null; what has no JSON form fails its job.

    Exit codes: 0 all done, 1 some jobs failed, 2 bad usage or input, 3 no login, 129 hung up, 130 interrupted,
    143 terminated.
    """
    login = LoginOptions(profile, token_url, client_id, client_secret_file, scope)
    order = _Order(target, source, form, output, workers, retries, progress, login)
    summary = Summary()
    began = time.monotonic()
    with private_stdout() as stdout:
        try:
            _carry_out(order, stdout, summary)
        except (KeyboardInterrupt, SystemExit, ShpoolError, CommandError) as stop:
            if summary.jobs is None:
                raise
            summary.exit_code = _code_of(stop)
        summary.seconds = round(time.monotonic() - began, 3)
        _conclude(summary, stdout if output is not None else None, as_json=as_json)
    raise typer.Exit(summary.exit_code)


def _code_of(stop: BaseException) -> ExitCode:
    """Return the exit code of what ended a run early; errors are told, stops by the user are in the summary."""
    if isinstance(stop, (ShpoolError, CommandError)):
        return report(stop)
    if isinstance(stop, KeyboardInterrupt):
        return ExitCode.INTERRUPTED
    has_hung_up = isinstance(stop, SystemExit) and stop.code == ExitCode.HUNG_UP
    return ExitCode.HUNG_UP if has_hung_up else ExitCode.TERMINATED


def _conclude(summary: Summary, stdout: BinaryIO | None, *, as_json: bool) -> None:
    text = json.dumps(asdict(summary))
    if as_json and stdout is not None:
        try:
            stdout.write(f"{text}\n".encode())
            stdout.flush()
        except BrokenPipeError:
            pass  # nobody is left to tell
        except OSError as exc:
            error = f"standard output cannot be written: {exc.strerror}"
            summary.exit_code = report(CommandError(error, "the results are in --output", ExitCode.FAILED))
    say(text if as_json and stdout is None else str(summary))


def _carry_out(order: _Order, stdout: BinaryIO, summary: Summary) -> None:
    """Check everything, cheap things first, then log in and run; ``summary.jobs`` is set between the two."""
    from shpool.targets import load_target

    target = load_target(order.target)
    with open_input(order.source, order.form) as source:
        count = source.check(_signature(target.function))
        with open_output(order.output, stdout) as writer:
            if count == 0:
                summary.jobs = 0
                return
            session = make_session(order.login, may_prompt=order.source != "-")
            _run_jobs(order, session, _Work(target, source, writer, count), summary)


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # some built-in functions have none
        return None


@dataclass(frozen=True)
class _Work:
    """A target, an input and a place for the results, all known to be good."""

    target: Target
    source: Input
    writer: ResultWriter
    count: int


def _run_jobs(order: _Order, session: OAuthSession, work: _Work, summary: Summary) -> None:
    from shpool.batch import run_batch
    from shpool.jobs import make_jobs
    from shpool.pool import AuthenticatedProcessPool
    from shpool.progress import Progress

    def opened() -> AuthenticatedProcessPool:
        return stack.enter_context(AuthenticatedProcessPool(session, max_workers=order.workers))

    def conclude() -> None:
        """Count once the pool has ended: its last login is in it then."""
        summary.note(pool.stats())

    with contextlib.ExitStack() as after, contextlib.ExitStack() as stack:
        pool = log_in_patiently(session, opened)
        after.callback(conclude)
        summary.jobs = work.count
        jobs = make_jobs(str(work.target), work.source.calls())
        batch = run_batch(pool, work.target, jobs, retries=order.retries, retry_after_unit=session.retry_after_unit)

        def seconds_left() -> float | None:
            return pool.stats().token_remaining

        with (
            contextlib.closing(batch) as results,
            Progress(work.count, desc=work.target.name, enabled=order.progress, token=seconds_left) as bar,
        ):
            for result in results:
                _record(work.writer.write(result), summary, bar)


def _record(result: JobResult, summary: Summary, bar: Progress) -> None:
    summary.count(result)
    if result.status == "done":
        bar.done()
    else:
        bar.failed()
