"""What is Ray's own in the engine; the contract of all engines is in test_engine_contract.py."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from patience import PATIENCE, in_time, until
from pool_tasks import (
    access_token,
    begin_and_wait,
    begin_and_wait_or_double,
    double,
    fail,
    meet,
    pid,
    report_refused,
)
from ray_fixture import SecondNode, needs_ray, processes_in_session, with_own_ray
from ray_tasks import generation, generation_after, get, outposts

from shpool import AuthenticatedProcessPool, OAuthSession
from shpool.engines.outpost import Outpost, open_outpost
from shpool.engines.parcels import Parcel, TokenCell
from shpool.engines.ray import RayEngine
from shpool.errors import (
    ClusterError,
    ClusterUnreachableError,
    TaskTimeoutError,
    TokenTooLargeError,
    TokenUnavailableError,
)
from shpool.tokens import SYSTEM_CLOCK, Posting, boot_time, token_from_response

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Self

    from shpool.engines.ray_local import LocalRay
    from shpool.testing import LoopbackServer

pytestmark = [pytest.mark.slow, *needs_ray]


SCRIPT = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs the tests in the background has it ignored
import psutil
from shpool import AuthenticatedProcessPool, OAuthSession, RayEngine
from shpool.errors import ClusterUnreachableError
from shpool.testing import LoopbackServer

if __name__ == "__main__":
    server = LoopbackServer().__enter__()
    session = OAuthSession(server.token_url, server.client_id, server.client_secret)
"""


def run_script(body: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run what a process of its own must do."""
    paths = os.pathsep.join([env["PYTHONPATH"], str(Path(__file__).parent)])
    code = SCRIPT + textwrap.indent(textwrap.dedent(body), "    ")
    command = [sys.executable, "-c", code]
    env = {**env, "PYTHONPATH": paths}
    # Ray's own waits for a head that is gone add up to 20 s on an idle machine already.
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=6 * PATIENCE, check=False)


def keepers(node: LocalRay) -> list[psutil.Process]:
    """Return the actors of this Ray that keep tokens."""
    found = psutil.process_iter(["name"])
    return [each for each in found if each.info["name"].startswith("ray::Keeper") and is_of(node, each.pid)]


def is_of(node: LocalRay, process: int) -> bool:
    return process in processes_in_session(node.pid)


def session_at(server: LoopbackServer) -> OAuthSession:
    return OAuthSession(server.token_url, server.client_id, server.client_secret)


# Where


def test_it_runs_as_many_tasks_as_ray_has_processors(ray_engine: RayEngine, server: LoopbackServer) -> None:
    with AuthenticatedProcessPool(session_at(server), engine=ray_engine) as pool:
        assert pool.max_workers == 2
        assert pool.submit(pid).result(PATIENCE) != os.getpid()


def test_a_task_takes_the_processors_it_is_said_to(ray_engine: RayEngine, server: LoopbackServer) -> None:
    with AuthenticatedProcessPool(session_at(server), engine=RayEngine(ray_engine.address, num_cpus=2)) as pool:
        assert pool.max_workers == 1
        assert pool.submit(double, 4).result(PATIENCE) == 8


@pytest.mark.parametrize(("address", "num_cpus"), [("ray://head:10001", 1.0), (None, 0.0)])
def test_what_ray_cannot_do_is_refused_when_it_is_described(address: str | None, num_cpus: float) -> None:
    with pytest.raises(ValueError, match=r"ray://|num_cpus"):
        RayEngine(address, num_cpus)


def test_an_address_where_nobody_listens_is_told_at_once(server: LoopbackServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as once:
        port = once.getsockname()[1]
    pool = AuthenticatedProcessPool(session_at(server), engine=RayEngine(f"127.0.0.1:{port}"))
    with pytest.raises(ClusterUnreachableError, match=f"127.0.0.1:{port}"):
        in_time(pool.__enter__)
    assert server.logins == 0


def test_pools_share_the_connection_that_is_there_and_leave_it(ray_engine: RayEngine, server: LoopbackServer) -> None:
    import ray

    with AuthenticatedProcessPool(session_at(server), engine=ray_engine) as first:
        with AuthenticatedProcessPool(session_at(server), engine="ray") as second:
            assert second.submit(double, 1).result(PATIENCE) == 2
        assert ray.is_initialized()
        with pytest.raises(ClusterError, match="connected to another Ray"):
            AuthenticatedProcessPool(session_at(server), engine=RayEngine("127.0.0.1:9")).__enter__()
        assert first.submit(double, 2).result(PATIENCE) == 4
    assert not ray.is_initialized()


def test_sigterm_stays_the_callers(ray_engine: RayEngine, server: LoopbackServer) -> None:
    """``ray.init`` takes SIGTERM for itself where it can."""
    before = signal.getsignal(signal.SIGTERM)
    with AuthenticatedProcessPool(session_at(server), engine=ray_engine):
        assert signal.getsignal(signal.SIGTERM) is before


@with_own_ray
def test_a_ray_that_does_not_answer_is_told_within_ten_seconds(child_env: dict[str, str]) -> None:
    """Ray itself asks for more than a minute, in a thread that cannot be ended; so this runs in a process."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        run = run_script(
            f"""
            try: AuthenticatedProcessPool(session, engine=RayEngine("127.0.0.1:{silent.getsockname()[1]}")).__enter__()
            except ClusterUnreachableError as exc: print(exc, server.logins, flush=True)
            os._exit(0)""",
            child_env,
        )
    assert "and not set; check its address and that it runs 0" in run.stdout


