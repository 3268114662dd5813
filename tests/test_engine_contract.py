"""What every engine keeps, in one body; an engine joins by its name in ``ENGINES``."""

from __future__ import annotations

import asyncio
import collections
import functools
import itertools
import os
import signal
import threading
import time
import traceback
from concurrent.futures import FIRST_COMPLETED, Executor, as_completed, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cluster_fixtures import needs_dask
from patience import LEEWAY, PATIENCE, until
from pool_tasks import (
    Counter,
    access_token,
    add,
    begin_and_wait,
    die_once,
    double,
    echo,
    fail,
    fail_at,
    fetch,
    initialise,
    leave,
    note_run,
    pid,
    raise_here_only,
    raise_keyword_only,
    refuse_to_start,
    return_unpicklable_at,
    stop_iteration_at,
)
from ray_fixture import needs_ray

from shpool import AuthenticatedProcessPool, OAuthSession, current_session
from shpool.errors import (
    InitializerError,
    LoginRefusedError,
    NoSessionError,
    TaskTerminatedError,
    TaskTimeoutError,
    UnpicklableError,
    WorkerLostError,
)
from shpool.testing import LoopbackServer, tile_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

    from shpool.engines.base import EngineDescription

ENGINES = ["inline", "loky", pytest.param("dask", marks=needs_dask), pytest.param("ray", marks=needs_ray)]

pytestmark = pytest.mark.slow  # engines with processes take a quarter of a second to start


def session_at(server: LoopbackServer) -> OAuthSession:
    return OAuthSession(server.token_url, server.client_id, server.client_secret)


