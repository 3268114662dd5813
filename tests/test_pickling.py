from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from shpool.pickling import Pieces, dump, dump_in_pieces, load

MEGABYTE = bytes(range(256)) * 4096


@dataclass
class Scene:
    bands: dict[str, Any]


def test_plain_values_go_by_plain_pickle() -> None:
    assert dump({"a": [1, 2.0]}) == pickle.dumps({"a": [1, 2.0]}, protocol=5)


def test_a_closure_travels() -> None:
    base = 40
    assert load(dump(lambda number: base + number))(2) == 42


def test_what_names_main_goes_by_value() -> None:
    """A worker's ``__main__`` is another module than the parent's."""
    local = type("Local", (), {"__module__": "__main__"})
    value = load(dump(local()))
    assert type(value).__name__ == "Local"


def test_what_names_main_goes_by_value_beside_large_values_too() -> None:
    local = type("Local", (), {"__module__": "__main__"})
    assert type(load(dump((MEGABYTE, local(), MEGABYTE)))[1]).__name__ == "Local"


@pytest.mark.parametrize(
    "value",
    [
        MEGABYTE,
        ((MEGABYTE,), {}),
        ([MEGABYTE, 2], {}),
        {"a": [MEGABYTE]},
        ("é" * 100_000,),
        bytearray(MEGABYTE),
        b"\x80 and __main__, which is data here" + MEGABYTE,
        list(range(30_000)),
        Scene({"red": MEGABYTE}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_large_values_arrive_as_they_are(value: object) -> None:
    assert load(dump(value)) == value
    assert load(bytes(dump_in_pieces(value))) == value


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_large_array_is_not_copied(order: Any) -> None:
    array = np.arange(90_000.0).reshape(300, 300, order=order)
    pieces = dump_in_pieces(({"array": array}, {}))
    assert isinstance(pieces, Pieces)
    assert any(np.shares_memory(array, np.frombuffer(piece, dtype=np.uint8)) for piece in pieces)
    assert np.array_equal(load(bytes(pieces))[0]["array"], array)


def test_a_large_text_of_bytes_is_not_copied() -> None:
    pieces = dump_in_pieces(([MEGABYTE, MEGABYTE[1:]], {}))
    assert isinstance(pieces, Pieces)
    assert any(piece is MEGABYTE for piece in pieces)
    assert pieces.size == len(bytes(pieces)) > 2 * len(MEGABYTE) - 2


def test_frozen_pieces_do_not_change_with_the_value() -> None:
    array = np.zeros(100_000)
    pieces = dump_in_pieces(array)
    assert isinstance(pieces, Pieces)
    pieces.freeze()
    array[0] = 1
    assert not load(bytes(pieces)).any()


def test_a_bytearray_may_grow_before_its_pieces_are_sent() -> None:
    """Else their lengths would not be what the message's header says, and no later message could be read."""
    value = bytearray(MEGABYTE)
    alone, among = dump_in_pieces(value), dump_in_pieces([MEGABYTE, value])
    value += b"more"
    assert load(bytes(alone)) == MEGABYTE
    assert load(bytes(among)) == [MEGABYTE, MEGABYTE]


class Closed:
    """Its size cannot be told, as that of a store that is closed."""

    @property
    def nbytes(self) -> int:
        raise RuntimeError("closed")

    def __sizeof__(self) -> int:
        raise ValueError("closed")


def test_a_value_whose_size_cannot_be_told_travels() -> None:
    assert isinstance(load(dump(Closed())), Closed)


def test_what_only_looks_large_comes_in_one_piece() -> None:
    hollow = np.broadcast_to(np.zeros(1), 100_000)[:0].copy()
    assert isinstance(dump_in_pieces([0] * 1000), bytes)
    assert isinstance(dump_in_pieces(hollow), bytes)


def test_a_list_that_holds_itself_travels() -> None:
    value: list[Any] = []
    value.append(value)
    copy = load(dump(value))
    assert copy[0] is copy


def test_values_of_cloudpickle_may_be_large() -> None:
    offset = bytearray(MEGABYTE)
    assert pickle.loads(dump((lambda: offset, MEGABYTE)))[0]() == offset
