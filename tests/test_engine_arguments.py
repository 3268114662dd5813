"""Where a cluster is, as one writes it: what cannot be is refused before anything starts, and what to pass is said."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from cluster_fixtures import needs_dask
from patience import PATIENCE
from pool_tasks import double
from ray_fixture import needs_ray

from shpool import AuthenticatedProcessPool, DaskEngine, OAuthSession, RayEngine
from shpool.errors import ClusterError

if TYPE_CHECKING:
    from shpool.testing import LoopbackServer


def test_what_is_no_address_of_dask_is_refused() -> None:
    for address in ("", "nonsense", "host", "tcp://", "tcp://host", "htp://x:1", "tcp://host:port", "tcp://a b:1"):
        with pytest.raises(ValueError, match=r"no address of a Dask scheduler; .*tcp://host:8786"):
            DaskEngine(address)
    for thing in (8786, b"tcp://host:1", DaskEngine, DaskEngine()):
        with pytest.raises(TypeError, match=r"'tcp://host:8786', a distributed\.Client"):
            DaskEngine(thing)
    for security in ("certificate.pem", True):
        with pytest.raises(TypeError, match=r"distributed\.Security"):
            DaskEngine("tcp://host:8786", security)


@pytest.mark.parametrize(
    "address", ["host:8786", "tcp://10.0.0.5:8786", "tls://[::1]:8786", "ws://host:80/", "inproc://10.0.0.5/17/1"]
)
def test_the_addresses_of_dask_pass(address: str) -> None:
    assert DaskEngine(address, {}).address == address


def test_what_is_no_address_of_ray_is_refused() -> None:
    for address in ("", "127.0.0.1", "local", "AUTO", "tcp://127.0.0.1:6379", "host:", ":6379", "host:port"):
        with pytest.raises(ValueError, match=r"no address of a Ray; give host:port"):
            RayEngine(address)
    with pytest.raises(ValueError, match="address of Ray Client; run this on a node"):
        RayEngine("ray://host:10001")
    thing: Any
    for thing in (6379, b"host:6379", RayEngine):
        with pytest.raises(TypeError, match=r"such as '10\.0\.0\.5:6379'"):
            RayEngine(thing)


def test_processors_of_ray_are_a_number_above_0() -> None:
    number: Any
    for number in ("2", None, True):
        with pytest.raises(TypeError, match="number of processors"):
            RayEngine(num_cpus=number)
    for number in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="more than 0"):
            RayEngine(num_cpus=number)


@pytest.mark.parametrize("engine", [DaskEngine, RayEngine])
def test_a_class_is_no_engine(engine: Any) -> None:
    with pytest.raises(TypeError, match="engine must be a name, a DaskEngine, a RayEngine"):
        AuthenticatedProcessPool(OAuthSession("http://127.0.0.1:1", "name", "invented"), engine=engine)


@pytest.mark.parametrize("address", ["auto", "10.0.0.5:6379", "head.example:6379", "[::1]:6379", None])
def test_the_addresses_of_ray_pass(address: str | None) -> None:
    assert RayEngine(address, 0.5).address == address


@pytest.mark.parametrize("named", [pytest.param("ray://head:10001", marks=needs_ray)])
def test_what_the_environment_names_for_ray_is_checked(
    named: str, server: LoopbackServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", named)
    pool = AuthenticatedProcessPool(
        OAuthSession(server.token_url, server.client_id, server.client_secret), engine=RayEngine()
    )
    with pytest.raises(ClusterError, match="Ray Client"):
        pool.__enter__()


@pytest.mark.slow
@pytest.mark.parametrize("cluster", [pytest.param("LocalCluster", marks=needs_dask)])
def test_a_cluster_of_dask_that_is_there_is_used(cluster: str, server: LoopbackServer) -> None:
    import distributed

    with getattr(distributed, cluster)(n_workers=1, threads_per_worker=1, dashboard_address=":0") as running:
        engine = DaskEngine(running)
        session = OAuthSession(server.token_url, server.client_id, server.client_secret)
        with AuthenticatedProcessPool(session, engine=engine) as pool:
            assert pool.submit(double, 2).result(PATIENCE) == 4
        client = distributed.Client(running, set_as_default=False)
        client.close()
        with pytest.raises(ValueError, match="Client is closed; give one that is not"):
            DaskEngine(client)
    with pytest.raises(ValueError, match="LocalCluster is closed"):
        DaskEngine(running)
