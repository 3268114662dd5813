"""When to try again: backoff with full jitter, Retry-After in all its forms, and which errors are worth it.

Pure arithmetic: nothing here sleeps. A retry is a loop over ``Backoff.delays()`` in the caller.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from shpool.errors import (
    LoginError,
    LoginRefusedError,
    ShellJobError,
    TaskTimeoutError,
    TokenResponseError,
    UnpicklableError,
    WorkerLostError,
)
from shpool.errortexts import attribute_of, text_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

logger = logging.getLogger(__name__)

RetryAfterUnit = Literal["s", "ms"]

_LONGEST_RETRY_AFTER = 86_400.0  # s; one day: beyond it a Retry-After is a mistake or a ban

_LONGEST_SUMMARY = 200  # characters
_MOST_SUMMARIES = 8  # attempts told about in an error

# Not errors of the server, yet worth a second try: RFC 9110 (408), RFC 8470 (425), RFC 6585 (429).
_TEMPORARY_STATUSES = frozenset({408, 425, 429})
_LEAST_SERVER_ERROR = 500

# Errors of requests and urllib3 that a second try may turn, by name, so that neither has to be imported.
_TEMPORARY_HTTP_ERRORS = frozenset(
    {
        "requests.exceptions.ConnectionError",
        "requests.exceptions.Timeout",
        "requests.exceptions.ChunkedEncodingError",
        "requests.exceptions.ContentDecodingError",
        "urllib3.exceptions.ProtocolError",
        "urllib3.exceptions.TimeoutError",
    }
)


# A class because three numbers travel together from the settings to the loops that wait.
@dataclass(frozen=True)
class Backoff:
    """How long to wait before each further attempt: a random time under an exponential ceiling.

    Full jitter (uniform from zero) spreads many clients that failed at the same instant furthest apart of the
    known schemes, at the fewest requests: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/.

    Args:
        base: Ceiling of the first wait, seconds.
        factor: Growth of the ceiling per attempt; at least 1.
        cap: Largest ceiling, seconds.

    >>> [Backoff(base=1.0, cap=5.0).ceiling(attempt) for attempt in range(4)]
    [1.0, 2.0, 4.0, 5.0]
    """

    base: float = 1.0  # s
    factor: float = 2.0
    cap: float = 60.0  # s

    def __post_init__(self) -> None:
        if not (math.isfinite(self.base) and math.isfinite(self.cap) and self.base >= 0 and self.cap >= 0):
            msg = f"base and cap are seconds from 0, got {self.base!r} and {self.cap!r}"
            raise ValueError(msg)
        if not (math.isfinite(self.factor) and self.factor >= 1):
            msg = f"factor is at least 1, got {self.factor!r}"
            raise ValueError(msg)

    def ceiling(self, attempt: int) -> float:
        """Return the longest wait after failed attempt number ``attempt``, counted from 0, in seconds."""
        try:
            return min(self.cap, self.base * self.factor**attempt)
        except OverflowError:
            return self.cap if self.base else 0.0

    def delay(self, attempt: int, rng: random.Random | None = None) -> float:
        """Return a random wait between zero and the ceiling, in seconds."""
        draw = random.uniform if rng is None else rng.uniform
        return draw(0.0, self.ceiling(attempt))

    def delays(self, rng: random.Random | None = None) -> Iterator[float]:
        """Yield the waits of one series of attempts, without end."""
        attempt = 0
        while True:
            yield self.delay(attempt, rng)
            attempt += 1


def parse_retry_after(value: str | None, *, now: float, unit: RetryAfterUnit = "s") -> float | None:
    """Return the seconds a ``Retry-After`` header asks to wait, None when it is absent or no such value.

    Args:
        value: The header: a number or an HTTP-date (RFC 9110, section 10.2.3).
        now: The present by the wall clock, seconds since the epoch; dates are counted from it.
        unit: What a number counts. RFC 9110 says seconds; Sentinel Hub sends milliseconds.

    Returns:
        Seconds, never negative, at most one day.

    >>> parse_retry_after("30", now=0.0), parse_retry_after("30", now=0.0, unit="ms")
    (30.0, 0.03)
    >>> parse_retry_after("Thu, 01 Jan 1970 00:01:00 GMT", now=50.0)
    10.0
    """
    if value is None:
        return None
    seconds = _number(value.strip())
    if seconds is None:
        seconds = _seconds_until(value.strip(), now)
    elif unit == "ms":
        seconds /= 1000.0
    return None if seconds is None else min(max(seconds, 0.0), _LONGEST_RETRY_AFTER)


def is_temporary_status(status: int) -> bool:
    """Tell whether an HTTP status means that the same request may work later: 408, 425, 429 and 5xx."""
    return status in _TEMPORARY_STATUSES or status >= _LEAST_SERVER_ERROR


def is_retryable(error: BaseException) -> bool:
    """Tell whether running the same call again may succeed.

    True for a lost worker, a timeout, a broken connection, and an HTTP error with a temporary status. False for
    everything else: an error in the program stays one.

    Args:
        error: What was raised. An HTTP error is known by its ``response.status_code``, whatever its library.
    """
    if isinstance(error, LoginError):
        final = isinstance(error, (LoginRefusedError, TokenResponseError))
        return not final and (error.status is None or is_temporary_status(error.status))
    if isinstance(error, (WorkerLostError, TaskTimeoutError)):
        return True
    if isinstance(error, (ShellJobError, UnpicklableError)):
        return isinstance(error, TimeoutError) or error.is_temporary
    status = attribute_of(attribute_of(error, "response"), "status_code")
    if isinstance(status, int):
        return is_temporary_status(status)
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    return any(f"{cls.__module__}.{cls.__qualname__}" in _TEMPORARY_HTTP_ERRORS for cls in type(error).__mro__)


def retry_after_of(error: BaseException, now: float, unit: RetryAfterUnit = "s") -> float | None:
    """Return the seconds an error asks to wait, None when it asks for nothing.

    Args:
        error: What was raised: its own ``retry_after`` counts, in seconds, else its response's header.
        now: The present by the wall clock, seconds since the epoch.
        unit: What a number in the header counts.
    """
    own = attribute_of(error, "retry_after")
    if isinstance(own, (int, float)) and not isinstance(own, bool) and math.isfinite(own):
        return min(max(float(own), 0.0), _LONGEST_RETRY_AFTER)
    headers: Any = attribute_of(attribute_of(error, "response"), "headers")
    value = None if headers is None else headers.get("Retry-After")
    return parse_retry_after(value, now=now, unit=unit) if isinstance(value, str) else None


@dataclass(frozen=True)
class RetryPolicy:
    """Decide about failed attempts; pure but for the dice.

    Attributes:
        retries: Further attempts each call may have.
        backoff: Waits between them, with full jitter.
        retry_after_unit: What a number in a ``Retry-After`` header counts at this provider.
        retry_if: Tells whether an error is worth another attempt.
    """

    retries: int = 0
    backoff: Backoff = Backoff()
    retry_after_unit: RetryAfterUnit = "s"
    retry_if: Callable[[BaseException], bool] = is_retryable

    def wait_before_retry(self, error: BaseException, attempt: int, now: float) -> float | None:
        """Return the seconds to wait before the next attempt, or None when this one was the last.

        A ``Retry-After`` is a floor: jitter comes on top, lest all the calls refused at once return at once.

        Args:
            error: What the attempt raised.
            attempt: Its number, from 1.
            now: Wall clock, which dates in ``Retry-After`` refer to.
        """
        if attempt > self.retries or not self._is_worth_it(error):
            return None
        return self._wait_asked_for(error, now) + self.backoff.delay(attempt - 1)

    def _is_worth_it(self, error: BaseException) -> bool:
        try:
            return self.retry_if(error)
        except Exception:
            logger.exception("retry_if failed, so there is no other attempt")
            return False

    def _wait_asked_for(self, error: BaseException, now: float) -> float:
        try:
            return retry_after_of(error, now, self.retry_after_unit) or 0.0
        except Exception:
            logger.exception("what the error says of Retry-After cannot be read")
            return 0.0


def summary_of(error: BaseException, attempt: int) -> str:
    """Return one line about a failed attempt, of bounded length."""
    text = " ".join(f"{type(error).__name__}: {text_of(error)}".removesuffix(": ").split())
    if len(text) > _LONGEST_SUMMARY:
        text = text[: _LONGEST_SUMMARY - 1] + "…"
    return f"attempt {attempt}: {text}"


def carry_attempts(error: BaseException, summaries: Sequence[str]) -> None:
    """Let the last error of a call tell about the earlier ones, in a note that tracebacks show from Python 3.11 on."""
    if not summaries:
        return
    text = "after " + "; ".join(summaries[:_MOST_SUMMARIES])
    if len(summaries) > _MOST_SUMMARIES:
        text += f"; and {len(summaries) - _MOST_SUMMARIES} more"
    with contextlib.suppress(Exception):  # an error class may refuse attributes, in any way
        error.__notes__ = [*getattr(error, "__notes__", []), text]


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _seconds_until(date: str, now: float) -> float | None:
    from datetime import timezone
    from email.utils import parsedate_to_datetime  # 10 ms, for few

    try:
        moment = parsedate_to_datetime(date)
        if moment.tzinfo is None:  # the asctime form names no zone and means UTC
            moment = moment.replace(tzinfo=timezone.utc)
        return moment.timestamp() - now
    except (ValueError, TypeError, IndexError, OverflowError):  # as the standard library fails on various garbage
        return None
