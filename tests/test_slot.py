"""A slot is a future in all that one reader needs."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

import pytest

from shpool.engines.slot import Slot, is_abandoned

PATIENCE = 30.0  # s


def test_a_result_is_read_after_it_was_set() -> None:
    slot = Slot()
    assert slot.set_running_or_notify_cancel()
    assert slot.running()
    slot.set_result(4)
    assert (slot.done(), slot.running(), slot.cancelled()) == (True, False, False)
    assert slot.result(0) == 4
    assert slot.exception(0) is None


def test_an_error_is_raised_each_time_it_is_asked_for() -> None:
    slot = Slot()
    slot.set_running_or_notify_cancel()
    slot.set_exception(LookupError("no tile"))
    for _ in range(2):
        with pytest.raises(LookupError, match="no tile"):
            slot.result(0)
    assert isinstance(slot.exception(0), LookupError)


def test_a_reader_that_came_first_is_woken() -> None:
    for _ in range(200):
        slot, read = Slot(), list[int]()
        reader = threading.Thread(target=lambda slot=slot, read=read: read.append(slot.result(PATIENCE)))
        reader.start()
        slot.set_running_or_notify_cancel()
        slot.set_result(7)
        reader.join(PATIENCE)
        assert read == [7]


def test_no_result_in_time_is_a_timeout_and_may_still_come() -> None:
    slot = Slot()
    with pytest.raises(FutureTimeoutError):
        slot.result(0.001)
    slot.set_running_or_notify_cancel()
    slot.set_result(1)
    assert slot.result(0.001) == 1


def test_what_waits_can_be_cancelled() -> None:
    slot = Slot()
    assert slot.cancel()
    assert slot.cancel(), "as often as one likes"
    assert slot.cancelled()
    assert not slot.set_running_or_notify_cancel()
    with pytest.raises(CancelledError):
        slot.result(0)


def test_what_runs_cannot() -> None:
    slot = Slot()
    slot.set_running_or_notify_cancel()
    assert not slot.cancel()
    slot.set_result(None)
    assert not slot.cancel()


def test_a_cancelled_slot_wakes_its_reader() -> None:
    slot = Slot()
    caught: list[BaseException] = []

    def read() -> None:
        try:
            slot.result(PATIENCE)
        except CancelledError as error:
            caught.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    assert slot.cancel()
    reader.join(PATIENCE)
    assert len(caught) == 1


@pytest.mark.parametrize("early", [True, False])
def test_the_callback_is_called_once(*, early: bool) -> None:
    slot = Slot()
    called: list[Future[Any]] = []
    if early:
        slot.add_done_callback(called.append)
    slot.set_running_or_notify_cancel()
    slot.set_result(1)
    if not early:
        slot.add_done_callback(called.append)
    assert called == [slot]


def test_of_those_that_cancel_and_run_one_wins() -> None:
    for _ in range(300):
        slot, outcomes = Slot(), list[bool]()
        threads = [
            threading.Thread(target=lambda slot=slot, out=outcomes: out.append(slot.cancel())),
            threading.Thread(target=lambda slot=slot, out=outcomes: out.append(slot.set_running_or_notify_cancel())),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert sorted(outcomes) == [False, True]


def test_who_watches_hears_of_the_end_and_of_each_time_it_is_put_off() -> None:
    """And in any case of what came before."""
    slot, told = Slot(), list[tuple[int, bool]]()
    slot.set_running_or_notify_cancel()
    slot.put_off(3)
    slot.watch(lambda _: told.append((slot.size, slot.done())))
    slot.put_off(5)
    slot.set_result(None)
    slot.put_off(7)
    assert told == [(3, False), (5, False), (5, True)]
    slot.watch(lambda _: told.append((slot.size, slot.done())))
    assert told[3:] == [(7, True)]


def test_a_callback_of_the_end_does_not_hear_that_it_is_put_off() -> None:
    slot, ends = Slot(), list[bool]()
    slot.add_done_callback(lambda _: ends.append(slot.done()))
    slot.put_off(5)
    slot.set_running_or_notify_cancel()
    slot.set_result(None)
    assert ends == [True]


def test_what_is_abandoned_is_cancelled_if_it_has_not_begun() -> None:
    queued, running = Slot(), Slot()
    running.set_running_or_notify_cancel()
    for slot in (queued, running):
        assert not is_abandoned(slot)
        slot.abandon()
        assert is_abandoned(slot)
    assert (queued.cancelled(), running.running()) == (True, True)
    assert not is_abandoned(Future())
