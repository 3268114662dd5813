"""The crew: worker processes of this machine, each on a lifeline of its own.

loky starts the processes; it does not carry the tasks. Whatever happens to one worker is between it and this
module: a crash costs one worker and one task. One thread, the loop, reads all lifelines and the clock; ``submit``
sends from the caller's thread when a worker is idle, so a lone task takes one hop.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import select
import threading
import time
from typing import TYPE_CHECKING, Any

from shpool.board import anonymous_board
from shpool.channels import BoardChannel
from shpool.engines.dispatch import STUCK_AFTER
from shpool.engines.launcher import Launcher, import_all
from shpool.engines.looping import LoopingEngine
from shpool.engines.messages import ANSWERS, Kind
from shpool.engines.packing import dump_setup
from shpool.engines.setup import WorkerSetup
from shpool.errors import TaskTerminatedError, TaskTimeoutError, WorkerLostError, WorkerStartError
from shpool.importing import free_import_lock, signals_wait
from shpool.logs import deliver
from shpool.pickling import load
from shpool.waiting import wait_in_glances

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from concurrent.futures import Future

    from shpool.channels import TokenChannel
    from shpool.engines.flight import Flight, PackedFunction
    from shpool.engines.member import Member
    from shpool.engines.messages import Message
    from shpool.gate import Gate

logger = logging.getLogger(__name__)

_STOP_WITHIN = 5.0  # s a worker may take to end by itself
_LONGEST_NAP = 3600.0  # s
_RETURN_WITHIN = 0.2  # s a worker that is to be killed may take to give back what it has not begun
_ASK_AGAIN = 0.005  # s after which a worker is asked again for what has arrived since
_IMPORTS_WITHIN = 0.3  # s the loop may still take for them once all is to stop


class Crew(LoopingEngine):
    """The loky engine.

    Args:
        workers: Number of worker processes.
        setup: How each of them begins.
        blanked: Returns the environment variables they must not inherit; asked at each launch.
        gate: What they all go through; None for a gate of its own in each.
    """

    singles = 4
    hears = True

    def __init__(
        self,
        workers: int,
        setup: WorkerSetup | None = None,
        *,
        blanked: Callable[[], Sequence[str]] = tuple,
        gate: Gate | None = None,
    ) -> None:
        super().__init__("shpool-crew")
        self.workers = workers
        self._setup = setup or WorkerSetup()
        pickled_setup = dump_setup(self._setup)  # first, as it may fail, and nothing would close the board then
        self._board = anonymous_board()
        self._channel = BoardChannel(self._board)
        self._launcher = Launcher(self._board, self._setup, pickled_setup, blanked, gate)
        self._imports = threading.Event()  # the loop has imported all that it launches workers with
        self._is_given_up = False  # the loop never gets out of its imports
        self._poll = select.poll()  # the loop's alone
        self._bell_in = self._bell_out = -1  # a pipe once started

        # Guarded by the lock.
        self._members: dict[int, Member] = {}  # by the lifeline's descriptor
        self._stopped: list[Flight] = []  # by terminate(), not running any more, to be settled by the loop

    @property
    def channel(self) -> TokenChannel:
        """The anonymous board all workers read."""
        return self._channel

    @property
    def largest_batch(self) -> int | None:
        """As many calls as a worker may make in its life."""
        return self._setup.max_tasks

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that are there now."""
        with self._lock:
            return [member.pid for member in self._members.values()]

    def start(self) -> None:
        """Launch the workers from the loop's thread; returns at once."""
        self._bell_in, self._bell_out = os.pipe()
        os.set_blocking(self._bell_in, False)
        os.set_blocking(self._bell_out, False)
        self._start_loop()

    def prepare(self, fn: Callable[..., Any], *, serves_many: bool = False) -> PackedFunction:
        """Pickle a function; see ``Engine.prepare``.

        Raises:
            UnpicklableError: It cannot be pickled.
        """
        # Before there is a task: with the main thread at its end the imports would fail. But not in the middle of an
        # import of this very thread, as the handler of a signal: the loop may be waiting for that.
        if not self._imports.is_set() and free_import_lock():
            wait_in_glances(self._imports.wait)
        return super().prepare(fn, serves_many=serves_many)

    def recall(self, future: Future[Any]) -> None:
        """Ask a running task for what it has not begun; what waits behind it at its worker comes back as well."""
        with self._lock:
            for member in self._members.values():
                if member.flights and member.flights[0].future is future:
                    member.recall()

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the loop's end; once all is to stop, not for a loop that does not get out of its imports.

        ^C may have left a lock of the import system taken (see ``importing``), be it that of one module, which none
        can free. The loop has launched no worker then, so there is nothing to end.
        """
        if self._is_killing and self._thread.ident is not None:
            free_import_lock()
            if not self._imports.wait(_IMPORTS_WITHIN):
                self._give_up()
        return self._is_given_up or super().join(timeout)

    def let_go(self) -> None:
        """In a forked child, where the loop does not run: be over, and let nobody wait for its imports."""
        self._imports = threading.Event()  # a thread that is not in the child may hold the lock of the other one
        self._imports.set()
        super().let_go()

    def _give_up(self) -> None:
        """End all but the loop, unless it has got out of its imports meanwhile."""
        with self._lock:  # so that the loop waits, if it ever comes to its own end; to end twice is harmless
            if self._imports.is_set():
                return
            self._is_given_up = self._has_ended = True
            self._imports.set()  # for those who wait to submit: they are told of the end
            self.on_end()
            self._channel.close()

    def _take_in(self, flight: Flight) -> None:
        """Send a flight to an idle worker, or leave it queued."""
        with self._lock:
            if not self._open(flight):
                self._ring()
            may_go = not self._dispatch.is_saturated
        ring = flight.task.timeout is not None or self._setup.max_tasks is not None  # there is something to watch
        if may_go or ring:
            # ^C in the middle would leave half a message behind, or one that is sent and counts as unsent.
            with signals_wait():
                with self._lock:
                    loaded = self._assign(fill=False)
                self._send(loaded, ring=ring)

    def _close_copies(self) -> None:
        """Close a forked child's copies of the descriptors; with them open, workers would outlive their parent."""
        for member in self._members.values():
            member.let_go()
        os.close(self._bell_in)
        os.close(self._bell_out)
        self._channel.close()

    # What follows runs under the lock, decides and sends; it calls nobody's code.

    def _stop_running(self, future: Future[Any]) -> bool:
        for member in self._members.values():
            for flight in member.flights:
                if flight.future is future:
                    self._stop(flight, member)
                    return True
        return False

    def _stop_waiting(self, flight: Flight) -> None:
        self._stopped.append(flight)
        self._ring()

    def _assign(self, *, fill: bool) -> set[Member]:
        """Load workers that have room with queued flights; return those that have something to send now."""
        loaded: set[Member] = set()
        while pair := self._dispatch.next_pair(self._members.values(), fill=fill):
            flight, member = pair
            if not flight.is_running and not flight.future.set_running_or_notify_cancel():
                self._ledger.forget(flight)
                continue
            flight.is_running = True
            if not member.flights:
                member.head_since = time.monotonic()
            member.load(flight)
            loaded.add(member)
        return loaded

    def _stop(self, flight: Flight, member: Member) -> None:
        """Kill the worker if it runs this flight, else ask for the flight back; it may begin meanwhile."""
        flight.is_unwanted = True
        if member.flights[0] is flight:
            self._stop_head_if_unwanted(member)
        else:
            member.holds_unwanted = True
            member.recall()

    def _stop_head_if_unwanted(self, member: Member) -> None:
        """Kill the worker of an unwanted flight; first have back what waits behind that, as it may end this moment."""
        if not member.flights or not member.flights[0].is_unwanted:
            return
        if len(member.flights) == 1:
            self._condemn_if_unwanted(member)
        else:
            member.recall()
            member.stops_before = min(member.stops_before, time.monotonic() + _RETURN_WITHIN)
            self._ring()

    @staticmethod
    def _condemn_if_unwanted(member: Member) -> None:
        member.stops_before = math.inf
        if member.flights and member.flights[0].is_unwanted and member.doom is None:
            head = member.flights[0]
            member.condemn(head, TaskTerminatedError(head.task.label))

    def _put_back(self, flights: Iterable[Flight]) -> None:
        """Queue what a worker has not begun."""
        self._stopped += [flight for flight in flights if flight.is_unwanted]
        self._dispatch.put_back(flight for flight in flights if not flight.is_unwanted)

    def _ring(self) -> None:
        if not self._is_rung and not self._has_ended and self._bell_out >= 0:
            self._is_rung = True
            with contextlib.suppress(BlockingIOError):
                os.write(self._bell_out, b"!")

    # What follows runs outside the lock: system calls let other threads in, and these would stop at it.

    def _send(self, loaded: set[Member], *, ring: bool = False) -> None:
        """Send what was assigned; what does not fit is left to the loop."""
        for member in loaded:
            member.flush()
            ring |= member.has_unsent
        if ring:
            with self._lock:
                self._ring()

    # What follows runs in the loop's thread.

    def _begin(self) -> None:
        self._poll.register(self._bell_in, select.POLLIN)
        import_all()  # here, so that the login need not wait for it
        with self._lock:
            self._imports.set()

    def _turn(self) -> None:
        self._launch_one_missing()
        self._read_what_came(self._poll.poll(self._nap_ms()))
        self._mind_the_clock()

    def _launch_one_missing(self) -> None:
        """Launch a worker if one is missing; one at a time, so that those already there are heard meanwhile."""
        staying = sum(not member.is_leaving for member in list(self._members.values()))
        if staying >= self.workers or (self._is_closing and staying >= self._ledger.pending):
            return
        if time.monotonic() < self._launcher.not_before:
            return
        try:
            with _launching:
                member = self._launcher.launch()
                with self._lock:
                    self._members[member.fileno()] = member
        except OSError as exc:
            if not self._members and not self._launcher.has_launched:
                self._fail_all(WorkerStartError(str(exc)))
            return
        self._poll.register(member.fileno(), select.POLLIN)

    def _nap_ms(self) -> float:
        """Return how long the loop may sleep, in milliseconds, if nothing comes."""
        with self._lock:
            moments = [_LONGEST_NAP + (now := time.monotonic())]
            if self._dispatch.next_due is not None:
                moments.append(self._dispatch.next_due)
            if sum(not member.is_leaving for member in self._members.values()) < self.workers and not self._is_closing:
                moments.append(self._launcher.not_before)
            if self._ledger.timed:
                moments += [limit for limit, _ in self._limits()]
            moments += [min(member.leaves_before, member.stops_before) for member in self._members.values()]
            moments += [_recalled_at(member) for member in self._waited_for()]
        return max(0.0, min(moments) - now) * 1000 + (min(moments) > now)

    def _waited_for(self) -> list[Member]:
        """Return the workers at which flights wait that an idle one could run, or nobody wants; under the lock."""
        members = self._members.values()
        is_idle = not self._dispatch and any(member.is_usable and not member.flights for member in members)
        return [
            member
            for member in members
            if (is_idle or member.holds_unwanted)
            and len(member.flights) > 1
            and member.recalled_behind != member.flights[0].number
        ]

    def _limits(self) -> list[tuple[float, Member]]:
        """Return when each running task with a timeout must be stopped; under the lock."""
        return [
            (max(member.head_since + member.flights[0].task.timeout, member.sends_until), member)
            for member in self._members.values()
            if member.flights and member.doom is None and member.flights[0].task.timeout is not None
        ]

    def _read_what_came(self, events: list[tuple[int, int]]) -> None:
        for descriptor, event in events:
            if descriptor == self._bell_in:
                with self._lock:
                    os.read(self._bell_in, 64)
                    self._is_rung = False
                    self._watch_unsent()
                continue
            member = self._members[descriptor]
            if event & select.POLLOUT:
                member.flush()
            messages = self._receive(member)
            with self._lock:
                answers = [(self._land(member, message), message) for message in messages]
                self._dispatch.note_room()
                loaded = self._assign(fill=True)
                self._dismiss_spent()
            self._send(loaded)
            if member.has_unsent or event & select.POLLOUT:
                self._watch(member)
            for flight, message in answers:
                self._take(member, flight, message)
                self._launcher.landing.free(message.payload)
            if member.is_gone:
                self._lose(member)

    @staticmethod
    def _receive(member: Member) -> list[Message]:
        try:
            return member.receive()
        except (MemoryError, OverflowError) as exc:  # a result too large for this process, or no length at all
            logger.error("worker %d is given up: what it sends cannot be taken in: %r", member.pid, exc)  # noqa: TRY400
            member.break_off()
            return []

    def _watch_unsent(self) -> None:
        for member in self._members.values():
            if member.has_unsent:
                self._watch(member)

    def _watch(self, member: Member) -> None:
        self._poll.modify(member.fileno(), select.POLLIN | (select.POLLOUT if member.has_unsent else 0))

    def _land(self, member: Member, message: Message) -> Flight | None:
        """Take a message's effect on the worker's state; under the lock. Returns the flight it is about."""
        if member.is_broken:
            return None
        if message.kind in ANSWERS:
            return self._land_answer(member, message)
        if message.kind == Kind.READY:
            member.is_ready = True
            self._launcher.note_ready()
        if message.kind == Kind.RETURNED:
            self._put_back(member.take_back(load(message.payload)))
            self._condemn_if_unwanted(member)
            if len(member.flights) > 1:  # the rest of it was still on its way
                member.recalled_behind, member.recall_from = 0, time.monotonic() + _ASK_AGAIN
        if message.kind == Kind.GREW:
            member.is_retiring = True
        if message.kind in {Kind.LOG, Kind.PART, Kind.TOLD}:
            return member.flights[0] if member.flights else None
        return None

    def _land_answer(self, member: Member, message: Message) -> Flight | None:
        if not member.flights or member.flights[0].number != message.number:  # rather no result than another task's
            logger.error(
                "worker %d is given up: it answered call %d, which it was not running", member.pid, message.number
            )
            member.break_off()
            return None
        flight = member.flights.popleft()
        member.head_since, member.stops_before = time.monotonic(), math.inf
        self._stop_head_if_unwanted(member)
        if not flight.task.batch:
            self._dispatch.note_pace(flight, message.seconds)
        return flight

    def _take(self, member: Member, flight: Flight | None, message: Message) -> None:
        """Act on a message; outside the lock."""
        if flight is not None and message.kind in ANSWERS:
            self._ledger.take_answer(flight, message)
        elif message.kind == Kind.LOG:
            deliver(message.payload, member.pid, flight.task.label if flight is not None else None)
        elif flight is not None and message.kind == Kind.PART:
            self._ledger.take_part(flight, message)
        elif flight is not None and message.kind == Kind.TOLD:
            self._ledger.take_told(flight, message)
        elif message.kind == Kind.REFUSED:
            self.on_refused(message.number)
        elif message.kind == Kind.UNFIT:
            self._fail_unfit(message.payload)
        elif message.kind == Kind.GREW:
            logger.info("worker %d has grown to %.0f MB and is replaced", member.pid, message.number / 1e6)
        elif message.kind == Kind.READY:
            logger.debug("worker %d is ready", member.pid)

    def _lose(self, member: Member) -> None:
        """A worker is gone: its running task has failed, what waited behind it goes back to the queue's head."""
        self._poll.unregister(member.fileno())
        with self._lock:
            del self._members[member.fileno()]
            head = member.flights.popleft() if member.flights and not self._may_go_again(member) else None
            self._put_back(member.flights)
            member.flights.clear()
            self.tally.workers_lost += not member.is_leaving
        exitcode = member.reap()
        level = logging.DEBUG if member.is_leaving else logging.WARNING
        logger.log(level, "worker %d ended with exit code %s", member.pid, exitcode)
        in_vain = None if member.is_ready else self._launcher.note_false_start(exitcode)
        if in_vain is not None:
            self._fail_all(in_vain)
        if head is None:
            return
        if member.doom is not None and member.doom.flight is head:
            self._ledger.take_loss(head, member.doom.error)
        else:  # even if it was hit in the place of a doomed one that had just ended: it may have begun
            error = WorkerLostError(head.task.label, member.pid, exitcode, member.peak_memory, len(head.history) + 1)
            self._ledger.take_loss(head, error)

    @staticmethod
    def _may_go_again(member: Member) -> bool:
        """Tell whether the lost worker had not begun its task; once for each, lest it is the reading that kills."""
        head = member.flights[0]
        is_unread = not member.has_delivered(head) or (member.died_unread and len(member.flights) == 1)
        is_doomed = member.doom is not None and member.doom.flight is head
        if not is_unread or is_doomed or head.was_unread:
            return False
        head.was_unread = True
        return True

    def _mind_the_clock(self) -> None:
        """Stop tasks that ran too long; queue those whose pause is over."""
        now = time.monotonic()
        with self._lock:
            self._dispatch.release_due(now)
            self._dispatch.note_room()
            loaded = self._assign(fill=True)
            late = [member for limit, member in self._limits() if limit <= now] if self._ledger.timed else []
            for member in late:
                flight = member.flights[0]
                if member.may_have_answered(flight):  # it is not the task that is late, but the loop
                    continue
                member.condemn(flight, TaskTimeoutError(flight.task.label, flight.task.timeout or 0.0))
            for member in self._waited_for():
                if _recalled_at(member) <= now:
                    member.recall()
            for member in self._members.values():
                if member.stops_before <= now:
                    self._condemn_if_unwanted(member)
            self._dismiss_spent()
            stopped, self._stopped = self._stopped, []
        for flight in stopped:
            self._ledger.settle(flight, TaskTerminatedError(flight.task.label))
        self._send(loaded)
        self._watch_unsent()

    def _dismiss_spent(self) -> None:
        """Tell workers that have done their share to go; under the lock."""
        for member in self._members.values():
            if member.is_retiring and not member.flights and not member.is_leaving:
                member.dismiss(_STOP_WITHIN)
            elif member.leaves_before <= time.monotonic():  # a thread that a task has left keeps it
                member.kill()

    def _fail_all(self, error: Exception) -> None:
        """The pool is beyond help: all its futures get this error, and so does every later submit."""
        super()._fail_all(error)
        self._drop_waiting(lambda _: error)

    def _drop_waiting(self, error_for: Callable[[Flight], Exception]) -> None:
        """Settle what is queued or delayed."""
        with self._lock:
            flights = self._dispatch.clear()
            flights += self._stopped
            self._stopped = []
        for flight in flights:
            self._ledger.fail(flight, error_for(flight))

    def _stop_members(self) -> None:
        """End the workers: by request if they are idle, by SIGKILL if not, or if they take too long."""
        with self._lock:
            members = list(self._members.values())
            self._members.clear()
        running = [flight for member in members for flight in member.flights]
        for member in members:
            if member.flights or not member.is_ready:
                member.kill()
            else:
                member.dismiss(_STOP_WITHIN)
                member.flush()
        for flight in running:
            self._ledger.settle(flight, self._ending_of(flight))
        self._drop_waiting(self._ending_of)  # a worker lost meanwhile has put its own back into the queue
        give_up = time.monotonic() + _STOP_WITHIN
        for member in members:
            self._poll.unregister(member.fileno())
            if not member.await_end(max(0.0, give_up - time.monotonic())):
                logger.warning("worker %d did not end within %.0f s and is killed", member.pid, _STOP_WITHIN)
                member.kill()
            member.reap()

    def _wind_up(self) -> None:
        try:
            self._stop_members()
        finally:
            with self._lock:
                self._has_ended = True
                os.close(self._bell_in)
                os.close(self._bell_out)
            self._imports.set()


def _recalled_at(member: Member) -> float:
    """Return when what waits at a worker is to be had back for an idle one: at once behind a batch, which lasts."""
    since = member.head_since + (0.0 if member.flights[0].task.batch else STUCK_AFTER)
    return max(since, member.recall_from)


_launching = threading.RLock()  # held at a worker's launch and at a fork: a child knows of every lifeline it got
os.register_at_fork(before=_launching.acquire, after_in_parent=_launching.release, after_in_child=_launching.release)
