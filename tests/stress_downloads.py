"""Let a server do its worst to `shpool download`, and count what arrived wrong, was lost, or was not named.

The server cuts connections, stalls, answers 200 to a Range, sends other sizes and other content than it should, asks
to wait with 429, fails with 503, and revokes the token in between. Some files it does not have, and of some the input
states a wrong checksum.

Run `python tests/stress_downloads.py [--files N] [--seed N]`; it prints what was counted, a line per promise, and exits
with 1 if one was broken.
"""

from __future__ import annotations

import argparse
import base64
import collections
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shpool.testing import FileFault, LoopbackServer

if TYPE_CHECKING:
    from collections.abc import Iterator

SMALLEST, LARGEST = 10_000, 5_000_000  # bytes
FAULTY = 0.25  # share of the answers that go wrong
HOPELESS = 50  # one file in so many is not there, and one has a wrong checksum in the input
REVOKED_AFTER = 180  # answers since the last login
STALL = 5  # s without a byte that the command takes for a stall
LONGEST = 1_200.0  # s after which the command counts as hanging
LAUNCHER = "from shpool_cli.app import main; main()"

FAULTS = (
    *(FileFault(cut_at=at) for at in (0, 3_000, 60_000, 1_000_000)),
    *(FileFault(stall_at=at) for at in (0, 8_000, 400_000)),
    *(FileFault(ignores_range=True) for _ in range(3)),
    FileFault(content=b"short"),
    FileFault(content=b"\0" * SMALLEST),
    FileFault(range_shift=1),
    FileFault(ignores_range=True, content=b"x" * 123_456),
    FileFault(status=429, headers={"Retry-After": "1"}),
    FileFault(status=503),
    FileFault(content=b"<html>sorry</html>", headers={"Content-Type": "text/html"}),
)


@dataclass
class Stock:
    """What the server has, and what the input says of it.

    Attributes:
        items: The lines of the input.
        digests: sha256 of each file, by its path below the folder.
        hopeless: Paths that cannot be had: not there, or with a wrong checksum in the input.
        size: Bytes in all.
    """

    items: list[dict[str, Any]] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    hopeless: set[str] = field(default_factory=set)
    size: int = 0

    def add(self, server: LoopbackServer, number: int, dice: random.Random) -> None:
        """Offer one more file; it can be verified by the input, or by what the server states."""
        path = f"{number % 7}/t{number}.bin"
        content = dice.randbytes(int(SMALLEST * (LARGEST / SMALLEST) ** (dice.random() ** 3)))
        digest = hashlib.sha256(content)
        headers = {"Repr-Digest": f"sha-256=:{base64.b64encode(digest.digest()).decode()}:"}
        url = f"{server.base_url}/files/t{number}.bin"
        item: dict[str, Any] = {"url": url, "path": path}
        if number % 3 == 0:
            item |= {"size": len(content), "sha256": digest.hexdigest()}
        elif number % 3 == 1:
            item["md5"] = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if number % HOPELESS == 1:
            self.hopeless.add(path)  # never offered
        else:
            server.put_file(f"t{number}.bin", content, headers if number % 3 == 2 else None)
        if number % HOPELESS == 2:
            item["sha256"] = "0" * 64
            self.hopeless.add(path)
        self.items.append(item)
        self.digests[path] = digest.hexdigest()
        self.size += len(content)


class Revoker(threading.Thread):
    """Revoke the token again and again until stopped; the next one gets as many answers before it is."""

    def __init__(self, server: LoopbackServer) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._is_over = threading.Event()
        self.count = 0

    def run(self) -> None:
        """Do so."""
        until = REVOKED_AFTER
        while not self._is_over.wait(0.01):
            if self._server.logins == self.count:  # nobody has noticed the last one yet
                until = self._server.requests + REVOKED_AFTER
            elif self._server.requests >= until:
                self.count += 1
                self._server.revoke_all()

    def stop(self) -> None:
        """End the thread."""
        self._is_over.set()
        self.join()


