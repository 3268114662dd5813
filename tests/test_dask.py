"""What the Dask engine adds to the contract of all engines: workers that come and go, and a cluster left as it was."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import stress_cluster
from cluster_fixtures import DaskProcesses, needs_dask
from patience import PATIENCE, in_time, until
from pool_tasks import (
    access_token,
    begin_and_wait,
    begin_and_wait_or_double,
    die_once,
    double,
    environment,
    fetch,
    hang_once,
    leave_mark,
    meet,
    note_run,
    pid,
    wait_for,
)

from shpool import AuthenticatedProcessPool, DaskEngine, OAuthSession, SHUserWarning, current_session
from shpool.engines.remote import RemoteEngine
from shpool.errors import (
    ClusterUnreachableError,
    MissingExtraError,
    TaskTerminatedError,
    TaskTimeoutError,
    TokenUnavailableError,
    WorkerLostError,
)
from shpool.testing import LoopbackServer, tile_bytes

dask_calls = pytest.importorskip("shpool.engines.dask_calls", exc_type=ImportError)
dask_cluster = pytest.importorskip("shpool.engines.dask_cluster", exc_type=ImportError)
dask_link = pytest.importorskip("shpool.engines.dask_link", exc_type=ImportError)
dask_stay = pytest.importorskip("shpool.engines.dask_stay", exc_type=ImportError)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shpool.engines.cluster import Events
    from shpool.engines.dask_cluster import DaskCluster
    from shpool.engines.dask_link import Link
    from shpool.engines.dask_stay import Stay
else:
    DaskCluster, Stay = dask_cluster.DaskCluster, dask_stay.Stay

pytestmark = [*needs_dask, pytest.mark.slow]


def session_at(server: LoopbackServer) -> OAuthSession:
    return OAuthSession(server.token_url, server.client_id, server.client_secret)


@pytest.fixture
def pool(dask_engine: DaskEngine, server: LoopbackServer) -> Iterator[AuthenticatedProcessPool]:
    with AuthenticatedProcessPool(session_at(server), engine=dask_engine) as running:
        yield running


@pytest.fixture
def own() -> Iterator[DaskProcesses]:
    """A cluster with one worker that the test may harm."""
    with DaskProcesses(1) as processes:
        yield processes


def generation(_: object = None) -> int:
    return current_session().token.generation


def in_threads(_: object = None) -> list[str]:
    """Return the tokens that threads of the task see."""
    seen: list[str] = []
    threads = [threading.Thread(target=lambda: seen.append(access_token())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seen


def serve_until_refused(folder: str, url: str) -> None:
    """Use the token until there is none; tell by files that it was used, and how that ended."""
    session = current_session()
    for number in range(10_000):
        try:
            token = session.wait_for_token(0.0)
        except TokenUnavailableError as exc:
            unfinished = Path(folder) / "unfinished"
            unfinished.write_text(str(exc))
            unfinished.rename(Path(folder) / "ended")
            return
        if number == 0:
            leave_mark(f"{folder}/used")
        assert token
        time.sleep(0.02)


# Workers


def test_without_a_number_a_pool_has_the_workers_of_the_cluster(pool: AuthenticatedProcessPool) -> None:
    assert (pool.max_workers, pool.stats().workers) == (2, 2)


def test_two_tasks_run_at_once_in_two_processes(pool: AuthenticatedProcessPool, tmp_path: Path) -> None:
    futures = [pool.submit(meet, str(tmp_path), number, 2) for number in range(2)]
    assert len({future.result(PATIENCE) for future in futures}) == 2


def test_max_workers_bounds_what_runs_at_once(dask_engine: DaskEngine, server: LoopbackServer, tmp_path: Path) -> None:
    with AuthenticatedProcessPool(session_at(server), 1, engine=dask_engine) as pool:
        first = pool.submit(begin_and_wait, str(tmp_path / "begun"), str(tmp_path / "cue"))
        second = pool.submit(double, 4)
        until((tmp_path / "begun").exists)
        assert (second.running(), second.done()) == (False, False)
        assert second.cancel()
        (tmp_path / "cue").touch()
        assert first.result(PATIENCE)


def test_a_worker_that_comes_later_has_the_token(own: DaskProcesses, server: LoopbackServer, tmp_path: Path) -> None:
    with AuthenticatedProcessPool(session_at(server), engine=DaskEngine(own.address)) as pool:
        assert pool.max_workers == 1
        own.add_worker()
        until(lambda: pool.max_workers == 2)
        futures = [pool.submit(meet, str(tmp_path), number, 2) for number in range(2)]
        assert len({future.result(PATIENCE) for future in futures}) == 2
        assert len(set(pool.map(access_token, range(20), chunksize=1))) == 1
        assert server.logins == 1


def test_a_task_whose_worker_dies_is_told_so_and_ran_once(
    own: DaskProcesses, server: LoopbackServer, tmp_path: Path
) -> None:
    def die_noted(folder: str) -> None:
        note_run(folder, 1)
        os.kill(os.getpid(), signal.SIGKILL)

    own.add_worker()
    with AuthenticatedProcessPool(session_at(server), engine=DaskEngine(own.address)) as pool:
        with pytest.raises(WorkerLostError, match=r"died while running .*die_noted"):
            pool.submit(die_noted, str(tmp_path)).result(PATIENCE)
        assert pool.submit(double, 2).result(PATIENCE) == 4
        until(lambda: pool.max_workers == 2)  # its nanny has started another
        assert len(list(tmp_path.iterdir())) == 1
        assert pool.stats().workers_lost == 1


def test_a_task_sent_before_there_is_a_worker_runs_no_more_often(server: LoopbackServer, tmp_path: Path) -> None:
    with (
        DaskProcesses(0) as processes,
        AuthenticatedProcessPool(session_at(server), engine=DaskEngine(processes.address)) as pool,
    ):
        future = pool.submit(die_once, str(tmp_path), 1, 1)
        late = pool.options(timeout=0.1).submit(begin_and_wait, str(tmp_path / "begun"), str(tmp_path / "never"))
        processes.add_worker()
        assert isinstance(future.exception(PATIENCE), WorkerLostError)
        assert isinstance(late.exception(PATIENCE), TaskTimeoutError)
        assert pool.submit(double, 4).result(PATIENCE) == 8
        assert pool.stats().workers_lost == 2


def test_a_cluster_without_workers_says_so(
    server: LoopbackServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dask_calls, "_ALONE_AFTER", 0.1)
    with (
        DaskProcesses(0) as processes,
        AuthenticatedProcessPool(session_at(server), engine=DaskEngine(processes.address)) as pool,
    ):
        future = pool.submit(double, 4)
        mapped = pool.map(double, range(10))
        assert (pool.stats().workers, pool.max_workers) == (0, 0)
        assert "running, 0 dask workers, " in repr(pool)
        until(lambda: "tasks wait for a worker" in caplog.text)
        assert f"start one (dask worker {processes.address})" in caplog.text
        processes.add_worker()
        assert (future.result(PATIENCE), list(mapped)) == (8, list(range(0, 20, 2)))
        assert pool.stats().workers == 1
        assert caplog.text.count("tasks wait for a worker") == 1


def test_what_runs_on_a_retired_worker_runs_again(server: LoopbackServer, tmp_path: Path) -> None:
    from distributed import Client

    with (
        DaskProcesses(1) as processes,
        Client(processes.address, set_as_default=False) as client,
        AuthenticatedProcessPool(session_at(server), engine=DaskEngine(processes.address)) as pool,
    ):
        future = pool.submit(begin_and_wait, str(tmp_path / "begun"), str(tmp_path / "go"))
        until((tmp_path / "begun").exists)
        retired = list(client.scheduler_info()["workers"])
        processes.add_worker()
        client.retire_workers(retired)
        leave_mark(str(tmp_path / "go"))
        assert future.exception(PATIENCE) is None
        assert pool.stats().workers_lost == 0


def test_tasks_go_where_others_leave_room(dask_engine: DaskEngine, server: LoopbackServer, tmp_path: Path) -> None:
    from distributed import Client

    with Client(dask_engine.address, set_as_default=False) as client:
        stranger = client.submit(begin_and_wait, str(tmp_path / "begun"), str(tmp_path / "go"))
        until((tmp_path / "begun").exists)
        with AuthenticatedProcessPool(session_at(server), engine=dask_engine) as pool:
            assert pool.max_workers == 1
            assert [pool.submit(double, number).result(PATIENCE) for number in range(4)] == [0, 2, 4, 6]
            leave_mark(str(tmp_path / "go"))
            stranger.result(PATIENCE)
            until(lambda: pool.max_workers == 2)


def test_a_lost_workers_tasks_run_again_where_retries_are_left(
    own: DaskProcesses, server: LoopbackServer, tmp_path: Path
) -> None:
    own.add_worker()
    with AuthenticatedProcessPool(session_at(server), engine=DaskEngine(own.address), retries=1) as pool:
        calls = [pool.submit(die_once, str(tmp_path), number, 7) for number in range(40)]
        assert [future.result(PATIENCE) for future in calls] == list(range(40))
        assert pool.stats().workers_lost == 1


@pytest.mark.parametrize("chunksize", [None, 1])
def test_a_map_survives_a_lost_worker(
    own: DaskProcesses, server: LoopbackServer, tmp_path: Path, chunksize: int | None
) -> None:
    def work(number: int, folder: str = str(tmp_path)) -> int:
        return die_once(folder, number, 7)

    with AuthenticatedProcessPool(session_at(server), engine=DaskEngine(own.address), retries=1) as pool:
        assert list(pool.map(work, range(40), chunksize=chunksize)) == list(range(40))


def test_a_worker_that_is_sent_away_takes_no_more_along_than_it_runs(
    own: DaskProcesses, server: LoopbackServer, tmp_path: Path
) -> None:
    def work(number: int, folder: str = str(tmp_path)) -> int:
        note_run(folder, number)
        time.sleep(0.02)
        return number

    leaves = own.add_worker()
    with AuthenticatedProcessPool(session_at(server), engine=DaskEngine(own.address)) as pool:
        wait([pool.submit(work, number) for number in range(2)], PATIENCE)
        futures = [pool.submit(work, number) for number in range(2, 60)]
        until(lambda: len(list(tmp_path.iterdir())) > 10)
        leaves.terminate()
        errors = [future.exception(PATIENCE) for future in futures]
        lost = [error for error in errors if error is not None]
        assert len(lost) <= 3  # what ran, and answers that nobody had fetched
        assert {type(error) for error in lost} <= {WorkerLostError}
        assert len(list(tmp_path.iterdir())) in {60, 61}  # what it ran goes again if Dask expected the worker's end


def test_a_large_answer_is_lost_with_its_worker(own: DaskProcesses, server: LoopbackServer, tmp_path: Path) -> None:
    """It had ended, but may not run again."""

    def work(number: int, folder: str = str(tmp_path)) -> bytes:
        note_run(folder, number)
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return bytes(300_000)

    with AuthenticatedProcessPool(session_at(server), engine=DaskEngine(own.address)) as pool:
        pool.submit(work, 0).result(PATIENCE)
        futures = [pool.submit(work, number) for number in range(1, 10)]
        errors = {type(future.exception(PATIENCE)) for future in futures[:2]}
        assert errors <= {WorkerLostError, type(None)}
        assert [len(future.result(PATIENCE)) for future in futures[2:]] == [300_000] * 7
        assert len(list(tmp_path.iterdir())) == 10


def test_nothing_waits_behind_a_long_task_while_another_worker_is_idle(
    pool: AuthenticatedProcessPool, tmp_path: Path
) -> None:
    wait([pool.submit(double, number) for number in range(100)], PATIENCE)  # the pace is known, and calls go ahead
    begun, cue = str(tmp_path / "begun"), str(tmp_path / "cue")
    futures = [
        pool.submit(begin_and_wait_or_double, begun if number == 10 else "", cue, number) for number in range(100)
    ]
    long = futures.pop(10)
    assert [future.result(PATIENCE) for future in futures] == [2 * n for n in range(100) if n != 10]
    assert not long.done()
    leave_mark(cue)
    assert long.result(PATIENCE) == 20


# Time


@pytest.mark.parametrize("victim", [0, 30])
def test_what_has_just_begun_behind_others_is_really_stopped(
    pool: AuthenticatedProcessPool, tmp_path: Path, victim: int
) -> None:
    wait([pool.submit(double, number) for number in range(100)], PATIENCE)
    begun, cue = tmp_path / "begun", str(tmp_path / "never")
    futures = [
        pool.submit(begin_and_wait_or_double, str(begun) if number == victim else "", cue, number)
        for number in range(60)
    ]
    until(begun.exists)
    assert pool.terminate(futures[victim])
    assert isinstance(futures.pop(victim).exception(PATIENCE), TaskTerminatedError)
    until(lambda: not Path(f"/proc/{begun.read_text()}").exists())
    assert [future.result(PATIENCE) for future in futures] == [2 * n for n in range(60) if n != victim]
    until(lambda: pool.max_workers == 2)


def test_a_task_beyond_its_time_is_stopped_with_its_worker(pool: AuthenticatedProcessPool, tmp_path: Path) -> None:
    with pytest.raises(TaskTimeoutError, match=r"hang_once ran longer than 0\.5 s"):
        pool.options(timeout=0.5).submit(hang_once, str(tmp_path), 1).result(PATIENCE)
    assert pool.options(timeout=PATIENCE).submit(double, 4).result(PATIENCE) == 8
    until(lambda: pool.max_workers == 2)


def test_a_timeout_is_worth_another_attempt(pool: AuthenticatedProcessPool, tmp_path: Path) -> None:
    # So many retries for a machine that stalls during the second attempt.
    task = pool.options(timeout=1.0, retries=9).submit(hang_once, str(tmp_path), 5)
    assert task.result(PATIENCE) == 5
    until(lambda: pool.max_workers == 2)


def test_a_running_task_can_be_terminated(pool: AuthenticatedProcessPool, tmp_path: Path) -> None:
    future = pool.submit(begin_and_wait, str(tmp_path / "begun"), str(tmp_path / "never"))
    until((tmp_path / "begun").exists)
    assert pool.terminate(future)
    with pytest.raises(TaskTerminatedError):
        future.result(PATIENCE)
    assert not pool.terminate(future)
    until(lambda: pool.max_workers == 2)


def test_a_task_beside_others_in_one_process_is_left_to_run(
    own: DaskProcesses, server: LoopbackServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A thread cannot be killed, and what runs beside it must not be."""
    with DaskProcesses(0) as processes:
        processes.add_worker("--nthreads", "2")
        with AuthenticatedProcessPool(session_at(server), engine=DaskEngine(processes.address)) as pool:
            beside = pool.submit(begin_and_wait, str(tmp_path / "begun"), str(tmp_path / "cue"))
            until((tmp_path / "begun").exists)
            late = pool.options(timeout=0.3).submit(wait_for, str(tmp_path / "cue"))
            assert isinstance(late.exception(PATIENCE), TaskTimeoutError)
            assert "runs on, unheeded" in caplog.text
            assert not beside.done()
            (tmp_path / "cue").touch()
            assert beside.result(PATIENCE) == pool.submit(pid).result(PATIENCE)


