"""Sharing a session: the thread of the parent that keeps a token posted, and what its readers hold.

``SessionSharingThread`` and ``SessionSharing`` share under a name that any process of the user can collect from;
``SharingThread`` does the same over any channel, which is how the pool uses it.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
import weakref
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from shpool.board import CLOSED, ReportBox, attach_named
from shpool.channels import NamedChannel
from shpool.errors import BoardError, LoginError, NoSessionError, TokenUnavailableError
from shpool.refresh import Refresher
from shpool.sources import refresh_window_of, source_of
from shpool.tokens import SYSTEM_CLOCK, Clock, Posting, Token, boot_time

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from typing_extensions import Self

    from shpool.channels import TokenChannel, TokenReader
    from shpool.client import BearerAuth, HTTPClient
    from shpool.retry import RetryAfterUnit
    from shpool.sources import Session

    _View = tuple[Sequence[int], int, float, Token]

_monotonic = time.monotonic
DEFAULT_NAME = "sh-session-token"  # as in sentinelhub-py
LONGEST_WAIT = 30.0  # s a reader waits for a token before it gives up
ATTEMPT_WITHIN = 20.0  # s for one login, whatever it does: short against LONGEST_WAIT, long against its own timeouts
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
    def auth(self) -> BearerAuth:
        """An auth object for ``requests``: the token of the moment, and one retry when a server refuses it."""
        from shpool.client import BearerAuth

        return BearerAuth(self)

    @property
    def http(self) -> HTTPClient:
        """A ``requests.Session`` of this process, with the token, retries and timeouts."""
        if self._http is None or self._http[0] != os.getpid():
            from shpool.client import HTTPClient

            self._http = os.getpid(), HTTPClient(self, self.retry_after_unit)
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

    def report_refused(self, generation: int) -> None:
        """Tell the parent that a server refused the token of this generation."""
        self._report(generation)

    def __repr__(self) -> str:
        where = self._name or "anonymous"
        return f"<SharedSession {where} {self._view[3]!r}>"

    def __reduce__(self) -> tuple[object, ...]:
        return collect_shared_session, (self._name,)


class SharingThread(threading.Thread):
    """Keep a session's token fresh on a channel, from ``start()`` until ``join()``.

    A thread, because refreshing must go on while the parent's own code is busy. Logins after the first run in a
    short-lived thread of their own, so that this one ends at once even when a token endpoint hangs.
    """

    def __init__(self, session: Session, channel: TokenChannel, *, clock: Clock = SYSTEM_CLOCK, **kwargs: Any) -> None:  # noqa: ANN401 - handed to threading.Thread
        kwargs.setdefault("name", "shpool-sharing")
        kwargs.setdefault("daemon", True)
        super().__init__(**kwargs)
        self._source = source_of(session, clock)
        self._session = session
        self._allowed_hosts = tuple(getattr(session, "allowed_hosts", ()))
        self._retry_after_unit: RetryAfterUnit = getattr(session, "retry_after_unit", "s")
        self._channel = channel
        self._owner = os.getpid()
        self._woken = threading.Event()
        self._is_over = threading.Event()
        self._is_stopping = False
        self.refresher = Refresher(
            self._login,
            self._publish,
            clock=clock,
            wait=self._nap,
            wake=lambda: self._woken.set(),  # noqa: PLW0108 - a forked child gets another event
            refresh_before_expiry=refresh_window_of(session),
        )

    def start(self) -> None:
        """Log in, in the caller's thread, and return once the token is shared.

        Raises:
            LoginError: The first login failed; nothing is shared then.
            TokenTooLargeError: The channel cannot hold the token.
        """
        if self.ident is None:  # a second start is refused by the thread itself
            self.refresher.first_login()
            _running.add(self)
        super().start()

    def run(self) -> None:
        """Refresh until stopped, then end sharing."""
        try:
            self.refresher.run()
        finally:
            _running.discard(self)  # a child forked from now on has nothing to read here
            self._channel.close()
            self._is_over.set()

    def stop(self) -> None:
        """Ask the thread to end; ``join()`` does too. In a forked child there is nothing to end."""
        self._is_stopping = True
        if os.getpid() == self._owner:
            self.refresher.stop()

    def end(self) -> None:
        """Stop and wait for the end, started or not; nothing stays shared."""
        if self.ident is None:
            self._channel.close()
        else:
            self.join()

    def join(self, timeout: float | None = None) -> None:
        """Stop the thread and wait for its end, at which it zeroes and unlinks what it shared.

        Args:
            timeout: Seconds to wait at most; see ``is_alive()`` afterwards. Without, as long as it takes: the
                thread never waits for the network.
        """
        self.stop()
        if os.getpid() != self._owner:
            return
        # Not for the thread at once: before Python 3.13 one whose join() was interrupted counts as stopped ever after.
        if self.ident is None or self._is_over.wait(timeout):
            super().join(timeout)

    def become_reader(self) -> None:
        """In a forked child, where no thread of the parent's runs: let the session read what the parent posts."""
        _running.discard(self)
        self._woken = threading.Event()  # whose lock a thread may have held at the fork
        follow = getattr(self._session, "follow", None)
        if follow is not None:
            shared = SharedSession(self._channel.reader())
            follow(lambda: shared.token)

    def _publish(self, posting: Posting) -> None:
        hosts, unit = self._allowed_hosts, self._retry_after_unit
        self._channel.publish(replace(posting, allowed_hosts=hosts, retry_after_unit=unit))

    def _nap(self, seconds: float) -> None:
        give_up = time.monotonic() + seconds
        while (left := give_up - time.monotonic()) > 0:
            is_woken = self._woken.wait(min(left, self._channel.report_poll))
            self._woken.clear()
            report = self._channel.newest_report()
            if report:
                self.refresher.report_refused(report)
            if is_woken or self._woken.is_set():
                return

    def _login(self, after: Token | None) -> Token:
        if after is None:
            return self._source.renew(None)
        outcome: list[Token | BaseException] = []

        def attempt() -> None:
            try:
                outcome.append(self._source.renew(after))
            except BaseException as exc:  # noqa: BLE001 - carried over to the sharing thread
                outcome.append(exc)
            self._woken.set()

        try:
            threading.Thread(target=attempt, name="shpool-login", daemon=True).start()
        except RuntimeError:  # the interpreter is ending and starts no threads any more
            attempt()
        give_up = time.monotonic() + ATTEMPT_WITHIN
        while not outcome and not self._is_stopping and (left := give_up - time.monotonic()) > 0:
            self._woken.wait(left)
            self._woken.clear()
        if not outcome:
            reason = f"a login took longer than {ATTEMPT_WITHIN:.0f} s and was given up"
            raise LoginError(type(self._session).__name__, reason)
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]


