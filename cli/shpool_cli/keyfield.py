"""The field of --key: every line has it, and no two lines that differ have the same."""

from __future__ import annotations

import json
from array import array
from typing import TYPE_CHECKING

from shpool.errors import InputError

if TYPE_CHECKING:
    from shpool_cli.inputs import Call, Input

_ADVICE = "--key needs a field with a text or number of its own in every line"
_BITS = 0xFFFF_FFFF_FFFF_FFFF

_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode


class KeyField:
    """Check that a field names the jobs of an input.

    Args:
        name: The field.
        source: The input, which is being checked.
    """

    def __init__(self, name: str, source: Input) -> None:
        self._name = name
        self._source = source
        self._calls = CallTable()

    def check_shape(self, call: Call) -> None:
        """Check calls of one shape.

        Raises:
            InputError: They have no such field.
        """
        if self._name not in call[1]:
            there = ", ".join(call[1]) or "none: give objects, or a CSV"
            raise InputError(self._name, f"there is no field {self._name!r} for --key", f"the fields are {there}")

    def check(self, call: Call) -> None:
        """Check one call after the other.

        Raises:
            InputError: Its field is no name, or is the name of another call with other arguments.
        """
        value = call[1].get(self._name)
        if value == "" or value is None or isinstance(value, (list, dict)):
            reason = f"the field {self._name!r} names no job: it is {json.dumps(value)}"
            raise InputError(self._name, reason, _ADVICE)
        key = str(value)
        if not self._calls.add(key, _encode(call[1])):
            line, former = self._source.find(lambda call: str(call[1].get(self._name)) == key)
            names = json.dumps(former[1][self._name]), json.dumps(value)
            shown = names[0] if names[0] == names[1] else " and ".join(names)
            reason = f"its {self._name!r} and that of line {line} name one job, {shown}, but the lines differ"
            raise InputError(self._name, reason, f"{_ADVICE}; only lines that are equal are one job")


class CallTable:
    """Remember which arguments go with which key: 32 to 64 bytes each, so that a million of them cost little.

    An open-addressing table of 64-bit hashes: two of a million keys are mistaken for each other once in 10^7 runs.
    """

    def __init__(self) -> None:
        self._keys = array("Q", bytes(8 * 1024))  # 0 is an empty slot
        self._arguments = array("Q", bytes(8 * 1024))
        self._count = 0

    def add(self, key: str, arguments: str) -> bool:
        """Note a call; tell whether all calls so far with this key have these arguments."""
        if 2 * self._count >= len(self._keys):
            self._grow()
        number, content = hash(key) & _BITS or 1, hash(arguments) & _BITS
        place = self._place_of(number)
        if self._keys[place]:
            return self._arguments[place] == content
        self._keys[place], self._arguments[place] = number, content
        self._count += 1
        return True

    def _place_of(self, number: int) -> int:
        keys, mask = self._keys, len(self._keys) - 1
        place = number & mask
        while keys[place] and keys[place] != number:
            place = (place + 1) & mask
        return place

    def _grow(self) -> None:
        former = zip(self._keys, self._arguments, strict=True)
        size = 2 * 8 * len(self._keys)
        self._keys, self._arguments = array("Q", bytes(size)), array("Q", bytes(size))
        for number, content in former:
            if number:
                place = self._place_of(number)
                self._keys[place], self._arguments[place] = number, content
