"""What the benchmarks run in workers; a module of its own, so that every peer can send these functions by name."""

from __future__ import annotations

import os
import time

# As typing's, which would be loaded here for nothing: the first-result case counts what a peer's own import costs.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

HOLD_SECONDS = 8.0  # what the ^C case leaves running


def same(item: Any) -> Any:
    """Return the item: a task that does nothing."""
    return item


def nap(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def spin(seconds: float) -> float:
    """Keep a processor busy for so long."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass
    return seconds


def nap_and_tell(seconds: float) -> int:
    """Return the worker's process id, after a nap that makes the other workers take tasks too."""
    time.sleep(seconds)
    return os.getpid()


def hold(folder: str) -> None:
    """Leave a mark in the folder, then sleep."""
    with open(os.path.join(folder, f"holding-{os.getpid()}"), "w"):  # noqa: PTH118, PTH123 - pathlib is one import more
        pass
    time.sleep(HOLD_SECONDS)


def wait_at_gate(arrivals: str, gate: str) -> None:
    """Say that this worker is there, then keep it until somebody writes to the gate: each worker answers once.

    Args:
        arrivals: Path of a FIFO that the parent reads.
        gate: Path of a FIFO that the parent opens for writing once all are there.
    """
    with open(arrivals, "wb", buffering=0) as out:  # noqa: PTH123 - as in hold
        out.write(b".")
    with open(gate, "rb"):  # noqa: PTH123 - as in hold
        pass