def run_command(folder: Path, server: LoopbackServer, *options: str) -> int:
    """Run the command, the same each time, and return its exit code."""
    command = [sys.executable, "-c", LAUNCHER, "download", str(folder / "items.jsonl"), "--to", str(folder / "files")]
    command += ["--journal", str(folder / "run.db"), "--output", str(folder / "results.jsonl"), "--workers", "4"]
    command += [
        "--transfers",
        "16",
        "--retries",
        "5",
        "--stall-timeout",
        str(STALL),
        "--token-url",
        server.token_url,
        *options,
    ]
    credentials = {"SH_CLIENT_ID": server.client_id, "SH_CLIENT_SECRET": server.client_secret}
    env = {**os.environ, **credentials, "HOME": str(folder)}
    done = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True, timeout=LONGEST, check=False)
    print(f"      {done.stderr.strip()}")
    return done.returncode


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def judged(folder: Path, stock: Stock) -> Iterator[tuple[str, int]]:
    """Yield each promise and how often it was broken."""
    results = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    times = collections.Counter(result["index"] for result in results)
    yield "one result for each file", sum(times[n] != 1 for n in range(len(stock.items)))
    paths = {result["index"]: stock.items[result["index"]]["path"] for result in results}
    right = {
        path
        for path, digest in stock.digests.items()
        if (folder / "files" / path).is_file() and sha256_of(folder / "files" / path) == digest
    }
    done = {paths[result["index"]] for result in results if result["status"] == "done"}
    failed = {
        paths[result["index"]]
        for result in results
        if result["status"] == "failed" and Path(paths[result["index"]]).name in result["error"]
    }
    yield "every file is right, or reported by name", len(stock.digests.keys() - (done & right) - (failed - done))
    standing = {str(path.relative_to(folder / "files")) for path in (folder / "files").rglob("*") if path.is_file()}
    unfinished = {path for path in standing if path.endswith((".part", ".part.json"))}
    yield "whatever stands under a file's name is that file", len(standing - unfinished - right)
    yield "no part of a file that is done is left", sum(path.partition(".part")[0] in done for path in unfinished)
    yield "what can be had was had", len(stock.digests.keys() - stock.hopeless - done)
    for result in results:
        if result["status"] == "failed" and paths[result["index"]] not in stock.hopeless:
            print(f"      unlucky: {result['error']}")
    yield "what cannot be had is reported", len(stock.hopeless & done)


def main() -> int:
    """Run it and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    dice = random.Random(options.seed)
    promises: list[tuple[str, int]] = []
    with tempfile.TemporaryDirectory() as name, LoopbackServer() as server:
        folder, stock = Path(name), Stock()
        for number in range(options.files):
            stock.add(server, number, dice)
        (folder / "items.jsonl").write_text("".join(f"{json.dumps(item)}\n" for item in stock.items))
        server.fail_files_at_random(FAULTY, *FAULTS, seed=options.seed)
        print(f"{options.files} files, {stock.size / 1e6:.0f} MB, {FAULTY:.0%} of the answers go wrong", flush=True)
        revoker, began = Revoker(server), time.monotonic()
        revoker.start()
        code = run_command(folder, server)
        revoker.stop()
        promises.append(("the exit code says that some have failed", code != 1))
        statuses = collections.Counter(status for _, path, status in server.log if path.startswith("/files/"))
        print(f"      {time.monotonic() - began:.0f} s, answers by status: {dict(sorted(statuses.items()))}")
        print(f"      {revoker.count} revocations, {server.logins} logins")
        promises += judged(folder, stock)
        promises.append(("one login, and one more for each revocation", server.logins > 1 + revoker.count))
        server.fail_files_at_random(0)
        asked = len(server.log)
        had = {path for path in stock.digests if (folder / "files" / path).exists()}
        run_command(folder, server, "--retries", "0")
        done = {f"/files/{Path(path).name}" for path in had}
        again = sum(path in done for _, path, _ in server.log[asked:])
        promises.append(("the same command again asks for nothing that is done", again))
    for text, broken in promises:
        print(f"{'BROKEN' if broken else 'kept  '}  {text}{f': {broken} times' if broken else ''}")
    return int(any(broken for _, broken in promises))


if __name__ == "__main__":
    sys.exit(main())