def test_a_worker_without_a_nanny_is_not_killed(server: LoopbackServer, tmp_path: Path) -> None:
    with DaskProcesses(0) as processes:
        processes.add_worker(nanny=False)
        with AuthenticatedProcessPool(session_at(server), engine=DaskEngine(processes.address)) as pool:
            late = pool.options(timeout=0.3).submit(wait_for, str(tmp_path / "cue"))
            assert isinstance(late.exception(PATIENCE), TaskTimeoutError)
            (tmp_path / "cue").touch()
            assert pool.submit(double, 1).result(PATIENCE) == 2


# Tokens


def test_a_refused_token_is_replaced_on_all_workers_by_one_login(
    pool: AuthenticatedProcessPool, server: LoopbackServer, tmp_path: Path
) -> None:
    server.revoke_all()
    assert pool.submit(refetch, server.data_url(3, 100)).result(PATIENCE) == tile_bytes(3, 100)
    until(lambda: set(pool.map(generation, range(10), chunksize=1)) == {2})
    assert server.logins == 2


def refetch(url: str) -> bytes:
    return current_session().http.get(url).content


def test_threads_of_a_task_have_its_session(pool: AuthenticatedProcessPool) -> None:
    assert len(set(pool.submit(in_threads).result(PATIENCE))) == 1


