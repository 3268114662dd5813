"""`shpool status`: what it says of a journal while its run is going, and after."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pty
import select
import signal
import sqlite3
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
from cli_shell import PATIENCE, Shell, assert_told

from shpool.jobs import Job, JobResult
from shpool.journal import Journal, JournalView
from shpool_cli.statustext import report_lines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow

TARGET = "tiles:fetch"
COMMAND = "shpool run tiles:fetch 'my tiles.jsonl' --journal run.db --token-url https://idp.example.org/token"
BEGAN = 1_790_000_000.0  # s since the epoch: 2026-09-21 13:33:20 UTC

# A run that has begun a job, then ends one for every line it reads, and ends itself at the end of its input.
RUN = """
import sys
from shpool.jobs import Job, JobResult
from shpool.journal import Journal
with Journal(sys.argv[1], "tiles:fetch", command=sys.argv[2]) as journal:
    journal.note(jobs=100, workers=1, logins=1)
    long = Job(0, "long", ("long",))
    journal.claim(long)
    journal.begin(long)
    for number, line in enumerate(sys.stdin, 1):
        job = Job(number, f"key-{number}", (number,))
        journal.claim(job)
        journal.end(JobResult(number, job.key, "done", None, None, 1, 0.5), "1")
        journal.flush()
        print(number, flush=True)
    journal.end(JobResult(0, "long", "done", None, None, 1, 0.5), "1")
    journal.note(exit_code=0)
