"""Who may be sent the token, and what a refusal of it means; for every HTTP library alike."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Protocol

from shpool.errors import InsecureUrlError, TokenUnavailableError
from shpool.origins import host_of, is_secure_url, origin_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shpool.tokens import Token

logger = logging.getLogger(__name__)

NEW_TOKEN_WITHIN = 30.0  # s to wait for a later generation after a refusal


class TokenHolder(Protocol):
    """What a client needs of a shared session."""

    @property
    def token(self) -> Token:
        """The current token."""

    @property
    def allowed_hosts(self) -> Sequence[str]:
        """Hosts that may be sent the token; empty for the origin of each call."""

    def report_refused(self, generation: int) -> None:
        """Tell the parent that a server refused this generation."""

    def wait_for_token(self, seconds: float, *, newer_than: int = ...) -> Token:
        """Return a token of a later generation, waiting so long for it."""


class HostRule:
    """Say which URLs are asked with the token of a session; warn once of each host that is not.

    Args:
        holder: Whose token.
    """

    def __init__(self, holder: TokenHolder) -> None:
        self._holder = holder
        self._strangers: set[str] = set()  # hosts already warned of

    def admits(self, url: str) -> bool:
        """Tell whether a request to a URL carries the token.

        Raises:
            InsecureUrlError: The host may have the token, but not over an unencrypted connection.
        """
        allowed, host = self._holder.allowed_hosts, host_of(url)
        if allowed and host not in allowed:
            self._warn_of(host)
            return False
        if not is_secure_url(url):
            raise InsecureUrlError(host)
        return True

    def _warn_of(self, host: str) -> None:
        if host not in self._strangers:
            self._strangers.add(host)
            text = "%s is asked without the token; name it in the session's allowed_hosts if it should have it"
            logger.warning(text, host)


class TokenDesk:
    """Hand out the token for each request without ever waiting for it: transfers under way must go on.

    Args:
        holder: Whose token.
    """

    def __init__(self, holder: TokenHolder) -> None:
        self._holder = holder
        self._hosts = HostRule(holder)
        self._refused = -1  # the newest generation that was refused
        self._missing_since: float | None = None
        self._admitted: tuple[str, object] | None = None  # the origin asked last, and under which rule

    def token_for(self, url: str) -> Token | None:
        """Return the token for a request to a URL, None where it goes without.

        Raises:
            TokenUnavailableError: There is none now.
            InsecureUrlError: It would travel unencrypted.
        """
        try:
            token = self._holder.wait_for_token(0.0, newer_than=self._refused)
        except TokenUnavailableError:
            self._missing_since = self._missing_since or time.monotonic()
            raise
        self._missing_since = None
        origin, hosts = origin_of(url), self._holder.allowed_hosts
        if (origin, hosts) != self._admitted:
            if not self._hosts.admits(url):
                return None
            self._admitted = (origin, hosts)
        return token

    def is_overdue(self) -> bool:
        """Tell whether the token has been missing for so long that waiting makes no sense."""
        return self._missing_since is not None and time.monotonic() - self._missing_since > NEW_TOKEN_WITHIN

    def report_refused(self, generation: int) -> None:
        """Report a refused generation, once."""
        if generation > self._refused:
            self._refused = generation
            self._holder.report_refused(generation)


def lacks_scope(challenge: str) -> bool:
    """Tell from ``WWW-Authenticate`` whether a fresh token of the same rights would be refused too.

    RFC 6750, section 3.1.
    """
    return "insufficient_scope" in challenge
