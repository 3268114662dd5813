"""One current token and one login at a time: what keeps a session's token fresh, whatever the number of threads.

1. A single request is under way at a time, under the lock. Whoever waits for it takes the token it brings.
2. A token that is valid and due for refresh is replaced by one attempt. Where that fails, or another thread is at
   it, the token serves on; the next attempt waits for a while.
3. Without a valid token one thread makes up to ``max_attempts`` attempts with waits between them. The others that
   need a token wait for it and take its token, or its error.
4. The lock is free during these waits: ``renew()`` is not held up, and a token that it brings ends them.
5. A forked child has locks of its own: those of the parent may have been held by a thread that it does not have.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from typing import TYPE_CHECKING

from shpool.errors import LoginError, ShpoolError
from shpool.redaction import fingerprint
from shpool.retry import Backoff, is_retryable

if TYPE_CHECKING:
    from collections.abc import Callable

    from shpool.endpoint import TokenEndpoint
    from shpool.tokens import Clock, Token

LOGGER = logging.getLogger(__name__)

# A refresh is due at a quarter of the lifetime at the latest, so that short tokens are not refreshed on every read.
_LARGEST_SHARE = 0.25

# Nothing here sleeps longer than this between two attempts; asked to, it raises instead.
LONGEST_WAIT = 60.0  # s

_renewals: weakref.WeakSet[TokenRenewal] = weakref.WeakSet()  # all of this process, for its forked children


class TokenRenewal:
    """Hold the current token of one client and replace it in time.

    Args:
        endpoint: Where tokens come from; None when the token is all there is.
        token: The first token, or None.
        clock: Where the time comes from.
        refresh_before_expiry: Seconds of life at which a token is due; None stands for zero.
        max_attempts: Requests to the endpoint, at most, while there is no valid token.
        backoff: The waits between those.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(  # noqa: PLR0913 - its collaborators and settings, each used on its own
        self,
        endpoint: TokenEndpoint | None,
        token: Token | None,
        clock: Clock,
        *,
        refresh_before_expiry: float | None,
        max_attempts: int = 1,
        backoff: Backoff | None = None,
    ) -> None:
        if refresh_before_expiry is not None and not refresh_before_expiry >= 0:
            msg = f"refresh_before_expiry is seconds from 0, or None, got {refresh_before_expiry!r}"
            raise ValueError(msg)
        if not isinstance(max_attempts, int) or max_attempts < 1:
            msg = f"max_attempts is a whole number from 1, got {max_attempts!r}"
            raise ValueError(msg)
        self._endpoint = endpoint
        self._clock = clock
        self._early = refresh_before_expiry or 0.0
        self._max_attempts = max_attempts
        self._backoff = backoff or Backoff()
        self._make_locks()
        # Written under _lock. Reads go without: each is one reference.
        self._token = None if token is None else token.numbered(1)
        self._read_shared: Callable[[], Token] | None = None
        self._logins = 0
        self._next_refresh = float("-inf")  # boot time before which a valid token is left alone
        # Written under _patience.
        self._failures = 0  # how often the last error was replaced
        self._last_error: LoginError | None = None
        _renewals.add(self)

    def _make_locks(self) -> None:
        self._patience = threading.Lock()  # held by the thread of rule 3, waits included; taken before _lock
        self._lock = threading.Lock()  # held during a request
        self._arrived = threading.Condition(self._lock)  # notified of each new token

    @property
    def current(self) -> Token | None:
        """The token at hand, valid or not."""
        return self._token

    def remaining(self, token: Token) -> float:
        """Return the seconds of life a token has left."""
        return token.remaining(self._clock.now())

    def is_due(self, token: Token) -> bool:
        """Tell whether a token should be replaced now."""
        return self.remaining(token) <= min(self._early, _LARGEST_SHARE * token.lifetime)

    def renew(self, after: Token | None) -> Token:
        """Return a token other than ``after``: the one at hand if it will do, else by one login attempt."""
        with self._lock:
            token = self._token
            is_other = token is not None and (after is None or token.generation != after.generation)
            if token is not None and is_other and not self.is_due(token):
                return token
            return self._login()

    def fresh(self) -> Token:
        """Return a valid token, replaced in time; wait and try again where there is none."""
        if self._read_shared is not None:
            return self._read_shared()
        token = self._token
        if token is None or self.remaining(token) <= 0:
            return self._login_patiently()
        return self._refresh(token) if self.is_due(token) else token

    def follow(self, read_shared: Callable[[], Token]) -> None:
        """Never log in again, and read the token that another process keeps fresh: for a forked child."""
        self._read_shared = read_shared
        self._endpoint = None
        self._make_locks()  # another thread may have held them at the fork

    def _refresh(self, token: Token) -> Token:
        if self._clock.now().boot < self._next_refresh or not self._lock.acquire(blocking=False):
            return token
        try:
            return self._login() if self._token is token else self._token or token
        except LoginError as exc:
            pause = max(exc.retry_after or 0.0, self._backoff.ceiling(0))
            self._next_refresh = self._clock.now().boot + pause
            LOGGER.warning("refresh failed, the token serves on for %.0f s: %s", self.remaining(token), exc)
            return token
        finally:
            self._lock.release()

    def _login_patiently(self) -> Token:
        failures = self._failures
        with self._patience:
            if (token := self._valid_token()) is not None:
                return token
            if self._last_error is not None and self._failures != failures:
                raise type(self._last_error)(*self._last_error.args)
            try:
                return self._attempts()
            except LoginError as exc:
                self._failures += 1
                self._last_error = exc
                raise

    def _attempts(self) -> Token:
        with self._lock:
            for attempt, delay in enumerate(self._backoff.delays(), start=1):
                try:
                    return self._valid_token() or self._login()
                except LoginError as exc:
                    wait = max(exc.retry_after or 0.0, delay)
                    if attempt >= self._max_attempts or not is_retryable(exc) or wait > LONGEST_WAIT:
                        raise
                    LOGGER.warning("login attempt %d failed, the next in %.1f s: %s", attempt, wait, exc)
                self._arrived.wait_for(self._valid_token, wait)  # gives the lock up meanwhile
        raise AssertionError  # delays() has no end

    def _valid_token(self) -> Token | None:
        token = self._token
        return token if token is not None and self.remaining(token) > 0 else None

    def _login(self) -> Token:
        """Make one attempt; the caller holds the lock."""
        if self._endpoint is None:
            msg = "this session was made of a token and cannot log in; make one with credentials"
            raise ShpoolError(msg)
        LOGGER.debug("logging in at %s as %r", self._endpoint.url, self._endpoint.client_id)
        known = 0 if self._token is None else self._token.generation
        token = self._endpoint.login(self._clock).numbered(known + 1)
        self._logins += 1
        self._token = token
        self._arrived.notify_all()
        mark = fingerprint(token.access_token)
        LOGGER.info("login %d at %s: token %s for %.0f s", self._logins, self._endpoint.url, mark, token.lifetime)
        return token


def _renew_locks() -> None:
    for renewal in list(_renewals):
        renewal._make_locks()  # noqa: SLF001 - rule 5, applied from outside the class


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_renew_locks)
