"""What pools leave on the workers of a Dask cluster: nothing, whichever ends first, and however it ends."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import stress_cluster
from cluster_fixtures import DaskProcesses, needs_dask
from patience import PATIENCE, until
from pool_tasks import access_token

from shpool import AuthenticatedProcessPool, DaskEngine, OAuthSession
from shpool.testing import LoopbackServer
from shpool.tokens import Posting

if TYPE_CHECKING:
    from collections.abc import Iterator

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


def held_by_scheduler(dask_scheduler: Any) -> list[str]:
    names = [*dask_scheduler.worker_plugins, *dask_scheduler._broker._topics, *map(str, dask_scheduler.tasks)]
    return [name for name in names if "shpool" in name]


def payloads(dask_worker: Any) -> list[bytes]:
    """Return what lies in the cells of a worker's outposts."""
    from shpool.engines import outpost

    assert dask_worker
    return [there.cell._payload for there in outpost._outposts.values()]


def questions(dask_scheduler: Any) -> int:
    """Return how often outposts have asked the scheduler after their pools."""
    events = [message for _, message in dask_scheduler.get_events("all") if isinstance(message, dict)]
    return sum(b"remove_if_left" in bytes(event.get("function", b"")) for event in events)


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


DRIVER = """
import sys, time
from shpool import AuthenticatedProcessPool, DaskEngine, OAuthSession
from test_dask_outposts import log_and_tell
address, url, name, secret, mark = sys.argv[1:]
engine = DaskEngine(address)
with AuthenticatedProcessPool(
    OAuthSession(url, name, secret), engine=engine, env={"WHOSE": "the driver's"}, log_level="DEBUG"
) as pool:
    list(pool.map(log_and_tell, "abcd", chunksize=1))
    futures = [pool.submit(time.sleep, 0.5) for _ in range(50)]
    open(mark, "w").close()
    futures[-1].result()
"""


def test_a_killed_drivers_pool_is_removed_once_its_token_has_ended(
    own: DaskProcesses, tmp_path: Path, child_env: dict[str, str]
) -> None:
    """From workers and scheduler alike: of that pool nothing stays for good."""
    from distributed import Client

    own.add_worker()
    before = traces_of(own)
    with LoopbackServer(lifetime=4.0) as server, Client(own.address, set_as_default=False) as client:
        words = [own.address, server.token_url, server.client_id, server.client_secret, str(tmp_path / "mark")]
        env = {**child_env, "PYTHONPATH": os.pathsep.join([child_env["PYTHONPATH"], str(Path(__file__).parent)])}
        driver = subprocess.Popen([sys.executable, "-c", DRIVER, *words], env=env)
        try:
            until((tmp_path / "mark").exists)
            assert {whose for _, _, whose, _ in traces_of(own)} == {"the driver's"}
        finally:
            driver.kill()
            driver.wait()
        until(lambda: traces_of(own) == before)
        until(lambda: client.run_on_scheduler(held_by_scheduler) == [])


def test_a_driver_that_cannot_log_in_for_a_while_keeps_its_outposts(own: DaskProcesses) -> None:
    """Its workers ask after it in vain, hold no token meanwhile, and go on with the next."""
    from distributed import Client

    with (
        LoopbackServer(lifetime=3.0) as server,
        Client(own.address, set_as_default=False) as client,
        AuthenticatedProcessPool(session_at(server), engine=DaskEngine(own.address)) as pool,
    ):
        assert pool.submit(access_token).result(PATIENCE)
        server.fail_next(10_000)
        until(lambda: client.run_on_scheduler(questions) > 0)
        [[payload]] = client.run(payloads).values()
        held = Posting.from_bytes(payload).token
        assert held is not None
        assert not held.access_token
        server.fail_next(0)
        assert pool.submit(access_token).result(2 * PATIENCE)


def test_no_canary_lies_on_a_cluster_where_it_would_be_seen(own: DaskProcesses) -> None:
    """The search finds what is planted in each place that it looks at, while tasks run."""
    own.add_worker()
    machines = stress_cluster.DaskMachines(own)
    stress_cluster.check_sight(machines)
    stress_cluster.check_canaries(machines)


def test_the_stress_asks_which_cluster() -> None:
    script = Path(stress_cluster.__file__)
    said = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert (said.returncode, said.stderr.startswith("usage:")) == (2, True)


class OneEyed(stress_cluster.DaskMachines):
    """Shows how many tasks the scheduler has, and none of them."""

    def holdings(self) -> dict[str, bytes]:
        return {**super().holdings(), "scheduler's tasks": b"[<Call 1>, <Call 2>]"}


def test_a_search_for_canaries_that_is_blind_somewhere_fails(own: DaskProcesses) -> None:
    own.add_worker()
    with pytest.raises(AssertionError, match=r"blind in: .*scheduler's tasks"):
        stress_cluster.check_sight(OneEyed(own))
