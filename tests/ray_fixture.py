"""A real Ray with two processors on this machine, one for a whole session; conftest.py imports it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, TypeVar

import psutil
import pytest
from cluster_fixtures import lasting_ports, lasting_sessions
from patience import PATIENCE

from shpool.engines.ray import RayEngine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from typing_extensions import Self

    from shpool.engines.ray_local import LocalRay

needs_ray = [
    pytest.mark.xdist_group("ray"),  # one Ray for all of them
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs pip install '.[ray]'"),
]

beside_shared_ray = pytest.mark.xdist_group("own")  # these have a Ray each, and spend their time on waiting for it

_Test = TypeVar("_Test", bound="Callable[..., None]")


def with_own_ray(test: _Test) -> _Test:
    """Mark a test that starts a Ray for itself, open to all."""
    marked: _Test = beside_shared_ray(pytest.mark.usefixtures("ray_environment")(test))
    return marked


def processes_in_session(leader: int) -> list[int]:
    """Return the processes that are in the session of this one."""
    found = []
    for process in psutil.pids():
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(process) == leader:
                found.append(process)
    return found


class SecondNode:
    """Another node of a Ray on this machine, with one processor, as an administrator would start it.

    Args:
        address: That Ray's.
    """

    def __init__(self, address: str) -> None:
        code = "import sys; from ray.scripts.scripts import main; sys.argv[0] = 'ray'; main()"
        options = ("start", f"--address={address}", "--num-cpus=1", "--block", f"--object-store-memory={80 * 2**20}")
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            start_new_session=True,
        )
        lasting_sessions.add(self._process.pid)

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        try:
            self._process.wait(PATIENCE)
        finally:
            for process in processes_in_session(self._process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        lasting_sessions.discard(self._process.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.fixture(scope="session")
def ray_environment() -> Iterator[None]:
    """Have each Ray that this process or a child of it starts open to all.

    Tests have a home each, and Ray keeps the token that opens a cluster there: these have none.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        yield


@pytest.fixture(scope="session")
def ray_node(ray_environment: None) -> Iterator[LocalRay]:
    """Run Ray in processes of its own, for all tests of this process."""
    from shpool.engines.ray_local import LocalRay

    node = LocalRay(2, [name for name in os.environ if name.startswith("SH_")])
    lasting_sessions.add(node.pid)
    lasting_ports.add(int(node.address.rpartition(":")[2]))  # to which Ray keeps a connection for good
    yield node
    node.close()
    lasting_sessions.discard(node.pid)


@pytest.fixture(scope="session")
def ray_engine(ray_node: LocalRay) -> RayEngine:
    """Return where that Ray is."""
    return RayEngine(ray_node.address)
