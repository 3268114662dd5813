"""Fixtures for all tests: a home of their own, servers, and proof that nothing is left behind."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import os
import re
import socket
import struct
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from authlib_fixture import authlib_server, start_authlib_server
from cluster_fixtures import dask_engine, dask_processes, lasting_ports, lasting_sessions
from hypothesis import HealthCheck, settings
from ray_fixture import ray_engine, ray_environment, ray_node

from shpool.board import MAGIC
from shpool.testing import FakeClock, LoopbackServer

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "authlib_server",
    "dask_engine",
    "dask_processes",
    "ray_engine",
    "ray_environment",
    "ray_node",
    "start_authlib_server",
]

# How fast examples are made and run is no property of the code: a busy machine makes any of them slow.
settings.register_profile("patient", parent=settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

_PATIENCE = 30.0  # s that processes and threads get to end after a test
_SHARED_MEMORY = Path("/dev/shm")
_DESCRIPTORS = Path("/proc/self/fd")
_LASTING_THREADS = ("Dask-Offload",)  # distributed's, for the rest of the process
_lasting_descriptors: set[str] = set()  # of clusters that several tests share, as "socket:[inode]"
_numbers = itertools.count(1)


@dataclasses.dataclass(frozen=True)
class Holdings:
    """What this test process holds at one moment."""

    processes: frozenset[psutil.Process]
    threads: frozenset[threading.Thread]
    segments: frozenset[str]
    descriptors: frozenset[str]

    @classmethod
    def now(cls) -> Holdings:
        children = psutil.Process().children(recursive=True)
        return cls(
            frozenset(child for child in children if not _is_tracker(child) and not _is_of_cluster(child.pid)),
            frozenset(thread for thread in threading.enumerate() if not thread.name.startswith(_LASTING_THREADS)),
            frozenset(_own_segments()),
            frozenset(_own_descriptors()),
        )

    def beyond(self, before: Holdings) -> list[str]:
        """Return what is held now and was not before, as text."""
        return [
            *(f"process {_describe(process)}" for process in self.processes - before.processes),
            *(f"thread {thread}" for thread in self.threads - before.threads if thread.is_alive()),
            *(f"shared memory {name}" for name in self.segments - before.segments),
            *(f"descriptor {target}" for target in self.descriptors - before.descriptors),
        ]


def _own_segments() -> Iterator[str]:
    """Yield the shared-memory entries that this very process has made; tests run side by side."""
    if _SHARED_MEMORY.is_dir():
        for entry in _SHARED_MEMORY.iterdir():
            if _names_this_process(entry.name) or (entry.is_file() and _is_own_board(entry)):
                yield entry.name


def _names_this_process(name: str) -> bool:
    """Tell whether a name holds this process's id, as loky's semaphores and the ``memory_name`` fixture's do."""
    return str(os.getpid()) in re.split(r"\D+", name)


def _is_own_board(entry: Path) -> bool:
    """Tell whether this is a board whose header names this process as the owner (rule 2 of the board)."""
    try:
        with entry.open("rb") as segment:
            _, magic, pid = struct.unpack("=3Q", segment.read(24))
    except (OSError, struct.error):
        return False
    return bool(magic == MAGIC and pid == os.getpid())


def _own_descriptors() -> Iterator[str]:
    """Yield the sockets and boards this process has open; other files may be cached by libraries."""
    if _DESCRIPTORS.is_dir():
        _lasting_descriptors.update(_descriptors_to_clusters())
        for descriptor in _DESCRIPTORS.iterdir():
            target = _target(descriptor)
            # Once a cluster's, always: when the process at the other end is gone, nothing tells it from another.
            if target.startswith(("socket:", "/memfd:shpool")) and target not in _lasting_descriptors:
                yield f"{descriptor.name} {target}"


def _target(descriptor: Path) -> str:
    try:
        return str(descriptor.readlink())
    except OSError:  # the descriptor of the very listing
        return ""


def _descriptors_to_clusters() -> Iterator[str]:
    """Yield the sockets to clusters that several tests share: either side opens more of them when it likes."""
    if not lasting_sessions:
        return
    everybodys = psutil.net_connections("tcp")
    ports = lasting_ports | {each.laddr.port for each in everybodys if each.laddr and _is_of_cluster(each.pid)}
    for each in psutil.Process().net_connections("tcp"):
        if each.raddr and each.raddr.port in ports:
            yield _target(_DESCRIPTORS / str(each.fd))
    for descriptor in _DESCRIPTORS.iterdir():
        if (target := _target(descriptor)).startswith("socket:") and _is_of_grpc(int(descriptor.name)):
            yield target


def _is_of_grpc(descriptor: int) -> bool:
    """Tell whether this is a TCP socket as Ray's gRPC makes them, for both families at once; all of ours are for IPv4.

    The other end may have ended, and then the connection is listed nowhere: only the socket itself tells.
    """
    try:
        with socket.socket(fileno=os.dup(descriptor)) as duplicate:
            return duplicate.family is socket.AF_INET6
    except OSError:  # closed since it was listed
        return False


def _describe_connections() -> str:
    """Say of this process's sockets where they lead to."""
    connections = psutil.Process().net_connections("all")
    return ", ".join(f"{each.fd}: {each.laddr}-{each.raddr} {each.status}" for each in connections)


def _is_tracker(process: psutil.Process) -> bool:
    """Tell whether this is one of the resource trackers: they live as long as the process that has one."""
    try:
        return "resource_tracker import main" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def _is_of_cluster(pid: int | None) -> bool:
    """Tell whether this is of a cluster that several tests share, whose nannies may start workers at any time."""
    try:
        return pid is not None and os.getsid(pid) in lasting_sessions
    except ProcessLookupError:
        return False


def _describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {process.status()} {' '.join(process.cmdline())[:200]}"
    except psutil.Error:
        return str(process.pid)


@pytest.fixture(autouse=True)
def nothing_left_behind(own_home: Path) -> Iterator[None]:
    """Fail a test that leaves a process, a thread, a shared-memory segment or a socket; undone before ``own_home``."""
    before = Holdings.now()
    yield
    deadline = time.monotonic() + _PATIENCE
    while left := Holdings.now().beyond(before):
        if time.monotonic() > deadline:
            pytest.fail(f"left behind: {'; '.join(left)}; connections are {_describe_connections()}")
        gc.collect()  # a session in a reference cycle is not a leak
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test a home without configuration, and an environment without credentials and proxies."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / ".config"))
    for name in [name for name in os.environ if name.startswith("SH_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("NETRC", raising=False)
    return home


@pytest.fixture
def memory_name() -> str:
    """Return a name for shared memory that no other test uses, at this moment or later."""
    return f"test-{os.getpid()}-{next(_numbers)}"


@pytest.fixture
def clock() -> FakeClock:
    """Return a clock that only moves when told."""
    return FakeClock()


@pytest.fixture
def server() -> Iterator[LoopbackServer]:
    """Run a loopback provider and data service."""
    with LoopbackServer() as running:
        yield running


@pytest.fixture
def child_env() -> dict[str, str]:
    """Return an environment in which child processes import this checkout."""
    paths = [str(path) for path in (Path(__file__).parents[1], Path(__file__).parents[1] / "cli")]
    inherited = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, *([inherited] if inherited else [])])}
