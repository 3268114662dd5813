"""The lifeline: its wire format, and the worker's end of it.

A message is a header and a payload. Parent to worker: FUNCTION, FORGET (all functions), CALL, BATCH, STOP. Worker to
parent: READY, UNFIT (the initializer failed), RESULT, ERROR, REFUSED (a generation), RETURNED (calls not begun). The
header's ``key`` is a function's digest, its ``seconds`` the time a call took. The end of the stream tells either side
that the other is gone. Beside the stream stands a pipe on which the parent asks for what was not begun: it is heard
in the middle of a task too.
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
from multiprocessing.reduction import DupFd
from typing import TYPE_CHECKING, Any, NamedTuple

from shpool.errors import UnpicklableError
from shpool.sharing import SharedSession, adopt_session
from shpool.worker import call, call_each, dump, dump_each, dump_error, load

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shpool.board import BoardHandle, BoardReader

HEADER = struct.Struct("=QBQ16sd")  # payload's length, kind, call number, function's digest, seconds
NO_KEY = bytes(16)
RECEIVE_SIZE = 256 * 1024  # bytes a read of the parent asks for


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


class MessageBuffer:
    """Cut a stream of bytes into messages."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes | memoryview) -> list[Message]:
        """Take more bytes, copying what it keeps; return the messages that are complete with them."""
        held, messages, start = self._bytes, [], 0
        if held:
            held += data
        with memoryview(held or data) as source:
            while len(source) - start >= HEADER.size:
                length, kind, number, key, seconds = HEADER.unpack_from(source, start)
                end = start + HEADER.size + length
                if len(source) < end:
                    break
                messages.append(Message(kind, number, key, seconds, bytes(source[start + HEADER.size : end])))
                start = end
            rest = None if held else bytes(source[start:])
        if rest is None:
            del held[:start]
        else:
            held += rest
        return messages


class LifelineHandle:
    """Carries the worker's ends of a lifeline to a process being spawned, and becomes a ``Lifeline`` there."""

    def __init__(self, end: socket.socket, recalled: int) -> None:
        self._end = end
        self._recalled = recalled

    def __reduce__(self) -> tuple[Callable[..., Lifeline], tuple[object, ...]]:
        return _handed_over, (DupFd(self._end.fileno()), DupFd(self._recalled))


def _handed_over(end: Any, recalled: Any) -> Lifeline:  # noqa: ANN401 - multiprocessing's DupFd has no type
    return Lifeline(socket.socket(fileno=end.detach()), recalled.detach())


class Lifeline:
    """The worker's end: reads whole messages, writes from any thread, gives back what was not begun.

    Args:
        end: The worker's end of the socket pair.
        recalled: Descriptor of a pipe on which the parent asks for what was not begun.
    """

    def __init__(self, end: socket.socket, recalled: int) -> None:
        self._end = end
        self._recalled = recalled
        self._writing = threading.Lock()
        self._reading = threading.Lock()  # guards the three below
        self._landing = memoryview(bytearray(RECEIVE_SIZE))
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
        """Send a message; waits while the parent is busy reading others."""
        with self._writing:
            self._end.sendall(encode(kind, number, payload, seconds=seconds))

    def let_go(self) -> None:
        """Close a forked child's copy."""
        os.close(self._end.detach())
        os.close(self._recalled)

    def watch(self) -> None:
        """Heed the parent whatever the main thread does: end with it, give back what it asks for; runs in a thread."""
        ears = select.poll()
        ears.register(self._end.fileno(), 0)  # POLLHUP is always reported
        ears.register(self._recalled, select.POLLIN)
        while ears.poll() == [(self._recalled, select.POLLIN)]:
            os.read(self._recalled, 64)
            self._give_back()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(1)

    def _give_back(self) -> None:
        """Answer RETURNED with the numbers of the calls that have arrived and were not begun."""
        numbers: list[int] = []
        if self._reading.acquire(blocking=False):  # else the main thread waits for messages: there are none
            try:
                while self._receive(socket.MSG_DONTWAIT):
                    pass
                numbers = [message.number for message in self._arrived if message.kind == Kind.CALL]
                rest = [message for message in self._arrived if message.kind != Kind.CALL]
                self._arrived = collections.deque(rest)
            finally:
                self._reading.release()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.send(Kind.RETURNED, payload=dump(numbers))

    def _receive(self, flags: int = 0) -> bool:
        """Take in what has arrived; tell whether there may be more."""
        try:
            size = self._end.recv_into(self._landing, 0, flags)
        except (BlockingIOError, ConnectionResetError):
            return False
        self._arrived.extend(self._incoming.feed(self._landing[:size]))
        return size > 0


