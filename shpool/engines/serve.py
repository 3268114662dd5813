"""The lifeline: its wire format, and the worker's end of it.

A message is a header and a payload. Parent to worker: FUNCTION, FORGET (a function), CALL, BATCH, STOP. Worker to
parent: READY, UNFIT (the initializer failed), RESULT, ERROR, PART (the first results of a batch), TOLD (what a task
says before it ends), REFUSED (a generation), RETURNED (calls not begun), LOG (a record), GREW (the worker holds more
memory than it may; the number says how much). The header's ``key`` is a function's digest, its ``seconds`` the time a
call took. The end of the stream tells either side that the other is gone. Beside the stream stands a pipe on which the
parent asks for what was not begun: it is heard in the middle of a task too, which may give back some of its own work.
"""

from __future__ import annotations

import collections
import contextlib
import enum
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from shpool.engines.keeping import may_be_kept
from shpool.errors import UnpicklableError
from shpool.gate import unanswered
from shpool.logs import relay
from shpool.shared import SharedSession, adopt_session
from shpool.talk import take_line
from shpool.worker import call, call_each, dump, dump_each, dump_error, load, shortened

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from shpool.board import BoardHandle, BoardReader
    from shpool.engines.setup import WorkerSetup
    from shpool.gate import Gate, GateHandle

HEADER = struct.Struct("=QBQ16sd")  # payload's length, kind, call number, function's digest, seconds
NO_KEY = bytes(16)
RECEIVE_SIZE = 256 * 1024  # bytes a read asks for
_PART_AFTER = 0.05  # s of a batch's results that a lost worker may take along
_SLICE_GROWTH = 8  # times; of a batch that proves to be of tiny calls
_MOMENT = 0.01  # s; for longer the main thread keeps the reading only while nothing has arrived
_MEMORY_LOOK = 0.05  # s between two looks at the memory in use, each of which costs 10 µs
_PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")
LARGE = 64 * 1024  # bytes from which a payload is spared every copy that can be spared


class Kind(enum.IntEnum):
    """Kinds of messages."""

    FUNCTION = 1
    CALL = 2
    BATCH = 3
    BATCH_STAR = 4
    STOP = 5
    READY = 6
    UNFIT = 7
    RESULT = 8
    ERROR = 9
    REFUSED = 10
    FORGET = 11
    RETURNED = 12
    LOG = 13
    GREW = 14
    PART = 15
    TOLD = 16


# Sets made once, and asked first: with Python 3.11 to look up a member of an enumeration takes 0.1 µs.
_CALLS = frozenset({Kind.CALL, Kind.BATCH, Kind.BATCH_STAR})
ANSWERS = frozenset({Kind.RESULT, Kind.ERROR})


class Message(NamedTuple):
    """One message, as read."""

    kind: int
    number: int
    key: bytes
    seconds: float
    payload: bytes | memoryview


def encode(kind: Kind, number: int = 0, payload: bytes = b"", *, key: bytes = NO_KEY, seconds: float = 0.0) -> bytes:
    """Return a message as bytes."""
    return HEADER.pack(len(payload), kind, number, key, seconds) + payload


def encode_parts(
    kind: Kind, number: int, payload: bytes, *, key: bytes = NO_KEY, seconds: float = 0.0
) -> tuple[bytes, ...]:
    """Return a message as the pieces to send one after the other; a large payload is not copied for it."""
    if len(payload) < LARGE:
        return (encode(kind, number, payload, key=key, seconds=seconds),)
    return HEADER.pack(len(payload), kind, number, key, seconds), payload


