"""One login: a single request to a token endpoint, and what its answer means.

1. One call is one request (RFC 6749, section 4.4.2). Nothing here waits, retries or remembers. An answer that has
   not ended after the sum of both timeouts is given up, however steadily it drips.
2. Credentials travel over https, or over http to this machine without a proxy. No redirect is followed, and no
   line of ``~/.netrc`` replaces them.
3. 5xx, 408, 425 and 429 are temporary, whatever their body says.
4. Any other answer with an ``error`` field means what RFC 6749, section 5.2 says: four of the codes are final,
   ``invalid_client``, ``unauthorized_client``, ``invalid_scope`` and ``unsupported_grant_type``.
5. A 4xx without an ``error`` field is a ``LoginError`` with its status; a 2xx without a token a ``TokenResponseError``.
6. The functions that hold a secret, or the text of an answer, return their errors instead of raising them: so no
   traceback has a frame whose local variables show either. What they cannot return, such as an interrupt, goes on
   without its traceback and without what it was raised from.
7. A provider's words that repeat the secret are masked, encoded forms included.
"""

from __future__ import annotations

import base64
import functools
import json
import re
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote, quote_plus, urlsplit

from shpool.errors import LoginError, LoginRefusedError, TokenResponseError
from shpool.importing import import_each
from shpool.origins import host_of, is_loopback_host, is_secure_url
from shpool.redaction import MASK, Secret, quiet_transport
from shpool.retry import is_temporary_status, parse_retry_after
from shpool.tokens import Clock, Instant, Token, token_from_response
from shpool.version import __version__

if TYPE_CHECKING:
    import requests
    from oauthlib.oauth2 import BackendApplicationClient

    from shpool.retry import RetryAfterUnit

ClientAuth = Literal["post", "basic"]  # RFC 6749, section 2.3.1: in the body, or as HTTP Basic

# Codes that no retry with the same registration can turn (RFC 6749, section 5.2): the four of rule 4.
FINAL_CODES = frozenset({"invalid_client", "unauthorized_client", "invalid_scope", "unsupported_grant_type"})

_LARGEST_ANSWER = 1 << 20  # bytes; the board holds 64 KiB, so anything near this is no token
_LONGEST_WORDS = 300  # characters of a provider's description that an error repeats
USER_AGENT = f"shpool/{__version__}"  # what requests of this package call themselves
_NO_PROXY = {"http": "", "https": ""}  # an empty entry keeps requests from asking the environment


