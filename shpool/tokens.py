"""Tokens: immutable snapshots of what a token endpoint said, and the arithmetic of their expiry.

Two clocks tell the time, and where a token is renewed the more pessimistic one wins. The wall clock is what
providers speak (``exp``, ``expires_at``), yet it can be stepped. The boot clock never steps and goes on while the
machine sleeps, yet it means nothing on another machine. Readers on the parent's machine go by the boot clock alone.
"""

from __future__ import annotations

import base64
import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol

from shpool.errors import OpaqueTokenError, TokenResponseError
from shpool.redaction import fingerprint

# Used when neither expires_in nor a JWT's exp tells (RFC 6749, section 5.1 only RECOMMENDS expires_in).
# Shorter than the shortest lifetime of the providers with a preset (600 s at the Copernicus Data Space).
DEFAULT_LIFETIME = 300.0  # s

# Ten years: beyond it a lifetime is a mistake of units, and sums with it must stay finite.
_LONGEST_LIFETIME = 10 * 365 * 86_400.0  # s

# By how much an issue time may lie in the future and the clocks still count as agreed.
_CLOCK_SKEW = 60.0  # s


class Instant(NamedTuple):
    """One moment on both clocks, in seconds."""

    wall: float
    boot: float


class Clock(Protocol):
    """Where the time comes from; tests bring their own."""

    def now(self) -> Instant:
        """Return this moment on both clocks."""


_BOOT_CLOCK = getattr(time, "CLOCK_BOOTTIME", None)  # Linux only; elsewhere suspend may stop the clock

# Seconds since boot, time asleep included where the system can tell; the same for all processes. No function of ours
# around it: each read of a shared token looks at it, and a call costs 40 ns of the 200 that a read may take.
boot_time: Callable[[], float] = (
    time.monotonic if _BOOT_CLOCK is None else functools.partial(time.clock_gettime, _BOOT_CLOCK)
)


class SystemClock:
    """The clocks of this machine."""

    def now(self) -> Instant:
        """Return this moment on both clocks."""
        return Instant(time.time(), boot_time())


SYSTEM_CLOCK: Clock = SystemClock()


@dataclass(frozen=True, eq=False, repr=False)
class Token(Mapping[str, Any]):
    """One access token with its expiry; reads as the mapping OAuth libraries use and shows no secret.

    Attributes:
        access_token: The bearer credential itself.
        expires_at: End of life, seconds since the epoch.
        deadline: End of life on the boot clock of this machine, seconds.
        lifetime: Seconds from the request to the end, as the provider told.
        token_type: Usually ``Bearer`` (RFC 6750).
        scope: Space-separated scopes, or None when the provider said nothing.
        generation: Number of the login that brought it, from 1; 0 outside any sharing.
        extra: What else the answer held: scalars, and lists and objects of scalars; refresh tokens left out.

    >>> token = Token("invented-token", expires_at=1_000.0, deadline=500.0, lifetime=600.0)
    >>> token["access_token"], token["expires_at"]
    ('invented-token', 1000.0)
    >>> token
    <Token 1b92d803 generation=0 expires_at=1000>
    """

    access_token: str
    expires_at: float
    deadline: float
    lifetime: float
    token_type: str = "Bearer"  # noqa: S105 - the name of a scheme, no password
    scope: str | None = None
    generation: int = 0
    extra: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def issued(self) -> Instant:
        """The moment the lifetime is counted from."""
        return Instant(self.expires_at - self.lifetime, self.deadline - self.lifetime)

    def remaining(self, now: Instant) -> float:
        """Return the seconds of life left, by the more pessimistic clock; negative once expired."""
        return min(self.expires_at - now.wall, self.deadline - now.boot)

    def numbered(self, generation: int) -> Token:
        """Return the same token under another generation."""
        return replace(self, generation=generation)

    def claims(self) -> dict[str, Any]:
        """Return the claims of a JSON Web Token, unverified (see ``decode_claims``)."""
        return decode_claims(self.access_token)

    def __getitem__(self, key: str) -> Any:  # noqa: ANN401 - the values of a JSON object
        return self._as_mapping()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._as_mapping())

    def __len__(self) -> int:
        return len(self._as_mapping())

    def _as_mapping(self) -> dict[str, Any]:
        known = {"access_token": self.access_token, "token_type": self.token_type, "expires_at": self.expires_at}
        if self.scope is not None:
            known["scope"] = self.scope
        return {**self.extra, **known}

    def __repr__(self) -> str:
        mark = fingerprint(self.access_token)
        return f"<Token {mark} generation={self.generation} expires_at={self.expires_at:.0f}>"

    def __reduce__(self) -> tuple[object, ...]:
        fields = (self.access_token, self.expires_at, self.deadline, self.lifetime, self.token_type)
        return Token, (*fields, self.scope, self.generation, dict(self.extra))


