"""Put the crew under stress: killed workers, ended parents, interrupts, and hundreds of starts.

Run `python tests/stress_crew.py lost|chaos|ends|starts|window|all`; it prints what was counted and exits with 1 if a
promise was broken.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from concurrent.futures import Future, as_completed
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import psutil
from patience import until

from shpool import AuthenticatedProcessPool, OAuthSession, current_session
from shpool.errors import TaskTimeoutError, WorkerLostError
from shpool.testing import LoopbackServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SHARED_MEMORY = Path("/dev/shm")
PATIENCE = 60.0  # s after which something counts as hanging


def session_of(server: LoopbackServer) -> OAuthSession:
    return OAuthSession(server.token_url, server.client_id, server.client_secret)


def workers_of(pid: int) -> set[int]:
    """Return the process ids of a process's workers; its resource trackers are none."""
    found = set()
    for child in psutil.Process(pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "shpool-worker" in " ".join(child.cmdline()):
                found.add(child.pid)
    return found


def note_and_wait(folder: str, number: int, seconds: float) -> int:
    """Leave a file for this run, wait, return the number."""
    Path(folder, f"{number}.{os.getpid()}.{time.monotonic_ns()}").touch()
    time.sleep(seconds)
    return number


def runs_in(folder: str) -> collections.Counter[int]:
    """Return how often each number was run."""
    return collections.Counter(int(path.name.split(".")[0]) for path in Path(folder).iterdir())


# One worker killed among 40 tasks


def lose_one(retries: int) -> bool:
    """Kill a worker in its task at a random moment among 40; tell whether that cost what it may cost."""
    with LoopbackServer() as server, tempfile.TemporaryDirectory() as folder:
        with AuthenticatedProcessPool(session_of(server), 4, retries=retries) as pool:
            futures = [pool.submit(note_and_wait, folder, number, 0.2) for number in range(40)]
            moment = random.randint(1, 40)
            while len(runs := list(Path(folder).iterdir())) < moment:
                time.sleep(0.001)
            newest = max(runs, key=lambda path: int(path.suffix[1:]))  # of the task that began last, so it runs
            os.kill(int(newest.name.split(".")[1]), signal.SIGKILL)
            results, errors = [], []
            for future in as_completed(futures, PATIENCE):
                error = future.exception()
                results += [] if error else [future.result()]
                errors += [error] if error else []
            lost = pool.stats().workers_lost
        again = sum(count - 1 for count in runs_in(folder).values())
    good = lost == 1 and again == (retries > 0) and len(results) == 40 - (retries == 0)
    if not retries:
        good &= [type(error) for error in errors] == [WorkerLostError] and "note_and_wait" in str(errors[0])
    if not good:
        print(f"  {len(results)} results, {again} run again, {lost} lost, errors {errors}")
    return good


def show_lost() -> bool:
    outcomes = {retries: [lose_one(retries) for _ in range(25)] for retries in (1, 0)}
    print(f"1 of 4 workers killed in 40 tasks, retries=1: 40 of 40 results, 1 run again, in {sum(outcomes[1])} of 25")
    print(f"the same, retries=0: 39 of 40 results and an error that names the task, in {sum(outcomes[0])} of 25")
    return all(outcomes[1]) and all(outcomes[0])


# Chaos


def work_or_hang(number: int) -> tuple[int, bool]:
    """Take a random time, at times for ever; return whether there was a valid token."""
    dice = random.Random(f"{number} {os.getpid()} {time.monotonic_ns()}")
    time.sleep(600.0 if dice.random() < 0.02 else dice.uniform(0.0, 0.05))
    return number, bool(current_session().token)


def show_chaos(seconds: float = 60.0) -> bool:
    """Kill a worker every 200 ms while tokens live 2 s and tasks time out at random."""
    ends: collections.Counter[int] = collections.Counter()
    kinds: collections.Counter[str] = collections.Counter()
    stop = threading.Event()
    kills = 0

    def kill() -> None:
        nonlocal kills
        while not stop.wait(0.2):
            if running := workers_of(os.getpid()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(random.choice(sorted(running)), signal.SIGKILL)
                    kills += 1

    before = set(SHARED_MEMORY.iterdir())
    with LoopbackServer(lifetime=2.0) as server:
        killer = threading.Thread(target=kill)
        with AuthenticatedProcessPool(session_of(server), 4) as pool, contextlib.ExitStack() as stack:
            killer.start()
            stack.callback(killer.join)
            stack.callback(stop.set)
            give_up, numbers = time.monotonic() + seconds, itertools.count()
            under_way: set[Future[tuple[int, bool]]] = set()
            while time.monotonic() < give_up or under_way:
                while time.monotonic() < give_up and len(under_way) < 40:
                    view = pool.options(retries=random.choice([0, 3, 20]), timeout=random.uniform(0.2, 2.0))
                    number = next(numbers)
                    future = view.submit(work_or_hang, number)
                    future.number = number  # type: ignore[attr-defined]  # for the count below
                    under_way.add(future)
                future = next(as_completed(under_way, PATIENCE))
                under_way.remove(future)
                error = future.exception()
                kinds[type(error).__name__ if error else "result"] += 1
                if error is None:
                    number, has_token = future.result()
                    kinds["no token"] += not has_token
                ends[future.number] += 1  # type: ignore[attr-defined]  # as above
            stack.close()
            stats = pool.stats()
        logins = server.logins
    count = next(numbers)
    left = workers_of(os.getpid()) or set(SHARED_MEMORY.iterdir()) - before
    print(f"chaos for {seconds:.0f} s: {count} tasks, {len(ends)} ended, {dict(kinds)}")
    print(
        f"  {kills} kills, {stats.workers_lost} workers lost, {stats.tasks_retried} retries, {logins} logins, "
        f"left behind: {left or 'nothing'}"
    )
    allowed = {"result", "no token", WorkerLostError.__name__, TaskTimeoutError.__name__}
    once = len(ends) == count and set(ends.values()) <= {1}
    return once and set(kinds) <= allowed and not kinds["no token"] and not left


# How a parent ends

PARENT = """
    import itertools, os, signal, sys, time
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from shpool import AuthenticatedProcessPool, OAuthSession
    session = OAuthSession(sys.argv[1], "demo-client", os.environ["SH_CLIENT_SECRET"])
    with AuthenticatedProcessPool(session, 4) as pool:
        if sys.argv[2] == "busy":
            futures = [pool.submit(time.sleep, 8) for _ in range(16)]
        pool.submit(int) if sys.argv[2] == "busy" else pool.submit(int).result()
        print("begun", flush=True)
        time.sleep(600)
"""


def end_parent(server: LoopbackServer, kind: str, numbers: list[signal.Signals]) -> tuple[int, float, float]:
    """Return the exit code, and the seconds until the parent and its last worker were gone."""
    command = [sys.executable, "-c", textwrap.dedent(PARENT), server.token_url, kind]
    env = {**os.environ, "SH_CLIENT_SECRET": server.client_secret}
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"begun\n"
    while len(workers := workers_of(process.pid)) < 4:
        time.sleep(0.005)
    return _end_and_time(process, numbers, workers)


def end_command(server: LoopbackServer, kind: str, numbers: list[signal.Signals]) -> tuple[int, float, float]:
    """The same for `shpool run`."""
    del kind
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder, "input.jsonl")
        inputs.write_text("8\n" * 100)
        command = [sys.executable, "-m", "shpool_cli.app", "run", "time:sleep", str(inputs), "--workers", "4"]
        command += ["--token-url", server.token_url, "--client-id", server.client_id, "--no-progress"]
        env = {**os.environ, "SH_CLIENT_SECRET": server.client_secret, "HOME": folder}
        process = subprocess.Popen(
            command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        while len(workers := workers_of(process.pid)) < 4:
            time.sleep(0.005)
        time.sleep(1.0)  # not a wait for anything: lets the tasks begin, as a user would
        return _end_and_time(process, numbers, workers)


ENDING_PARENT = """
    import os, signal, sys
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from shpool import AuthenticatedProcessPool, OAuthSession
    session = OAuthSession(sys.argv[1], "demo-client", os.environ["SH_CLIENT_SECRET"])
    print("begun", flush=True)
    with AuthenticatedProcessPool(session, 4) as pool:
        sum(pool.map(abs, range(100)))
        if sys.argv[2] == "stopping":
            print("stopping", flush=True)
    sys.stdin.read()
"""


def end_passing_parent(server: LoopbackServer, kind: str, numbers: list[signal.Signals]) -> tuple[int, float, float]:
    """The same for a parent that is starting or stopping its workers, at a random moment of that."""
    command = [sys.executable, "-c", textwrap.dedent(ENDING_PARENT), server.token_url, kind]
    env = {**os.environ, "SH_CLIENT_SECRET": server.client_secret}
    process = subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == b"begun\n"
    if kind == "stopping":
        assert process.stdout.readline() == b"stopping\n"
    time.sleep(random.uniform(0.0, 0.5 if kind == "starting" else 0.05))
    ends = _end_and_time(process, numbers, workers_of(process.pid))
    process.stdin.close()
    return ends


def _end_and_time(
    process: subprocess.Popen[bytes], numbers: list[signal.Signals], workers: set[int]
) -> tuple[int, float, float]:
    began = time.monotonic()
    for number in numbers:
        if number == signal.SIGINT:  # as the terminal sends it
            os.killpg(process.pid, number)
        else:
            os.kill(process.pid, number)
    code = process.wait(PATIENCE)
    ended = time.monotonic() - began
    give_up = began + PATIENCE
    while any(_is_alive(pid) for pid in workers) and time.monotonic() < give_up:
        time.sleep(0.002)
    if process.stdout is not None:
        process.stdout.close()
    return code, ended, time.monotonic() - began


def _is_alive(pid: int) -> bool:
    """Tell whether a process runs; whoever inherits an orphan may take his time to reap it."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def show_ends(rounds: int = 10) -> bool:
    """Print how long parent and workers take to end, over ten runs each."""
    before, is_good = set(SHARED_MEMORY.iterdir()), True
    signals = {
        "^C": [signal.SIGINT],
        "^C twice": [signal.SIGINT, signal.SIGINT],
        "SIGTERM": [signal.SIGTERM],
        "SIGKILL": [signal.SIGKILL],
    }
    codes = {"^C": {-2, 130}, "^C twice": {-2, 130}, "SIGTERM": {-15, 143}, "SIGKILL": {-9}}
    runners: dict[str, tuple[Callable[..., tuple[int, float, float]], str]] = {
        "script, 8 s tasks": (end_parent, "busy"),
        "script, idle": (end_parent, "idle"),
        "script, starting": (end_passing_parent, "starting"),
        "script, stopping": (end_passing_parent, "stopping"),
        "shpool run, 8 s tasks": (end_command, "busy"),
    }
    print(f"{'':<24}{'':<10}{'exit codes':<12}{'parent gone, s':<22}{'last worker gone, s':<22}")
    with LoopbackServer() as server:
        for (name, (run, kind)), (title, numbers) in itertools.product(runners.items(), signals.items()):
            ends = [run(server, kind, numbers) for _ in range(rounds)]
            seen = {code for code, _, _ in ends}
            parents, lasts = [parent for _, parent, _ in ends], [last for _, _, last in ends]
            print(
                f"{name:<24}{title:<10}{','.join(map(str, sorted(seen))):<12}"
                f"{_spread(parents):<22}{_spread(lasts):<22}",
                flush=True,
            )
            is_good &= seen <= codes[title] and max(parents) < 1.0 and max(lasts) < 2.0
    left = set(SHARED_MEMORY.iterdir()) - before
    print(f"left in {SHARED_MEMORY}: {left or 'nothing'}")
    return is_good and not left


def _spread(seconds: list[float]) -> str:
    return f"{median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"


# Starts and stops


def show_starts(rounds: int = 200) -> bool:
    """Start and stop a pool again and again; what the process holds must not grow."""
    me = psutil.Process()

    def held() -> dict[str, int]:
        return {
            "descriptors": me.num_fds(),
            "threads": me.num_threads(),
            "children": len(me.children(recursive=True)),
            "shared memory": len(list(SHARED_MEMORY.iterdir())),
        }

    def start_and_stop() -> dict[str, int]:
        with AuthenticatedProcessPool(session_of(server), 2) as pool:
            assert list(pool.map(abs, range(-4, 0))) == [4, 3, 2, 1]
        return held()

    def has_grown() -> bool:
        now = held()
        now["descriptors"] -= 1
        return any(now[name] > before[name] for name in now)

    with LoopbackServer() as server:
        before = start_and_stop()
        for _ in range(rounds):
            start_and_stop()
        with contextlib.suppress(AssertionError):
            until(lambda: not has_grown())  # the server's own thread for the last login may take a moment
        print(f"held after the first start and stop {before}, after {rounds} more {held()}")
        return not has_grown()


# What a map pulls


def show_window() -> bool:
    """Let the consumer of an endless map idle; then take a thousand results."""
    pulled = 0

    def source() -> Iterator[int]:
        nonlocal pulled
        for number in itertools.count():
            pulled += 1
            yield number

    seen = []
    with LoopbackServer() as server, AuthenticatedProcessPool(session_of(server), 2) as pool:
        pool.submit(int).result()
        for options in ({"chunksize": 1}, {"chunksize": 10}, {"chunksize": 10, "buffersize": 25}, {}):
            pulled = 0
            results = pool.map(abs, source(), **options)
            for _ in range(10):
                next(results)
            time.sleep(1.0)  # the consumer idles
            first = pulled
            time.sleep(2.0)
            seen.append((options, first, pulled))
            results.close()  # type: ignore[attr-defined]  # a generator
        taken = list(itertools.islice(pool.map(abs, itertools.count()), 1000))
    for options, first, then in seen:
        print(f"map({options or 'defaults'}) of an endless input: {first} pulled, {then} after 2 idle s more")
    print(f"islice(pool.map(abs, count()), 1000): {len(taken)} results")
    return all(first == then for _, first, then in seen) and taken == list(range(1000))


PARTS: dict[str, Callable[[], bool]] = {
    "lost": show_lost,
    "window": show_window,
    "ends": show_ends,
    "starts": show_starts,
    "chaos": show_chaos,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "all"])
    chosen = parser.parse_args().part
    # A shell that runs a script in the background has ^C ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    outcomes = {name: part() for name, part in PARTS.items() if chosen in {name, "all"}}
    print({name: "good" if is_good else "BROKEN" for name, is_good in outcomes.items()})
    return 0 if all(outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
