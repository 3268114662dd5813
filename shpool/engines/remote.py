"""The engine for clusters: it owns futures, attempts and time; the cluster beneath it carries calls and tokens.

A ``Cluster`` is all that differs between Dask and Ray. It is given a bounded number of calls at a time, so that what is
not begun can still be cancelled, and tells what becomes of each; whether that is worth another attempt is decided here,
as on the crew. One thread, the loop, launches and settles; what the cluster tells comes to it through an inbox.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import os
import queue
import secrets
import threading
import time
import weakref
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from shpool.engines.dispatch import Dispatch
from shpool.engines.lease_office import LeaseOffice
from shpool.engines.ledger import Ledger
from shpool.engines.member import Flight
from shpool.engines.outpost import Answer, Call, Parcel, TokenCell, note_home
from shpool.engines.packing import pack_arguments, pack_function
from shpool.engines.serve import NO_KEY, Kind, Message, dump_setup
from shpool.engines.setup import WorkerSetup
from shpool.errors import (
    ClusterUnreachableError,
    InitializerError,
    TaskError,
    TaskTerminatedError,
    TaskTimeoutError,
    UnpicklableError,
    WorkerLostError,
)
from shpool.gate import Gate
from shpool.logs import deliver
from shpool.worker import load_error

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shpool.channels import TokenChannel
    from shpool.engines.base import Tally, Task
    from shpool.engines.member import PackedFunction
    from shpool.tokens import Posting

logger = logging.getLogger(__name__)

_AHEAD = (
    0.1  # s of work to have at each worker beyond what it runs: a cluster takes milliseconds to bring the next call
)
_MOST_AHEAD = 64  # calls at a worker beyond the one it runs
_PACE_MEMORY = 0.2  # share of the newest call's time in the running mean
_LARGE_FUNCTION = 16 * 1024  # bytes from which a function goes to a worker only when it asks for it
_LONGEST_NAP = 3600.0  # s


class Lost(Exception):  # noqa: N818 - how a call ended, not an error anybody raises
    """The worker that ran a call is gone, and the call with it.

    Args:
        pid: The worker's process id, 0 when unknown.
        exitcode: Its exit code, None when unknown.
    """

    def __init__(self, pid: int = 0, exitcode: int | None = None) -> None:
        super().__init__(pid, exitcode)
        self.pid = pid
        self.exitcode = exitcode


class Unbegun(Exception):  # noqa: N818 - as above
    """A call did not begin, and no other will come of this launch; it may go again."""


class Events(Protocol):
    """What a cluster tells the engine: from any thread, and none of it waits."""

    def ended(self, number: int, outcome: bytes | BaseException) -> None:
        """A call has ended: with the outpost's answer, ``Lost``, ``Unbegun``, or an error of the cluster."""

    def begun(self, number: int) -> None:
        """A timed call has begun."""

    def refused(self, generation: int) -> None:
        """A worker's server has refused this generation of the token."""

    def changed(self) -> None:
        """There is more or less room than before."""

    def lost_worker(self, pid: int, detail: str = "") -> None:
        """A worker that this pool uses is gone unexpectedly."""

    def joined(self, outpost: str) -> None:
        """There is an outpost, known to the cluster by that name; may be told repeatedly."""

    def asked(self, outpost: str, note: bytes) -> None:
        """An outpost has a note for the gate."""

    def left(self, outpost: str) -> None:
        """An outpost is gone; a cluster that does not know tells nothing."""

    def failed(self, error: Exception) -> None:
        """The cluster is gone for good."""


class Cluster(Protocol):
    """Where calls run. All but ``push``, ``post`` and ``capacity`` is called from one thread at a time.

    Attributes:
        tells_begin: It tells when timed calls begin; else their time counts from the launch.
    """

    tells_begin: bool

    def open(self, pool: str, setup: bytes, events: Events) -> None:
        """Connect, and prepare to hold an ``Outpost`` of this pool in each worker process that there is or will be.

        Raises:
            ClusterError: It cannot be used; after 10 s at most.
        """

    @property
    def capacity(self) -> int:
        """How many calls can run at once now."""

    def launch(self, calls: Sequence[Call]) -> None:
        """Send calls to run; each is told of by ``ended``, once."""

    def cancel(self, numbers: Sequence[int]) -> None:
        """Drop calls, for which nobody waits any more; one that has begun may run on."""

    def stop(self, number: int) -> bool:
        """Kill what runs a call, unless others would be harmed. Tell whether ``Lost`` will come of it."""

    def push(self, parcel: Parcel) -> None:
        """Bring a parcel to every outpost there is, and keep it for those to come; must not wait for them."""

    def post(self, outpost: str | None, note: bytes) -> None:
        """Bring a note to the gate of one outpost, or of all there are; must not wait, and may fail in silence."""

    def close(self) -> None:
        """Leave the cluster as it was found, outposts closed; harmless when repeated, or when never opened."""


