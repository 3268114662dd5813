"""Which keys a journal may hold: a filter that saves most look-ups of a first run, in 4 MiB whatever their number."""

from __future__ import annotations

_BITS = 25  # 2**25 bits: at a million keys 1 new one in 300 is looked up in vain, at ten million 1 in 5
_MASK = 2**_BITS - 1


class KeyFilter:
    """A Bloom filter with two probes: what it denies was never added; what it affirms may be looked up.

    >>> keys = KeyFilter()
    >>> keys.add("a")
    >>> "a" in keys, "b" in keys
    (True, False)
    """

    def __init__(self) -> None:
        self._bits = bytearray(2**_BITS // 8)

    def add(self, key: str) -> None:
        """Let the filter affirm this key from now on."""
        number = hash(key)
        first, second = number & _MASK, (number >> _BITS) & _MASK
        self._bits[first >> 3] |= 1 << (first & 7)
        self._bits[second >> 3] |= 1 << (second & 7)

    def __contains__(self, key: str) -> bool:
        number = hash(key)
        first, second = number & _MASK, (number >> _BITS) & _MASK
        return bool(self._bits[first >> 3] >> (first & 7) & 1 and self._bits[second >> 3] >> (second & 7) & 1)