def test_two_accounts_in_one_process_do_not_mix(own: DaskProcesses, server: LoopbackServer) -> None:
    with (
        LoopbackServer() as other,
        AuthenticatedProcessPool(session_at(server), engine=DaskEngine(own.address)) as first,
        AuthenticatedProcessPool(session_at(other), engine=DaskEngine(own.address)) as second,
    ):
        for number in range(10):
            for pool, provider in ((first, server), (second, other)):
                assert pool.submit(fetch, provider.data_url(number, 10)).result(PATIENCE) == tile_bytes(number, 10)
        assert first.submit(pid).result(PATIENCE) == second.submit(pid).result(PATIENCE)
        assert server.unauthorized == other.unauthorized == 0


DRIVER = """
import sys, time
from shpool import AuthenticatedProcessPool, DaskEngine, OAuthSession
from test_dask import serve_until_refused
address, url, name, secret, folder = sys.argv[1:]
with AuthenticatedProcessPool(OAuthSession(url, name, secret), engine=DaskEngine(address)) as pool:
    pool.submit(serve_until_refused, folder, url).result()
"""


def test_workers_outlive_their_driver_for_a_tokens_life_and_no_longer(
    own: DaskProcesses, tmp_path: Path, child_env: dict[str, str]
) -> None:
    with LoopbackServer(lifetime=4.0) as server:
        words = [own.address, server.token_url, server.client_id, server.client_secret, str(tmp_path)]
        env = {**child_env, "PYTHONPATH": os.pathsep.join([child_env["PYTHONPATH"], str(Path(__file__).parent)])}
        driver = subprocess.Popen([sys.executable, "-c", DRIVER, *words], env=env)
        try:
            until((tmp_path / "used").exists)
        finally:
            driver.kill()
            driver.wait()
        at_death = server.logins
        until((tmp_path / "ended").exists)
        assert "the token has expired" in (tmp_path / "ended").read_text()
        assert server.logins == at_death


