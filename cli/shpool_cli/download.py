"""`shpool download`: fetch the files of an input into a folder, in workers that share one login."""

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
from shpool_cli.downloading import carry_out
from shpool_cli.filereport import FileSummary
from shpool_cli.filerun import Order
from shpool_cli.inputs import Format  # noqa: TC001 - typer reads the annotations
from shpool_cli.options import at_least, duration, halt_policy
from shpool_cli.stopping import code_of


def download(  # noqa: PLR0913 - options of a command line
    source: Annotated[
        str,
        typer.Argument(metavar="INPUT", help="A file with a URL or a record a line, or - for standard input."),
    ],
    *,
    folder: Annotated[
        Path, typer.Option("--to", metavar="DIR", help="Where files go; made if need be. Nothing is written outside.")
    ],
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
    connections: Annotated[
        int,
        typer.Option(
            "--connections",
            parser=at_least(1),
            metavar="INTEGER",
            help="Transfers at once in each worker. More than the server allows brings HTTP 429.",
        ),
    ] = 8,
    retries: Annotated[
        int,
        typer.Option(
            "--retries",
            parser=at_least(0),
            metavar="INTEGER",
            help="Further attempts for a file after one that brought no progress.",
        ),
    ] = 3,
    stall_timeout: Annotated[
        float,
        typer.Option(
            "--stall-timeout",
            parser=duration,
            metavar="TIME",
            help="Time without a byte after which a transfer counts as broken: 90, 2m.",
            show_default="2m",
        ),
    ] = 120.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Fetch files that are there, too.")] = False,
    ca_bundle: Annotated[
        Path | None,
        typer.Option(
            "--ca-bundle",
            metavar="FILE",
            help="Certificates of the authorities to trust.",
            show_default="REQUESTS_CA_BUNDLE, CURL_CA_BUNDLE, SSL_CERT_FILE, else certifi's",
        ),
    ] = None,
    halt: Annotated[
        HaltPolicy,
        typer.Option(
            "--halt",
            parser=halt_policy,
            metavar="never|soon|now[,fail=N|N%]",
            help="When files fail: go on; begin nothing new; or stop what runs, too. After the first failure, after N, "
            "or after N percent of all files.",
            show_default="never",
        ),
    ] = "never",  # type: ignore[assignment]  # typer parses defaults too
    max_time: Annotated[
        float | None,
        typer.Option(
            "--max-time", parser=duration, metavar="TIME", help="Begin nothing after this time: 90, 15m, 48h."
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", parser=at_least(1), metavar="INTEGER", help="Fetch so many files at most.", show_default="all"
        ),
    ] = None,
    journal: Annotated[
        Path | None,
        typer.Option(
            "--journal",
            "-j",
            metavar="FILE",
            help="Remember in this file which files are done; the same command then skips them without a look.",
        ),
    ] = None,
    only_failed: Annotated[
        bool, typer.Option("--only-failed", help="Fetch only files that failed in an earlier run with this journal.")
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
    """Fetch files into a folder, many at once, in workers that share a login.

    INPUT is plain text (a URL a line), JSON Lines (a URL or an object) or CSV with a header. Objects and columns have
    url and, where known, path (below DIR; else the name is the URL's or the server's), size (bytes), sha256 and md5.
    The suffix tells: .jsonl, .ndjson, .json; .csv; else text. Standard input is JSON Lines. Blank lines are skipped.
    All of it is checked before the login and before anything is fetched; two files with one path are refused.

    A file stands under its name only once it is complete, verified and on disk; until then it is NAME.part, from which
    the next run goes on. A right file that is there is not fetched again: right by size and checksum where these are
    given, else by the server's word on its size. The token is renewed while files are on their way, and never sent to
    another origin that a redirect leads to. A web page or an error in JSON is not taken for a file.

    Results are JSON Lines in the order the files finish: index, key, status, result (url, path, bytes, received,
    was_there) or error, attempts, seconds.

    ^C lets running groups of files end for half a second; a second ^C ends at once. The same command goes on.

    Exit codes: 0 all done, or as many as --limit asks for, 1 some files failed or were not reached, 2 bad usage or
    input, 3 no login, 129 hung up, 130 interrupted, 143 terminated.
    """
    order = Order(
        source=source,
        folder=folder,
        form=form,
        output=output,
        workers=workers,
        connections=connections,
        retries=retries,
        stall_timeout=stall_timeout,
        overwrite=overwrite,
        ca_bundle=ca_bundle,
        halt=halt,
        max_time=max_time,
        limit=limit,
        journal=journal,
        only_failed=only_failed,
        fresh=fresh,
        progress=progress,
        login=LoginOptions(profile, token_url, client_id, client_secret_file, scope),
    )
    _check(order)
    raise typer.Exit(_fetch(order, as_json=as_json))


def _fetch(order: Order, *, as_json: bool) -> int:
    """Fetch the files, say what it came to, and return the exit code."""
    summary = FileSummary()
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
        summary.tell(stdout if order.output is not None else None, as_json=as_json)
        if not summary.is_complete:
            same = "the same command without --fresh" if order.fresh else "the same command"
            more = "" if order.journal is None else f"; shpool status {order.journal} tells more"
            say(f"hint: {same} goes on where this one ended{more}")
    return summary.exit_code


def _check(order: Order) -> None:
    """Refuse options that make no sense together, or name what cannot be read."""
    for name, is_given in (("--only-failed", order.only_failed), ("--fresh", order.fresh)):
        if is_given and order.journal is None:
            msg = f"{name} goes with --journal"
            raise typer.BadParameter(msg)
    if order.only_failed and order.fresh:
        msg = "--only-failed needs what --fresh throws away"
        raise typer.BadParameter(msg)
    if order.ca_bundle is not None and not order.ca_bundle.is_file():
        msg = f"--ca-bundle {order.ca_bundle} is no file"
        raise typer.BadParameter(msg)
    others = {"INPUT": None if order.source == "-" else Path(order.source), "--output": order.output}
    for name, path in others.items():
        if order.journal is not None and path is not None and path.resolve() == order.journal.resolve():
            msg = f"--journal and {name} are the same file, {path}"
            raise typer.BadParameter(msg)
