"""Soak a pool: short-lived tokens, workers that ask without pause, and a provider that fails in three ways.

Run `python tests/stress_soak.py --seconds 60`; it prints what was counted and exits with 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from dataclasses import dataclass

from shpool import AuthenticatedProcessPool, OAuthSession, current_session
from shpool.testing import LoopbackServer


@dataclass(frozen=True)
class Tally:
    """What a soak counted."""

    seconds: float
    tasks: int
    requests: int
    failed: int
    logins: int
    refused: int


def ask(job: tuple[str, float]) -> tuple[int, int]:
    """Ask a data URL without pause for some seconds; return how often, and how often in vain."""
    url, seconds = job
    session = current_session().http
    asked = failed = 0
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        failed += session.get(url).status_code != 200
        asked += 1
    return asked, failed


def session_of(server: LoopbackServer) -> OAuthSession:
    return OAuthSession(server.token_url, server.client_id, server.client_secret)


def shorten_lives(server: LoopbackServer, lifetime: float) -> None:
    """Let tokens live so long from the next on; a first one of such a life may have expired when it arrives."""
    server.lifetime = lifetime
    server.revoke_all()


def soak(seconds: float, *, lifetime: float = 2.0, workers: int = 8) -> Tally:
    """Let workers ask without pause while tokens come and go."""
    with LoopbackServer() as server:
        began, tasks, asked, failed = time.monotonic(), 0, 0, 0
        with AuthenticatedProcessPool(session_of(server), workers) as pool:
            shorten_lives(server, lifetime)
            jobs = ((server.data_url(n, 1000), 0.2) for n in range(int(seconds / 0.2) * workers))
            for done, vain in pool.map_unordered(ask, jobs, chunksize=1):
                tasks, asked, failed = tasks + 1, asked + done, failed + vain
        return Tally(time.monotonic() - began, tasks, asked, failed, server.logins, server.unauthorized)


def outage(kind: str, seconds: float = 5.0, *, lifetime: float = 4.0, workers: int = 4) -> Tally:
    """Take the token endpoint away for a while, in the middle of a run."""
    with LoopbackServer() as server:
        began, tasks, asked, failed = time.monotonic(), 0, 0, 0
        with AuthenticatedProcessPool(session_of(server), workers) as pool:
            shorten_lives(server, lifetime)
            jobs = [(server.data_url(n, 1000), 0.1) for n in range(int((seconds + lifetime) / 0.1) * workers)]
            heal = threading.Timer(1.0 + seconds, _fail, (server, kind), {"on": False})
            fall = threading.Timer(1.0, _fail, (server, kind), {"on": True})
            fall.start()
            heal.start()
            for done, vain in pool.map_unordered(ask, jobs, chunksize=1):
                tasks, asked, failed = tasks + 1, asked + done, failed + vain
            heal.join()
        return Tally(time.monotonic() - began, tasks, asked, failed, server.logins, server.unauthorized)


def _fail(server: LoopbackServer, kind: str, *, on: bool) -> None:
    if kind == "503":
        server.answer_always(503 if on else None)
    elif kind == "refused":
        server.refuse_connections(on)
    else:
        server.hang(on)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the soak")
    seconds = parser.parse_args().seconds
    tally = soak(seconds)
    most = tally.seconds / 1.5 + 3
    print(f"soak: {tally}, at most {most:.1f} logins")
    is_good = tally.failed == 0 and tally.logins <= most
    for kind in ("503", "refused", "hanging"):
        tally = outage(kind)
        print(f"outage, {kind}: {tally}")
        is_good &= tally.failed == 0
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
