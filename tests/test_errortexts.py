"""What is told of errors whose classes have odd code of their own."""

from __future__ import annotations

import pytest

from shpool.errortexts import attribute_of, text_of, traceback_of
from shpool.jobs import Job
from shpool.journal.texts import arguments_of, error_columns
from shpool.retry import RetryPolicy, carry_attempts, summary_of
from shpool.timedcall import TimedCall, place_of, seconds_of, worker_of
from shpool.worker import call, load_error


class MuteError(ConnectionError):
    """Has no text."""

    def __str__(self) -> str:
        raise RuntimeError


class ClosedError(ConnectionError):
    """Has no attributes, and takes none."""

    def __getattr__(self, name: str) -> object:
        raise LookupError(name)

    def __setattr__(self, name: str, value: object) -> None:
        raise LookupError(name)


class TrapError(ConnectionError):
    """Has all attributes that are ever asked for, and none can be had."""

    @property
    def _raise(self) -> object:
        raise RuntimeError

    pid = response = retry_after = _shpool_seconds = _shpool_worker = _shpool_place = _raise


class Shy:
    """Cannot be shown."""

    def __repr__(self) -> str:
        raise RuntimeError


ODD = [MuteError, ClosedError, TrapError]  # classes, as the test runner asks values for their names


@pytest.mark.parametrize("kind", ODD)
def test_odd_errors_are_asked_in_vain(kind: type[ConnectionError]) -> None:
    """Whatever an error's own code does, asking it raises nothing."""
    error = kind("broken pipe")
    assert (place_of(error), seconds_of(error), worker_of(error)) == ("", None, None)
    assert attribute_of(error, "retry_after") is None
    carry_attempts(error, ["attempt 1: ConnectionError"])
    assert summary_of(error, 1).startswith(f"attempt 1: {kind.__name__}: ")
    assert kind.__name__ in traceback_of(error)
    name, text, _, lines = error_columns(error, "")
    assert name == kind.__qualname__
    assert text == text_of(error)
    assert name in lines


@pytest.mark.parametrize("kind", ODD)
def test_odd_errors_are_retried_by_what_they_are(kind: type[ConnectionError]) -> None:
    """An error that does not tell how long to wait is one that asks for no wait."""
    wait = RetryPolicy(1).wait_before_retry(kind("broken pipe"), 1, 0.0)
    assert wait is not None
    assert wait <= 1.0


def test_an_error_without_a_text_says_so() -> None:
    assert text_of(MuteError()) == "(it has no text: its __str__ raised RuntimeError)"


def test_a_worker_sends_an_odd_error_back() -> None:
    """A worker neither dies of an error that refuses attributes nor puts another one in its place."""

    def fail() -> None:
        raise ClosedError("broken pipe")

    done, data = call(TimedCall(fail), (), {})
    assert not done
    assert "broken pipe" in str(load_error(bytes(data)))


def test_arguments_that_cannot_be_shown_are_named_by_their_class() -> None:
    assert arguments_of(Job(0, "k", (Shy(), 1))) == '[["<Shy>","1"],{}]'
