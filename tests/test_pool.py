from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import psutil
import pytest
from patience import NEVER, PATIENCE, in_time, until
from pool_tasks import (
    access_token,
    add,
    begin_and_wait,
    double,
    environment,
    fetch,
    initialise,
    initialised,
    meet,
    refuse_to_start,
    report_refused,
    run_python,
    slow_pid,
)

from shpool import AuthenticatedProcessPool, OAuthSession, collect_shared_session
from shpool.errors import (
    BoardInUseError,
    BoardNotFoundError,
    InitializerError,
    LoginError,
    LoginRefusedError,
    SHUserWarning,
    TaskTerminatedError,
    TaskTimeoutError,
    UnpicklableError,
)
from shpool.processors import processor_count
from shpool.testing import LoopbackServer, tile_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

    from authlib_fixture import AuthlibServer

SHARED_MEMORY = Path("/dev/shm")

slow = pytest.mark.slow  # worker processes take a quarter of a second to start


def session_at(server: LoopbackServer, **kwargs: Any) -> OAuthSession:
    return OAuthSession(server.token_url, server.client_id, server.client_secret, **kwargs)


def is_gone(pid: int) -> bool:
    """Tell whether a process has ended; nobody may have reaped it yet."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def workers_of(pid: int) -> set[int]:
    """Return the ids of a process's workers."""
    found = set()
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "shpool-worker" in " ".join(child.cmdline()):
                found.add(child.pid)
    return found


# Arguments


@pytest.mark.parametrize(("workers", "error"), [(0, ValueError), (-2, ValueError), (True, TypeError), (2.0, TypeError)])
def test_max_workers_is_checked(server: LoopbackServer, workers: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="max_workers must be"):
        AuthenticatedProcessPool(session_at(server), workers)


