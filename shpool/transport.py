"""The transport below ``requests``: retries within bounds, and the gate before each attempt.

The rules:

 1. A request that carries the token goes through the gate, each attempt of it anew: the account pays for every one.
 2. What an answer says is heeded before anything else is done about it, so that the others pause at once.
 3. A connection slot is held until the body has been read, or the answer is closed or forgotten; never while a
    request waits for its next attempt.
 4. Waits may be longer than a token lives, so each attempt is sent with the token of the moment after its wait.
 5. What might have been done already is not sent again: POST and PATCH only after 429 (RFC 6585, section 4), and 503
    with ``Retry-After`` (RFC 9110, section 15.6.4), by which a server says that it did not take the request up.
 6. Nor is a body sent again that cannot be read twice: what is left of it is not what was to be sent.
"""

from __future__ import annotations

import functools
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

from requests.adapters import HTTPAdapter
from urllib3.util.retry import Retry

from shpool.retry import parse_retry_after

if TYPE_CHECKING:
    from collections.abc import Callable

    import requests
    from typing_extensions import Self

    from shpool.gate import AccountGate, Ticket
    from shpool.retry import RetryAfterUnit

ATTEMPTS = 4  # as sentinelhub-py's max_download_attempts
_LONGEST_RETRY_AFTER = 120.0  # s; a server that asks for more is asked again then
_UNTAKEN, _UNAVAILABLE = 429, 503
_ONCE = frozenset({"POST", "PATCH"})  # methods by which a thing may be done twice (RFC 9110, section 9.2.2)
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

    def enter(self) -> Ticket:
        """Wait for the leave to send an attempt, and return it."""
        self.leave()
        ticket = self._ticket = self._gate.acquire()
        self._is_heeded = False
        if self._request is not None:
            renew_token(self._request)
        return ticket

    def heed_last(self, response: requests.Response) -> None:
        """Do what the answer to the last attempt says, unless the retries have when they gave up."""
        if not self._is_heeded:
            self.heed(response)

    def heed(self, response: Any) -> None:  # noqa: ANN401 - urllib3's or requests'
        """Do what the answer to an attempt says."""
        self._is_heeded = True
        if self._ticket is not None:
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
    """Release a ticket when a body is read to its end, or closed, or its answer forgotten."""
    end = weakref.finalize(raw, ticket.release)
    end.atexit = False  # the slot goes with the process
    # An answer that held itself would be forgotten only when the cycle collector runs, and the slot with it.
    raw.release_conn = functools.partial(_release_both, end, weakref.ref(raw))


def _release_both(end: Callable[[], object], answer: weakref.ref[Any]) -> None:
    end()
    raw = answer()
    if raw is not None:
        type(raw).release_conn(raw)


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
    can_repeat = True  # the request's body can be sent again

    def new(self, **kw: Any) -> Self:  # noqa: ANN401 - as urllib3
        """Return the same with other counts."""
        other = super().new(**kw)
        other.passage, other.can_repeat = self.passage, self.can_repeat
        return other

    def is_retry(self, method: str, status_code: int, has_retry_after: bool = False) -> bool:  # noqa: FBT001, FBT002 - as urllib3
        """Tell whether a request that was so answered is sent again (rules 5 and 6)."""
        if not self.can_repeat:
            return False
        if method.upper() in _ONCE:
            return status_code == _UNTAKEN or (status_code == _UNAVAILABLE and has_retry_after)
        return super().is_retry(method, status_code, has_retry_after)

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

    _retries: BoundedRetry  # of all requests

    def __init__(self, gate: AccountGate | None, unit: RetryAfterUnit) -> None:
        self._gate = gate
        self._unit = unit
        self._now = threading.local()  # the retries of the request that this thread is sending
        kind = MillisecondRetry if unit == "ms" else BoundedRetry
        retries = kind(
            total=ATTEMPTS - 1,
            status_forcelist=_PASSING,
            backoff_factor=1.0,
            backoff_jitter=1.0,
            raise_on_status=False,
        )
        super().__init__(max_retries=retries)

    @property
    def is_gated(self) -> bool:
        """Tell whether requests that carry the token go through a gate here."""
        return self._gate is not None

    @property
    def max_retries(self) -> BoundedRetry:  # requests reads it once in each send()
        """The retries of the request that this thread is sending, else of all."""
        retries: BoundedRetry | None = getattr(self._now, "retries", None)
        return retries or self._retries

    @max_retries.setter  # type: ignore[override]  # a number too, as requests' own takes
    def max_retries(self, retries: BoundedRetry | int) -> None:
        self._retries = self._retries.new(total=retries) if isinstance(retries, int) else retries

    def send(self, request: requests.PreparedRequest, stream: bool = False, **kwargs: Any) -> requests.Response:  # type: ignore[override]  # noqa: ANN401, FBT001, FBT002 - as requests
        """Send a request, by way of the gate if it carries the token."""
        can_repeat = _can_be_read_again(request)
        retries = self._now.retries = self._retries.new() if can_repeat else self._retries.new(read=False)
        retries.can_repeat = can_repeat
        try:
            bearer = str(request.headers.get("Authorization", ""))
            if self._gate is None or not bearer.startswith("Bearer "):
                return super().send(request, stream=stream, **kwargs)
            ticket: Ticket | None = vars(request).pop(_TICKET, None)
            retries.passage = Passage(self._gate, self._unit, ticket, request)
            return self._send_through(retries.passage, request, stream=stream, is_let_in=ticket is not None, **kwargs)
        finally:
            self._now.retries = None

    def _send_through(
        self,
        passage: Passage,
        request: requests.PreparedRequest,
        *,
        stream: bool,
        is_let_in: bool,
        **kwargs: Any,  # noqa: ANN401 - as requests
    ) -> requests.Response:
        try:
            if not is_let_in:
                passage.enter()
            response = super().send(request, stream=stream, **kwargs)
            passage.heed_last(response)
            passage.leave_after(response, stream=stream)
        except BaseException:
            passage.leave()
            raise
        return response


def _can_be_read_again(request: requests.PreparedRequest) -> bool:
    """Tell whether a body can be sent more than once: ``requests`` notes where one began that can be put back."""
    body: Any = request.body  # as a caller gave it
    return body is None or isinstance(body, (str, bytes)) or isinstance(vars(request)["_body_position"], int)
