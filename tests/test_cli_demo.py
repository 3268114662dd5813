"""`shpool demo`: what it prints, and when it calls itself good."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

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


# Twice the command's own lifetime: with tests on all processors, a login and a request under way may together take
# longer than the 0.2 s that are left of a 2-second token when it is renewed. Where the machine stalls even longer, the
# server has patience; it would still refuse a token that is not renewed at all.
DEMO = """
import sys
sys.path.append(sys.argv[1])
import patience, shpool.testing
from shpool_cli.demo import run_demo
shpool.testing.LoopbackServer = patience.LenientServer
sys.exit(run_demo(40, lifetime=4.0, progress=True, as_json=True))
"""


def run(*arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=120, check=False
    )


def test_one_login_per_lifetime_and_one_ahead_is_good() -> None:
    assert GOOD.is_good


@pytest.mark.parametrize("change", [{"right": 299}, {"unauthorized": 1}, {"logins": 6}])
def test_a_wrong_tile_a_401_or_a_login_too_many_is_not(change: dict[str, int]) -> None:
    assert not dataclasses.replace(GOOD, **change).is_good


def test_a_slow_machine_may_have_more_early_refreshes() -> None:
    slow = dataclasses.replace(GOOD, lifetimes=10, logins=12)
    assert slow.is_good
    assert not dataclasses.replace(slow, logins=13).is_good


def test_the_table_is_aligned() -> None:
    lines = GOOD.table().splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "logins, counted by the server" in GOOD.table()
    rows = {line.rsplit(maxsplit=1)[0].strip(): line.rsplit(maxsplit=1)[1] for line in lines}
    assert (rows["of these, refreshes"], rows["logins allowed, at most"]) == ("4", "5")


def test_a_summary_tells_contents_apart() -> None:
    assert summarise(tile_bytes(1, 4096)) == summarise(tile_bytes(1, 4096))
    assert summarise(tile_bytes(1, 4096)) != summarise(tile_bytes(2, 4096))


@pytest.mark.slow
def test_the_demo_gets_every_tile_right_with_a_login_per_lifetime(child_env: dict[str, str]) -> None:
    ended = run("-c", DEMO, str(Path(__file__).parent), env=child_env)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    outcome = json.loads(ended.stdout)
    assert (outcome["tiles"], outcome["right"], outcome["unauthorized"]) == (40, 40, 0)
    assert outcome["lifetimes"] >= 3
    assert outcome["logins"] >= 3
    assert outcome["is_good"]
    # One more where the pool ended while the server was giving out a token.
    assert outcome["logins"] - outcome["refreshes"] in {1, 2}
    assert outcome["plain_pool_logins"] == 4 * outcome["lifetimes"]
    assert "40/40" in ended.stderr


@pytest.mark.slow
def test_no_tiles_is_bad_usage(child_env: dict[str, str]) -> None:
    ended = run("-m", "shpool_cli.app", "demo", "--tiles", "0", env=child_env)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error:")
