"""A canary secret and a canary token are looked for wherever they must not be."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from cli_shell import Shell

from shpool.testing import LoopbackServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow

SECRET = "canary-secret-not-real-4711"

# All that a process can show of itself: logs at DEBUG, reprs, tracebacks with locals, pickles, its workers' /proc.
SCRIPT = r"""
import logging, os, pathlib, pickle, sys, traceback
import cloudpickle
import shpool
from shpool import *
from shpool.redaction import Secret

logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)

def use(url):
    answer = current_session().http.get(url)
    answer.raise_for_status()
    return repr(current_session()), repr(current_session().token), cloudpickle.dumps(current_session())

def crash(url):
    token = current_session().token
    session = current_session()
    raise RuntimeError("the task failed")

def show(name, thing):
    print(name, repr(thing), str(thing), vars(thing) if name == "stats" else "")
    try:
        print(name, "pickles as", cloudpickle.dumps(thing))
    except Exception as exc:
        print(name, "does not pickle:", exc)

def show_error(work):
    try:
        work()
    except BaseException as exc:
        while exc is not None:
            lines = traceback.TracebackException.from_exception(exc, capture_locals=True).format()
            print("".join(lines), pickle.dumps(exc))
            exc = exc.__cause__ or exc.__context__

if __name__ == "__main__":
    url, data_url, dead_url, name = sys.argv[1:]
    config = SHConfig(sh_token_url=url, sh_base_url=data_url)
    session = SentinelHubSession(config)
    show("config", config)
    show("session", session)
    show("secret", Secret(os.environ["SH_CLIENT_SECRET"]))
    with AuthenticatedProcessPool(session, 2, memory_name=name) as pool:
        for url in [data_url + f"/tiles/{n}?size=10" for n in range(8)]:
            print(pool.submit(use, url).result())
        for pid in pool._engine.pids:
            for part in ("environ", "cmdline"):
                print(part, pathlib.Path(f"/proc/{pid}/{part}").read_bytes())
        show("pool", pool)
        show("view", pool.options(retries=1))
        show("stats", pool.stats())
        show("sharing", pool._sharing)
        show("collected", collect_shared_session(name))
        show_error(lambda: pool.submit(crash, "x").result())
    show_error(lambda: OAuthSession(dead_url, "canary", os.environ["SH_CLIENT_SECRET"], max_attempts=1).token)
    show_error(lambda: OAuthSession(config.sh_token_url, "wrong", os.environ["SH_CLIENT_SECRET"]).token)
    with SessionSharing(session, memory_name=name) as sharing:
        show("sharing", sharing)
        show("thread", sharing.thread)
    show("closed pool", pool)
    print("the end")
"""


@pytest.fixture
def server() -> Iterator[LoopbackServer]:
    """A provider whose tokens are short-lived, so that refreshes are logged too."""
    with LoopbackServer(lifetime=2.0, client_secret=SECRET) as running:
        yield running


def assert_hidden(text: str, tokens: list[str]) -> None:
    for word in (SECRET, *tokens):
        found = text.find(word)
        assert found < 0, f"a canary sings: …{text[max(0, found - 300) : found + 80]}…"


def tokens_of(server: LoopbackServer) -> list[str]:
    """Return the access tokens the server has given out."""
    known = list(server._issuer._issued)
    assert known
    return known


def test_no_canary_in_anything_a_process_shows(
    tmp_path: Path, server: LoopbackServer, child_env: dict[str, str], memory_name: str
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    env = child_env | {"SH_CLIENT_ID": server.client_id, "SH_CLIENT_SECRET": SECRET, "ANOTHER_NAME_FOR_IT": SECRET}
    with LoopbackServer() as dead:
        dead_url = dead.token_url
    done = subprocess.run(
        [sys.executable, str(script), server.token_url, server.base_url, dead_url, memory_name],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "the end" in done.stdout, done.stderr
    assert len(re.findall(r"^DEBUG:", done.stderr, flags=re.MULTILINE)) > 2
    assert "environ b'" in done.stdout
    assert_hidden(done.stdout + done.stderr, tokens_of(server))


CRASHES = """
from shpool import current_session

def crash(number):
    token = current_session().token
    raise RuntimeError("the task failed")

def leave(number):
    import os
    os._exit(3)
"""


@pytest.mark.parametrize("function", ["crash", "leave", "missing"])
def test_no_canary_in_a_crash_of_the_command_line(
    tmp_path: Path, server: LoopbackServer, child_env: dict[str, str], function: str
) -> None:
    shell = Shell(tmp_path, child_env | {"SH_CLIENT_ID": server.client_id, "SH_CLIENT_SECRET": SECRET})
    shell.write("jobs.py", CRASHES)
    shell.write("jobs.jsonl", "1\n2\n")
    done = shell.run("run", f"jobs.py:{function}", "jobs.jsonl", "--token-url", server.token_url, "--workers", "1")
    assert done.returncode == (2 if function == "missing" else 1), done.stderr
    assert_hidden(done.stdout + done.stderr, tokens_of(server) if server.logins else [])
    shell.env["SH_CLIENT_SECRET"] = SECRET + "-wrong"
    refused = shell.run("token", "--token-url", server.token_url)
    assert refused.returncode == 3
    assert_hidden(refused.stdout + refused.stderr, [])
    assert os.environ.get("SH_CLIENT_SECRET") is None
