"""The lifeline's wire format.

A message is a header and a payload. Parent to worker: FUNCTION, FORGET (a function), CALL, BATCH, STOP. Worker to
parent: READY, UNFIT (the initializer failed), RESULT, ERROR, PART (the first results of a batch), TOLD (what a task
says before it ends), REFUSED (a generation), RETURNED (calls not begun), LOG (a record), GREW (the worker holds more
memory than it may; the number says how much). The header's ``key`` is a function's digest, its ``seconds`` the time a
call took. The end of the stream tells either side that the other is gone.
"""

from __future__ import annotations

import enum
import struct
from typing import TYPE_CHECKING, NamedTuple

from shpool.pickling import LARGE, Pieces

if TYPE_CHECKING:
    import socket

    from shpool.pickling import Piece

HEADER = struct.Struct("=QBQ16sd")  # payload's length, kind, call number, function's digest, seconds
NO_KEY = bytes(16)
RECEIVE_SIZE = 256 * 1024  # bytes a read asks for
_MOST_FREE = 8 * 2**20  # bytes of memory that waits for the next large payload


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
CALLS = frozenset({Kind.CALL, Kind.BATCH, Kind.BATCH_STAR})
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


def encode_pieces(
    kind: Kind, number: int, payload: bytes | Pieces, *, key: bytes = NO_KEY, seconds: float = 0.0
) -> tuple[Piece, ...]:
    """Return a message as the pieces to send one after the other; a large payload is not copied for it."""
    if isinstance(payload, Pieces):
        first, *others = payload
        return HEADER.pack(payload.size, kind, number, key, seconds) + first, *others
    if len(payload) < LARGE:
        return (encode(kind, number, payload, key=key, seconds=seconds),)
    return HEADER.pack(len(payload), kind, number, key, seconds), payload


class Landing:
    """Where messages arrive: small ones all in one place, each large payload in memory that is used again.

    New memory for each megabyte would cost the system half of the time that the megabyte takes on its way.
    """

    def __init__(self) -> None:
        self.small = memoryview(bytearray(RECEIVE_SIZE))
        self._free: list[bytearray] = []

    def room_for(self, size: int) -> memoryview:
        """Return memory for a payload of so many bytes."""
        for index in range(len(self._free) - 1, -1, -1):
            if len(self._free[index]) >= size:
                return memoryview(self._free.pop(index))[:size]
        return memoryview(bytearray(size))

    def free(self, payload: bytes | memoryview) -> None:
        """Take back the memory of a payload that nobody will look at again."""
        if not isinstance(payload, memoryview):
            return
        block = payload.obj
        payload.release()  # whoever looks at it all the same gets an error, and no other payload
        if isinstance(block, bytearray):
            self._free.append(block)
            while sum(map(len, self._free)) > _MOST_FREE:
                del self._free[0]


class MessageBuffer:
    """Cut a stream of bytes into messages. A large payload is received right where it stays.

    Args:
        landing: Where they arrive; may be shared by buffers that are read in turn.
    """

    def __init__(self, landing: Landing | None = None) -> None:
        self._landing = Landing() if landing is None else landing
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
            size = end.recv_into(self._landing.small, 0, flags)
            return self.feed(self._landing.small[:size]) if size else None
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
                self._body, self._filled = self._landing.room_for(length), len(data) - begin
                self._large = (kind, number, key, seconds)  # once there is room
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
