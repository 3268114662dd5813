"""Real clusters on loopback, one of each kind for a whole session; and those that a test has for itself."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from patience import PATIENCE, until

from shpool.engines.dask import DaskEngine

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from typing_extensions import Self

lasting_sessions: set[int] = set()  # of processes that outlive a test, as what they start does
lasting_ports: set[int] = set()  # on which they listen

needs_dask = [
    pytest.mark.xdist_group("dask"),  # one cluster for all of them
    pytest.mark.skipif(importlib.util.find_spec("distributed") is None, reason="needs pip install '.[dask]'"),
]


class DaskProcesses:
    """A scheduler and workers, each with a nanny, as an administrator would start them.

    Args:
        workers: How many to start with.
        prefix: What the scheduler is started by, such as a command that enters a network namespace.
        host: Where it listens.
        options: For the scheduler and its workers alike.
    """

    def __init__(
        self, workers: int, prefix: Sequence[str] = (), host: str = "127.0.0.1", options: Sequence[str] = ()
    ) -> None:
        self._options = options
        self._folder = tempfile.TemporaryDirectory(prefix="dask-")
        self._processes: list[subprocess.Popen[bytes]] = []
        self._said = Path(self._folder.name) / "scheduler"
        place = ("--host", host, "--port", "0", "--no-dashboard", "--no-show", "--no-jupyter")
        self.scheduler = self._start("scheduler", *place, *options, prefix=prefix)
        until(lambda: self._words_of_scheduler("Scheduler at:"))
        self.address = self._words_of_scheduler("Scheduler at:")
        lasting_ports.add(int(self.address.rpartition(":")[2]))
        for _ in range(workers):
            self.add_worker()

    @property
    def folder(self) -> Path:
        """Where it writes to."""
        return Path(self._folder.name)

    @property
    def pids(self) -> list[int]:
        """Ids of the processes that were started; the workers are their children."""
        return [process.pid for process in self._processes if process.poll() is None]

    def add_worker(self, *options: str, prefix: Sequence[str] = (), nanny: bool = True) -> subprocess.Popen[bytes]:
        """Start a worker and wait until the scheduler knows it; return the process of its nanny."""
        before = self._said.read_text().count("Register worker")
        kind = "--nanny" if nanny else "--no-nanny"
        place = ("--local-directory", self._folder.name, "--no-dashboard", "--memory-limit", "0")
        started = self._start(
            "worker", self.address, "--nthreads", "1", kind, *place, *self._options, *options, prefix=prefix
        )
        until(lambda: self._said.read_text().count("Register worker") > before)
        return started

    def stop_scheduler(self) -> None:
        """Let it listen and never answer."""
        os.kill(self.scheduler.pid, signal.SIGSTOP)

    def close(self) -> None:
        """End all of it."""
        for process in reversed(self._processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGCONT)
                os.killpg(process.pid, signal.SIGTERM)
        for process in reversed(self._processes):
            try:
                process.wait(PATIENCE / 3)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            lasting_sessions.discard(process.pid)
        with contextlib.suppress(OSError):
            self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, *words: str, prefix: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        root = Path(__file__).parents[1]
        paths = [str(path) for path in (root, root / "cli", root / "tests")]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HOME": self._folder.name}
        env["DASK_TEMPORARY_DIRECTORY"] = self._folder.name
        with (self._said if words[0] == "scheduler" else Path(f"{self._said}-{len(self._processes)}")).open(
            "wb"
        ) as log:
            process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "dask", *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=env,
                start_new_session=True,
            )
        self._processes.append(process)
        lasting_sessions.add(process.pid)
        return process

    def _words_of_scheduler(self, mark: str) -> str:
        lines = [line for line in self._said.read_text().splitlines() if mark in line]
        return lines[0].rpartition(mark)[2].strip() if lines else ""


@pytest.fixture(scope="session")
def dask_processes() -> Iterator[DaskProcesses]:
    """Run a scheduler and two workers for all tests of this process."""
    with DaskProcesses(2) as running:
        yield running


@pytest.fixture(scope="session")
def dask_engine(dask_processes: DaskProcesses) -> DaskEngine:
    """Return where that cluster is."""
    return DaskEngine(dask_processes.address)
