"""Measure `shpool download` beside aria2c and `curl --parallel`, all from one nginx, and print ratios.

    python tests/benchmarks/download.py [--quick] [--case NAME]... [--rounds N]

Needs nginx; a peer that is not installed is left out with the reason, and so are the TLS cases without openssl. In
`latency` all go through a relay that holds every byte back for a while, each way. What is timed is each whole command,
ours with login, checksums, fsync, atomic renames and journal; the peers check nothing. All have 16 connections. The
contenders take turns, each round beginning with another one.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # What is imported from: tests/ and the checkout itself, instead of this folder.
    sys.path[:1] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from shpool.testing import LoopbackServer

if TYPE_CHECKING:
    from collections.abc import Iterator

CONNECTIONS = 16
WORKERS = 2
DELAY = 0.015  # s each way
LONGEST = 900.0  # s after which a command counts as hanging
LAUNCHER = "from shpool_cli.app import main; main()"
NGINX = """
daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log; worker_processes 1;
events {{ worker_connections 256; }}
http {{
    access_log off; sendfile on; keepalive_requests 1000000; client_body_temp_path {folder}/t1;
    proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3; uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
    default_type application/octet-stream;
    server {{ listen 127.0.0.1:{port}; root {folder}/offered; }}
    {tls}
}}
"""
TLS = """
    server {{ listen 127.0.0.1:{port} ssl; root {folder}/offered;
        ssl_certificate {folder}/cert.pem; ssl_certificate_key {folder}/key.pem; }}