@dataclass(frozen=True)
class Posting:
    """What the parent tells its readers: the current token, and how the last login went.

    Attributes:
        token: The current token, None before the first login.
        error: Text of the last login error; empty once a login worked again.
        refused: The error is final: no further login will be tried.
        allowed_hosts: Hosts that may be sent the token; empty for the origin of each call.
        retry_after_unit: What a number in these hosts' ``Retry-After`` counts, ``s`` or ``ms``.
    """

    token: Token | None
    error: str = ""
    refused: bool = False
    allowed_hosts: tuple[str, ...] = ()
    retry_after_unit: Literal["s", "ms"] = "s"

    def to_bytes(self) -> bytes:
        """Return the posting as JSON, for a channel to carry."""
        fields = None if self.token is None else self.token.__reduce__()[1]
        everything = [fields, self.error, self.refused, self.allowed_hosts, self.retry_after_unit]
        return json.dumps(everything, default=str).encode()

    @classmethod
    def from_bytes(cls, text: bytes) -> Posting:
        """Read what ``to_bytes`` wrote."""
        fields, error, refused, hosts, unit = json.loads(text)
        return cls(None if fields is None else Token(*fields), error, refused, tuple(hosts), unit)


def token_from_response(answer: object, sent: Instant, *, endpoint: str = "token endpoint") -> Token:
    """Make a token of a token endpoint's answer (RFC 6749, section 5.1).

    The lifetime is counted from ``sent``: the provider's own count began no earlier.

    Args:
        answer: The decoded JSON. ``expires_in`` may be an int, a float, a numeric string, null or missing;
            then ``exp`` of a JWT decides, else DEFAULT_LIFETIME.
        sent: The moment before the request went out.
        endpoint: Named in errors.

    Raises:
        TokenResponseError: The answer is not an object, holds no usable ``access_token``, or its
            ``expires_in`` is no number.
    """
    fields, access_token = _checked_fields(answer, endpoint)
    lifetime = _seconds(fields.get("expires_in"), "expires_in", endpoint)
    if lifetime is None:
        lifetime = _lifetime_from_claims(access_token, sent.wall)
    if lifetime is None:
        lifetime = DEFAULT_LIFETIME
    return _build(fields, access_token, sent.wall + lifetime, sent.boot + lifetime, lifetime)


def token_from_mapping(fields: object, now: Instant, *, source: str = "session.token") -> Token:
    """Make a token of a mapping with ``access_token`` and ``expires_at``, as OAuth sessions keep it.

    Args:
        fields: The mapping; without ``expires_at`` it is read like a token endpoint's answer.
        now: The present; the boot deadline is derived from it.
        source: Named in errors.

    Raises:
        TokenResponseError: No usable ``access_token``, or an expiry that is no number.
    """
    known, access_token = _checked_fields(fields, source)
    expires_at = _seconds(known.get("expires_at"), "expires_at", source)
    if expires_at is None:
        return token_from_response(fields, now, endpoint=source)
    left = min(expires_at - now.wall, _LONGEST_LIFETIME)
    told = _seconds(known.get("expires_in"), "expires_in", source)
    lifetime = left if told is None or told < left else told
    return _build(known, access_token, now.wall + left, now.boot + left, max(lifetime, 0.0))


