"""The gate on Dask: what two worker processes do together, as the server sees it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import requests
from cluster_fixtures import DaskProcesses, needs_dask
from patience import PATIENCE, in_time, until
from stress_gate import Crowd, Enforcer

from shpool import AuthenticatedProcessPool, DaskEngine, Gate, OAuthSession, current_session

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shpool.testing import LoopbackServer

pytestmark = [*needs_dask, pytest.mark.slow]


def session_at(server: LoopbackServer) -> OAuthSession:
    return OAuthSession(server.token_url, server.client_id, server.client_secret)


def status_by_client(url: str) -> int:
    return current_session().http.get(url).status_code


def statuses_by_auth(url: str, count: int) -> list[int]:
    auth = current_session().auth
    return [requests.get(url, auth=auth, timeout=30).status_code for _ in range(count)]


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate("50/s", burst=1)
    yield made
    made.close()


def test_workers_keep_one_rate_between_them(dask_engine: DaskEngine, server: LoopbackServer, gate: Gate) -> None:
    """The server refuses what exceeds it by more than what a message's delay may bunch together."""
    enforcer = Enforcer(server, rate=50, burst=5)
    with AuthenticatedProcessPool(session_at(server), engine=dask_engine, gate=gate) as pool:
        futures = [pool.submit(statuses_by_auth, server.data_url(1), 40) for _ in range(2)]
        assert {status for future in futures for status in future.result(PATIENCE)} == {200}
        stats = pool.stats().gate
    assert enforcer.refused == 0
    assert enforcer.times[-1] - enforcer.times[0] > 78 / 50
    assert stats.waits > 0
    assert stats.waited > 0


def test_no_more_connections_at_once_than_the_account_has(dask_engine: DaskEngine, server: LoopbackServer) -> None:
    """Slots come back from the one who holds them idle, and are leased anew."""
    crowd, gate = Crowd(server, 0.02), Gate(connections=1)
    with AuthenticatedProcessPool(session_at(server), engine=dask_engine, gate=gate) as pool:
        url = server.data_url(1)
        for _ in range(2):
            futures = [pool.submit(statuses_by_auth, url, 5) for _ in range(2)]
            assert {status for future in futures for status in future.result(PATIENCE)} == {200}
        assert pool.stats().gate.connections == 1
    assert (crowd.most, crowd.served) == (1, 20)
    assert in_time(gate.acquire).is_connected, "nothing stays leased when the pool has ended"
    gate.close()


def test_a_refusal_met_by_one_worker_stops_all_without_any_setting(
    dask_engine: DaskEngine, server: LoopbackServer
) -> None:
    with AuthenticatedProcessPool(session_at(server), engine=dask_engine) as pool:
        url = server.data_url(1)
        assert pool.submit(statuses_by_auth, url, 1).result(PATIENCE) == [200]
        server.fail_next(1, 429, retry_after=2, at="data")
        assert pool.submit(statuses_by_auth, url, 1).result(PATIENCE) == [429]
        until(lambda: pool.stats().gate.pauses == 1)
        futures = [pool.submit(statuses_by_auth, url, 1) for _ in range(4)]
        assert {future.result(PATIENCE)[0] for future in futures} == {200}
    times = [at for at, target, _ in server.log if target.startswith("/tiles")]
    assert times[2] - times[1] > 2 - 0.1


def ask_and_die_once(url: str, mark: str) -> int:
    gate = current_session().gate
    ticket = gate.acquire()
    if not Path(mark).exists():
        Path(mark).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    ticket.release()
    return status_by_client(url)


def test_a_worker_that_is_killed_leaks_no_connection(server: LoopbackServer, tmp_path: Path) -> None:
    gate = Gate(connections=1)
    with DaskProcesses(1) as processes:
        engine = DaskEngine(processes.address)
        with AuthenticatedProcessPool(session_at(server), engine=engine, gate=gate, retries=2) as pool:
            future = pool.submit(ask_and_die_once, server.data_url(1), str(tmp_path / "mark"))
            assert future.result(2 * PATIENCE) == 200
            assert pool.stats().workers_lost == 1
    gate.close()
