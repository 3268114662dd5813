"""`shpool run`: call a function once for every line of an input, in workers that share one login."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from shpool.errors import ShpoolError
from shpool.halting import HaltPolicy  # noqa: TC001 - typer reads the annotations
from shpool_cli.console import CommandError, ExitCode, private_stdout, report, say
from shpool_cli.credentials import (
    ClientIdOption,
    LoginOptions,
    ProfileOption,
    ScopeOption,
    SecretFileOption,
    TokenUrlOption,
)
from shpool_cli.inputs import Format  # noqa: TC001 - typer reads the annotations
from shpool_cli.options import at_least, duration, halt_policy
from shpool_cli.order import Order
from shpool_cli.runner import carry_out
from shpool_cli.stopping import code_of
from shpool_cli.summary import Summary


def run(  # noqa: PLR0913 - options of a command line
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[TARGET] INPUT",
            help="TARGET is package.module:function or path/to/file.py:function, and not given with --shell. "
            "INPUT is a file, or - for standard input.",
            show_default=False,
        ),
    ],
    *,
    shell: Annotated[
        str | None,
        typer.Option(
            "--shell",
            metavar="COMMAND",
            help="Run this command for each line instead of a function: {name} stands for a field, quoted; "
            "the token is in $SHPOOL_TOKEN.",
        ),
    ] = None,
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
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout", parser=duration, metavar="TIME", help="Longest time an attempt may take: 90, 15m, 2h."
        ),
    ] = None,
    halt: Annotated[
        HaltPolicy,
        typer.Option(
            "--halt",
            parser=halt_policy,
            metavar="never|soon|now[,fail=N|N%]",
            help="When jobs fail: go on; begin nothing new; or stop what runs, too. After the first failure, after N, "
            "or after N percent of all jobs.",
            show_default="never",
        ),
    ] = "never",  # type: ignore[assignment]  # typer parses defaults too
    max_time: Annotated[
        float | None,
        typer.Option("--max-time", parser=duration, metavar="TIME", help="Begin no job after this time: 90, 15m, 48h."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", parser=at_least(1), metavar="INTEGER", help="Run so many jobs at most.", show_default="all"
        ),
    ] = None,
    shuffle: Annotated[bool, typer.Option("--shuffle", help="Run the jobs in random order.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Run nothing; write for each job whether it would run, as JSON Lines.")
    ] = False,
    journal: Annotated[
        Path | None,
        typer.Option(
            "--journal",
            "-j",
            metavar="FILE",
            help="Remember in this file which jobs are done; the same command then skips them. See shpool status.",
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            "--key",
            metavar="FIELD",
            help="The field that names a job in the journal.",
            show_default="target and all arguments",
        ),
    ] = None,
    only_failed: Annotated[
        bool, typer.Option("--only-failed", help="Run only jobs that failed in an earlier run with this journal.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Empty the journal first.")] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="File for the results, .jsonl, .csv or .parquet; one that holds something else than results of an "
            "earlier run with this journal is refused.",
            show_default="standard output",
        ),
    ] = None,
    ordered: Annotated[
        bool, typer.Option("--ordered", help="Write results in the order of INPUT; the ready ones wait in memory.")
    ] = False,
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
    """Call a function, or run a command, for every line of an input, in workers that share a login.

    TARGET is imported with the current folder, or the file's own, on the import path. What it prints goes to stderr.

    INPUT is JSON Lines (an object becomes keyword arguments, an array positional ones, anything else the
    single argument), CSV with a header (keyword arguments, all text) or plain text (one argument a line). The
    suffix tells: .jsonl, .ndjson, .json; .csv; else text. Standard input is JSON Lines. Blank lines are
    skipped. All of it is checked before the login and before anything runs.

    Results are JSON Lines in the order the jobs finish: index, key, status, result or error, attempts, seconds. Each
    line is written at once, so an interrupted run keeps them. Dates, paths, bytes (base64), dataclasses and NumPy
    values are converted, NaN becomes null; what has no JSON form fails its job. A shell job's result is what it wrote
    to stdout and stderr.

    With --journal, jobs are known by their content, not by their line: run the same command again after an
    interruption, a crash, or a change of INPUT, and only what is not done runs. Equal lines run once.

    ^C lets running jobs end for half a second; a second ^C ends at once.

    Exit codes: 0 all done, or as many as --limit allows, 1 some jobs failed or were not reached, 2 bad usage or
    input, 3 no login, 129 hung up, 130 interrupted, 143 terminated.
    """
    login = LoginOptions(profile, token_url, client_id, client_secret_file, scope)
    target, source = _target_and_input(words, shell)
    order = Order(
        target=target,
        shell=shell,
        source=source,
        form=form,
        output=output,
        ordered=ordered,
        workers=workers,
        retries=retries,
        timeout=timeout,
        halt=halt,
        max_time=max_time,
        limit=limit,
        shuffle=shuffle,
        dry_run=dry_run,
        journal=journal,
        key=key,
        only_failed=only_failed,
        fresh=fresh,
        progress=progress,
        login=login,
    )
    _check(order)
    summary = Summary()
    began = time.monotonic()
    with private_stdout() as stdout:
        try:
            carry_out(order, stdout, summary)
            if summary.failed or summary.halted:
                summary.exit_code = ExitCode.FAILED
        except (KeyboardInterrupt, SystemExit, ShpoolError, CommandError) as stop:
            if summary.jobs is None:
                raise
            if isinstance(stop, (ShpoolError, CommandError)):
                report(stop)
            summary.exit_code = code_of(stop)
        summary.seconds = round(time.monotonic() - began, 3)
        if not dry_run:
            summary.tell(stdout if output is not None else None, as_json=as_json)
            if journal is not None and not summary.is_complete:
                same = "the same command without --fresh" if fresh else "the same command"
                say(f"hint: {same} goes on where this one ended; shpool status {journal} tells more")
    raise typer.Exit(summary.exit_code)


def _target_and_input(words: list[str], shell: str | None) -> tuple[str | None, str]:
    if shell is not None:
        if len(words) == 1:
            return None, words[0]
        msg = f"with --shell there is INPUT alone, not {' '.join(words)}"
    elif len(words) == 2:  # noqa: PLR2004 - the two of the usage line
        return words[0], words[1]
    elif len(words) == 1:
        msg = "INPUT is missing"
    else:
        msg = f"TARGET and INPUT are enough, but there is {' '.join(words[2:])}"
    raise typer.BadParameter(msg)


def _check(order: Order) -> None:
    """Refuse options that make no sense together."""
    for name, is_given in (("--only-failed", order.only_failed), ("--fresh", order.fresh), ("--key", order.key)):
        if is_given and order.journal is None:
            msg = f"{name} goes with --journal"
            raise typer.BadParameter(msg)
    if order.only_failed and order.fresh:
        msg = "--only-failed needs what --fresh throws away"
        raise typer.BadParameter(msg)
    others = {"INPUT": None if order.source == "-" else Path(order.source), "--output": order.output}
    for name, path in others.items():
        if order.journal is not None and path is not None and path.resolve() == order.journal.resolve():
            msg = f"--journal and {name} are the same file, {path}"
            raise typer.BadParameter(msg)
