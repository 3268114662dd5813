"""The engine for clusters: it owns futures, attempts and time; the cluster beneath it carries calls and tokens.

A ``Cluster`` is all that differs between Dask and Ray. It is given a bounded number of calls at a time, so that what is
not begun can still be cancelled, and tells what becomes of each; whether that is worth another attempt is decided here,
as on the crew. One thread, the loop, launches and settles; what the cluster tells comes to it through an inbox.
"""

from __future__ import annotations

import functools
import logging
import math
import queue
import secrets
import threading
import time
from typing import TYPE_CHECKING, Any

from shpool.engines.cluster import Lost, RemoteChannel, Unbegun
from shpool.engines.launches import Launch, Launches, Paces
from shpool.engines.lease_office import LeaseOffice
from shpool.engines.looping import LoopingEngine
from shpool.engines.messages import NO_KEY, Kind, Message
from shpool.engines.outpost import note_home
from shpool.engines.packing import dump_setup
from shpool.engines.sealed import Answer, Call
from shpool.engines.setup import WorkerSetup
from shpool.errors import ClusterUnreachableError, TaskError, TaskTerminatedError, TaskTimeoutError, WorkerLostError
from shpool.gate import Gate
from shpool.logs import deliver

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from shpool.channels import TokenChannel
    from shpool.engines.cluster import Cluster
    from shpool.engines.flight import Flight

logger = logging.getLogger(__name__)

_LARGE_FUNCTION = 16 * 1024  # bytes from which a function goes to a worker only when it asks for it
_LONGEST_NAP = 3600.0  # s
_STOP_WITHIN = 3.0  # s for all that runs, when the pool ends at once


