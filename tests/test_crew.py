from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import logging
import math
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ALL_COMPLETED, CancelledError, Future, wait
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import psutil
import pytest
from patience import NEVER, PATIENCE, until
from pool_tasks import (
    KeywordOnlyError,
    Tally,
    Unpicklable,
    add,
    begin_and_wait,
    begin_and_wait_or_double,
    descriptors,
    die,
    double,
    echo,
    environment,
    fail,
    fork_sleeper,
    functions_held,
    grow,
    grow_and_die,
    grow_held,
    hang_once,
    is_loaded,
    leave,
    pid,
    raise_here_only,
    raise_keyword_only,
    refuse_to_start,
    return_exits_on_load,
    return_here_only,
    show_held,
    sleeper_and_wait,
    slow_pid,
    wait_for,
    write_to_sockets,
)

from shpool.engines.base import Task
from shpool.engines.crew import Crew
from shpool.engines.member import Member
from shpool.engines.messages import HEADER, NO_KEY, Kind, Landing, encode
from shpool.engines.setup import WorkerSetup
from shpool.errors import (
    InitializerError,
    TaskTerminatedError,
    TaskTimeoutError,
    UnpicklableError,
    WorkerLostError,
)
from shpool.lazymap import LazyMap
from shpool.mapsizes import MapOptions
from shpool.retry import Backoff, RetryPolicy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shpool.engines.birth import WorkerProcess
    from shpool.engines.messages import Message

pytestmark = pytest.mark.slow  # worker processes take a quarter of a second to start


def is_gone(process_id: int) -> bool:
    """Tell whether a process has ended; nobody may have reaped it yet."""
    try:
        return psutil.Process(process_id).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def quickly(retries: int) -> RetryPolicy:
    return RetryPolicy(retries, Backoff(base=0.1))


def submit(crew: Crew, fn: Callable[..., Any], *args: object, retries: int = 0, timeout: float | None = None) -> Any:
    label = getattr(fn, "__name__", "task")
    return crew.submit(Task(crew.prepare(fn), args, label=label, policy=quickly(retries), timeout=timeout))


def result(crew: Crew, fn: Callable[..., Any], *args: object) -> Any:
    return submit(crew, fn, *args).result(PATIENCE)


def mapped(crew: Crew, fn: Callable[..., Any], items: Any, **options: Any) -> Iterator[Any]:
    policy = quickly(options.pop("retries", 0))
    return LazyMap(crew, fn, (items,), MapOptions(policy=policy, **options)).in_order()


@contextlib.contextmanager
def running(workers: int = 1, setup: WorkerSetup | None = None, **kwargs: Any) -> Iterator[Crew]:
    """A crew of the test's own."""
    crew = Crew(workers, setup, **kwargs)
    crew.start()
    try:
        yield crew
    finally:
        crew.shutdown(cancel=True, kill=True)
        assert crew.join(PATIENCE)


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    """Two workers that the tests of this module share; whoever kills one starts a crew of his own."""
    with running(2) as shared:
        ready(shared)
        yield shared


def ready(crew: Crew) -> list[int]:
    """Wait until all workers are there; return their ids."""
    until(lambda: sum(member.is_ready for member in list(crew._members.values())) == crew.workers)
    return crew.pids


# What travels


def test_a_task_runs_in_another_process(crew: Crew) -> None:
    assert result(crew, pid) in crew.pids


def test_lambdas_closures_partials_and_bound_methods_travel(crew: Crew) -> None:
    base = 10
    calls: list[Callable[[int], Any]] = [lambda number: base + number, functools.partial(add, 10), [10].count]
    assert [result(crew, call, 5) for call in calls] == [15, 15, 0]


def test_an_unpicklable_function_is_refused_at_once(crew: Crew) -> None:
    with pytest.raises(UnpicklableError, match=r"function.*stays where it is"):
        crew.prepare(functools.partial(echo, Unpicklable()))
    assert result(crew, add, 1, 2) == 3


@pytest.mark.parametrize("argument", [Unpicklable(), threading.Lock()])
def test_unpicklable_arguments_fail_their_task_alone(crew: Crew, argument: object) -> None:
    with pytest.raises(UnpicklableError, match="arguments"):
        result(crew, echo, argument)
    assert result(crew, add, 1, 2) == 3


@pytest.mark.parametrize("fn", [return_here_only, raise_here_only, return_exits_on_load])
def test_what_the_parent_cannot_unpickle_fails_its_task_alone(crew: Crew, fn: Callable[..., object]) -> None:
    with pytest.raises(UnpicklableError, match=fn.__name__ if "return" in fn.__name__ else "FailsWhereError"):
        result(crew, fn)
    assert result(crew, add, 1, 2) == 3


def test_an_error_with_keyword_only_arguments_fails_its_task_alone(crew: Crew) -> None:
    with pytest.raises(KeywordOnlyError, match="no such page"):
        result(crew, raise_keyword_only)
    assert result(crew, add, 1, 2) == 3


def test_a_task_that_exits_fails_alone(crew: Crew) -> None:
    before = crew.pids
    with pytest.raises(SystemExit):
        result(crew, leave, 3)
    assert result(crew, pid) in before
    assert crew.tally.workers_lost == 0


def test_big_arguments_and_results_pass_both_ways_at_once(crew: Crew) -> None:
    """A sender that waited while the other side does would wait for ever."""
    blobs = [bytes([number]) * 20_000_000 for number in range(4)]
    futures = [submit(crew, echo, blob) for blob in blobs]
    done, pending = wait(futures, timeout=2 * PATIENCE)
    assert not pending
    assert all(future.result() == blob for future, blob in zip(futures, blobs, strict=True))
    assert len(done) == 4


def test_a_function_is_sent_once_to_each_worker() -> None:
    """Its size would show: 300 calls of 1 MB each."""
    with running(1) as crew:
        blob = bytes(1_000_000)
        function = crew.prepare(lambda: len(blob))
        assert crew.submit(Task(function, ())).result(PATIENCE) == 1_000_000
        (member,) = crew._members.values()
        before = member._bytes_put
        assert crew.submit(Task(function, ())).result(PATIENCE) == 1_000_000
        assert member._bytes_put - before < 1_000


def test_workers_forget_functions_when_there_are_many() -> None:
    """Closures made in a loop must not pile up."""
    with running(1) as crew:
        for number in range(300):
            assert result(crew, lambda number=number: number) == number
        assert 1 < result(crew, functions_held) <= 129


def held_bytes() -> int:
    """Return the size of what the serve loop around this call keeps of functions."""
    frame = sys._getframe()
    while frame.f_code.co_name != "serve":
        assert frame.f_back is not None
        frame = frame.f_back
    return sum(len(kept) for kept in frame.f_locals["functions"].values() if isinstance(kept, bytes))


def test_workers_forget_large_functions_soon(crew: Crew) -> None:
    """A closure of some megabytes made anew for each call must not fill the memory."""
    for number in range(20):
        blob = bytes([number]) * 3_000_000
        assert all(future.result(PATIENCE) for future in [submit(crew, lambda: len(blob)) for _ in range(4)])  # noqa: B023 - called in this very round
    assert max(result(crew, held_bytes) for _ in range(20)) < 9_000_000


