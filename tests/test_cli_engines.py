"""`shpool run` on a cluster: the same command line, the same results, journal and endings as on this machine."""

from __future__ import annotations

import json
import signal
from typing import TYPE_CHECKING

import pytest
from cli_shell import Shell, assert_told, records
from cluster_fixtures import needs_dask
from patience import until
from ray_fixture import needs_ray

if TYPE_CHECKING:
    from pathlib import Path

    from shpool.testing import LoopbackServer

pytestmark = pytest.mark.slow

TILES = """
import pathlib
import time

from shpool import current_session

def fetch(url, number):
    if number % 10 == 9:
        raise ValueError(f"bad tile {number}")
    return [number, len(current_session().http.get(url).content)]

def linger(number):
    pathlib.Path(f"{__file__}-begun-{number}").touch()
    time.sleep(600 if number else 0)
    return number
"""
CLUSTERS = [pytest.param("dask", marks=needs_dask), pytest.param("ray", marks=needs_ray)]


@pytest.fixture
def shell(tmp_path: Path, child_env: dict[str, str], server: LoopbackServer) -> Shell:
    shell = Shell(tmp_path, child_env)
    shell.write("tiles.py", TILES)
    lines = [json.dumps({"url": server.data_url(number, 100), "number": number}) for number in range(25)]
    shell.write("tiles.jsonl", "\n".join(lines))
    return shell


@pytest.fixture(params=CLUSTERS)
def cluster(request: pytest.FixtureRequest) -> list[str]:
    """Return the options that name a cluster."""
    kind = str(request.param)
    return ["--engine", kind, "--address", request.getfixturevalue(f"{kind}_engine").address]


def test_the_results_are_those_of_this_machine(shell: Shell, server: LoopbackServer, cluster: list[str]) -> None:
    login = shell.log_in_at(server)
    files = []
    for name, where in (("here", []), ("there", cluster)):
        journal, output = f"{name}.db", f"{name}.jsonl"
        done = shell.run("run", *where, "tiles.py:fetch", "tiles.jsonl", *login, "-j", journal, "-o", output)
        assert done.returncode == 1, done.stderr
        assert "25 jobs, 2 failed, 1 login" in done.stderr
        own = ("seconds", "worker")
        files.append(
            [
                {key: value for key, value in each.items() if key not in own}
                for each in records((shell.folder / output).read_text())
            ]
        )
    assert files[0] == files[1]
    again = shell.run("run", *cluster, "tiles.py:fetch", "tiles.jsonl", *login, "-j", "there.db", "-o", "there.jsonl")
    assert again.returncode == 1, again.stderr
    assert "23 skipped" in again.stderr or "23 done before" in again.stderr, again.stderr


def test_failures_can_end_a_run(shell: Shell, server: LoopbackServer, cluster: list[str]) -> None:
    login = shell.log_in_at(server)
    done = shell.run("run", *cluster, "tiles.py:fetch", "tiles.jsonl", *login, "--halt", "soon,fail=1")
    assert done.returncode == 1, done.stderr
    assert "halt" in done.stderr


def test_an_interrupt_ends_a_run(shell: Shell, server: LoopbackServer, cluster: list[str]) -> None:
    login = shell.log_in_at(server)
    shell.write("two.jsonl", "0\n1\n")
    with shell.start("run", *cluster, "tiles.py:linger", "two.jsonl", *login) as process:
        until((shell.folder / "tiles.py-begun-1").exists)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert [each["status"] for each in records(stdout)] == ["done"]


@pytest.mark.parametrize("kind", CLUSTERS)
def test_a_cluster_that_cannot_be_reached_is_told(shell: Shell, server: LoopbackServer, kind: str) -> None:
    login = shell.log_in_at(server)
    address = {"dask": "tcp://127.0.0.1:9", "ray": "127.0.0.1:9"}[kind]
    done = shell.run("run", "--engine", kind, "--address", address, "tiles.py:fetch", "tiles.jsonl", *login)
    assert_told(done, 1, "127.0.0.1:9 cannot be reached")
    assert server.logins == 0


def test_an_address_without_a_cluster_is_bad_usage(shell: Shell, server: LoopbackServer) -> None:
    login = shell.log_in_at(server)
    done = shell.run("run", "--address", "tcp://127.0.0.1:9", "tiles.py:fetch", "tiles.jsonl", *login)
    assert done.returncode == 2
    assert "--address goes with --engine dask or --engine ray" in done.stderr


@pytest.mark.parametrize(
    ("kind", "address", "error", "hint"),
    [
        ("dask", "nonsense", "'nonsense' is no address of a Dask scheduler", "tcp://host:8786"),
        ("dask", "htp://x:1", "'htp://x:1' is no address of a Dask scheduler", "tcp://host:8786"),
        ("dask", "", "'' is no address of a Dask scheduler", "tcp://host:8786"),
        ("ray", "tcp://127.0.0.1:6379", "'tcp://127.0.0.1:6379' is no address of a Ray", "host:port"),
        ("ray", "ray://127.0.0.1:10001", "is an address of Ray Client", "run this on a node"),
    ],
)
def test_what_is_no_address_is_bad_usage(shell: Shell, kind: str, address: str, error: str, hint: str) -> None:
    done = shell.run("run", "--engine", kind, "--address", address, "tiles.py:fetch", "tiles.jsonl")
    assert done.returncode == 2
    told, advice = done.stderr.splitlines()
    assert told.startswith("error: --address: ")
    assert error in told
    assert advice.startswith("hint: ")
    assert hint in advice


@pytest.mark.parametrize(
    ("option", "known"), [("--engine", "'loky', 'dask', 'ray'"), ("--format", "'jsonl', 'csv', 'text'")]
)
def test_a_word_that_is_not_known_is_answered_with_those_that_are(shell: Shell, option: str, known: str) -> None:
    done = shell.run("run", option, "dsk", "tiles.py:fetch", "tiles.jsonl")
    assert done.returncode == 2
    told = done.stderr.splitlines()[0]
    assert told == f"error: Invalid value for '{option}': 'dsk' is not one of {known}."
