"""The bytes of an input, the same at each reading: jobs that were checked are the jobs that run.

1. The first whole reading notes a hash of each block of the file.
2. Each later one reads a block, compares its hash, and only then gives out a byte of it. What was rewritten, cut off or
   inserted meanwhile ends the reading, and no line comes that the first reading did not have.
3. What was appended meanwhile is not read: the last block ends where it ended then.
"""

from __future__ import annotations

import io
import itertools
from array import array
from typing import TYPE_CHECKING, BinaryIO

from shpool.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Buffer

_BLOCK = 64 * 1024  # bytes; a hash of one takes some 50 microseconds, reading its lines of JSON 5,000
_REASON = "it was changed during the run"
_HINT = "while a run reads it, lines may be appended to INPUT, but not changed or removed"


class Blocks:
    """Read a stream any number of times; readings do not disturb each other.

    Args:
        stream: Its bytes, seekable.
        name: Named in errors.
    """

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream = stream
        self._name = name
        self._size = 0
        self._hashes: array[int] | None = None  # of the first whole reading: 8 bytes a block

    def lines(self) -> Iterator[bytes]:
        """Yield the lines from the start, with their ends.

        Raises:
            InputError: From the iteration: what the first whole reading has found is not there any more, or cannot be
                read.
        """
        yield from io.BufferedReader(_Pieces(self._known() if self._hashes is not None else self._new()), _BLOCK)

    def _new(self) -> Iterator[bytes]:
        hashes, size = array("q"), 0
        for place in itertools.count(0, _BLOCK):
            block = self._read(place, _BLOCK)
            hashes.append(hash(block))
            size += len(block)
            yield block
            if len(block) < _BLOCK:  # the end, also if more has come since
                break
        self._hashes, self._size = hashes, size

    def _known(self) -> Iterator[bytes]:
        for place, expected in zip(range(0, self._size, _BLOCK), self._hashes or (), strict=False):
            block = self._read(place, min(_BLOCK, self._size - place))
            if hash(block) != expected:
                raise InputError(self._name, _REASON, _HINT)
            yield block

    def _read(self, place: int, size: int) -> bytes:
        try:
            self._stream.seek(place)
            return self._stream.read(size)
        except OSError as exc:
            raise unreadable(self._name, exc) from None


def unreadable(name: str, exc: OSError) -> InputError:
    """Return the error for an input that cannot be read, from the start or in the middle."""
    return InputError(name, f"cannot be read: {exc.strerror or exc}", "give a file, or - for standard input")


class _Pieces(io.RawIOBase):
    """Blocks as a stream, which a BufferedReader parts into lines."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        super().__init__()
        self._blocks = blocks
        self._left = memoryview(b"")

    def readable(self) -> bool:
        """Tell that it is read from."""
        return True

    def readinto(self, buffer: Buffer) -> int:
        """Fill a buffer as far as one block goes."""
        if not self._left:
            self._left = memoryview(next(self._blocks, b""))
        room = memoryview(buffer)
        size = min(len(room), len(self._left))
        room[:size], self._left = self._left[:size], self._left[size:]
        return size
