"""Share one login with processes of any kind: here the workers of the standard library's executor."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import requests

from shpool import OAuthSession, SessionSharing, collect_shared_session
from shpool.testing import LoopbackServer


def tile_size(memory_name: str, url: str) -> int:
    """Download a tile with the session shared under that name; runs in another process."""
    shared = collect_shared_session(memory_name)
    response = requests.get(url, headers=shared.session_headers, timeout=30)
    response.raise_for_status()
    return len(response.content)


def main() -> None:
    """Download 20 tiles; any process of the same user could collect the session by its name."""
    memory_name = f"example-{os.getpid()}"
    with LoopbackServer() as server:
        session = OAuthSession(server.token_url, server.client_id, server.client_secret)
        urls = [server.data_url(n) for n in range(20)]
        with (
            SessionSharing(session, memory_name=memory_name),
            ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as executor,
        ):
            sizes = list(executor.map(partial(tile_size, memory_name), urls))
        print(f"{len(sizes)} tiles, {sum(sizes)} bytes, {server.logins} login")


if __name__ == "__main__":
    main()