class RemoteEngine(LoopingEngine):
    """Run tasks on a cluster.

    Args:
        cluster: Where they run.
        setup: How each outpost begins.
        most: Most tasks to run at once; None for as many as the cluster can.
        gate: What all requests go through, leased from here; None for one of its own, without limits.
    """

    largest_batch = None
    singles = 64  # some of what goes ahead in one bunch
    hears = False

    def __init__(
        self,
        cluster: Cluster,
        setup: WorkerSetup | None = None,
        most: int | None = None,
        gate: Gate | None = None,
    ) -> None:
        super().__init__("shpool-remote")
        self.pool = secrets.token_hex(8)
        self._cluster = cluster
        self._setup = dump_setup(setup or WorkerSetup())
        self._most = math.inf if most is None else most
        self._channel = RemoteChannel(cluster.push)
        self._gate, self._owns_gate = gate or Gate(), gate is None
        self._office = LeaseOffice(self._gate, cluster.post)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()  # run by the loop, one by one
        self._launching = threading.Lock()  # held while calls go to the cluster; never waited for under the other lock

        # Guarded by the lock.
        self._aloft = Launches()
        self._wanted: set[int] = set()  # numbers of flights whose worker has asked for the function
        self._paces = Paces()

    @property
    def channel(self) -> TokenChannel:
        """The way to the outposts."""
        return self._channel

    @property
    def workers(self) -> int:
        """How many tasks can run at once; 0 while there is no worker, and tasks wait for one."""
        return int(min(self._most, self._cluster.capacity))

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
        self._start_loop()

    def _take_in(self, flight: Flight) -> None:
        """Send a flight if nothing is under way, else leave that to the loop; wake that only if there is room."""
        with self._lock:
            is_ready = self._open(flight)
            is_idle = not self._aloft and self._launching.acquire(blocking=False)
            try:
                calls = self._next_calls() if is_idle else []
                head = self._dispatch.head
                if not is_ready or flight.task.timeout is not None or (head and self._fits(head, len(self._aloft))):
                    self._ring()
            except BaseException:
                if is_idle:
                    self._launching.release()
                raise
        if is_idle:
            try:
                self._launch(calls)
            finally:
                self._launching.release()

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

    def _stop_running(self, future: Future[Any]) -> bool:
        """Have it stopped; if it runs beside others in one process, it is left to run and no longer heeded."""
        found = self._aloft.find(future)
        if found is not None:
            number, launch = found
            self._inbox.put(functools.partial(self._end_early, number, TaskTerminatedError(launch.label)))
        return found is not None

    def _stop_waiting(self, flight: Flight) -> None:
        error = TaskTerminatedError(flight.task.label)
        self._inbox.put(functools.partial(self._ledger.settle, flight, error))

    def _ring(self) -> None:
        if not self._is_rung:
            self._is_rung = True
            self._inbox.put(self._heed_the_bell)

    def _next_calls(self) -> list[Call]:
        """Take what may go to the cluster now.

        Ahead of what runs it goes in bunches: a message costs a cluster ten times what one more call in it does.
        """
        calls: list[Call] = []
        before = len(self._aloft)
        while (flight := self._dispatch.head) is not None and self._fits(flight, before):
            self._dispatch.take_head()
            if not flight.is_running and not flight.future.set_running_or_notify_cancel():
                self._ledger.forget(flight)
                continue
            flight.is_running = True
            calls.append(self._call_of(flight))
        return calls

    def _fits(self, flight: Flight, before: int) -> bool:
        """Tell whether one more call may go, in a bunch before which there were so many at the cluster."""
        workers, aloft = max(1, self.workers), len(self._aloft)  # one waits there for the first worker
        if flight.task.timeout is not None and aloft >= workers:
            return False  # its time must not pass while it waits at a worker
        ahead = self._paces.ahead(flight)
        return before < workers * (1 + ahead / 4) and aloft < workers + int(workers * ahead)

    def _call_of(self, flight: Flight) -> Call:
        """Note a launch; return what travels."""
        number, packed, timeout = next(self._numbers), flight.function, flight.task.timeout
        limit = math.inf if timeout is None or self._cluster.tells_begin else time.monotonic() + timeout
        self._aloft.add(number, Launch(flight, limit))
        is_sent = len(packed.pickled) < _LARGE_FUNCTION or flight.number in self._wanted
        self._wanted.discard(flight.number)
        function = packed.pickled if is_sent else b""
        return Call(self.pool, number, flight.kind, packed.key, function, bytes(flight.payload), timeout is not None)

    def _launch(self, calls: Sequence[Call]) -> None:
        """Send calls; the cluster's lock is held, the other is not."""
        try:
            if calls:
                self._cluster.launch(calls)
        except Exception as exc:  # noqa: BLE001 - border: the cluster's own code
            for call in calls:
                self.ended(call.number, exc)

    # What follows runs in the loop's thread.

    def _turn(self) -> None:
        with self._launching:
            with self._lock:
                calls = self._next_calls()
            self._launch(calls)
        self._empty_inbox()
        self._mind_the_clock()

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
            moments = list(self._aloft.limits()) if self._ledger.timed else []
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
            late = self._aloft.late(now) if self._ledger.timed else []
        for number, launch in late:
            self._end_early(number, TaskTimeoutError(launch.label, launch.flight.task.timeout or 0.0))

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
            logger.warning("%s runs on, unheeded: its worker runs other tasks too and is not stopped", launch.label)
            launch.is_unheeded = True
            self._ledger.take_loss(launch.flight, error)

    def _take_end(self, number: int, outcome: bytes | BaseException) -> None:
        with self._lock:
            launch = self._aloft.take_out(number)
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
            self._ledger.settle(flight, self._fail_unfit(answer.payload))
        elif answer.kind == Kind.FUNCTION:
            with self._lock:
                self._wanted.add(flight.number)
                self._dispatch.put_back([flight])
        else:
            with self._lock:
                self._paces.note(flight, answer.seconds)
            self._ledger.take_answer(flight, Message(answer.kind, 0, NO_KEY, answer.seconds, answer.payload))

    def _wind_up(self) -> None:
        """Settle what is left, leave the cluster."""
        with self._lock:
            launches = self._aloft.clear()
        if self._is_killing and self._fatal is None:
            give_up = time.monotonic() + _STOP_WITHIN
            for number in launches:
                if time.monotonic() < give_up:
                    self._cluster.stop(number)
        if launches:
            self._cluster.cancel(list(launches))
        for launch in launches.values():
            if not launch.is_unheeded:
                self._ledger.settle(launch.flight, self._ending_of(launch.flight))
        with self._lock:
            waiting = self._dispatch.clear()
            self._has_ended = True
        for flight in waiting:
            self._ledger.fail(flight, self._ending_of(flight))
        try:
            self._cluster.close()
        except Exception:  # border: the cluster's own code
            logger.exception("the cluster could not be left in order")
        self._close_gate()

    def _close_gate(self) -> None:
        self._office.close()
        if self._owns_gate:
            self._gate.close()
