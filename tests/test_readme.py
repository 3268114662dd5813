"""The README is true: its Python runs, and its commands print what it says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from shpool.testing import LoopbackServer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def matches(expected: str, printed: str) -> bool:
    """Compare with ``...`` standing for anything."""
    pattern = ".*".join(map(re.escape, expected.split("...")))
    return re.fullmatch(pattern, printed, flags=re.DOTALL) is not None


@pytest.mark.slow
def test_the_first_example_prints_what_is_said_below_it(tmp_path: Path, child_env: dict[str, str]) -> None:
    [code] = blocks("python")
    assert len([line for line in code.splitlines() if line and not line.startswith(("import", "from"))]) <= 12
    script = tmp_path / "example.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)], env=child_env, capture_output=True, text=True, check=True
    )
    [promise] = re.findall(r"It prints `(.*?)`", README)
    assert done.stdout == promise + "\n"


@pytest.mark.slow
def test_each_command_prints_what_stands_below_it(
    tmp_path: Path, server: LoopbackServer, child_env: dict[str, str]
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    config = tmp_path / "config" / "sentinelhub"
    config.mkdir(parents=True)
    (config / "config.toml").write_text(
        f'[default-profile]\nsh_token_url = "{server.token_url}"\nsh_base_url = "{server.base_url}"\n'
    )
    (tmp_path / "files.txt").write_text("".join(f"{server.data_url(number, 10_000)}\n" for number in range(3)))
    env = child_env | {
        "SH_CLIENT_ID": server.client_id,
        "SH_CLIENT_SECRET": server.client_secret,
        "TILES_URL": server.base_url,
        "XDG_CONFIG_HOME": str(config.parent),
    }
    ran = 0
    for block in blocks("console"):
        for command, expected in re.findall(r"^\$ (.*?)\n(.*?)(?=^\$ |\Z)", block, flags=re.MULTILINE | re.DOTALL):
            name, *rest = shlex.split(command)
            assert name == "shpool"
            whole = [sys.executable, "-m", "shpool_cli.app", *rest]
            done = subprocess.run(
                whole, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
            )
            assert matches(expected, done.stdout), f"{command}\nprinted:\n{done.stdout}\nexpected:\n{expected}"
            ran += 1
    assert ran == 11


def test_the_two_commands_stand_there() -> None:
    for command in (
        "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/shpool demo",
        "python3 -m venv .venv && .venv/bin/pip install -e '.[dev]' && .venv/bin/pytest",
    ):
        assert command in README


def test_every_link_into_the_tree_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^):]+)\)", README):
        assert (ROOT / os.path.normpath(target)).exists(), target
