"""Keep an account's limit with all workers together; without the gate each would count for itself."""

from __future__ import annotations

import time

from shpool import AuthenticatedProcessPool, Gate, OAuthSession, current_session
from shpool.testing import LoopbackServer

LIMIT = 50  # requests per second


def size_of_tile(url: str) -> int:
    """Download a tile; runs in a worker, and ``.http`` goes through the gate by itself."""
    return len(current_session().http.get(url).content)


def main() -> None:
    """Fetch 40 tiles with 4 workers; the loopback server stands for your provider."""
    with LoopbackServer() as server:
        session = OAuthSession(server.token_url, server.client_id, server.client_secret)
        # For a known provider: gate="cdse" or gate="sentinelhub".
        gate = Gate(requests=f"{LIMIT}/s", units="6000/min", connections=3)
        with AuthenticatedProcessPool(session, max_workers=4, gate=gate) as pool:
            begun = time.monotonic()
            sizes = list(pool.map(size_of_tile, map(server.data_url, range(40)), chunksize=1))
            seconds = time.monotonic() - begun
            stats = pool.stats().gate
        kept = len(sizes) <= LIMIT * seconds + 3  # that may go at once after a silence
        print(f"{stats.waits} requests waited {stats.waited:.1f} s in all")
        print(f"{len(sizes)} tiles, limit {'kept' if kept else 'broken'}")


if __name__ == "__main__":
    main()
