"""Run a function in worker processes that share one login."""

from __future__ import annotations

import requests

from shpool import AuthenticatedProcessPool, OAuthSession, current_session
from shpool.testing import LoopbackServer


def mean_of_tile(url: str) -> float:
    """Download a tile and compute on it; runs in a worker."""
    response = requests.get(url, headers=current_session().session_headers, timeout=30)
    response.raise_for_status()
    return sum(response.content) / len(response.content)


def main() -> None:
    """Compute on 20 tiles; the loopback server stands for your provider."""
    with LoopbackServer() as server:
        session = OAuthSession(server.token_url, server.client_id, server.client_secret)
        urls = [server.data_url(n) for n in range(20)]
        with AuthenticatedProcessPool(session, max_workers=4) as pool:
            means = list(pool.map(mean_of_tile, urls))
        print(f"{len(means)} tiles, mean {sum(means) / len(means):.1f}, {server.logins} login")


if __name__ == "__main__":
    main()
