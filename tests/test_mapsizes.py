"""How much of a map goes at a time."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest

from shpool.mapsizes import BATCH_SECONDS, LARGEST_BATCH, BatchSizer, MapOptions


def test_the_first_batch_is_one_item() -> None:
    assert BatchSizer(4, None, None).next_size(0) == 1


def test_batches_of_tiny_tasks_grow_to_what_takes_thirty_milliseconds() -> None:
    sizer = BatchSizer(4, None, None)
    sizes = []
    for _ in range(8):
        sizes.append(sizer.next_size(0))
        sizer.note(sizes[-1], sizes[-1] * 1e-4)
    assert sizes == [1, 8, 64, 300, 300, 300, 300, 300]
    assert sizes[-1] * 1e-4 == pytest.approx(BATCH_SECONDS)


def test_batches_never_exceed_the_largest() -> None:
    sizer = BatchSizer(4, None, None)
    for _ in range(20):
        sizer.note(sizer.next_size(0), 0.0)
    assert sizer.next_size(0) == LARGEST_BATCH


def test_batches_of_long_tasks_are_one_item() -> None:
    sizer = BatchSizer(4, None, None)
    sizer.note(1, 5.0)
    assert sizer.next_size(0) == 1


def test_a_batch_shrinks_when_tasks_turn_out_long() -> None:
    sizer = BatchSizer(4, None, None)
    for _ in range(6):
        sizer.note(sizer.next_size(0), 1e-6)
    sizer.note(sizer.next_size(0), 60.0)
    assert sizer.next_size(0) < 1_000


def test_the_last_items_are_shared_out_among_the_workers() -> None:
    sizer = BatchSizer(4, None, expected=1_000)
    for _ in range(20):
        sizer.note(sizer.next_size(0), 0.0)
    assert sizer.next_size(880) == math.ceil(120 / 12)
    assert sizer.next_size(1_000) == 1


def test_a_given_chunksize_stays() -> None:
    sizer = BatchSizer(4, 7, expected=1_000)
    sizer.note(7, 0.0)
    assert sizer.next_size(999) == 7


def test_a_batch_without_answers_teaches_nothing() -> None:
    sizer = BatchSizer(4, None, None)
    sizer.note(0, 0.0)
    assert sizer.next_size(0) == 1


def test_options_travel() -> None:
    options = MapOptions(chunksize=3, timeout=1.0)
    assert pickle.loads(pickle.dumps(options)) == options


@pytest.mark.parametrize("name", ["chunksize", "buffersize"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "3", True])
def test_sizes_are_checked(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be an integer >= 1"):
        MapOptions(**{name: value})


@pytest.mark.parametrize("wrong", ["x", float("nan"), True])
def test_a_timeout_must_be_a_number(wrong: Any) -> None:
    with pytest.raises(ValueError, match="timeout must be"):
        MapOptions(timeout=wrong)
