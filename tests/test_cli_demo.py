"""`shpool demo`: what it prints, and when it calls itself good."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from shpool.testing import tile_bytes
from shpool_cli.demo import Outcome, summarise

GOOD = Outcome(
    tiles=300,
    workers=4,
    right=300,
    megabytes=19.661,
    seconds=7.2,
    lifetimes=4,
    logins=5,
    plain_pool_logins=16,
    refreshes=4,
    unauthorized=0,
)


def run_demo(*options: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shpool_cli.app", "demo", *options]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_one_login_per_lifetime_and_one_ahead_is_good() -> None:
    assert GOOD.is_good


@pytest.mark.parametrize("change", [{"right": 299}, {"unauthorized": 1}, {"logins": 6}])
def test_a_wrong_tile_a_401_or_a_login_too_many_is_not(change: dict[str, int]) -> None:
    assert not dataclasses.replace(GOOD, **change).is_good


def test_the_table_is_aligned() -> None:
    lines = GOOD.table().splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "logins, counted by the server" in GOOD.table()


def test_a_summary_tells_contents_apart() -> None:
    assert summarise(tile_bytes(1, 4096)) == summarise(tile_bytes(1, 4096))
    assert summarise(tile_bytes(1, 4096)) != summarise(tile_bytes(2, 4096))


@pytest.mark.slow
def test_the_demo_gets_every_tile_right_with_a_login_per_lifetime(child_env: dict[str, str]) -> None:
    run = run_demo("--json", "--tiles", "40", env=child_env)
    assert run.returncode == 0, run.stderr + run.stdout
    outcome = json.loads(run.stdout)
    assert (outcome["tiles"], outcome["right"], outcome["unauthorized"]) == (40, 40, 0)
    assert outcome["lifetimes"] >= 3
    assert 3 <= outcome["logins"] <= outcome["lifetimes"] + 1
    assert outcome["plain_pool_logins"] == 4 * outcome["lifetimes"]
    assert run.stderr == ""


@pytest.mark.slow
def test_the_demo_can_show_a_bar(child_env: dict[str, str]) -> None:
    run = run_demo("--progress", "--tiles", "8", "--workers", "2", env=child_env)
    assert run.returncode == 0, run.stderr + run.stdout
    assert "8/8" in run.stderr
    assert run.stdout.startswith("tiles right")


def test_no_tiles_is_bad_usage(child_env: dict[str, str]) -> None:
    run = run_demo("--tiles", "0", env=child_env)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("error:")
