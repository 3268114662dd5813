"""`shpool run`: call a function once for every line of an input, in workers that share one login."""

from __future__ import annotations

from typing import Annotated

import typer

from shpool_cli.console import private_stdout
from shpool_cli.credentials import (
    ClientIdOption,
    LoginOptions,
    ProfileOption,
    ScopeOption,
    SecretFileOption,
    TokenUrlOption,
)
from shpool_cli.ending import say_how_to_go_on, see_through
from shpool_cli.options import (
    AddressOption,
    ConnectionsOption,
    EngineName,
    EngineOption,
    FormatOption,
    FreshOption,
    GateOption,
    GateOptions,
    HaltOption,
    JournalOption,
    JsonOption,
    LimitOption,
    MaxTimeOption,
    OnlyFailedOption,
    OutputOption,
    ProgressOption,
    RateOption,
    UnitsOption,
    WorkersOption,
    at_least,
    check_journal,
    check_workers,
    duration,
    engine_of,
)
from shpool_cli.order import Order
from shpool_cli.runner import carry_out
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
    workers: WorkersOption = None,
    engine: EngineOption = EngineName.LOKY,
    address: AddressOption = None,
    retries: Annotated[
        int,
        typer.Option(
            "--retries",
            parser=at_least(0),
            metavar="INTEGER",
            help="Further attempts for a job that met a lost worker, a broken connection, a timeout, "
            "or HTTP 408, 425, 429 or 5xx; with --shell for one that was late, was killed by SIGKILL, or ended with "
            "exit status 75 (EX_TEMPFAIL), not with any other.",
        ),
    ] = 0,
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout", parser=duration, metavar="TIME", help="Longest time an attempt may take: 90, 15m, 2h."
        ),
    ] = None,
    halt: HaltOption = "never",  # type: ignore[assignment]  # typer parses defaults too
    gate: GateOption = None,
    rate: RateOption = None,
    units: UnitsOption = None,
    connections: ConnectionsOption = None,
    max_time: MaxTimeOption = None,
    limit: LimitOption = None,
    shuffle: Annotated[bool, typer.Option("--shuffle", help="Run the jobs in random order.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Run nothing and log in nowhere; check what a run would check before, and write for each job whether "
            "it would run, as JSON Lines.",
        ),
    ] = False,
    journal: JournalOption = None,
    key: Annotated[
        str | None,
        typer.Option(
            "--key",
            metavar="FIELD",
            help="The field that names a job in the journal, another one in every line that differs.",
            show_default="target and all arguments",
        ),
    ] = None,
    only_failed: OnlyFailedOption = False,
    fresh: FreshOption = False,
    output: OutputOption = None,
    ordered: Annotated[
        bool, typer.Option("--ordered", help="Write results in the order of INPUT; the ready ones wait in memory.")
    ] = False,
    form: FormatOption = None,
    progress: ProgressOption = None,
    profile: ProfileOption = None,
    token_url: TokenUrlOption = None,
    client_id: ClientIdOption = None,
    client_secret_file: SecretFileOption = None,
    scope: ScopeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Call a function, or run a command, for every line of an input, in workers that share a login.

    TARGET is imported with the current folder, or the file's own, on the import path. What it prints goes to stderr;
    on a Ray, and on workers of Dask that run already, to their own logs.

    INPUT is JSON Lines (an object becomes keyword arguments, an array positional ones, anything else the
    single argument), CSV with a header (keyword arguments, all text) or plain text (one argument a line). The
    suffix tells: .jsonl, .ndjson, .json; .csv; else text. Standard input is JSON Lines. Blank lines are
    skipped. All of it is checked before the login and before anything runs. Lines that are appended meanwhile are for
    the next run; one that is changed or removed before it was its turn ends the run, with exit code 2.

    Results are JSON Lines in the order the jobs finish: index, key, status, result or error, attempts, seconds. Each
    line is written at once, so an interrupted run keeps them. Dates, durations (as seconds), paths, bytes (base64),
    dataclasses and NumPy values are converted, NaN becomes null; what has no JSON form fails its job. A shell job's
    result, also of one that failed, is what it wrote to stdout and stderr (1 MiB of each at most), exit_status and
    signal.

    With --journal, jobs are known by their content, not by their line: run the same command again after an
    interruption, a crash, or a change of INPUT, and only what is not done runs. Equal lines run once.

    With --engine dask or ray, jobs run on a cluster that has shpool and TARGET: a file at the same path, a module
    installed or on the import path. Only this process logs in.

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
        engine=engine_of(engine, address),
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
        gate=GateOptions(gate, rate, units, connections),
    )
    check_journal(journal, source, output, fresh=fresh, only_failed=only_failed, key=key)
    if engine is EngineName.LOKY:
        check_workers(workers)
    summary = Summary(limit=limit)
    if dry_run:
        with private_stdout() as stdout:
            carry_out(order, stdout, summary)
    else:
        see_through(lambda stdout: carry_out(order, stdout, summary), summary, output, as_json=as_json)
        if journal is not None and not summary.is_complete:
            say_how_to_go_on(journal, fresh=fresh)
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