@pytest.mark.parametrize(("files", "most"), [(1024, 328), (10**6, 4096)])
def test_more_workers_than_one_machine_has_room_for_are_refused(
    server: LoopbackServer, monkeypatch: pytest.MonkeyPatch, files: int, most: int
) -> None:
    """Each takes a process, and descriptors of this one."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
    for workers in (most + 1, 10**9):
        with pytest.raises(ValueError, match=f"more than one machine has room for; give at most {most}"):
            AuthenticatedProcessPool(session_at(server), workers)
    assert AuthenticatedProcessPool(session_at(server), most).stats().workers == most


def test_max_workers_is_the_number_of_processors_by_default(server: LoopbackServer) -> None:
    assert 1 <= AuthenticatedProcessPool(session_at(server)).stats().workers <= (os.cpu_count() or 1)


@pytest.mark.parametrize("setting", [{"retries": -1}, {"retries": True}, {"timeout": 0.0}, {"engine": "threads"}])
def test_settings_are_checked(server: LoopbackServer, setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        AuthenticatedProcessPool(session_at(server), **setting)


def test_an_initializer_must_be_callable(server: LoopbackServer) -> None:
    with pytest.raises(TypeError, match="callable"):
        AuthenticatedProcessPool(session_at(server), initializer="setup")  # type: ignore[arg-type]  # the mistake meant


def test_a_session_that_does_not_refresh_is_refused(server: LoopbackServer) -> None:
    with pytest.raises(ValueError, match="does not refresh"):
        AuthenticatedProcessPool(session_at(server, refresh_before_expiry=None))


def test_a_session_made_of_a_token_is_refused() -> None:
    session = OAuthSession.from_token({"access_token": "invented", "expires_at": time.time() + 60})
    with pytest.raises(ValueError, match="does not refresh"):
        AuthenticatedProcessPool(session)


def test_what_is_no_session_is_refused() -> None:
    with pytest.raises(TypeError, match="session must be"):
        AuthenticatedProcessPool("token")  # type: ignore[arg-type]  # the mistake meant


@slow
def test_an_initializer_that_cannot_be_pickled_is_refused_before_anything_starts(server: LoopbackServer) -> None:
    pool = AuthenticatedProcessPool(session_at(server), 1, initializer=print, initargs=(threading.Lock(),))
    with pytest.raises(UnpicklableError, match="initializer"), pool:
        pass
    assert server.logins == 0
    assert not workers_of(os.getpid())


# Logins


@slow
def test_all_workers_share_one_login(server: LoopbackServer, tmp_path: Path) -> None:
    with AuthenticatedProcessPool(session_at(server), 4) as pool:
        futures = [pool.submit(meet, str(tmp_path), number, 4) for number in range(4)]
        assert len({future.result(PATIENCE) for future in futures}) == 4
        assert len(set(pool.map(access_token, range(8), chunksize=1))) == 1
        assert list(pool.map(fetch, [server.data_url(number, 100) for number in range(20)])) == [
            tile_bytes(number, 100) for number in range(20)
        ]
    assert (server.logins, server.unauthorized) == (1, 0)


@slow
def test_authlibs_server_counts_one_login_too(authlib_server: AuthlibServer) -> None:
    before = authlib_server.stats()
    session = OAuthSession(authlib_server.token_url, authlib_server.client_id, authlib_server.client_secret)
    with AuthenticatedProcessPool(session, 3) as pool:
        pages = pool.map(fetch, [authlib_server.data_url(number) for number in range(30)], chunksize=1)
        assert [json.loads(page)["square"] for page in pages] == [number * number for number in range(30)]
    now = authlib_server.stats()
    assert now["logins"] - before["logins"] == 1
    assert now["unauthorized"] == before["unauthorized"]
    assert now["served"] - before["served"] == 30


@slow
def test_authlibs_server_refuses_a_wrong_secret_for_good(authlib_server: AuthlibServer) -> None:
    session = OAuthSession(authlib_server.token_url, authlib_server.client_id, "a-wrong-secret")
    with pytest.raises(LoginRefusedError, match="invalid_client"), AuthenticatedProcessPool(session, 2):
        pytest.fail("entered")
    until(lambda: not workers_of(os.getpid()))


@slow
def test_sixty_four_workers_make_one_login(server: LoopbackServer, tmp_path: Path) -> None:
    with AuthenticatedProcessPool(session_at(server), 64) as pool:
        futures = [pool.submit(meet, str(tmp_path), number, 64) for number in range(64)]
        assert len({future.result(120) for future in futures}) == 64
        assert len(set(pool.map(fetch, [f"{server.base_url}/whoami"] * 64, chunksize=1))) == 1
        assert pool.stats().logins == 1
    assert (server.logins, server.unauthorized) == (1, 0)


@slow
def test_a_refused_login_leaves_no_worker(server: LoopbackServer) -> None:
    session = OAuthSession(server.token_url, server.client_id, "wrong-secret")
    with pytest.raises(LoginRefusedError), AuthenticatedProcessPool(session, 3):
        pytest.fail("entered")
    assert not workers_of(os.getpid())


@slow
def test_a_login_that_fails_is_raised_at_the_first_submit(server: LoopbackServer) -> None:
    server.answer_always(503)
    pool = AuthenticatedProcessPool(session_at(server), 1)
    with pytest.raises(LoginError, match="503"):
        pool.submit(double, 1)
    assert not workers_of(os.getpid())


@slow
def test_workers_follow_the_token_when_it_is_renewed(server: LoopbackServer) -> None:
    with AuthenticatedProcessPool(session_at(server), 2) as pool:
        first = pool.submit(access_token).result(PATIENCE)
        server.lifetime = 1.0
        pool.submit(report_refused, 1).result(PATIENCE)
        until(lambda: pool.stats().generation > 1)
        server.lifetime = 3600.0
        until(lambda: (pool.stats().token_remaining or 0.0) > 1.0)
        assert server.logins >= 3, "one at the start, one that was asked for, and one because the token was short-lived"
        assert pool.submit(access_token).result(PATIENCE) != first
        assert json.loads(pool.submit(fetch, f"{server.base_url}/whoami").result(PATIENCE))["number"] == server.logins
        assert server.unauthorized == 0


# Initializers and environments


@slow
def test_the_initializer_runs_once_in_each_worker_with_its_session(server: LoopbackServer, tmp_path: Path) -> None:
    with AuthenticatedProcessPool(session_at(server), 3, initializer=initialise, initargs=("hello",)) as pool:
        for turn in range(2):
            folder = tmp_path / f"{turn}"
            folder.mkdir()
            futures = [pool.submit(initialised, str(folder), number, 3) for number in range(3)]
            found = [future.result(PATIENCE) for future in futures]
            assert len({pid for pid, _ in found}) == 3
            assert [words for _, words in found] == [["hello 1"]] * 3


@slow
@pytest.mark.parametrize("delay", [0.0, 1.5])
def test_an_initializer_that_raises_is_what_the_caller_hears_of(server: LoopbackServer, delay: float) -> None:
    """Also where the workers fail before the login has ended."""
    server.delay(delay)
    pool = AuthenticatedProcessPool(session_at(server), 2, initializer=refuse_to_start, initargs=("no licence",))
    with pytest.raises(InitializerError, match="no licence"), pool:
        pool.submit(double, 1).result(PATIENCE)
    assert pool.stats().state == "closed"
    assert not workers_of(os.getpid())


@slow
def test_the_environment_is_there_before_the_first_import(
    server: LoopbackServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "reads_at_import.py").write_text("import os\nSEEN = os.environ.get('OMP_NUM_THREADS')\n")
    monkeypatch.syspath_prepend(tmp_path)

    def seen() -> object:
        return importlib.import_module("reads_at_import").SEEN

    with AuthenticatedProcessPool(session_at(server), 1, env={"OMP_NUM_THREADS": "3"}) as pool:
        assert pool.submit(seen).result(PATIENCE) == "3"
    assert os.environ.get("OMP_NUM_THREADS") != "3"


@slow
def test_no_worker_has_the_secret_in_its_environment(server: LoopbackServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SH_CLIENT_SECRET", "invented-secret-of-another-account")
    monkeypatch.setenv("MY_OWN_NAME_FOR_IT", server.client_secret)
    with AuthenticatedProcessPool(session_at(server), 2) as pool:
        for name in ("SH_CLIENT_SECRET", "MY_OWN_NAME_FOR_IT"):
            seen, kernels = pool.submit(environment, name).result(PATIENCE)
            assert not seen
            assert b"invented-secret" not in kernels
            assert server.client_secret.encode() not in kernels
        for worker in workers_of(os.getpid()):
            for file in ("environ", "cmdline"):
                content = Path(f"/proc/{worker}/{file}").read_bytes()
                assert b"invented-secret" not in content
                assert server.client_secret.encode() not in content
    assert os.environ["SH_CLIENT_SECRET"] == "invented-secret-of-another-account"


# Names


@slow
def test_another_process_can_collect_from_a_pool_with_a_name(
    server: LoopbackServer, memory_name: str, child_env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", child_env["PYTHONPATH"])
    code = "import sys, shpool; print(shpool.collect_shared_session(sys.argv[1]).token['access_token'])"
    with AuthenticatedProcessPool(session_at(server), 1, memory_name=memory_name) as pool:
        ours = pool.submit(access_token).result(PATIENCE)
        assert run_python(code, memory_name) == ours
        assert collect_shared_session(memory_name).token["access_token"] == ours
        assert pool.submit(_collect, memory_name).result(PATIENCE) == ours
    with pytest.raises(BoardNotFoundError):
        collect_shared_session(memory_name)
    assert server.logins == 1


def _collect(memory_name: str) -> str:
    return str(collect_shared_session(memory_name).token["access_token"])


@slow
def test_a_second_pool_under_a_living_name_is_refused_and_leaves_nothing(
    server: LoopbackServer, memory_name: str
) -> None:
    with AuthenticatedProcessPool(session_at(server), 1, memory_name=memory_name) as pool:
        pool.submit(double, 1).result(PATIENCE)
        before = len(list(Path("/proc/self/fd").iterdir()))
        for _ in range(3):
            with (
                pytest.raises(BoardInUseError, match=str(os.getpid())),
                AuthenticatedProcessPool(session_at(server), 1, memory_name=memory_name),
            ):
                pytest.fail("entered")
        gc.collect()
        assert len(list(Path("/proc/self/fd").iterdir())) <= before
        assert collect_shared_session(memory_name).token.generation == 1


# Ends


@slow
def test_leaving_the_block_finishes_what_was_submitted(server: LoopbackServer) -> None:
    with AuthenticatedProcessPool(session_at(server), 2) as pool:
        futures = [pool.submit(slow_pid, 0.01) for _ in range(20)]
    assert all(future.result(0) for future in futures)
    assert not workers_of(os.getpid())


@slow
def test_an_error_in_the_block_finishes_it_too(server: LoopbackServer) -> None:
    futures: list[Future[int]] = []

    def work() -> None:
        with AuthenticatedProcessPool(session_at(server), 1) as pool:
            futures.extend(pool.submit(slow_pid, 0.01) for _ in range(5))
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert all(future.done() and not future.cancelled() for future in futures)


@slow
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_exit_from_the_block_stops_what_runs(
    server: LoopbackServer, tmp_path: Path, kind: type[BaseException]
) -> None:
    futures: list[Future[int]] = []

    def work() -> None:
        with AuthenticatedProcessPool(session_at(server), 1) as pool:
            futures.append(pool.submit(begin_and_wait, str(tmp_path / "begun"), "never"))
            futures.append(pool.submit(double, 1))
            until((tmp_path / "begun").exists)
            raise kind

    with pytest.raises(kind):
        work()
    assert isinstance(futures[0].exception(0), TaskTerminatedError)
    assert futures[1].cancelled()


@slow
def test_terminate_stops_what_runs(server: LoopbackServer, tmp_path: Path) -> None:
    pool = AuthenticatedProcessPool(session_at(server), 1)
    future = pool.submit(begin_and_wait, str(tmp_path / "begun"), "never")
    until((tmp_path / "begun").exists)
    pool.terminate()
    assert isinstance(future.exception(0), TaskTerminatedError)
    assert pool.stats().state == "closed"


@slow
def test_shutdown_without_waiting_returns_at_once_and_finishes(server: LoopbackServer, tmp_path: Path) -> None:
    pool = AuthenticatedProcessPool(session_at(server), 1)
    future = pool.submit(begin_and_wait, str(tmp_path / "begun"), str(tmp_path / "cue"))
    queued = pool.submit(double, 1)
    until((tmp_path / "begun").exists)
    pool.shutdown(wait=False, cancel_futures=True)
    assert pool.stats().state == "closing"
    assert queued.cancelled()
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.submit(double, 1)
    (tmp_path / "cue").touch()
    assert future.result(PATIENCE)
    until(lambda: pool.stats().state == "closed")


@slow
def test_a_view_ends_its_pool(server: LoopbackServer) -> None:
    pool = AuthenticatedProcessPool(session_at(server), 1)
    with pool.options(retries=1) as view:
        assert view.submit(add, 1, 2).result(PATIENCE) == 3
    assert pool.stats().state == "closed"


@slow
def test_a_view_has_its_own_timeout(server: LoopbackServer) -> None:
    with AuthenticatedProcessPool(session_at(server), 2) as pool:
        late = pool.options(timeout=0.2).submit(slow_pid, NEVER)
        assert pool.submit(slow_pid, 0.4).result(PATIENCE)
        with pytest.raises(TaskTimeoutError):
            late.result(PATIENCE)


@slow
def test_a_forgotten_pool_ends_its_workers(server: LoopbackServer) -> None:
    pool = AuthenticatedProcessPool(session_at(server), 2)
    assert pool.submit(double, 2).result(PATIENCE) == 4
    workers = workers_of(os.getpid())
    assert workers
    del pool
    gc.collect()
    until(lambda: all(is_gone(worker) for worker in workers))
    until(lambda: not any(thread.name.startswith("shpool-crew") for thread in threading.enumerate()))


@slow
def test_a_pool_forgotten_in_a_cycle_is_collected_in_any_thread(server: LoopbackServer) -> None:
    """The collector may run in the pool's own loop, which holds the lock that shutdown takes."""
    for _ in range(3):
        pool = AuthenticatedProcessPool(session_at(server), 1)
        cycle: list[object] = [pool]
        cycle.append(cycle)
        assert pool._engine is None
        pool.submit(double, 2).result(PATIENCE)
        engine: Any = pool._engine
        del pool, cycle
        with engine._lock:
            gc.collect()
        assert engine.join(PATIENCE)
        del engine


