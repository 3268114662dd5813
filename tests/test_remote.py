"""The engine for clusters, on one that does what the test says: what becomes of calls, whatever happens to them."""

from __future__ import annotations

import functools
import threading
from concurrent.futures import wait
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
from patience import NEVER, PATIENCE, in_time, until
from pool_tasks import add, double, echo, fail

from shpool.engines.base import BatchResult, Task
from shpool.engines.cluster import Lost, Unbegun
from shpool.engines.messages import Kind
from shpool.engines.outpost import Outpost
from shpool.engines.parcels import Parcel, TokenCell
from shpool.engines.remote import RemoteEngine
from shpool.engines.sealed import Answer
from shpool.engines.slot import Slot
from shpool.errors import (
    ClusterError,
    ClusterUnreachableError,
    InitializerError,
    TaskTerminatedError,
    TaskTimeoutError,
    WorkerLostError,
)
from shpool.retry import Backoff, RetryPolicy
from shpool.tokens import Posting, Token, boot_time
from shpool.worker import dump_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from shpool.engines.cluster import Events
    from shpool.engines.sealed import Call

ONCE_MORE = RetryPolicy(1, Backoff(base=0.001, cap=0.002))


class HeldCluster:
    """Keeps calls until the test lets them run, in its own process, or tells another end."""

    tells_begin = True

    def __init__(self, capacity: int = 2) -> None:
        self.capacity = capacity
        self.calls: list[Call] = []
        self.bunches: list[int] = []
        self.cancelled: list[int] = []
        self.stopped: list[int] = []
        self.parcels: list[Parcel] = []
        self.posted: list[tuple[str | None, bytes]] = []
        self.can_stop = True
        self.is_open = False
        self.refuses: Exception | None = None

    def open(self, pool: str, setup: bytes, events: Events) -> None:
        if self.refuses is not None:
            raise self.refuses
        self.events = events
        self._outpost = Outpost(pool, setup, TokenCell(), lambda _: None)
        self.is_open = True

    def launch(self, calls: Sequence[Call]) -> None:
        if self.refuses is not None:
            raise self.refuses
        self.bunches.append(len(calls))
        self.calls += calls

    def cancel(self, numbers: Sequence[int]) -> None:
        self.cancelled += numbers

    def stop(self, number: int) -> bool:
        self.stopped.append(number)
        if self.can_stop:
            self.events.ended(number, Lost())
        return self.can_stop

    def push(self, parcel: Parcel) -> None:
        self.parcels.append(parcel)

    def post(self, outpost: str | None, note: bytes) -> None:
        self.posted.append((outpost, note))

    def close(self) -> None:
        self.is_open = False

    def run(self, count: int = 1) -> None:
        """Let the oldest calls run."""
        until(lambda: len(self.calls) >= count)
        for _ in range(count):
            call = self.calls.pop(0)
            self.events.ended(call.number, self._outpost.run(call, self.events.begun))

    def end(self, outcome: bytes | BaseException) -> None:
        """Let the oldest call end otherwise."""
        until(lambda: self.calls)
        self.events.ended(self.calls.pop(0).number, outcome)


@pytest.fixture
def cluster() -> HeldCluster:
    return HeldCluster()


@pytest.fixture
def engine(cluster: HeldCluster) -> Iterator[RemoteEngine]:
    engine = RemoteEngine(cluster)
    engine.start()
    yield engine
    engine.shutdown(kill=True)
    assert engine.join(PATIENCE)
    assert not cluster.is_open


def task(engine: RemoteEngine, fn: Callable[..., Any], *args: Any, **words: Any) -> Task:
    return Task(engine.prepare(fn), args, label=fn.__qualname__, **words)


def raise_passing() -> NoReturn:
    raise _PassingError


class _PassingError(ConnectionError):
    retry_after = NEVER


