"""One worker of the crew, seen from the parent: its process, its lifeline, and what is under way to it."""

from __future__ import annotations

import collections
import contextlib
import errno
import math
import os
import select
import socket
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

from shpool.engines.birth import start_process
from shpool.engines.keeping import KeptFunctions
from shpool.engines.lifeline import LifelineHandle
from shpool.engines.messages import Kind, Landing, MessageBuffer, encode, encode_pieces
from shpool.engines.serve import work
from shpool.pickling import LARGE

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from shpool.board import Board
    from shpool.engines.birth import WorkerProcess
    from shpool.engines.flight import Flight
    from shpool.engines.messages import Message
    from shpool.engines.setup import WorkerSetup
    from shpool.errors import TaskError
    from shpool.gate import Gate
    from shpool.pickling import Piece

_REAP_WITHIN = 2.0  # s between the end of a lifeline and the end of its process
_ENDED = frozenset({errno.EPIPE, errno.ECONNRESET, errno.EBADF})
_SENDS_WITHIN = 1.0  # s without a byte of a large answer
_SOCKET_BUFFER = 2**20  # bytes; a message of a megabyte then takes one system call
_READS_IN_A_ROW = 8  # from one worker, while others wait


class Doom(NamedTuple):
    """Why a worker was killed: to stop this flight, which then ends with this error."""

    flight: Flight
    error: TaskError


