"""Anything that can log in, seen as one thing: a source that brings a token newer than the one in hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast, runtime_checkable

from shpool.tokens import SYSTEM_CLOCK, Clock, Token, token_from_mapping

_SAME_MOMENT = 0.001  # s; an expiry that went through sums of the wall clock is that exact


@runtime_checkable
class TokenSource(Protocol):
    """What the sharing thread asks for tokens; ``OAuthSession`` is one."""

    def renew(self, after: Token | None) -> Token:
        """Return a token newer than ``after``, in one attempt; raise ``LoginError`` where that fails."""


class SessionLike(Protocol):
    """Somebody else's session: its ``token`` is refreshed when it is read."""

    @property
    def token(self) -> Mapping[str, Any]:
        """A mapping with ``access_token`` and ``expires_at``."""


Session = TokenSource | SessionLike | Callable[[], Mapping[str, Any]]


class _ReadingSource:
    """Bring tokens by reading: from a foreign session's ``token``, or from a function's return value."""

    def __init__(self, read: Callable[[], object], name: str, clock: Clock) -> None:
        self._read = read
        self._name = name
        self._clock = clock

    def renew(self, after: Token | None) -> Token:
        asked = self._clock.now()
        token = token_from_mapping(self._read(), asked, source=self._name)
        if after is None:
            return token.numbered(1)
        if token.access_token != after.access_token:
            return token.numbered(after.generation + 1)
        # Unchanged: its end on the boot clock is known already, and the wall clock may have been stepped since.
        is_unchanged = abs(token.expires_at - after.expires_at) < _SAME_MOMENT
        return after if is_unchanged else token.numbered(after.generation)


def source_of(session: Session, clock: Clock = SYSTEM_CLOCK) -> TokenSource:
    """Return the session as a source of tokens.

    Args:
        session: An ``OAuthSession``, any object whose ``token`` is refreshed on read, or a function that returns
            a token mapping.
        clock: Where the time comes from.

    Raises:
        TypeError: It is none of these.
        ValueError: It does not refresh, so nothing can be kept fresh.
    """
    if isinstance(session, type):
        msg = f"session must be an instance; {session.__name__} is a class: call it with its credentials"
        raise TypeError(msg)
    name = type(session).__name__
    never_refreshes = not getattr(session, "refreshes", True) or getattr(session, "refresh_before_expiry", 0.0) is None
    if never_refreshes:
        msg = (
            f"{name} does not refresh its token (refresh_before_expiry=None, or made by from_token), so it cannot be "
            "shared; give credentials and a refresh_before_expiry in seconds"
        )
        raise ValueError(msg)
    if isinstance(session, TokenSource):
        return session
    if hasattr(type(session), "token"):
        foreign = cast("SessionLike", session)
        return _ReadingSource(lambda: foreign.token, f"{name}.token", clock)
    if callable(session):
        return _ReadingSource(session, getattr(session, "__name__", name), clock)
    msg = f"session must be an OAuthSession, have a token property, or be a function that returns a token, not {name}"
    raise TypeError(msg)


def refresh_window_of(session: object, default: float = 120.0) -> float:
    """Return how many seconds before the end this session wants a new token."""
    wanted = getattr(session, "refresh_before_expiry", default)
    return float(wanted) if isinstance(wanted, (int, float)) else default