@pytest.fixture(scope="module", params=ENGINES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def engine(kind: str, request: pytest.FixtureRequest) -> str | EngineDescription:
    """Return what a pool is told; a cluster is one that all tests of its kind share."""
    if kind in {"inline", "loky"}:
        return kind
    described: EngineDescription = request.getfixturevalue(f"{kind}_engine")
    return described


@pytest.fixture(scope="module")
def provider() -> Iterator[LoopbackServer]:
    with LoopbackServer() as running:
        yield running


@pytest.fixture(scope="module")
def pool(engine: str | EngineDescription, provider: LoopbackServer) -> Iterator[AuthenticatedProcessPool]:
    """Two workers that the tests share; whoever harms a pool makes one of his own."""
    with AuthenticatedProcessPool(session_at(provider), 2, engine=engine) as shared:
        until(lambda: len(getattr(shared._engine, "pids", "xx")) == 2)
        yield shared


@pytest.fixture
def frail(kind: str, engine: str | EngineDescription, provider: LoopbackServer) -> Iterator[AuthenticatedProcessPool]:
    """Two workers that the test may harm; inline there are none."""
    if kind == "inline":
        pytest.skip("inline tasks run in the caller's own thread, which cannot be ended")
    with AuthenticatedProcessPool(session_at(provider), 2, engine=engine) as own:
        yield own
        until(lambda: own.stats().workers == 2)  # others share the cluster


def is_gone(mark: Path) -> bool:
    """Tell whether the process that left its id there has ended."""
    stat = Path(f"/proc/{mark.read_text()}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


class Source:
    """An iterable that counts what was pulled from it."""

    def __init__(self, items: Iterator[int]) -> None:
        self._items = items
        self.pulled = 0

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        item = next(self._items)
        self.pulled += 1
        return item


# Executor


def test_it_is_an_executor(pool: AuthenticatedProcessPool) -> None:
    assert isinstance(pool, Executor)


def test_submit_returns_a_future_of_the_result(pool: AuthenticatedProcessPool) -> None:
    assert pool.submit(add, 2, second=3).result(PATIENCE) == 5


def test_lambdas_closures_partials_and_methods_run(pool: AuthenticatedProcessPool) -> None:
    base = 10
    calls: list[Callable[[int], int]] = [lambda number: base + number, functools.partial(add, base), Counter(base).plus]
    assert [pool.submit(call, 5).result(PATIENCE) for call in calls] == [15, 15, 15]


def test_a_class_runs_as_a_function(pool: AuthenticatedProcessPool) -> None:
    assert pool.submit(Counter, 3).result(PATIENCE).plus(4) == 7


def test_a_tasks_error_arrives_with_the_traceback_of_where_it_ran(pool: AuthenticatedProcessPool) -> None:
    with pytest.raises(ValueError, match="bad number 7") as caught:
        pool.submit(fail, 7).result(PATIENCE)
    text = "".join(traceback.format_exception(caught.value))
    assert "in fail" in text
    assert "pool_tasks.py" in text


@pytest.mark.parametrize("fn", [raise_keyword_only, raise_here_only, functools.partial(leave, 3)])
def test_no_error_of_a_task_harms_the_next_one(pool: AuthenticatedProcessPool, fn: Any) -> None:
    assert pool.submit(fn).exception(PATIENCE) is not None
    assert pool.submit(add, 1, 2).result(PATIENCE) == 3


def test_wait_and_as_completed_understand_the_futures(pool: AuthenticatedProcessPool) -> None:
    futures = [pool.submit(double, number) for number in range(20)]
    assert wait(futures, PATIENCE, return_when=FIRST_COMPLETED).done
    assert sorted(future.result() for future in as_completed(futures, PATIENCE)) == list(range(0, 40, 2))


def test_asyncio_understands_the_futures(pool: AuthenticatedProcessPool) -> None:
    async def work() -> list[int]:
        loop = asyncio.get_running_loop()
        ways = [asyncio.wrap_future(pool.submit(double, 1)), loop.run_in_executor(pool, double, 2)]
        return list(await asyncio.wait_for(asyncio.gather(*ways), PATIENCE))

    assert asyncio.run(work()) == [2, 4]


def test_an_error_reaches_asyncio_too(pool: AuthenticatedProcessPool) -> None:
    async def work() -> None:
        await asyncio.get_running_loop().run_in_executor(pool, fail, 3)

    with pytest.raises(ValueError, match="bad number 3"):
        asyncio.run(work())


def test_many_threads_may_submit_at_once(pool: AuthenticatedProcessPool) -> None:
    results: list[int] = []

    def ask(start: int) -> None:
        futures = [pool.submit(double, number) for number in range(start, start + 25)]
        results.extend(future.result(PATIENCE) for future in futures)

    threads = [threading.Thread(target=ask, args=(start,)) for start in range(0, 200, 25)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == list(range(0, 400, 2))


def test_a_done_callback_may_submit(pool: AuthenticatedProcessPool) -> None:
    done, results = threading.Event(), []

    def go_on(future: Future[int]) -> None:
        results.append(future.result())
        if len(results) == 10:
            done.set()
        else:
            pool.submit(double, future.result()).add_done_callback(go_on)

    pool.submit(double, 1).add_done_callback(go_on)
    assert done.wait(PATIENCE)
    assert results[-1] == 1_024


# map


@pytest.mark.parametrize("chunksize", [None, 1, 7])
def test_map_keeps_the_order(pool: AuthenticatedProcessPool, chunksize: int | None) -> None:
    assert list(pool.map(double, range(50), chunksize=chunksize)) == list(range(0, 100, 2))


@pytest.mark.parametrize("chunksize", [None, 1, 7])
def test_map_unordered_gives_the_same_results(pool: AuthenticatedProcessPool, chunksize: int | None) -> None:
    assert sorted(pool.map_unordered(double, range(50), chunksize=chunksize)) == list(range(0, 100, 2))


@pytest.mark.parametrize("chunksize", [None, 1, 7])
def test_map_ends_with_the_shortest_of_several_iterables(pool: AuthenticatedProcessPool, chunksize: int | None) -> None:
    assert list(pool.map(add, itertools.count(), [10, 20, 30], chunksize=chunksize)) == [10, 21, 32]


def test_map_of_nothing_is_nothing(pool: AuthenticatedProcessPool) -> None:
    assert list(pool.map(double, [])) == []
    assert list(pool.map_unordered(double, [])) == []


def test_map_without_iterables_is_refused(pool: AuthenticatedProcessPool) -> None:
    with pytest.raises(TypeError, match="at least one iterable"):
        pool.map(double)


@pytest.mark.parametrize("sizes", [{"chunksize": 0}, {"chunksize": -1}, {"buffersize": 0}, {"chunksize": 1.5}])
def test_map_checks_its_sizes(pool: AuthenticatedProcessPool, sizes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be an integer >= 1"):
        pool.map(double, [1], **sizes)


def test_an_infinite_generator_is_welcome(pool: AuthenticatedProcessPool) -> None:
    assert list(itertools.islice(pool.map(double, itertools.count()), 200)) == list(range(0, 400, 2))


@pytest.mark.parametrize("buffersize", [1, 3])
def test_an_idle_consumer_stops_the_input(pool: AuthenticatedProcessPool, buffersize: int) -> None:
    source = Source(itertools.count())
    results = pool.map(double, source, buffersize=buffersize)
    for number in range(10):
        assert next(results) == 2 * number
        wait([pool.submit(double, 1)], PATIENCE)  # time in which an eager map would pull on
        assert source.pulled - number <= buffersize


def test_results_before_an_error_of_the_input_arrive(pool: AuthenticatedProcessPool) -> None:
    def broken() -> Iterator[int]:
        yield from range(5)
        message = "the input broke"
        raise OSError(message)

    results = pool.map(double, broken())
    assert list(itertools.islice(results, 5)) == [0, 2, 4, 6, 8]
    with pytest.raises(OSError, match="the input broke"):
        next(results)


@pytest.mark.parametrize("chunksize", [None, 1, 4])
def test_results_before_an_error_of_a_task_arrive(pool: AuthenticatedProcessPool, chunksize: int | None) -> None:
    results = pool.map(functools.partial(fail_at, bad=5), range(10), chunksize=chunksize)
    assert list(itertools.islice(results, 5)) == list(range(5))
    with pytest.raises(ValueError, match="bad number 5"):
        next(results)
    assert pool.submit(add, 1, 2).result(PATIENCE) == 3


@pytest.mark.parametrize("chunksize", [None, 1, 4])
def test_a_stop_iteration_of_the_function_is_an_error_and_no_end(
    pool: AuthenticatedProcessPool, chunksize: int | None
) -> None:
    results = pool.map(functools.partial(stop_iteration_at, bad=2), range(5), chunksize=chunksize)
    assert list(itertools.islice(results, 2)) == [0, 1]
    with pytest.raises(RuntimeError, match="StopIteration"):
        next(results)


def test_closing_a_map_leaves_a_pool_that_works(pool: AuthenticatedProcessPool) -> None:
    for _ in range(5):
        results = pool.map(double, itertools.count())
        assert next(results) == 0
        results.close()  # type: ignore[attr-defined]  # a generator, as the standard library's executors return
    assert pool.submit(add, 1, 2).result(PATIENCE) == 3


def test_a_map_that_is_dropped_unused_leaves_a_pool_that_works(pool: AuthenticatedProcessPool) -> None:
    for _ in range(5):
        pool.map(double, itertools.count())
    assert pool.submit(add, 1, 2).result(PATIENCE) == 3


def test_a_large_result_is_whole(pool: AuthenticatedProcessPool) -> None:
    blob = bytes(range(256)) * 10_000
    assert list(pool.map(echo, [blob] * 4)) == [blob] * 4


class Notebook:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.told: list[int] = []

    def add(self, number: int) -> int:
        self.told.append(number)
        return len(self.told)


def test_no_call_meets_what_another_has_left_in_its_function(frail: AuthenticatedProcessPool) -> None:
    notebook = Notebook()
    assert [frail.submit(notebook.add, number).result(PATIENCE) for number in range(4)] == [1, 1, 1, 1]


# Ends that were not meant


@pytest.mark.parametrize("seconds", [0.0, 0.005])
def test_a_task_that_kills_its_worker_fails_alone_and_once(
    frail: AuthenticatedProcessPool, tmp_path: Path, seconds: float
) -> None:
    """Without retries; whatever was with it at the worker, behind it or before it, has one run and its own result."""

    def work(number: int, folder: str = str(tmp_path), bad: int = 40) -> int:
        note_run(folder, number)
        if number == bad:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(seconds)
        return number

    wait([frail.submit(work, -1), frail.submit(work, -2)], PATIENCE)  # its pace is known, and some may go ahead
    futures = [frail.submit(work, number) for number in range(80)]
    failed = {number: type(future.exception(PATIENCE)) for number, future in enumerate(futures) if future.exception()}
    assert failed == {40: WorkerLostError}
    assert [future.result() for future in futures if future is not futures[40]] == [*range(40), *range(41, 80)]
    runs = collections.Counter(int(entry.name.rpartition("-")[0]) for entry in tmp_path.iterdir())
    assert runs == dict.fromkeys(range(-2, 80), 1)


def test_a_lost_workers_task_runs_again_as_far_as_retries_allow(
    frail: AuthenticatedProcessPool, tmp_path: Path
) -> None:
    view = frail.options(retries=1)
    futures = [view.submit(die_once, str(tmp_path), number, 20) for number in range(40)]
    assert [future.result(PATIENCE) for future in futures] == list(range(40))
    assert (frail.stats().tasks_retried, frail.stats().workers_lost) == (1, 1)


def test_a_timeout_ends_a_running_task(frail: AuthenticatedProcessPool, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    future = frail.options(timeout=LEEWAY).submit(begin_and_wait, str(begun), str(tmp_path / "never"))
    with pytest.raises(TaskTimeoutError, match=rf"begin_and_wait ran longer than {LEEWAY:g} s"):
        future.result(PATIENCE)
    until(lambda: is_gone(begun))
    assert frail.submit(double, 2).result(PATIENCE) == 4


def test_terminate_ends_a_running_task(frail: AuthenticatedProcessPool, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    future = frail.submit(begin_and_wait, str(begun), str(tmp_path / "never"))
    until(begun.exists)
    assert frail.terminate(future)
    with pytest.raises(TaskTerminatedError):
        future.result(PATIENCE)
    until(lambda: is_gone(begun))
    assert not frail.terminate(future)
    assert frail.submit(double, 2).result(PATIENCE) == 4


def test_what_is_queued_can_be_cancelled(frail: AuthenticatedProcessPool, tmp_path: Path) -> None:
    cue = tmp_path / "cue"
    running = [frail.submit(begin_and_wait, str(tmp_path / f"begun-{number}"), str(cue)) for number in range(2)]
    queued = [frail.submit(note_run, str(tmp_path), number) for number in range(3)]
    until(lambda: len(list(tmp_path.glob("begun-?"))) == 2)
    assert queued[1].cancel()
    cue.touch()
    assert len({future.result(PATIENCE) for future in running}) == 2
    assert [queued[0].result(PATIENCE), queued[2].result(PATIENCE)] == [0, 2]
    assert queued[1].cancelled()
    assert not list(tmp_path.glob("1-*"))


# Policies


def test_retries_repeat_what_failed_for_a_passing_reason(pool: AuthenticatedProcessPool, tmp_path: Path) -> None:
    def flaky(folder: str, number: int) -> int:
        note_run(folder, number)
        if len([entry for entry in Path(folder).iterdir() if entry.name.startswith(f"{number}-")]) == 1:
            raise ConnectionError
        return number

    before = pool.stats().tasks_retried
    assert pool.options(retries=1).submit(flaky, str(tmp_path), 3).result(PATIENCE) == 3
    assert pool.stats().tasks_retried == before + 1
    assert list(pool.options(retries=1).map(functools.partial(flaky, str(tmp_path)), range(4, 8))) == [4, 5, 6, 7]
    with pytest.raises(ConnectionError):
        pool.submit(flaky, str(tmp_path), 9).result(PATIENCE)


def test_programming_errors_are_not_repeated(pool: AuthenticatedProcessPool, tmp_path: Path) -> None:
    def wrong(folder: str) -> None:
        note_run(folder, 1)
        raise KeyError

    with pytest.raises(KeyError):
        pool.options(retries=5).submit(wrong, str(tmp_path)).result(PATIENCE)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "policy", [{"retries": -1}, {"retries": True}, {"retries": 1.0}, {"timeout": 0}, {"timeout": -1.0}]
)
def test_policies_are_checked(pool: AuthenticatedProcessPool, policy: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        pool.options(**policy)


def test_options_leave_the_pool_as_it_is(pool: AuthenticatedProcessPool) -> None:
    view = pool.options(retries=3, timeout=9.0)
    assert "retries=3 timeout=9.0" in repr(view)
    assert view.submit(double, 2).result(PATIENCE) == 4
    assert (pool._policy.retries, pool._timeout) == (0, None)


# Sessions


def test_every_task_has_the_one_shared_token(pool: AuthenticatedProcessPool, provider: LoopbackServer) -> None:
    before = provider.logins
    tokens = set(pool.map(access_token, range(20), chunksize=1))
    assert len(tokens) == 1
    assert provider.logins == before


def test_a_task_reaches_the_data_behind_the_login(pool: AuthenticatedProcessPool, provider: LoopbackServer) -> None:
    assert pool.submit(fetch, provider.data_url(3, 500)).result(PATIENCE) == tile_bytes(3, 500)


def test_outside_a_task_there_is_no_session(pool: AuthenticatedProcessPool) -> None:
    with pytest.raises(NoSessionError):
        current_session()
    assert pool.submit(access_token).result(PATIENCE)
    with pytest.raises(NoSessionError):
        current_session()


def test_two_pools_do_not_mix_their_tokens(engine: str | EngineDescription, provider: LoopbackServer) -> None:
    with (
        LoopbackServer() as other,
        AuthenticatedProcessPool(session_at(provider), 1, engine=engine) as first,
        AuthenticatedProcessPool(session_at(other), 1, engine=engine) as second,
    ):
        for _ in range(3):
            for pool, own in ((first, provider), (second, other)):
                assert pool.submit(fetch, own.data_url(1, 10)).result(PATIENCE) == tile_bytes(1, 10)
        assert provider.unauthorized == other.unauthorized == 0
        assert first.submit(access_token).result(PATIENCE) != second.submit(access_token).result(PATIENCE)


def test_the_initializer_runs_once_and_has_the_session(
    kind: str, engine: str | EngineDescription, provider: LoopbackServer
) -> None:
    def said(_: int) -> list[str]:
        import pool_tasks

        return pool_tasks._inited

    setting = {"initializer": initialise, "initargs": (f"word-{kind}",)}
    with AuthenticatedProcessPool(session_at(provider), 1, engine=engine, **setting) as pool:  # type: ignore[arg-type]  # shorthand
        for words in pool.map(said, range(5), chunksize=1):
            assert words == [f"word-{kind} 1"]


def test_an_initializer_that_raises_is_told(engine: str | EngineDescription, provider: LoopbackServer) -> None:
    setting = {"initializer": refuse_to_start, "initargs": ("no licence",)}
    with (
        pytest.raises(InitializerError, match="OSError: cannot start: no licence"),
        AuthenticatedProcessPool(session_at(provider), 2, engine=engine, **setting) as pool,  # type: ignore[arg-type]  # shorthand
    ):
        pool.submit(double, 1).result(PATIENCE)


def test_a_refused_login_is_raised_where_the_pool_is_entered(
    engine: str | EngineDescription, provider: LoopbackServer
) -> None:
    session = OAuthSession(provider.token_url, provider.client_id, "wrong-secret")
    pool = AuthenticatedProcessPool(session, 2, engine=engine)
    with pytest.raises(LoginRefusedError, match="invalid_client"), pool:
        pytest.fail("entered")
    assert pool.stats().state == "closed"
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.submit(double, 1)


# Life


def test_a_pool_starts_at_its_first_submit_and_ends_with_shutdown(
    engine: str | EngineDescription, provider: LoopbackServer
) -> None:
    pool = AuthenticatedProcessPool(session_at(provider), 1, engine=engine)
    before = provider.logins
    assert pool.stats().state == "new"
    assert pool.submit(double, 2).result(PATIENCE) == 4
    assert (pool.stats().state, provider.logins) == ("running", before + 1)
    pool.shutdown()
    assert pool.stats().state == "closed"
    for call in (lambda: pool.submit(double, 1), lambda: pool.map(double, [1]), pool.__enter__):
        with pytest.raises(RuntimeError, match="after shutdown"):
            call()
    pool.shutdown()
    assert provider.logins == before + 1


def test_a_pool_that_never_ran_ends_at_once(engine: str | EngineDescription, provider: LoopbackServer) -> None:
    pool = AuthenticatedProcessPool(session_at(provider), 1, engine=engine)
    before = provider.logins
    pool.shutdown()
    assert (pool.stats().state, provider.logins) == ("closed", before)
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.submit(double, 1)


def test_stats_and_repr_tell_the_truth(kind: str, engine: str | EngineDescription, provider: LoopbackServer) -> None:
    pool = AuthenticatedProcessPool(session_at(provider), 1, engine=engine)
    assert repr(pool) == (
        f"<AuthenticatedProcessPool new, 1 {kind} workers, 0 pending, 0 done, 0 failed, no token yet>"
    )
    with pool:
        futures: list[Future[int]] = [pool.submit(double, 1), pool.submit(double, 2), pool.submit(fail, 3)]
        wait(futures, PATIENCE)
        until(lambda: not pool.stats().tasks_pending)
        now = pool.stats()
        assert (now.state, now.workers, now.tasks_done, now.tasks_failed, now.tasks_retried) == ("running", 1, 2, 1, 0)
        assert (now.logins, now.refreshes, now.login_failures, now.last_error) == (1, 0, 0, None)
        assert (now.generation, now.token_state, now.workers_lost) == (1, "fresh", 0)
        assert now.token_remaining is not None
        assert 3_500 < now.token_remaining <= 3_600
        text = repr(pool)
        assert text.startswith(f"<AuthenticatedProcessPool running, 1 {kind} workers, 0 pending, 2 done, 1 failed, ")
        assert "token generation 1 fresh, 3" in text
        assert provider.client_secret not in text
        assert pool.submit(access_token).result(PATIENCE) not in text
    assert "AuthenticatedProcessPool closed" in repr(pool)


def test_a_result_that_cannot_travel_harms_no_other(pool: AuthenticatedProcessPool, kind: str) -> None:
    """Inline nothing travels, and the result itself arrives."""
    futures = [pool.submit(return_unpicklable_at, number, 1) for number in range(3)]
    wait(futures, PATIENCE)
    assert (futures[0].result(), futures[2].result()) == (0, 2)
    assert isinstance(futures[1].exception(), type(None) if kind == "inline" else UnpicklableError)


def test_what_a_task_logs_reaches_the_parents_loggers(
    engine: str | EngineDescription, provider: LoopbackServer, caplog: pytest.LogCaptureFixture
) -> None:
    def talk(number: int) -> str:
        import logging

        token = current_session().token.access_token
        logging.getLogger("tiles").info("tile %d with %s", number, token)
        return token

    with (
        AuthenticatedProcessPool(session_at(provider), 2, engine=engine, log_level="INFO") as talkative,
        caplog.at_level("INFO", "tiles"),
    ):
        [token] = set(talkative.map(talk, range(4), chunksize=1))
    said = sorted(record.getMessage() for record in caplog.records if record.name == "tiles")
    assert [text.replace(token, "***") for text in said] == [f"tile {number} with ***" for number in range(4)]


def test_tasks_run_where_the_engine_says(pool: AuthenticatedProcessPool, kind: str) -> None:
    ids = set(pool.map(pid, range(20), chunksize=1))
    assert (os.getpid() in ids) == (kind == "inline")
