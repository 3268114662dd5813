"""Options that commands share, and values of options, read so that a wrong one is named."""

from __future__ import annotations

import enum
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shpool.halting import HaltPolicy
from shpool_cli.console import CommandError
from shpool_cli.inputs import Format
from shpool_cli.places import results_file

if TYPE_CHECKING:
    from collections.abc import Callable

    from shpool.engines.base import EngineDescription
    from shpool.gate import Gate

_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([smhd]?)")
_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_LONGEST = 20 * 86400.0  # s; epoll waits for 2**31 ms at most, which are 24 days
_MOST = 10**9  # of anything; SQLite, for one, counts to 2**63, and more is a slip of the keyboard


def at_least(least: int) -> Callable[[str], int]:
    """Return a reader of whole numbers; the parser's own words do not name what was given."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or number < least:
            msg = f"{str(text)!r} is not a whole number of at least {least}"
            raise typer.BadParameter(msg)
        if number > _MOST:
            msg = f"{str(text)!r} is more than {_MOST}"
            raise typer.BadParameter(msg)
        return number

    return read


def duration(text: str) -> float:
    """Return the seconds of ``90``, ``1.5s``, ``15m``, ``48h`` or ``2d``."""
    match = _DURATION.fullmatch(str(text).strip())
    seconds = float(match[1]) * _SECONDS[match[2]] if match else 0.0
    if not 0.0 < seconds <= _LONGEST:
        msg = f"{str(text)!r} is no time of more than 0 and at most {_LONGEST / 86400:g}d, such as 90, 15m or 48h"
        raise typer.BadParameter(msg)
    return seconds


def rate(text: str) -> str:
    """Return a rate as it was given, once it is known to be one."""
    from shpool.gate.limits import parse_rate

    try:
        parse_rate(str(text))
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from None
    return str(text)


def preset(text: str) -> str:
    """Return the name of a provider whose limits are known."""
    from shpool.gate.limits import preset as limits_of

    try:
        limits_of(str(text))
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from None
    return str(text)


def connection_limit(text: str) -> int:
    """Return how many requests there may be at once."""
    from shpool.gate.limits import MOST_CONNECTIONS

    number = at_least(1)(text)
    if number > MOST_CONNECTIONS:
        msg = f"{number} is more than {MOST_CONNECTIONS}"
        raise typer.BadParameter(msg)
    return number


@dataclass(frozen=True)
class GateOptions:
    """The account's limits, as asked for on the command line.

    Attributes:
        preset: Provider whose limits hold where no other is given; None for none.
        rate: Requests in a time.
        units: Processing units in a time.
        connections: Requests at once.
    """

    preset: str | None = None
    rate: str | None = None
    units: str | None = None
    connections: int | None = None

    def make(self) -> Gate:
        """Return the gate for a pool."""
        from shpool.gate import Gate
        from shpool.gate.limits import preset as limits_of

        given = {"requests": self.rate, "units": self.units, "connections": self.connections}
        given = {name: value for name, value in given.items() if value is not None}
        return Gate(**{**({} if self.preset is None else limits_of(self.preset)), **given})


def halt_policy(text: str) -> HaltPolicy:
    """Return when failures end a run."""
    try:
        return HaltPolicy.parse(str(text))
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from None


def check_journal(  # noqa: PLR0913 - each is an option
    path: Path | None, source: str, output: Path | None, *, fresh: bool, only_failed: bool, key: str | None = None
) -> None:
    """Refuse options about the journal that make no sense together."""
    for name, is_given in (("--only-failed", only_failed), ("--fresh", fresh), ("--key", key)):
        if is_given and path is None:
            msg = f"{name} goes with --journal"
            raise typer.BadParameter(msg)
    if path is not None and str(path) == "-":
        msg = "--journal - is no file: a journal is read and written at any place, which a stream cannot be"
        raise CommandError(msg, "give the name of a file, such as --journal run.db")
    if only_failed and fresh:
        msg = "--only-failed needs what --fresh throws away"
        raise typer.BadParameter(msg)
    for name, other in {"INPUT": None if source == "-" else Path(source), "--output": output}.items():
        # Not by resolve(), which raises where links lead in a circle: whoever opens the file says that.
        if path is not None and other is not None and os.path.realpath(other) == os.path.realpath(path):
            msg = f"--journal and {name} are the same file, {other}"
            raise typer.BadParameter(msg)


class EngineName(str, enum.Enum):
    """Where jobs run."""

    LOKY = "loky"
    DASK = "dask"
    RAY = "ray"


def check_workers(workers: int | None) -> None:
    """Refuse more workers than this machine has room for.

    Raises:
        CommandError: They are more.
    """
    from shpool.checks import room_for_workers

    most, hint = room_for_workers()
    if workers is not None and workers > most:
        msg = f"--workers {workers} is more than one machine has room for"
        raise CommandError(msg, hint)


def engine_of(name: EngineName, address: str | None) -> str | EngineDescription:
    """Return what a pool is told of where to run.

    Raises:
        typer.BadParameter: There is an address, and no cluster that could have it.
        CommandError: It is no address of such a cluster.
    """
    if address is None:
        return name.value
    if name is EngineName.LOKY:
        msg = "--address goes with --engine dask or --engine ray"
        raise typer.BadParameter(msg)
    from shpool import DaskEngine, RayEngine

    try:
        return DaskEngine(address) if name is EngineName.DASK else RayEngine(address)
    except ValueError as exc:
        error, _, hint = str(exc).partition("; ")
        msg = f"--address: {error}"
        raise CommandError(msg, hint) from None


EngineOption = Annotated[
    EngineName,
    typer.Option("--engine", help="Where jobs run: on this machine, or on a cluster, started here without --address."),
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address", help="The cluster's: tcp://host:8786 of a Dask scheduler, host:6379 of a Ray.", show_default=False
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--workers",
        "-w",
        parser=at_least(1),
        metavar="INTEGER",
        help="Worker processes, from 1, and no more than there are jobs; on a cluster, the most jobs to run at once.",
        show_default="one per processor, or all of the cluster",
    ),
]
HaltOption = Annotated[
    HaltPolicy,
    typer.Option(
        "--halt",
        parser=halt_policy,
        metavar="never|soon|now[,fail=N|N%]",
        help="After failures: go on; begin nothing new; or stop what runs, too. After the first one, after N, or after "
        "N percent of all.",
        show_default="never",
    ),
]
RateOption = Annotated[
    str | None,
    typer.Option(
        "--rate",
        parser=rate,
        metavar="N/TIME",
        help="Requests that all workers together may send: 300/min, 5/s, 1000/h.",
        show_default="what the server teaches by 429",
    ),
]
UnitsOption = Annotated[
    str | None,
    typer.Option(
        "--units", parser=rate, metavar="N/TIME", help="Processing units that they may use together: 300/min."
    ),
]
ConnectionsOption = Annotated[
    int | None,
    typer.Option(
        "--connections",
        parser=connection_limit,
        metavar="INTEGER",
        help="Requests that they may have under way together.",
    ),
]
GateOption = Annotated[
    str | None,
    typer.Option(
        "--gate",
        parser=preset,
        metavar="cdse|sentinelhub",
        help="Keep the limits of this provider's accounts; --rate, --units and --connections replace its own.",
    ),
]
MaxTimeOption = Annotated[
    float | None,
    typer.Option("--max-time", parser=duration, metavar="TIME", help="Begin nothing after this time: 90, 15m, 48h."),
]
LimitOption = Annotated[
    int | None,
    typer.Option(
        "--limit", parser=at_least(1), metavar="INTEGER", help="Do so many at most in this run.", show_default="all"
    ),
]
JournalOption = Annotated[
    Path | None,
    typer.Option(
        "--journal",
        "-j",
        metavar="FILE",
        help="Remember in this file what is done; the same command then skips it. See shpool status.",
    ),
]
OnlyFailedOption = Annotated[
    bool, typer.Option("--only-failed", help="Do only what failed in an earlier run with this journal.")
]
FreshOption = Annotated[
    bool, typer.Option("--fresh", help="Forget former runs: empty the journal, and the --output they wrote.")
]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        parser=results_file,
        metavar="FILE",
        help="File for the results, .jsonl, .csv or .parquet, or - for standard output; one that holds something else "
        "than results of an earlier run with this journal is refused.",
        show_default="standard output",
    ),
]
FormatOption = Annotated[Format | None, typer.Option("--format", help="How to read INPUT.", show_default="by suffix")]
ProgressOption = Annotated[
    bool | None, typer.Option("--progress/--no-progress", help="Bar on stderr.", show_default="on a terminal")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Summary as one JSON object: on stdout with --output, else on stderr.")
]