def test_a_call_comes_back_as_its_futures_result(engine: RemoteEngine, cluster: HeldCluster) -> None:
    futures = [engine.submit(task(engine, double, 4)), engine.submit(task(engine, fail, 7))]
    cluster.run(2)
    assert futures[0].result(PATIENCE) == 8
    with pytest.raises(ValueError, match="bad number 7"):
        futures[1].result(PATIENCE)
    until(lambda: engine.backlog == 0)
    assert (engine.tally.done, engine.tally.failed) == (1, 1)


def test_no_more_calls_than_workers_go_out_before_the_pace_is_known(engine: RemoteEngine, cluster: HeldCluster) -> None:
    futures = [engine.submit(task(engine, double, number)) for number in range(20)]
    until(lambda: len(cluster.calls) == 2)
    assert [future.running() for future in futures] == [True] * 2 + [False] * 18
    assert futures[19].cancel()
    cluster.run(2)
    until(lambda: len(cluster.calls) == 17)
    cluster.run(17)
    assert [future.result(PATIENCE) for future in futures[:19]] == list(range(0, 38, 2))
    assert max(cluster.bunches) > 4


def test_a_slow_function_gets_no_calls_ahead(engine: RemoteEngine, cluster: HeldCluster) -> None:
    futures = [engine.submit(task(engine, double, number)) for number in range(6)]
    until(lambda: len(cluster.calls) == 2)
    cluster.end(Answer(Kind.RESULT, 5.0, 1, _pickled(0)).to_bytes())
    assert futures[0].result(PATIENCE) == 0
    until(lambda: len(cluster.calls) == 2)
    assert not futures[3].running()


def test_calls_go_ahead_by_their_own_functions_pace(engine: RemoteEngine, cluster: HeldCluster) -> None:
    """What others take says nothing about a function that has not run yet."""
    known = engine.submit(task(engine, double, 1))
    cluster.run()
    assert known.result(PATIENCE) == 2
    others = [engine.submit(task(engine, add, number, 1)) for number in range(6)]
    until(lambda: len(cluster.calls) == 2)
    cluster.end(Answer(Kind.RESULT, 5.0, 1, _pickled(0)).to_bytes())
    until(others[2].running)
    assert not others[3].running()
    for _ in range(5):
        cluster.run()
    assert [future.result(PATIENCE) for future in others] == [0, 2, 3, 4, 5, 6]
    many = [engine.submit(task(engine, double, number)) for number in range(20)]
    until(many[19].running)
    cluster.run(20)
    wait(many, PATIENCE)


def test_a_lost_worker_is_an_error_or_another_attempt(engine: RemoteEngine, cluster: HeldCluster) -> None:
    once = engine.submit(task(engine, double, 1))
    cluster.end(Lost(4711, -9))
    with pytest.raises(WorkerLostError, match=r"worker 4711 died while running double \(signal 9\)"):
        once.result(PATIENCE)
    twice = engine.submit(task(engine, double, 1, policy=ONCE_MORE))
    cluster.end(Lost())
    cluster.run()
    assert twice.result(PATIENCE) == 2
    assert engine.tally.retried == 1


def test_a_lost_batch_is_a_result_that_says_so(engine: RemoteEngine, cluster: HeldCluster) -> None:
    future = engine.submit(Task(engine.prepare(double), [1, 2], label="double", batch=True))
    cluster.end(Lost(4711))
    outcome = future.result(PATIENCE)
    assert isinstance(outcome, BatchResult)
    assert isinstance(outcome.lost, WorkerLostError)


def test_what_did_not_begin_goes_again_and_costs_no_attempt(engine: RemoteEngine, cluster: HeldCluster) -> None:
    future = engine.submit(task(engine, double, 3))
    for _ in range(3):
        cluster.end(Unbegun())
    cluster.run()
    assert future.result(PATIENCE) == 6
    assert engine.tally.retried == 0


