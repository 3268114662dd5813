"""Where calls go on Dask's workers, and which come back."""

from __future__ import annotations

import pytest

from shpool.engines.dask_places import DEPTH, STUCK_AFTER, Member, Placed, Places
from shpool.engines.messages import Kind
from shpool.engines.sealed import Call


def places_of(*members: Member) -> Places:
    places = Places()
    places.members = {member.address: member for member in members}
    return places


def worker(address: str, threads: int = 1, *, nanny: bool = True) -> Member:
    return Member(address, threads, 1, "tcp://nanny" if nanny else "", "/logbook" if nanny else "")


def add(places: Places, *numbers: int) -> None:
    for number in numbers:
        places.add(Call("pool", number, Kind.CALL, b"", b"", b"", False))


def sent(places: Places, now: float = 0.0) -> dict[str, list[int]]:
    return {address: numbers_of(group) for address, group in places.place(now).items()}


def numbers_of(calls: list[Placed]) -> list[int]:
    return [placed.call.number for placed in calls]


def test_calls_go_to_all_alike_in_their_order() -> None:
    places = places_of(worker("a"), worker("b", 2))
    add(places, 1, 2, 3, 4, 5, 6)
    assert sent(places) == {"a": [1, 4], "b": [2, 3, 5, 6]}
    assert places.capacity == 3


def test_without_a_worker_calls_are_held() -> None:
    places = places_of()
    add(places, 2, 1)
    assert (sent(places), places.capacity) == ({}, 0)
    places.members["a"] = worker("a")
    assert sent(places) == {"a": [1, 2]}


def test_tasks_of_others_take_room() -> None:
    places = places_of(worker("a"), worker("b"))
    places.count_strangers({"a": 1})
    add(places, 1, 2)
    assert (sent(places), places.capacity) == ({"b": [1, 2]}, 1)
    places.count_strangers({"a": 1, "b": 3})
    add(places, 3)
    assert (sent(places), places.capacity) == ({"a": [3]}, 2), "they are everywhere"


@pytest.mark.parametrize(("nanny", "most"), [(True, DEPTH), (False, 1)])
def test_nothing_goes_ahead_where_nobody_could_tell_what_has_begun(*, nanny: bool, most: int) -> None:
    places = places_of(worker("a", nanny=nanny))
    add(places, *range(DEPTH + 5))
    assert sent(places) == {"a": list(range(most))}
    places.end(0, 0.0)
    assert sent(places) == {"a": [most]}


def test_what_a_lost_worker_had_goes_again_in_its_order() -> None:
    places = places_of(worker("a"), worker("b", nanny=False))
    add(places, 1, 2, 3, 4, 5)
    assert sent(places) == {"a": [1, 3, 4, 5], "b": [2]}
    dismissed = places.dismiss("a")
    assert dismissed is not None
    calls = list(dismissed[1].values())
    assert numbers_of(calls) == [1, 3, 4, 5]
    places.end(1, 0.0)
    places.hold(reversed(calls[1:]))
    add(places, 6)
    places.end(2, 0.0)
    places.members["c"] = worker("c")
    assert sent(places) == {"b": [3], "c": [4, 5, 6]}
    assert places.dismiss("a") is None


def test_what_waits_is_asked_for_where_there_is_room_elsewhere() -> None:
    first, second = worker("a"), worker("b")
    places = places_of(first, second)
    add(places, 1, 2, 3, 4)
    sent(places, 1.0)
    later = 1.0 + STUCK_AFTER
    assert places.stuck(later) == [], "there is no room"
    for number in (2, 4):
        places.end(number, 1.0)
    assert places.stuck(1.0) == [], "it has just begun"
    assert places.stuck(later) == [first]
    first.is_asked = True
    assert places.stuck(later) == []
    first.is_asked = False
    places.hold([placed for placed in first.calls.values() if placed.call.number == 3])
    first.is_stuck = True
    add(places, *range(5, 90))
    assert sent(places, later) == {"b": [3, *range(5, 5 + DEPTH - 1)]}, "nothing goes behind the long one"
    places.end(1, later)
    assert not first.is_stuck
    assert sent(places, later)["a"][0] == 5 + DEPTH - 1


def test_a_worker_that_is_to_be_killed_gets_nothing() -> None:
    places = places_of(worker("a"))
    places.members["a"].is_doomed = True
    add(places, 1)
    assert sent(places) == {}
    places.members["a"].is_doomed = False
    assert sent(places) == {"a": [1]}


def test_what_has_ended_is_no_longer_known() -> None:
    places = places_of()
    add(places, 1, 2)
    places.end(1, 0.0)
    assert (places.numbers, places.find(1), places.end(1, 0.0)) == ([2], None, None)
    places.members["a"] = worker("a")
    assert sent(places) == {"a": [2]}
