"""Put the gate under stress: a server that enforces its limits, refusals, and workers that are killed.

Run `python tests/stress_gate.py rate|connections|pause|kills|learn|all`; it prints what was counted and exits with 1 if
a promise was broken.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import itertools
import logging
import os
import random
import signal
import sys
import threading
import time
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import psutil

from shpool import AuthenticatedProcessPool, Gate, OAuthSession, current_session
from shpool.testing import LoopbackServer
from shpool.testing.messages import Request, Response

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from shpool.gate import Ticket

RATE, BURST = 50.0, 10.0  # of the server, requests per second and at once
PATIENCE = 60.0  # s after which something counts as hanging


class Enforcer:
    """Answer the data service's requests by a token bucket, as rate limiting servers do, and remember them."""

    def __init__(self, server: LoopbackServer, *, rate: float = RATE, burst: float = BURST) -> None:
        self.times: list[float] = []  # of requests, by time.monotonic
        self.refused = 0
        self._rate, self._burst = rate, burst
        self._bucket, self._at = burst, time.monotonic()
        self._answer = server._answer_data
        server._endpoints["data"]._answer = self.answer

    def answer(self, request: Request) -> Response:
        now = time.monotonic()
        self.times.append(now)
        self._bucket = min(self._burst, self._bucket + (now - self._at) * self._rate)
        self._at = now
        if self._bucket < 1:
            self.refused += 1
            return Response(429, headers={"Retry-After": "1"})
        self._bucket -= 1
        return self._answer(request)


class Crowd:
    """Answer each request after a while, and count how many are there at once."""

    def __init__(self, server: LoopbackServer, seconds: float, full: int = 0) -> None:
        self.now = self.most = self.served = 0
        self.longest_short = 0.0  # s in which fewer than a full house were there, between two times of one
        self._full, self._left = full, 0.0  # when the house was full last
        self.seconds_at: dict[int, float] = {}  # by how many were there
        self._since = 0.0  # of the first request
        endpoint = server._endpoints["data"]
        respond = endpoint._respond

        def receive(connection: object, request: Request) -> None:
            self._count(1)
            asyncio.get_running_loop().call_later(seconds, finish, connection, request)

        def finish(connection: object, request: Request) -> None:
            self._count(-1)
            self.served += 1
            respond(connection, request)  # type: ignore[arg-type]  # passed on as it came

        endpoint.receive = receive  # type: ignore[method-assign]  # the counting is what differs

    def _count(self, change: int) -> None:
        now = time.monotonic()
        if self._since:
            self.seconds_at[self.now] = self.seconds_at.get(self.now, 0.0) + now - self._since
        self._since = now
        if self._full and self.now == self._full:
            self._left = now
        self.now += change
        if self.now == self._full and self._left:
            self.longest_short = max(self.longest_short, now - self._left)
        self.most = max(self.most, self.now)


def session_of(server: LoopbackServer) -> OAuthSession:
    return OAuthSession(server.token_url, server.client_id, server.client_secret)