def test_a_large_function_travels_to_those_who_lack_it(engine: RemoteEngine, cluster: HeldCluster) -> None:
    ballast = bytes(50_000)
    fn = engine.prepare(functools.partial(_size, ballast))
    sizes = []
    for _ in range(2):
        future = engine.submit(Task(fn, (), label="size"))
        until(lambda: cluster.calls)
        sizes.append(len(cluster.calls[0].function))
        cluster.run()
        if sizes[-1] == 0 and len(sizes) == 1:
            until(lambda: cluster.calls)
            sizes.append(len(cluster.calls[0].function))
            cluster.run()
        assert future.result(PATIENCE) == 50_000
    assert [size > 0 for size in sizes] == [False, True, False]


def _size(ballast: bytes) -> int:
    return len(ballast)


def _pickled(value: object) -> bytes:
    import pickle

    return pickle.dumps(value)


# Time


def test_a_timed_call_waits_for_a_free_worker_and_its_time_for_the_beginning(
    engine: RemoteEngine, cluster: HeldCluster
) -> None:
    first = [engine.submit(task(engine, double, number, timeout=0.05)) for number in range(3)]
    until(lambda: len(cluster.calls) == 2)
    assert not first[2].running()
    threading.Event().wait(0.1)  # longer than their timeout: none has begun
    assert not any(future.done() for future in first)
    cluster.events.begun(cluster.calls[0].number)
    with pytest.raises(TaskTimeoutError):
        first[0].result(PATIENCE)
    assert cluster.stopped == [cluster.calls[0].number]


def test_a_call_that_cannot_be_stopped_is_no_longer_heeded(engine: RemoteEngine, cluster: HeldCluster) -> None:
    """Its worker stays taken until it has really ended."""
    cluster.can_stop = False
    late = engine.submit(task(engine, double, 1, timeout=0.01))
    until(lambda: cluster.calls)
    cluster.events.begun(cluster.calls[0].number)
    with pytest.raises(TaskTimeoutError):
        late.result(PATIENCE)
    others = [engine.submit(task(engine, double, number)) for number in range(2)]
    until(lambda: len(cluster.calls) == 2)
    assert [future.running() for future in others] == [True, False]
    cluster.run()
    until(others[1].running)


def test_an_answer_that_comes_before_the_end_wins(engine: RemoteEngine, cluster: HeldCluster) -> None:
    future = engine.submit(task(engine, double, 4, timeout=NEVER))
    cluster.run()
    assert future.result(PATIENCE) == 8
    assert not engine.terminate(future)


def test_terminate_stops_what_runs_and_drops_what_waits(engine: RemoteEngine, cluster: HeldCluster) -> None:
    futures = [engine.submit(task(engine, double, number)) for number in range(3)]
    until(futures[1].running)
    assert engine.terminate(futures[2])
    assert futures[2].cancelled()
    assert engine.terminate(futures[0])
    with pytest.raises(TaskTerminatedError):
        futures[0].result(PATIENCE)
    with pytest.raises(ValueError, match="of no task of this pool"):
        engine.terminate(type(futures[0])())


# Ends


def test_what_was_abandoned_is_dropped_from_the_queue_and_gets_no_other_attempt(
    engine: RemoteEngine, cluster: HeldCluster
) -> None:
    """A map was closed: of its calls one waits for its next attempt, two run, and one waits for a worker."""
    slots = [Slot() for _ in range(4)]
    for slot in slots:
        engine.submit(task(engine, raise_passing, policy=RetryPolicy(3), timeout=NEVER), slot)  # one a worker
    cluster.run()
    until(lambda: engine.tally.retried == 1 and len(cluster.calls) == 2)
    for slot in slots:
        slot.abandon()
    engine.drop_abandoned()
    until(lambda: engine.backlog == 2)
    assert [slot.cancelled() for slot in slots] == [False, False, False, True]
    cluster.run(2)
    until(lambda: engine.backlog == 0)
    assert engine.tally.retried == 1