def work(lifeline: Lifeline, board: BoardHandle | BoardReader, setup: bytes, blanked: tuple[str, ...]) -> None:
    """Be a worker: take the shared session, serve tasks until told to stop. The process's main function.

    Args:
        lifeline: The worker's end of it; a ``LifelineHandle`` before it was pickled.
        board: The pool's board; a ``BoardHandle`` before it was pickled.
        setup: The pickled ``WorkerSetup``.
        blanked: Environment variables that came blank, so that no secret is inherited; removed here.
    """
    # The terminal's ^C reaches the whole foreground group; what happens then is the parent's to decide. The signal
    # came blocked, so that none could strike while Python was starting.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    for name in blanked:
        if not os.environ.get(name):
            os.environ.pop(name, None)
    # What a task forks must not keep the lifeline open: the parent would not see this worker's end.
    os.register_at_fork(after_in_child=lifeline.let_go)
    threading.Thread(target=lifeline.watch, name="shpool-watch", daemon=True).start()
    try:
        _initialise(lifeline, board, setup)
    except BaseException as exc:  # noqa: BLE001 - border: the initializer is the user's
        lifeline.send(Kind.UNFIT, payload=dump_error(exc))
        return
    lifeline.send(Kind.READY, os.getpid())
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the parent has gone
        serve(lifeline)


def _initialise(lifeline: Lifeline, board: Any, pickled_setup: bytes) -> None:  # noqa: ANN401 - a reader by now
    setup = load(pickled_setup)
    session = SharedSession(board, report=lambda generation: lifeline.send(Kind.REFUSED, generation))
    adopt_session(session)
    if setup.initializer is not None:
        setup.initializer(*setup.initargs)


def serve(lifeline: Lifeline) -> None:
    """Run tasks one after another until STOP or the parent's end."""
    functions: dict[bytes, bytes | Callable[..., Any]] = {}
    for message in lifeline.messages():
        if message.kind == Kind.FUNCTION:
            functions[message.key] = bytes(message.payload)
        elif message.kind == Kind.FORGET:
            functions.clear()
        elif message.kind == Kind.STOP:
            return
        else:
            begun = time.perf_counter()
            done, payload = _run(functions, message)
            kind = Kind.RESULT if done else Kind.ERROR
            lifeline.send(kind, message.number, payload, seconds=time.perf_counter() - begun)


def _run(functions: dict[bytes, bytes | Callable[..., Any]], message: Message) -> tuple[bool, bytes]:
    try:
        fn = functions[message.key]
        if isinstance(fn, bytes):
            fn = functions[message.key] = load(fn)
    except BaseException as exc:  # noqa: BLE001 - border: unpickling imports the user's modules
        return False, _unreadable("function", exc)
    try:
        args = load(message.payload)
    except BaseException as exc:  # noqa: BLE001 - border: unpickling runs the arguments' own code
        return False, _unreadable("arguments", exc)
    if message.kind == Kind.CALL:
        return call(fn, *args)
    return True, dump_each(*call_each(fn, args, star=message.kind == Kind.BATCH_STAR))


def _unreadable(what: str, error: BaseException) -> bytes:
    reason = f"it cannot be unpickled in the worker: {type(error).__name__}: {error}"
    return dump_error(UnpicklableError(what, "what the parent sent", reason).with_traceback(error.__traceback__))


def dump_setup(setup: object) -> bytes:
    """Pickle a ``WorkerSetup``.

    Raises:
        UnpicklableError: The initializer or its arguments cannot be pickled.
    """
    try:
        return dump(setup)
    except Exception as exc:
        raise UnpicklableError("initializer", repr(setup)[:200], f"{type(exc).__name__}: {exc}") from exc  # noqa: EM101 - a field, no message
