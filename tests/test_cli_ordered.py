from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from shpool_cli.output.ordered import InOrder
from shpool_cli.output.records import Record


def record(index: int) -> Record:
    return Record(index, f"k{index}", "done", "null", None, 1, 0.1)


class Written:
    """What was handed on, in batches."""

    def __init__(self, first: int = 0) -> None:
        self.batches: list[list[int]] = []
        self.order = InOrder(lambda records: self.batches.append([each.index for each in records]), first)

    @property
    def indexes(self) -> list[int]:
        return list(itertools.chain(*self.batches))


def test_a_record_waits_for_those_before_it() -> None:
    written = Written()
    written.order.take([record(2), record(1)])
    assert written.batches == []
    written.order.take([record(0)])
    assert written.batches == [[0, 1, 2]]


def test_a_record_whose_turn_it_is_comes_at_once() -> None:
    written = Written()
    for index in range(3):
        written.order.take([record(index)])
    assert written.batches == [[0], [1], [2]]


def test_nobody_waits_for_what_is_skipped() -> None:
    written = Written()
    written.order.take([record(1), record(3)])
    written.order.skip(2)
    written.order.skip(0)
    assert written.batches == [[1, 3]]


def test_the_first_may_be_another_one_than_0() -> None:
    """What comes before is in the output already, and is passed over."""
    written = Written(first=2)
    written.order.skip(0)
    written.order.take([record(2)])
    written.order.skip(1)
    written.order.take([record(3)])
    assert written.batches == [[2], [3]]


def test_a_flush_hands_on_what_waits_in_order() -> None:
    written = Written()
    written.order.take([record(5), record(2), record(3)])
    written.order.skip(4)
    written.order.flush()
    assert written.batches == [[2, 3, 5]]


def test_a_flush_of_nothing_writes_nothing() -> None:
    written = Written()
    written.order.skip(1)
    written.order.flush()
    assert written.batches == []


@given(st.data())
def test_whatever_the_order_of_arrival_none_is_lost_and_none_comes_twice(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 30))
    skipped = data.draw(st.sets(st.integers(0, count - 1)))
    written = Written()
    for index in data.draw(st.permutations(range(count))):
        if index in skipped:
            written.order.skip(index)
        else:
            written.order.take([record(index)])
    assert written.indexes == [index for index in range(count) if index not in skipped]
