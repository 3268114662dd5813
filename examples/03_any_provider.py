"""Log in at any OAuth2 provider that knows client credentials: scope, audience, HTTP Basic, opaque tokens."""

from __future__ import annotations

import requests

from shpool import AuthenticatedProcessPool, OAuthSession, current_session
from shpool.testing import LoopbackServer


def who_am_i(base_url: str) -> str:
    """Ask the service whose token this is; runs in a worker."""
    response = requests.get(f"{base_url}/whoami", headers=current_session().session_headers, timeout=30)
    response.raise_for_status()
    return str(response.json()["client_id"])


def main() -> None:
    """Log in with id and secret as HTTP Basic; in your program, read the secret from the environment."""
    with LoopbackServer(client_id="weather-app", client_secret="an-invented-secret", jwt=False) as server:
        session = OAuthSession(
            server.token_url,
            server.client_id,
            server.client_secret,
            scope="read:forecast",
            audience="https://weather.example",
            client_auth="basic",
        )
        with AuthenticatedProcessPool(session, max_workers=2) as pool:
            clients = set(pool.map(who_am_i, [server.base_url] * 10))
        print(f"client {clients.pop()}, scope {session.token['scope']}, {server.logins} login")


if __name__ == "__main__":
    main()