@slow
def test_what_was_submitted_to_a_forgotten_pool_still_runs(server: LoopbackServer) -> None:
    futures = [AuthenticatedProcessPool(session_at(server), 1).submit(double, number) for number in range(2)]
    gc.collect()
    assert [future.result(PATIENCE) for future in futures] == [0, 2]


@slow
def test_threads_that_start_a_pool_together_start_it_once(server: LoopbackServer) -> None:
    with contextlib.closing(_Closing(AuthenticatedProcessPool(session_at(server), 2))) as closing:
        results: list[int] = []
        threads = [
            threading.Thread(target=lambda number=number: results.append(closing.pool.submit(double, number).result()))
            for number in range(16)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert sorted(results) == list(range(0, 32, 2))
        assert len(workers_of(os.getpid())) <= 2
    assert server.logins == 1


class _Closing:
    def __init__(self, pool: AuthenticatedProcessPool) -> None:
        self.pool = pool

    def close(self) -> None:
        self.pool.shutdown()


@slow
def test_a_hanging_token_endpoint_does_not_keep_the_end_waiting(
    server: LoopbackServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shpool.sharing.ATTEMPT_WITHIN", NEVER)  # nor does anything else end the login
    with AuthenticatedProcessPool(session_at(server, timeout=(NEVER, NEVER)), 1) as pool:
        pool.submit(double, 1).result(PATIENCE)
        server.hang()
        pool.submit(report_refused, 1).result(PATIENCE)
        until(lambda: any(thread.name == "shpool-login" for thread in threading.enumerate()))
        try:
            in_time(pool.shutdown)
        finally:
            server.hang(False)


def interrupted(number: int, called: list[int]) -> int:
    called.append(number)
    if number == 2:
        signal.raise_signal(signal.SIGINT)
    return number


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Have SIGINT raise KeyboardInterrupt, which a shell that runs the tests in the background has ignored."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("way", ["submit", "map", "map_unordered", "batches"])
def test_an_interrupt_of_the_inline_engine_is_the_callers(server: LoopbackServer, way: str) -> None:
    """The task runs in the caller's own thread, so it is the caller that ^C strikes."""
    called: list[int] = []
    fn = functools.partial(interrupted, called=called)
    pool = AuthenticatedProcessPool(session_at(server), engine="inline")
    ways: dict[str, Callable[[], Any]] = {
        "submit": lambda: [pool.submit(fn, number) for number in range(20)],
        "map": lambda: list(pool.map(fn, range(20), chunksize=1)),
        "map_unordered": lambda: list(pool.map_unordered(fn, range(20))),
        "batches": lambda: list(pool.map(fn, range(20), chunksize=10)),
    }
    with pool:
        with pytest.raises(KeyboardInterrupt):
            ways[way]()
        assert called == [0, 1, 2]


# Scripts, each in an interpreter of its own

HEAD = """
import itertools, os, signal, sys, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # else ignored where the tests run in the background
from shpool import AuthenticatedProcessPool, OAuthSession, current_session
session = OAuthSession(sys.argv[1], "demo-client", os.environ["SH_CLIENT_SECRET"])
"""


@dataclass
class Script:
    """A running script."""

    process: subprocess.Popen[str]
    output: IO[str]
    seen: set[int] = field(default_factory=set)  # its workers, as far as a test asked for them

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_for_line(self, line: str) -> None:
        for said in self.output:
            if said.strip() == line:
                return
        pytest.fail(f"the script ended without saying {line!r}: {self.errors()}")

    def workers(self, count: int) -> set[int]:
        """Return its workers once there are so many."""
        until(lambda: len(workers_of(self.pid)) == count)
        found = workers_of(self.pid)
        self.seen |= found
        return found

    def end(self, seconds: float = PATIENCE) -> int:
        """Return the exit code; fail if it takes longer."""
        return self.process.wait(seconds)

    def rest(self) -> list[str]:
        """Wait for the end without an error and return all it said."""
        said, errors = self.process.communicate(timeout=PATIENCE)
        assert self.process.returncode == 0, errors
        assert not errors
        return said.splitlines()

    def errors(self) -> str:
        assert self.process.stderr is not None
        self.process.wait(PATIENCE)
        return self.process.stderr.read()


@pytest.fixture
def script(server: LoopbackServer, child_env: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., Script]]:
    """Run scripts against the server, each in a process group of its own; kill what is left of them."""
    started: list[Script] = []

    def run(text: str, *arguments: str) -> Script:
        path = tmp_path / f"script{len(started)}.py"
        path.write_text(HEAD + textwrap.dedent(text))
        process = subprocess.Popen(
            [sys.executable, str(path), server.token_url, *arguments],
            env={**child_env, "SH_CLIENT_SECRET": server.client_secret},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert process.stdout is not None
        started.append(Script(process, process.stdout))
        return started[-1]

    yield run
    for running in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            running.seen |= workers_of(running.pid)
        running.process.kill()
        running.process.wait()
        running.output.close()
        assert running.process.stderr is not None
        running.process.stderr.close()
        for pid in running.seen:
            with contextlib.suppress(psutil.NoSuchProcess):
                if "shpool-worker" in " ".join(psutil.Process(pid).cmdline()):  # the id may be another's by now
                    os.kill(pid, signal.SIGKILL)


@slow
def test_functions_and_classes_of_main_travel(script: Callable[..., Script]) -> None:
    lines = script("""
        import dataclasses, functools
        FACTOR = 3

        @dataclasses.dataclass
        class Tile:
            number: int
            def area(self):
                return self.number * FACTOR

        class TileError(Exception):
            def __init__(self, tile):
                super().__init__(tile)
                self.tile = tile

        def make(number):
            return Tile(number)

        def grow(tile, by):
            return Tile(tile.number + by)

        def refuse(tile):
            raise TileError(tile)

        with AuthenticatedProcessPool(session, 2) as pool:
            tiles = list(pool.map(make, range(5)))
            print(all(type(tile) is Tile for tile in tiles), [tile.number for tile in tiles])
            print([tile.number for tile in pool.map(functools.partial(grow, by=10), tiles)])
            print([pool.submit(tile.area).result() for tile in tiles[:3]])
            print(pool.submit(lambda: FACTOR + 1).result())
            print(type(pool.submit(Tile, 7).result()) is Tile)
            try:
                pool.submit(refuse, tiles[2]).result()
            except TileError as error:
                print(error.tile == Tile(2), "refuse" in str(error.__cause__))
    """).rest()
    assert lines == ["True [0, 1, 2, 3, 4]", "[10, 11, 12, 13, 14]", "[0, 3, 6]", "4", "True", "True True"]


@slow
def test_functions_of_main_travel_from_a_process_of_multiprocessings_own(script: Callable[..., Script]) -> None:
    """There the script is imported under another name."""
    lines = script("""
        import multiprocessing

        def square(number):
            return number * number

        def run():
            with AuthenticatedProcessPool(session, 1) as pool:
                print(*pool.map(square, range(3)), flush=True)

        if __name__ == "__main__":
            process = multiprocessing.get_context("spawn").Process(target=run)
            process.start()
            process.join()
    """).rest()
    assert lines == ["0 1 4"]


@slow
def test_a_script_without_a_main_guard_works(script: Callable[..., Script]) -> None:
    """Workers do not import the parent's main module."""
    lines = script("""
        pool = AuthenticatedProcessPool(session, 2)
        print(sum(pool.map(lambda number: number * number, range(100))))
        pool.shutdown()
    """).rest()
    assert lines == ["328350"]


@slow
def test_a_global_set_by_an_initializer_of_main_is_seen_by_its_own_functions_only_through_modules(
    script: Callable[..., Script],
) -> None:
    """Functions of main go by value; what an initializer leaves must lie in a module."""
    lines = script("""
        import json

        def set_up():
            json.left_here = current_session().token.generation

        def look(_):
            return json.left_here

        with AuthenticatedProcessPool(session, 2, initializer=set_up) as pool:
            print(set(pool.map(look, range(10))))
    """).rest()
    assert lines == ["{1}"]


ENDS = {
    "pending futures": """
        def note(number):
            time.sleep(0.05)
            print(f"ran {number}\\n", end="", flush=True)  # in one write: the other worker may print at this moment

        pool = AuthenticatedProcessPool(session, 2)
        futures = [pool.submit(note, number) for number in range(4)]
    """,
    "a finished pool": """
        pool = AuthenticatedProcessPool(session, 2)
        for number in range(4):
            print("ran", pool.submit(int, number).result(), flush=True)
    """,
    "an unfinished map": """
        pool = AuthenticatedProcessPool(session, 2)
        results = pool.map(int, itertools.count())
        for number in itertools.islice(results, 4):
            print("ran", number, flush=True)
    """,
    "a pool that never began": """
        pool = AuthenticatedProcessPool(session, 2)
        for number in range(4):
            print("ran", number)
    """,
    "imports of multiprocessing after the pool": """
        pool = AuthenticatedProcessPool(session, 2)
        for number in range(4):
            print("ran", pool.submit(int, number).result(), flush=True)
        import multiprocessing.util, multiprocessing.pool, concurrent.futures.process, loky
    """,
    "a view": """
        pool = AuthenticatedProcessPool(session, 2).options(retries=1)
        for number in pool.map(int, range(4)):
            print("ran", number, flush=True)
    """,
    "another thread's tasks": """
        pool = AuthenticatedProcessPool(session, 2)
        pool.submit(int).result()
        def work():
            for number in pool.map(int, range(4), chunksize=1):
                time.sleep(0.05)
                print("ran", number, flush=True)
        threading.Thread(target=work).start()
    """,
}


@slow
@pytest.mark.parametrize("text", ENDS.values(), ids=ENDS)
def test_a_script_ends_without_shutdown(script: Callable[..., Script], text: str) -> None:
    assert sorted(script(text).rest()) == [f"ran {number}" for number in range(4)]


@slow
def test_an_interrupt_in_submit_loses_and_repeats_nothing(script: Callable[..., Script]) -> None:
    """Those who work in a notebook go on after ^C. An alarm stands for it, since that can come at any moment."""
    lines = script("""
        import collections, random, signal

        def interrupt(*_):
            raise KeyboardInterrupt

        def note(number, _):
            return number

        signal.signal(signal.SIGALRM, interrupt)
        pool = AuthenticatedProcessPool(session, 2)
        pool.submit(int).result()
        number = struck = 0
        while struck < 300:
            futures = {}
            try:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(0.0005, 0.005))
                while True:
                    number += 1
                    futures[number] = pool.submit(note, number, bytes(50_000))
            except KeyboardInterrupt:
                struck += 1
            for number, future in futures.items():
                assert future.result(30) == number
        pool.shutdown()
        print("right")
    """).rest()
    assert lines == ["right"]


LONG_TASKS = {
    "in a with block": """
        with AuthenticatedProcessPool(session, 2) as pool:
            pool.submit(int).result()
            print("begun", flush=True)
            list(pool.map(time.sleep, [600] * 8))
    """,
    "without a with block": """
        pool = AuthenticatedProcessPool(session, 2)
        pool.submit(int).result()
        print("begun", flush=True)
        list(pool.map(time.sleep, [600] * 8))
    """,
    "waiting for a future": """
        with AuthenticatedProcessPool(session, 2) as pool:
            futures = [pool.submit(time.sleep, 600) for _ in range(8)]
            print("begun", flush=True)
            futures[0].result()
    """,
    "waiting in shutdown": """
        pool = AuthenticatedProcessPool(session, 2)
        futures = [pool.submit(time.sleep, 600) for _ in range(8)]
        print("begun", flush=True)
        pool.shutdown()
    """,
    "inside the input": """
        def slow_input():
            yield 600
            yield 600
            print("begun", flush=True)
            time.sleep(600)
            yield 600

        with AuthenticatedProcessPool(session, 2) as pool:
            list(pool.map(time.sleep, slow_input(), chunksize=1))
    """,
    "in another module's event loop": """
        import asyncio

        async def main():
            with AuthenticatedProcessPool(session, 2) as pool:
                loop = asyncio.get_running_loop()
                print("begun", flush=True)
                await asyncio.gather(*(loop.run_in_executor(pool, time.sleep, 600) for _ in range(4)))

        asyncio.run(main())
    """,
}


@slow
@pytest.mark.parametrize("text", LONG_TASKS.values(), ids=LONG_TASKS)
def test_an_interrupt_ends_a_script_at_once(script: Callable[..., Script], text: str) -> None:
    """As the terminal sends it: to the whole process group."""
    running = script(text)
    running.wait_for_line("begun")
    workers = running.workers(2)
    os.killpg(running.pid, signal.SIGINT)
    assert running.end() in {-signal.SIGINT, 130}
    until(lambda: all(is_gone(worker) for worker in workers))
    errors = running.errors()
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert "loky" not in errors


def variable(name: str) -> str | None:
    return os.environ.get(name)


@slow
def test_libraries_in_workers_share_the_processors(server: LoopbackServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else four workers on four processors run sixteen BLAS threads; what is set already is left alone."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "GDAL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "7")
    with AuthenticatedProcessPool(session_at(server), 1, env={"MKL_NUM_THREADS": "5"}) as pool:
        names = ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "GDAL_NUM_THREADS"]
        assert list(pool.map(variable, names)) == [str(processor_count()), "5", "7", str(processor_count())]


@slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes are bound to processors on Linux alone")
def test_only_the_processors_that_the_parent_may_use_are_shared(script: Callable[..., Script]) -> None:
    """On a shared machine, or in a container, those are fewer than there are."""
    running = script("""
        for name in ("OMP_NUM_THREADS", "LOKY_MAX_CPU_COUNT"):
            os.environ.pop(name, None)
        os.cpu_count = lambda: 64
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        with AuthenticatedProcessPool(session, 1) as pool:
            print(pool.submit(os.getenv, "OMP_NUM_THREADS").result())
    """)
    assert running.rest() == ["1"]


@slow
def test_no_worker_can_be_interrupted_at_any_moment_of_its_life(script: Callable[..., Script]) -> None:
    """SIGINT is blocked or ignored from the first instruction on: what ^C means is the parent's to decide."""
    running = script("""
        with AuthenticatedProcessPool(session, 3) as pool:
            time.sleep(600)
    """)
    guarded: dict[int, set[bool]] = {}
    ignored: set[int] = set()

    def look() -> bool:
        for pid in workers_of(running.pid):
            try:
                text = Path(f"/proc/{pid}/status").read_text()
            except (FileNotFoundError, ProcessLookupError):  # no worker: those live on
                continue
            status = dict(line.split(":", 1) for line in text.splitlines())
            blocks, ignores = (bool(int(status[mask], 16) >> (signal.SIGINT - 1) & 1) for mask in ("SigBlk", "SigIgn"))
            guarded.setdefault(pid, set()).add(blocks or ignores)
            if ignores:
                ignored.add(pid)
        return len(ignored) == 3

    until(look)
    assert [guarded[pid] for pid in ignored] == [{True}] * 3


@slow
def test_a_pool_whose_shutdown_was_interrupted_can_still_be_ended_in_order(script: Callable[..., Script]) -> None:
    """Before Python 3.13 a thread whose join() was interrupted counts as stopped, although it runs."""
    running = script("""
        pool = AuthenticatedProcessPool(session, 2)
        futures = [pool.submit(time.sleep, 600) for _ in range(4)]
        try:
            print("begun", flush=True)
            pool.shutdown()
        except KeyboardInterrupt:
            pool.terminate()
        print(pool.stats().state, all(future.done() for future in futures), flush=True)
    """)
    running.wait_for_line("begun")
    running.workers(2)
    os.killpg(running.pid, signal.SIGINT)
    assert running.rest() == ["closed True"]


@slow
def test_an_interrupt_while_workers_start_ends_a_script_at_once(
    script: Callable[..., Script], server: LoopbackServer
) -> None:
    """A login that hangs, and workers in the middle of their imports."""
    server.hang()
    running = script("""
        secret = os.environ["SH_CLIENT_SECRET"]
        session = OAuthSession(sys.argv[1], "demo-client", secret, timeout=(600.0, 600.0))
        print("begun", flush=True)
        with AuthenticatedProcessPool(session, 4) as pool:
            pass
    """)
    running.wait_for_line("begun")
    until(lambda: workers_of(running.pid))
    os.killpg(running.pid, signal.SIGINT)
    assert running.end() in {-signal.SIGINT, 130}
    assert "multiprocessing" not in running.errors()
    server.hang(False)


@slow
@pytest.mark.parametrize(
    "waiting",
    [
        "pool.submit(time.sleep, 600).result()",
        "pool.submit(time.sleep, 600).exception()",
        "next(pool.map(time.sleep, [600]))",
        "next(pool.map_unordered(time.sleep, [600]))",
        "pool.submit(time.sleep, 600); pool.shutdown()",
    ],
)
def test_an_interrupt_that_wakes_nobody_is_handled_soon(script: Callable[..., Script], waiting: str) -> None:
    """As one that comes after Python's last look for signals, and before the system call that sleeps."""
    running = script(f"""
        def interrupt():  # the signal comes to this thread, so it does not wake the main one
            until_it_sleeps()
            os.kill(os.getpid(), signal.SIGINT)

        def until_it_sleeps():
            while True:
                frame = sys._current_frames()[threading.main_thread().ident]
                names = set()
                while frame is not None:
                    names.add(frame.f_code.co_name)
                    frame = frame.f_back
                if "wait_in_glances" in names:
                    return
                time.sleep(0.01)

        pool = AuthenticatedProcessPool(session, 1)
        with pool:
            pool.submit(int).result()
            threading.Thread(target=interrupt).start()
            signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGINT}})
            {waiting}
    """)
    assert running.end() in {-signal.SIGINT, 130}
    assert running.errors().endswith("KeyboardInterrupt\n")


@slow
def test_a_lock_of_all_imports_that_an_interrupt_has_left_taken_stops_no_pool(script: Callable[..., Script]) -> None:
    """As ^C leaves it when it strikes the main thread's imports at the wrong moment: nobody else can import then."""
    running = script("""
        import _imp
        _imp.acquire_lock()
        with AuthenticatedProcessPool(session, 2) as pool:
            print(sum(pool.map(abs, range(5))))
    """)
    assert running.rest() == ["10"]


SIGNALLED = """
    class Signalling:
        def find_spec(self, name, path=None, target=None):
            if name == sys.argv[2]:
                sys.meta_path.remove(self)
                os.kill(os.getpid(), signal.SIGTERM)

    sys.meta_path.insert(0, Signalling())
"""  # a signal in the middle of that import
IMPORTED = ["shpool.engines.crew", "requests"]  # to launch the workers, and to log in


@slow
@pytest.mark.parametrize("name", IMPORTED)
def test_a_handler_may_wait_while_the_pool_starts_for_a_thread_that_imports(
    script: Callable[..., Script], name: str
) -> None:
    """As one does that has the rest of a script end in order."""
    text = """
    stop = threading.Event()

    def tidy():
        stop.wait()
        import wave

    def handle(number, frame):
        stop.set()
        thread.join()
        raise SystemExit(143)

    thread = threading.Thread(target=tidy, daemon=True)
    thread.start()
    signal.signal(signal.SIGTERM, handle)
    with AuthenticatedProcessPool(session, 2) as pool:
        pool.submit(time.sleep, 600).result()
    """
    running = script(SIGNALLED + text, name)
    assert running.end() == 143, running.errors()


@slow
@pytest.mark.parametrize("name", IMPORTED)
def test_a_handler_may_submit_while_the_pool_starts(script: Callable[..., Script], name: str) -> None:
    """What it submits runs as any other task does, in the one crew there is."""
    text = """
    pool = AuthenticatedProcessPool(session, 2)
    futures = []
    signal.signal(signal.SIGTERM, lambda number, frame: futures.append(pool.submit(os.getppid)))
    with pool:
        print(futures[0].result() == pool.submit(os.getppid).result() == os.getpid(), pool.stats().logins)
    """
    running = script(SIGNALLED + text, name)
    assert running.rest() == ["True 1"]


@slow
@pytest.mark.parametrize("name", IMPORTED)
@pytest.mark.parametrize("end", ["terminate", "shutdown"])
def test_a_handler_may_end_the_pool_while_it_starts(script: Callable[..., Script], end: str, name: str) -> None:
    """It returns, so the start goes on, and finds that it is not wanted."""
    text = """
    pool = AuthenticatedProcessPool(session, 2)
    signal.signal(signal.SIGTERM, lambda number, frame: getattr(pool, sys.argv[3])())
    try:
        with pool:
            print("entered")
    except RuntimeError as exc:
        print(exc)
    print(pool.stats().state)
    """
    running = script(SIGNALLED + text, name, end)
    assert running.rest() == ["cannot schedule new futures after shutdown", "closed"]


@slow
@pytest.mark.parametrize("name", ["shpool-crew", "shpool-sharing"])
def test_an_interrupt_while_a_thread_of_the_pool_starts_ends_that_too(script: Callable[..., Script], name: str) -> None:
    """Else it runs on, with nobody to end it, into an interpreter that ends and lets nothing be imported."""
    running = script(
        """
        import shpool.engines.birth  # so that the crew need not

        def watch(frame, event, called):
            if event == "c_return" and called.__name__.startswith("start_"):
                if frame.f_locals["self"].name == sys.argv[2]:
                    sys.setprofile(None)
                    os.kill(os.getpid(), signal.SIGINT)

        pool = AuthenticatedProcessPool(session, 2)
        sys.setprofile(watch)
        try:
            pool.__enter__()
        except KeyboardInterrupt:
            left = [thread.name for thread in threading.enumerate() if thread.name.startswith("shpool")]
            print(pool.stats().state, left)
    """,
        name,
    )
    assert running.rest() == ["closed []"]


class CallingSession:
    """Calls something once, as a handler may: when its hosts are asked for, at which nothing runs yet, or its token."""

    def __init__(self) -> None:
        self.calls: dict[str, Callable[[], object]] = {}

    @property
    def token(self) -> dict[str, Any]:
        self.calls.pop("token", int)()
        return {"access_token": "invented", "expires_at": time.time() + 3600}

    @property
    def allowed_hosts(self) -> tuple[str, ...]:
        self.calls.pop("hosts", int)()
        return ()


@slow
@pytest.mark.parametrize("engine", ["loky", "inline"])
@pytest.mark.parametrize("end", ["terminate", "shutdown"])
@pytest.mark.parametrize("when", ["hosts", "token"])
def test_a_pool_that_is_ended_at_any_step_of_its_start_leaves_nothing(
    engine: str, end: str, when: str, memory_name: str
) -> None:
    """No worker, no name, no gate; and it starts no more."""
    session = CallingSession()
    pool = AuthenticatedProcessPool(session, 2, engine=engine, memory_name=memory_name)
    session.calls[when] = getattr(pool, end)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
            pool.submit(abs, -1)
    assert pool.stats().state == "closed"
    assert not [path.name for path in SHARED_MEMORY.iterdir() if memory_name in path.name]


@slow
def test_what_logs_in_may_submit_to_the_pool_that_it_starts() -> None:
    """The task waits for the token; there is one crew."""
    futures: list[Future[int]] = []
    session = CallingSession()
    pool = AuthenticatedProcessPool(session, 1)
    session.calls["token"] = lambda: futures.append(pool.submit(os.getppid))
    with pool:
        assert futures[0].result() == pool.submit(os.getppid).result() == os.getpid()
        assert len(workers_of(os.getpid())) == 1
        assert pool.stats().tasks_done == 2


@slow
def test_a_start_imports_nothing_where_a_signal_may_break_it(script: Callable[..., Script]) -> None:
    """The main thread alone runs handlers; all that it imports there goes through what holds them off."""
    running = script("""
        import traceback

        class Watching:
            def find_spec(self, name, path=None, target=None):
                callers = [frame.name for frame in traceback.extract_stack()]
                if threading.current_thread() is threading.main_thread() and "import_each" not in callers:
                    print(name, callers[-8:])

        login = lambda: {"access_token": "invented", "expires_at": time.time() + 3600}
        sys.meta_path.insert(0, Watching())
        for each in (login, session):
            with AuthenticatedProcessPool(each, 1) as pool:
                pool.submit(abs, -1).result()
                list(pool.map(abs, range(3)))
            print("done")
    """)
    assert running.rest() == ["done", "done"]


@slow
def test_an_interrupt_that_leaves_the_lock_of_a_module_taken_ends_a_script(
    script: Callable[..., Script], memory_name: str
) -> None:
    """The crew's thread waits for it for ever; there is no worker yet, so nobody need wait for that thread."""
    running = script(
        """
        def login():
            raise KeyboardInterrupt

        sys.modules["_frozen_importlib"]._get_module_lock("loky").acquire()
        with AuthenticatedProcessPool(login, 4, memory_name=sys.argv[2]) as pool:
            pass
    """,
        memory_name,
    )
    assert running.end() in {-signal.SIGINT, 130}
    assert running.errors().rstrip().endswith("KeyboardInterrupt")
    assert not [path.name for path in SHARED_MEMORY.iterdir() if memory_name in path.name]


@slow
def test_a_child_forked_before_the_pool_can_launch_workers_is_told_that_the_pool_is_not_its_own(
    script: Callable[..., Script],
) -> None:
    """It never gets what the thread that imports for the launches would tell it: that one is not in the child."""
    running = script("""
        import warnings

        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork with threads, which is what is meant
        lock = sys.modules["_frozen_importlib"]._get_module_lock("loky")
        lock.acquire()
        with AuthenticatedProcessPool(session, 2) as pool:
            if (child := os.fork()) == 0:
                try:
                    pool.submit(abs, -1)
                except RuntimeError as exc:
                    print(str(exc).split(";")[0], flush=True)
                os._exit(0)
            os.waitpid(child, 0)
            lock.release()
            print(pool.submit(abs, -1).result())
    """)
    assert running.rest() == ["the pool belongs to the process that started it", "1"]


KILLED = """
    kind = sys.argv[2]
    pool = AuthenticatedProcessPool(session, 3, memory_name=sys.argv[3] or None)
    pool.submit(int).result()
    if kind == "busy":
        futures = [pool.submit(time.sleep, 600) for _ in range(6)]
    if kind == "sending":
        blob = bytes(50_000_000)
        futures = [pool.submit(lambda blob: blob, blob) for _ in range(6)]
    if kind == "answering":
        futures = [pool.submit(lambda: bytes(50_000_000)) for _ in range(6)]
        futures[0].result()
    print("begun", flush=True)
    time.sleep(600)
"""


@slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
@pytest.mark.parametrize("kind", ["idle", "busy", "sending", "answering"])
def test_workers_end_with_their_parent(script: Callable[..., Script], kind: str, number: signal.Signals) -> None:
    running = script(KILLED, kind, "")
    running.wait_for_line("begun")
    workers = running.workers(3)
    os.kill(running.pid, number)
    assert running.end() == -number
    until(lambda: all(is_gone(worker) for worker in workers))
    # The last of it is taken away by the resource tracker, which ends after the workers.
    until(lambda: not any(str(running.pid) in re.split(r"\D+", entry.name) for entry in SHARED_MEMORY.iterdir()))


@slow
def test_a_killed_parents_name_can_be_taken_again(
    script: Callable[..., Script], server: LoopbackServer, memory_name: str
) -> None:
    running = script(KILLED, "busy", memory_name)
    running.wait_for_line("begun")
    workers = running.workers(3)
    running.process.kill()
    running.end()
    until(lambda: all(is_gone(worker) for worker in workers))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SHUserWarning)  # none where the sweep of a neighbouring test was faster
        pool = AuthenticatedProcessPool(session_at(server), 1, memory_name=memory_name).__enter__()
    with pool:
        assert pool.submit(double, 1).result(PATIENCE) == 2
    assert not [entry for entry in SHARED_MEMORY.iterdir() if memory_name in entry.name]


