"""A command runs alone, says a bounded amount, and leaves nothing behind, however it or its worker ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from shpool.shell.capture import Capture
from shpool.shell.command import run_command

if TYPE_CHECKING:
    from collections.abc import Callable

    from shpool.shell.command import Ended

PATIENCE = 30.0  # s
TOKEN = "invented-token-0815"
# Says its own id and those of two children: one in the background, one that leads a group of its own.
TREE = "echo $$ >{pids}; sleep 1000 & echo $! >>{pids}; timeout 1000 sleep 1000 & echo $! >>{pids}; "
# A process that runs a command, and lives on when interrupted.
RUNS = """
import os, signal, sys, time
from shpool.shell.command import run_command
signal.signal(signal.SIGINT, signal.default_int_handler)
print("begins", flush=True)
try:
    run_command(sys.argv[1], dict(os.environ), timeout=None, limit=9, secret="")
except KeyboardInterrupt:
    print("interrupted", flush=True)
    time.sleep(1000)
"""


def run(command: str, *, timeout: float | None = None, limit: int = 10_000, grace: float = PATIENCE) -> Ended:
    env = dict(os.environ, TOKEN=TOKEN)
    return run_command(command, env, timeout=timeout, limit=limit, secret=TOKEN, grace=grace)


def until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def pids_in(path: Path, count: int = 3) -> list[int]:
    until(lambda: path.exists() and path.read_text().count("\n") == count)
    return [int(line) for line in path.read_text().split()]


def assert_gone(pids: list[int]) -> None:
    until(lambda: not any(is_running(pid) for pid in pids))


def test_both_outputs_and_the_status_are_kept() -> None:
    ended = run("echo out; echo err >&2; exit 3")
    assert (ended.status, ended.stdout.text(), ended.stderr.text(), ended.is_late) == (3, "out\n", "err\n", False)


def test_a_signal_is_a_negative_status() -> None:
    assert run("kill -SEGV $$").status == -signal.SIGSEGV


def test_there_is_nothing_on_stdin_and_no_terminal() -> None:
    assert run("cat; readlink /proc/self/fd/0; (: </dev/tty) || echo none").stdout.text() == "/dev/null\nnone\n"


def test_a_command_has_no_descriptors_but_the_usual_three() -> None:
    assert run("exec ls /proc/self/fd").stdout.text().split() == ["0", "1", "2", "3"]  # 3 is the listed folder


def test_a_command_leads_a_session_and_a_group_of_its_own() -> None:
    pid, group, session = run("cut -d' ' -f1,5,6 /proc/$$/stat").stdout.text().split()
    assert pid == group == session
    assert int(session) != os.getsid(0)


def test_what_a_command_leaves_in_the_background_is_killed_and_not_waited_for(tmp_path: Path) -> None:
    assert run(TREE.format(pids=tmp_path / "pids") + "echo done").stdout.text() == "done\n"
    assert_gone(pids_in(tmp_path / "pids"))


def test_a_command_that_kills_its_own_group_is_over() -> None:
    assert run("trap 'kill 0' EXIT; sleep 1000 & echo said").stdout.text() == "said\n"


@pytest.mark.slow
def test_a_late_command_is_asked_to_end_and_what_it_says_then_is_kept(tmp_path: Path) -> None:
    trapped = "trap 'echo asked; exit 1' TERM; echo begun; "
    ended = run(trapped + TREE.format(pids=tmp_path / "pids") + "wait", timeout=0.5)
    assert ended.is_late
    assert ended.stdout.text() == "begun\nasked\n"
    assert_gone(pids_in(tmp_path / "pids"))


@pytest.mark.slow
def test_a_late_command_that_does_not_heed_is_killed(tmp_path: Path) -> None:
    ended = run("trap '' TERM; " + TREE.format(pids=tmp_path / "pids") + "sleep 1000", timeout=0.5, grace=0.2)
    assert (ended.is_late, ended.status) == (True, -signal.SIGKILL)
    assert_gone(pids_in(tmp_path / "pids"))


@pytest.mark.slow
def test_a_command_dies_with_the_process_that_was_killed_beside_it(tmp_path: Path, child_env: dict[str, str]) -> None:
    """SIGKILL, which is how a pool stops tasks, leaves no time to clean up."""
    command = TREE.format(pids=tmp_path / "pids") + "sleep 1000"
    with subprocess.Popen([sys.executable, "-c", RUNS, command], env=child_env) as worker:
        pids = pids_in(tmp_path / "pids")
        assert all(is_running(pid) for pid in pids)
        worker.kill()
    assert_gone(pids)


@pytest.mark.slow
def test_a_process_killed_at_any_moment_leaves_no_command(child_env: dict[str, str]) -> None:
    marker = f"{os.getpid()}.5150"  # s to sleep, a number no other process has on its command line
    line = [sys.executable, "-c", RUNS, f"sleep {marker} & sleep {marker}"]
    for step in range(12):
        with subprocess.Popen(line, env=child_env, stdout=subprocess.PIPE) as worker:
            assert worker.stdout is not None
            worker.stdout.readline()
            time.sleep(step * 0.0007)  # from before the shell has started to after both sleeps have
            worker.kill()
    until(lambda: not _sleepers(marker))


def _sleepers(marker: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(marker in word for word in process.cmdline()):
                found.append(process)
    return found


@pytest.mark.slow
def test_an_interrupted_caller_leaves_no_command(tmp_path: Path, child_env: dict[str, str]) -> None:
    line = [sys.executable, "-c", RUNS, TREE.format(pids=tmp_path / "pids") + "sleep 1000"]
    with subprocess.Popen(line, env=child_env, stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout is not None
        assert caller.stdout.readline() == "begins\n"
        pids = pids_in(tmp_path / "pids")
        caller.send_signal(signal.SIGINT)
        assert caller.stdout.readline() == "interrupted\n"
        assert_gone(pids)
        caller.kill()


def test_head_and_tail_of_a_long_output_are_kept() -> None:
    stdout = run("printf begin; yes | head -c 300000; printf end", limit=100).stdout
    assert stdout.dropped == 300_008 - 100
    assert stdout.text().startswith("beginy\n")
    assert f"\n[{300_008 - 100} bytes dropped]\n" in stdout.text()
    assert stdout.text().endswith("y\nend")
    assert len(stdout._tail) <= 64 * 1024 + 100


def test_bytes_that_are_no_text_are_shown_as_such() -> None:
    assert run(r"printf 'a\377b'").stdout.text() == "a�b"


def test_the_token_is_masked_in_what_a_command_says() -> None:
    ended = run("set -x; echo $TOKEN.$TOKEN")
    assert ended.stdout.text() == "***.***\n"
    assert TOKEN not in ended.stderr.text()


@pytest.mark.parametrize("size", [1, 2, 5, 18, 19, 20, 1000])
def test_a_secret_is_masked_wherever_a_chunk_ends(size: int) -> None:
    text = f"a{TOKEN}b{TOKEN}{TOKEN[:-1]}".encode()
    capture = Capture(1000, TOKEN.encode())
    for start in range(0, len(text), size):
        capture.add(text[start : start + size])
    capture.finish()
    assert capture.text() == f"a***b***{TOKEN[:-1]}"


@pytest.mark.parametrize("limit", [0, 1, 2, 7, 100])
def test_no_more_than_the_limit_is_kept(limit: int) -> None:
    capture = Capture(limit, b"")
    for _ in range(20):
        capture.add(b"0123456789")
    kept = capture.text().replace(f"\n[{capture.dropped} bytes dropped]\n", "")
    assert len(kept) == limit // 2 * 2 == 200 - capture.dropped


def test_a_timeout_of_years_is_one() -> None:
    ended = run("true", timeout=1e9)
    assert (ended.status, ended.is_late) == (0, False)