class SessionSharingThread(SharingThread):
    """Share a session with other processes of the same user, under a name.

    Args:
        session: What logs in; it must refresh its token.
        memory_name: Name of the shared-memory segment.
        **thread_kwargs: For ``threading.Thread``.

    Raises:
        ValueError: The session does not refresh, or the name is no possible one.
        BoardInUseError: A living process shares under that name.
        ForeignBoardError: Another user holds that name.
    """

    def __init__(self, session: Session, memory_name: str = DEFAULT_NAME, **thread_kwargs: Any) -> None:  # noqa: ANN401 - handed to threading.Thread
        source_of(session)  # refused before anything is created
        self.memory_name = memory_name
        channel = NamedChannel(memory_name)
        self._if_forgotten = weakref.finalize(self, channel.close)  # one never started leaves no name behind either
        super().__init__(session, channel, **thread_kwargs)

    def start(self) -> None:
        """Log in, in the caller's thread, and return once the token is shared; else raise, and free the name.

        Raises:
            LoginError: The first login failed.
            TokenTooLargeError: The token does not fit the shared memory.
        """
        self._if_forgotten.atexit = False  # the thread itself ends sharing then
        try:
            super().start()
        except BaseException:
            if not self.is_alive():
                self.end()
            raise


class SessionSharing:
    """Share a session under a name for the length of a ``with`` block.

    Args:
        session: What logs in; it must refresh its token.
        **kwargs: As for ``SessionSharingThread``.

    Entering raises what ``SessionSharingThread`` and its ``start()`` raise.
    """

    def __init__(self, session: Session, **kwargs: Any) -> None:  # noqa: ANN401 - handed to SessionSharingThread
        source_of(session)
        self._session = session
        self._kwargs = kwargs
        self.thread: SessionSharingThread | None = None

    def __enter__(self) -> Self:
        thread = SessionSharingThread(self._session, **self._kwargs)
        thread.start()
        self.thread = thread
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.thread is not None:
            self.thread.join()


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
    if memory_name is None and _adopted is not None:
        return _adopted
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
    if _adopted is None:
        raise NoSessionError
    return _adopted


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


def _end_all() -> None:
    """End sharing at interpreter exit, so that no name outlives the process."""
    for thread in list(_running):
        if thread.is_alive():
            thread.join(_EXIT_WAIT)


def _become_readers() -> None:
    for thread in list(_running):
        thread.become_reader()


_EXIT_WAIT = 3.0  # s
_adopted: SharedSession | None = None
_running: weakref.WeakSet[SharingThread] = weakref.WeakSet()
atexit.register(_end_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_become_readers)