class Member:
    """A worker process and the parent's end of its lifeline.

    Not safe for threads by itself, but for ``flush``: the crew calls it under its lock, and ``receive`` from its loop.

    Attributes:
        flights: What was sent and is not answered, oldest first; the first one is running.
        is_ready: The worker has been initialised.
        recalled_behind: Number of the flight behind which the worker was last asked for what it has not begun.
        recall_from: When it may be asked again, by ``time.monotonic``.
        holds_unwanted: ``terminate()`` was called for a flight that waits there.
        is_broken: What it sends makes no sense, or finds no room.
        is_gone: The worker's end of the lifeline is closed, and all that it said was read.
        doom: Set when the process was killed for the sake of one flight.
        stops_before: When it is, at the latest, while what waits behind that flight is had back; by ``time.monotonic``.
        head_since: Boot of the first flight's run, by ``time.monotonic``.
        calls_left: How many calls may still be sent to it.
        is_retiring: It gets no more tasks and is to end.
        is_leaving: It was told to end.
        leaves_before: When it is killed if it has not, by ``time.monotonic``.
        died_unread: The worker ended before it had read all that was sent: it has not begun the last flight.
    """

    def __init__(
        self,
        process: WorkerProcess,
        end: socket.socket,
        recall: int,
        landing: Landing,
        most_calls: int | None,
    ) -> None:
        self._process = process
        self._end = end
        self._recall = recall  # the descriptor that a byte is written to
        self._incoming = MessageBuffer(landing)
        self._outbox: collections.deque[Piece] = collections.deque()
        self._sending = threading.Lock()  # guards _unsent: what was taken out of the outbox and is not sent
        self._unsent = memoryview(b"")
        self._bytes_put = self._bytes_sent = 0  # ever
        self.pid: int = process.pid
        self.flights: collections.deque[Flight] = collections.deque()
        self._functions = KeptFunctions()
        self.is_ready = False
        self.is_gone = False
        self._is_deaf = False  # it has closed its end; what it said before may still be unread
        self.recalled_behind = 0
        self.recall_from = 0.0
        self.holds_unwanted = False
        self.is_broken = False
        self._heard_at = -math.inf  # when bytes last came
        self._looked_for = 0  # number of the flight that was late, and whose answer was looked for
        self.doom: Doom | None = None
        self.stops_before = math.inf
        self.head_since = 0.0
        self.died_unread = False
        self.calls_left = math.inf if most_calls is None else most_calls
        self.is_retiring = self.is_leaving = False
        self.leaves_before = math.inf

    @classmethod
    def launch(  # noqa: PLR0913, PLR0917 - all that a worker is made of
        cls,
        board: Board,
        setup: WorkerSetup,
        pickled_setup: bytes,
        blanked: Sequence[str],
        landing: Landing,
        gate: Gate | None = None,
    ) -> Member:
        """Start a worker process; ``landing`` is where the crew's loop lets messages arrive.

        Raises:
            OSError: The system starts no more processes or opens no more descriptors.
        """
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):  # as much of it as the system allows
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)
        recalled, recall = os.pipe()
        try:
            os.set_blocking(recall, False)
            admission = None if gate is None else gate.handle()
            args = (LifelineHandle(theirs, recalled), board.handle(), pickled_setup, tuple(blanked), admission)
            process = start_process(work, args, {**setup.env, **dict.fromkeys(blanked, "")})
        except BaseException:
            ours.close()
            os.close(recall)
            raise
        finally:
            theirs.close()
            os.close(recalled)
        ours.setblocking(False)
        return cls(process, ours, recall, landing, setup.max_tasks)

    def fileno(self) -> int:
        """Return the lifeline's descriptor, for ``poll``."""
        return self._end.fileno()

    @property
    def is_usable(self) -> bool:
        """Tell whether tasks may be sent here."""
        is_open = not (self._is_deaf or self.is_gone or self.is_retiring)
        return self.is_ready and is_open and self.doom is None

    @property
    def is_full(self) -> bool:
        """Tell whether the worker's socket was full at the last send."""
        return bool(self._unsent)

    @property
    def has_unsent(self) -> bool:
        """Tell whether ``flush`` has something to send."""
        return bool(self._unsent or self._outbox)

    def load(self, flight: Flight) -> None:
        """Put the messages that start a flight, the function included where this worker lacks it."""
        self.flights.append(flight)
        self.recalled_behind = 0  # what is new there may be had back as well
        self.calls_left -= flight.task.calls
        self.is_retiring = self.calls_left < 1
        packed = flight.function
        if not self._functions.has(packed.key):
            for key in self._functions.add(packed.key, len(packed.pickled)):
                self.put(encode(Kind.FORGET, key=key))
            self.put(*encode_pieces(Kind.FUNCTION, 0, packed.pickled, key=packed.key))
        self.put(*encode_pieces(flight.kind, flight.number, flight.payload, key=packed.key))
        flight.ends_at = self._bytes_put

    def put(self, *data: Piece) -> None:
        """Hold messages, or parts of one, ready for ``flush``; they go in the order of these calls."""
        self._outbox.extend(data)
        self._bytes_put += sum(map(len, data))

    def has_delivered(self, flight: Flight) -> bool:
        """Tell whether all of a flight's message was sent; else the worker cannot have begun it."""
        return flight.ends_at <= self._bytes_sent

    def flush(self) -> None:
        """Send as much as fits, from any thread; never blocks, so two full sockets cannot wait for each other."""
        with self._sending:
            while self._unsent or self._outbox:
                try:
                    if not self._unsent:
                        self._unsent = memoryview(self._next_piece())
                    sent = self._end.send(self._unsent)
                except OSError as exc:
                    # Full, and the loop goes on later; or closed, and the loop is about to read the end of the stream.
                    self._is_deaf = exc.errno in _ENDED
                    return
                self._unsent = self._unsent[sent:]
                self._bytes_sent += sent

    def _next_piece(self) -> Piece:
        """Return as many messages as one system call should send, without copying a large one."""
        first = self._outbox.popleft()
        if not self._outbox or len(first) >= LARGE:
            return first
        pieces, size = [first], len(first)
        while self._outbox and size + len(self._outbox[0]) < LARGE:
            pieces.append(self._outbox.popleft())
            size += len(pieces[-1])
        return b"".join(pieces)

    def receive(self) -> list[Message]:
        """Return the messages that have arrived; sets ``is_gone`` at the stream's end."""
        messages: list[Message] = []
        for _ in range(_READS_IN_A_ROW):
            try:
                some = self._incoming.receive(self._end)
            except BlockingIOError:
                break
            except ConnectionResetError:  # as the kernel tells that the other end closed with bytes unread
                self.died_unread = True
                some = None
            self._heard_at = time.monotonic()
            if some is None:
                self.is_gone = True
                self.died_unread |= self.has_unsent
                break
            messages += some
            if not self._incoming.is_midway:
                break
        return messages

    @property
    def sends_until(self) -> float:
        """Until when a task counts as ended whose large answer is on its way, by ``time.monotonic``."""
        return self._heard_at + _SENDS_WITHIN if self._incoming.is_midway else -math.inf

    def may_have_answered(self, flight: Flight) -> bool:
        """Tell whether something came that was not read yet; once for each flight, as a task may log without end."""
        if self._looked_for == flight.number:
            return False
        self._looked_for = flight.number
        arrived = select.poll()
        arrived.register(self._end.fileno(), select.POLLIN)
        return bool(arrived.poll(0))

    def break_off(self) -> None:
        """Kill a worker that cannot be understood any more."""
        self.is_broken = self.is_gone = True
        self.kill()

    def recall(self) -> None:
        """Ask the worker for what it has not begun; it answers RETURNED even in the middle of a task."""
        self.recalled_behind = self.flights[0].number
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._recall, b"!")

    def take_back(self, numbers: Collection[int]) -> list[Flight]:
        """Return the flights of these numbers: the worker will not run them."""
        returned = [flight for flight in self.flights if flight.number in numbers]
        self.flights = collections.deque(flight for flight in self.flights if flight.number not in numbers)
        self.calls_left += sum(flight.task.calls for flight in returned)
        self.holds_unwanted = any(flight.is_unwanted for flight in self.flights)
        return returned

    def dismiss(self, within: float) -> None:
        """Put the message that ends the worker, which it may take so many seconds for."""
        self.leaves_before = time.monotonic() + within
        self.is_retiring = self.is_leaving = True
        self.put(encode(Kind.STOP))

    def condemn(self, flight: Flight, error: TaskError) -> None:
        """Kill the process to stop one flight; the end of the lifeline tells when it is gone."""
        self.doom, self.stops_before = Doom(flight, error), math.inf
        self.kill()

    def await_end(self, seconds: float) -> bool:
        """Wait until the worker has closed its end, so many seconds at most; what it still says is dropped."""
        ended = select.poll()
        ended.register(self._end.fileno(), select.POLLIN)
        give_up = time.monotonic() + seconds
        while not self.is_gone and ended.poll(max(0.0, give_up - time.monotonic()) * 1000):
            self.receive()
        return self.is_gone

    @property
    def peak_memory(self) -> int | None:
        """Most bytes of memory it ever held, None when unknown; there once it was reaped."""
        return self._process.peak_memory

    def let_go(self) -> None:
        """Close this process's copy of the lifeline."""
        self._end.close()
        if self._recall >= 0:
            os.close(self._recall)
            self._recall = -1

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()

    def reap(self) -> int | None:
        """Let go of the lifeline, wait for the end of the process, return its exit code."""
        with self._sending:  # a thread in the middle of flush() must not hit a new socket of the same number
            self.let_go()
        if not self._process.await_end(_REAP_WITHIN):
            self.kill()
            self._process.await_end(_REAP_WITHIN)
        return self._process.exitcode