FORKS = {
    "os._exit": "os._exit(0)",
    "sys.exit": "sys.exit(0)",
    "the end of the script": "pass",
    "use of the pool": """
        try:
            pool.submit(int)
        except RuntimeError as error:
            assert "belongs to the process that started it" in str(error), error
            repr(pool), pool.stats()
            pool.shutdown()
            pool.terminate()
            sys.exit(0)
        sys.exit(1)
    """,
    "forgetting the pool": """
        import gc
        del pool
        gc.collect()
        sys.exit(0)
    """,
    "the session's token": """
        sys.exit(0 if session.token["access_token"] == token else 1)
    """,
    "a pool of its own": """
        with AuthenticatedProcessPool(lambda: {"access_token": "invented", "expires_at": time.time() + 60}, 1) as own:
            assert own.submit(int, 5).result() == 5
        sys.exit(0)
    """,
}


@slow
@pytest.mark.parametrize("what", FORKS.values(), ids=FORKS)
def test_a_forked_child_of_the_parent_is_harmless(
    script: Callable[..., Script], server: LoopbackServer, what: str
) -> None:
    child = textwrap.indent(textwrap.dedent(what).strip(), "    ")
    text = f"""
import warnings
warnings.simplefilter("ignore", DeprecationWarning)
pool = AuthenticatedProcessPool(session, 2)
print(list(pool.map(int, range(3))), flush=True)
token = pool.submit(lambda: current_session().token["access_token"]).result()
child = os.fork()
if child == 0:
{child}
else:
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    print(list(pool.map(int, range(30), chunksize=1)) == list(range(30)), flush=True)
    print(pool.stats().workers_lost, flush=True)
    pool.shutdown()
"""
    assert script(text).rest() == ["[0, 1, 2]", "0", "True", "0"]
    assert server.logins == 1


