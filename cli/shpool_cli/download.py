"""`shpool download`: fetch the files of an input into a folder, in workers that share one login."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shpool_cli.console import CommandError
from shpool_cli.credentials import (
    ClientIdOption,
    LoginOptions,
    ProfileOption,
    ScopeOption,
    SecretFileOption,
    TokenUrlOption,
)
from shpool_cli.downloading import carry_out
from shpool_cli.ending import say_how_to_go_on, see_through
from shpool_cli.filereport import FileSummary
from shpool_cli.filerun import Order
from shpool_cli.options import (
    ConnectionsOption,
    FormatOption,
    FreshOption,
    GateOption,
    GateOptions,
    HaltOption,
    JournalOption,
    JsonOption,
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
)
from shpool_cli.places import files_folder


def download(  # noqa: PLR0913 - options of a command line
    source: Annotated[
        str,
        typer.Argument(metavar="INPUT", help="A file with a URL or a record a line, or - for standard input."),
    ],
    *,
    folder: Annotated[
        Path,
        typer.Option(
            "--to",
            parser=files_folder,
            metavar="DIR",
            help="Where files go; made if need be. Nothing is written outside.",
        ),
    ],
    workers: WorkersOption = None,
    transfers: Annotated[
        int,
        typer.Option(
            "--transfers",
            parser=at_least(1),
            metavar="INTEGER",
            help="Transfers at once in each worker; --connections limits those of all.",
        ),
    ] = 8,
    gate: GateOption = None,
    rate: RateOption = None,
    units: UnitsOption = None,
    connections: ConnectionsOption = None,
    retries: Annotated[
        int,
        typer.Option(
            "--retries",
            parser=at_least(0),
            metavar="INTEGER",
            help="Further attempts for a file after one that brought no progress, or took longer than --timeout.",
        ),
    ] = 3,
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout",
            parser=duration,
            metavar="TIME",
            help="Longest time an attempt at a file may take: 90, 15m, 2h; the next one goes on where it stood.",
        ),
    ] = None,
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
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Fetch files that are there, too, with --journal also those that are done; after a run with "
            "--overwrite that was ended early or had failures only what that has not fetched.",
        ),
    ] = False,
    ca_bundle: Annotated[
        Path | None,
        typer.Option(
            "--ca-bundle",
            metavar="FILE",
            help="Certificates of the authorities to trust.",
            show_default="REQUESTS_CA_BUNDLE, CURL_CA_BUNDLE, SSL_CERT_FILE, else certifi's",
        ),
    ] = None,
    halt: HaltOption = "never",  # type: ignore[assignment]  # typer parses defaults too
    max_time: MaxTimeOption = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            parser=at_least(1),
            metavar="INTEGER",
            help="Fetch so many files at most in this run; those that are there do not count.",
            show_default="all",
        ),
    ] = None,
    journal: JournalOption = None,
    only_failed: OnlyFailedOption = False,
    fresh: FreshOption = False,
    output: OutputOption = None,
    form: FormatOption = None,
    progress: ProgressOption = None,
    profile: ProfileOption = None,
    token_url: TokenUrlOption = None,
    client_id: ClientIdOption = None,
    client_secret_file: SecretFileOption = None,
    scope: ScopeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fetch files into a folder, many at once, in workers that share a login.

    INPUT is plain text (a URL a line), JSON Lines (a URL or an object) or CSV with a header. Objects and columns have
    url and, where known, path (below DIR; else the name is the URL's or the server's), size (bytes), sha256 and md5.
    The suffix tells: .jsonl, .ndjson, .json; .csv; else text. Standard input is JSON Lines. Blank lines are skipped.
    All of it is checked before the login and before anything is fetched; lines may be appended meanwhile, for the next
    run, but not changed or removed: that ends the run, with exit code 2. Lines that are equal in all fields are one
    file, fetched once and reported for each line; other two with one path are refused.

    A file stands under its name only once it is complete, verified and on disk; until then it is NAME.part, from which
    the next run goes on. A right file that is there is not fetched again: right by its checksum, where one is given or
    the server sends one. Without one the server is asked, one request a file: it must have as many bytes and no later
    date than the file there. That is no proof: the end's words count such files as "by size alone". --overwrite fetches
    them; a checksum or --journal spares the question. The token is renewed while files are on their way, and never sent
    to another origin that a redirect leads to. A web page, or an error in JSON, XML or plain text, is not taken for a
    file that is to be something else.

    Results are JSON Lines in the order the files finish: index, key, status, result (url, path, bytes, received,
    was_there, by_size) or error, attempts, seconds.

    ^C lets running groups of files end for half a second; a second ^C ends at once. The same command goes on; one with
    --overwrite needs --journal for that.

    Exit codes: 0 all done, or as many as --limit asks for, 1 some files failed or were not reached, 2 bad usage or
    input, 3 no login, 129 hung up, 130 interrupted, 143 terminated.
    """
    order = Order(
        source=source,
        folder=folder,
        form=form,
        output=output,
        workers=workers,
        transfers=transfers,
        retries=retries,
        timeout=timeout,
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
        gate=GateOptions(gate, rate, units, connections),
    )
    check_journal(journal, source, output, fresh=fresh, only_failed=only_failed)
    check_workers(workers)
    _check_transfers(transfers)
    if ca_bundle is not None:
        _check_authorities(ca_bundle)
    summary = FileSummary(limit=limit)
    see_through(lambda stdout: carry_out(order, stdout, summary), summary, output, as_json=as_json)
    if not summary.is_complete:
        say_how_to_go_on(journal, fresh=fresh, begins_anew=overwrite and journal is None)
    raise typer.Exit(summary.exit_code)


def _check_transfers(number: int) -> None:
    from shpool.downloads.descriptors import enough_for, most_transfers

    if number > most_transfers():
        msg = f"--transfers {number} needs more open files than a process may have"
        raise CommandError(msg, f"give at most {most_transfers()}, or raise the limit: ulimit -n {enough_for(number)}")


def _check_authorities(bundle: Path) -> None:
    import ssl

    try:
        ssl.create_default_context(cafile=bundle)
    except OSError as exc:
        msg = f"--ca-bundle {bundle} cannot be used: {exc.strerror or exc}"
        raise typer.BadParameter(msg) from None