class Asker:
    """A bare client with one connection: what is measured is the gate, not an HTTP library."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
        self._target = f"{parts.path}?{parts.query}"
        self._headers = current_session().session_headers

    def ask(self) -> tuple[int, Mapping[str, str]]:
        """Send a request; return status and header fields."""
        self._connection.request("GET", self._target, headers=self._headers)
        answer = self._connection.getresponse()
        answer.read()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}


def ask_until(url: str, end: float) -> tuple[int, int]:
    """Send requests until then, by time.monotonic; return how many were answered, and how many with 429."""
    asker, gate = Asker(url), current_session().gate
    answered = refused = 0
    while time.monotonic() < end:
        with gate.acquire() as ticket:
            status, fields = asker.ask()
            ticket.heed(status, fields)
        answered += 1
        refused += status == 429
    return answered, refused


def ask_blindly(url: str, end: float) -> tuple[int, int]:
    """Do the same without the gate, and wait alone as told."""
    asker = Asker(url)
    answered = refused = 0
    while time.monotonic() < end:
        status, fields = asker.ask()
        answered += 1
        if status == 429:
            refused += 1
            time.sleep(float(fields["retry-after"]))
    return answered, refused


def warm_up(url: str) -> int:
    """Import what a request needs, and leave the others time to do so too."""
    status, _ = Asker(url).ask()
    time.sleep(0.5)
    return status


def warm(pool: AuthenticatedProcessPool, server: LoopbackServer) -> None:
    """Have every worker started before anything is measured."""
    assert set(pool.map(warm_up, [server.data_url(1, 10)] * pool.max_workers, chunksize=1)) == {200}


def told(text: str, *, kept: bool) -> bool:
    print(f"  {'kept  ' if kept else 'BROKEN'} {text}", flush=True)
    return kept


# The scenarios


def rate(seconds: float = 20.0) -> bool:
    """Eight processes against a server that allows 50 requests/s with a burst of 10."""
    kept = True
    for name, gate, ask in (
        ("through the gate", Gate("50/s"), ask_until),
        ("without", None, ask_blindly),
    ):
        with LoopbackServer() as server, AuthenticatedProcessPool(session_of(server), 8, gate=gate) as pool:
            warm(pool, server)
            enforcer = Enforcer(server)
            begun = time.monotonic()
            ends = [pool.submit(ask, server.data_url(1, 10), begun + seconds) for _ in range(8)]
            counts = [end.result(PATIENCE + seconds) for end in ends]
        allowed = RATE * seconds + BURST
        answered, refused = len(enforcer.times), enforcer.refused
        good = answered - refused
        line = (
            f"{name}: {good} of {allowed:.0f} allowed requests ({good / allowed:.1%}), "
            f"{refused} x 429 of {answered} ({refused / max(answered, 1):.2%}); "
            f"by worker {[count for count, _ in counts]}"
        )
        if gate is None:
            print(f"  (beside it) {line}")
        else:
            kept &= told(line, kept=good >= 0.95 * allowed and refused <= 0.01 * answered)
    return kept


def connections(seconds: float = 8.0, most: int = 4) -> bool:
    """Sixteen busy workers and four connections."""
    gate = Gate(connections=most)
    with LoopbackServer() as server, AuthenticatedProcessPool(session_of(server), 16, gate=gate) as pool:
        warm(pool, server)
        crowd = Crowd(server, 0.05, most)
        begun = time.monotonic()
        ends = [pool.submit(ask_until, server.data_url(1, 10), begun + seconds) for _ in range(16)]
        counts = [end.result(PATIENCE + seconds)[0] for end in ends]
        spent = dict(sorted(crowd.seconds_at.items()))
    total = sum(spent.values())
    shares = ", ".join(f"{number}: {span / total:.0%}" for number, span in spent.items())
    return told(
        f"{crowd.served} requests, at most {crowd.most} at once; time by requests at once {shares}; "
        f"fewer than {most} for {crowd.longest_short:.3f} s at a time at most; by worker {counts}",
        kept=crowd.most == most
        and min(counts) > 0
        and gate.stats().connected == 0
        and crowd.longest_short < 0.5
        and spent.get(most, 0.0) > 0.8 * total,
    )


def pause(asked: float = 3.0) -> bool:
    """One 429 with Retry-After: 3 among eight busy workers."""
    kept = True
    for name, gate in (("limit 50/s", Gate("50/s", burst=10)), ("no limit", Gate())):
        with LoopbackServer() as server, AuthenticatedProcessPool(session_of(server), 8, gate=gate) as pool:
            warm(pool, server)
            enforcer = Enforcer(server, rate=1e6, burst=1e6)
            begun = time.monotonic()
            ends = [pool.submit(ask_until, server.data_url(1, 10), begun + 6 + asked) for _ in range(8)]
            time.sleep(2)
            server.fail_next(1, 429, retry_after=asked, at="data")
            for end in ends:
                end.result(PATIENCE)
        told_at = next(at for at, _, status in server.log if status == 429) - time_of_boot()
        after = [at - told_at for at in enforcer.times if at > told_at + 0.1]
        first, second = after[0], sum(at < asked + 1 for at in after)
        in_flight = sum(0 < at - told_at <= 0.1 for at in enforcer.times)
        busiest = most_within(after, 0.1)
        line = (
            f"{name}: {in_flight} under way already within 0.1 s; then none for {first:.3f} s; {second} in the second "
            f"after, {busiest} in the busiest 0.1 s"
        )
        limited = gate.stats().requests is not None
        kept &= told(line, kept=first >= asked and in_flight <= 8 and (not limited or (second <= 52 and busiest <= 10)))
    return kept


def most_within(times: Sequence[float], span: float) -> int:
    """Return the most moments within any such span of the second after the first."""
    times = [at for at in times if at < times[0] + 1]
    return max(sum(begin <= at < begin + span for at in times) for begin in times)


def time_of_boot() -> float:
    """Return the seconds between the server's clock and time.monotonic."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()


