"""The lifeline: its wire format, and the worker's end of it.

A message is a header and a payload. Parent to worker: FUNCTION, FORGET (all functions), CALL, BATCH, STOP. Worker to
parent: READY, UNFIT (the initializer failed), RESULT, ERROR, REFUSED (a generation). The header's ``key``
is a function's digest, its ``seconds`` the time a call took. The end of the stream tells either side that the
other is gone.
"""

from __future__ import annotations

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

    def feed(self, data: bytes) -> Iterator[Message]:
        """Take more bytes; yield the messages that are complete with them."""
        held = self._bytes
        held += data
        start = 0
        while len(held) - start >= HEADER.size:
            length, kind, number, key, seconds = HEADER.unpack_from(held, start)
            end = start + HEADER.size + length
            if len(held) < end:
                break
            yield Message(kind, number, key, seconds, bytes(memoryview(held)[start + HEADER.size : end]))
            start = end
        if start:
            del held[:start]


class LifelineHandle:
    """Carries the worker's end of a socket pair to a process being spawned."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def __reduce__(self) -> tuple[Callable[..., socket.socket], tuple[object, ...]]:
        return _end_handed_over, (DupFd(self._end.fileno()),)


def _end_handed_over(duplicate: Any) -> socket.socket:  # noqa: ANN401 - multiprocessing's DupFd has no type
    return socket.socket(fileno=duplicate.detach())


class Lifeline:
    """The worker's end: reads whole messages, writes from any thread."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._stream = end.makefile("rb", buffering=64 * 1024)
        self._writing = threading.Lock()

    def messages(self) -> Iterator[Message]:
        """Yield what the parent sends, until it is gone."""
        read = self._stream.read
        while len(header := read(HEADER.size)) == HEADER.size:
            length, kind, number, key, seconds = HEADER.unpack(header)
            payload = read(length) if length else b""
            if len(payload) < length:
                return
            yield Message(kind, number, key, seconds, payload)

    def send(self, kind: Kind, number: int = 0, payload: bytes = b"", *, seconds: float = 0.0) -> None:
        """Send a message; waits while the parent is busy reading others."""
        with self._writing:
            self._end.sendall(encode(kind, number, payload, seconds=seconds))

    def let_go(self) -> None:
        """Close a forked child's copy."""
        os.close(self._end.detach())

    def end_with_parent(self) -> None:
        """End this process when the parent is gone, whatever the main thread does; runs in a thread."""
        watch = select.poll()
        watch.register(self._end.fileno(), 0)  # POLLHUP is always reported
        watch.poll()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(1)


def work(handed_over: socket.socket, board: BoardHandle | BoardReader, setup: bytes, blanked: tuple[str, ...]) -> None:
    """Be a worker: take the shared session, serve tasks until told to stop. The process's main function.

    Args:
        handed_over: The worker's end of its lifeline; a ``LifelineHandle`` before it was pickled.
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
    lifeline = Lifeline(handed_over)
    # What a task forks must not keep the lifeline open: the parent would not see this worker's end.
    os.register_at_fork(after_in_child=lifeline.let_go)
    threading.Thread(target=lifeline.end_with_parent, name="shpool-watch", daemon=True).start()
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
