"""The gate on Dask: what two worker processes do together, as the server sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import requests
from cluster_fixtures import needs_dask
from patience import PATIENCE
from stress_gate import Enforcer

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
