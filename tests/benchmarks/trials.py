"""Run one measurement in a process group of its own, and leave nothing of it behind."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.measures import WORKERS
from benchmarks.peers import PEERS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from benchmarks.cases import Case

_ROOT = Path(__file__).resolve().parents[2]
_CODE = "from benchmarks.measures import main; main()"  # no file: workers must not import one as their main module
_GRACE = 1.0  # seconds a process group has to vanish after its leader


@dataclass(frozen=True)
class Figure:
    """What one measurement gave.

    Attributes:
        value: In the case's unit.
        chunk: The chunk size it was measured with, None for the default.
        note: What else is to be told.
    """

    value: float
    chunk: int | None = None
    note: str = ""


class TrialError(Exception):
    """There is no figure; the text says why."""


def missing_modules(names: tuple[str, ...]) -> dict[str, str]:
    """Return the peers that are not installed, and the module each lacks."""
    return {name: PEERS[name][0] for name in names if importlib.util.find_spec(PEERS[name][0]) is None}


def measure(case: Case, peer: str, size: int, chunks: tuple[int | None, ...]) -> list[Figure]:
    """Measure one peer, once with each chunk size.

    Raises:
        TrialError: It failed or hung without a figure.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        arguments = [case.measure, peer, str(size), ",".join(str(chunk or "") for chunk in chunks), name]
        with (folder / "output").open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-c", _CODE, *arguments],
                cwd=name,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            if case.is_interrupted:
                return [_interrupt(process, folder, case.limit)]
            return _figures(process, folder, case.limit * len(chunks))
        finally:
            _end_group(process)


def _environment() -> Mapping[str, str]:
    environment = dict(os.environ)
    # Without .pyc files every start would compile; the round that warms up writes them.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    paths = [str(_ROOT), str(_ROOT / "tests"), *filter(None, [environment.get("PYTHONPATH")])]
    return {**environment, "PYTHONPATH": os.pathsep.join(paths)}


def _figures(process: subprocess.Popen[bytes], folder: Path, limit: float) -> list[Figure]:
    is_hung = False
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        is_hung = True
    remark = "; hangs at its end" if is_hung else _remark_on_survivors(process.pid)
    figures = []
    with suppress(FileNotFoundError):
        for line in (folder / "figures").read_text().splitlines():
            value, chunk, note = line.split("\t")
            figures.append(Figure(float(value), int(chunk) if chunk else None, (note + remark).removeprefix("; ")))
    if figures:
        return figures
    raise TrialError(f"hangs (> {limit:.0f} s)" if is_hung else f"fails: {_last_line(folder)}")


def _interrupt(process: subprocess.Popen[bytes], folder: Path, limit: float) -> Figure:
    """Send ^C as a terminal does, to the whole group, once every worker runs a task."""
    if not _until(lambda: process.poll() is not None or len(list(folder.glob("holding-*"))) >= WORKERS, limit):
        raise TrialError("its tasks never start")
    if process.poll() is not None:
        raise TrialError(f"fails: {_last_line(folder)}")
    time.sleep(0.2)  # the parent comes to rest waiting for results
    began = time.perf_counter()
    os.killpg(process.pid, signal.SIGINT)
    if not _until(lambda: process.poll() is not None, limit):
        raise TrialError(f"hangs (> {limit:.0f} s)")
    seconds = time.perf_counter() - began
    return Figure(seconds, 1, f"exit {process.returncode}{_remark_on_survivors(process.pid)}")


def _until(is_so: Callable[[], bool], limit: float) -> bool:
    """Wait for a condition; Popen.wait alone would look only every 50 ms."""
    give_up = time.monotonic() + limit
    while not is_so():
        if time.monotonic() > give_up:
            return False
        time.sleep(0.005)
    return True


def _remark_on_survivors(group: int) -> str:
    _until(lambda: not _survivors(group), _GRACE)
    left = len(_survivors(group))
    return f"; leaves {left} processes" if left else ""


def _survivors(group: int) -> list[int]:
    """Return the processes of a group that still run, zombies not counted."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # gone meanwhile
            # proc_pid_stat(5): pid (command) state ppid pgrp ...; the command may hold blanks and brackets.
            state, _, pgrp = entry.read_text().rpartition(")")[2].split()[:3]
            if int(pgrp) == group and state != "Z":
                found.append(int(entry.parent.name))
    return found


def _end_group(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None or _survivors(process.pid):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_line(folder: Path) -> str:
    lines = (folder / "output").read_text(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "no output")[:120]
