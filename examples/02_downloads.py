"""Download files that are whole, verified and resumed where they stood; needs ``pip install 'shpool[download]'``."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from shpool import DownloadItem, OAuthSession, download
from shpool.testing import FileFault, LoopbackServer, tile_bytes


def offered(server: LoopbackServer) -> list[DownloadItem]:
    """Return 40 files of 100 kB; give size and checksum of yours too, where the catalogue knows them."""
    items = []
    for n in range(40):
        content = tile_bytes(n, 100_000)
        url = server.put_file(f"tile-{n}.bin", content)
        items.append(DownloadItem(url, f"tiles/{n}.bin", len(content), hashlib.sha256(content).hexdigest()))
    server.fail_file("tile-7.bin", FileFault(cut_at=50_000))  # goes on from there
    server.fail_file("tile-9.bin", FileFault(content=bytes(100_000)))  # is thrown away, and fetched again
    return items


def main() -> None:
    """Fetch them into a temporary folder, in two workers that share one login."""
    with LoopbackServer() as server, tempfile.TemporaryDirectory() as folder:
        session = OAuthSession(server.token_url, server.client_id, server.client_secret)
        for result in download(session, offered(server), folder, max_workers=2, progress=True):
            if result.error is not None:
                print(f"{result.url}: {result.error}")
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        print(f"{len(files)} files, {sum(file.stat().st_size for file in files)} bytes, {server.logins} login")


if __name__ == "__main__":
    main()
