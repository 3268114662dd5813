"""The transport below ``requests``: retries within bounds, and the gate before each attempt.

The rules:

 1. A request that carries the token goes through the gate, each attempt of it anew: the account pays for every one.
 2. What an answer says is heeded before anything else is done about it, so that the others pause at once.
 3. A connection slot is held until the body has been read, or the answer is closed or forgotten; never while a
    request waits for its next attempt.
 4. Waits may be longer than a token lives, so each attempt is sent with the token of the moment after its wait.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from requests.adapters import HTTPAdapter
from urllib3.util.retry import Retry

from shpool.retry import parse_retry_after

if TYPE_CHECKING:
    import requests
    from typing_extensions import Self

    from shpool.gate import AccountGate, Ticket
    from shpool.retry import RetryAfterUnit

ATTEMPTS = 4  # as sentinelhub-py's max_download_attempts
_LONGEST_RETRY_AFTER = 120.0  # s; a server that asks for more is asked again then
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_TICKET = "shpool_ticket"  # attribute of a request that an auth object has led through the gate already


class Passage:
    """One request's way through the gate, with a ticket for each attempt.

    Args:
        gate: The gate.
        unit: What a number in ``Retry-After`` counts.
        ticket: The one it has already, if any.
        request: Whose token is to be renewed after each wait; None for one whose sender does so.
    """

    def __init__(
        self,
        gate: AccountGate,
        unit: RetryAfterUnit,
        ticket: Ticket | None = None,
        request: requests.PreparedRequest | None = None,
    ) -> None:
        self._gate = gate
        self._unit = unit
        self._ticket = ticket
        self._request = request
        self._is_heeded = False

    def __reduce__(self) -> tuple[object, ...]:
        return type(None), ()  # as a ticket: a request in an error that travels has ended its way

    def enter(self) -> None:
        """Wait for the leave to send an attempt."""
        self.leave()
        self._ticket = self._gate.acquire()
        self._is_heeded = False
        if self._request is not None:
            renew_token(self._request)

    def heed(self, response: Any) -> None:  # noqa: ANN401 - urllib3's or requests'
        """Do what the answer to an attempt says, once."""
        if self._ticket is not None and not self._is_heeded:
            self._is_heeded = True
            status = getattr(response, "status", None) or response.status_code
            self._ticket.heed(status, response.headers, self._unit)

    def leave(self) -> None:
        """End an attempt."""
        if self._ticket is not None:
            self._ticket.release()

    def leave_after(self, response: requests.Response, *, stream: bool) -> None:
        """End an attempt once its body has been read, which this does unless the caller is to read it."""
        if self._ticket is None or not self._ticket.is_connected:
            return
        if stream:
            _call_at_end(response.raw, self._ticket)
            return
        try:
            _ = response.content
        finally:
            self.leave()


def _call_at_end(raw: Any, ticket: Ticket) -> None:  # noqa: ANN401 - urllib3's answer
    """Release a ticket when a body is read to its end, or closed; one that is forgotten takes its ticket along."""
    release_conn = raw.release_conn

    def release_both() -> None:
        ticket.release()
        release_conn()

    raw.release_conn = release_both


def note_ticket(request: requests.PreparedRequest, ticket: Ticket) -> None:
    """Remember with a request that it has been let through."""
    setattr(request, _TICKET, ticket)


def renew_token(request: requests.PreparedRequest) -> None:
    """Have a request carry the token of this moment, if its auth object has made its headers able to."""
    renew = getattr(request.headers, "renew", None)
    if renew is not None:
        renew()


class BoundedRetry(Retry):
    """urllib3's retries, less the will to sleep for hours because a server said so, or to fail over an odd word."""

    unit: RetryAfterUnit = "s"
    passage: Passage | None = None

    def new(self, **kw: Any) -> Self:  # noqa: ANN401 - as urllib3
        """Return the same with other counts."""
        other = super().new(**kw)
        other.passage = self.passage
        return other

    def parse_retry_after(self, retry_after: str) -> float:
        """Return the seconds to wait; 0 leaves it to the backoff."""
        seconds = parse_retry_after(retry_after, now=time.time(), unit=self.unit)
        return min(seconds or 0.0, _LONGEST_RETRY_AFTER)

    def increment(self, *args: Any, **kw: Any) -> Self:  # noqa: ANN401 - as urllib3
        """Count an attempt that failed, once its answer is heeded."""
        if self.passage is not None and kw.get("response") is not None:
            self.passage.heed(kw["response"])
        return super().increment(*args, **kw)

    def sleep(self, response: Any = None) -> None:  # noqa: ANN401 - as urllib3
        """Wait for the next attempt, and for the gate to let it go."""
        if self.passage is not None:
            self.passage.leave()
        super().sleep(response)
        if self.passage is not None:
            self.passage.enter()


class MillisecondRetry(BoundedRetry):
    """For providers whose ``Retry-After`` counts milliseconds."""

    unit = "ms"


class GatedAdapter(HTTPAdapter):
    """Send requests, those that carry the token through the gate.

    Args:
        gate: The gate; None for none.
        unit: What a number in ``Retry-After`` counts.
    """

    def __init__(self, gate: AccountGate | None, unit: RetryAfterUnit) -> None:
        self._gate = gate
        self._unit = unit
        self._now = threading.local()  # the passage of the request that this thread is sending
        kind = MillisecondRetry if unit == "ms" else BoundedRetry
        retries = kind(
            total=ATTEMPTS - 1,
            status_forcelist=_PASSING,
            backoff_factor=1.0,
            backoff_jitter=1.0,
            raise_on_status=False,
        )
        super().__init__(max_retries=retries)

    @property  # type: ignore[override]  # requests reads it once in each send()
    def max_retries(self) -> BoundedRetry:
        """The retries of the request that this thread is sending, else of all."""
        passage = getattr(self._now, "passage", None)
        if passage is None:
            return self._retries
        retries = self._retries.new()
        retries.passage = passage
        return retries

    @max_retries.setter
    def max_retries(self, retries: BoundedRetry) -> None:
        self._retries = retries

    def send(self, request: requests.PreparedRequest, stream: bool = False, **kwargs: Any) -> requests.Response:  # type: ignore[override]  # noqa: ANN401, FBT001, FBT002 - as requests
        """Send a request, by way of the gate if it carries the token."""
        bearer = str(request.headers.get("Authorization", ""))
        if self._gate is None or not bearer.startswith("Bearer "):
            return super().send(request, stream=stream, **kwargs)
        ticket: Ticket | None = vars(request).pop(_TICKET, None)
        passage = self._now.passage = Passage(self._gate, self._unit, ticket, request)
        try:
            if ticket is None:
                passage.enter()
            response = super().send(request, stream=stream, **kwargs)
            passage.heed(response)
            passage.leave_after(response, stream=stream)
        except BaseException:
            passage.leave()
            raise
        finally:
            self._now.passage = None
        return response
