"""How many processors this process may use. As ``loky.cpu_count()`` tells, without an import that takes 0.1 s."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_CGROUPS = "/sys/fs/cgroup"


def processor_count(cgroups: str | Path = _CGROUPS) -> int:
    """Return how many processors this process may use, 1 at least.

    The least of the machine's, those it is bound to, what its control group may consume at a time (as containers are
    limited), and ``LOKY_MAX_CPU_COUNT``.

    Args:
        cgroups: Where control groups are mounted.
    """
    counts = [os.cpu_count() or 1]
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        counts.append(len(os.sched_getaffinity(0)))
    quota = _quota(cgroups)
    if quota is not None:
        counts.append(quota)
    wanted = os.environ.get("LOKY_MAX_CPU_COUNT", "")
    if wanted.isdecimal():
        counts.append(int(wanted))
    return max(1, min(counts))


def _quota(cgroups: str | Path) -> int | None:
    """Return the processors' time per time that the control group may use, rounded up; None for no limit."""
    try:
        words = _read(f"{cgroups}/cpu.max").split()  # version 2
    except OSError:
        try:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")  # version 1
            words = [_read(f"{cgroups}/cpu/{name}") for name in names]
        except OSError:
            return None
    try:
        quota, period = map(int, words)
    except ValueError:  # "max"
        return None
    return math.ceil(quota / period) if quota > 0 and period > 0 else None


def _read(path: str) -> str:
    with open(path) as stream:  # noqa: PTH123 - to import pathlib takes 5 ms in a script that has no other need of it
        return stream.read()