# The cluster


def test_an_address_where_nobody_listens_is_an_error(server: LoopbackServer) -> None:
    pool = AuthenticatedProcessPool(session_at(server), engine=DaskEngine("tcp://127.0.0.1:9"))
    began = time.monotonic()
    with pytest.raises(ClusterUnreachableError, match="check its address"):
        in_time(pool.__enter__)
    assert time.monotonic() - began < PATIENCE
    assert (pool.stats().state, server.logins) == ("new", 0)


def test_a_scheduler_that_does_not_answer_is_an_error(own: DaskProcesses, server: LoopbackServer) -> None:
    own.stop_scheduler()
    with pytest.raises(ClusterUnreachableError):
        in_time(AuthenticatedProcessPool(session_at(server), engine=DaskEngine(own.address)).__enter__)


class StoppedMidway(Stay):
    """Its scheduler falls silent once the pool is connected."""

    processes: DaskProcesses

    async def _register(self, client: Any, setup: bytes) -> None:
        self.processes.stop_scheduler()
        await super()._register(client, setup)


def test_a_scheduler_that_falls_silent_at_the_start_is_an_error(own: DaskProcesses) -> None:
    """Not its workers are to blame; and what is waited for makes less than ten seconds."""

    def stay_of(link: Link, events: Events) -> Stay:
        stay = StoppedMidway(link, events)
        stay.processes = own
        return stay

    with pytest.raises(ClusterUnreachableError, match="the scheduler does not answer"):
        in_time(RemoteEngine(DaskCluster(own.address, stay_of=stay_of)).start)
    assert dask_stay._OPEN_WITHIN + dask_stay._WORD_WITHIN < 10
    assert dask_link.CONNECT_WITHIN + dask_stay._LAST_WORD_WITHIN < dask_stay._OPEN_WITHIN