@dataclass(frozen=True)
class TokenEndpoint:
    """Where one client gets its tokens, and how it proves who it is.

    Args:
        url: The token endpoint; https, or http on this machine.
        client_id: Public name of the client.
        client_secret: Its secret.
        scope: Space-separated scopes to ask for, or None.
        audience: The API the token is for, where a provider wants to be told (not in RFC 6749), or None.
        client_auth: Credentials in the body (``post``) or as HTTP Basic (``basic``).
        timeout: Seconds to connect, and seconds without a byte while reading; their sum bounds the whole attempt.
        retry_after_unit: What a number in ``Retry-After`` counts: ``s`` (RFC 9110) or ``ms``.
        verify: Whether to verify TLS certificates, or the path of a CA bundle.

    Raises:
        ValueError: An argument is missing or out of range.
    """

    url: str
    client_id: str
    client_secret: Secret
    scope: str | None = None
    audience: str | None = None
    client_auth: ClientAuth = "post"
    timeout: tuple[float, float] = (10.0, 30.0)
    retry_after_unit: RetryAfterUnit = "s"
    verify: bool | str = True

    def __post_init__(self) -> None:
        for name in ("client_id", "client_secret"):
            if not getattr(self, name):
                msg = f"{name} is missing; pass the one the provider gave this client"
                raise ValueError(msg)
        if not is_secure_url(self.url) or "@" in urlsplit(self.url).netloc:
            shown = _plain(self.url.rpartition("@")[2])
            msg = f"token_url must be https, or http on this machine, and hold no credentials, got {shown!r}"
            raise ValueError(msg)
        if self.client_auth not in ("post", "basic"):
            msg = f"client_auth is 'post' or 'basic', got {self.client_auth!r}"
            raise ValueError(msg)
        if self.retry_after_unit not in ("s", "ms"):
            msg = f"retry_after_unit is 's' or 'ms', got {self.retry_after_unit!r}"
            raise ValueError(msg)
        if not all(0 < seconds < float("inf") for seconds in self.timeout):
            msg = f"timeout is two numbers of seconds above 0, got {self.timeout!r}"
            raise ValueError(msg)

    def login(self, clock: Clock) -> Token:
        """Ask once for a token; its lifetime counts from before the request.

        Raises:
            LoginRefusedError: One of the four final codes: this registration will never get a token.
            TokenResponseError: The endpoint answered, but not with a token.
            LoginError: No token this time.
        """
        # Before the lifetime begins to count: a first import can take half a second.
        import_each("http.client", "urllib3", "requests", "oauthlib.oauth2", "requests_oauthlib")
        sent = clock.now()
        outcome = self._attempt(sent)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def _attempt(self, sent: Instant) -> Token | BaseException:
        try:
            answer = self._exchange()
            return answer if isinstance(answer, LoginError) else self._judge(answer, sent)
        except BaseException as exc:  # noqa: BLE001 - raised again by the caller, without the frames of the exchange
            return _without_history(exc)

    def _exchange(self) -> _Answer | LoginError:
        import requests
        from oauthlib.oauth2 import BackendApplicationClient
        from requests_oauthlib import OAuth2Session
        from urllib3.exceptions import HTTPError

        until = time.monotonic() + sum(self.timeout)
        outer = sys.exc_info()[1]
        client = BackendApplicationClient(self.client_id)
        with quiet_transport(), OAuth2Session(client=client) as session:
            # The request of the base class: OAuth2Session's own refuses http to this machine unless an environment
            # variable allows http to everywhere, and it logs the body.
            send = functools.partial(requests.Session.request, session, "POST", self.url)
            try:
                with send(
                    data=self._body(client),
                    headers={
                        "Accept": "application/json",
                        "Content-Type": "application/x-www-form-urlencoded",
                        "User-Agent": USER_AGENT,
                    },
                    auth=self._basic_auth(),  # None leaves OAuth2Session's own, which does nothing and bars ~/.netrc
                    timeout=self.timeout,
                    verify=self.verify,
                    proxies=_NO_PROXY if is_loopback_host(host_of(self.url)) else None,
                    allow_redirects=False,
                    stream=True,
                ) as response:
                    return self._read_answer(response, until)
            except (OSError, ValueError, HTTPError) as exc:  # requests' errors are OSErrors; bad URLs are ValueErrors
                return LoginError(self.url, self._reason(exc, outer))

    def _body(self, client: BackendApplicationClient) -> str:
        extra = {} if self.audience is None else {"audience": self.audience}
        if self.client_auth == "post":
            extra["client_secret"] = self.client_secret.reveal()
        return client.prepare_request_body(scope=self.scope, include_client_id=self.client_auth == "post", **extra)

    def _basic_auth(self) -> requests.auth.HTTPBasicAuth | None:
        if self.client_auth == "post":
            return None
        from requests.auth import HTTPBasicAuth

        # RFC 6749, section 2.3.1 wants both form-encoded first; %20 for a space is read alike by every decoder.
        return HTTPBasicAuth(quote(self.client_id, safe=""), quote(self.client_secret.reveal(), safe=""))

    def _read_answer(self, response: requests.Response, until: float) -> _Answer | LoginError:
        content = bytearray()
        for chunk in _chunks(response):
            content += chunk
            if len(content) > _LARGEST_ANSWER:
                words = f"the answer is longer than {_LARGEST_ANSWER} bytes"
                return LoginError(self.url, words, response.status_code)
            if time.monotonic() > until:
                return LoginError(self.url, f"the answer did not end within {sum(self.timeout):g} s")
        headers = response.headers
        return _Answer(response.status_code, bytes(content), headers.get("Retry-After"), headers.get("Location", ""))

    def _reason(self, exc: Exception, outer: BaseException | None) -> str:
        """Say what went wrong without quoting requests, whose texts may hold a proxy's password."""
        connect, read = self.timeout
        names = {cls.__name__ for cls in type(exc).__mro__}
        if "ConnectTimeout" in names:
            return f"no connection within {connect:g} s"
        root = _root_cause(exc, outer)
        if "Timeout" in names or isinstance(root, TimeoutError):
            return f"no answer within {read:g} s"
        if "ProxyError" in names:
            return "the proxy of the environment did not connect"
        if isinstance(root, OSError) and (words := root.strerror or str(root)):
            return ("TLS: " if "SSLError" in names else "") + _plain(words)
        return f"the exchange broke off ({type(root).__name__})"

    def _judge(self, answer: _Answer, sent: Instant) -> Token | LoginError:
        status = answer.status
        if is_temporary_status(status):
            wait = parse_retry_after(answer.retry_after, now=sent.wall, unit=self.retry_after_unit)
            return LoginError(self.url, _phrase(status), status, wait)
        if HTTPStatus.MULTIPLE_CHOICES <= status < HTTPStatus.BAD_REQUEST:
            return LoginError(self.url, f"it redirects to {_origin(answer.location)}, which is not followed", status)
        fields = _decode_json(answer.content)
        if isinstance(fields, Mapping) and fields.get("error"):
            return self._error_of(fields, status)
        if status >= HTTPStatus.BAD_REQUEST:
            return LoginError(self.url, f"{_phrase(status)}, without an OAuth error code", status)
        return self._token_of(fields, sent)

    def _token_of(self, fields: object, sent: Instant) -> Token | TokenResponseError:
        if fields is None:
            return TokenResponseError(self.url, "the answer is not JSON")
        try:
            return token_from_response(fields, sent, endpoint=self.url)
        except TokenResponseError as exc:
            return TokenResponseError(exc.endpoint, exc.reason)  # a copy: the original's frames hold the token

    def _error_of(self, fields: Mapping[str, object], status: int) -> LoginError:
        code, words = (self._without_secret(fields.get(key)) for key in ("error", "error_description"))
        if code in FINAL_CODES:
            return LoginRefusedError(self.url, self.client_id, code, words, status)
        return LoginError(self.url, f"{code}: {words}" if words else code, status)

    def _without_secret(self, value: object) -> str:
        """Return a provider's words as one line; a careless one repeats the secret in them."""
        text = value if isinstance(value, str) else "" if value is None else f"an error of type {type(value).__name__}"
        for form in self._secret_forms():
            text = text.replace(form, MASK)
        return _plain(text)

    def _secret_forms(self) -> list[str]:
        """Return the secret as it is and as requests carry it, longest first: quoted for a form or URL, or as Basic."""
        who, secret = self.client_id, self.client_secret.reveal()
        forms = {secret, quote(secret), quote(secret, safe=""), quote_plus(secret)}
        pairs = (f"{who}:{secret}", f"{quote(who, safe='')}:{quote(secret, safe='')}")
        forms |= {base64.b64encode(pair.encode()).decode().rstrip("=") for pair in pairs}
        forms |= {re.sub("%..", lambda code: code[0].lower(), form) for form in forms}  # some servers write %2f
        return sorted(forms, key=len, reverse=True)