class RemoteChannel:
    """Publish to a cluster; the parent's own readers have a cell here."""

    report_poll = math.inf

    def __init__(self, push: Callable[[Parcel], None]) -> None:
        self._push = push
        self._numbers = itertools.count(1)
        self._cell = TokenCell()

    def publish(self, posting: Posting) -> None:
        """Show a posting to all readers."""
        parcel = Parcel.of(posting, next(self._numbers))
        self._cell.take(parcel)
        self._push(parcel)

    def newest_report(self) -> int:
        """Return 0: reports come by the cluster's own means."""
        return 0

    def reader(self) -> TokenCell:
        """Return a view for this process."""
        return self._cell

    def close(self) -> None:
        """End sharing; the outposts are closed with the cluster."""
        self._cell.close()


@dataclass(eq=False)
class _Launch:
    """A flight at the cluster.

    Attributes:
        flight: What flies.
        limit: When it has taken too long, by ``time.monotonic``.
        doom: How it is to end once its worker is gone, which was asked for.
        is_unheeded: Its future has its end, and the call could not be stopped.
    """

    flight: Flight
    limit: float = math.inf
    doom: TaskError | None = None
    is_unheeded: bool = False


class RemoteEngine:
    """Run tasks on a cluster.

    Args:
        cluster: Where they run.
        setup: How each outpost begins.
        most: Most tasks to run at once; None for as many as the cluster can.
        gate: What all requests go through, leased from here; None for one of its own, without limits.
    """

    largest_batch = None
    singles = 64  # some of what goes ahead in one bunch

    def __init__(
        self,
        cluster: Cluster,
        setup: WorkerSetup | None = None,
        most: int | None = None,
        gate: Gate | None = None,
    ) -> None:
        self.on_refused: Callable[[int], None] = lambda _: None
        self.on_end: Callable[[], None] = lambda: None
        self.pool = secrets.token_hex(8)
        self._cluster = cluster
        self._setup = dump_setup(setup or WorkerSetup())
        self._most = math.inf if most is None else most
        self._channel = RemoteChannel(cluster.push)
        self._gate, self._owns_gate = gate or Gate(), gate is None
        self._office = LeaseOffice(self._gate, cluster.post)
        self._numbers = itertools.count(1)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()  # run by the loop, one by one
        self._is_over_for_good = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="shpool-remote", daemon=True)
        self._launching = threading.Lock()  # held while calls go to the cluster; never waited for under the other lock

        # Guards all that follows; as the crew's, it can be taken twice.
        self._lock = threading.RLock()
        self._dispatch = Dispatch()
        self._ledger = Ledger(self._lock, self._dispatch, self._ring)
        self._aloft: dict[int, _Launch] = {}
        self._wanted: set[int] = set()  # numbers of flights whose worker has asked for the function
        self._pace: float | None = None  # seconds that a call or a batch takes at its worker
        self._is_closing = self._is_killing = self._has_ended = self._is_rung = False
        self._fatal: Exception | None = None

    @property
    def channel(self) -> TokenChannel:
        """The way to the outposts."""
        return self._channel

    @property
    def tally(self) -> Tally:
        """What it has counted."""
        return self._ledger.tally

    @property
    def workers(self) -> int:
        """How many tasks can run at once; at least 1, as there may be workers later."""
        return max(1, int(min(self._most, self._cluster.capacity)))

    @property
    def has_ended(self) -> bool:
        """Tell whether the loop is over."""
        return self._has_ended

    @property
    def backlog(self) -> int:
        """How many tasks are not settled yet."""
        return self._ledger.pending

    @property
    def failure(self) -> Exception | None:
        """Why no task can run any more; None while they can."""
        return self._fatal

    def start(self) -> None:
        """Connect to the cluster.

        Raises:
            ClusterError: It cannot be used.
        """
        note_home(self.pool)
        try:
            self._cluster.open(self.pool, self._setup, self)
        except BaseException:
            self._close_gate()
            raise
        self._office.start()
        _started.add(self)
        self._thread.start()

    def prepare(self, fn: Callable[..., Any]) -> PackedFunction:
        """Pickle a function.

        Raises:
            UnpicklableError: It cannot be pickled.
        """
        return pack_function(fn)

    def submit(self, task: Task, future: Future[Any] | None = None) -> Future[Any]:
        """Queue a task; the loop sends it."""
        future = Future() if future is None else future
        try:
            kind, payload = pack_arguments(task)
        except UnpicklableError as exc:
            future.set_running_or_notify_cancel()
            future.set_exception(exc)
            return future
        flight = Flight(task, next(self._numbers), task.fn, kind, payload, future)
        future._shpool_engine = self  # type: ignore[attr-defined]  # noqa: SLF001 - so that terminate() knows its own
        with self._lock:
            self._refuse_if_over()
            self._ledger.open(flight)
            if task.history:
                flight.history.extend(task.history)
                self._ledger.wait(flight, task.delay)
            else:
                self._dispatch.add(flight)
            is_idle = not self._aloft and self._launching.acquire(blocking=False)
            calls = self._next_calls() if is_idle else []
            if not calls or task.timeout is not None or self._dispatch:
                self._ring()
        if is_idle:
            try:
                self._launch(calls)
            finally:
                self._launching.release()
        return future

    def terminate(self, future: Future[Any]) -> bool:
        """Stop one task; if it runs beside others in one process, it is left to run and no longer heeded."""
        if getattr(future, "_shpool_engine", None) is not self:
            msg = "this future is of no task of this pool"
            raise ValueError(msg)
        if future.cancel():
            return True
        with self._lock:
            if future.done():
                return False
            for number, launch in self._aloft.items():
                if launch.flight.future is future:
                    self._inbox.put(functools.partial(self._end_early, number, TaskTerminatedError(_label(launch))))
                    return True
            waiting = self._dispatch.take_out(future)
        if waiting is None:
            return False  # it is getting its end at this moment
        self._inbox.put(functools.partial(self._ledger.settle, waiting, TaskTerminatedError(waiting.task.label)))
        return True

    def shutdown(self, *, cancel: bool = False, kill: bool = False) -> None:
        """Take no more tasks; see ``Engine.shutdown``. Returns at once."""
        with self._lock:
            self._is_closing = True
            self._is_killing |= kill
            self._ledger.is_closed |= kill
            dropped = self._dispatch.clear() if cancel or kill else []
            self._ring()
        for flight in dropped:
            self._ledger.drop(flight, TaskTerminatedError(flight.task.label))

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the loop's end."""
        if self._thread.ident is None or threading.current_thread() is self._thread:
            return self._thread.ident is None
        if self._is_over_for_good.wait(timeout):
            self._thread.join(timeout)
        return self._is_over_for_good.is_set()

    def let_go(self) -> None:
        """In a forked child, where no thread of the parent's runs: be over."""
        self._lock = threading.RLock()  # a thread that is not in the child may hold the other one
        text = "the pool belongs to the process that started it; a forked child needs one of its own"
        self._fatal, self._has_ended = RuntimeError(text), True

    # What the cluster tells; see ``Events``.

    def ended(self, number: int, outcome: bytes | BaseException) -> None:
        """Take note of a call's end."""
        self._inbox.put(functools.partial(self._take_end, number, outcome))

    def begun(self, number: int) -> None:
        """Let a timed call's time count from now."""
        self._inbox.put(functools.partial(self._set_limit, number, time.monotonic()))

    def refused(self, generation: int) -> None:
        """Pass on that a server refused the token."""
        self._inbox.put(functools.partial(self.on_refused, generation))

    def changed(self) -> None:
        """Look whether more can be launched."""
        with self._lock:
            self._ring()

    def lost_worker(self, pid: int, detail: str = "") -> None:
        """Count a worker that was lost; in the loop, as logging would leave its mark on a cluster's own thread."""
        self._inbox.put(functools.partial(self._count_loss, pid, detail))

    def joined(self, outpost: str) -> None:
        """Tell a new outpost of the gate."""
        self._office.joined(outpost)

    def asked(self, outpost: str, note: bytes) -> None:
        """Let the gate's office answer."""
        self._office.asked(outpost, note)

    def left(self, outpost: str) -> None:
        """Take back what an outpost has leased."""
        self._office.left(outpost)

    def failed(self, error: Exception) -> None:
        """End: no task can run any more."""
        self._inbox.put(functools.partial(self._fail_all, error))

    # What follows runs under the lock, and calls nobody's code.

    def _refuse_if_over(self) -> None:
        if self._fatal is not None:
            raise self._fatal
        if self._is_closing or self._has_ended:
            msg = "cannot schedule new futures after shutdown"
            raise RuntimeError(msg)

    def _ring(self) -> None:
        if not self._is_rung:
            self._is_rung = True
            self._inbox.put(self._heed_the_bell)

    def _room(self) -> int:
        """Return how many more calls may go to the cluster now.

        Ahead of what runs they go in bunches: a message costs a cluster ten times what one more call in it does.
        """
        workers, aloft = self.workers, len(self._aloft)
        ahead = 0.0 if self._pace is None else min(_MOST_AHEAD, _AHEAD / max(self._pace, 1e-6))
        return workers + int(workers * ahead) - aloft if aloft < workers * (1 + ahead / 4) else 0

    def _next_calls(self) -> list[Call]:
        calls: list[Call] = []
        room, free = self._room(), self.workers - len(self._aloft)
        while (flight := self._dispatch.head) is not None and len(calls) < room:
            if flight.task.timeout is not None and len(calls) >= free:
                break  # its time must not pass while it waits at a worker
            self._dispatch.take_head()
            if not flight.is_running and not flight.future.set_running_or_notify_cancel():
                self._ledger.forget(flight)
                continue
            flight.is_running = True
            calls.append(self._call_of(flight))
        return calls

    def _call_of(self, flight: Flight) -> Call:
        """Note a launch; return what travels."""
        number, packed, timeout = next(self._numbers), flight.function, flight.task.timeout
        limit = math.inf if timeout is None or self._cluster.tells_begin else time.monotonic() + timeout
        self._aloft[number] = _Launch(flight, limit)
        is_sent = len(packed.pickled) < _LARGE_FUNCTION or flight.number in self._wanted
        self._wanted.discard(flight.number)
        function = packed.pickled if is_sent else b""
        return Call(self.pool, number, flight.kind, packed.key, function, flight.payload, timeout is not None)

    def _launch(self, calls: Sequence[Call]) -> None:
        """Send calls; the cluster's lock is held, the other is not."""
        try:
            if calls:
                self._cluster.launch(calls)
        except Exception as exc:  # noqa: BLE001 - border: the cluster's own code
            for call in calls:
                self.ended(call.number, exc)

    # What follows runs in the loop's thread.

    def _loop(self) -> None:
        """Serve until it is over; whatever happens, no future is left waiting."""
        try:
            while not self._is_over():
                with self._launching:
                    with self._lock:
                        calls = self._next_calls()
                    self._launch(calls)
                self._empty_inbox()
                self._mind_the_clock()
        except BaseException as exc:
            logger.exception("the pool's loop has failed")
            self._fail_all(RuntimeError(f"the pool has failed: {type(exc).__name__}: {exc}"))
            raise
        finally:
            self._end()

    def _is_over(self) -> bool:
        with self._lock:
            return self._fatal is not None or self._is_killing or (self._is_closing and not self._ledger.pending)

    def _empty_inbox(self) -> None:
        """Wait for something to do, or for a moment when there will be; then do all there is."""
        try:
            self._inbox.get(timeout=self._nap())()
            while True:
                self._inbox.get_nowait()()
        except queue.Empty:
            pass

    def _nap(self) -> float:
        with self._lock:
            moments = [launch.limit for launch in self._aloft.values()] if self._ledger.timed else []
            if self._dispatch.next_due is not None:
                moments.append(self._dispatch.next_due)
        return min(_LONGEST_NAP, max(0.0, min(moments, default=math.inf) - time.monotonic()))

    def _count_loss(self, pid: int, detail: str) -> None:
        with self._lock:
            self.tally.workers_lost += 1
        logger.warning("worker %s is lost%s", pid or "process", f": {detail}" if detail else "")

    def _heed_the_bell(self) -> None:
        with self._lock:
            self._is_rung = False

    def _mind_the_clock(self) -> None:
        now = time.monotonic()
        with self._lock:
            self._dispatch.release_due(now)
            late = (
                [(number, launch) for number, launch in self._aloft.items() if launch.limit <= now]
                if self._ledger.timed
                else []
            )
        for number, launch in late:
            self._end_early(number, TaskTimeoutError(_label(launch), launch.flight.task.timeout or 0.0))

    def _set_limit(self, number: int, begun: float) -> None:
        launch = self._aloft.get(number)
        if launch is not None and launch.flight.task.timeout is not None and not launch.is_unheeded:
            launch.limit = begun + launch.flight.task.timeout

    def _end_early(self, number: int, error: TaskError) -> None:
        """Stop a call that is under way; where that would harm others, only its future ends."""
        launch = self._aloft.get(number)
        if launch is None or launch.doom is not None:
            return
        launch.doom, launch.limit = error, math.inf
        if not self._cluster.stop(number):
            logger.warning("%s runs on, unheeded: its worker runs other tasks too and is not stopped", _label(launch))
            launch.is_unheeded = True
            self._ledger.take_loss(launch.flight, error)

    def _take_end(self, number: int, outcome: bytes | BaseException) -> None:
        with self._lock:
            launch = self._aloft.pop(number, None)
        if launch is None or launch.is_unheeded:
            return
        flight = launch.flight
        if isinstance(outcome, bytes):
            self._take_answer(flight, Answer.from_bytes(outcome))
        elif launch.doom is not None:
            self._ledger.take_loss(flight, launch.doom)
        elif isinstance(outcome, Lost):
            attempts = len(flight.history) + 1
            self._ledger.take_loss(
                flight, WorkerLostError(flight.task.label, outcome.pid, outcome.exitcode, None, attempts)
            )
        elif isinstance(outcome, Unbegun):
            with self._lock:
                self._dispatch.put_back([flight])
        else:
            if isinstance(outcome, ClusterUnreachableError):
                self._fail_all(outcome)
            self._ledger.settle(flight, outcome)

    def _take_answer(self, flight: Flight, answer: Answer) -> None:
        for record in answer.records:
            deliver(record, answer.pid, flight.task.label)
        if answer.kind == Kind.UNFIT:
            error = load_error(answer.payload)
            unfit = InitializerError(f"{type(error).__name__}: {error}")
            unfit.__cause__ = error.__cause__
            self._ledger.settle(flight, unfit)
            self._fail_all(unfit)
        elif answer.kind == Kind.FUNCTION:
            with self._lock:
                self._wanted.add(flight.number)
                self._dispatch.put_back([flight])
        else:
            known = answer.seconds if self._pace is None else self._pace
            self._pace = known + _PACE_MEMORY * (answer.seconds - known)
            self._ledger.take_answer(flight, Message(answer.kind, 0, NO_KEY, answer.seconds, answer.payload))

    def _fail_all(self, error: Exception) -> None:
        """No task can run any more: all futures get this error, and so does every later submit."""
        with self._lock:
            self._fatal = error

    def _end(self) -> None:
        """Settle what is left, leave the cluster."""
        with self._lock:
            launches, self._aloft = self._aloft, {}
        if self._is_killing and self._fatal is None:
            for number in launches:
                self._cluster.stop(number)
        if launches:
            self._cluster.cancel(list(launches))
        for launch in launches.values():
            if not launch.is_unheeded:
                self._ledger.settle(launch.flight, self._fatal or TaskTerminatedError(_label(launch)))
        with self._lock:
            waiting = self._dispatch.clear()
            self._has_ended = True
        for flight in waiting:
            self._ledger.fail(flight, self._fatal or TaskTerminatedError(flight.task.label))
        try:
            self._cluster.close()
        except Exception:  # border: the cluster's own code
            logger.exception("the cluster could not be left in order")
        self._close_gate()
        self.on_end()
        self._channel.close()
        self._is_over_for_good.set()

    def _close_gate(self) -> None:
        self._office.close()
        if self._owns_gate:
            self._gate.close()


def _label(launch: _Launch) -> str:
    return launch.flight.task.label


def _let_go_all() -> None:
    for engine in list(_started):
        engine.let_go()


_started: weakref.WeakSet[RemoteEngine] = weakref.WeakSet()
os.register_at_fork(after_in_child=_let_go_all)
