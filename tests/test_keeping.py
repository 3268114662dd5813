"""Which functions a worker keeps, and in what form."""

from __future__ import annotations

import functools
import operator
from typing import TYPE_CHECKING, Any

import cloudpickle
import pytest
from pool_tasks import double

from shpool.engines.keeping import KeptFunctions, key_of, may_be_kept
from shpool.pickling import dump, load

if TYPE_CHECKING:
    from collections.abc import Callable

MEGABYTE = 2**20


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def test_what_was_used_last_is_kept_longest() -> None:
    """A function in steady use is not sent again because others come and go."""
    kept = KeptFunctions()
    for number in range(1000):
        kept.add(key(number + 1), 100)
        if not kept.has(key(0)):
            assert number == 0
            kept.add(key(0), 100)
    assert sum(kept.has(key(number)) for number in range(1001)) == 128


def test_pickles_of_few_megabytes_are_kept() -> None:
    kept = KeptFunctions()
    assert [kept.add(key(number), 3 * MEGABYTE) for number in range(4)] == [[], [], [key(0)], [key(1)]]


def test_the_newest_is_kept_however_large_it_is() -> None:
    """A function that holds an array is sent once to each worker, not with each call."""
    kept = KeptFunctions()
    kept.add(key(1), MEGABYTE)
    assert kept.add(key(2), 500 * MEGABYTE) == [key(1)]
    assert kept.has(key(2))
    assert kept.add(key(3), 1) == [key(2)]


def _closure() -> Callable[[], int]:
    number = 5
    return lambda: number


@pytest.mark.parametrize(
    ("fn", "is_same"),
    [
        (double, True),
        (len, True),
        (dict.fromkeys, False),
        (lambda value: value, True),
        (lambda value=7, *, word="x", flag=None: (value, word, flag), True),
        (lambda value=[]: value, False),
        (lambda *, value=(): value, False),
        (_closure(), False),
        ([1].append, False),
        (functools.partial(operator.add, 1), False),
        (operator.itemgetter(1), False),
    ],
)
def test_only_what_carries_no_state_serves_several_calls(fn: Callable[..., Any], *, is_same: bool) -> None:
    """The rest is unpickled for each, or once for all that share a key of their own."""
    for pickled in (dump(fn), cloudpickle.dumps(fn, protocol=5)):
        assert may_be_kept(key_of(pickled, serves_many=False), load(pickled), pickled) == is_same
        assert may_be_kept(key_of(pickled, serves_many=True), load(pickled), pickled)


def test_what_carries_a_state_has_another_key_in_each_map() -> None:
    pickled = dump(functools.partial(operator.add, 1))
    keys = {key_of(pickled, serves_many=serves) for serves in (False, False, True, True)}
    assert len(keys) == 3
    assert len({key_of(dump(double), serves_many=serves) for serves in (False, True)}) == 1
