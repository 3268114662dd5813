"""The worker's end of its lifeline.

Beside the stream of messages stands a pipe on which the parent asks for what was not begun: it is heard in the middle
of a task too, which may give back some of its own work.
"""

from __future__ import annotations

import collections
import contextlib
import os
import select
import socket
import sys
import threading
from typing import TYPE_CHECKING, Any

from shpool.engines.messages import CALLS, Kind, Landing, MessageBuffer, encode_pieces
from shpool.pickling import dump

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shpool.engines.messages import Message
    from shpool.pickling import Piece, Pieces

_MOMENT = 0.01  # s; for longer the main thread keeps the reading only while nothing has arrived


class LifelineHandle:
    """Carries the worker's ends of a lifeline to a process being spawned, and becomes a ``Lifeline`` there."""

    def __init__(self, end: socket.socket, recalled: int) -> None:
        self._end = end
        self._recalled = recalled

    def __reduce__(self) -> tuple[Callable[..., Lifeline], tuple[object, ...]]:
        from multiprocessing.reduction import DupFd  # here: no worker needs it

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
        self._postponed: list[tuple[Piece, ...]] = []  # by what ran in the middle of a write, in the same thread
        self._reading = threading.Lock()  # guards the three below
        self._landing = Landing()
        self._incoming = MessageBuffer(self._landing)
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

    def free(self, message: Message) -> None:
        """Use the memory of a message again, whose payload nobody will look at any more."""
        if isinstance(message.payload, memoryview):
            with self._reading:
                self._landing.free(message.payload)

    def send(self, kind: Kind, number: int = 0, payload: bytes | Pieces = b"", *, seconds: float = 0.0) -> None:
        """Send a message; waits while the parent is busy reading others.

        A finalizer or a signal handler that logs in the middle of a write has its message sent after that.
        """
        with self._writing:
            self._postponed.append(encode_pieces(kind, number, payload, seconds=seconds))
            if self._is_writing:
                return
            self._is_writing = True
            try:
                while self._postponed:
                    for piece in self._postponed.pop(0):
                        self._end.sendall(piece)
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
            numbers = [message.number for message in self._arrived if message.kind in CALLS]
            rest = [message for message in self._arrived if message.kind not in CALLS]
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
