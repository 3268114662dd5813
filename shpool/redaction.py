"""Keep secrets out of sight: a type that does not show itself, and a filter for other people's logs."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterator

MASK = "***"
# Never inherited by what a parent starts; besides these, any variable whose value is the session's own secret.
SECRET_VARIABLES = ("SH_CLIENT_SECRET", "SHPOOL_CLIENT_SECRET")

# The first prints request bodies and token responses at DEBUG (read in requests_oauthlib 2.0.0); the
# others print none today, and lie on the same path.
_TALKATIVE_LOGGERS = ("requests_oauthlib.oauth2_session", "oauthlib.oauth2.rfc6749", "urllib3.connectionpool")


class Secret:
    """Hold a client secret so that no repr, log line or pickle shows it.

    >>> Secret("not-a-real-secret")
    Secret('***')
    """

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """Return the secret itself; the only way to get at it."""
        return self._value

    def __bool__(self) -> bool:
        return bool(self._value)

    def __repr__(self) -> str:
        return f"Secret({MASK!r})"

    def __str__(self) -> str:
        return MASK

    def __reduce__(self) -> NoReturn:
        msg = "a client secret does not leave its process; give workers the shared session instead"
        raise TypeError(msg)


def fingerprint(text: str) -> str:
    """Return eight hex digits that tell two tokens apart and reveal neither.

    >>> fingerprint("invented-token")
    '1b92d803'
    """
    import hashlib  # here: it loads OpenSSL, which a worker need not wait for before its first task

    return hashlib.sha256(text.encode()).hexdigest()[:8]


class _NoDebug(logging.Filter):
    """Drop DEBUG records: they hold whole requests and answers."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno > logging.DEBUG


@contextlib.contextmanager
def quiet_transport() -> Iterator[None]:
    """Silence the DEBUG records of the OAuth and HTTP libraries while a login is under way."""
    quiet = _NoDebug()
    loggers = [logging.getLogger(name) for name in _TALKATIVE_LOGGERS]
    for logger in loggers:
        logger.addFilter(quiet)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(quiet)
