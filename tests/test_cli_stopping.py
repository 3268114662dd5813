from __future__ import annotations

import math
import os
import signal
import threading
from typing import TYPE_CHECKING, Any

import pytest
from patience import NEVER, until

from shpool.errors import InputError, JournalError, LoginError
from shpool.halting import Halt, HaltPolicy
from shpool_cli.console import CommandError, ExitCode
from shpool_cli.stopping import Stopper, code_of

if TYPE_CHECKING:
    from collections.abc import Iterator


class FakeBatch:
    """Remembers how it was told to stop."""

    def __init__(self) -> None:
        self.told: list[float] = []

    def stop(self, within: float = math.inf) -> None:
        self.told.append(within)


@pytest.fixture
def batch() -> FakeBatch:
    return FakeBatch()


@pytest.fixture(autouse=True)
def usual_signals() -> Iterator[None]:
    """Give the signals their meaning, which tests in the background of a shell inherit as ignored."""
    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


def stopper(batch: Any, how: str = "never", total: int = 10, seconds: float | None = None) -> Stopper:
    return Stopper(batch, HaltPolicy.parse(how), total, seconds)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_stops_the_batch_within_a_moment(batch: FakeBatch, number: int) -> None:
    with stopper(batch):
        send(number)
        assert batch.told == [0.5]


@pytest.mark.parametrize(
    ("number", "stop", "code"),
    [
        (signal.SIGINT, KeyboardInterrupt, 130),
        (signal.SIGTERM, SystemExit, 143),
        (signal.SIGHUP, SystemExit, 129),
    ],
)
def test_the_end_is_what_the_signal_asks_for(
    batch: FakeBatch, number: int, stop: type[BaseException], code: int
) -> None:
    with stopper(batch) as stopping:
        send(number)
        with pytest.raises(stop) as raised:
            stopping.pass_on()
    assert code_of(raised.value) == code


def test_without_a_signal_there_is_nothing_to_pass_on(batch: FakeBatch) -> None:
    with stopper(batch) as stopping:
        stopping.pass_on()
    assert (batch.told, stopping.reason) == ([], None)


def test_the_second_signal_ends_at_once_and_has_the_say(batch: FakeBatch) -> None:
    with stopper(batch):
        send(signal.SIGINT)
        with pytest.raises(SystemExit) as raised:
            send(signal.SIGTERM)
    assert raised.value.code == 143
    assert batch.told == [0.5]


def test_the_signals_mean_the_usual_afterwards(batch: FakeBatch) -> None:
    with stopper(batch):
        pass
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_an_ignored_signal_stays_ignored(batch: FakeBatch) -> None:
    """As nohup asks for."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stopper(batch):
        send(signal.SIGHUP)
        assert batch.told == []


def test_failures_below_the_policy_change_nothing(batch: FakeBatch) -> None:
    with stopper(batch, "soon,fail=3") as stopping:
        stopping.note_failures(2)
    assert (batch.told, stopping.reason) == ([], None)


def test_soon_waits_for_what_runs(batch: FakeBatch) -> None:
    with stopper(batch, "soon,fail=3") as stopping:
        for failed in range(6):
            stopping.note_failures(failed)
    assert batch.told == [math.inf]
    assert (stopping.reason, stopping.is_killing) == ("halted after 3 failed jobs", False)


def test_now_waits_for_nothing(batch: FakeBatch) -> None:
    with stopper(batch, "now") as stopping:
        stopping.note_failures(1)
    assert batch.told == [0.0]
    assert (stopping.reason, stopping.is_killing) == ("halted after 1 failed job", True)


def test_a_share_is_of_all_jobs(batch: FakeBatch) -> None:
    with stopper(batch, "soon,fail=20%", total=10) as stopping:
        stopping.note_failures(1)
        assert batch.told == []
        stopping.note_failures(2)
    assert stopping.reason == "halted after 2 failed jobs"


def test_the_clock_lets_end_what_runs(batch: FakeBatch) -> None:
    with stopper(batch, seconds=0.01) as stopping:
        until(lambda: batch.told)
    assert batch.told == [math.inf]
    assert (stopping.reason, stopping.is_killing) == ("stopped after --max-time, 0.01 s", False)


def test_a_clock_that_was_not_reached_is_forgotten(batch: FakeBatch) -> None:
    with stopper(batch, seconds=NEVER):
        pass
    until(lambda: not any(isinstance(thread, threading.Timer) for thread in threading.enumerate()))
    assert batch.told == []


def test_the_first_reason_is_the_reason(batch: FakeBatch) -> None:
    stopping = stopper(batch, "now", seconds=0.01)
    stopping.note_failures(1)
    with stopping:  # the clock begins
        until(lambda: len(batch.told) == 2)
    assert stopping.reason == "halted after 1 failed job"


@pytest.mark.parametrize(
    ("stop", "code"),
    [
        (KeyboardInterrupt(), ExitCode.INTERRUPTED),
        (SystemExit(129), ExitCode.HUNG_UP),
        (SystemExit(143), ExitCode.TERMINATED),
        (JournalError("run.db", "damaged"), ExitCode.FAILED),
        (InputError("here", "bad", ""), ExitCode.USAGE),
        (LoginError("https://loopback.invalid", "no"), ExitCode.LOGIN),
        (CommandError("full", "", ExitCode.FAILED), ExitCode.FAILED),
        (OSError("odd"), ExitCode.FAILED),
    ],
)
def test_every_end_has_its_code(stop: BaseException, code: ExitCode) -> None:
    """A journal that was fine at the beginning is no bad usage."""
    assert code_of(stop) == code


def test_halt_is_one_of_three() -> None:
    assert [how.value for how in Halt] == ["never", "soon", "now"]
