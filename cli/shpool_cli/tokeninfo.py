"""`shpool token`: log in once and show what came of it."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shpool.errors import OpaqueTokenError
from shpool.tokens import SYSTEM_CLOCK
from shpool_cli.credentials import (
    ClientIdOption,
    LoginOptions,
    ProfileOption,
    ScopeOption,
    SecretFileOption,
    TokenUrlOption,
    log_in_patiently,
    make_session,
)

if TYPE_CHECKING:
    from shpool.tokens import Token


def token(  # noqa: PLR0913 - options of a command line
    *,
    show: Annotated[bool, typer.Option("--show", help="Show the access token itself too.")] = False,
    profile: ProfileOption = None,
    token_url: TokenUrlOption = None,
    client_id: ClientIdOption = None,
    client_secret_file: SecretFileOption = None,
    scope: ScopeOption = None,
) -> None:
    """Log in and show issuer, scope, expiry and claims of the token."""
    session = make_session(LoginOptions(profile, token_url, client_id, client_secret_file, scope))
    for name, value in _lines(log_in_patiently(session, session.renew), session.client_id, show=show):
        typer.echo(f"{name + ':':<9}{value}")


def _lines(token: Token, client_id: str, *, show: bool) -> list[tuple[str, str]]:
    claims = _claims(token)
    when = datetime.fromtimestamp(token.expires_at, tz=timezone.utc)
    left = max(token.remaining(SYSTEM_CLOCK.now()), 0.0)
    lines = [
        ("issuer", _shown(claims.get("iss"))),
        ("client", client_id),
        ("scope", _shown(token.scope or claims.get("scope"))),
        ("expires", f"{when:%Y-%m-%d %H:%M:%S} UTC, in {left:.0f} s"),
        ("claims", json.dumps(claims) if claims else "none: the token is opaque"),
    ]
    return [*lines, ("token", token.access_token)] if show else lines


def _claims(token: Token) -> dict[str, Any]:
    try:
        return token.claims()
    except OpaqueTokenError:
        return {}


def _shown(value: object) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value or "")
    return text or "not told"
