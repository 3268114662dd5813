"""Pickles: plain ones where that is enough, and large values without a copy of them."""

from __future__ import annotations

import pickle
import sys
from typing import Any

_MAIN = b"_main__"  # __main__, or __mp_main__ in a process that multiprocessing has spawned
LARGE = 64 * 1024  # bytes: what C pickle takes for large, its FRAME_SIZE_TARGET
_FRAME_STARTS = (b"\x80", b"\x95")  # the opcodes PROTO and FRAME
_DEPTH = 5  # of a batch's results: two, and three of a result's own
_MOST_ARGUMENTS = 16  # items of a tuple; a longer one is taken for a list
_SMALL = frozenset({int, float, bool, complex, type(None)})

Piece = bytes | memoryview


load = pickle.loads


class Pieces(list[Piece]):
    """A large pickle: frames of opcodes and, between them, the very memory of each large value.

    It is the file that a pickler writes to. Joined, a megabyte of bytes would be copied into memory that the system
    has to give and take each time: 0.8 ms.
    """

    def write(self, piece: bytes | bytearray | pickle.PickleBuffer) -> None:
        """Take what the pickler writes; an array of NumPy's comes as a ``PickleBuffer``.

        A bytearray is copied: a thread could change its length before it is sent.
        """
        self.append(piece.raw() if isinstance(piece, pickle.PickleBuffer) else bytes(piece))

    @property
    def size(self) -> int:
        """How many bytes they are together."""
        return sum(map(len, self))

    @property
    def names_main(self) -> bool:
        """Tell whether the main module is named, from the opcodes alone: a search of all takes 0.4 ms a megabyte."""
        return any(
            _MAIN in piece
            for piece in self
            if isinstance(piece, bytes) and (len(piece) < LARGE or piece.startswith(_FRAME_STARTS))
        )

    def freeze(self) -> None:
        """Copy the memory whose content may still change."""
        self[:] = [bytes(piece) for piece in self]

    def __bytes__(self) -> bytes:
        return b"".join(self)


def dump(value: object) -> bytes:
    """Pickle a value: by C pickle where that is enough, else by cloudpickle.

    What names ``__main__`` goes by value: a worker's ``__main__`` is another module than the parent's.
    """
    return bytes(dump_in_pieces(value))


def dump_in_pieces(value: object) -> bytes | Pieces:
    """Pickle a value; one that is seen to be large comes in pieces, which hold its own memory."""
    try:
        if _is_large(value):
            pieces = Pieces()
            pickle.Pickler(pieces, protocol=5).dump(value)
            if not pieces.names_main:
                return pieces if pieces.size >= LARGE else bytes(pieces)
        else:
            data = pickle.dumps(value, protocol=5)
            if _MAIN not in data:
                return data
    except (pickle.PicklingError, AttributeError, TypeError, ImportError):
        pass
    import cloudpickle

    spawned_main = sys.modules.get("__mp_main__")
    if spawned_main is not None and spawned_main.__name__ == "__mp_main__":  # this is a process of multiprocessing's
        cloudpickle.register_pickle_by_value(spawned_main)
    text: bytes = cloudpickle.dumps(value, protocol=5)
    return text


def _is_large(value: Any, depth: int = _DEPTH) -> bool:  # noqa: ANN401 - anything
    """Tell whether a value is large, or one within; of a list, a dictionary or a long tuple the first speaks for all.

    It runs for each call: for the arguments of one it takes 0.4 µs, about as much as to pickle them.
    """
    kind = type(value)
    if kind in _SMALL or not depth:
        return False
    if kind is tuple and len(value) <= _MOST_ARGUMENTS:
        for item in value:  # noqa: SIM110 - a generator would take twice as long
            if type(item) not in _SMALL and _is_large(item, depth - 1):
                return True
        return False
    if kind is list or kind is tuple:
        return bool(value) and _is_large(value[0], depth - 1)
    if kind is dict:
        return bool(value) and _is_large(next(iter(value.values())), depth - 1)
    return _is_large_itself(value)


def _is_large_itself(value: Any) -> bool:  # noqa: ANN401 - as above
    kind = type(value)
    if kind is str or kind is bytes:
        return len(value) >= LARGE
    if kind is bytearray:
        return False  # pickled in one go, since a thread could change its length on the way
    try:
        return memoryview(value).nbytes >= LARGE  # an array; no value's own code is asked for its size
    except Exception:  # noqa: BLE001 - a TypeError nearly always, but whatever it is, the value is to travel
        return False