def test_a_pool_whose_process_leaves_ray_is_told(ray_engine: RayEngine, child_env: dict[str, str]) -> None:
    run = run_script(
        f"""
        import ray
        pool = AuthenticatedProcessPool(session, engine=RayEngine("{ray_engine.address}"))
        task = pool.submit(time.sleep, 600)
        ray.shutdown()
        print(repr(task.exception({PATIENCE})))
        pool.shutdown()
        print(ray.is_initialized())""",
        child_env,
    )
    assert "ray.shutdown()" in run.stdout
    assert run.stdout.splitlines()[-1] == "False"


def test_what_is_pending_is_done_before_the_interpreter_ends(ray_engine: RayEngine, child_env: dict[str, str]) -> None:
    """Ray leaves at exit too, and must not be the first."""
    run = run_script(
        f"""
        pool = AuthenticatedProcessPool(session, engine=RayEngine("{ray_engine.address}"))
        pool.submit(time.sleep, 0.5).add_done_callback(lambda task: print("ended with", task.exception()))""",
        child_env,
    )
    assert (run.returncode, run.stdout) == (0, "ended with None\n")


# A Ray whose head does not answer


@pytest.fixture
def lone_ray() -> Iterator[LocalRay]:
    """Run another Ray, of the test's alone."""
    from shpool.engines.ray_local import LocalRay

    node = LocalRay(1)
    yield node
    node.close(is_answering=False)
    until(lambda: not processes_in_session(node.pid))


def pid_of_head(node: LocalRay) -> int:
    (head,) = [each for each in processes_in_session(node.pid) if psutil.Process(each).name() == "gcs_server"]
    return head


@with_own_ray
def test_a_head_that_answers_no_more_ends_the_pool(lone_ray: LocalRay, child_env: dict[str, str]) -> None:
    """Ray itself would wait for it, at the end of the process too."""
    run = run_script(
        f"""
        with AuthenticatedProcessPool(session, engine=RayEngine("{lone_ray.address}")) as pool:
            task = pool.submit(time.sleep, 600)
            os.kill({pid_of_head(lone_ray)}, 19)
            print(repr(task.exception({PATIENCE})))
        print("left")""",
        child_env,
    )
    assert "ClusterUnreachableError" in run.stdout, run.stderr
    assert "its head, the GCS, has not answered for 10 s" in run.stdout
    assert (run.stdout.splitlines()[-1], run.returncode) == ("left", 0)


@with_own_ray
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_pool_can_be_left_when_the_head_does_not_answer(
    lone_ray: LocalRay, child_env: dict[str, str], number: signal.Signals
) -> None:
    run = run_script(
        f"""
        import signal
        try:
            with AuthenticatedProcessPool(session, engine=RayEngine("{lone_ray.address}")) as pool:
                print(pool.submit(abs, -1).result({PATIENCE}))
                os.kill({pid_of_head(lone_ray)}, {int(number)})
                signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            print("left")""",
        child_env,
    )
    assert (run.stdout.splitlines(), run.returncode, run.stderr) == (["1", "left"], 0, "")


@with_own_ray
def test_a_farewell_that_does_not_end_holds_up_the_end_of_the_process_no_longer(
    lone_ray: LocalRay, child_env: dict[str, str]
) -> None:
    """Here it waits for one in another thread, as Ray lets one in at a time."""
    run = run_script(
        f"""
        import threading, ray
        try:
            with AuthenticatedProcessPool(session, engine=RayEngine("{lone_ray.address}")) as pool:
                print(pool.submit(abs, -1).result({PATIENCE}))
                os.kill({pid_of_head(lone_ray)}, 19)
                threading.Thread(target=ray.shutdown, daemon=True).start()
                signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            print("left")
            sys.exit(7)""",
        child_env,
    )
    assert (run.stdout.splitlines(), run.returncode) == (["1", "left"], 7), run.stderr


