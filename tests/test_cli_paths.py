"""Paths that lead nowhere: whichever option names them, they are the user's mistake, and no bug of ours."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import pytest
from cli_shell import Shell, assert_told

from shpool.journal import Journal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from shpool.testing import LoopbackServer

pytestmark = pytest.mark.slow

LONG = "x" * 300  # a name has 255 bytes at most
RUN = ["run", "jobs:same", "in.jsonl"]
DOWNLOAD = ["download", "urls.txt", "--to", "d"]

_MAY_PASS_MODES = "-dac_override,-dac_read_search"  # what lets root into any folder


@pytest.fixture
def shell(tmp_path: Path, child_env: dict[str, str]) -> Iterator[Shell]:
    """Return a shell without root's rights, with a folder that nobody may enter and links that lead in a circle."""
    shell = Shell(tmp_path, child_env)
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root may enter any folder")
        shell.wrapper = ["setpriv", f"--bounding-set={_MAY_PASS_MODES}", f"--inh-caps={_MAY_PASS_MODES}"]
    shell.write("jobs.py", "def same(number):\n    return number\n")
    shell.write("in.jsonl", "1\n2\n")
    for name in ("loop.db", "loop.jsonl", "loop.parquet", "loop.py"):
        (tmp_path / name).symlink_to(name)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0)
    yield shell
    locked.chmod(0o700)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("command", [RUN, [*RUN, "--dry-run"], DOWNLOAD], ids=["run", "dry run", "download"])
@pytest.mark.parametrize(
    ("journal", "words"),
    [
        ("locked/j.db", "it cannot be reached: Permission denied"),
        (LONG, "it cannot be reached: File name too long"),
        ("loop.db", "it cannot be reached: Too many levels of symbolic links"),
        ("jobs.py/j.db", "there is no folder"),
    ],
    ids=["locked", "long", "loop", "file"],
)
def test_a_journal_that_is_out_of_reach_is_named(
    shell: Shell, server: LoopbackServer, command: list[str], journal: str, words: str
) -> None:
    shell.write("urls.txt", f"{server.put_file('a.tif', b'tile')}\n")
    before = names_in(shell.folder)
    assert_told(shell.run(*command, "--journal", journal, *shell.log_in_at(server)), 2, words)
    assert names_in(shell.folder) == before
    assert server.token_requests == 0


def test_a_killed_journal_that_cannot_be_read_where_it_lies_can_be_copied(shell: Shell, tmp_path: Path) -> None:
    """Its reader needs a file beside it, which the run has left or it makes; ``status`` has no --journal to change."""
    folder = tmp_path / "kept"
    folder.mkdir()
    with Journal(tmp_path / "run.db", "tiles:fetch") as journal:
        journal.note(jobs=7)
        journal.flush()
        for name in ("run.db", "run.db-wal"):
            shutil.copy(tmp_path / name, folder)
    folder.chmod(0o500)
    try:
        assert_told(
            shell.run("status", "kept/run.db"), 2, "no access", "hint: copy it, with its -wal file, into a folder"
        )
    finally:
        folder.chmod(0o700)
    assert_told(shell.run("status", "kept"), 2, "it is a folder", "hint: give the file that a run was given")
    shutil.copytree(folder, tmp_path / "copy")
    assert "7 jobs" in shell.run("status", "copy/run.db").stdout


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("locked/jobs.py:f", "cannot be reached: Permission denied"),
        (f"{LONG}.py:f", "cannot be reached: File name too long"),
        ("loop.py:f", "there is no file loop.py"),
    ],
    ids=["locked", "long", "loop"],
)
def test_a_target_that_is_out_of_reach_is_named(shell: Shell, target: str, words: str) -> None:
    assert_told(shell.run("run", target, "in.jsonl"), 2, words)


@pytest.mark.parametrize("journal", [[], ["--journal", "run.db"]], ids=["alone", "journal"])
@pytest.mark.parametrize(
    "output", ["locked/out.jsonl", LONG, "loop.jsonl", "loop.parquet"], ids=["locked", "long", "loop", "parquet"]
)
def test_an_output_that_is_out_of_reach_is_named(
    shell: Shell, server: LoopbackServer, journal: list[str], output: str
) -> None:
    """Also once a journal is there, whose runs' output it could be."""
    login = shell.log_in_at(server)
    if journal:
        assert shell.run(*RUN, *journal, "-w", "1", *login).returncode == 0
    before, logins = names_in(shell.folder), server.token_requests
    assert_told(shell.run(*RUN, *journal, "--output", output, *login), 2, f"cannot write to {output}: ")
    assert names_in(shell.folder) == before
    assert server.token_requests == logins


@pytest.mark.parametrize("source", ["locked/in.jsonl", LONG, "loop.jsonl"], ids=["locked", "long", "loop"])
def test_an_input_that_is_out_of_reach_is_named(shell: Shell, source: str) -> None:
    for command in (["run", "jobs:same", source], ["download", source, "--to", "d"]):
        assert_told(shell.run(*command, "--journal", "run.db"), 2, f"{source}: cannot be read: ")