def decode_claims(access_token: str) -> dict[str, Any]:
    """Return the claims of a JSON Web Token without verifying its signature (RFC 7519, section 7.2).

    Raises:
        OpaqueTokenError: The token is not a JWT.
    """
    parts = access_token.split(".")
    if len(parts) != 3:  # noqa: PLR2004 - header, payload, signature: RFC 7515, section 3.1
        reason = "it is opaque, not a JSON Web Token"
        raise OpaqueTokenError(reason)
    try:
        payload = base64.b64decode(parts[1] + "=" * (-len(parts[1]) % 4), altchars=b"-_", validate=True)
        claims = json.loads(payload)
    except (ValueError, RecursionError) as exc:
        reason = f"its middle part is not base64url JSON ({type(exc).__name__})"
        raise OpaqueTokenError(reason) from None
    if not isinstance(claims, dict):
        reason = "its payload is not a JSON object"
        raise OpaqueTokenError(reason)
    return claims


def _checked_fields(answer: object, source: str) -> tuple[Mapping[str, Any], str]:
    if not isinstance(answer, Mapping):
        reason = f"expected a JSON object, got {type(answer).__name__}"
        raise TokenResponseError(source, reason)
    access_token = answer.get("access_token")
    if not isinstance(access_token, str) or not access_token:
        reason = "access_token is missing" if access_token is None else "access_token is not a non-empty string"
        raise TokenResponseError(source, reason)
    # A header value: RFC 6750, section 2.1 allows visible ASCII only; a line break would smuggle headers.
    if not access_token.isascii() or not access_token.isprintable() or " " in access_token:
        reason = "access_token holds characters that no header may carry"
        raise TokenResponseError(source, reason)
    return answer, access_token


def _build(fields: Mapping[str, Any], access_token: str, expires_at: float, deadline: float, lifetime: float) -> Token:
    token_type, scope = fields.get("token_type"), fields.get("scope")
    if isinstance(scope, (list, tuple)):
        scope = " ".join(word for word in scope if isinstance(word, str))
    kept = {
        key: value
        for key, value in fields.items()
        if isinstance(key, str) and key not in _NAMED_FIELDS and "refresh" not in key and _is_flat(value)
    }
    return Token(
        access_token=access_token,
        expires_at=expires_at,
        deadline=deadline,
        lifetime=lifetime,
        token_type=token_type if isinstance(token_type, str) and token_type else "Bearer",
        scope=scope if isinstance(scope, str) else None,
        extra=MappingProxyType(kept),
    )


def _is_flat(value: object) -> bool:
    """Tell whether a value is a JSON scalar, or a list or an object of them: what encodes at any recursion limit."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_scalar(inner) for key, inner in value.items())
    return all(map(_is_scalar, value)) if isinstance(value, (list, tuple)) else _is_scalar(value)


def _is_scalar(value: object) -> bool:
    return value is None or isinstance(value, (str, int, float))


_NAMED_FIELDS = frozenset({"access_token", "token_type", "expires_at", "expires_in", "scope"})


def _seconds(value: object, name: str, source: str) -> float | None:
    """Read a number of seconds in any of the forms servers send; None when there is none."""
    if value is None:
        return None
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise TypeError  # noqa: TRY301 - one place that words the error
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if math.isnan(number):
        reason = f"{name} is not a number of seconds ({type(value).__name__})"
        raise TokenResponseError(source, reason)
    limit = _LONGEST_LIFETIME if name == "expires_in" else math.inf
    return max(min(number, limit), 0.0)


def _lifetime_from_claims(access_token: str, wall: float) -> float | None:
    """Return the seconds from ``wall`` for which a JWT's claims let it live, or None without ``exp``."""
    try:
        claims = decode_claims(access_token)
        end = _seconds(claims.get("exp"), "exp", "token")
        start = _seconds(claims.get("iat"), "iat", "token")
    except (OpaqueTokenError, TokenResponseError):
        return None
    if end is None:
        return None
    left = max(end - wall, 0.0)
    # The rule: the lesser of exp - iat and exp - now where iat is no later than now plus the skew, else exp - iat.
    # A provider may hand out a token it issued an hour ago, and only exp - now tells what is left of that one. An iat
    # in the future proves that the clocks differ: then only the difference of the provider's own two times counts.
    if start is None or start > end:
        lifetime = left
    else:
        lifetime = min(end - start, left) if start <= wall + _CLOCK_SKEW else end - start
    return min(lifetime, _LONGEST_LIFETIME)
