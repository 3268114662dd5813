"""`shpool demo`: many tiles, few logins, on a loopback server that counts them."""

from __future__ import annotations

import hashlib
import json
import math
import time
import zlib
from array import array
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from shpool.refresh import LARGEST_SHARE, REFRESH_POINT
from shpool.tokens import boot_time
from shpool_cli.console import ExitCode, say
from shpool_cli.options import at_least, check_workers

if TYPE_CHECKING:
    from concurrent.futures import Future

    from shpool.pool import AuthenticatedProcessPool
    from shpool.progress import Progress
    from shpool.testing import LoopbackServer

_TILE_SIZE = 64 * 1024  # bytes; computing on one takes some 5 ms of a 2020 laptop
_LIFETIMES = 3.5  # token lifetimes the run is stretched to, however fast the machine
_HASH_ROUNDS = 8
_EARLIEST_REFRESH = LARGEST_SHARE * REFRESH_POINT[1]  # share of a lifetime that is left at the earliest refresh


@dataclass
class Outcome:
    """What a demo came to; the object of --json.

    Attributes:
        lifetimes: Token lifetimes the run has entered.
        logins: Tokens the server gave out.
        plain_pool_logins: What a pool whose workers log in by themselves would have asked for.
        unauthorized: Answers 401 of the data service.
    """

    tiles: int
    workers: int
    right: int = 0
    megabytes: float = 0.0
    seconds: float = 0.0
    lifetimes: int = 0
    logins: int = 0
    plain_pool_logins: int = 0
    refreshes: int = 0
    unauthorized: int = 0

    @property
    def most_logins(self) -> int:
        """The logins that sharing may take: one for each lifetime entered, and one more.

        That one, since the next token is asked for before the present one ends; and on a machine so slow that
        the run takes six lifetimes or more, what these early refreshes add up to.
        """
        return math.floor(self.lifetimes / (1 - _EARLIEST_REFRESH)) + 1

    @property
    def is_good(self) -> bool:
        """Tell whether every tile was right, none was refused, and there were no more logins than allowed."""
        return self.right == self.tiles and self.unauthorized == 0 and self.logins <= self.most_logins

    def table(self) -> str:
        """Return label and value in aligned columns."""
        rows = {
            "tiles right": f"{self.right} of {self.tiles}",
            "megabytes": f"{self.megabytes:.1f}",
            "seconds": f"{self.seconds:.1f}",
            "workers": f"{self.workers}",
            "token lifetimes entered": f"{self.lifetimes}",
            "logins, counted by the server": f"{self.logins}",
            "of these, refreshes": f"{self.refreshes}",
            "logins allowed, at most": f"{self.most_logins}",
            "logins of a plain pool": f"{self.plain_pool_logins}",
            "answers 401": f"{self.unauthorized}",
        }
        label_width, value_width = max(map(len, rows)), max(map(len, rows.values()))
        return "\n".join(f"{label:<{label_width}}  {value:>{value_width}}" for label, value in rows.items())