@dataclass(frozen=True, repr=False)
class _Answer:
    """What of an HTTP answer matters here; no repr, since the content may be a token."""

    status: int
    content: bytes
    retry_after: str | None
    location: str


def _chunks(response: requests.Response) -> Iterator[bytes]:
    """Yield an answer's bytes as they arrive: a read of so many bytes would wait until it has them all."""
    read1 = getattr(response.raw, "read1", None)
    if read1 is None:  # urllib3 before 2.2; slow for long answers, and tokens are short
        yield from response.iter_content(1)
    else:
        while chunk := read1(1 << 16, decode_content=True):
            yield chunk


def _without_history(exc: BaseException) -> BaseException:
    """Return an error free of its frames and of the errors behind it, which show the secret."""
    exc.__cause__ = exc.__context__ = None
    return exc.with_traceback(None)


def _decode_json(content: bytes) -> object:
    """Return the decoded JSON, or None where there is none; ``null`` is no token either."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "an unassigned status"


def _plain(text: str) -> str:
    """Return a text as one bounded line, free of what would steer a terminal."""
    line = "".join(char if char.isprintable() else " " for char in text[:_LONGEST_WORDS])
    return " ".join(line.split())


def _origin(location: str) -> str:
    try:
        parts = urlsplit(location)
    except ValueError:
        return "an unreadable address"
    host = parts.hostname
    return _plain(f"{parts.scheme}://{host}") if host else "another path"


def _root_cause(exc: BaseException, outer: BaseException | None) -> BaseException:
    """Return the first error of a chain, short of one the caller was handling already."""
    seen = {id(exc), id(outer)}
    while (inner := exc.__cause__ or exc.__context__) is not None and id(inner) not in seen:
        seen.add(id(inner))
        exc = inner
    return exc
