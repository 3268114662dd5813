"""Run the same pool on a Dask cluster: one login here, the token on every worker, those that come later too."""

from __future__ import annotations

import os

import requests

from shpool import AuthenticatedProcessPool, DaskEngine, OAuthSession, current_session
from shpool.testing import LoopbackServer


def mean_of_tile(url: str) -> tuple[float, int]:
    """Download a tile and compute on it; runs in a worker of the cluster."""
    response = requests.get(url, auth=current_session().auth, timeout=30)
    response.raise_for_status()
    return sum(response.content) / len(response.content), os.getpid()


def main() -> None:
    """Compute on 20 tiles; the loopback server stands for your provider."""
    # With an address it is your cluster: DaskEngine("tcp://host:8786", security=distributed.Security(...)).
    # Without, a scheduler and two workers start here and end with the pool.
    engine = DaskEngine()
    with LoopbackServer() as server:
        session = OAuthSession(server.token_url, server.client_id, server.client_secret)
        urls = [server.data_url(n) for n in range(20)]
        with AuthenticatedProcessPool(session, max_workers=2, engine=engine, retries=1) as pool:
            means, workers = zip(*pool.map(mean_of_tile, urls, chunksize=1), strict=True)
        print(f"{len(means)} tiles, mean {sum(means) / len(means):.1f}, {server.logins} login")
        assert os.getpid() not in workers


if __name__ == "__main__":
    main()
