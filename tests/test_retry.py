"""When to try again, and when not to."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import requests
import urllib3.exceptions
from hypothesis import given
from hypothesis import strategies as st

from shpool.errors import (
    LoginError,
    LoginRefusedError,
    ShellJobError,
    ShellTimeoutError,
    TaskTimeoutError,
    TokenResponseError,
    WorkerLostError,
)
from shpool.retry import (
    Backoff,
    RetryPolicy,
    carry_attempts,
    is_retryable,
    is_temporary_status,
    parse_retry_after,
    retry_after_of,
    summary_of,
)

if TYPE_CHECKING:
    from shpool.retry import RetryAfterUnit

_NOW = 784_111_700.0  # Sun, 06 Nov 1994 08:48:20 GMT
_URL = "https://idp.example/token"


def test_ceiling_doubles_up_to_the_cap() -> None:
    backoff = Backoff(base=1.0, factor=2.0, cap=10.0)
    assert [backoff.ceiling(attempt) for attempt in range(6)] == [1, 2, 4, 8, 10, 10]


@pytest.mark.parametrize("attempt", [10_000, 10**9])
def test_ceiling_survives_any_number_of_attempts(attempt: int) -> None:
    """A pool may retry for days."""
    assert Backoff(cap=60.0).ceiling(attempt) == 60.0
    assert Backoff(base=0.0).ceiling(attempt) == 0.0


def test_delays_spread_over_the_whole_range() -> None:
    """Full jitter: from zero, so that clients that failed together come back apart."""
    rng = random.Random(5)
    delays = [Backoff(base=8.0).delay(0, rng) for _ in range(1000)]
    assert min(delays) < 0.5
    assert max(delays) > 7.5
    assert 3.5 < sum(delays) / 1000 < 4.5


def test_delays_go_on_and_stay_under_their_ceilings() -> None:
    backoff = Backoff(base=1.0, cap=5.0)
    for attempt, delay in enumerate(itertools.islice(backoff.delays(random.Random(1)), 50)):
        assert 0.0 <= delay <= backoff.ceiling(attempt)


def test_same_seed_gives_the_same_delays() -> None:
    first, second = (list(itertools.islice(Backoff().delays(random.Random(3)), 5)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    "numbers", [{"base": -1.0}, {"cap": -1.0}, {"factor": 0.5}, {"base": float("nan")}, {"cap": float("inf")}]
)
def test_numbers_out_of_range_are_refused(numbers: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(numbers))):
        Backoff(**numbers)


@pytest.mark.parametrize(
    ("value", "unit", "seconds"),
    [
        ("30", "s", 30.0),
        ("30", "ms", 0.03),
        (" 2.5 ", "s", 2.5),
        ("0", "s", 0.0),
        ("-5", "s", 0.0),
        ("999999999", "s", 86_400.0),
        ("1e308", "s", 86_400.0),
        ("Sun, 06 Nov 1994 08:49:37 GMT", "s", 77.0),
        ("Sun, 06 Nov 1994 08:49:37 GMT", "ms", 77.0),
        ("Sunday, 06-Nov-94 08:49:37 GMT", "s", 77.0),
        ("Sun Nov  6 08:49:37 1994", "s", 77.0),
        ("Sun, 06 Nov 1994 08:00:00 GMT", "s", 0.0),
    ],
)
def test_retry_after_is_read_in_all_its_forms(value: str, unit: RetryAfterUnit, seconds: float) -> None:
    """Numbers and the three date formats of RFC 9110, section 5.6.7; a unit never applies to a date."""
    assert parse_retry_after(value, now=_NOW, unit=unit) == pytest.approx(seconds)


@pytest.mark.parametrize("value", [None, "", "soon", "nan", "inf", "12 s", "32 Jan 2020", "\x00", "Sun, 99 Nov 1994 x"])
def test_retry_after_without_a_meaning_is_none(value: str | None) -> None:
    assert parse_retry_after(value, now=_NOW) is None


@pytest.mark.slow
@given(st.text() | st.from_regex(r"\w{3}, \d{1,3} \w{3} \d{1,5} \d\d:\d\d:\d\d .{0,6}"), st.sampled_from(["s", "ms"]))
def test_retry_after_never_raises_and_stays_in_its_range(value: str, unit: RetryAfterUnit) -> None:
    seconds = parse_retry_after(value, now=_NOW, unit=unit)
    assert seconds is None or 0.0 <= seconds <= 86_400.0


def http_error(status: int, headers: dict[str, str] | None = None) -> requests.HTTPError:
    response = requests.Response()
    response.status_code = status
    response.headers.update(headers or {})
    return requests.HTTPError(response=response)


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 599])
def test_temporary_statuses_are_worth_a_retry(status: int) -> None:
    assert is_temporary_status(status)
    assert is_retryable(http_error(status))
    assert is_retryable(LoginError(_URL, "no", status))


@pytest.mark.parametrize("status", [200, 301, 400, 401, 403, 404, 410, 422])
def test_other_statuses_are_not(status: int) -> None:
    assert not is_temporary_status(status)
    assert not is_retryable(http_error(status))
    assert not is_retryable(LoginError(_URL, "no", status))


@pytest.mark.parametrize(
    "error",
    [
        WorkerLostError("load", 1),
        TaskTimeoutError("load", 1.0),
        ConnectionResetError(),
        TimeoutError(),
        LoginError(_URL, "connection refused"),
        requests.ConnectionError("refused"),
        requests.ReadTimeout("slow"),
        requests.exceptions.ChunkedEncodingError("cut"),
        urllib3.exceptions.ProtocolError("cut"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_broken_connections_and_lost_workers_are_worth_a_retry(error: Exception) -> None:
    assert is_retryable(error)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no"),
        KeyError("no"),
        TypeError("no"),
        FileNotFoundError("no"),
        PermissionError("no"),
        MemoryError(),
        KeyboardInterrupt(),
        requests.exceptions.InvalidURL("no"),
        LoginRefusedError(_URL, "abc", "invalid_client"),
        TokenResponseError(_URL, "not JSON"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_of_the_program_and_final_refusals_are_not(error: BaseException) -> None:
    assert not is_retryable(error)


def test_wait_is_found_in_the_response_of_an_error() -> None:
    assert retry_after_of(http_error(429, {"retry-after": "7"}), _NOW) == 7.0
    assert retry_after_of(http_error(429, {"retry-after": "7"}), _NOW, unit="ms") == 0.007
    assert retry_after_of(http_error(429), _NOW) is None


def test_wait_is_found_in_the_error_itself() -> None:
    assert retry_after_of(LoginError(_URL, "busy", 429, 12.0), _NOW) == 12.0
    assert retry_after_of(LoginError(_URL, "busy", 429, 1e9), _NOW) == 86_400.0
    assert retry_after_of(LoginError(_URL, "busy", 429), _NOW) is None


@pytest.mark.parametrize("odd", [True, float("nan"), "soon", object()])
def test_odd_attributes_of_foreign_errors_are_ignored(odd: object) -> None:
    error = ValueError("foreign")
    error.retry_after = odd  # type: ignore[attr-defined]  # what another library may set
    error.response = odd  # type: ignore[attr-defined]  # what another library may set
    assert retry_after_of(error, _NOW) is None
    assert not is_retryable(error)


def test_retry_policy_decides_by_kind_and_number() -> None:
    policy = RetryPolicy(retries=1, backoff=Backoff(base=2.0, cap=2.0))
    wait = policy.wait_before_retry(ConnectionError(), 1, 0.0)
    assert wait is not None
    assert 0.0 <= wait <= 2.0
    assert policy.wait_before_retry(ConnectionError(), 2, 0.0) is None
    assert policy.wait_before_retry(ValueError(), 1, 0.0) is None


def test_milliseconds_are_the_providers_choice() -> None:
    """``Retry-After: 5000`` from Sentinel Hub means five seconds."""

    class HeaderError(ConnectionError):
        response = SimpleNamespace(status_code=429, headers={"Retry-After": "5000"})

    policy = RetryPolicy(1, Backoff(base=0.0), "ms")
    assert policy.wait_before_retry(HeaderError(), 1, 0.0) == 5.0


def test_retry_policy_asks_the_users_own_rule() -> None:
    policy = RetryPolicy(1, Backoff(base=0.0), retry_if=lambda error: isinstance(error, KeyError))
    assert policy.wait_before_retry(KeyError("x"), 1, 0.0) == 0.0
    assert policy.wait_before_retry(ConnectionError(), 1, 0.0) is None


def test_the_last_error_tells_of_the_earlier_ones() -> None:
    error = ValueError("third")
    carry_attempts(error, [summary_of(ConnectionError("reset\nby peer"), 1), summary_of(TimeoutError(), 2)])
    assert error.__notes__ == ["after attempt 1: ConnectionError: reset by peer; attempt 2: TimeoutError"]


def test_an_only_attempt_needs_no_note() -> None:
    error = ValueError("first")
    carry_attempts(error, [])
    assert not hasattr(error, "__notes__")


def test_many_long_attempts_make_a_note_of_bounded_length() -> None:
    error = ValueError("last")
    carry_attempts(error, [summary_of(ValueError("x" * 10_000), number) for number in range(1, 101)])
    [note] = error.__notes__
    assert len(note) < 2000
    assert note.endswith("and 92 more")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ShellJobError("true", 1, ""), False),
        (ShellJobError("true", 75, ""), True),
        (ShellJobError("true", -9, ""), True),
        (ShellTimeoutError("true", 1.0, ""), True),
    ],
    ids=repr,
)
def test_a_shell_command_tells_by_its_status_whether_to_retry(error: ShellJobError, *, expected: bool) -> None:
    """Exit status 75 is EX_TEMPFAIL of sysexits.h; SIGKILL comes when memory is short."""
    assert is_retryable(error) is expected


def test_a_rule_that_raises_means_no_other_attempt(caplog: pytest.LogCaptureFixture) -> None:
    policy = RetryPolicy(3, retry_if=lambda error: bool(1 / 0))
    assert policy.wait_before_retry(ConnectionError(), 1, 0.0) is None
    assert "retry_if failed" in caplog.text
