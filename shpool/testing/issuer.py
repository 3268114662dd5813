"""Who gives out tokens in tests: client credentials in, JWT or opaque tokens out (RFC 6749, section 4.4)."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import math
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import unquote_plus

from shpool.testing.messages import Request, Response

if TYPE_CHECKING:
    from shpool.tokens import Clock

ExpiresIn = Literal["int", "str", "float", "null", "missing"]


@dataclass(frozen=True)
class Issued:
    """What the provider remembers of a token.

    Attributes:
        id: Tells tokens apart; the ``jti`` claim of a JWT.
        number: 1 for the first login, and so on.
        client_id: Whose token it is.
        deadline: End of its life on the clock's boot time, seconds.
    """

    id: str
    number: int
    client_id: str
    deadline: float


class TokenIssuer:
    """Answer token requests and judge bearer tokens; ``logins`` counts the tokens given out.

    Args:
        client_id: The only client that may log in.
        client_secret: Its secret.
        lifetime: Seconds a token lives; may be changed at any time.
        jwt: JSON Web Tokens signed with a throw-away key, else opaque ones.
        expires_in: The form in which answers state the lifetime. "int" keeps a fraction where there is one.
        clock: Decides when a token has expired.
    """

    def __init__(  # noqa: PLR0913 - what a provider is made of; LoopbackServer holds the defaults
        self, client_id: str, client_secret: str, *, lifetime: float, jwt: bool, expires_in: ExpiresIn, clock: Clock
    ) -> None:
        self.lifetime = lifetime
        self.logins = 0
        self._client = (client_id, client_secret)
        self._jwt = jwt
        self._expires_in = expires_in
        self._clock = clock
        self._key = secrets.token_bytes(32)
        self._issued: dict[str, Issued] = {}

    def answer(self, request: Request) -> Response:
        """Answer one request to the token endpoint (RFC 6749, sections 4.4.3 and 5.2)."""
        if request.method != "POST":
            return Response(405, headers={"Allow": "POST"})
        form = request.form()
        if _credentials(request, form) != self._client:
            basic = {"WWW-Authenticate": 'Basic realm="loopback"'} if "authorization" in request.headers else {}
            return Response.of_json(401, {"error": "invalid_client"}, basic)
        if form.get("grant_type") != "client_credentials":
            return Response.of_json(400, {"error": "unsupported_grant_type"})
        return Response.of_json(200, self._new_token(form.get("scope")), {"Cache-Control": "no-store"})

    def lookup(self, access_token: str) -> Issued | None:
        """Return what is known of a token; None when it is unknown, expired or revoked."""
        issued = self._issued.get(access_token)
        return issued if issued is not None and self._clock.now().boot < issued.deadline else None

    def revoke_all(self) -> None:
        """Forget every token given out so far."""
        self._issued.clear()

    def _new_token(self, scope: str | None) -> dict[str, Any]:
        now = self._clock.now()
        self.logins += 1
        issued = Issued(secrets.token_hex(8), self.logins, self._client[0], now.boot + self.lifetime)
        access_token = self._signed(issued, now.wall, scope) if self._jwt else secrets.token_urlsafe(48)
        self._issued[access_token] = issued
        answer = {"access_token": access_token, "token_type": "Bearer", **self._stated_lifetime()}
        return answer if scope is None else {**answer, "scope": scope}

    def _stated_lifetime(self) -> dict[str, int | str | float | None]:
        whole = int(self.lifetime) if float(self.lifetime).is_integer() else self.lifetime
        forms: dict[ExpiresIn, dict[str, int | str | float | None]] = {
            "int": {"expires_in": whole},
            "str": {"expires_in": str(whole)},
            "float": {"expires_in": float(self.lifetime)},
            "null": {"expires_in": None},
            "missing": {},
        }
        return forms[self._expires_in]

    def _signed(self, issued: Issued, wall: float, scope: str | None) -> str:
        start = math.floor(wall)
        claims = {
            "iss": "https://loopback.invalid",
            "sub": issued.client_id,
            "azp": issued.client_id,
            "jti": issued.id,
            "iat": start,
            "exp": start + self.lifetime,
            "scope": scope or "",
        }
        text = f"{_base64url(_compact({'alg': 'HS256', 'typ': 'JWT'}))}.{_base64url(_compact(claims))}"
        return f"{text}.{_base64url(hmac.digest(self._key, text.encode(), hashlib.sha256))}"


def _credentials(request: Request, form: dict[str, str]) -> tuple[str | None, str | None]:
    """Read id and secret from the Basic header or from the body (RFC 6749, section 2.3.1)."""
    scheme, _, encoded = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return form.get("client_id"), form.get("client_secret")
    try:
        client_id, _, client_secret = base64.b64decode(encoded, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return None, None
    return unquote_plus(client_id), unquote_plus(client_secret)


def _compact(content: dict[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


def _base64url(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()
