"""The gate on Ray: what two worker processes do together, as the server sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from patience import PATIENCE
from ray_fixture import needs_ray
from stress_gate import Crowd
from test_lease_dask import session_at, statuses_by_auth

from shpool import AuthenticatedProcessPool, Gate

if TYPE_CHECKING:
    from shpool.engines.ray import RayEngine
    from shpool.testing import LoopbackServer

pytestmark = [pytest.mark.slow, *needs_ray]


def test_workers_keep_one_rate_and_one_connection_between_them(ray_engine: RayEngine, server: LoopbackServer) -> None:
    crowd, gate = Crowd(server, 0.01), Gate("20/s", burst=1, connections=1)
    with AuthenticatedProcessPool(session_at(server), engine=ray_engine, gate=gate) as pool:
        futures = [pool.submit(statuses_by_auth, server.data_url(1), 10) for _ in range(2)]
        assert {status for future in futures for status in future.result(PATIENCE)} == {200}
        assert pool.stats().gate.waits > 0
    assert (crowd.most, crowd.served) == (1, 20)
    assert sum(crowd.seconds_at.values()) > 18 / 20
    gate.close()
