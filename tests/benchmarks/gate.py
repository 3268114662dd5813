"""What the gate costs: a free one, one with limits that nobody contends for, and one that four processes contend for.

Run `python tests/benchmarks/gate.py`; it prints the best of many rounds and asserts nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # What is imported from: tests/ and the checkout itself, instead of this folder.
    sys.path[:1] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]

import multiprocessing
import statistics
import time
from typing import TYPE_CHECKING

from shpool import Gate
from shpool.gate.segment import Segment, own_descriptor

if TYPE_CHECKING:
    from multiprocessing.queues import SimpleQueue

_BUDGET = 20.0  # µs for an acquire that nobody contends for
_FAST = "1000000/s"
_ROUNDS, _CALLS = 40, 1_000


def microseconds(gate: Gate | None, calls: int = _CALLS) -> float:
    """Return the best time of an acquire and its release: on a busy machine some rounds run undisturbed."""
    rounds = []
    for _ in range(_ROUNDS):
        begun = time.perf_counter()
        if gate is None:
            for _ in range(calls):
                pass
        else:
            for _ in range(calls):
                with gate.acquire():
                    pass
        rounds.append((time.perf_counter() - begun) / calls * 1e6)
    return min(rounds)


def contend(gate: Gate, results: SimpleQueue[float]) -> None:
    """Measure in a process of its own."""
    results.put(microseconds(Gate._attached(Segment(own_descriptor(gate._segment.descriptor)))))


def show(name: str, figure: float, verdict: str = "") -> None:
    print(f"{name:<52}{figure:>9.2f} µs{verdict}")


def main() -> None:
    loop = microseconds(None)
    free = Gate()
    show("free gate: nothing set, nothing refused", microseconds(free, 10_000) - loop)
    for name, gate in {
        "a rate": Gate(_FAST, burst=1e6),
        "a rate and units": Gate(_FAST, _FAST, burst=1e6),
        "connections": Gate(connections=4),
        "all three": Gate(_FAST, _FAST, 4, burst=1e6),
    }.items():
        cost = microseconds(gate) - loop
        show(f"uncontended: {name}", cost, f"   budget {_BUDGET:.0f}: {'kept' if cost < _BUDGET else 'MISSED'}")
    context = multiprocessing.get_context("fork")
    results: SimpleQueue[float] = context.SimpleQueue()
    gate = Gate(_FAST, burst=1e6)
    crowd = [context.Process(target=contend, args=(gate, results)) for _ in range(4)]
    for process in crowd:
        process.start()
    show("a rate, four processes at once, each", statistics.median(results.get() for _ in crowd))
    for process in crowd:
        process.join()


if __name__ == "__main__":
    main()
