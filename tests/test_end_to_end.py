"""The whole thing against a provider nobody here wrote: Authlib's server, in a process of its own."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest
from cli_shell import Shell, records
from patience import LEEWAY

from shpool import AuthenticatedProcessPool, OAuthSession, current_session

if TYPE_CHECKING:
    from pathlib import Path

    from authlib_fixture import AuthlibServer, StartAuthlibServer

pytestmark = pytest.mark.slow

FETCH = """
import time
from shpool import current_session

def fetch(url):
    answer = current_session().http.get(url)
    time.sleep(0.02)  # a job of some length, so that the batch outlives a token
    answer.raise_for_status()
    return answer.json()
"""


def fetch(url: str) -> int:
    return current_session().http.get(url).status_code


def session_of(server: AuthlibServer) -> OAuthSession:
    return OAuthSession(server.token_url, server.client_id, server.client_secret)


def test_a_batch_of_a_thousand_jobs_outlives_its_tokens(
    tmp_path: Path, start_authlib_server: StartAuthlibServer, child_env: dict[str, str]
) -> None:
    """One login per lifetime by the server's own count, and no request it refused."""
    server = start_authlib_server(lifetime=3, leeway=LEEWAY)  # for machines that stall amid a request
    shell = Shell(tmp_path, child_env | {"SH_CLIENT_ID": server.client_id, "SH_CLIENT_SECRET": server.client_secret})
    shell.write("jobs.py", FETCH)
    shell.write("urls.txt", "".join(f"{server.data_url(n)}\n" for n in range(1000)))
    began = time.monotonic()
    done = shell.run("run", "jobs.py:fetch", "urls.txt", "--token-url", server.token_url, "--workers", "4", "--json")
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    results = records(done.stdout)
    assert [record["index"] for record in results] == list(range(1000))
    assert {record["status"] for record in results} == {"done"}
    counts = server.stats()
    assert counts["logins"] >= 2, "the jobs take 5 s at least"
    earliest_refresh = 3 - 0.6 * 0.75  # s: 60 % of the window before its end, which is a quarter of the lifetime
    assert counts["logins"] <= seconds / earliest_refresh + 2
    assert counts["unauthorized"] == 0
    told = json.loads(done.stderr.splitlines()[-1])["logins"]
    assert told in {counts["logins"], counts["logins"] - 1}, "one more may have been under way at the end"
    print(f"{len(results)} results in {seconds:.1f} s, {counts}")


def test_sixty_four_workers_cost_one_login(start_authlib_server: StartAuthlibServer) -> None:
    server = start_authlib_server()
    with AuthenticatedProcessPool(session_of(server), max_workers=64) as pool:
        statuses = list(pool.map(fetch, [server.data_url(n) for n in range(64)], chunksize=1))
    assert statuses == [200] * 64
    assert server.stats()["logins"] == 1


def test_tokens_revoked_in_mid_run_cost_one_login_and_no_task(start_authlib_server: StartAuthlibServer) -> None:
    server = start_authlib_server()
    with AuthenticatedProcessPool(session_of(server), max_workers=16) as pool:
        assert list(pool.map(fetch, [server.data_url(n) for n in range(32)])) == [200] * 32
        server.revoke_all()
        assert list(pool.map(fetch, [server.data_url(n) for n in range(160)])) == [200] * 160
    counts = server.stats()
    assert counts["logins"] == 2, counts
    print(counts)
