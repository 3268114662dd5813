"""What a process that only reads holds: a live view of a shared token, and the one of a worker's own pool."""

from __future__ import annotations

import contextlib
import contextvars
import os
import time
from collections import deque
from typing import TYPE_CHECKING, Any, cast

from shpool.board import CLOSED, ReportBox, attach_named
from shpool.errors import BoardError, NoSessionError, TokenUnavailableError
from shpool.tokens import Posting, Token, boot_time

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shpool.auth import BearerAuth
    from shpool.channels import TokenReader
    from shpool.client import HTTPClient
    from shpool.gate import AccountGate
    from shpool.retry import RetryAfterUnit

    _View = tuple[Sequence[int], int, float, Token]

_monotonic = time.monotonic
DEFAULT_NAME = "sh-session-token"  # as in sentinelhub-py
LONGEST_WAIT = 30.0  # s a reader waits for a token before it gives up
_LONGEST_TRUST = 1.0  # s between two looks at the boot clock: it costs twice what the monotonic one does, which a
# suspended machine stops
_TOKENS_REMEMBERED = 4  # of those read, lest a log shows one that was replaced a moment ago
_FIRST_NAP, _LONGEST_NAP = 0.001, 0.05  # s between a waiting reader's looks at the board


class SharedSession:
    """A live, read-only view of a shared token. It never logs in, and it is never out of date.

    ``token`` is what it is for; all else is convenience around it. Pickled, it is a note to collect the same
    session again: the token stays in shared memory.
    """

    def __init__(
        self,
        reader: TokenReader,
        *,
        name: str | None = None,
        report: Callable[[int], None] = lambda _: None,
        gate: AccountGate | None = None,
    ) -> None:
        self._reader = reader
        self._identity: object = getattr(reader, "identity", None)
        self._posting = Posting(None)
        self._seen: deque[str] = deque(maxlen=_TOKENS_REMEMBERED)
        # The version word, its value when the board was last read, until when the token may be handed out unseen, and
        # the token: replaced as one, since threads look at it without a lock. A bare tuple, as unpacking a named one
        # costs a third of the budget for a read.
        self._view: _View = (reader.version_word, 0, 0.0, cast("Token", None))
        self._name = name
        self._report = report
        self._http: tuple[int, HTTPClient] | None = None  # with the process that made it
        self._gate = gate

    @property
    def token(self) -> Token:
        """The current token; reads as a mapping with ``access_token`` and ``expires_at``.

        Raises:
            TokenUnavailableError: The token has expired and no new one came within 30 s, the provider refused for
                good, or sharing has ended.
        """
        word, version, until, token = self._view
        if word[0] == version and _monotonic() < until:
            return token
        return self.wait_for_token(LONGEST_WAIT)

    @property
    def session_headers(self) -> dict[str, str]:
        """The header that authenticates a request (RFC 6750, section 2.1)."""
        return {"Authorization": f"Bearer {self.token.access_token}"}

    @property
    def allowed_hosts(self) -> tuple[str, ...]:
        """Hosts that may be sent the token; empty for the origin of each call."""
        return self._current_posting().allowed_hosts

    @property
    def retry_after_unit(self) -> RetryAfterUnit:
        """What a number in ``Retry-After`` counts at this provider."""
        return self._current_posting().retry_after_unit

    @property
    def gate(self) -> AccountGate:
        """What holds requests back so that the account's limits are kept; ``.http`` and ``.auth`` go through it.

        Where no pool gave one, as in a process that has collected the session, a free one of this process alone.
        """
        if self._gate is None:
            from shpool.gate import Gate

            self._gate = Gate()
        with contextlib.suppress(TokenUnavailableError):  # that is for those who ask for the token to hear
            self._gate.retry_after_unit = self.retry_after_unit
        return self._gate

    @property
    def auth(self) -> BearerAuth:
        """An auth object for ``requests``: the token of the moment, one retry when a server refuses it, the gate."""
        from shpool.auth import BearerAuth

        return BearerAuth(self, self.gate, self.retry_after_unit)

    @property
    def http(self) -> HTTPClient:
        """A ``requests.Session`` of this process, with the token, retries, timeouts and the gate.

        An answer 408, 425, 429, 500, 502, 503 or 504 is asked for again, four times in all; with POST and PATCH only
        429 and a 503 with ``Retry-After``, by which a server says that it did not take the request up. A body that can
        be read only once, as a generator's, is sent once.
        """
        if self._http is None or self._http[0] != os.getpid():
            from shpool.client import HTTPClient

            self._http = os.getpid(), HTTPClient(self, self.retry_after_unit, self.gate)
        return self._http[1]

    def info(self) -> dict[str, Any]:
        """Return the token's claims, unverified.

        Raises:
            OpaqueTokenError: The token is not a JSON Web Token.
            TokenUnavailableError: There is no valid token.
        """
        return self.token.claims()

    def wait_for_token(self, seconds: float, *, newer_than: int = -1) -> Token:
        """Return a valid token, waiting so many seconds for one if need be.

        Args:
            seconds: The longest wait.
            newer_than: Accept only later generations than this.

        Raises:
            TokenUnavailableError: None came.
        """
        word, version, until, known = self._view
        if word[0] == version and _monotonic() < until and known.generation > newer_than:
            return known  # as in ``token``
        give_up, nap = time.monotonic() + seconds, _FIRST_NAP
        while True:
            reader = self._reader
            version, payload = reader.read()
            if version == CLOSED:
                if self._found_successor():
                    continue
                reason = "sharing has ended"
                raise TokenUnavailableError(reason)
            posting = Posting.from_bytes(payload) if payload else Posting(None)
            token = posting.token
            if token is not None and boot_time() < token.deadline and token.generation > newer_than:
                self._posting = posting
                if token.access_token not in self._seen:
                    self._seen.append(token.access_token)
                until = _monotonic() + min(token.deadline - boot_time(), _LONGEST_TRUST)
                self._view = (reader.version_word, version, until, token)
                return token
            if posting.refused or time.monotonic() >= give_up:
                raise TokenUnavailableError(_why_none(token, newer_than), posting.error)
            time.sleep(nap)
            nap = min(nap * 2, _LONGEST_NAP)
            self._found_successor()

    def _found_successor(self) -> bool:
        """Attach to another segment if one stands under the name now: the owner put it back, or has an heir."""
        if self._name is not None:
            with contextlib.suppress(BoardError):
                found = attach_named(self._name)
                if found.version_word[0] != CLOSED and found.identity != self._identity:
                    self._reader, self._identity = found, found.identity
                    return True
        return False

    def _current_posting(self) -> Posting:
        _ = self.token
        return self._posting

    def known_secrets(self) -> tuple[str, ...]:
        """Return the access tokens read last, without waiting for one."""
        return tuple(self._seen)

    def forget(self) -> None:
        """Hold no token any more; for a process that goes on when its part in sharing has ended."""
        self._view = (self._view[0], 0, 0.0, cast("Token", None))
        self._posting = Posting(None)
        self._seen.clear()
        self._http = None

    def report_refused(self, generation: int) -> None:
        """Tell the parent that a server refused the token of this generation."""
        self._report(generation)

    def __repr__(self) -> str:
        where = self._name or "anonymous"
        return f"<SharedSession {where} {self._view[3]!r}>"

    def __reduce__(self) -> tuple[object, ...]:
        return collect_shared_session, (self._name,)