"""


@dataclass(frozen=True)
class Case:
    """Files to fetch.

    Attributes:
        files: How many.
        size: Bytes of each.
        quick: How many with --quick.
        goals: How much faster than each peer we are to be.
    """

    files: int
    size: int
    quick: int
    goals: dict[str, float]
    is_tls: bool = False
    is_delayed: bool = False


SMALL_GOALS, LARGE_GOALS = {"aria2c": 1.2, "curl": 0.6}, {"curl": 0.95}
CASES = {
    "small": Case(10_000, 10_000, 1_000, SMALL_GOALS),
    "latency": Case(10_000, 10_000, 1_000, {"curl": 0.85}, is_delayed=True),
    "large": Case(50, 50_000_000, 4, LARGE_GOALS),
    "tls-small": Case(10_000, 10_000, 1_000, SMALL_GOALS, is_tls=True),
    "tls-large": Case(50, 50_000_000, 4, LARGE_GOALS, is_tls=True),
}


@dataclass(frozen=True)
class Site:
    """An nginx, and the folder it offers."""

    folder: Path
    port: int
    relay_port: int
    tls_port: int | None

    def offer(self, case: Case, files: int) -> None:
        """Offer the files of a case, hard links all of them, and write the lists of the three."""
        offered = self.folder / "offered"
        shutil.rmtree(offered, ignore_errors=True)
        offered.mkdir()
        content = random.Random(case.size).randbytes(case.size)
        first = offered / "first"
        first.write_bytes(content)
        port = self.tls_port if case.is_tls else self.relay_port if case.is_delayed else self.port
        root = f"{'https' if case.is_tls else 'http'}://127.0.0.1:{port}"
        digest = hashlib.sha256(content).hexdigest()
        names = [f"f{n}.bin" for n in range(files)]
        for name in names:
            (offered / name).hardlink_to(first)
        items = [{"url": f"{root}/{name}", "size": case.size, "sha256": digest} for name in names]
        (self.folder / "items.jsonl").write_text("".join(f"{json.dumps(item)}\n" for item in items))
        (self.folder / "aria2c.txt").write_text("".join(f"{item['url']}\n" for item in items))
        pairs = zip(items, names, strict=True)
        (self.folder / "curl.txt").write_text("".join(f'url = "{item["url"]}"\noutput = "{n}"\n' for item, n in pairs))

    def command(self, peer: str, server: LoopbackServer, target: Path) -> list[str]:
        """Return what fetches the files into a folder."""
        cert = str(self.folder / "cert.pem")
        if peer == "aria2c":
            options = ["--quiet", "--file-allocation=none", "--split=1", f"--ca-certificate={cert}"]
            return ["aria2c", *options, f"--max-concurrent-downloads={CONNECTIONS}", "-i", f"{self.folder}/aria2c.txt"]
        if peer == "curl":
            trust = ["--cacert", cert] if self.tls_port else []
            options = ["--silent", "--parallel", "--parallel-max", str(CONNECTIONS)]
            return ["curl", *options, *trust, "--config", f"{self.folder}/curl.txt"]
        ours = [sys.executable, "-c", LAUNCHER, "download", f"{self.folder}/items.jsonl", "--to", str(target)]
        ours += ["--workers", str(WORKERS), "--transfers", str(CONNECTIONS // WORKERS), "--journal", f"{target}.db"]
        ours += ["--output", f"{target}.jsonl", "--token-url", server.token_url]
        return [*ours, "--ca-bundle", cert] if self.tls_port else ours

    def measure(self, peer: str, files: int, size: int) -> float:
        """Return how many seconds one takes; all files must be there then."""
        target = self.folder / "target"
        for path in self.folder.glob("target*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        target.mkdir()
        with LoopbackServer() as server:
            credentials = {"SH_CLIENT_ID": server.client_id, "SH_CLIENT_SECRET": server.client_secret}
            paths = os.pathsep.join(str(Path(__file__).resolve().parents[2] / name) for name in (".", "cli"))
            env = {**os.environ, **credentials, "HOME": str(self.folder), "PYTHONPATH": paths}
            env.pop("PYTHONDONTWRITEBYTECODE", None)  # else the checkout is compiled anew in each process
            command = self.command(peer, server, target)
            began = time.monotonic()
            done = subprocess.run(
                command, cwd=target, env=env, capture_output=True, text=True, timeout=LONGEST, check=False
            )
            seconds = time.monotonic() - began
        right = sum(path.stat().st_size == size for path in target.iterdir())
        if done.returncode or right != files:
            sys.exit(f"{peer} ended with {done.returncode} and {right} of {files} files: {done.stderr[-500:]}")
        return seconds


@contextlib.contextmanager
def running_site() -> Iterator[Site]:
    """Run an nginx, with TLS where openssl makes a certificate."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)  # its workers are another user's where root starts it
        port, tls_port = _free_port(), _free_port() if _has_certificate(folder) else None
        tls = TLS.format(port=tls_port, folder=folder) if tls_port else ""
        (folder / "nginx.conf").write_text(NGINX.format(folder=folder, port=port, tls=tls))
        relay = [sys.executable, str(Path(__file__).with_name("relay.py")), str(port), str(DELAY)]
        with (
            subprocess.Popen(["nginx", "-c", str(folder / "nginx.conf")], stderr=subprocess.DEVNULL) as nginx,
            subprocess.Popen(relay, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as relaying,
        ):
            try:
                _wait_for(port)
                assert relaying.stdout is not None
                yield Site(folder, port, int(relaying.stdout.readline()), tls_port)
            finally:
                relaying.terminate()
                nginx.terminate()


def _has_certificate(folder: Path) -> bool:
    if shutil.which("openssl") is None:
        return False
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", f"{folder}/key.pem", "-out", f"{folder}/cert.pem"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def _wait_for(port: int) -> None:
    give_up = time.monotonic() + 30.0
    while not _answers(port):
        if time.monotonic() > give_up:
            sys.exit("nginx does not answer")
        time.sleep(0.05)


def _answers(port: int) -> bool:
    with socket.socket() as client:
        client.settimeout(1.0)
        return client.connect_ex(("127.0.0.1", port)) == 0


def run_case(name: str, site: Site, *, is_quick: bool, rounds: int) -> None:
    """Measure a case and print it."""
    case = CASES[name]
    files = case.quick if is_quick else case.files
    site.offer(case, files)
    peers = ["shpool", *(peer for peer in ("aria2c", "curl") if shutil.which(peer) is not None)]
    found: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds):
        start = number % len(peers)
        for peer in peers[start:] + peers[:start]:
            found[peer].append(site.measure(peer, files, case.size))
    ours = median(found["shpool"])
    print(f"{name}: {files:,} files of {case.size:,} bytes{', TLS' if case.is_tls else ''}, median of {rounds}")
    print(f"  shpool  {ours:7.2f} s  {files / ours:8.0f} files/s  {files * case.size / ours / 1e6:7.0f} MB/s")
    for peer in ("aria2c", "curl"):
        if peer not in found:
            print(f"  {peer:6}  left out: it is not installed")
            continue
        theirs = median(found[peer])
        goal = f", goal {case.goals[peer]}x" if peer in case.goals else ""
        print(f"  {peer:6}  {theirs:7.2f} s  shpool has {theirs / ours:.2f}x its rate{goal}")
    sys.stdout.flush()


def main() -> None:
    """Run the cases that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the files, one round")
    parser.add_argument("--case", action="append", choices=list(CASES), help="only this one; may be repeated")
    parser.add_argument("--rounds", type=int, default=None, help="default 3, 1 with --quick")
    options = parser.parse_args()
    if shutil.which("nginx") is None:
        print("left out: nginx is not installed")
        return
    rounds = options.rounds or (1 if options.quick else 3)
    for name in options.case or CASES:
        with running_site() as site:
            if CASES[name].is_tls and site.tls_port is None:
                print(f"{name}: left out: openssl makes no certificate")
                continue
            run_case(name, site, is_quick=options.quick, rounds=rounds)


if __name__ == "__main__":
    main()
