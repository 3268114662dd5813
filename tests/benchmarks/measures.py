"""One measurement of one peer, in a process of its own: ``main`` is what that process runs.

A measure is called with the peer's opener, a size, a chunk size (None for the peer's default) and ``report``, which it
calls with a figure before the pool is closed: a peer that hangs at its end has still been measured. The standard
library is imported inside functions here, so that the first-result case starts from a bare interpreter.
"""

from __future__ import annotations

import os
import signal
import sys
from collections import deque
from time import perf_counter

from benchmarks.peers import PEERS
from benchmarks.tasks import hold, nap, nap_and_tell, same, spin, wait_at_gate

TYPE_CHECKING = False  # as in tasks.py
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any

    from benchmarks.peers import Opener, Pool

    Report = Callable[[float, str], None]
    Measure = Callable[[Opener, int, int | None, Report], None]

WORKERS = 2  # the budgets were set on two processors
MEGABYTE = 1_000_000
CRASH_PATIENCE = 10.0  # seconds after which results of a lost worker count as never coming


def one_at_a_time(peer: Opener, size: int, _chunk: int | None, report: Report) -> None:
    """Report the median of the µs from a submit to its result."""
    with peer(WORKERS) as pool:
        _warm(pool)
        times = []
        for index in range(size):
            began = perf_counter()
            _run_one(pool, index)
            times.append(perf_counter() - began)
        report(sorted(times)[size // 2] * 1e6, "")


def burst(peer: Opener, size: int, _chunk: int | None, report: Report) -> None:
    """Report thousands of tasks a second, all submitted before the first result is asked for."""
    with peer(WORKERS) as pool:
        _warm(pool)
        submit, take = pool.submit, pool.take
        assert submit is not None
        began = perf_counter()
        handles = [submit(same, index) for index in range(size)]
        for handle in handles:
            take(handle)
        report(size / (perf_counter() - began) / 1e3, "")


def map_rate(peer: Opener, size: int, chunk: int | None, report: Report) -> None:
    """Report millions of items a second over a generator."""
    with peer(WORKERS) as pool:
        _warm(pool)
        report(size / _map_seconds(pool, same, (i for i in range(size)), size, chunk) / 1e6, "")


def map_singly(peer: Opener, size: int, chunk: int | None, report: Report) -> None:
    """Report thousands of items a second."""
    with peer(WORKERS) as pool:
        _warm(pool)
        report(size / _map_seconds(pool, same, (i for i in range(size)), size, chunk) / 1e3, "")


def spin_100_microseconds(peer: Opener, size: int, chunk: int | None, report: Report) -> None:
    _spin_share(peer, 0.0001, size, chunk, report)


def spin_1_millisecond(peer: Opener, size: int, chunk: int | None, report: Report) -> None:
    _spin_share(peer, 0.001, size, chunk, report)


def payload(peer: Opener, size: int, chunk: int | None, report: Report) -> None:
    """Report MB a second, each item counted once though it travels both ways."""
    block = os.urandom(MEGABYTE - 8)
    with peer(WORKERS) as pool:
        _warm(pool)
        # Each item is an object of its own: pickle sends one that repeats within a batch only once.
        seconds = _map_seconds(pool, same, (i.to_bytes(8, "big") + block for i in range(size)), size, chunk)
        report(size / seconds, "")


def uneven(peer: Opener, size: int, chunk: int | None, report: Report) -> None:
    """Report the ideal makespan as per cent of the real one, of naps of 1 to 100 ms in random order."""
    import random

    naps = random.Random(20_240_601)  # any fixed number: all peers and rounds get the same naps
    seconds = [naps.uniform(0.001, 0.1) for _ in range(size)]
    with peer(WORKERS) as pool:
        _warm(pool)
        report(sum(seconds) / WORKERS / _map_seconds(pool, nap, iter(seconds), size, chunk) * 100, "")


def first_result(peer: Opener, _size: int, _chunk: int | None, report: Report) -> None:
    """Report the ms from before the import to the first result."""
    began = perf_counter()
    with peer(WORKERS) as pool:
        _run_one(pool, 1)
        report((perf_counter() - began) * 1e3, "")


def start(peer: Opener, size: int, _chunk: int | None, report: Report) -> None:
    """Report the seconds until every one of so many workers has answered; the import is not counted."""
    import tempfile

    with peer(1):  # imports all there is
        pass
    with tempfile.TemporaryDirectory() as folder:
        arrivals, gate = os.path.join(folder, "arrivals"), os.path.join(folder, "gate")  # noqa: PTH118 - as in tasks
        for path in (arrivals, gate):
            os.mkfifo(path)
        reader = os.open(arrivals, os.O_RDWR)  # both, or a moment without writers would read as the end
        began = perf_counter()
        with peer(size) as pool:
            assert pool.submit is not None
            handles = [pool.submit(wait_at_gate, arrivals, gate) for _ in range(size)]
            there = 0
            while there < size:
                there += len(os.read(reader, size))
            report(perf_counter() - began, "")
            writer = os.open(gate, os.O_RDWR)
            for handle in handles:
                pool.take(handle)
            os.close(writer)
        os.close(reader)


def memory(peer: Opener, size: int, chunk: int | None, report: Report) -> None:
    """Report by how many MB this process grew at most while it mapped a generator."""
    with peer(WORKERS) as pool:
        _warm(pool)
        with open("/proc/self/clear_refs", "w") as control:  # noqa: PTH123 - as in tasks
            control.write("5")  # proc(5): the peak starts again from what is resident now
        before = _resident_kilobytes("VmRSS")
        seconds = _map_seconds(pool, same, (i for i in range(size)), size, chunk)
        report((_resident_kilobytes("VmHWM") - before) / 1024, f"{seconds:.1f} s")


def crash(peer: Opener, size: int, _chunk: int | None, report: Report) -> None:
    """Report how many results arrive of tasks of 50 ms when one worker is killed in their midst."""
    import random
    import threading

    with peer(WORKERS) as pool:
        pids = sorted(set(_together(pool, nap_and_tell, [0.1] * 4)))
        killer = threading.Timer(0.3, os.kill, (random.choice(pids), signal.SIGKILL))
        killer.start()
        began = perf_counter()
        results = sum(1 for _ in _survivors(pool, [0.05] * size))
        seconds = perf_counter() - began
        note = f"{seconds:.2f} s" if seconds < CRASH_PATIENCE else f"gave up after {CRASH_PATIENCE:.0f} s"
        if pool.lost is not None:
            note += f", {pool.lost()} worker lost"
        report(results, note)


def held(peer: Opener, size: int, _chunk: int | None, _report: Report) -> None:
    """Run long tasks until somebody interrupts; the caller does, and takes the time."""
    with peer(WORKERS) as pool:
        for _ in pool.map(hold, [sys.argv[-1]] * size, 1):
            pass


def _spin_share(peer: Opener, seconds: float, size: int, chunk: int | None, report: Report) -> None:
    """Report what the tasks themselves took as per cent of the time all workers had."""
    with peer(WORKERS) as pool:
        _warm(pool)
        taken = _map_seconds(pool, spin, (seconds for _ in range(size)), size, chunk)
        report(size * seconds / WORKERS / taken * 100, "")


def _map_seconds(pool: Pool, fn: Callable[..., Any], items: Iterable[Any], size: int, chunk: int | None) -> float:
    """Return the seconds a whole map took; the results are dropped as they come."""
    began = perf_counter()
    # Enumerated in C: it costs 20 ns an item, and a peer that lost results would show.
    last = deque(enumerate(pool.map(fn, items, chunk), 1), maxlen=1)
    taken = perf_counter() - began
    assert last[0][0] == size, f"{last[0][0]} results of {size}"
    return taken


def _run_one(pool: Pool, item: object) -> None:
    if pool.submit is None:
        deque(pool.map(same, [item], 1), maxlen=0)
    else:
        pool.take(pool.submit(same, item))


def _warm(pool: Pool) -> None:
    """Return once all workers are up and have run something."""
    _together(pool, nap, [0.05] * WORKERS * 2)
    deque(pool.map(same, range(WORKERS * 4), 1), maxlen=0)


def _together(pool: Pool, fn: Callable[..., Any], items: list[Any]) -> list[Any]:
    if pool.submit is None:
        return list(pool.map(fn, items, 1))
    return [pool.take(handle) for handle in [pool.submit(fn, item) for item in items]]


def _survivors(pool: Pool, naps: list[float]) -> Iterator[object]:
    """Yield the results that come; where only a whole map can be asked for, the first error ends it."""
    if pool.submit is None:
        try:
            yield from pool.map(nap, naps, 1)
        except Exception as exc:  # noqa: BLE001 - each library has its own for a dead worker
            print(f"the map ended: {exc!r}", file=sys.stderr)
        return
    give_up = perf_counter() + CRASH_PATIENCE
    handles = [pool.submit(nap, seconds) for seconds in naps]
    yield from (handle for handle in handles if _has_result(pool, handle, give_up))


def _has_result(pool: Pool, handle: object, give_up: float) -> bool:
    try:
        pool.take(handle, max(give_up - perf_counter(), 0.0))
    except Exception as exc:  # noqa: BLE001 - as above
        print(f"a task failed: {exc!r}", file=sys.stderr)
        return False
    return True


def _resident_kilobytes(field: str) -> int:
    with open("/proc/self/status") as status:  # noqa: PTH123 - as in tasks
        return next(int(line.split()[1]) for line in status if line.startswith(field))


MEASURES: dict[str, Measure] = {
    measure.__name__: measure
    for measure in (
        one_at_a_time,
        burst,
        map_rate,
        map_singly,
        spin_100_microseconds,
        spin_1_millisecond,
        payload,
        uneven,
        first_result,
        start,
        memory,
        crash,
        held,
    )
}


def main() -> None:
    """Measure what the arguments say: measure, peer, size, chunk sizes with commas between, folder for the figures."""
    # A shell that runs a script in the background has ^C ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    name, peer, size, chunks, folder = sys.argv[1:]
    for chunk in chunks.split(","):

        def report(value: float, note: str, chunk: str = chunk) -> None:
            with open(os.path.join(folder, "figures"), "a") as figures:  # noqa: PTH118, PTH123 - as in tasks
                figures.write(f"{value!r}\t{chunk}\t{note}\n")

        MEASURES[name](PEERS[peer][1], int(size), int(chunk) if chunk else None, report)