class MessageBuffer:
    """Cut a stream of bytes into messages. A large payload is received right where it stays.

    Args:
        landing: Where small messages arrive; may be shared by buffers that are read in turn.
    """

    def __init__(self, landing: memoryview | None = None) -> None:
        self._landing = memoryview(bytearray(RECEIVE_SIZE)) if landing is None else landing
        self._held = bytearray()  # the beginning of a message
        self._large: tuple[int, int, bytes, float] | None = None  # the header of a large message under way
        self._body = memoryview(b"")  # its payload
        self._filled = 0  # bytes of it that have arrived

    @property
    def is_midway(self) -> bool:
        """Tell whether a large payload is under way."""
        return self._large is not None

    def receive(self, end: socket.socket, flags: int = 0) -> list[Message] | None:
        """Read from a socket once; return the messages that are complete with it, None at the stream's end.

        Raises:
            BlockingIOError: Nothing has arrived, and the socket or the flags say not to wait.
            ConnectionResetError: The other end closed with bytes unread.
        """
        if self._large is None:
            size = end.recv_into(self._landing, 0, flags)
            return self.feed(self._landing[:size]) if size else None
        size = end.recv_into(self._body[self._filled :], 0, flags)
        self._filled += size
        return self._finish_large() if size else None

    def feed(self, data: bytes | memoryview) -> list[Message]:
        """Take more bytes, copying what it keeps; return the messages that are complete with them."""
        messages: list[Message] = []
        data = memoryview(data)
        if self._large is not None:
            taken = data[: len(self._body) - self._filled]
            self._body[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            messages, data = self._finish_large(), data[len(taken) :]
        if self._held:
            self._held += data
            data = memoryview(bytes(self._held))
            self._held.clear()
        rest = self._cut(data, messages)
        self._held += rest
        return messages

    def _cut(self, data: memoryview, messages: list[Message]) -> memoryview:
        """Append the complete messages of ``data``; return the beginning of the one after them."""
        start = 0
        while len(data) - start >= HEADER.size:
            length, kind, number, key, seconds = HEADER.unpack_from(data, start)
            begin, end = start + HEADER.size, start + HEADER.size + length
            if len(data) < end:
                if length < LARGE:
                    break
                self._large = (kind, number, key, seconds)
                self._body, self._filled = memoryview(bytearray(length)), len(data) - begin
                self._body[: self._filled] = data[begin:]
                return data[len(data) :]
            messages.append(Message(kind, number, key, seconds, bytes(data[begin:end])))
            start = end
        return data[start:]

    def _finish_large(self) -> list[Message]:
        if self._large is None or self._filled < len(self._body):
            return []
        message = Message(*self._large, self._body)
        self._large, self._body = None, memoryview(b"")
        return [message]


class LifelineHandle:
    """Carries the worker's ends of a lifeline to a process being spawned, and becomes a ``Lifeline`` there."""

    def __init__(self, end: socket.socket, recalled: int) -> None:
        self._end = end
        self._recalled = recalled

    def __reduce__(self) -> tuple[Callable[..., Lifeline], tuple[object, ...]]:
        from multiprocessing.reduction import DupFd  # here: the login need not wait for it

        return _handed_over, (DupFd(self._end.fileno()), DupFd(self._recalled))


def _handed_over(end: Any, recalled: Any) -> Lifeline:  # noqa: ANN401 - multiprocessing's DupFd has no type
    ours, pipe = socket.socket(fileno=end.detach()), recalled.detach()
    # DupFd's are inheritable. What a task starts by os.system() would keep them open, and stand for a living worker.
    ours.set_inheritable(False)
    os.set_inheritable(pipe, False)
    return Lifeline(ours, pipe)


class Lifeline:
    """The worker's end: reads whole messages, writes from any thread, gives back what was not begun.

    Args:
        end: The worker's end of the socket pair.
        recalled: Descriptor of a pipe on which the parent asks for what was not begun.

    Attributes:
        number: Of the call that runs.
        is_recalled: The parent has asked for what was not begun, since that call began.
    """

    def __init__(self, end: socket.socket, recalled: int) -> None:
        self.number = 0
        self.is_recalled = False
        self._end = end
        self._recalled = recalled
        self._writing = threading.RLock()  # guards the two below
        self._is_writing = False
        self._postponed: list[tuple[bytes, ...]] = []  # by what ran in the middle of a write, in the same thread
        self._reading = threading.Lock()  # guards the two below
        self._incoming = MessageBuffer()
        self._arrived: collections.deque[Message] = collections.deque()

    def messages(self) -> Iterator[Message]:
        """Yield what the parent sends, until it is gone."""
        while True:
            with self._reading:
                while not self._arrived:
                    if not self._receive():
                        return
                message = self._arrived.popleft()
            yield message

    def send(self, kind: Kind, number: int = 0, payload: bytes = b"", *, seconds: float = 0.0) -> None:
        """Send a message; waits while the parent is busy reading others.

        A finalizer or a signal handler that logs in the middle of a write has its message sent after that.
        """
        with self._writing:
            self._postponed.append(encode_parts(kind, number, payload, seconds=seconds))
            if self._is_writing:
                return
            self._is_writing = True
            try:
                while self._postponed:
                    for part in self._postponed.pop(0):
                        self._end.sendall(part)
            finally:
                self._is_writing = False

    def tell(self, value: object) -> None:
        """Send what the task that runs says before it ends.

        Raises:
            OSError: The parent is gone, or this is a process that a task has forked.
        """
        self.send(Kind.TOLD, self.number, dump(value))

    def report(self, generation: int) -> None:
        """Tell the parent that a server refused this generation; what a task has forked cannot, and only waits."""
        with contextlib.suppress(OSError):
            self.send(Kind.REFUSED, generation)

    def log(self, record: bytes) -> None:
        """Send a log record.

        Raises:
            OSError: The parent is gone, or this is a process that a task has forked.
        """
        self.send(Kind.LOG, payload=record)

    def let_go(self) -> None:
        """Close a forked child's copy; a thread that is not in the child may have held the locks."""
        self._writing, self._reading = threading.RLock(), threading.Lock()
        self._is_writing = False
        self._postponed.clear()
        if self._recalled >= 0:  # else this is a child's child
            os.close(self._end.detach())
            os.close(self._recalled)
            self._recalled = -1

    def watch(self) -> None:
        """Heed the parent whatever the main thread does: end with it, give back what it asks for; runs in a thread."""
        ears = select.poll()
        ears.register(self._end.fileno(), 0)  # POLLHUP is always reported
        ears.register(self._recalled, select.POLLIN)
        while ears.poll() == [(self._recalled, select.POLLIN)]:
            os.read(self._recalled, 64)
            self.is_recalled = True
            self._give_back()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(1)

    def _give_back(self) -> None:
        """Answer RETURNED with the numbers of the calls that have arrived and were not begun."""
        if not self._reading.acquire(timeout=_MOMENT):
            self._answer_returned([])  # the main thread waits for messages: there are none
            return
        try:
            while self._receive(socket.MSG_DONTWAIT):
                pass
            numbers = [message.number for message in self._arrived if message.kind in _CALLS]
            rest = [message for message in self._arrived if message.kind not in _CALLS]
            self._arrived = collections.deque(rest)
            # Before the main thread can read on: the parent takes answers for those of its calls in their order, and
            # what was given back must not count as answered by what came after it.
            self._answer_returned(numbers)
        finally:
            self._reading.release()

    def _answer_returned(self, numbers: list[int]) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.send(Kind.RETURNED, payload=dump(numbers))

    def _receive(self, flags: int = 0) -> bool:
        """Take in what has arrived; tell whether there may be more."""
        try:
            messages = self._incoming.receive(self._end, flags)
        except (BlockingIOError, ConnectionResetError):
            return False
        self._arrived.extend(messages or ())
        return messages is not None


def work(
    lifeline: Lifeline,
    board: BoardHandle | BoardReader,
    setup: bytes,
    blanked: tuple[str, ...],
    gate: GateHandle | Gate | None = None,
) -> None:
    """Be a worker: take the shared session, serve tasks until told to stop. The process's main function.

    Args:
        lifeline: The worker's end of it; a ``LifelineHandle`` before it was pickled.
        board: The pool's board; a ``BoardHandle`` before it was pickled.
        setup: The pickled ``WorkerSetup``.
        blanked: Environment variables that came blank, so that no secret is inherited; removed here.
        gate: The pool's gate; a ``GateHandle`` before it was pickled.
    """
    # The terminal's ^C reaches the whole foreground group; what happens then is the parent's to decide. The signal
    # came blocked, so that none could strike while Python was starting.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    _die_with_parent()
    for name in blanked:
        if not os.environ.get(name):
            os.environ.pop(name, None)
    # What a task forks must not keep the lifeline open: the parent would not see this worker's end.
    os.register_at_fork(after_in_child=lifeline.let_go)
    threading.Thread(target=lifeline.watch, name="shpool-watch", daemon=True).start()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the parent has gone
        try:
            max_memory = _initialise(lifeline, board, setup, gate)
        except BaseException as exc:  # noqa: BLE001 - border: the initializer is the user's
            lifeline.send(Kind.UNFIT, payload=dump_error(exc))
            return
        lifeline.send(Kind.READY, os.getpid())
        take_line(lifeline)
        serve(lifeline, max_memory)


def _initialise(lifeline: Lifeline, board: Any, pickled_setup: bytes, gate: Any) -> int | None:  # noqa: ANN401 - a reader and a gate by now
    """Make this process what the ``WorkerSetup`` says; return the memory it may hold."""
    setup: WorkerSetup = load(pickled_setup)
    session = SharedSession(board, report=lifeline.report, gate=gate)
    adopt_session(session)
    if setup.log_level is not None:
        relay(setup.log_level, lifeline.log, session.known_secrets)
    if setup.initializer is not None:
        setup.initializer(*setup.initargs)
    return setup.max_memory


def _die_with_parent() -> None:
    """Let the kernel end this process with its parent, even in the middle of C code that never lets a thread run.

    The signal comes when the *thread* that started this process ends: the crew's loop, which outlives its workers.
    """
    if sys.platform == "linux":
        import ctypes

        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def serve(lifeline: Lifeline, max_memory: int | None = None) -> None:
    """Run tasks one after another until STOP or the parent's end; tell when they have left too much memory in use."""
    functions: dict[bytes, bytes | Callable[..., Any]] = {}
    next_look = 0.0
    for message in lifeline.messages():
        if message.kind in _CALLS:
            begun = time.perf_counter()
            lifeline.number, lifeline.is_recalled = message.number, False
            done, payload, begun = _run(functions, message, lifeline, begun)
            kind = Kind.RESULT if done else Kind.ERROR
            unanswered.give_back()
            ended = time.perf_counter()
            lifeline.send(kind, message.number, payload, seconds=ended - begun)
            if max_memory is not None and ended >= next_look:
                next_look = ended + _MEMORY_LOOK
                if (held := resident_memory()) > max_memory:
                    lifeline.send(Kind.GREW, held)
                    max_memory = None  # said once; the parent sends nothing new from then on
        elif message.kind == Kind.FUNCTION:
            functions[message.key] = bytes(message.payload)
        elif message.kind == Kind.FORGET:
            functions.pop(message.key, None)
        elif message.kind == Kind.STOP:
            return


def resident_memory() -> int:
    """Return the bytes of memory this process holds; where the system does not tell, the most it ever held."""
    try:
        with open("/proc/self/statm", "rb") as file:  # noqa: PTH123 - a third of pathlib's time
            return int(file.read().split()[1]) * _PAGE_SIZE
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _run(
    functions: dict[bytes, bytes | Callable[..., Any]], message: Message, lifeline: Lifeline, begun: float
) -> tuple[bool, bytes, float]:
    """Return whether it went well, what to send, and since when that took."""
    try:
        fn = functions[message.key]
        if isinstance(fn, bytes):
            fn = load(pickled := fn)
            if may_be_kept(message.key, fn, pickled):
                functions[message.key] = fn
            if message.kind != Kind.CALL:
                begun = time.perf_counter()  # once for all of a map: no measure of the size that batches should have
    except BaseException as exc:  # noqa: BLE001 - border: unpickling imports the user's modules
        return False, unreadable("function", exc), begun
    try:
        args = load(message.payload)
    except BaseException as exc:  # noqa: BLE001 - border: unpickling runs the arguments' own code
        return False, unreadable("arguments", exc), begun
    if message.kind == Kind.CALL:
        return *call(fn, *args), begun
    return _run_batch(fn, args, message, lifeline, begun)


def _run_batch(
    fn: Callable[..., Any], items: Sequence[Any], message: Message, lifeline: Lifeline, begun: float
) -> tuple[bool, bytes, float]:
    """Call the function on each item; what has taken a while is sent ahead, lest it is lost with the rest."""
    results: list[Any] = []
    errors: dict[int, bytes] = {}
    start, size, looked = 0, 1, begun
    while True:
        some, wrong = call_each(fn, items[start : start + size], star=message.kind == Kind.BATCH_STAR)
        errors |= {len(results) + index: error for index, error in wrong.items()}
        results += some
        start += size
        if start >= len(items):
            return True, dump_each(results, errors), begun
        now = time.perf_counter()
        size = max(1, min(size * _SLICE_GROWTH, int(size * _PART_AFTER / max(now - looked, 1e-9))))
        looked = now
        if now - begun >= _PART_AFTER:
            lifeline.send(Kind.PART, message.number, dump_each(results, errors), seconds=now - begun)
            results, errors, begun = [], {}, now


def unreadable(what: str, error: BaseException) -> bytes:
    """Pickle the error that what the parent sent could not be unpickled."""
    reason = f"it cannot be unpickled in the worker: {type(error).__name__}: {error}"
    return dump_error(UnpicklableError(what, "what the parent sent", reason).with_traceback(error.__traceback__))


def dump_setup(setup: WorkerSetup) -> bytes:
    """Pickle a ``WorkerSetup``.

    Raises:
        UnpicklableError: The initializer or its arguments cannot be pickled.
    """
    try:
        return dump(setup)
    except Exception as exc:
        reason = f"{type(exc).__name__}: {exc}"
        if isinstance(exc, RuntimeError):  # of multiprocessing's queues and locks
            reason += "; those of a multiprocessing.Manager() can travel"
        raise UnpicklableError("initializer", shortened(setup.initializer), reason) from exc  # noqa: EM101 - a field, no message
