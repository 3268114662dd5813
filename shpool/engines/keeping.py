"""Which functions a worker keeps, and in what form."""

from __future__ import annotations

import collections
import itertools
from types import FunctionType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

_MOST_FUNCTIONS = 128  # a worker keeps at a time
_MOST_BYTES = 8 * 2**20  # of pickles; the newest is kept however large it is
_BY_REFERENCE = b"\x93\x94."  # the opcodes STACK_GLOBAL, MEMOIZE and STOP: the result is what a module has by a name
_CONSTANTS = (type(None), bool, int, float, complex, str, bytes)
_SERVES_MANY = 1  # the bit of a key's first byte that says so
_series = itertools.count(1)


def key_of(pickled: bytes, *, serves_many: bool) -> bytes:
    """Return the 16 bytes by which a worker knows a function; they tell it what it may keep.

    Args:
        pickled: The function.
        serves_many: Each worker is to unpickle it once for all calls that have this key, which no other function gets.
    """
    import hashlib  # here: the workers need not wait for it to be loaded

    is_marked = serves_many and not pickled.endswith(_BY_REFERENCE)  # that is one object in any case
    salt = next(_series).to_bytes(8, "big") if is_marked else b""
    digest = hashlib.blake2b(pickled, digest_size=16, salt=salt).digest()
    return bytes([digest[0] & ~_SERVES_MANY | (_SERVES_MANY if is_marked else 0)]) + digest[1:]


class KeptFunctions:
    """The parent's book of the functions that one worker has: closures made in a loop must not pile up there."""

    def __init__(self) -> None:
        self._sizes: collections.OrderedDict[bytes, int] = collections.OrderedDict()  # by key, latest use last
        self._total = 0

    def has(self, key: bytes) -> bool:
        """Tell whether the worker has a function, which is to be used now."""
        if key not in self._sizes:
            return False
        self._sizes.move_to_end(key)
        return True

    def add(self, key: bytes, size: int) -> list[bytes]:
        """Note that the worker gets a function of so many bytes; return the keys of those it is to forget before."""
        forgotten = []
        while self._sizes and (len(self._sizes) >= _MOST_FUNCTIONS or self._total + size > _MOST_BYTES):
            former, freed = self._sizes.popitem(last=False)
            self._total -= freed
            forgotten.append(former)
        self._sizes[key] = size
        self._total += size
        return forgotten


def may_be_kept(key: bytes, fn: Any, pickled: bytes) -> bool:  # noqa: ANN401 - callables of any kind
    """Tell whether a worker may call again what it has unpickled, and need not unpickle it anew.

    What a module has by name is one object anyway. A plain function of ``__main__`` that holds nothing but constants
    shares the module's variables between calls as any other does. All else carries a state: the methods of an object,
    closures, partials. Those one worker unpickles once for a ``map``, and else for each call, so that none meets what
    another one has left there.

    Args:
        key: By which the worker knows it.
        fn: What was unpickled.
        pickled: From what.
    """
    if key[0] & _SERVES_MANY or pickled.endswith(_BY_REFERENCE):
        return True
    if type(fn) is not FunctionType or fn.__closure__ or fn.__dict__:
        return False
    return _are_constants(fn.__defaults__ or ()) and _are_constants((fn.__kwdefaults__ or {}).values())


def _are_constants(values: Iterable[object]) -> bool:
    return all(type(value) in _CONSTANTS for value in values)