def demo(
    *,
    tiles: Annotated[
        int, typer.Option("--tiles", parser=at_least(1), metavar="INTEGER", help="Tiles to download and compute on.")
    ] = 300,
    workers: Annotated[
        int, typer.Option("--workers", "-w", parser=at_least(1), metavar="INTEGER", help="Worker processes.")
    ] = 4,
    progress: Annotated[
        bool | None, typer.Option("--progress/--no-progress", help="Bar on stderr.", show_default="on a terminal")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The outcome as one JSON object.")] = False,
) -> None:
    """Show one login serving many processes: no account and no network needed.

    Starts a server on this machine whose tokens live 2 seconds, downloads tiles in worker processes that share
    one login, computes on each, checks every result and prints what the server counted. Takes about 8 seconds.

    Exit codes: 0 all tiles right, no 401 and no more logins than token lifetimes and one; 1 otherwise.
    """
    check_workers(workers)
    raise typer.Exit(run_demo(tiles, workers, progress=progress, as_json=as_json))


def run_demo(
    tiles: int = 300,
    workers: int = 4,
    lifetime: float = 2.0,
    *,
    progress: bool | None = None,
    as_json: bool = False,
) -> int:
    """Run the demo, print its outcome on stdout and return the exit code.

    Args:
        tiles: How many tiles, at least 1.
        workers: How many worker processes, at least 1.
        lifetime: Seconds a token lives.
        progress: Show a bar on stderr; None where that is a terminal.
        as_json: Print a JSON object, else a table.
    """
    from shpool.testing import LoopbackServer

    with LoopbackServer(lifetime) as server:
        outcome = _run(server, Outcome(tiles, workers), progress)
    if as_json:
        typer.echo(json.dumps({**asdict(outcome), "is_good": outcome.is_good}))
    else:
        typer.echo(outcome.table())
    return ExitCode.OK if outcome.is_good else ExitCode.FAILED


def _run(server: LoopbackServer, outcome: Outcome, progress: bool | None) -> Outcome:  # noqa: FBT001 - passed on
    from shpool.pool import AuthenticatedProcessPool
    from shpool.progress import Progress
    from shpool.session import OAuthSession

    session = OAuthSession(server.token_url, server.client_id, server.client_secret)
    began = time.monotonic()
    with AuthenticatedProcessPool(session, max_workers=outcome.workers) as pool:

        def seconds_left() -> float | None:
            return pool.stats().token_remaining

        with Progress(outcome.tiles, desc="demo", unit="tile", enabled=progress, token=seconds_left) as bar:
            _process_all(server, pool, outcome, bar)
    # All now that nobody logs in any more, so that time and logins belong together.
    outcome.seconds = round(time.monotonic() - began, 3)
    outcome.logins = server.logins
    outcome.refreshes = pool.stats().refreshes
    outcome.megabytes = round(server.bytes_sent / 1e6, 3)
    outcome.lifetimes = math.ceil(outcome.seconds / server.lifetime)
    outcome.plain_pool_logins = outcome.workers * outcome.lifetimes
    outcome.unauthorized = server.unauthorized
    return outcome


def _process_all(server: LoopbackServer, pool: AuthenticatedProcessPool, outcome: Outcome, bar: Progress) -> None:
    """Submit every tile, and check each result as it comes."""
    rounds = math.ceil(outcome.tiles / outcome.workers)
    pace = _LIFETIMES * server.lifetime / rounds
    began = boot_time()
    futures: dict[Future[Summary], int] = {
        pool.submit(process_tile, server.data_url(n, _TILE_SIZE), began + (n // outcome.workers + 1) * pace): n
        for n in range(outcome.tiles)
    }
    for future in as_completed(futures):
        if _is_right(future, futures[future]):
            outcome.right += 1
            bar.done()
        else:
            bar.failed()


def _is_right(future: Future[Summary], n: int) -> bool:
    """Check one result against what the tile holds; say what is wrong."""
    from shpool.testing import tile_bytes

    error = future.exception()
    if error is not None:
        say(f"error: tile {n}: {type(error).__name__}: {error}")
    elif future.result() != summarise(tile_bytes(n, _TILE_SIZE)):
        say(f"error: tile {n}: the worker's result is wrong")
    else:
        return True
    return False


@dataclass(frozen=True)
class Summary:
    """What a worker computes of a tile."""

    digest: str
    compressed_size: int
    mean: float
    spread: int


def process_tile(url: str, due: float) -> Summary:
    """Download one tile with the shared token and compute on it; runs in a worker.

    Args:
        url: The tile's address.
        due: When to return at the earliest, on the boot clock that all processes share: so a run spans
            several token lifetimes on any machine.
    """
    import requests

    from shpool import current_session

    response = requests.get(url, headers=current_session().session_headers, timeout=30)
    response.raise_for_status()
    summary = summarise(response.content)
    time.sleep(max(0.0, due - boot_time()))
    return summary


def summarise(content: bytes) -> Summary:
    """Hash, compress and take statistics of the content: work for a processor."""
    digest = b""
    for _ in range(_HASH_ROUNDS):
        digest = hashlib.sha256(digest + content).digest()
    values = array("H", content)
    return Summary(digest.hex(), len(zlib.compress(content)), sum(values) / len(values), max(values) - min(values))