@with_own_ray
def test_a_first_task_does_not_wait_for_the_head_for_ever(lone_ray: LocalRay, child_env: dict[str, str]) -> None:
    """With it Ray brings the function there."""
    run = run_script(
        f"""
        with AuthenticatedProcessPool(session, engine=RayEngine("{lone_ray.address}")) as pool:
            os.kill({pid_of_head(lone_ray)}, 19)
            print(repr(pool.submit(abs, -1).exception({PATIENCE})))
        print("left")""",
        child_env,
    )
    assert "ClusterUnreachableError" in run.stdout, run.stderr
    assert (run.stdout.splitlines()[-1], run.returncode) == ("left", 0)


@with_own_ray
def test_a_head_that_does_not_answer_opens_no_pool(lone_ray: LocalRay, child_env: dict[str, str]) -> None:
    run = run_script(
        f"""
        import ray
        ray.init("{lone_ray.address}", log_to_driver=False, configure_logging=False)
        os.kill({pid_of_head(lone_ray)}, 19)
        try: AuthenticatedProcessPool(session, engine="ray").__enter__()
        except ClusterUnreachableError as exc: print(exc, server.logins, flush=True)
        os._exit(0)""",
        child_env,
    )
    assert "has not answered in 9 s" in run.stdout, run.stderr
    assert run.stdout.endswith(" 0\n")


@with_own_ray
def test_a_ray_of_our_own_whose_head_is_stopped_is_ended(child_env: dict[str, str]) -> None:
    run = run_script(
        """
        from shpool.engines.ray_link import LINK
        with AuthenticatedProcessPool(session, 1, engine="ray") as pool:
            pool.submit(abs, -1).result()
            folder, pid = LINK._local.folder, LINK._local.pid
            [head] = [each for each in psutil.Process(pid).children(recursive=True) if each.name() == "gcs_server"]
            head.suspend()
        print(os.path.exists(folder), psutil.pid_exists(pid))
        with AuthenticatedProcessPool(session, 1, engine="ray") as pool:
            print(pool.submit(abs, -2).result())""",
        child_env,
    )
    assert (run.stdout.splitlines(), run.returncode) == (["False False", "2"], 0), run.stderr


# A Ray of our own


@with_own_ray
def test_a_ray_of_our_own_begins_and_ends_with_the_pool(child_env: dict[str, str], tmp_path: Path) -> None:
    """As its users have it: Ray guards it by a token of its own, in the user's home."""
    del child_env["RAY_AUTH_MODE"]
    run = run_script(
        """
        import pool_tasks
        from shpool.engines.ray_link import LINK
        os.environ["SH_CLIENT_SECRET"] = server.client_secret
        with AuthenticatedProcessPool(session, 2, engine="ray") as pool:
            print(pool.submit(pool_tasks.environment, "SH_CLIENT_SECRET").result()[0], pool.max_workers)
            print(server.client_secret.encode() in pool.submit(pool_tasks.environment, "PATH").result()[1])
            folder, pid = LINK._local.folder, LINK._local.pid
            print(oct(os.stat(folder).st_mode)[-3:], len(psutil.Process(pid).children()) > 1)
        print(os.path.exists(folder), psutil.pid_exists(pid), "RAY_AUTH_MODE" in os.environ)""",
        child_env,
    )
    assert run.stdout.splitlines() == ["None 2", "False", "700 True", "False False False"], run.stderr
    assert "WARNING" not in run.stderr


@with_own_ray
def test_a_ray_of_our_own_ends_with_a_killed_parent(child_env: dict[str, str]) -> None:
    run = run_script(
        """
        from shpool.engines.ray_link import LINK
        pool = AuthenticatedProcessPool(session, 1, engine="ray")
        pool.submit(time.sleep, 600)
        print(LINK._local.folder, LINK._local.pid, flush=True)
        os.kill(os.getpid(), 9)""",
        child_env,
    )
    folder, session = run.stdout.split()
    until(lambda: not processes_in_session(int(session)))
    assert not Path(folder).exists()