@slow
def test_workers_end_with_their_parent_although_a_forked_child_lives(script: Callable[..., Script]) -> None:
    """The child has copies of the parent's ends of the lifelines."""
    running = script("""
        import warnings
        warnings.simplefilter("ignore", DeprecationWarning)
        pool = AuthenticatedProcessPool(session, 2)
        pool.submit(int).result()
        futures = [pool.submit(time.sleep, 600) for _ in range(2)]
        child = os.fork()
        if child == 0:
            sys.stdout.close()
            os.close(1), os.close(2)
            time.sleep(600)
            os._exit(0)
        print("begun", flush=True)
        print(child, flush=True)
        time.sleep(600)
    """)
    running.wait_for_line("begun")
    child = int(running.output.readline())
    try:
        workers = running.workers(2)
        running.process.kill()
        running.end()
        assert not is_gone(child)
        until(lambda: all(is_gone(worker) for worker in workers))
    finally:
        os.kill(child, signal.SIGKILL)


@slow
def test_multiprocessing_children_of_the_parent_are_harmless(script: Callable[..., Script]) -> None:
    lines = script("""
        import multiprocessing, warnings
        warnings.simplefilter("ignore", DeprecationWarning)

        def square(number):
            return number * number

        if __name__ == "__main__":
            with AuthenticatedProcessPool(session, 2) as pool:
                pool.submit(int).result()
                with multiprocessing.get_context("fork").Pool(2) as other:
                    print(other.map(square, range(4)), flush=True)
                print(multiprocessing.active_children() is not None, flush=True)
                print(list(pool.map(square, range(4))), flush=True)
    """).rest()
    assert lines == ["[0, 1, 4, 9]", "True", "[0, 1, 4, 9]"]