def collect_shared_session(memory_name: str | None = None) -> SharedSession:
    """Return the session another process of this user shares.

    Args:
        memory_name: The name it is shared under. Without one: inside a worker of a pool the pool's own session,
            elsewhere the one named ``sh-session-token``.

    Raises:
        BoardNotFoundError: Nothing is shared under that name (a ``FileNotFoundError``).
        ForeignBoardError: Another user owns the segment or may write to it.
        BoardLayoutError: The segment belongs to something else.
    """
    if memory_name is None and (here := _here.get() or _adopted) is not None:
        return here
    name = memory_name or DEFAULT_NAME
    reader = attach_named(name)
    return SharedSession(reader, name=name, report=lambda generation: _report_beside(name, generation))


def _report_beside(name: str, generation: int) -> None:
    with contextlib.suppress(BoardError):  # sharing has just ended, or the box is lost; the next read will tell
        box = ReportBox(name, create=False)
        box.report(generation)
        box.close()


def current_session() -> SharedSession:
    """Return the session of the pool this worker belongs to.

    Raises:
        NoSessionError: This process is no worker.
    """
    session = _here.get() or _adopted if _is_taken else _adopted  # a worker of one pool alone is spared a third of it
    if session is None:
        raise NoSessionError
    return session


def take_session(session: SharedSession) -> contextvars.Token[SharedSession | None]:
    """Make ``session`` the one of this thread until ``leave_session``. For engines whose tasks share a process."""
    global _is_taken  # noqa: PLW0603 - one for the process
    _is_taken = True
    return _here.set(session)


def leave_session(former: contextvars.Token[SharedSession | None]) -> None:
    """Undo ``take_session``."""
    _here.reset(former)


def is_session_here(session: SharedSession) -> bool:
    """Tell whether this thread has taken ``session``."""
    return _here.get() is session


def adopt_session(session: SharedSession | None) -> SharedSession | None:
    """Make ``session`` the one of this process and return the former one. For engines."""
    global _adopted
    former, _adopted = _adopted, session
    return former


def _why_none(token: Token | None, newer_than: int) -> str:
    if token is None:
        return "nobody has logged in yet"
    if token.generation <= newer_than:
        return f"generation {newer_than} was refused by a server and no newer token came in time"
    return "the token has expired and no new one came in time"


_adopted: SharedSession | None = None
_is_taken = False  # in this process, ever
_here: contextvars.ContextVar[SharedSession | None] = contextvars.ContextVar("shpool session", default=None)
