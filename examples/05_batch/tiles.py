"""Functions for `shpool run`: one call for each line of jobs.jsonl, an object becoming keyword arguments.

At a real provider, with SH_CLIENT_ID and SH_CLIENT_SECRET in the environment:

    shpool run tiles.py:mean_of_tile jobs.jsonl --token-url https://... --workers 4 --output results.jsonl

Offline, `python tiles.py` runs that very command against a loopback server.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import requests

from shpool import current_session
from shpool.testing import LoopbackServer

HERE = Path(__file__).parent


def mean_of_tile(n: int, size: int = 1024) -> dict[str, float]:
    """Download a tile and compute on it; what is returned becomes the line's result."""
    url = f"{os.environ['TILES_URL']}/tiles/{n}?size={size}"
    response = requests.get(url, headers=current_session().session_headers, timeout=30)
    response.raise_for_status()
    return {"tile": n, "mean": sum(response.content) / size}


def main() -> int:
    """Run the batch offline; results go to standard output."""
    with LoopbackServer() as server:
        credentials = {"SH_CLIENT_ID": server.client_id, "SH_CLIENT_SECRET": server.client_secret}
        environment = {**os.environ, **credentials, "TILES_URL": server.base_url}
        target = f"{HERE / 'tiles.py'}:mean_of_tile"
        options = ["--token-url", server.token_url, "--workers", "2"]
        command = [sys.executable, "-m", "shpool_cli.app", "run", target, str(HERE / "jobs.jsonl"), *options]
        return subprocess.run(command, env=environment, check=False).returncode  # noqa: S603 - our own command


if __name__ == "__main__":
    sys.exit(main())