"""


@pytest.fixture
def shell(tmp_path: Path, child_env: dict[str, str]) -> Shell:
    return Shell(tmp_path, child_env)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.db"


@contextlib.contextmanager
def live_run(shell: Shell) -> Iterator[subprocess.Popen[str]]:
    """Have a process write to the journal; it has ended one job."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", RUN, "run.db", COMMAND]
    with subprocess.Popen(command, cwd=shell.folder, env=shell.env, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            assert end_one(process) == 1
            yield process
        finally:
            process.kill()


def end_one(process: subprocess.Popen[str]) -> int:
    """Have the process end one job, and return how many it has ended since it began."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return int(process.stdout.readline())


def record(  # noqa: PLR0913 - columns
    journal: Journal,
    number: int,
    *,
    error: Exception | None = None,
    seconds: float = 0.5,
    args: tuple[Any, ...] | None = None,
    place: str = "",
) -> None:
    """Record an end."""
    job = Job(number, f"key-{number}", (number,) if args is None else args, {"size": 10})
    journal.claim(job)
    result = JobResult(number, job.key, "failed" if error else "done", None, error, 1, seconds)
    journal.end(result, None if error else "1", place=place)


def write_ended_run(path: Path) -> None:
    """Write a run with three done jobs, two errors of one kind and one of another, and a job that was cut off."""
    now = [BEGAN]
    with Journal(path, TARGET, command=COMMAND, clock=lambda: now[0]) as journal:
        journal.note(jobs=8, workers=2, logins=2, waits=4, waited=75.0)
        for number in range(3):
            record(journal, number, seconds=number)
        for number in (3, 4):
            record(journal, number, error=ValueError(f"tile {number} has no data"), place="tiles.py:12")
        record(journal, 5, error=KeyError("red"), place="tiles.py:20")
        job = Job(6, "key-6", (6,))
        journal.claim(job)
        journal.begin(job)
        now[0] += 60.0
        journal.flush()
        journal.note(exit_code=130, reason="interrupted")


def told(text: str) -> dict[str, str]:
    """Return the facts at the top of a report."""
    pairs = (line.split(":", 1) for line in text.split("\n\n", maxsplit=1)[0].splitlines())
    return {name: value.strip() for name, value in pairs}


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# After the run


def test_the_report_of_an_ended_run(shell: Shell, path: Path) -> None:
    write_ended_run(path)
    done = shell.run("status", "run.db", "--slowest", "2")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "target:   tiles:fetch\n"
        "state:    ended after 1 min 0 s with exit code 130: interrupted\n"
        f"resume:   {COMMAND}\n"
        "jobs:     3 done, 3 failed, 0 running, 1 cut off, 1 not begun\n"
        "input:    8 jobs in the last run, about 2 of them left\n"
        "rate:     6.0 jobs/min in the last run\n"
        "times:    2026-09-21 14:13:20 to 2026-09-21 14:13:20 UTC\n"
        "logins:   2 in 1 run\n"
        "waits:    4 for the account's limits, 1 min 15 s in all\n"
        "\n"
        "slowest jobs:\n"
        "      2.00 s  key-2  2, size=10\n"
        "      1.00 s  key-1  1, size=10\n"
        "\n"
        "errors:\n"
        "      2 x ValueError: tile # has no data\n"
        "          e.g. tile 3 has no data\n"
        "          at tiles.py:12, job key-3\n"
        "          called with 3, size=10\n"
        "      1 x KeyError: 'red'\n"
        "          at tiles.py:20, job key-5\n"
        "          called with 5, size=10\n"
    )


def test_the_object_of_an_ended_run(shell: Shell, path: Path) -> None:
    write_ended_run(path)
    done = shell.run("status", "run.db", "--json", "--slowest", "1")
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    errors = told.pop("errors")
    (run,) = told.pop("runs")
    assert told == {
        "journal": str(path),
        "target": TARGET,
        "state": "ended",
        "pid": None,
        "command": COMMAND,
        "exit_code": 130,
        "reason": "interrupted",
        "workers": 2,
        "jobs": 8,
        "done": 3,
        "failed": 3,
        "running": 0,
        "cut_off": 1,
        "not_begun": 1,
        "left": 2,
        "rate": 0.1,
        "seconds_left": None,
        "first": BEGAN,
        "last": BEGAN,
        "logins": 2,
        "waits": 4,
        "waited": 75.0,
        "slowest": [{"key": "key-2", "args": [2], "kwargs": {"size": 10}, "seconds": 2.0}],
    }
    assert (run["id"], run["begun"], run["ended"], run["logins"]) == (1, BEGAN, BEGAN + 60, 2)
    assert [(kind["type"], kind["text"], kind["count"]) for kind in errors] == [
        ("ValueError", "tile # has no data", 2),
        ("KeyError", "'red'", 1),
    ]
    example = errors[0]["example"]
    assert "ValueError: tile 3 has no data" in example.pop("traceback")
    assert example == {
        "key": "key-3",
        "args": [3],
        "kwargs": {"size": 10},
        "type": "ValueError",
        "text": "tile 3 has no data",
        "place": "tiles.py:12",
    }


def test_the_help_names_every_key_of_the_object(shell: Shell, path: Path) -> None:
    write_ended_run(path)
    words = set(shell.run("status", "--help").stdout.replace(",", " ").replace(";", " ").split())
    assert set(json.loads(shell.run("status", "run.db", "--json").stdout)) - words == set()


def test_what_has_nothing_left_names_its_command_and_no_resuming(shell: Shell, path: Path) -> None:
    with Journal(path, TARGET, command=COMMAND) as journal:
        journal.note(jobs=1, exit_code=0)
        record(journal, 0)
    facts = told(shell.run("status", "run.db").stdout)
    assert facts["command"] == COMMAND
    assert "resume" not in facts
    assert facts["state"].endswith("with exit code 0")


def test_a_journal_in_which_nothing_has_begun(shell: Shell, path: Path) -> None:
    with Journal(path, TARGET):
        pass
    done = shell.run("status", "run.db")
    assert (done.returncode, done.stderr) == (0, "")
    assert told(done.stdout)["jobs"] == "0 done, 0 failed, 0 running, 0 cut off"
    assert json.loads(shell.run("status", "run.db", "--json").stdout)["first"] is None


def test_lines_fit_80_columns_but_for_the_command(shell: Shell, path: Path) -> None:
    with Journal(path, TARGET, command=COMMAND) as journal:
        for number in range(4):
            arg = f"https://example.org/{'tiles/' * 40}{number}"
            record(journal, number, error=OSError(f"no answer from {arg}"), args=(arg,), place="very/" * 30)
    lines = shell.run("status", "run.db").stdout.splitlines()
    assert [line for line in lines if len(line) > 80] == [f"resume:   {COMMAND}"]
    assert any(line.endswith("...") for line in lines)


def test_what_a_server_said_cannot_steer_the_terminal(shell: Shell, path: Path) -> None:
    with Journal(path, TARGET, command="\x1b[2J") as journal:
        record(journal, 0, error=ValueError("\x1b[2Jgone\nerror: faked"), args=("\x1b]0;title\x07",), place="\x1b[1m")
    done = shell.run("status", "run.db")
    assert "\x1b" not in done.stdout
    assert "\x07" not in done.stdout
    assert "\\x1b[2Jgone error: faked" in done.stdout


def test_characters_that_the_terminal_lacks_are_shown_by_number(shell: Shell, path: Path) -> None:
    with Journal(path, TARGET) as journal:
        record(journal, 0, error=ValueError("Höhe → 3"))
    shell.env["PYTHONIOENCODING"] = "latin-1:strict"
    command = shell.command("status", "run.db")
    done = subprocess.run(command, cwd=shell.folder, env=shell.env, capture_output=True, timeout=PATIENCE, check=True)
    assert "Höhe \\u2192 3".encode("latin-1") in done.stdout


def test_arguments_that_json_lacks_keep_the_object_readable(shell: Shell, path: Path) -> None:
    with Journal(path, TARGET) as journal:
        record(journal, 0, args=(float("nan"), float("-inf")))
    (job,) = json.loads(shell.run("status", "run.db", "--json").stdout, parse_constant=pytest.fail)["slowest"]
    assert job["args"] == ["NaN", "-Infinity"]


def test_more_kinds_of_errors_than_a_screen_holds_are_counted(shell: Shell, path: Path) -> None:
    with Journal(path, TARGET) as journal:
        for number in range(13):
            record(journal, number, error=ValueError("abcdefghijklm"[number] * 3))
    assert shell.run("status", "run.db").stdout.endswith("      3 x 3 other kinds, which --json names\n")


def test_the_time_left_is_that_of_the_jobs_left_at_the_rate_so_far(path: Path) -> None:
    write_ended_run(path)
    ended = JournalView(path).summary()
    run = dataclasses.replace(ended.runs[0], ended=None, jobs=3606)
    summary = dataclasses.replace(ended, live_pid=4711, runs=(run,))
    facts = told("\n".join(report_lines(summary, BEGAN + 65)))
    assert facts["state"] == "running, process 4711, for 1 min 5 s"
    assert facts["rate"] == "6.0 jobs/min in the last run, about 10 h 0 min left"


# While it is going


def test_a_live_run_is_seen_and_not_held_up(shell: Shell, path: Path) -> None:
    with live_run(shell) as run:
        facts = told(shell.run("status", "run.db").stdout)
        assert facts["state"].startswith(f"running, process {run.pid}, for ")
        assert facts["jobs"] == "1 done, 0 failed, 1 running, 0 cut off, 98 not begun"
        assert facts["input"] == "100 jobs in the last run, about 99 of them left"
        assert facts["rate"].endswith(" left")
        assert end_one(run) == 2
        now = json.loads(shell.run("status", "run.db", "--json").stdout)
        assert (now["state"], now["pid"], now["done"], now["running"]) == ("running", run.pid, 2, 1)
        assert now["seconds_left"] > 0
        run.communicate()
    assert run.returncode == 0
    assert told(shell.run("status", "run.db").stdout)["state"].startswith("ended after ")
    assert {file.name for file in path.parent.iterdir()} == {"bin", "run.db"}


def test_a_killed_run_was_cut_off_and_tells_how_to_resume(shell: Shell) -> None:
    with live_run(shell) as run:
        run.kill()
        run.wait()
        facts = told(shell.run("status", "run.db").stdout)
    assert facts["state"].startswith("cut off: the run was killed, its last sign is of ")
    assert facts["resume"] == COMMAND
    assert facts["jobs"] == "1 done, 0 failed, 0 running, 1 cut off, 98 not begun"


@pytest.mark.parametrize(
    ("options", "is_begun", "resumed"),
    [
        ("--journal run.db --fresh", False, "--journal run.db"),
        ("--only-failed --journal run.db", False, "--journal run.db"),
        ("--only-failed --journal run.db", True, "--only-failed --journal run.db"),
        ("--fresh --journal run.db -- --fresh", True, "--journal run.db -- --fresh"),
        ("--journal '--fresh it.db'", True, "--journal '--fresh it.db'"),
        ("--journal it's.db --fresh", True, "--journal it's.db --fresh"),  # no shell would take that
    ],
)
def test_the_command_that_resumes_neither_forgets_what_is_done_nor_leaves_out_what_is_left(
    path: Path, options: str, resumed: str, *, is_begun: bool
) -> None:
    command = "shpool run tiles:fetch 'my tiles.jsonl'"
    with Journal(path, TARGET, command=f"{command} {options}") as journal:
        journal.note(jobs=2 if is_begun else 3, exit_code=143)
        record(journal, 0)
        record(journal, 1, error=ValueError("no data"))
    view = JournalView(path)
    assert told("\n".join(report_lines(view.summary(), BEGAN)))["resume"] == f"{command} {resumed}"
    assert view.summary().runs[-1].command == f"{command} {options}"


def test_a_watch_in_a_pipe_repeats_plain_reports_until_the_run_has_ended(shell: Shell) -> None:
    with live_run(shell) as run, shell.start("status", "--watch", "0.1", "run.db") as watch:
        assert watch.stdout is not None
        assert watch.stdout.readline() == "target:   tiles:fetch\n"
        eventually(lambda: "target:" in watch.stdout.readline())  # type: ignore[union-attr]  # seen to be one above
        run.communicate()
        stdout, stderr = watch.communicate(timeout=PATIENCE)
    assert (watch.returncode, stderr) == (0, "")
    assert "\x1b" not in stdout
    assert told("target:" + stdout.rpartition("target:")[2])["state"].startswith("ended after ")


def test_a_watch_as_json_is_one_object_a_line(shell: Shell) -> None:
    with live_run(shell) as run, shell.start("status", "run.db", "--json", "--watch=0.1") as watch:
        assert watch.stdout is not None
        assert json.loads(watch.stdout.readline())["state"] == "running"
        run.communicate()
        stdout, _ = watch.communicate(timeout=PATIENCE)
    assert json.loads(stdout.splitlines()[-1])["state"] == "ended"


@pytest.mark.parametrize("options", [["--watch"], ["--watch", "5"], ["--watch", "5", "--json"]])
def test_a_watch_of_an_ended_run_reports_once(shell: Shell, path: Path, options: list[str]) -> None:
    write_ended_run(path)
    once = shell.run("status", "run.db", *options[2:])
    for args in (["run.db", *options], [*options, "run.db"]):
        done = shell.run("status", *args)
        assert (done.returncode, done.stdout, done.stderr) == (0, once.stdout, "")


def test_an_interrupted_watch_exits_130_without_a_traceback(shell: Shell) -> None:
    with live_run(shell), shell.start("status", "run.db", "--watch") as watch:
        assert watch.stdout is not None
        watch.stdout.readline()
        watch.send_signal(signal.SIGINT)
        _, stderr = watch.communicate(timeout=PATIENCE)
    assert (watch.returncode, stderr) == (130, "interrupted\n")


def test_a_watch_whose_reader_has_gone_ends(shell: Shell) -> None:
    """As in ``shpool status run.db --watch | head -1``, which shells end only when both have."""
    with live_run(shell), shell.start("status", "run.db", "--watch", "60") as watch:
        assert watch.stdout is not None
        assert watch.stderr is not None
        watch.stdout.readline()
        watch.stdout.close()
        assert watch.wait(PATIENCE / 2) == 0
        assert watch.stderr.read() == ""


def test_a_watch_on_a_terminal_redraws_what_fits_and_ends_with_all(shell: Shell) -> None:
    shell.env |= {"TERM": "xterm", "COLUMNS": "80", "LINES": "4"}
    ours, theirs = pty.openpty()
    command = shell.command("status", "run.db", "--watch", "0.1")
    with (
        live_run(shell) as run,
        subprocess.Popen(command, cwd=shell.folder, env=shell.env, stdin=theirs, stdout=theirs) as watch,
    ):
        os.close(theirs)
        try:
            said = read_until(ours, b"\x1b[J\x1b[H")  # the end of one report, and the beginning of the next
            run.communicate()
            last = said[-1:] + read_until(ours, None)
        finally:
            watch.kill()
            os.close(ours)
    assert said.startswith(b"\x1b[2J\x1b[Htarget:   tiles:fetch\x1b[K\r\n")
    first = said.partition(b"\x1b[J\x1b[H")[0]
    assert (first.count(b"\n"), b"running, process" in first, b"slowest" in first) == (2, True, False)
    assert b"ended after" in last
    assert last.endswith(b"\x1b[J")
    assert b"slowest jobs" in last
    assert watch.returncode == 0


def read_until(descriptor: int, end: bytes | None) -> bytes:
    """Read from a terminal until something is said, or to its end."""
    said = b""
    while end is None or end not in said:
        assert select.select([descriptor], [], [], PATIENCE)[0], said
        try:
            said += os.read(descriptor, 4096)
        except OSError:  # the other end is closed
            break
    return said


# What it refuses


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere.db", "there is no such file"),
        ("notes.txt/run.db", "there is no such file"),
        ("notes.txt", "is no journal of shpool: it is no SQLite database"),
        ("empty.db", "is no journal of shpool: it is empty"),
        (".", "it is a folder"),
        ("/dev/null", "it is no regular file"),
        ("x" * 300, "File name too long"),
    ],
    ids=lambda text: text[:20],
)
def test_what_is_no_journal_is_named_and_left_alone(shell: Shell, name: str, words: str) -> None:
    shell.write("notes.txt", "x" * 5000)
    shell.write("empty.db", "")
    assert_told(shell.run("status", name, "--watch"), 2, words)
    assert {file.name: file.stat().st_size for file in shell.folder.iterdir() if file.is_file()} == {
        "notes.txt": 5000,
        "empty.db": 0,
    }


def test_a_journal_of_another_format_is_refused_without_advice_to_forget_it(shell: Shell, path: Path) -> None:
    write_ended_run(path)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")
    done = shell.run("status", "run.db")
    assert_told(done, 2, "format version 99")
    assert "--fresh" not in done.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "JOURNAL"),
        (["run.db", "--watch", "0"], "'0' is not a number of seconds from 0.1 to 86400"),
        (["run.db", "--watch", "nan"], "'nan' is not a number of seconds"),
        (["run.db", "--watch=often"], "'often' is not a number of seconds"),
        (["run.db", "--slowest", "few"], "'few' is not a whole number of at least 0"),
        (["run.db", "more.db"], "more.db"),
    ],
)
def test_bad_usage_is_one_error_and_a_hint(shell: Shell, path: Path, args: list[str], words: str) -> None:
    write_ended_run(path)
    assert_told(shell.run("status", *args), 2, words)