@with_own_ray
def test_a_ray_of_our_own_whose_head_is_stopped_ends_with_a_killed_parent(child_env: dict[str, str]) -> None:
    run = run_script(
        """
        from shpool.engines.ray_link import LINK
        pool = AuthenticatedProcessPool(session, 1, engine="ray").__enter__()
        pid = LINK._local.pid
        [head] = [each for each in psutil.Process(pid).children(recursive=True) if each.name() == "gcs_server"]
        head.suspend()
        print(LINK._local.folder, pid, flush=True)
        os.kill(os.getpid(), 9)""",
        child_env,
    )
    folder, session = run.stdout.split()
    until(lambda: not processes_in_session(int(session)), 2 * PATIENCE)
    assert not Path(folder).exists()


# The token


def test_a_running_task_sees_the_token_renewed(ray_engine: RayEngine, server: LoopbackServer, tmp_path: Path) -> None:
    begun, cue = tmp_path / "begun", tmp_path / "cue"
    with AuthenticatedProcessPool(session_at(server), engine=ray_engine) as pool:
        task = pool.submit(generation_after, str(begun), str(cue))
        until(begun.exists)
        pool.submit(report_refused, 1).result(PATIENCE)
        until(lambda: pool.stats().generation == 2)
        until(lambda: pool.submit(generation).result(PATIENCE) == 2)
        cue.touch()
        assert task.result(PATIENCE) == (1, 2)
    assert server.logins == 2


def test_a_revoked_token_costs_one_login(ray_engine: RayEngine, server: LoopbackServer) -> None:
    with AuthenticatedProcessPool(session_at(server), engine=ray_engine) as pool:
        url = server.data_url(1)
        assert list(pool.map(get, [url] * 4, chunksize=1))
        server.revoke_all()
        assert list(pool.map(get, [url] * 8, chunksize=1))
    assert server.logins == 2


def test_a_keeper_that_is_lost_is_begun_anew(ray_node: LocalRay, ray_engine: RayEngine, server: LoopbackServer) -> None:
    with AuthenticatedProcessPool(session_at(server), engine=ray_engine) as pool:
        assert pool.submit(generation).result(PATIENCE) == 1
        until(lambda: len(keepers(ray_node)) == 1)  # one of an earlier pool may end still
        (keeper,) = keepers(ray_node)
        keeper.kill()
        pool.submit(report_refused, 1).result(PATIENCE)
        until(lambda: pool.submit(generation).result(PATIENCE) == 2 or pool.submit(report_refused, 1).result(PATIENCE))


def test_a_worker_forgets_the_token_with_the_pool(ray_engine: RayEngine, server: LoopbackServer) -> None:
    with AuthenticatedProcessPool(session_at(server), engine=ray_engine) as other:
        with AuthenticatedProcessPool(session_at(server), engine=ray_engine) as pool:
            assert len(pool.submit(outposts).result(PATIENCE)) >= 1
        assert len(other.submit(outposts).result(PATIENCE)) == 1


def test_a_token_that_ray_would_store_is_refused(ray_engine: RayEngine) -> None:
    session = {"access_token": "invented" * 10_000, "expires_in": 3600}
    pool = AuthenticatedProcessPool(lambda: session, engine=ray_engine)
    with pytest.raises(TokenTooLargeError), pool:
        pytest.fail("it must not get here")


# The driver is gone


def test_with_the_driver_go_the_workers_that_ran_its_tasks(
    ray_node: LocalRay, ray_engine: RayEngine, child_env: dict[str, str], tmp_path: Path
) -> None:
    """Ray ends them, and the keeper, which belongs to the driver."""
    begun, cue = tmp_path / "begun", tmp_path / "cue"
    run = run_script(
        f"""
        import pool_tasks
        pool = AuthenticatedProcessPool(session, engine=RayEngine("{ray_engine.address}"))
        pool.submit(pool_tasks.begin_and_wait, {str(begun)!r}, {str(cue)!r})
        while not os.path.exists({str(begun)!r}): time.sleep(0.01)
        os.kill(os.getpid(), 9)""",
        child_env,
    )
    assert run.returncode == -signal.SIGKILL
    until(lambda: not psutil.pid_exists(int(begun.read_text())))
    until(lambda: not keepers(ray_node))


class GoneKeeper:
    """A handle of an actor that is gone for good; its methods answer as Ray's do."""

    @property
    def newer(self) -> Self:
        return self

    def remote(self, *_: object) -> Self:
        return self

    def future(self) -> Future[object]:
        from ray.exceptions import ActorDiedError

        answer: Future[object] = Future()
        answer.set_exception(ActorDiedError())
        return answer


