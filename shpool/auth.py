"""A ``requests`` auth object that sends the shared token.

The rules:

 1. The token goes to the hosts that are allowed, or, where none are named, to the origin of the user's own call;
    over https only, except on this machine. Other hosts are asked without it.
 2. A redirect to another origin loses the token. ``requests`` does that; a refusal from there is not retried here.
 3. A 401 means that a server refused the token of one generation. That generation is reported, a later one waited
    for, and the request sent once more. The second answer is the caller's, whatever it is.
 4. ``~/.netrc`` never takes the token's place.
 5. What carries the token goes through the gate (see ``transport``): the first attempt, the one after a 401 and those
    after redirects within the origin do. The token is the one of the moment after that wait.
 6. A request that was sent holds its header, and so do answers and errors that hold the request: do not print these.
    Pickled, as the error of a task, they go without it.
"""

from __future__ import annotations

import logging
import weakref
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from requests.auth import AuthBase
from requests.structures import CaseInsensitiveDict

from shpool.bearer import NEW_TOKEN_WITHIN, HostRule, lacks_scope
from shpool.gate import unanswered
from shpool.origins import host_of
from shpool.transport import Passage, note_ticket, renew_token

if TYPE_CHECKING:
    from collections.abc import Mapping

    import requests

    from shpool.bearer import TokenHolder
    from shpool.gate import AccountGate
    from shpool.retry import RetryAfterUnit
    from shpool.tokens import Token

logger = logging.getLogger(__name__)

_UNAUTHORIZED = 401
_AUTHORIZATION = "authorization"