def test_a_cluster_that_is_gone_ends_all_with_its_error(engine: RemoteEngine, cluster: HeldCluster) -> None:
    futures = [engine.submit(task(engine, double, number)) for number in range(5)]
    until(futures[0].running)
    cluster.events.failed(ClusterUnreachableError("here", "gone"))
    assert {type(future.exception(PATIENCE)) for future in futures} == {ClusterUnreachableError}
    assert engine.join(PATIENCE)
    with pytest.raises(ClusterUnreachableError):
        engine.submit(task(engine, double, 1))


def test_a_cluster_that_cannot_be_opened_is_told_at_the_start(cluster: HeldCluster) -> None:
    cluster.refuses = ClusterError("here", "closed")
    with pytest.raises(ClusterError, match="closed"):
        RemoteEngine(cluster).start()


def test_an_error_of_the_launch_is_the_calls_own(engine: RemoteEngine, cluster: HeldCluster) -> None:
    cluster.refuses = OSError("no way there")
    with pytest.raises(OSError, match="no way there"):
        engine.submit(task(engine, double, 1)).result(PATIENCE)
    cluster.refuses = None
    future = engine.submit(task(engine, double, 1))
    cluster.run()
    assert future.result(PATIENCE) == 2


def test_an_initializer_that_fails_ends_the_engine(engine: RemoteEngine, cluster: HeldCluster) -> None:
    future = engine.submit(task(engine, double, 1))
    cluster.end(Answer(Kind.UNFIT, 0.0, 1, dump_error(OSError("no licence"))).to_bytes())
    with pytest.raises(InitializerError, match="no licence"):
        future.result(PATIENCE)
    assert isinstance(engine.failure, InitializerError)


def test_shutdown_waits_for_what_was_submitted(engine: RemoteEngine, cluster: HeldCluster) -> None:
    futures = [engine.submit(task(engine, double, number)) for number in range(5)]
    engine.shutdown()
    assert not engine.join(0.0)
    cluster.run(2)
    cluster.run(3)
    assert engine.join(PATIENCE)
    assert [future.result() for future in futures] == [0, 2, 4, 6, 8]
    assert not cluster.is_open


def test_killing_ends_what_runs_too(engine: RemoteEngine, cluster: HeldCluster) -> None:
    futures = [engine.submit(task(engine, double, number)) for number in range(3)]
    until(futures[1].running)
    engine.shutdown(cancel=True, kill=True)
    assert in_time(engine.join)
    wait(futures, PATIENCE)
    assert [type(future.exception()) for future in futures[:2]] == [TaskTerminatedError] * 2
    assert futures[2].cancelled()
    assert sorted(cluster.cancelled) == sorted(cluster.stopped)


def test_arguments_that_cannot_be_pickled_are_the_futures_error(engine: RemoteEngine, cluster: HeldCluster) -> None:
    with pytest.raises(Exception, match="the task's arguments cannot travel"):
        engine.submit(task(engine, echo, threading.Lock())).result(PATIENCE)
    assert not cluster.calls


def test_a_callback_may_submit(engine: RemoteEngine, cluster: HeldCluster) -> None:
    again: list[Any] = []
    first = engine.submit(task(engine, add, 1, 2))
    first.add_done_callback(lambda future: again.append(engine.submit(task(engine, double, future.result()))))
    cluster.run()
    until(lambda: again)
    cluster.run()
    assert again[0].result(PATIENCE) == 6


def test_each_posting_goes_out_as_a_parcel_with_a_higher_number(engine: RemoteEngine, cluster: HeldCluster) -> None:
    token = Token("invented-token", 2e9, boot_time() + 60, 60)
    for generation in (1, 2):
        engine.channel.publish(Posting(token.numbered(generation)))
    assert [parcel.number for parcel in cluster.parcels] == [1, 2]
    assert 50 < cluster.parcels[1].remaining <= 60
    assert engine.channel.reader().read()[0] == 2
