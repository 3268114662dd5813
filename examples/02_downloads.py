"""Download files in parallel with a progress bar; a file appears under its name only once it is whole."""

from __future__ import annotations

import tempfile
from concurrent.futures import as_completed
from pathlib import Path

import requests
from tqdm import tqdm

from shpool import AuthenticatedProcessPool, OAuthSession, current_session
from shpool.testing import LoopbackServer


def download(url: str, path: Path) -> int:
    """Fetch one file and return its size; runs in a worker."""
    part = path.with_name(path.name + ".part")
    headers = current_session().session_headers
    with requests.get(url, headers=headers, timeout=30, stream=True) as response, part.open("wb") as file:
        response.raise_for_status()
        for piece in response.iter_content(1 << 16):
            file.write(piece)
    part.replace(path)
    return path.stat().st_size


def main() -> None:
    """Download 40 tiles of 100 kB into a temporary folder."""
    with LoopbackServer() as server, tempfile.TemporaryDirectory() as folder:
        session = OAuthSession(server.token_url, server.client_id, server.client_secret)
        with AuthenticatedProcessPool(session, max_workers=4) as pool, tqdm(unit="B", unit_scale=True) as bar:
            downloads = [
                pool.submit(download, server.data_url(n, size=100_000), Path(folder, f"tile-{n}.bin"))
                for n in range(40)
            ]
            for done in as_completed(downloads):
                bar.update(done.result())
        files = sorted(Path(folder).iterdir())
        print(f"{len(files)} files, {sum(file.stat().st_size for file in files)} bytes, {server.logins} login")


if __name__ == "__main__":
    main()