def test_a_worker_whose_keeper_is_gone_serves_its_token_to_the_end_and_closes() -> None:
    from shpool.engines.ray_keeper import _deadline_of, _follow

    cell = TokenCell()
    pool = open_outpost(Outpost("invented-pool", b"", cell, lambda _: None))
    answer = {"access_token": "invented-token", "expires_in": 1.0}
    cell.take(Parcel.of(Posting(token_from_response(answer, SYSTEM_CLOCK.now())), 1))
    deadline = _deadline_of(cell.read()[1])
    follower = threading.Thread(target=_follow, args=(pool, GoneKeeper(), "name"))
    follower.start()
    assert pool.session.token.access_token == "invented-token"
    follower.join(PATIENCE)
    assert boot_time() >= deadline
    with pytest.raises(TokenUnavailableError, match="sharing has ended"):
        _ = pool.session.token


# Workers


def test_a_node_that_comes_later_is_used(ray_engine: RayEngine, server: LoopbackServer, tmp_path: Path) -> None:
    with AuthenticatedProcessPool(session_at(server), engine=ray_engine, retries=2) as pool:
        assert pool.max_workers == 2
        with SecondNode(ray_engine.address or ""):
            until(lambda: pool.max_workers == 3)
            met = [pool.submit(meet, str(tmp_path), me, 3) for me in range(3)]
            assert len({task.result(PATIENCE) for task in met}) == 3
            assert len({pool.submit(access_token).result(PATIENCE) for _ in range(6)}) == 1
        assert pool.submit(double, 2).result(PATIENCE) == 4
    assert server.logins == 1


def test_a_timeout_ends_what_runs(ray_engine: RayEngine, server: LoopbackServer, tmp_path: Path) -> None:
    begun, cue = tmp_path / "begun", tmp_path / "cue"
    with AuthenticatedProcessPool(session_at(server), engine=ray_engine) as pool:
        task = pool.options(timeout=1).submit(begin_and_wait, str(begun), str(cue))
        with pytest.raises(TaskTimeoutError):
            task.result(PATIENCE)
        until(lambda: not psutil.pid_exists(int(begun.read_text())))
        assert pool.submit(double, 1).result(PATIENCE) == 2


def test_a_call_that_takes_long_keeps_no_answer_of_others_back(
    ray_engine: RayEngine, server: LoopbackServer, tmp_path: Path
) -> None:
    """Answers are fetched many at a time, the oldest calls' first; one of these may be held up, or be an error."""
    begun, cue = tmp_path / "begun", tmp_path / "cue"
    with AuthenticatedProcessPool(session_at(server), engine=ray_engine) as pool:
        assert [task.result(PATIENCE) for task in flood(pool, [""] * 100)] == list(range(0, 200, 2))  # so many go ahead
        held, *others = flood(pool, [str(begun), *[""] * 100], str(cue))
        broken = pool.submit(fail, 7)
        assert [task.result(PATIENCE) for task in others] == list(range(2, 202, 2))
        assert isinstance(broken.exception(PATIENCE), ValueError)
        assert not held.done()
        cue.touch()
        assert held.result(PATIENCE) == 0


def flood(pool: AuthenticatedProcessPool, begun: list[str], cue: str = "") -> list[Future[int]]:
    return [pool.submit(begin_and_wait_or_double, mark, cue, number) for number, mark in enumerate(begun)]


def test_a_worker_is_replaced_after_the_calls_it_may_make(ray_engine: RayEngine, server: LoopbackServer) -> None:
    with AuthenticatedProcessPool(session_at(server), 1, engine=ray_engine, max_tasks_per_worker=1) as pool:
        assert len({pool.submit(pid).result(PATIENCE) for _ in range(3)}) == 3


def test_a_limit_that_ray_does_not_know_is_refused(ray_engine: RayEngine, server: LoopbackServer) -> None:
    pool = AuthenticatedProcessPool(session_at(server), engine=ray_engine, max_worker_memory=10**9)
    with pytest.raises(ValueError, match="is not Ray's"):
        pool.submit(double, 1)


def test_a_killed_workers_task_runs_again(ray_engine: RayEngine, server: LoopbackServer, tmp_path: Path) -> None:
    begun, cue = tmp_path / "begun", tmp_path / "cue"
    with AuthenticatedProcessPool(session_at(server), engine=ray_engine, retries=1) as pool:
        task = pool.submit(begin_and_wait, str(begun), str(cue))
        until(begun.exists)
        worker = int(begun.read_text())
        cue.touch()
        os.kill(worker, signal.SIGKILL)
        task.result(PATIENCE)
        assert pool.stats().workers_lost == 1
