"""A loopback OAuth2 provider with a data service: real sockets, a thread of the calling process, faults on demand."""

from __future__ import annotations

import asyncio
import hashlib
import re
import threading
from collections import deque
from collections.abc import Coroutine, Mapping, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from shpool.testing.endpoint import Endpoint
from shpool.testing.files import FileFault, FileShelf
from shpool.testing.issuer import ExpiresIn, TokenIssuer
from shpool.testing.messages import Request, Response
from shpool.tokens import SYSTEM_CLOCK

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from shpool.tokens import Clock

At = Literal["token", "data"]
_T = TypeVar("_T")
_TILE = re.compile(r"/tiles/(\d{1,18})")
_LARGEST_TILE = 1 << 28  # bytes; a mistyped size must not eat the machine's memory


def tile_bytes(n: int, size: int) -> bytes:
    """Return what ``/tiles/<n>?size=<size>`` holds: the same pseudo-random bytes each time.

    >>> tile_bytes(7, 4).hex()
    'ea3b60c0'
    """
    return hashlib.shake_128(b"tile %d" % n).digest(size)


class LoopbackServer:
    """An OAuth2 provider and a data service on two ports of 127.0.0.1, as a context manager.

    The token endpoint takes client credentials in the body or as HTTP Basic. The data service answers
    ``/tiles/<n>?size=<bytes>``, ``/files/<name>`` and ``/whoami`` to bearers of a valid token, and
    ``/redirect?to=<url>`` to anybody. Both stand on their own ports, as an identity provider seldom is the API's host.

    Args:
        lifetime: Seconds a token lives; the attribute may be set later, for tokens to come.
        client_id: The only client that may log in.
        client_secret: Its secret.
        jwt: Give out JSON Web Tokens, else opaque ones.
        expires_in: The form of that field in token answers.
        clock: Decides when tokens expire.

    Attributes:
        requests: Requests answered, at both ports.
        token_requests: Requests answered at the token endpoint, refused ones too.
        unauthorized: Answers 401 of the data service.
        bytes_sent: Bytes of content the data service sent.
    """

    def __init__(  # noqa: PLR0913 - each is one property of a provider, with a default
        self,
        lifetime: float = 3600.0,
        *,
        client_id: str = "demo-client",
        client_secret: str = "demo-secret-not-real",  # noqa: S107 - an invented secret, for loopback only
        jwt: bool = True,
        expires_in: ExpiresIn = "int",
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.client_id = client_id
        self.client_secret = client_secret
        self.requests = 0
        self.token_requests = 0
        self.unauthorized = 0
        self.bytes_sent = 0
        self._clock = clock
        self._shelf = FileShelf()
        self._log: list[tuple[float, str, int]] = []
        self._issuer = TokenIssuer(
            client_id, client_secret, lifetime=lifetime, jwt=jwt, expires_in=expires_in, clock=clock
        )
        self._endpoints: dict[At, Endpoint] = {
            "token": Endpoint(self._answer_token, self._record_token),
            "data": Endpoint(self._answer_data, self._record_data),
        }
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        loop = self._loop = asyncio.new_event_loop()
        # daemon: a test that dies between enter and exit must not keep the interpreter alive
        self._thread = threading.Thread(target=loop.run_forever, name="shpool-loopback-server", daemon=True)
        self._thread.start()
        for endpoint in self._endpoints.values():
            self._run(endpoint.open())
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._loop is None or self._thread is None:
            return
        for endpoint in self._endpoints.values():
            self._run(endpoint.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._loop = self._thread = None

    @property
    def token_url(self) -> str:
        """URL of the token endpoint."""
        return f"http://127.0.0.1:{self._endpoints['token'].port}/token"

    @property
    def base_url(self) -> str:
        """URL of the data service, without a slash at its end."""
        return f"http://127.0.0.1:{self._endpoints['data'].port}"

    def data_url(self, n: int, size: int = 1024) -> str:
        """Return the URL of tile ``n`` with ``size`` bytes."""
        return f"{self.base_url}/tiles/{n}?size={size}"

    def put_file(
        self, name: str, content: bytes, headers: Mapping[str, str] | None = None, *, public: bool = False
    ) -> str:
        """Offer a file and return its URL.

        Args:
            name: What follows ``/files/`` in its URL, as it stands in there: encoded.
            content: What it holds.
            headers: Fields of its answers, besides a type and a strong ETag; they may replace these.
            public: Give it to anybody.
        """
        self._shelf.put(name, content, headers, is_public=public)
        return f"{self.base_url}/files/{name}"

    def fail_file(self, name: str, *faults: FileFault) -> None:
        """Let the next answers for a file go wrong, in this order."""
        self._shelf.fail_next(name, *faults)

    def fail_files_at_random(self, share: float, *faults: FileFault, seed: int = 0) -> None:
        """Let a share of the answers for all files go wrong, each in one of these ways; 0 heals."""
        self._shelf.fail_at_random(seed, share, faults)

    def file_requests(self, name: str) -> Sequence[Request]:
        """Return the requests for a file that were allowed to have it, oldest first."""
        return tuple(self._shelf.seen[name])

    @property
    def logins(self) -> int:
        """Tokens given out."""
        return self._issuer.logins

    @property
    def lifetime(self) -> float:
        """Seconds that tokens live from their login on."""
        return self._issuer.lifetime

    @lifetime.setter
    def lifetime(self, seconds: float) -> None:
        self._issuer.lifetime = seconds

    @property
    def log(self) -> list[tuple[float, str, int]]:
        """Boot time (seconds), path and status of each answer, oldest first."""
        return list(self._log)

    def fail_next(
        self,
        n: int,
        status: int = 503,
        retry_after: float | str | None = None,
        *,
        body: Mapping[str, Any] | bytes = b"",
        at: At = "token",
    ) -> None:
        """Answer the next ``n`` requests with ``status``; replaces what was said before, 0 heals.

        Args:
            n: How many requests.
            status: HTTP status; with 200 and a body of your own, an answer of any content.
            retry_after: Value of the Retry-After header.
            body: A JSON object, or bytes.
            at: Which port.
        """
        response = _fault(status, retry_after, body)
        self._set(at, next_answers=deque([response] * n))

    def answer_always(
        self,
        status: int | None,
        retry_after: float | str | None = None,
        *,
        body: Mapping[str, Any] | bytes = b"",
        at: At = "token",
    ) -> None:
        """Answer every request with ``status`` until told None; arguments as for ``fail_next``."""
        self._set(at, always=None if status is None else _fault(status, retry_after, body))

    def delay(self, seconds: float, *, at: At = "token") -> None:
        """Let every answer take ``seconds`` longer."""
        self._set(at, delay=seconds)

    def hang(self, on: bool = True, *, at: At = "token") -> None:  # noqa: FBT001, FBT002 - hang(False) reads as meant
        """Accept requests and answer none; once off, answer those whose clients still wait."""
        self._run(self._endpoints[at].hang(on))

    def refuse_connections(self, on: bool = True, *, at: At = "token") -> None:  # noqa: FBT001, FBT002 - as hang()
        """Close the listening socket and every connection; once off, listen on the same port again."""
        endpoint = self._endpoints[at]
        self._run(endpoint.refuse() if on else endpoint.open())

    def revoke_all(self) -> None:
        """Make every token given out so far invalid."""
        self._issuer.revoke_all()

    def _set(self, at: At, **faults: Any) -> None:  # noqa: ANN401 - attributes of Endpoint
        """Set what the endpoint reads on its own thread, between two of its answers."""
        if self._loop is None:
            vars(self._endpoints[at]).update(faults)  # before the start nobody reads
        else:
            self._run(self._endpoints[at].set(**faults))

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run ``work`` on the server's loop and return its result."""
        if self._loop is None:
            work.close()
            msg = "the server is not running; use it in a with statement"
            raise RuntimeError(msg)
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _record_token(self, request: Request, response: Response) -> None:
        self.token_requests += 1
        self._record(request, response)

    def _record_data(self, request: Request, response: Response) -> None:
        self.unauthorized += response.status == HTTPStatus.UNAUTHORIZED
        self.bytes_sent += len(response.body)
        self._record(request, response)

    def _record(self, request: Request, response: Response) -> None:
        self.requests += 1
        self._log.append((self._clock.now().boot, request.target, response.status))

    def _answer_token(self, request: Request) -> Response:
        return self._issuer.answer(request) if request.path == "/token" else Response(404)

    def _answer_data(self, request: Request) -> Response:
        if request.path == "/redirect":
            return Response(302, headers={"Location": request.query("to", "/whoami")})
        name = request.path.removeprefix("/files/") if request.path.startswith("/files/") else None
        if name is not None and self._shelf.is_public(name):
            return self._shelf.answer(name, request)
        scheme, _, access_token = request.headers.get("authorization", "").partition(" ")
        issued = self._issuer.lookup(access_token) if scheme.lower() == "bearer" else None
        if issued is None:
            # RFC 6750, section 3.1: no error code for a request without any token
            challenge = "Bearer" if not access_token else 'Bearer error="invalid_token"'
            return Response(401, headers={"WWW-Authenticate": challenge})
        if request.path == "/whoami":
            return Response.of_json(200, {"id": issued.id, "number": issued.number, "client_id": issued.client_id})
        return _answer_tile(request) if name is None else self._shelf.answer(name, request)


def _answer_tile(request: Request) -> Response:
    match = _TILE.fullmatch(request.path)
    size = request.query("size", "1024")
    if match is None or not size.isdigit() or int(size) > _LARGEST_TILE:
        return Response(404)
    return Response(200, tile_bytes(int(match[1]), int(size)), {"Content-Type": "application/octet-stream"})


def _fault(status: int, retry_after: float | str | None, body: Mapping[str, Any] | bytes) -> Response:
    headers = {} if retry_after is None else {"Retry-After": f"{retry_after}"}
    if isinstance(body, Mapping):
        return Response.of_json(status, body, headers)
    return Response(status, body, headers)