def kills(seconds: float = 10.0, number: int = 20) -> bool:
    """Workers killed at random while they wait, hold a slot, or hold the lock."""
    gate = Gate("50/s", connections=6)
    dice = random.Random(7)
    with LoopbackServer() as server, AuthenticatedProcessPool(session_of(server), 8, gate=gate, retries=50) as pool:
        warm(pool, server)
        enforcer = Enforcer(server)
        begun = time.monotonic()
        end = begun + seconds
        ends = [pool.submit(ask_until, server.data_url(1, 10), end) for _ in range(8)]
        killed = 0
        for moment in sorted(dice.uniform(0.2, seconds - 0.3) for _ in range(number)):
            time.sleep(max(0.0, begun + moment - time.monotonic()))
            killed += kill_one(pool, dice)
        undone = wait(ends, PATIENCE).not_done
        taken = gate.stats().connected
        gaps = [later - earlier for earlier, later in itertools.pairwise(sorted(enforcer.times))]
        free = [in_time(gate.acquire) for _ in range(6)]
        for ticket in free:
            ticket.release()
        stats = pool.stats()
    good = len(enforcer.times) - enforcer.refused
    return told(
        f"{killed} kills, {stats.workers_lost} workers lost: {good} of {RATE * seconds:.0f} requests "
        f"({good / RATE / seconds:.1%}), {enforcer.refused} x 429, longest silence {max(gaps):.2f} s, "
        f"{len(undone)} hang, {taken} slots taken at the end",
        kept=not undone and taken == 0 and good >= 0.9 * RATE * seconds and max(gaps) < 1.0 and enforcer.refused <= 5,
    )


def kill_one(pool: AuthenticatedProcessPool, dice: random.Random) -> bool:
    """Kill a worker; tell whether there was one."""
    engine = pool._engine
    pids = engine.pids  # type: ignore[union-attr]  # the crew has them
    with contextlib.suppress(ProcessLookupError, IndexError):
        os.kill(dice.choice(pids), signal.SIGKILL)
        return True
    return False


def in_time(call: Callable[[], Ticket]) -> Ticket:
    """Return what a call returns, or fail when it hangs."""
    outcome: Future[Ticket] = Future()
    threading.Thread(target=lambda: outcome.set_result(call()), daemon=True).start()
    return outcome.result(PATIENCE)


def learn(seconds: float = 40.0) -> bool:
    """No setting at all: what the gate learns of a server's limit."""
    with LoopbackServer() as server, AuthenticatedProcessPool(session_of(server), 8) as pool:
        warm(pool, server)
        enforcer = Enforcer(server)
        begun = time.monotonic()
        ends = [pool.submit(ask_until, server.data_url(1, 10), begun + seconds) for _ in range(8)]
        while not all(end.done() for end in ends):
            time.sleep(5)
            stats = pool.stats().gate
            print(
                f"  after {time.monotonic() - begun:4.0f} s: learned {stats.learned or 0:5.1f} requests/s, "
                f"{stats.refusals} refusals heeded, {len(enforcer.times)} requests, {enforcer.refused} x 429",
                flush=True,
            )
    share = enforcer.refused / len(enforcer.times)
    good = len(enforcer.times) - enforcer.refused
    return told(f"{good} requests passed, {share:.1%} were refused", kept=share < 0.1)


SCENARIOS: dict[str, Callable[[], bool]] = {
    "rate": rate,
    "connections": connections,
    "pause": pause,
    "kills": kills,
    "learn": learn,
}


def main(names: Iterable[str]) -> int:
    kept = True
    for name in names:
        print(f"{name}: {SCENARIOS[name].__doc__}", flush=True)
        kept &= SCENARIOS[name]()
    children = psutil.Process().children(recursive=True)
    left = [child for child in children if "resource_tracker import main" not in " ".join(child.cmdline())]
    return 0 if told(f"{len(left)} processes left", kept=not left) and kept else 1


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR)  # twenty lost workers are the point here
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenario", choices=[*SCENARIOS, "all"])
    chosen = parser.parse_args().scenario
    sys.exit(main(SCENARIOS if chosen == "all" else [chosen]))
