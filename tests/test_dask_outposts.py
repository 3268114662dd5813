"""What pools leave on the workers of a Dask cluster: nothing, whichever ends first, and however it ends."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

import pytest
from cluster_fixtures import DaskProcesses, needs_dask
from patience import PATIENCE

from shpool import AuthenticatedProcessPool, DaskEngine, OAuthSession

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shpool.testing import LoopbackServer

pytestmark = [*needs_dask, pytest.mark.slow]


def session_at(server: LoopbackServer) -> OAuthSession:
    return OAuthSession(server.token_url, server.client_id, server.client_secret)


@pytest.fixture
def own() -> Iterator[DaskProcesses]:
    """A cluster with one worker that the test may harm."""
    with DaskProcesses(1) as processes:
        yield processes


def traces(dask_worker: Any) -> tuple[int, int, str | None, int]:
    """Return how many outposts a worker has, its root logger's level and handlers, and a variable."""
    from shpool.engines import outpost

    root = logging.getLogger()
    assert dask_worker
    return len(outpost._outposts), root.level, os.environ.get("WHOSE"), len(root.handlers)


def traces_of(processes: DaskProcesses) -> list[tuple[int, int, str | None, int]]:
    from distributed import Client

    with Client(processes.address, set_as_default=False) as client:
        return list(client.run(traces).values())


def log_and_tell(text: str) -> str | None:
    logging.getLogger("tiles").debug(text)
    logging.getLogger("tiles").info(text)
    return os.environ.get("WHOSE")


@pytest.mark.parametrize("ends_first", [0, 1])
def test_two_pools_end_in_either_order(
    own: DaskProcesses, server: LoopbackServer, caplog: pytest.LogCaptureFixture, ends_first: int
) -> None:
    before = traces_of(own)
    engine = DaskEngine(own.address)
    first = AuthenticatedProcessPool(session_at(server), engine=engine, env={"WHOSE": "first"}, log_level="INFO")
    second = AuthenticatedProcessPool(session_at(server), engine=engine, env={"WHOSE": "second"}, log_level="DEBUG")
    stays, ends = [(second, first), (first, second)][ends_first]
    with stays, caplog.at_level("DEBUG", "tiles"):
        with ends:
            assert first.submit(log_and_tell, "one").result(PATIENCE) == "first"
            assert second.submit(log_and_tell, "two").result(PATIENCE) == "second"
            assert first.submit(log_and_tell, "three").result(PATIENCE) == "second", "the latest one's"
        assert stays.submit(log_and_tell, "four").result(PATIENCE) == ["second", "first"][ends_first]
    said = [(record.getMessage(), record.levelname) for record in caplog.records if record.name == "tiles"]
    wanted = [
        ("one", "INFO"),
        ("two", "DEBUG"),
        ("two", "INFO"),
        ("three", "INFO"),
        ("four", "DEBUG"),
        ("four", "INFO"),
    ]
    assert said == (wanted if ends_first == 0 else [*wanted[:4], wanted[5]])
    assert traces_of(own) == before
