"""What reading the token costs in a worker, beside what it is made of and what others need for it.

    python tests/benchmarks/reads.py

Nanoseconds a read, the best of several rounds. sentinelhub's own collect is measured too where it is installed.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # What is imported from: the checkout itself, instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import importlib
import os
import time
import timeit
import warnings

from shpool import SessionSharing, SharedSession, collect_shared_session, current_session
from shpool.shared import adopt_session

_ROUNDS = 40  # short ones: on a busy machine some of them run undisturbed
_BUDGET = 200.0  # ns a steady-state read may take
_FASTER = 300.0  # times: the goal against sentinelhub's collect
# As long as a Sentinel Hub token, about 1,200 characters.
_TOKEN = {"access_token": "invented." + "x" * 1200, "token_type": "Bearer", "expires_in": 3600}


def nanoseconds(statement: str, names: dict[str, object], calls: int = 20_000) -> float:
    """Return the cost of a statement; the loop around it is in it, with some 10 ns."""
    return min(timeit.repeat(statement, globals=names, number=calls, repeat=_ROUNDS)) / calls * 1e9


def show(what: str, cost: float) -> None:
    print(f"{what:<58}{cost:>12,.0f} ns")


def reparse_cost(shared: SharedSession) -> float:
    """Return the cost of the first read after a rotation: copy, digest, JSON."""
    return nanoseconds("shared.wait_for_token(0)", {"shared": shared}, calls=500)


def measure(shared: SharedSession) -> float:
    """Print our own costs; return that of the read users make."""
    former = adopt_session(shared)
    try:
        read = nanoseconds("current_session().token", {"current_session": current_session})
    finally:
        adopt_session(former)
    word = shared._reader.version_word
    show("current_session().token", read)
    show("SharedSession.token", nanoseconds("shared.token", {"shared": shared}))
    show("SharedSession.token, first read after a rotation", reparse_cost(shared))
    show("version check", nanoseconds("word[0] == 1", {"word": word}))
    bare = nanoseconds("now() < end", {"now": time.time, "end": time.time() + 3600})
    show("time.time() and compare", bare)
    print(f"{'current_session().token, in times of that':<58}{read / bare:>12,.1f}")
    return read


def sentinelhub_cost(name: str) -> float | None:
    """Return the cost of sentinelhub's collect under the same kind of sharing; None where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = importlib.import_module("sentinelhub.download.session")
    except ImportError:
        return None
    session = theirs.SentinelHubSession.from_token({**_TOKEN, "expires_at": time.time() + 3600})
    session.refresh_before_expiry = 0  # its sharing wants a session that refreshes; this one need not within the hour
    with theirs.SessionSharing(session, memory_name=name):
        return nanoseconds("collect(name).token", {"collect": theirs.collect_shared_session, "name": name}, calls=50)


def main() -> None:
    name = f"benchmark-{os.getpid()}"
    with SessionSharing(lambda: _TOKEN, memory_name=name):
        read = measure(collect_shared_session(name))
    print(f"{'budget for current_session().token':<58}{_BUDGET:>12,.0f} ns: {'kept' if read <= _BUDGET else 'MISSED'}")
    theirs = sentinelhub_cost(f"{name}-theirs")
    if theirs is None:
        print("sentinelhub is not installed; pip install sentinelhub to compare")
        return
    show("sentinelhub: collect_shared_session().token", theirs)
    print(f"ratio {theirs / read:,.0f}; goal {_FASTER:,.0f}: {'kept' if theirs / read >= _FASTER else 'MISSED'}")


if __name__ == "__main__":
    main()
