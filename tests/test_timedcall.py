"""What a worker adds to a job's function."""

from __future__ import annotations

import functools
import inspect
import json
import os
import pickle

import pytest

from shpool.errors import WorkerLostError
from shpool.targets import Target
from shpool.timedcall import TimedCall, place_of, seconds_of, worker_of


def double(number: int) -> int:
    return 2 * number


def test_a_result_is_shown_as_itself() -> None:
    assert repr(TimedCall(double)(4)) == "8"


def test_a_timed_call_is_as_picklable_as_its_function() -> None:
    call = pickle.loads(pickle.dumps(TimedCall(double)))
    result, seconds, worker = call(4)
    assert worker == os.getpid()
    assert result == 8
    assert seconds >= 0
    assert repr(call) == "double"
    assert "partial" in repr(TimedCall(functools.partial(double, 1)))


def test_tasks_are_named_after_the_function_and_not_after_the_stopwatch() -> None:
    assert getattr(pickle.loads(pickle.dumps(TimedCall(double))), "__qualname__", None) == "double"
    assert getattr(TimedCall(functools.partial(double, 1)), "__qualname__", None) == "partial"
    assert getattr(TimedCall(Target("tiles", "fetch", "")), "__qualname__", None) == "tiles:fetch"


def test_an_error_tells_the_line_of_the_user() -> None:
    """The innermost that is not a library's: json raises, the lambda's line is told."""
    with pytest.raises(ValueError, match="Expecting") as caught:
        TimedCall(lambda text: json.loads(text))("oops")  # noqa: PLW0108 - a frame of ours
    line = inspect.currentframe().f_lineno - 1  # type: ignore[union-attr]  # CPython has frames
    assert place_of(caught.value) == f"test_timedcall.py:{line}"
    assert place_of(ValueError("never raised")) == ""


def test_an_error_tells_how_long_it_took_and_where() -> None:
    with pytest.raises(ValueError, match="invalid literal") as caught:
        TimedCall(int)("x")
    seconds = seconds_of(caught.value)
    assert seconds is not None
    assert seconds >= 0
    assert worker_of(caught.value) == os.getpid()


def test_a_lost_worker_is_known_by_its_own_error() -> None:
    assert worker_of(WorkerLostError("fetch", 4711, -9)) == 4711
    assert seconds_of(WorkerLostError("fetch", 4711, -9)) is None
    assert worker_of(ValueError()) is None