def test_calls_of_many_functions_under_way_at_once_keep_theirs(crew: Crew) -> None:
    futures = [submit(crew, lambda number=number: number) for number in range(600)]
    assert [future.result(PATIENCE) for future in futures] == list(range(600))


# Futures


def test_a_queued_task_can_be_cancelled_and_a_running_one_cannot(crew: Crew, tmp_path: Path) -> None:
    cue = str(tmp_path / "cue")
    running_ones = [submit(crew, begin_and_wait, str(tmp_path / name), cue) for name in "ab"]
    until(lambda: (tmp_path / "a").exists() and (tmp_path / "b").exists())
    queued = submit(crew, double, 1)
    after = submit(crew, double, 2)
    assert not any(future.cancel() for future in running_ones)
    assert queued.cancel()
    Path(cue).touch()
    assert after.result(PATIENCE) == 4
    with pytest.raises(CancelledError):
        queued.result()
    wait([queued, *running_ones], PATIENCE)
    until(lambda: crew.backlog == 0)


def test_tasks_submitted_from_many_threads_all_arrive(crew: Crew) -> None:
    results: list[int] = []

    def ask(start: int) -> None:
        futures = [submit(crew, double, number) for number in range(start, start + 100)]
        results.extend(future.result(PATIENCE) for future in futures)

    threads = [threading.Thread(target=ask, args=(start,)) for start in range(0, 1_600, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == list(range(0, 3_200, 2))


def test_a_done_callback_may_submit(crew: Crew) -> None:
    chain: Future[int] = Future()

    def go_on(future: Future[int]) -> None:
        if future.result() >= 1_024:
            chain.set_result(future.result())
        else:
            submit(crew, double, future.result()).add_done_callback(go_on)

    submit(crew, double, 1).add_done_callback(go_on)
    assert chain.result(PATIENCE) == 1_024


def test_a_done_callback_may_end_the_crew() -> None:
    with running(1) as crew:
        future = submit(crew, double, 1)
        future.add_done_callback(lambda _: crew.shutdown(kill=True) or crew.join())  # type: ignore[func-returns-value]  # one after the other
        assert crew.join(PATIENCE)
        assert crew.has_ended


def test_a_failing_done_callback_harms_nobody(crew: Crew) -> None:
    future = submit(crew, wait_for, os.devnull)
    future.add_done_callback(lambda _: 1 // 0)
    logging.disable(logging.CRITICAL)  # concurrent.futures logs it
    try:
        future.result(PATIENCE)
        assert result(crew, add, 1, 2) == 3
    finally:
        logging.disable(logging.NOTSET)


# Workers that die


def test_a_killed_worker_costs_one_task_and_names_it(tmp_path: Path) -> None:
    with running(2) as crew:
        victim = submit(crew, begin_and_wait, str(tmp_path / "a"), str(tmp_path / "cue"))
        other = submit(crew, begin_and_wait, str(tmp_path / "b"), str(tmp_path / "cue"))
        until(lambda: (tmp_path / "a").exists() and (tmp_path / "b").exists())
        behind = [submit(crew, double, number) for number in range(10)]
        os.kill(int((tmp_path / "a").read_text()), signal.SIGKILL)
        with pytest.raises(WorkerLostError, match=r"while running begin_and_wait.*signal 9") as caught:
            victim.result(PATIENCE)
        assert caught.value.pid == int((tmp_path / "a").read_text())
        (tmp_path / "cue").touch()
        assert other.result(PATIENCE)
        assert [future.result(PATIENCE) for future in behind] == [2 * number for number in range(10)]
        assert crew.tally.workers_lost == 1
        assert len(ready(crew)) == 2


def test_a_task_that_ends_its_worker_is_told_the_exit_code() -> None:
    with running(1) as crew:
        with pytest.raises(WorkerLostError, match="exit code 7"):
            result(crew, die, 7)
        assert result(crew, add, 1, 2) == 3


def test_a_task_that_always_kills_its_worker_fails_after_its_retries() -> None:
    with running(1) as crew:
        future = submit(crew, die, 7, retries=2)
        with pytest.raises(WorkerLostError, match="attempt 3"):
            future.result(PATIENCE)
        assert (crew.tally.workers_lost, crew.tally.retried) == (3, 2)
        assert result(crew, add, 1, 2) == 3


def test_a_worker_killed_while_idle_costs_no_task() -> None:
    with running(2) as crew:
        for victim in ready(crew):
            os.kill(victim, signal.SIGKILL)
            until(functools.partial(is_gone, victim))
            assert result(crew, add, 1, 2) == 3
        assert len(ready(crew)) == 2
        assert crew.tally.failed == 0


def test_what_a_lost_worker_has_answered_counts_also_where_a_send_is_what_meets_its_end() -> None:
    """Else its last answers would be dropped, and the error would name a task that had ended."""
    ours, theirs = socket.socketpair()
    recalled, recall = os.pipe()
    process = SimpleNamespace(pid=4711)
    member = Member(cast("WorkerProcess", process), ours, recall, Landing(), None)
    ours.setblocking(False)
    try:
        theirs.sendall(b"".join(encode(Kind.RESULT, number) for number in (1, 2)))
        theirs.close()
        member.put(encode(Kind.CALL, 3))
        member.flush()
        assert (member.is_gone, [message.number for message in member.receive()]) == (False, [1, 2])
        assert (member.receive(), member.is_gone, member.died_unread) == ([], True, True)
    finally:
        theirs.close()
        os.close(recalled)
        member.let_go()


def test_tasks_sent_to_workers_that_are_just_dying_run_elsewhere() -> None:
    """No time passes between the signal and the task."""
    with running(2) as crew:
        for _ in range(4):
            os.kill(ready(crew)[0], signal.SIGKILL)
            futures = [submit(crew, add, 1, 2) for _ in range(2)]
            assert [future.result(PATIENCE) for future in futures] == [3, 3]


def test_a_worker_that_dies_while_it_is_sent_a_task_costs_nothing() -> None:
    blob = bytes(20_000_000)
    with running(1) as crew:
        (victim,) = ready(crew)
        os.kill(victim, signal.SIGSTOP)  # so that it reads nothing
        future = submit(crew, len, blob)
        os.kill(victim, signal.SIGKILL)
        assert future.result(PATIENCE) == len(blob)
        assert (crew.tally.workers_lost, crew.tally.failed) == (1, 0)


def test_a_task_whose_sending_kills_every_worker_fails_in_the_end() -> None:
    """The reading itself may be what kills; it must not be tried for ever."""
    for _ in range(10):
        with running(1) as crew:
            (victim,) = ready(crew)
            os.kill(victim, signal.SIGSTOP)
            future = submit(crew, len, bytes(200_000_000))
            os.kill(victim, signal.SIGKILL)
            until(functools.partial(_another_has_work, crew, victim))
            for reader in crew.pids:
                os.kill(reader, signal.SIGKILL)
            error = future.exception(PATIENCE)
        if error is not None:
            break  # else this test was so slow that the second worker had read it all
    assert isinstance(error, WorkerLostError)


def _another_has_work(crew: Crew, victim: int) -> bool:
    return [member.pid for member in list(crew._members.values()) if member.flights] not in ([], [victim])


def test_a_timeout_counts_while_the_task_is_still_being_sent() -> None:
    with running(1) as crew:
        os.kill(ready(crew)[0], signal.SIGSTOP)
        with pytest.raises(TaskTimeoutError):
            submit(crew, len, bytes(20_000_000), timeout=0.3).result(PATIENCE)
        assert result(crew, add, 1, 2) == 3


def test_a_forked_grandchild_does_not_hide_its_workers_death(tmp_path: Path) -> None:
    """It holds copies of the worker's descriptors."""
    begun = tmp_path / "begun"
    with running(1) as crew:
        future = submit(crew, sleeper_and_wait, str(begun))
        until(begun.exists)
        worker, grandchild = map(int, begun.read_text().split())
        try:
            os.kill(worker, signal.SIGKILL)
            with pytest.raises(WorkerLostError, match="signal 9"):
                future.result(PATIENCE)
            assert result(crew, add, 1, 2) == 3
            assert not is_gone(grandchild)
        finally:
            os.kill(grandchild, signal.SIGKILL)


def test_a_crew_ends_although_a_task_left_a_process_behind() -> None:
    with running(1) as crew:
        grandchild = result(crew, fork_sleeper)
        try:
            crew.shutdown()
            assert crew.join(PATIENCE)
            assert not is_gone(grandchild)
        finally:
            os.kill(grandchild, signal.SIGKILL)


def test_a_large_argument_travels_as_it_is_when_submitted(tmp_path: Path) -> None:
    begun, cue = tmp_path / "begun", tmp_path / "cue"
    with running(1) as crew:
        busy = submit(crew, begin_and_wait, str(begun), str(cue))
        until(begun.exists)
        value = bytearray(2**20)
        copy = submit(crew, echo, value)
        value[:3] = b"new"
        cue.touch()
        busy.result(PATIENCE)
        assert copy.result(PATIENCE) == bytes(2**20)


def test_a_worker_lets_go_of_a_large_result_once_it_is_sent() -> None:
    with running(1) as crew:
        assert result(crew, show_held) == bytes(2**20)
        assert result(crew, grow_held) == 2**20 + 1


def test_a_worker_does_not_load_loky() -> None:
    """That would take it longer than all else it loads."""
    with running(1) as crew:
        assert not result(crew, is_loaded, "loky")


def test_workers_that_cannot_even_start_end_the_crew(tmp_path: Path) -> None:
    """No crash loop: three in a row and all is told."""
    with running(2, WorkerSetup(initializer=die, initargs=(9,))) as crew:
        with pytest.raises(InitializerError, match=r"before they are ready.*exit code 9"):
            result(crew, double, 1)
        until(lambda: crew.has_ended)
        assert crew.tally.workers_lost <= 4
        with pytest.raises(InitializerError):
            submit(crew, double, 1)


def test_an_initializer_that_raises_ends_the_crew_and_is_told() -> None:
    with running(2, WorkerSetup(initializer=refuse_to_start, initargs=("no licence",))) as crew:
        with pytest.raises(InitializerError, match="OSError: cannot start: no licence") as caught:
            result(crew, double, 1)
        assert "refuse_to_start" in str(caught.value.__cause__)
        assert crew.join(PATIENCE)
        assert crew.tally.workers_lost == 0


# Timeouts


def test_a_timeout_stops_its_task_alone(tmp_path: Path) -> None:
    with running(2) as crew:
        cue = str(tmp_path / "cue")
        innocent = submit(crew, wait_for, cue)
        late = submit(crew, slow_pid, NEVER, timeout=0.2)
        behind = [submit(crew, double, number, timeout=PATIENCE) for number in range(5)]
        with pytest.raises(TaskTimeoutError, match=r"slow_pid ran longer than 0.2 s"):
            late.result(PATIENCE)
        Path(cue).touch()
        assert innocent.result(PATIENCE)
        assert [future.result(PATIENCE) for future in behind] == [0, 2, 4, 6, 8]
        assert crew.tally.failed == 1


def test_time_in_the_queue_is_not_counted(tmp_path: Path) -> None:
    with running(1) as crew:
        cue = tmp_path / "cue"
        first = submit(crew, wait_for, str(cue))
        queued = [submit(crew, double, number, timeout=6.0) for number in range(3)]
        time.sleep(6.5)  # longer than the timeout of what is queued, which is longer than a machine may stall
        cue.touch()
        assert first.result(PATIENCE)
        assert [future.result(PATIENCE) for future in queued] == [0, 2, 4]


def test_time_behind_a_batch_at_the_same_worker_is_not_counted() -> None:
    """Tiny tasks travel several at a time; the second one's time begins when the first has ended."""
    with running(1) as crew:
        ready(crew)
        for number in range(50):
            result(crew, double, number)
        batch = crew.submit(Task(crew.prepare(time.sleep), [3.5, 3.5], batch=True))
        behind = submit(crew, double, 1, timeout=6.0)
        assert behind.result(PATIENCE) == 2
        assert batch.done()
        assert crew.tally.workers_lost == 0


def test_a_timed_out_task_with_retries_runs_again(tmp_path: Path) -> None:
    with running(1) as crew:
        ready(crew)
        # So many retries for a machine that stalls during the second attempt.
        assert submit(crew, hang_once, str(tmp_path), 5, retries=9, timeout=1.0).result(PATIENCE) == 5
        assert crew.tally.retried == crew.tally.workers_lost >= 1
        assert crew.tally.failed == 0


def test_every_task_of_a_timed_map_has_its_own_time(tmp_path: Path) -> None:
    """Eight tasks of 1 s on one worker with a limit of 7 s: together they take longer."""
    with running(1) as crew:
        ready(crew)
        assert len(list(mapped(crew, slow_pid, [1.0] * 8, task_timeout=7.0))) == 8
        assert crew.tally.workers_lost == 0


# map over real workers


def test_a_worker_killed_in_a_map_costs_nothing_with_one_retry(tmp_path: Path) -> None:
    with running(2) as crew:
        results = mapped(crew, functools.partial(_die_once, str(tmp_path)), range(40), retries=1)
        assert list(results) == list(range(40))
        assert crew.tally.workers_lost == 1


def test_a_worker_killed_in_a_map_without_retries_fails_the_item_it_ran(tmp_path: Path) -> None:
    with running(2) as crew:
        results = mapped(crew, functools.partial(_die_once, str(tmp_path)), range(40), chunksize=1)
        assert list(itertools.islice(results, 17)) == list(range(17))
        with pytest.raises(WorkerLostError, match="partial"):
            next(results)
        assert result(crew, add, 1, 2) == 3


def _die_once(folder: str, number: int) -> int:
    from pool_tasks import die_once

    return die_once(folder, number, 17)


def test_an_item_that_always_kills_its_worker_takes_no_neighbour_along(tmp_path: Path) -> None:
    with running(2) as crew:
        items = [*range(10), -1, *range(10)]
        results = mapped(crew, lambda number: os._exit(3) if number < 0 else number, items, chunksize=7)
        assert list(itertools.islice(results, 10)) == list(range(10))
        with pytest.raises(WorkerLostError, match="exit code 3"):
            next(results)


def test_no_op_maps_are_complete_in_any_chunking(crew: Crew) -> None:
    for chunksize in (None, 1, 7, 1_000):
        assert list(mapped(crew, double, range(2_000), chunksize=chunksize)) == list(range(0, 4_000, 2))


def test_closing_a_map_leaves_the_queue_empty(crew: Crew, tmp_path: Path) -> None:
    cue = tmp_path / "cue"
    blocked = [submit(crew, begin_and_wait, str(tmp_path / name), str(cue)) for name in "ab"]
    until(lambda: (tmp_path / "a").exists() and (tmp_path / "b").exists())
    results = mapped(crew, functools.partial(begin_and_wait, str(tmp_path / "ran")), itertools.repeat(str(cue)))
    results.close()  # type: ignore[attr-defined]  # a generator
    cue.touch()
    wait(blocked, PATIENCE)
    until(lambda: crew.backlog == 0)
    assert not (tmp_path / "ran").exists()


# Ends


def test_shutdown_finishes_what_was_submitted() -> None:
    with running(2) as crew:
        futures = [submit(crew, double, number) for number in range(50)]
        crew.shutdown()
        with pytest.raises(RuntimeError, match="after shutdown"):
            submit(crew, double, 1)
        assert crew.join(PATIENCE)
        assert [future.result(0) for future in futures] == list(range(0, 100, 2))


def test_shutdown_finishes_what_waits_for_another_attempt(tmp_path: Path) -> None:
    with running(1) as crew:
        future = submit(crew, _die_once, str(tmp_path), 17, retries=3)
        crew.shutdown()
        assert crew.join(PATIENCE)
        assert future.result(0) == 17


class _PassingError(ConnectionError):
    retry_after = NEVER


def fail_for_a_while(number: int) -> int:
    if number:
        raise _PassingError
    return number


def test_shutdown_waits_for_no_other_attempt_that_is_not_wanted_any_more() -> None:
    """Nobody takes the results of a map that was closed, or whose time was up."""
    with running(1) as crew:
        closed = mapped(crew, fail_for_a_while, [0, 1, 2, 3], retries=2, chunksize=2)
        assert next(closed) == 0
        late = mapped(crew, fail_for_a_while, [1, 2], retries=2, chunksize=2, timeout=0.5)
        with pytest.raises(TimeoutError):
            next(late)
        closed.close()  # type: ignore[attr-defined]  # a generator
        crew.shutdown()
        assert crew.join(PATIENCE)


@pytest.mark.parametrize("options", [{"chunksize": 1}, {"task_timeout": NEVER}])
def test_what_has_run_gets_no_other_attempt_once_its_map_is_closed(options: dict[str, Any]) -> None:
    """It cannot be cancelled any more, and yet nobody takes its result."""
    with running(2) as crew:
        closed = mapped(crew, fail_for_a_while, range(6), retries=3, **options)
        assert next(closed) == 0
        until(lambda: crew.tally.retried >= 2)
        closed.close()  # type: ignore[attr-defined]  # a generator
        until(lambda: crew.backlog == 0)  # the pool lives on
        late = mapped(crew, fail_for_a_while, range(1, 6), retries=3, timeout=0.5, **options)
        with pytest.raises(TimeoutError):
            next(late)
        crew.shutdown()
        assert crew.join(PATIENCE)


def fail_below_9_for_a_while(number: int) -> int:
    return fail_for_a_while(number) if number < 9 else number


@pytest.mark.parametrize("options", [{}, {"chunksize": 1}, {"task_timeout": NEVER}])
def test_an_unordered_map_goes_on_while_more_than_its_window_waits_for_other_attempts(options: dict[str, Any]) -> None:
    """Of items that go in batches, and of such as go one by one."""
    with running(2) as crew:
        lazy = LazyMap(
            crew,
            fail_below_9_for_a_while,
            (itertools.count(1),),
            MapOptions(policy=quickly(2), timeout=PATIENCE, **options),
        )
        results = lazy.as_completed()
        assert min(itertools.islice(results, 200)) > 8
        results.close()  # type: ignore[attr-defined]  # a generator


def fail_at_the_cue(started: str, cue: str) -> None:
    begin_and_wait(started, cue)
    raise _PassingError


def test_an_attempt_that_runs_when_its_map_is_closed_is_the_last(tmp_path: Path) -> None:
    """It ends by itself; the pool does not wait for another one."""
    started, cue = tmp_path / "started", tmp_path / "cue"
    with running(1) as crew:
        closed = mapped(crew, functools.partial(fail_at_the_cue, str(started)), [str(cue)], retries=3, chunksize=1)
        until(started.exists)
        closed.close()  # type: ignore[attr-defined]  # a generator
        cue.touch()
        crew.shutdown()
        assert crew.join(PATIENCE)
        assert (crew.tally.failed, crew.tally.retried) == (1, 0)


def test_cancelling_shutdown_finishes_what_runs_and_cancels_the_rest(tmp_path: Path) -> None:
    with running(1) as crew:
        first = submit(crew, begin_and_wait, str(tmp_path / "a"), str(tmp_path / "cue"))
        queued = [submit(crew, double, number) for number in range(5)]
        until((tmp_path / "a").exists)
        crew.shutdown(cancel=True)
        assert all(future.cancelled() for future in queued)
        assert not wait(queued, PATIENCE, ALL_COMPLETED).not_done
        (tmp_path / "cue").touch()
        assert first.result(PATIENCE)
        assert crew.join(PATIENCE)


def test_killing_shutdown_stops_what_runs(tmp_path: Path) -> None:
    with running(2) as crew:
        futures = [submit(crew, begin_and_wait, str(tmp_path / name), str(tmp_path / "never")) for name in "ab"]
        queued = submit(crew, double, 1)
        until(lambda: (tmp_path / "a").exists() and (tmp_path / "b").exists())
        crew.shutdown(kill=True)
        assert crew.join(PATIENCE)
        assert queued.cancelled()
        for future in futures:
            with pytest.raises(TaskTerminatedError):
                future.result(0)


def test_no_future_is_left_waiting_however_the_end_comes(tmp_path: Path) -> None:
    """Workers die and the crew is killed at the same time, again and again."""
    for turn in range(5):
        with running(2) as crew:
            deadly: Callable[[int], object] = die
            futures = [submit(crew, double if number % 3 else deadly, number, retries=turn % 2) for number in range(30)]
            until(lambda: crew.tally.workers_lost)
            crew.shutdown(kill=True)
            assert crew.join(PATIENCE)
            assert all(future.done() for future in futures)
            assert crew.backlog == 0


def test_a_crew_that_is_collected_inside_its_own_loop_still_ends() -> None:
    """The garbage collector runs in any thread, at any moment, with the crew's lock held too."""
    with running(1) as crew:
        ready(crew)
        with crew._lock:
            crew.shutdown()
        assert crew.join(PATIENCE)


def test_shutdown_may_be_repeated() -> None:
    with running(1) as crew:
        for _ in range(3):
            crew.shutdown()
            assert crew.join(PATIENCE)


# What workers hold


def test_workers_hold_no_descriptor_of_their_siblings() -> None:
    with running(3) as crew:
        ready(crew)
        held = [result(crew, descriptors) for _ in range(6)]
        for found in held:
            assert len([target for target in found.values() if target.startswith("socket:")]) == 1, found


def test_other_children_of_the_parent_inherit_nothing(crew: Crew) -> None:
    """With them open, a worker would not notice its parent's end."""
    code = (
        "import os\n"
        "for name in os.listdir('/proc/self/fd'):\n"
        "    try: print(os.readlink('/proc/self/fd/' + name))\n"
        "    except OSError: pass"
    )
    ready(crew)
    done = subprocess.run(
        [sys.executable, "-c", code], close_fds=False, capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    assert "socket:" not in done.stdout
    assert "memfd" not in done.stdout


def test_the_environment_of_workers_is_set_and_blanked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_FOR_TESTS", "invented-secret-to-blank")
    with running(1, WorkerSetup(env={"OMP_NUM_THREADS": "3"}), blanked=lambda: ["SECRET_FOR_TESTS"]) as crew:
        assert result(crew, environment, "OMP_NUM_THREADS")[0] == "3"
        seen, kernels = result(crew, environment, "SECRET_FOR_TESTS")
        assert seen is None
        assert b"invented-secret-to-blank" not in kernels


# The system's limits


def test_a_system_without_free_descriptors_is_asked_again_slowly(caplog: pytest.LogCaptureFixture) -> None:
    """A crew of 20 where only a few fit: it works with those, and neither spins nor floods the log."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir()))

    def warned() -> list[logging.LogRecord]:
        return [record for record in caplog.records if "cannot be started" in record.message]

    with running(20) as crew, caplog.at_level(logging.WARNING, logger="shpool.engines.crew"):
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 30, hard))
        try:
            until(warned)
            assert 1 <= len(crew.pids) < 20
            assert result(crew, double, 4) == 8
            naps, told = counted_naps(crew), len(warned())
            until(lambda: len(warned()) >= told + 2)
            moments = [record.created for record in warned()]
            assert all(later - sooner > 0.9 for sooner, later in itertools.pairwise(moments)), "a second apart"
            assert len(naps) < 10 * (len(moments) - told), "a loop that spins naps thousands of times"
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        until(lambda: len(crew.pids) == 20)


def counted_naps(crew: Crew) -> list[float]:
    """Return what grows by one each time the crew's loop goes to sleep."""
    naps: list[float] = []
    length_of_nap = crew._nap_ms

    def counting() -> float:
        naps.append(length_of_nap())
        return naps[-1]

    crew._nap_ms = counting  # type: ignore[method-assign]  # looked up at each turn of the loop
    return naps


def test_what_waits_behind_a_long_call_goes_to_an_idle_worker(tmp_path: Path) -> None:
    """Tiny calls travel many at a time; when one of them turns out long, those behind it are called back."""
    cue = tmp_path / "cue"
    with running(2) as crew:
        ready(crew)
        fn = crew.prepare(wait_for)
        for future in [crew.submit(Task(fn, (os.devnull,))) for _ in range(2000)]:
            future.result(PATIENCE)
        futures = [crew.submit(Task(fn, (str(cue) if index == 100 else os.devnull,))) for index in range(2000)]
        done, _ = wait([future for index, future in enumerate(futures) if index != 100], PATIENCE)
        assert len(done) == 1999
        assert not futures[100].done()
        cue.touch()
        assert futures[100].result(PATIENCE)


# Forks of the parent


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_of_the_parent_holds_nothing_of_the_crew() -> None:
    with running(2) as crew:
        ready(crew)
        held = {member.fileno() for member in crew._members.values()}
        held |= {crew._bell_in, crew._bell_out, crew._board._descriptor}
        ours, theirs = socket.socketpair()
        with ours, theirs:
            child = os.fork()
            if child == 0:
                try:
                    theirs.sendall(_what_a_child_sees(crew, held).encode())
                finally:
                    os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
            said = ours.recv(10_000).decode()
        assert said.startswith("0 of 5 open; the pool belongs to the process that started it")
        assert [result(crew, double, number) for number in range(10)] == list(range(0, 20, 2))
        assert crew.tally.workers_lost == 0


def _what_a_child_sees(crew: Crew, held: set[int]) -> str:
    still_open = 0
    for descriptor in held:
        with contextlib.suppress(OSError):
            os.fstat(descriptor)
            still_open += 1
    try:
        submit(crew, double, 1)
        refused = "not refused"
    except RuntimeError as exc:
        refused = str(exc)
    crew.shutdown(cancel=True, kill=True)
    return f"{still_open} of {len(held)} open; {refused}"


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forks_while_workers_are_launched_keep_no_lifeline_open() -> None:
    """A lifeline that a child copied before the crew knew of it would hide the worker's end from its parent."""
    children = []
    try:
        with running(8) as crew:
            for _ in range(100):  # some before, some between and some after the launches, however slow they are
                if len(crew.pids) == 8:
                    break
                child = os.fork()
                if child == 0:
                    signal.pause()
                    os._exit(0)
                children.append(child)
            victims = ready(crew)
            for victim in victims:
                os.kill(victim, signal.SIGKILL)
            until(lambda: crew.tally.workers_lost == 8)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    assert children


def test_failing_tasks_leave_the_tally_right() -> None:
    with running(1) as crew:
        futures = [submit(crew, fail, number) for number in range(3)] + [submit(crew, double, 1)]
        wait(futures, PATIENCE)
        until(lambda: crew.backlog == 0)
        assert (crew.tally.done, crew.tally.failed, crew.tally.retried) == (1, 3, 0)


# What carries a state


@pytest.mark.parametrize("chunksize", [None, 1, 7])
def test_a_map_unpickles_its_function_once_in_each_worker(tmp_path: Path, chunksize: int | None) -> None:
    """However large what it holds is, and however small the batches are."""
    with running(2) as crew:
        for maps in (1, 2):
            counts = list(mapped(crew, Tally(str(tmp_path)).count, range(60), chunksize=chunksize))
            workers = counts.count(1)  # those that took part each began to count
            assert workers in {1, 2}
            assert sum(1 for _ in tmp_path.iterdir()) <= 2 * maps


def test_submit_unpickles_a_function_for_each_call(tmp_path: Path) -> None:
    """None meets what another one has left in it."""
    count = Tally(str(tmp_path)).count
    with running() as crew:
        assert [result(crew, count, number) for number in range(3)] == [1, 1, 1]


# Stopping one task


def test_a_running_task_can_be_terminated_at_the_cost_of_its_worker_alone(tmp_path: Path) -> None:
    with running(2) as crew:
        other = submit(crew, begin_and_wait, str(tmp_path / "other"), str(tmp_path / "cue"))
        stopped = submit(crew, begin_and_wait, str(tmp_path / "begun"), "never", retries=3)
        until(lambda: (tmp_path / "other").exists() and (tmp_path / "begun").exists())
        assert crew.terminate(stopped)
        assert isinstance(stopped.exception(PATIENCE), TaskTerminatedError)
        (tmp_path / "cue").touch()
        assert other.result(PATIENCE)
        assert (crew.tally.workers_lost, crew.tally.retried) == (1, 0)
        assert not crew.terminate(stopped)


def test_a_queued_task_that_is_terminated_is_cancelled(tmp_path: Path) -> None:
    with running(1) as crew:
        running_one = submit(crew, begin_and_wait, str(tmp_path / "begun"), str(tmp_path / "cue"))
        queued = submit(crew, double, 1)
        until((tmp_path / "begun").exists)
        assert crew.terminate(queued)
        assert queued.cancelled()
        (tmp_path / "cue").touch()
        assert running_one.result(PATIENCE)
        assert crew.tally.workers_lost == 0


def test_a_task_sent_ahead_can_be_terminated_without_harm_to_the_one_before_it(tmp_path: Path) -> None:
    """It is called back from the worker, which goes on."""
    with running(1) as crew:
        ready(crew)
        for attempt in range(100):  # nothing is sent ahead where the machine is slow at that moment
            begun, cue = tmp_path / f"begun-{attempt}", tmp_path / f"cue-{attempt}"
            for number in range(50):  # so that calls of this function are known to be tiny
                assert result(crew, begin_and_wait_or_double, "", "", number) == 2 * number
            before = submit(crew, begin_and_wait_or_double, str(begun), str(cue), 1)
            ahead = submit(crew, begin_and_wait_or_double, "", "", 2)
            after = submit(crew, begin_and_wait_or_double, "", "", 3)
            until(begun.exists)
            if ahead.running():
                break
            cue.touch()
            wait([before, ahead, after], PATIENCE)
        assert ahead.running()
        assert crew.terminate(ahead)
        assert isinstance(ahead.exception(PATIENCE), TaskTerminatedError)
        cue.touch()
        assert [before.result(PATIENCE), after.result(PATIENCE)] == [2, 6]
        assert crew.tally.workers_lost == 0


def note_and_await(folder: str, number: int) -> int:
    """Leave a file for each run; 0 and 1 then wait for a file of theirs."""
    Path(folder, f"{number}-{time.monotonic_ns()}").touch()
    if number in {0, 1}:
        until(Path(folder, f"end of {number}").exists)
    return number


LARGE = bytes(30_000_000)  # more than the sockets hold, so that most of it waits in the parent


@contextlib.contextmanager
def behind_a_held_call(crew: Crew, folder: Path) -> Iterator[tuple[Future[int], Future[bytes], Path, Path]]:
    """Yield a call that runs, a large one that waits behind it, what ends the first and what frees the other worker."""
    ready(crew)
    calls = {cue: (str(folder / f"begun-{cue}"), str(folder / cue)) for cue in ("one", "other")}
    crew._dispatch._paces[crew.prepare(begin_and_wait_or_double).key] = 1e-4
    running_calls = {cue: submit(crew, begin_and_wait_or_double, *paths, 1) for cue, paths in calls.items()}
    for begun, _ in calls.values():
        until(Path(begun).exists)
    with crew._lock:
        for member in crew._members.values():
            member.head_since = math.inf  # however slow the machine is, they have only just begun
        large = submit(crew, begin_and_wait_or_double, "", "", LARGE)
        [full] = [member for member in crew._members.values() if len(member.flights) > 1]
        held = full.flights[0].future
        for member in crew._members.values():
            member.head_since = time.monotonic()
    cue = next(cue for cue, future in running_calls.items() if future is held)
    free = next(each for each in calls if each != cue)
    try:
        yield held, large, folder / cue, folder / free
    finally:
        (folder / cue).touch()
        (folder / free).touch()


def test_a_large_call_does_not_wait_behind_a_long_one_beside_an_idle_worker(tmp_path: Path) -> None:
    """Most of it is not there yet when the worker is first asked to give it back."""
    with running(2) as crew, behind_a_held_call(crew, tmp_path) as (held, large, _, free):
        free.touch()
        assert len(large.result(PATIENCE)) == 2 * len(LARGE)
        assert not held.done()


def test_a_large_call_that_waits_behind_a_long_one_can_be_stopped(tmp_path: Path) -> None:
    with running(2) as crew, behind_a_held_call(crew, tmp_path) as (held, large, cue, _):
        assert crew.terminate(large)
        with pytest.raises(TaskTerminatedError):
            large.result(PATIENCE)
        assert not held.done()
        cue.touch()
        assert held.result(PATIENCE) == 2
        assert crew.tally.workers_lost == 0


@pytest.mark.parametrize("size", [10, 10_000_000])
def test_a_task_that_ended_in_time_is_not_late_because_the_loop_was_busy(size: int, tmp_path: Path) -> None:
    begun, cue = tmp_path / "begun", tmp_path / "cue"
    limit = 1.0
    with running(2) as crew:
        ready(crew)
        timed = submit(crew, begin_and_wait_or_double, str(begun), str(cue), bytes(size), timeout=limit)
        until(begun.exists)

        def keep_the_loop_busy(_: object) -> None:
            cue.touch()
            time.sleep(1.5 * limit)

        submit(crew, double, 1).add_done_callback(keep_the_loop_busy)
        assert len(timed.result(PATIENCE)) == 2 * size
        assert crew.tally.workers_lost == 0


@pytest.mark.parametrize(
    "header",
    [
        HEADER.pack(2**63, Kind.RESULT, 1, NO_KEY, 0.0),
        HEADER.pack(2**46, Kind.RESULT, 1, NO_KEY, 0.0),
        HEADER.pack(0, Kind.RESULT, 2**40, NO_KEY, 0.0),
        HEADER.pack(0, Kind.RESULT, 1, NO_KEY, 0.0) * 2,
    ],
    ids=["no length", "more than there is memory for", "of another call", "twice"],
)
def test_a_worker_that_talks_nonsense_is_lost_alone(header: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with running(1) as crew:
        with contextlib.suppress(WorkerLostError, UnpicklableError):  # said twice, it is an answer, without a value
            result(crew, write_to_sockets, header)
        assert result(crew, double, 2) == 4
        assert crew.tally.workers_lost == 1
    assert "is given up" in caplog.text


def submit_in_a_row(
    crew: Crew, folder: Path, numbers: list[int], limits: tuple[float | None, float | None] = (None, None)
) -> tuple[list[Future[int]], int]:
    """Submit calls that are taken for tiny to the one worker; return how many of them it has been sent."""
    ready(crew)
    (member,) = crew._members.values()
    with crew._lock:
        crew._dispatch._paces[crew.prepare(note_and_await).key] = 1e-4
        futures = [submit(crew, note_and_await, str(folder), numbers[0], timeout=limits[0])]
        member.head_since = math.inf  # however slow the machine is, it has only just begun
        futures += [submit(crew, note_and_await, str(folder), number, timeout=limits[1]) for number in numbers[1:]]
        return futures, len(member.flights)


def test_a_task_that_ends_just_when_it_is_terminated_takes_none_along(tmp_path: Path) -> None:
    """The kill would hit the one after it, which may have begun and would run twice."""
    with running() as crew:
        futures, sent = submit_in_a_row(crew, tmp_path, list(range(5)))
        assert sent > 1
        until(lambda: list(tmp_path.glob("0-*")))
        with crew._lock:  # so that the answer stays unread
            (tmp_path / "end of 0").touch()
            until(lambda: list(tmp_path.glob("1-*")))
            crew.terminate(futures[0])
        (tmp_path / "end of 1").touch()
        assert [future.result(PATIENCE) for future in futures] == list(range(5))
        assert [len(list(tmp_path.glob(f"{number}-*"))) for number in range(5)] == [1] * 5
        assert crew.tally.workers_lost == 0


def begin_and_fail(folder: str) -> None:
    """Leave a file for each run, await a cue, and fail for a passing reason."""
    Path(folder, f"run-{time.monotonic_ns()}").touch()
    until(Path(folder, "cue").exists)
    raise ConnectionError


def test_a_task_that_fails_just_when_it_is_terminated_does_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running() as crew:
        future = submit(crew, begin_and_fail, str(tmp_path), retries=3)
        until(lambda: list(tmp_path.glob("run-*")))
        (member,) = crew._members.values()
        receive, received = member.receive, threading.Event()

        def receive_and_tell() -> list[Message]:
            messages = receive()
            received.set()
            return messages

        monkeypatch.setattr(member, "receive", receive_and_tell)
        with crew._lock:  # so that nothing becomes of the answer yet
            (tmp_path / "cue").touch()
            assert received.wait(PATIENCE)
            assert crew.terminate(future)
        assert isinstance(future.exception(PATIENCE), TaskTerminatedError)
        assert crew.tally.retried == 0


def test_what_is_sent_behind_a_task_after_another_was_had_back_is_had_back_too(tmp_path: Path) -> None:
    """Else it would wait for that task's end, beside an idle worker."""
    with running(2) as crew:
        ready(crew)
        crew._dispatch._paces[crew.prepare(note_and_await).key] = 1e-4

        def sent(number: int) -> Future[int]:
            with crew._lock:
                future: Future[int] = submit(crew, note_and_await, str(tmp_path), number)
                for member in crew._members.values():
                    member.head_since = math.inf  # however slow the machine is, it has only just begun
            return future

        heads = [sent(0), sent(1)]
        until(lambda: len(list(tmp_path.iterdir())) == 2)
        behind = sent(2)
        assert behind.running()
        assert crew.terminate(behind)
        assert isinstance(behind.exception(PATIENCE), TaskTerminatedError)
        after = sent(3)
        assert after.running()
        with crew._lock:
            busy = next(
                number
                for member in crew._members.values()
                if len(member.flights) == 2
                for number, head in enumerate(heads)
                if member.flights[0].future is head
            )
            for member in crew._members.values():
                member.head_since = 0.0
        (tmp_path / f"end of {1 - busy}").touch()
        assert after.result(PATIENCE) == 3
        assert not heads[busy].done()
        (tmp_path / f"end of {busy}").touch()


def test_a_terminated_task_with_others_behind_it_is_stopped_alone(tmp_path: Path) -> None:
    """They come back first, and run elsewhere."""
    with running() as crew:
        futures, sent = submit_in_a_row(crew, tmp_path, [0, 2, 3, 4])
        assert sent > 1
        until(lambda: list(tmp_path.glob("0-*")))
        assert crew.terminate(futures[0])
        with pytest.raises(TaskTerminatedError):
            futures[0].result(PATIENCE)
        assert [future.result(PATIENCE) for future in futures[1:]] == [2, 3, 4]
        assert [len(list(tmp_path.glob(f"{number}-*"))) for number in (0, 2, 3, 4)] == [1] * 4


@pytest.mark.parametrize("limits", [(NEVER, None), (None, NEVER), (NEVER, NEVER)])
def test_nothing_is_sent_to_a_worker_beside_a_task_with_a_timeout(
    tmp_path: Path, limits: tuple[float | None, float | None]
) -> None:
    """Whose worker is killed when it is late: one that had begun by then would run twice."""
    with running() as crew:
        futures, sent = submit_in_a_row(crew, tmp_path, [0, *[2] * 5], limits)
        assert sent == 1
        (tmp_path / "end of 0").touch()
        assert [future.result(PATIENCE) for future in futures] == [0, *[2] * 5]


def test_a_task_that_waits_for_another_attempt_can_be_terminated() -> None:
    with running(1) as crew:
        policy = RetryPolicy(1, retry_if=lambda error: isinstance(error, ValueError), backoff=_ForAnHour())
        future = crew.submit(Task(crew.prepare(fail), (1,), policy=policy))
        until(lambda: crew.tally.retried == 1)
        assert crew.terminate(future)
        error = future.exception(PATIENCE)
        assert isinstance(error, TaskTerminatedError)
        assert error.__notes__ == ["after attempt 1: ValueError: bad number 1"]


def test_a_future_of_another_pool_is_refused() -> None:
    with running(1) as crew:
        foreign: Future[int] = Future()
        foreign.set_running_or_notify_cancel()
        with pytest.raises(ValueError, match="no task of this pool"):
            crew.terminate(foreign)


class _ForAnHour(Backoff):
    def delay(self, attempt: int, rng: random.Random | None = None) -> float:
        return 3600.0


# A worker's life


@pytest.mark.parametrize("options", [{"chunksize": 1}, {"chunksize": 2}, {"chunksize": 100}, {}], ids=str)
def test_a_worker_runs_no_more_tasks_than_it_may(options: dict[str, int]) -> None:
    with running(2, WorkerSetup(max_tasks=3)) as crew:
        pids = collections.Counter(mapped(crew, pid, range(12), **options))
        assert sum(pids.values()) == 12
        assert max(pids.values()) <= 3
        assert crew.tally.workers_lost == 0


def test_tasks_submitted_one_by_one_count_too() -> None:
    with running(1, WorkerSetup(max_tasks=2)) as crew:
        pids = [result(crew, pid) for _ in range(5)]
        assert [len(set(pids[:2])), len(set(pids[2:4])), len(set(pids))] == [1, 1, 3]


def test_a_worker_that_keeps_too_much_memory_is_replaced() -> None:
    with running(1, WorkerSetup(max_memory=150_000_000)) as crew:
        small = [result(crew, pid) for _ in range(3)]
        grown = result(crew, grow, 200_000_000)
        assert [*small, grown] == [grown] * 4
        until(lambda: crew.pids and grown not in crew.pids)
        assert result(crew, pid) != grown
        assert crew.tally.workers_lost == 0


def test_memory_growth_is_no_reason_to_replace_a_worker_unless_asked() -> None:
    with running(1) as crew:
        grown = result(crew, grow, 400_000_000)
        assert [result(crew, pid) for _ in range(3)] == [grown] * 3


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from Linux's wait4()")
def test_a_lost_worker_tells_its_peak_memory() -> None:
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # no lesser peak can be told from it
    with running(1) as crew:
        error = submit(crew, grow_and_die, own + 100_000_000).exception(PATIENCE)
        assert isinstance(error, WorkerLostError)
        assert error.peak_memory is not None
        assert own + 100_000_000 < error.peak_memory < own + 500_000_000
        assert "out of memory" in str(error)


def test_the_last_error_tells_of_the_attempts_before() -> None:
    with running(1) as crew:
        error = submit(crew, die, 7, retries=2).exception(PATIENCE)
        assert isinstance(error, WorkerLostError)
        [note] = error.__notes__
        assert note.startswith("after attempt 1: WorkerLostError: worker ")
        assert "; attempt 2: WorkerLostError: worker " in note
        assert error.attempts == 3


def test_a_retry_rule_that_raises_ends_the_task_with_its_own_error(caplog: pytest.LogCaptureFixture) -> None:
    def confused(error: BaseException) -> bool:
        raise LookupError(error)

    with running(1) as crew:
        policy = RetryPolicy(5, retry_if=confused)
        error = crew.submit(Task(crew.prepare(fail), (3,), policy=policy)).exception(PATIENCE)
        assert isinstance(error, ValueError)
        assert result(crew, double, 2) == 4
    assert "retry_if failed" in caplog.text


# What a task leaves behind, and what goes wrong around it


def spawn_and_wait(begun: str) -> None:
    """Start a program that inherits every descriptor it can, as ``os.system`` does, and wait for it."""
    sleeper = subprocess.Popen(["sleep", "600"], close_fds=False)
    Path(f"{begun}.new").write_text(str(sleeper.pid))
    Path(f"{begun}.new").rename(begun)
    sleeper.wait()


@pytest.mark.parametrize("way", ["timeout", "terminate"])
def test_a_program_that_a_task_has_started_does_not_keep_its_worker_from_ending(tmp_path: Path, way: str) -> None:
    begun = tmp_path / "begun"
    with running(1) as crew:
        ready(crew)
        future = submit(crew, spawn_and_wait, str(begun), timeout=6.0 if way == "timeout" else None)
        until(begun.exists)
        sleeper = int(begun.read_text())
        try:
            if way == "terminate":
                assert crew.terminate(future)
            kind = TaskTimeoutError if way == "timeout" else TaskTerminatedError
            assert isinstance(future.exception(PATIENCE), kind)
            assert result(crew, double, 2) == 4
            assert not is_gone(sleeper)
        finally:
            os.kill(sleeper, signal.SIGKILL)


def log_and_fork(_: object = None) -> int:
    """Fork while other threads log; the child logs too. Return how it ended."""
    stop = threading.Event()

    def talk() -> None:
        while not stop.is_set():
            logging.getLogger("task.noise").warning("x" * 1000)

    threads = [threading.Thread(target=talk) for _ in range(3)]
    for thread in threads:
        thread.start()
    codes = []
    for _ in range(5):
        child = os.fork()
        if child == 0:
            logging.getLogger("task.child").debug("hi")
            logging.getLogger("task.child").warning("hi")
            os._exit(0)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    stop.set()
    for thread in threads:
        thread.join()
    return max(codes)


def test_a_tasks_forked_child_can_log_while_others_do(caplog: pytest.LogCaptureFixture) -> None:
    with running(1, WorkerSetup(log_level=logging.WARNING)) as crew:
        assert result(crew, log_and_fork) == 0
    assert "task.noise" in {record.name for record in caplog.records}


def note_and_perhaps_die(folder: str, number: int) -> int:
    """Leave a mark for this run; take a while; the seventh kills its process, once."""
    (Path(folder) / f"{number}.{time.monotonic_ns()}").touch()
    time.sleep(0.1)
    if number == 7 and len(list(Path(folder).glob("7.*"))) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_of_a_lost_batch_only_what_had_no_result_yet_runs_again(tmp_path: Path) -> None:
    """Results of calls that take a while travel before their batch ends."""
    with running(1) as crew:
        call = functools.partial(note_and_perhaps_die, str(tmp_path))
        assert list(mapped(crew, call, range(10), chunksize=10)) == list(range(10))
    runs = collections.Counter(path.name.split(".")[0] for path in tmp_path.iterdir())
    assert runs == {str(number): 2 if number == 7 else 1 for number in range(10)}


def test_a_batchs_parts_come_together_in_order() -> None:
    with running(1) as crew:
        batch = crew.submit(Task(crew.prepare(fail_or_nap), list(range(9)), batch=True)).result(PATIENCE)
    assert [number for index, number in enumerate(batch.results) if index != 5] == [0, 1, 2, 3, 4, 6, 7, 8]
    assert {index: type(error) for index, error in batch.errors.items()} == {5: ValueError}
    assert batch.lost is None


class Unreadable:
    """Cannot be unpickled where it was not made.

    Args:
        error: What that raises.
    """

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def __reduce__(self) -> tuple[object, ...]:
        return rebuild, (os.getpid(), self.error)


def rebuild(pid: int, error: type[BaseException]) -> Unreadable:
    if pid != os.getpid():
        msg = "cannot be read here"
        raise error(msg)
    return Unreadable(error)


def nap_or_be_unreadable(error: type[BaseException], number: int) -> object:
    time.sleep(0.03)
    return Unreadable(error) if number == 3 else number


@pytest.mark.parametrize("error", [MemoryError, SystemExit])
def test_a_part_that_cannot_be_read_moves_no_result_to_another_item(error: type[BaseException]) -> None:
    call = functools.partial(nap_or_be_unreadable, error)
    with running(1) as crew:
        batch = crew.submit(Task(crew.prepare(call), list(range(10)), batch=True)).result(PATIENCE)
        assert batch.results == list(range(len(batch.results)))
        assert len(batch.results) <= 3
        results = LazyMap(crew, call, (range(10),), MapOptions(chunksize=10)).in_order()
        assert [next(results), next(results), next(results)] == [0, 1, 2]
        with pytest.raises(UnpicklableError, match="cannot be read here"):
            next(results)


def fail_or_nap(number: int) -> int:
    time.sleep(0.03)
    return fail(number) if number == 5 else number


def leave_a_thread(_: object = None) -> int:
    """Start a thread that keeps the process from ending by itself."""
    threading.Thread(target=time.sleep, args=(600,)).start()
    return os.getpid()


def test_a_worker_that_cannot_end_by_itself_is_ended() -> None:
    with running(1, WorkerSetup(max_tasks=1)) as crew:
        first = result(crew, leave_a_thread)
        until(lambda: is_gone(first))
        assert crew.tally.workers_lost == 0


def test_a_callback_that_exits_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    with running(1) as crew:
        future = submit(crew, slow_pid, 0.05)
        future.add_done_callback(lambda _: sys.exit(3))
        assert future.result(PATIENCE)
        assert result(crew, double, 3) == 6
    assert "callback" in caplog.text


def test_a_future_of_another_crew_is_left_alone() -> None:
    with running(1) as crew, running(1) as other:
        submit(other, time.sleep, 600)
        future = submit(other, double, 1)
        with pytest.raises(ValueError, match="no task of this pool"):
            crew.terminate(future)
        assert not future.cancelled()
        with pytest.raises(ValueError, match="no task of this pool"):
            crew.terminate(Future())