@slow
def test_a_task_may_use_multiprocessing_itself(script: Callable[..., Script]) -> None:
    lines = script("""
        def inner(number):
            import multiprocessing
            with multiprocessing.get_context("fork").Pool(2) as pool:
                return sum(pool.map(abs, range(-number, 0)))

        with AuthenticatedProcessPool(session, 2) as pool:
            print(list(pool.map(inner, [3, 4], chunksize=1)), flush=True)
    """).rest()
    assert lines == ["[6, 10]"]


@slow
def test_the_standard_output_of_workers_is_the_parents(script: Callable[..., Script]) -> None:
    lines = script("""
        with AuthenticatedProcessPool(session, 1) as pool:
            pool.submit(print, "from a worker").result()
    """).rest()
    assert lines == ["from a worker"]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"env": "abc"}, TypeError),
        ({"env": {"A": "x\0y"}}, ValueError),
        ({"env": {"A=B": "x"}}, ValueError),
        ({"env": {"A": 1}}, ValueError),
        ({"initargs": 5}, TypeError),
        ({"timeout": "1"}, ValueError),
        ({"timeout": True}, ValueError),
        ({"max_tasks_per_worker": 0}, ValueError),
        ({"max_worker_memory": 1.5}, ValueError),
        ({"retry_if": 3}, TypeError),
        ({"log_level": -5}, ValueError),
        ({"log_level": True}, ValueError),
    ],
    ids=str,
)
def test_a_wrong_argument_is_named(server: LoopbackServer, options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(options))):
        AuthenticatedProcessPool(session_at(server), 1, **options)


@slow
def test_a_view_ends_its_pool_as_the_pool_would(server: LoopbackServer, tmp_path: Path) -> None:
    futures: list[Future[int]] = []

    def work() -> None:
        with AuthenticatedProcessPool(session_at(server), 1).options(retries=1) as view:
            futures.append(view.submit(begin_and_wait, str(tmp_path / "begun"), "never"))
            until((tmp_path / "begun").exists)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert isinstance(futures[0].exception(0), TaskTerminatedError)


@slow
def test_a_view_can_terminate_a_task(server: LoopbackServer, tmp_path: Path) -> None:
    with AuthenticatedProcessPool(session_at(server), 1).options(timeout=600) as view:
        future = view.submit(begin_and_wait, str(tmp_path / "begun"), "never")
        until((tmp_path / "begun").exists)
        assert view.terminate(future)
        assert isinstance(future.exception(PATIENCE), TaskTerminatedError)