def test_a_scheduler_that_dies_ends_the_pool_with_an_error(
    own: DaskProcesses, server: LoopbackServer, tmp_path: Path
) -> None:
    pool = AuthenticatedProcessPool(session_at(server), engine=DaskEngine(own.address))
    with pool:
        future = pool.submit(begin_and_wait, str(tmp_path / "begun"), str(tmp_path / "never"))
        until((tmp_path / "begun").exists)
        own.scheduler.kill()
        assert isinstance(future.exception(PATIENCE), ClusterUnreachableError)
        with pytest.raises(ClusterUnreachableError, match="connection to the scheduler was lost"):
            pool.submit(double, 1)
    assert pool.stats().state == "closed"


def test_a_scheduler_that_falls_silent_ends_the_pool_with_an_error(
    own: DaskProcesses, server: LoopbackServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shpool.engines import dask_watch

    monkeypatch.setattr(dask_watch, "_LOST", 2.0)
    pool = AuthenticatedProcessPool(session_at(server), engine=DaskEngine(own.address))
    with pool:
        future = pool.submit(begin_and_wait, str(tmp_path / "begun"), str(tmp_path / "never"))
        until((tmp_path / "begun").exists)
        own.stop_scheduler()
        with pytest.raises(ClusterUnreachableError, match="has not answered"):
            future.result(PATIENCE)


def test_a_pool_can_be_left_while_the_scheduler_is_silent(
    own: DaskProcesses, server: LoopbackServer, tmp_path: Path
) -> None:
    pool = AuthenticatedProcessPool(session_at(server), engine=DaskEngine(own.address))
    pool.__enter__()
    future = pool.submit(begin_and_wait, str(tmp_path / "begun"), str(tmp_path / "never"))
    until((tmp_path / "begun").exists)
    own.stop_scheduler()
    in_time(pool.terminate)
    assert isinstance(future.exception(), TaskTerminatedError)


def held_by_worker(dask_worker: Any) -> tuple[int, list[str], str]:
    from shpool.engines import outpost

    plugins = [name for name in dask_worker.plugins if name.startswith("shpool")]
    return len(outpost._outposts), plugins, os.environ.get("CUE_FOR_WORKERS", "")


def held_by_scheduler(dask_scheduler: Any) -> list[str]:
    names = [*dask_scheduler.worker_plugins, *dask_scheduler._broker._topics, *map(str, dask_scheduler.tasks)]
    return [name for name in names if "shpool" in name]


def test_a_pool_leaves_the_cluster_as_it_was(dask_engine: DaskEngine, server: LoopbackServer) -> None:
    from distributed import Client

    with Client(dask_engine.address, set_as_default=False) as client:
        env = {"CUE_FOR_WORKERS": "a word"}
        with AuthenticatedProcessPool(session_at(server), engine=dask_engine, env=env) as pool:
            assert pool.submit(environment, "CUE_FOR_WORKERS").result(PATIENCE)[0] == "a word"
            assert list(pool.map(double, range(10))) == list(range(0, 20, 2))
            assert all(count == 1 and plugins for count, plugins, _ in client.run(held_by_worker).values())
        assert set(map(str, client.run(held_by_worker).values())) == {"(0, [], '')"}
        until(lambda: client.run_on_scheduler(held_by_scheduler) == [])


@pytest.mark.filterwarnings("ignore:the token travels unencrypted")
def test_nothing_leans_on_shared_memory() -> None:
    """Each worker has a network and a /dev/shm of its own."""
    reason = stress_cluster.may_make_namespaces()
    if reason:
        pytest.skip(reason)
    stress_cluster.check_namespaces(3.0)


def test_a_clients_cluster_is_used_and_the_client_left_alone(dask_engine: DaskEngine, server: LoopbackServer) -> None:
    from distributed import Client

    with Client(dask_engine.address, set_as_default=False) as client:
        with AuthenticatedProcessPool(session_at(server), engine=client) as pool:
            assert pool.submit(double, 4).result(PATIENCE) == 8
        assert client.submit(double, 5).result() == 10


def test_a_local_cluster_begins_and_ends_with_the_pool(
    server: LoopbackServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with AuthenticatedProcessPool(session_at(server), 1, engine="dask") as pool:
        worker = pool.submit(pid).result(PATIENCE)
        assert pool.max_workers == 1
    until(lambda: not Path(f"/proc/{worker}").exists())
    assert not list(tmp_path.iterdir())


LOUD_DRIVER = """
import sys
from shpool import AuthenticatedProcessPool, OAuthSession
def loud(number):
    print(f"tile {number} " + 100_000 * "x")
    return number
with AuthenticatedProcessPool(OAuthSession(*sys.argv[1:]), 1, engine="dask") as pool:
    assert list(pool.map(loud, range(10), chunksize=1)) == list(range(10))
"""


def test_what_tasks_on_a_local_cluster_print_is_the_programs_output(
    server: LoopbackServer, child_env: dict[str, str]
) -> None:
    """A megabyte of it, which fits into no pipe."""
    words = [sys.executable, "-c", LOUD_DRIVER, server.token_url, server.client_id, server.client_secret]
    said = subprocess.run(words, env=child_env, capture_output=True, text=True, check=True, timeout=4 * PATIENCE)
    assert sorted(line[:6] for line in said.stdout.splitlines()) == [f"tile {number}" for number in range(10)]
    assert len(said.stdout) > 1_000_000


def test_a_local_clusters_workers_do_not_inherit_the_secret(
    server: LoopbackServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SH_CLIENT_SECRET", "canary-secret-not-real-12")
    with AuthenticatedProcessPool(session_at(server), 1, engine="dask") as pool:
        known, whole = pool.submit(environment, "SH_CLIENT_SECRET").result(PATIENCE)
    assert known is None
    assert b"canary-secret-not-real-12" not in whole


def test_a_scheduler_on_an_open_network_is_worth_a_warning() -> None:
    from shpool.engines.dask_link import _warn_of_open_network

    for address in ("tcp://10.1.2.3:8786", "scheduler.example:8786", "tcp://[2001:db8::1]:8786"):
        with pytest.warns(SHUserWarning, match="travels unencrypted"):
            _warn_of_open_network(address)
    for address in ("tcp://127.0.0.1:8786", "tcp://localhost:1", "tls://10.1.2.3:8786", "inproc://10.1.2.3/1/1"):
        _warn_of_open_network(address)  # here a warning is an error


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl, to make a certificate")
def test_a_cluster_with_certificates_is_used(server: LoopbackServer, tmp_path: Path) -> None:
    from distributed import Security

    cert, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "1", "-nodes"]
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", *subject, "-keyout", key, "-out", cert]
    subprocess.run(made, check=True, capture_output=True)
    options = ["--protocol", "tls", "--tls-ca-file", cert, "--tls-cert", cert, "--tls-key", key]
    security = Security(tls_ca_file=cert, tls_client_cert=cert, tls_client_key=key, require_encryption=True)
    with DaskProcesses(1, options=options) as processes:
        assert processes.address.startswith("tls://")
        with AuthenticatedProcessPool(session_at(server), engine=DaskEngine(processes.address, security)) as pool:
            assert pool.submit(fetch, server.data_url(1, 10)).result(PATIENCE) == tile_bytes(1, 10)
        with pytest.raises(ClusterUnreachableError):
            AuthenticatedProcessPool(session_at(server), engine=DaskEngine(processes.address)).submit(double, 1)


def test_a_missing_extra_is_named(child_env: dict[str, str]) -> None:
    code = (
        "import sys; sys.modules['distributed'] = None; from shpool import *\n"
        "try: AuthenticatedProcessPool(lambda: {}, engine='dask').submit(print)\n"
        "except ImportError as exc: print(type(exc).__name__, exc)"
    )
    said = subprocess.run([sys.executable, "-c", code], env=child_env, capture_output=True, text=True, check=True)
    assert (
        said.stdout.strip()
        == f"{MissingExtraError.__name__} distributed is not installed; run: pip install 'shpool[dask]'"
    )


@pytest.mark.parametrize("limit", [{"max_tasks_per_worker": 5}, {"max_worker_memory": 10**9}])
def test_limits_that_dask_does_not_know_are_refused(
    dask_engine: DaskEngine, server: LoopbackServer, limit: dict[str, int]
) -> None:
    with pytest.raises(ValueError, match="are not Dask's"):
        AuthenticatedProcessPool(session_at(server), engine=dask_engine, **limit).submit(double, 1)  # type: ignore[arg-type]  # shorthand


# Arguments and logs


def test_large_arguments_results_and_functions_travel(pool: AuthenticatedProcessPool) -> None:
    blob = os.urandom(12_000_000)  # beyond what Dask warns of in a graph
    ballast = os.urandom(100_000)

    def measure(value: bytes) -> tuple[int, bytes]:
        return len(ballast), value

    assert pool.submit(measure, blob).result(PATIENCE) == (100_000, blob)
    assert list(pool.map(measure, [b"1", b"2", b"3"], chunksize=1)) == [(100_000, b"%d" % n) for n in (1, 2, 3)]


def test_a_tasks_records_reach_the_parents_loggers_without_the_token(
    dask_engine: DaskEngine, server: LoopbackServer, caplog: pytest.LogCaptureFixture
) -> None:
    def talk() -> str:
        import logging

        token = current_session().token.access_token
        logging.getLogger("tiles").info("with %s", token)
        return token

    with (
        AuthenticatedProcessPool(session_at(server), engine=dask_engine, log_level="INFO") as pool,
        caplog.at_level("INFO"),
    ):
        token = pool.submit(talk).result(PATIENCE)
    [record] = [record for record in caplog.records if record.name == "tiles"]
    assert record.getMessage() == "with ***"
    assert token not in caplog.text
    assert record.worker  # type: ignore[attr-defined]  # set by shpool


def test_keywords_that_dask_knows_are_the_tasks_own(pool: AuthenticatedProcessPool) -> None:
    def mirror(**words: int) -> dict[str, int]:
        return words

    words = {"key": 1, "workers": 2, "retries": 3, "priority": 4, "pure": 5, "actor": 6, "resources": 7}
    assert pool.submit(mirror, **words).result(PATIENCE) == words


def test_equal_tasks_run_as_often_as_they_are_submitted(pool: AuthenticatedProcessPool, tmp_path: Path) -> None:
    wait([pool.submit(note_run, str(tmp_path), 1) for _ in range(5)], PATIENCE)
    assert len(list(tmp_path.iterdir())) == 5
