"""Keep a bounded part of what a command says, without a secret."""

from __future__ import annotations

from shpool.redaction import MASK


class Capture:
    """Keep the head and the tail of a stream, without a secret.

    Args:
        limit: Most bytes to keep; half of them head, half of them tail.
        secret: Masked wherever it shows.
    """

    def __init__(self, limit: int, secret: bytes) -> None:
        self._half = limit // 2
        self._secret = secret
        self._held = b""  # the last bytes, which may begin a secret
        self._head = bytearray()
        self._tail = bytearray()
        self._size = 0

    def add(self, data: bytes) -> None:
        """Take the next bytes."""
        data = self._held + data
        if self._secret:
            data = data.replace(self._secret, MASK.encode())
        hold = min(max(len(self._secret) - 1, 0), len(data))
        self._held = data[len(data) - hold :]
        self._keep(data[: len(data) - hold])

    def finish(self) -> None:
        """Take what was held back: no more comes."""
        held, self._held = self._held, b""
        self._keep(held)

    def _keep(self, data: bytes) -> None:
        self._size += len(data)
        room = self._half - len(self._head)
        self._head += data[:room]
        self._tail += data[room:]
        if len(self._tail) > 2 * self._half:  # seldom, as it moves the rest
            del self._tail[: len(self._tail) - self._half]

    @property
    def dropped(self) -> int:
        """Bytes that were not kept, between head and tail."""
        return self._size - len(self._head) - len(self._end())

    def text(self) -> str:
        """Return what was kept, decoded as UTF-8; where bytes were dropped, a line says how many."""
        if not self.dropped:
            return (self._head + self._end()).decode(errors="replace")
        head, end = (part.decode(errors="replace") for part in (self._head, self._end()))
        return f"{head}\n[{self.dropped} bytes dropped]\n{end}"

    def _end(self) -> bytearray:
        return self._tail[max(len(self._tail) - self._half, 0) :]
