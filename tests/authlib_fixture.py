"""Fixtures that start ``authlib_server.py`` as a process; conftest.py imports them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

_SCRIPT = Path(__file__).with_name("authlib_server.py")
_SECRET_VARIABLE = "AUTHLIB_SERVER_CLIENT_SECRET"
_CLIENT_ID = "demo-client"
_CLIENT_SECRET = "invented-secret-for-tests"
_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class AuthlibServer:
    """A running Authlib server, seen from outside."""

    base_url: str
    client_id: str
    client_secret: str

    @property
    def token_url(self) -> str:
        return f"{self.base_url}/oauth/token"

    def data_url(self, number: int) -> str:
        return f"{self.base_url}/data/{number}"

    def stats(self) -> dict[str, int]:
        """Return the server's own counts: logins, unauthorized, served."""
        counts: dict[str, int] = self._call("/stats")
        return counts

    def revoke_all(self) -> None:
        """Make the server forget every token it has issued."""
        self._call("/revoke_all", method="POST")

    def _call(self, path: str, method: str = "GET") -> dict[str, int]:
        request = urllib.request.Request(f"{self.base_url}{path}", method=method)
        with _NO_PROXY.open(request, timeout=30) as response:
            answer: dict[str, int] = json.load(response)
            return answer


class StartAuthlibServer(Protocol):
    """What the factory fixture hands to tests."""

    def __call__(self, lifetime: int = 3600, leeway: float = 0.0) -> AuthlibServer: ...


@contextlib.contextmanager
def run_authlib_server(lifetime: int = 3600, leeway: float = 0.0) -> Iterator[AuthlibServer]:
    """Run the server for the time of a ``with`` block; it ends by itself should this process die."""
    command = [sys.executable, str(_SCRIPT), "--lifetime", str(lifetime), "--leeway", str(leeway)]
    command += ["--client-id", _CLIENT_ID, "--client-secret-from-env", _SECRET_VARIABLE]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, _SECRET_VARIABLE: _CLIENT_SECRET},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                pytest.fail(f"the Authlib server did not start; exit code {process.wait(30)}")
            yield AuthlibServer(f"http://127.0.0.1:{json.loads(line)['port']}", _CLIENT_ID, _CLIENT_SECRET)
        finally:
            process.stdin.close()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


@pytest.fixture(scope="session")
def authlib_server() -> Iterator[AuthlibServer]:
    """A server whose tokens live an hour, shared by the tests of one test process: read counts as differences."""
    with run_authlib_server() as server:
        yield server


@pytest.fixture
def start_authlib_server() -> Iterator[StartAuthlibServer]:
    """A factory of servers that end with the test."""
    with contextlib.ExitStack() as running:

        def start(lifetime: int = 3600, leeway: float = 0.0) -> AuthlibServer:
            return running.enter_context(run_authlib_server(lifetime, leeway))

        yield start