class BearerAuth(AuthBase):
    """Authenticate ``requests`` calls with the token as it is at that moment, and apply the 401 rule.

    requests.get(url, auth=current_session().auth)

    Args:
        holder: Whose token to send.
        gate: What a request waits for before it is sent; None for nothing.
        retry_after_unit: What a number in ``Retry-After`` counts, ``s`` or ``ms``.
    """

    def __init__(
        self, holder: TokenHolder, gate: AccountGate | None = None, retry_after_unit: RetryAfterUnit = "s"
    ) -> None:
        self._holder = holder
        self._gate = gate
        self._unit = retry_after_unit
        self._hosts = HostRule(holder)

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Add the token to a request that may carry it.

        Raises:
            InsecureUrlError: The host may have the token, but not over an unencrypted connection.
            TokenUnavailableError: There is no valid token.
        """
        url = request.url or ""
        if not self._hosts.admits(url):
            return request
        unanswered.give_back()
        ticket = None if self._gate is None else self._gate.acquire()
        attempt = _Attempt(self._holder, self._holder.token, _position(request.body))
        if self._gate is not None and ticket is not None:
            note_ticket(request, ticket)
            unanswered.expect(ticket)
            attempt.passage = Passage(self._gate, self._unit, ticket)
        request.headers = _BearerHeaders(request.headers, attempt)
        request.headers["Authorization"] = attempt.header
        request.register_hook("response", attempt.take_answer)  # type: ignore[no-untyped-call]  # types-requests leaves it out
        return request


class _Attempt:
    """One request sent with one generation of the token.

    Attributes:
        header: The one it carries.
        passage: Its way through the gate; None where it needs none, or its adapter leads it.
        is_redirected: Its next copy is for a redirect, which is to go through the gate when it is sent.
    """

    def __init__(self, holder: TokenHolder, token: Token, position: int | None) -> None:
        self._holder = holder
        self._generation = token.generation
        self._position = position
        self._has_answer = False
        self.header = f"Bearer {token.access_token}"
        self.passage: Passage | None = None
        self.is_redirected = False

    def __reduce__(self) -> tuple[object, ...]:
        return _NoAttempt, ()  # in a request of an error that travels; neither token nor session goes with it

    def renew(self) -> str:
        """Send the token of this moment, where the request had to wait; return its header."""
        token = self._holder.token
        if not self._has_answer:
            self._generation, self.header = token.generation, f"Bearer {token.access_token}"
        return f"Bearer {token.access_token}"

    def enter(self) -> None:
        """Wait for the leave to send the request another time."""
        self.is_redirected = False
        if self.passage is not None:
            unanswered.give_back()
            unanswered.expect(self.passage.enter())

    def take_answer(self, response: requests.Response, **kwargs: Any) -> requests.Response:  # noqa: ANN401 - requests' hook
        """Heed an answer, and apply the 401 rule to it."""
        if getattr(response.connection, "is_gated", False):
            self.passage = None  # the adapter has taken the ticket, heeded the answer, and gets what follows
            unanswered.has_come()
        self._leave(response, kwargs)
        request = response.request
        was_ours = request.headers.get("Authorization") == self.header
        if (
            response.status_code != _UNAUTHORIZED
            or not was_ours
            or lacks_scope(response.headers.get("WWW-Authenticate", ""))
        ):
            return response
        logger.info("%s refused the token of generation %d", host_of(request.url or ""), self._generation)
        self._holder.report_refused(self._generation)
        if not self._rewind(request):
            return response
        self._has_answer = True
        token = self._holder.wait_for_token(NEW_TOKEN_WITHIN, newer_than=self._generation)
        _ = response.content  # read to its end, so that the connection can be used again
        response.close()
        request.headers["Authorization"] = f"Bearer {token.access_token}"  # a redirect of the answer copies this one
        again = request.copy()
        self.enter()
        renew_token(again)
        answer: requests.Response = response.connection.send(again, **kwargs)  # as requests' own digest auth does
        self._leave(answer, kwargs)
        answer.history.append(response)
        answer.request = again
        return answer

    def _leave(self, response: requests.Response, options: Mapping[str, Any]) -> None:
        if self.passage is not None:
            unanswered.has_come()
            self.passage.heed(response)
            self.passage.leave_after(response, stream=bool(options.get("stream")))
            self.is_redirected = response.is_redirect

    def _rewind(self, request: requests.PreparedRequest) -> bool:
        """Put a body back to its start; tell whether the request can be sent again."""
        body: Any = request.body  # anything requests takes: text, bytes, a file, a generator
        if body is None or isinstance(body, (str, bytes)):
            return True
        if self._position is None:
            return False
        body.seek(self._position)
        return True


class _NoAttempt:
    """What an attempt is in another process: nothing that could be made again."""

    def take_answer(self, response: requests.Response, **_: Any) -> requests.Response:  # noqa: ANN401 - requests' hook
        return response


class _BearerHeaders(CaseInsensitiveDict[str]):
    """Headers whose token is renewed in all their copies, urllib3's too, and that no password replaces.

    ``requests`` looks into ~/.netrc at each redirect.
    """

    def __init__(
        self,
        fields: Mapping[str, str] = MappingProxyType({}),
        attempt: _Attempt | None = None,
        copies: list[weakref.ref[_BearerHeaders]] | None = None,
    ) -> None:
        self._attempt = attempt
        self._copies = [] if copies is None else copies
        self._copies.append(weakref.ref(self))
        self._is_redirect = False  # of a request that is to go through the gate when it is sent
        super().__init__(fields)

    def __setitem__(self, key: str, value: str) -> None:
        if key.lower() != _AUTHORIZATION or key not in self or not str(value).startswith("Basic "):
            super().__setitem__(key, value)

    def __reduce__(self) -> tuple[object, ...]:
        return _BearerHeaders, ({name: value for name, value in self.items() if name.lower() != _AUTHORIZATION},)

    def copy(self) -> _BearerHeaders:
        """Return a copy that guards the token too.

        ``requests`` copies the headers for a redirect, and tells nobody when it sends that; but urllib3 then copies the
        copy, before it takes a connection. It does not where it tunnels through a proxy.
        """
        attempt = self._attempt
        if attempt is not None and self._is_redirect:
            self._is_redirect = attempt.is_redirected = False
            if str(self.get(_AUTHORIZATION, "")).startswith("Bearer "):  # else it leads to another origin
                attempt.enter()
                self.renew()
        copy = _BearerHeaders(dict(self.items()), attempt, self._copies)
        copy._is_redirect = attempt is not None and attempt.is_redirected
        return copy

    def renew(self) -> None:
        """Replace the token by that of the moment, wherever it still stands; the gate has been waited for."""
        self._is_redirect = False
        old = self.get(_AUTHORIZATION)
        if self._attempt is None or old is None:
            return
        new = self._attempt.renew()
        for headers in [copy() for copy in self._copies] if new != old else ():
            if headers is not None and headers.get(_AUTHORIZATION) == old:
                headers["Authorization"] = new

    def forget(self) -> None:
        """Know of no token any more."""
        self._attempt = None
        self.pop(_AUTHORIZATION, None)


def forget_token(request: Any) -> None:  # noqa: ANN401 - a request, prepared or not
    """Take the token out of a request that was sent, and the hooks, which hold it for the next one."""
    request.headers.pop(_AUTHORIZATION, None)
    if isinstance(request.headers, _BearerHeaders):
        request.headers.forget()
    request.hooks = {"response": []}


def _position(body: Any) -> int | None:  # noqa: ANN401 - whatever requests takes as a body
    try:
        return int(body.tell())
    except (AttributeError, OSError, TypeError, ValueError):
        return None
