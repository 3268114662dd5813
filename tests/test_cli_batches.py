"""`shpool run` as a batch that is resumed, halted, limited, ordered, or made of shell commands."""

from __future__ import annotations

import csv
import functools
import json
import os
import random
import re
import signal
import subprocess
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from cli_shell import PATIENCE, Shell, assert_told, records
from patience import until
from pyarrow import parquet

from shpool.journal import JournalView

if TYPE_CHECKING:
    from collections.abc import Iterable

    from shpool.testing import LoopbackServer

pytestmark = pytest.mark.slow

JOBS = """
import os
import pathlib
import time

def begin(name):
    with open("begun", "a") as file:
        file.write(f"{name}\\n")

def ten(number):
    begin(number)
    return number * 10

def odd(number):
    begin(number)
    if number % 2 and not pathlib.Path("mended").exists():
        raise ValueError(f"bad tile {number}")
    return number * 10

def never(number):
    begin(number)
    raise ValueError(f"bad tile {number}")

def hold(number):
    begin(number)
    while not (pathlib.Path("go").exists() or pathlib.Path(f"go-{number}").exists()):
        time.sleep(0.1)
    return number * 10

def hold_1_fail_2(number):
    begin(number)
    if number == 2:
        raise ValueError("bad tile 2")
    while number == 1 and not pathlib.Path("go").exists():
        time.sleep(0.1)
    return number * 10

def first_waits(text):
    begin(text)
    while int(text) == 0 and not pathlib.Path("go").exists():
        time.sleep(0.05)
    return len(text)

def last_first(number):
    begin(number)
    while number == 0 and "7" not in pathlib.Path("begun").read_text():
        time.sleep(0.02)
    return number * 10

def brief(number):
    begin(number)
    time.sleep(0.05)
    return number * 10

class Listless:
    def tolist(self):
        raise RuntimeError("no list")

class Mute(ConnectionError):
    retry_after = 0.0
    def __str__(self):
        raise RuntimeError("no text")

def strange(number):
    begin(number)
    if number == 3:
        raise Mute
    return Listless() if number == 1 else number * 10

def named(id, number=0):
    begin(f"{id}/{number}")
    return number
"""


class Runs:
    """One command line, run again and again."""

    def __init__(self, shell: Shell, server: LoopbackServer) -> None:
        self.shell = shell
        self.server = server
        self.folder = shell.folder
        self.login = shell.log_in_at(server)
        shell.write("jobs.py", JOBS)
        self.out = self.folder / "out.jsonl"
        self.journal = self.folder / "run.db"
        self.resumable = ["--journal", "run.db", "--output", "out.jsonl"]

    def give(self, lines: Iterable[Any], name: str = "in.jsonl") -> None:
        self.shell.write(name, "".join(f"{json.dumps(line)}\n" for line in lines))

    def arguments(self, words: tuple[str, ...]) -> list[str]:
        workers = [] if "-w" in words else ["-w", "1"]
        return ["run", *workers, *self.login, *words]  # of an option that stands twice, the last counts

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.shell.run(*self.arguments(words))

    def resume(self, function: str, *words: str) -> subprocess.CompletedProcess[str]:
        return self.run(f"jobs:{function}", "in.jsonl", *self.resumable, *words)

    def start(self, *words: str) -> Any:
        return self.shell.start(*self.arguments(words))

    def give_time(self, seconds: float) -> None:
        """Let running jobs end for so long after a signal, that tests need no luck."""
        script = self.folder / "bin" / "shpool"
        setting = f"import shpool_cli.stopping\nshpool_cli.stopping._MOMENT = {seconds}\n"
        script.write_text(script.read_text().replace("if __name__", f"{setting}if __name__"))

    def touch(self, name: str) -> None:
        (self.folder / name).touch()

    @property
    def begun(self) -> list[str]:
        path = self.folder / "begun"
        return path.read_text().split() if path.exists() else []

    @property
    def results(self) -> dict[int, Any]:
        found = records(self.out.read_text())
        assert len({record["index"] for record in found}) == len(found), "each line once"
        return {record["index"]: record.get("result", record["status"]) for record in found}

    @property
    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.folder.iterdir() if path.is_file()}

    @property
    def made(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()} & {"begun", "out.jsonl", "run.db", "run.db.lock"}


@pytest.fixture
def runs(tmp_path: Path, child_env: dict[str, str], server: LoopbackServer) -> Runs:
    return Runs(Shell(tmp_path, child_env), server)


def first_line(done: subprocess.CompletedProcess[str]) -> str:
    return done.stderr.splitlines()[0]


def hints(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("hint: ")]


def end(process: subprocess.Popen[str]) -> tuple[str, str]:
    stdout, stderr = process.communicate(timeout=PATIENCE)
    return stdout, stderr


# The journal


def test_all_that_is_done_is_not_run_again_and_needs_no_login(runs: Runs) -> None:
    runs.give(range(5))
    first = runs.resume("ten")
    before = runs.out.read_text()
    again = runs.resume("ten")
    assert (first.returncode, again.returncode) == (0, 0), again.stderr
    assert sorted(runs.begun) == ["0", "1", "2", "3", "4"]
    assert first_line(again).startswith("5 jobs, 0 failed, 5 done before, 0 logins, ")
    assert runs.server.logins == 1
    assert records(runs.out.read_text()) == records(before)
    assert hints(again.stderr) == []


def test_nothing_left_needs_no_credentials(runs: Runs) -> None:
    runs.give(range(2))
    runs.resume("ten")
    runs.login = []
    for name in ("SH_CLIENT_ID", "SH_CLIENT_SECRET"):
        del runs.shell.env[name]
    assert runs.resume("ten").returncode == 0


def test_what_failed_is_run_again(runs: Runs) -> None:
    runs.give(range(4))
    first = runs.resume("odd")
    assert first.returncode == 1
    assert runs.results == {0: 0, 1: "failed", 2: 20, 3: "failed"}
    runs.touch("mended")
    again = runs.resume("odd")
    assert again.returncode == 0, again.stderr
    assert runs.results == {0: 0, 1: 10, 2: 20, 3: 30}
    assert Counter(runs.begun) == {"0": 1, "1": 2, "2": 1, "3": 2}
    assert first_line(again).startswith("4 jobs, 0 failed, 2 done before, 1 login, ")


def test_an_odd_result_and_an_odd_error_fail_their_own_jobs_alone(runs: Runs) -> None:
    """What the user's classes do while their results and errors are written costs no other job."""
    runs.give(range(6))
    for before in ("", "4 done before, "):
        ended = runs.resume("strange", "--retries", "1")
        assert ended.returncode == 1, ended.stderr
        assert f"6 jobs, 2 failed, {before}1 login" in ended.stderr
        assert runs.results == {0: 0, 1: "failed", 2: 20, 3: "failed", 4: 40, 5: 50}
        assert "RuntimeError: no list" in ended.stderr
        assert "Mute" in ended.stderr


def test_standard_output_gets_what_was_done_before_too(runs: Runs) -> None:
    runs.give(range(4))
    words = ("jobs:odd", "in.jsonl", "--journal", "run.db")
    runs.run(*words)
    runs.touch("mended")
    assert [record["result"] for record in records(runs.run(*words).stdout)] == [0, 10, 20, 30]


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1"])
def test_a_name_of_standard_output_is_standard_output(runs: Runs, name: str) -> None:
    runs.give(range(2))
    done = runs.run("jobs:ten", "in.jsonl", "--output", name)
    assert [record["result"] for record in records(done.stdout)] == [0, 10], done.stderr
    assert '"index"' not in done.stderr


def test_a_dash_is_standard_output(runs: Runs) -> None:
    """As for INPUT; the summary of --json is on stderr then, as without --output."""
    runs.give(range(3))
    names = set(runs.files)
    done = runs.run("jobs:ten", "in.jsonl", "--output", "-", "--json")
    assert [record["result"] for record in records(done.stdout)] == [0, 10, 20]
    assert json.loads(done.stderr.splitlines()[-1])["done"] == 3
    assert set(runs.files) - names == {"begun"}
    assert runs.run("jobs:ten", "in.jsonl", "-o", "./-").stdout == ""
    assert len(records((runs.folder / "-").read_text())) == 3


def test_a_killed_run_is_finished_by_the_same_command(runs: Runs) -> None:
    """The whole process group gets SIGKILL; what was written to the output is not run again."""
    runs.give(range(60))
    words = ("jobs:brief", "in.jsonl", *runs.resumable, "-w", "2")
    command = runs.shell.command(*runs.arguments(words))
    with subprocess.Popen(
        command, cwd=runs.folder, env=runs.shell.env, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        until(lambda: runs.out.exists() and runs.out.read_bytes().count(b"\n") >= 5, PATIENCE)
        os.killpg(process.pid, signal.SIGKILL)
    kept = runs.results
    assert 5 <= len(kept) < 60
    done = runs.run(*words)
    assert done.returncode == 0, done.stderr
    assert runs.results == {number: number * 10 for number in range(60)}
    begun = Counter(runs.begun)
    assert all(begun[str(number)] == 1 for number in kept)
    assert sum(begun.values()) - 60 <= 6, "only what ran at that moment, or had ended just before, runs twice"
    assert (JournalView(runs.journal).summary().done, JournalView(runs.journal).summary().cut_off) == (60, 0)


def test_only_failed_leaves_out_the_new_and_the_cut_off(runs: Runs) -> None:
    runs.give(range(4))
    runs.resume("odd")
    runs.give(range(6))
    runs.touch("mended")
    done = runs.resume("odd", "--only-failed")
    assert done.returncode == 0, done.stderr
    assert runs.results == {0: 0, 1: 10, 2: 20, 3: 30}
    assert first_line(done).startswith("6 jobs, 0 failed, 2 done before, 2 skipped, 1 login, ")


@pytest.mark.parametrize("is_new", [True, False])
def test_only_failed_without_failures_needs_no_login(runs: Runs, *, is_new: bool) -> None:
    runs.give(range(2))
    if not is_new:
        runs.resume("ten")
        runs.give(range(3))
    logins = runs.server.logins
    done = runs.resume("ten", "--only-failed")
    assert done.returncode == 0, done.stderr
    assert "2 skipped" in done.stderr if is_new else "2 done before, 1 skipped" in done.stderr
    assert runs.server.logins == logins


def test_fresh_runs_everything_again(runs: Runs) -> None:
    runs.give(range(3))
    runs.resume("ten")
    runs.out.unlink()
    done = runs.resume("ten", "--fresh")
    assert first_line(done).startswith("3 jobs, 0 failed, 1 login, ")
    assert Counter(runs.begun) == {"0": 2, "1": 2, "2": 2}
    assert len(JournalView(runs.journal).summary().runs) == 1


def test_equal_lines_run_once_and_are_reported_each(runs: Runs) -> None:
    runs.give([1, 2, 1, 3, 2, 1])
    done = runs.resume("odd")
    assert first_line(done).startswith("6 jobs, 4 failed, 1 login, ")
    assert Counter(runs.begun) == {"1": 1, "2": 1, "3": 1}
    assert runs.results == {0: "failed", 1: 20, 2: "failed", 3: "failed", 4: 20, 5: "failed"}
    runs.touch("mended")
    done = runs.resume("odd")
    assert first_line(done).startswith("6 jobs, 0 failed, 2 done before, 1 login, ")
    assert runs.results == {0: 10, 1: 20, 2: 10, 3: 30, 4: 20, 5: 10}


def test_without_a_journal_equal_lines_run_each(runs: Runs) -> None:
    runs.give([1, 1])
    runs.run("jobs:ten", "in.jsonl")
    assert runs.begun == ["1", "1"]


def test_jobs_are_known_by_content_when_the_input_changes(runs: Runs) -> None:
    runs.give(range(8))
    runs.resume("ten")
    changed = [100, *reversed(range(2, 8)), 101]
    runs.give(changed)
    done = runs.resume("ten")
    assert first_line(done).startswith("8 jobs, 0 failed, 6 done before, ")
    assert runs.results == {index: number * 10 for index, number in enumerate(changed)}
    assert sorted(runs.begun[8:]) == ["100", "101"]


@pytest.mark.parametrize("more", ["8\n9\n", '{"half'])
def test_lines_appended_during_a_run_are_for_the_next_one(runs: Runs, more: str) -> None:
    runs.give(range(8))
    with runs.start("jobs:hold", "in.jsonl", *runs.resumable) as process:
        until(lambda: runs.begun, PATIENCE)
        with (runs.folder / "in.jsonl").open("a") as file:
            file.write(more)
        runs.touch("go")
        _, stderr = end(process)
    assert process.returncode == 0, stderr
    assert stderr.startswith("8 jobs, 0 failed, ")
    assert runs.results == {number: number * 10 for number in range(8)}
    if more.endswith("\n"):
        assert first_line(runs.resume("hold")).startswith("10 jobs, 0 failed, 8 done before, ")


@pytest.mark.parametrize("is_emptied", [True, False], ids=["emptied", "with its end written over its beginning"])
def test_an_input_that_is_changed_during_a_run_ends_it_and_no_job_is_made_of_half_a_line(
    runs: Runs, *, is_emptied: bool
) -> None:
    """Else the run would say that all is well, and `rm {0}` would meet the beginning of a name."""
    lines = [f"{number:015}" for number in range(20_000)]
    path = runs.shell.write("in.txt", "".join(f"{line}\n" for line in lines))
    command = ["jobs:first_waits", "in.txt", *runs.resumable]
    with runs.start(*command, "-w", "2") as process:
        until(lambda: len(runs.begun) > 1, PATIENCE)
        with path.open("r+") as file:
            if is_emptied:
                file.truncate()
            else:
                file.write("".join(f"{line}\n" for line in lines[-9_000:]))
        runs.touch("go")
        _, stderr = end(process)
    assert process.returncode == 2, stderr
    assert "error: in.txt: it was changed during the run\n" in stderr
    assert " of 20000 jobs, 0 failed, " in stderr
    assert hints(stderr)[-1].startswith("hint: the same command goes on where this one ended; shpool status ")
    assert set(runs.begun) <= set(lines)
    assert len(runs.results) == len(runs.begun) < 20_000, "what ran has ended"
    run = JournalView(runs.journal).summary().runs[-1]
    assert run.exit_code == 2
    assert "it was changed during the run" in str(run.reason)


def test_a_key_names_jobs_whose_other_fields_may_change(runs: Runs) -> None:
    runs.give([{"id": "a", "number": 1}, {"id": "b", "number": 2}])
    runs.resume("named", "--key", "id")
    runs.give([{"id": "b", "number": 3}, {"id": "c", "number": 4}])
    done = runs.resume("named", "--key", "id")
    assert done.returncode == 0, done.stderr
    assert sorted(runs.begun) == ["a/1", "b/2", "c/4"]
    assert [record["key"] for record in records(runs.out.read_text())] == ["b", "c"]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([{"id": "a"}, {"number": 1, "id": ""}], ("in.jsonl, line 2", "the field 'id' names no job")),
        ([{"id": "a"}, {"id": None}], ("in.jsonl, line 2", "it is null")),
        ([{"id": ["a"]}], ("in.jsonl, line 1", '["a"]')),
        ([{"id": "a"}, {"number": 1}], ("in.jsonl, line 2", "missing a required argument: 'id'")),
        ([["a", 1]], ("in.jsonl, line 1", "there is no field 'id' for --key")),
        (
            [{"id": 0}, {"id": 1, "number": 1}, {"id": 1, "number": 2}],
            ("in.jsonl, line 3: its 'id' and that of line 2 name one job, 1, but the lines differ",),
        ),
        (
            [{"id": 1, "number": 1}, {"id": "1", "number": 1}],
            ("in.jsonl, line 2: its 'id' and that of line 1 name one job, 1 and \"1\", but the lines differ",),
        ),
    ],
)
def test_lines_without_a_key_of_their_own_are_named(runs: Runs, lines: list[Any], words: tuple[str, ...]) -> None:
    """Else all lines with an empty field would count as one job, and of others the first alone would run."""
    runs.give(lines)
    assert_told(runs.resume("named", "--key", "id"), 2, *words)
    assert runs.made == set()


def test_equal_lines_may_have_one_key(runs: Runs) -> None:
    runs.give([{"id": "a", "number": 1}, {"number": 1, "id": "a"}])
    assert first_line(runs.resume("named", "--key", "id")).startswith("2 jobs, 0 failed, 1 login")
    assert runs.results == {0: 1, 1: 1}
    assert runs.begun == ["a/1"]


def test_a_journal_whose_jobs_are_named_otherwise_is_refused_and_kept(runs: Runs) -> None:
    """Else all that is done would run again, under other keys."""
    runs.give([{"id": "a", "number": 1}, {"id": "b", "number": 2}])
    runs.resume("named", "--key", "id")
    known, begun = JournalView(runs.journal).summary(), runs.begun
    told = "it was written for jobs named by their field 'id', not by "
    for words, naming in (([], "all their arguments"), (["--key", "number"], "their field 'number'")):
        for more in ([], ["--dry-run"]):
            refused = runs.resume("named", *words, *more)
            assert_told(refused, 2, f"{told}{naming}", "hint: add --key id, or give another --journal")
    assert (JournalView(runs.journal).summary(), runs.begun) == (known, begun)
    assert runs.resume("named", "--fresh", "--output", "new.jsonl").returncode == 0
    assert_told(runs.resume("named", "--key", "id"), 2, "by all their arguments, not by their field 'id'", "leave out")


def test_a_journal_of_another_target_is_refused_and_kept(runs: Runs) -> None:
    runs.give(range(2))
    runs.resume("ten")
    known, results = JournalView(runs.journal).summary(), runs.out.read_text()
    done = runs.resume("odd")
    assert_told(done, 2, "it was written for target 'jobs:ten', not 'jobs:odd'", "--fresh")
    assert (JournalView(runs.journal).summary(), runs.out.read_text()) == (known, results)
    assert_told(runs.resume("odd", "--dry-run"), 2, "it was written for target 'jobs:ten', not 'jobs:odd'")


def test_a_second_run_on_a_journal_is_refused_while_the_first_lives(runs: Runs) -> None:
    runs.give(range(2))
    with runs.start("jobs:hold", "in.jsonl", *runs.resumable) as process:
        until(lambda: runs.begun, PATIENCE)
        other = runs.run("jobs:hold", "in.jsonl", "--journal", "run.db")
        assert_told(other, 2, f"process {process.pid} is running with it")
        fresh = runs.run("jobs:hold", "in.jsonl", "--journal", "run.db", "--fresh")
        assert_told(fresh, 2, f"process {process.pid} is running with it")
        runs.touch("go")
        end(process)
    assert process.returncode == 0
    assert runs.results == {0: 0, 1: 10}


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv", "out.parquet"])
def test_somebody_elses_output_is_refused_and_kept(runs: Runs, name: str) -> None:
    runs.give(range(2))
    runs.run("jobs:odd", "in.jsonl", "--journal", "run.db", "--output", "first.jsonl")
    path = runs.shell.write(name, "index,mine\n1,precious\n")
    begun = runs.begun
    done = runs.run("jobs:odd", "in.jsonl", "--journal", "run.db", "--output", name)
    assert_told(done, 2, f"{name} exists and is no output of the runs in")
    assert path.read_text() == "index,mine\n1,precious\n"
    assert runs.begun == begun


@pytest.mark.parametrize(
    ("name", "left"),
    [("out.jsonl", 30), ("out.jsonl", 3), ("out.csv", 20), ("out.csv", 55), ("out.jsonl", None), ("out.csv", None)],
)
def test_an_output_torn_in_its_first_line_is_made_good(runs: Runs, name: str, left: int | None) -> None:
    """The same command goes on after a kill during the first write, or a power loss that left zeros: None."""
    runs.give(range(2))
    command = ["jobs:ten", "in.jsonl", "--journal", "run.db", "--output", name]
    runs.run(*command, "--limit", "1")
    path = runs.folder / name
    content = path.read_bytes()
    path.write_bytes(bytes(len(content)) if left is None else content[:left])
    done = runs.run(*command)
    assert done.returncode == 0, done.stderr
    assert path.read_bytes().startswith(content)
    assert runs.begun == ["0", "1"]


def test_the_output_of_another_journal_is_refused_and_kept(runs: Runs) -> None:
    runs.give(range(2))
    runs.run("jobs:ten", "in.jsonl", "--journal", "other.db", "--output", "out.jsonl")
    results = runs.out.read_text()
    runs.give([7, 8])
    runs.run("jobs:ten", "in.jsonl", "--journal", "run.db", "--output", "first.jsonl")
    assert_told(runs.resume("ten"), 2, "is no output of the runs in")
    assert runs.out.read_text() == results


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv", "out.parquet"])
def test_fresh_can_be_repeated_with_the_same_output(runs: Runs, name: str) -> None:
    command = ["jobs:ten", "in.jsonl", "--journal", "run.db", "--output", name, "--fresh"]
    for first in range(3):
        runs.give([7000 + first, 8000 + first])
        done = runs.run(*command)
        assert done.returncode == 0, done.stderr
        assert first_line(done).startswith("2 jobs, 0 failed, 1 login, ")
    path = runs.folder / name
    text = str(parquet.read_table(path).to_pydict()) if name.endswith("parquet") else path.read_text()
    assert ["70000" in text, "70010" in text, "70020" in text] == [False, False, True]


def test_fresh_keeps_an_output_of_something_else(runs: Runs) -> None:
    runs.give(range(2))
    runs.resume("ten")
    content = runs.journal.read_bytes()
    runs.run("jobs:ten", "in.jsonl", "--output", "other.jsonl", "--journal", "other.db", "--limit", "1")
    other = runs.shell.write("other.jsonl", (runs.folder / "other.jsonl").read_text().replace('"key": "', '"key": "x'))
    results = other.read_text()
    assert_told(runs.resume("ten", "--fresh", "--output", "other.jsonl"), 2, "is no output of the runs in run.db")
    assert (runs.journal.read_bytes(), other.read_text()) == (content, results)


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_a_fresh_run_that_is_killed_is_gone_on_with(runs: Runs, name: str) -> None:
    """Also where the first job of its former output has not begun again."""
    command = ["jobs:hold", "in.jsonl", "--journal", "run.db", "--output", name]
    runs.give([1, 2])
    runs.touch("go")
    assert runs.run(*command).returncode == 0
    (runs.folder / "go").unlink()
    runs.give([3, 1, 2])
    with runs.start(*command, "--fresh") as process:
        until(lambda: "3" in runs.begun, PATIENCE)
        process.kill()
        end(process)
    runs.touch("go")
    done = runs.run(*command)
    assert done.returncode == 0, done.stderr
    assert first_line(done).startswith("3 jobs, 0 failed, 1 login, ")


@pytest.mark.parametrize("options", [(), ("--fresh",)], ids=["without", "again"])
@pytest.mark.parametrize("name", ["out.jsonl", "out.csv", "out.parquet"])
def test_a_fresh_run_that_is_killed_between_journal_and_output_is_gone_on_with(
    runs: Runs, name: str, options: tuple[str, ...]
) -> None:
    """Then the journal is empty, and the output is of the runs that it held before, and of other jobs."""
    command = ["jobs:ten", "in.jsonl", "--journal", "run.db", "--output", name]
    runs.give([8, 9])
    assert runs.run(*command).returncode == 0
    runs.give([1, 2])
    with runs.shell.killed_at("shpool_cli.output.results", "ResultWriter.catch_up"):
        for _ in range(2):
            assert runs.run(*command, "--fresh").returncode == -signal.SIGKILL
    assert next(JournalView(runs.journal).records(), None) is None
    assert foreseen(runs.run(*command, *options, "--dry-run")) == [("new", True)] * 2
    done = runs.run(*command, *options)
    assert done.returncode == 0, done.stderr
    assert first_line(done).startswith("2 jobs, 0 failed, 1 login, ")


def test_an_empty_journal_knows_one_output_alone(runs: Runs) -> None:
    runs.give([8, 9])
    runs.resume("ten")
    content = runs.out.read_text()
    copy = runs.shell.write("copy.jsonl", content)
    runs.give([1, 2])
    with runs.shell.killed_at("shpool_cli.output.results", "ResultWriter.catch_up"):
        runs.resume("ten", "--fresh")
    assert_told(runs.resume("ten", "--output", "copy.jsonl"), 2, "is no output of the runs in run.db")
    runs.out.write_text(content.replace('"key": "', '"key": "x'))
    assert_told(runs.resume("ten"), 2, "is no output of the runs in run.db")
    assert copy.read_text() == content
    runs.out.write_text(content)
    assert runs.resume("ten").returncode == 0
    runs.out.write_text(content)  # somebody's own business, once the run has put its results there
    assert_told(runs.resume("ten"), 2, "is no output of the runs in run.db")


def test_an_output_is_kept_where_a_fresh_run_is_refused(runs: Runs) -> None:
    """Its journal is, too; both are emptied together, and then go together again."""
    runs.give(range(2))
    runs.resume("ten")
    results = runs.out.read_text()
    assert_told(runs.resume("ten", "--fresh", "--client-secret-file", "nowhere"), 2)
    assert runs.out.read_text() == results
    runs.shell.env["SH_CLIENT_SECRET"] = "invented-and-wrong"
    assert_told(runs.resume("ten", "--fresh"), 3, "refused client")
    assert runs.out.read_text() == ""
    runs.shell.env["SH_CLIENT_SECRET"] = runs.server.client_secret
    assert runs.resume("ten").returncode == 0
    assert records(runs.out.read_text()) != []


def test_a_resumed_run_without_credentials_changes_no_output(runs: Runs) -> None:
    """What failed is still in it."""
    runs.give(range(4))
    runs.resume("odd")
    results = runs.out.read_text()
    runs.login = []
    del runs.shell.env["SH_CLIENT_ID"]
    assert_told(runs.resume("odd"), 3, "no client id")
    assert runs.out.read_text() == results


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_every_form_of_output_is_complete_after_a_resume(runs: Runs, suffix: str) -> None:
    runs.give(range(4))
    out = runs.folder / f"out.{suffix}"
    words = ("jobs:odd", "in.jsonl", "--journal", "run.db", "--output", out.name)
    assert runs.run(*words).returncode == 1
    runs.touch("mended")
    done = runs.run(*words)
    assert done.returncode == 0, done.stderr
    if suffix == "parquet":
        rows = parquet.read_table(out).to_pylist()
    elif suffix == "csv":
        with out.open(newline="") as lines:
            rows = list(csv.DictReader(lines))
    else:
        rows = records(out.read_text())
    assert sorted((int(row["index"]), int(row["result"]), row["status"]) for row in rows) == [
        (number, number * 10, "done") for number in range(4)
    ]


def test_a_run_is_written_down(runs: Runs) -> None:
    runs.give(range(4))
    runs.resume("odd")
    [run] = JournalView(runs.journal).summary().runs
    assert (run.jobs, run.workers, run.done, run.failed, run.logins, run.exit_code) == (4, 1, 2, 2, 1, 1)
    assert run.command.endswith(" jobs:odd in.jsonl --journal run.db --output out.jsonl")
    runs.touch("mended")
    runs.resume("odd")
    assert [run.exit_code for run in JournalView(runs.journal).summary().runs] == [1, 0]


def test_a_retried_job_tells_its_attempts(runs: Runs) -> None:
    runs.give(["mark"])
    runs.shell.write(
        "jobs.py",
        "import pathlib\ndef once(path):\n    mark = pathlib.Path(path)\n    if not mark.exists():\n"
        "        mark.touch()\n        raise ConnectionError('reset')\n",
    )
    done = runs.resume("once", "--retries", "1")
    assert done.returncode == 0, done.stderr
    [record] = JournalView(runs.journal).records()
    assert (record.status, record.attempts, record.starts) == ("done", 2, 1)


# When it ends before its jobs do


def test_a_late_job_is_stopped_and_recorded(runs: Runs) -> None:
    runs.give([1, 2])
    runs.touch("go-2")
    done = runs.resume("hold", "--timeout", "1")
    assert done.returncode == 1
    assert runs.results == {0: "failed", 1: 20}
    assert "TaskTimeoutError" in records(runs.out.read_text())[0]["error"]
    runs.touch("go-1")
    assert runs.resume("hold", "--timeout", "60").returncode == 0


def test_halt_soon_lets_end_what_runs(runs: Runs) -> None:
    runs.give(range(1, 200))
    with runs.start("jobs:hold_1_fail_2", "in.jsonl", *runs.resumable, "-w", "2", "--halt", "soon") as process:
        until(lambda: runs.out.exists() and b"bad tile 2" in runs.out.read_bytes(), PATIENCE)
        runs.touch("go")
        _, stderr = end(process)
    assert process.returncode == 1
    assert stderr.startswith("halted after 1 failed job: ")
    assert runs.results[0] == 10, "it ran when the other one failed"
    assert len(runs.begun) < 199
    assert set(map(str, runs.results)) == {str(int(number) - 1) for number in runs.begun}, "what began is recorded"
    assert hints(stderr) == ["hint: the same command goes on where this one ended; shpool status run.db tells more"]


def test_halt_now_stops_what_runs(runs: Runs) -> None:
    runs.give(range(1, 200))
    done = runs.resume("hold_1_fail_2", "-w", "2", "--halt", "now")
    assert done.returncode == 1
    assert done.stderr.startswith("halted after 1 failed job: ")
    assert "1" in runs.begun
    assert 0 not in runs.results
    assert JournalView(runs.journal).summary().cut_off >= 1
    assert len(runs.begun) < 199


@pytest.mark.parametrize(("policy", "failures"), [("soon,fail=3", 3), ("now,fail=10%", 10)])
def test_halt_counts_failures(runs: Runs, policy: str, failures: int) -> None:
    runs.give(range(100))
    done = runs.resume("never", "--halt", policy)
    assert done.returncode == 1
    assert done.stderr.startswith(f"halted after {failures} failed jobs: ")
    assert failures <= len(runs.results) < 100


def test_fewer_failures_do_not_halt(runs: Runs) -> None:
    runs.give(range(10))
    done = runs.resume("odd", "--halt", "now,fail=6")
    assert first_line(done).startswith("10 jobs, 5 failed, ")


def test_a_halt_at_the_last_job_is_none(runs: Runs) -> None:
    runs.give([0, 2, 1])
    done = runs.resume("odd", "--halt", "soon", "--json")
    assert done.returncode == 1
    assert first_line(done).startswith("3 jobs, 1 failed, ")
    assert json.loads(done.stdout)["halted"] is None


def test_no_job_begins_after_the_longest_time(runs: Runs) -> None:
    runs.give(range(600))
    done = runs.resume("brief", "--max-time", "1s")
    assert done.returncode == 1
    assert done.stderr.startswith("stopped after --max-time, 1 s: ")
    assert len(runs.results) == len(runs.begun) < 600, "what was begun has ended"


def test_a_limit_takes_so_many_each_time(runs: Runs) -> None:
    runs.give(range(7))
    done = runs.resume("ten", "--limit", "3")
    assert done.returncode == 0, done.stderr
    assert first_line(done).startswith("3 of 7 jobs, 0 failed, 1 login, ")
    again = runs.resume("ten", "--limit", "3")
    assert first_line(again).startswith("6 of 7 jobs, 0 failed, 3 done before, 1 login, ")
    assert sorted(map(int, runs.begun)) == list(range(6))
    last = runs.resume("ten", "--limit", "3")
    assert first_line(last).startswith("7 jobs, 0 failed, 6 done before, ")


def test_a_limit_needs_no_journal(runs: Runs) -> None:
    runs.give(range(5))
    done = runs.run("jobs:ten", "in.jsonl", "--limit", "2")
    assert [record["index"] for record in records(done.stdout)] == [0, 1]
    assert (done.returncode, hints(done.stderr)) == (0, [])


def test_what_was_done_before_counts_also_beyond_a_limit(runs: Runs) -> None:
    runs.give([5, 6, 7])
    runs.resume("ten")
    runs.give([0, 1, 5, 6, 7])
    done = runs.resume("ten", "--limit", "1")
    assert first_line(done).startswith("4 of 5 jobs, 0 failed, 3 done before, ")
    assert runs.results == {0: 0, 2: 50, 3: 60, 4: 70}


# Nothing run


def foreseen(done: subprocess.CompletedProcess[str]) -> list[tuple[str, bool]]:
    assert done.returncode == 0, done.stderr
    return [(line["status"], line["would_run"]) for line in map(json.loads, done.stdout.splitlines())]


def test_a_dry_run_runs_nothing_and_makes_nothing(runs: Runs) -> None:
    runs.give([1, 2, 1])
    done = runs.resume("ten", "--dry-run")
    assert foreseen(done) == [("new", True), ("new", True), ("duplicate", False)]
    assert first_line(done) == "dry run: 2 of 3 jobs would run, 0 are done"
    assert runs.made == set()
    assert runs.server.token_requests == 0


def test_a_dry_run_needs_no_journal_and_no_credentials(runs: Runs) -> None:
    runs.give([1, 1])
    runs.login = []
    assert foreseen(runs.run("jobs:ten", "in.jsonl", "--dry-run", "--limit", "1")) == [("new", True), ("new", False)]


def test_a_dry_run_tells_what_the_journal_knows(runs: Runs) -> None:
    runs.give([0, 1, 2, 3])
    with runs.start("jobs:hold_1_fail_2", "in.jsonl", *runs.resumable, "-w", "2") as process:
        until(lambda: runs.out.exists() and b'"index": 3' in runs.out.read_bytes(), PATIENCE)
        until(lambda: JournalView(runs.journal).summary().running == 1, PATIENCE)
        process.kill()
        end(process)
    content = runs.journal.read_bytes()
    runs.give([0, 1, 2, 3, 4, 2])
    states = [
        ("done", False),
        ("cut off", True),
        ("failed", True),
        ("done", False),
        ("new", True),
        ("duplicate", False),
    ]
    done = runs.resume("hold_1_fail_2", "--dry-run")
    assert foreseen(done) == states
    assert first_line(done) == "dry run: 3 of 6 jobs would run, 2 are done"
    only = foreseen(runs.resume("hold_1_fail_2", "--dry-run", "--only-failed"))
    assert [would for _, would in only] == [False, False, True, False, False, False]
    fresh = foreseen(runs.resume("hold_1_fail_2", "--dry-run", "--fresh"))
    assert [would for _, would in fresh] == [True] * 5 + [False]
    assert runs.journal.read_bytes() == content


@pytest.mark.parametrize(
    "wrong",
    [
        ("--output", "nowhere/out.csv"),
        ("--output", "jobs.py/out.csv"),
        ("--output", "out.zip"),
        ("--output", "bin"),
        ("--output", "in.jsonl"),
        ("--output", "full.csv"),
        ("--output", "full.csv", "--journal", "run.db"),
        ("--output", "full.csv", "--journal", "run.db", "--fresh"),
        ("--client-secret-file", "nowhere"),
        ("--scope", ""),
        ("--profile", "nope"),
        ("--token-url", ""),
    ],
    ids=" ".join,
)
def test_a_dry_run_refuses_what_a_run_would_refuse_in_the_same_words(runs: Runs, wrong: tuple[str, ...]) -> None:
    runs.give([1, 2])
    runs.shell.write("full.csv", "mine\n")
    runs.run("jobs:ten", "in.jsonl", "--journal", "run.db", "--limit", "1")
    before, logins = runs.files, runs.server.token_requests
    dry = runs.run("jobs:ten", "in.jsonl", *wrong, "--dry-run")
    assert_told(dry, 2)
    assert runs.files == before
    assert dry.stderr == runs.run("jobs:ten", "in.jsonl", *wrong).stderr
    assert runs.server.token_requests == logins


def test_a_dry_run_warns_of_credentials_that_a_run_would_miss(runs: Runs) -> None:
    runs.give([1])
    runs.resumable = ["--journal", "run.db", "--output", "new/../out.csv"]
    (runs.folder / "new").mkdir()
    del runs.shell.env["SH_CLIENT_SECRET"]
    done = runs.resume("ten", "--dry-run")
    assert foreseen(done) == [("new", True)]
    assert done.stderr.startswith(
        f"warning: there is no client secret for {runs.server.client_id}, which a run needs; set"
    )
    assert not runs.out.with_suffix(".csv").exists()
    runs.shell.env["SH_CLIENT_SECRET"] = runs.server.client_secret
    assert runs.resume("ten").returncode == 0
    runs.login = []
    del runs.shell.env["SH_CLIENT_SECRET"]
    done = runs.resume("ten", "--dry-run")
    assert (foreseen(done), "warning" in done.stderr) == ([("done", False)], False)


def test_a_dry_run_on_a_full_disk_is_told(runs: Runs) -> None:
    runs.give([1])
    done = runs.shell.sh('"$@" >/dev/full', "run", "jobs:ten", "in.jsonl", "--dry-run")
    assert_told(done, 1, "standard output cannot be written: No space left on device")


# Order


def test_shuffled_jobs_run_in_another_order_and_all_of_them(runs: Runs) -> None:
    runs.give(range(40))
    done = runs.resume("ten", "--shuffle")
    assert done.returncode == 0, done.stderr
    assert runs.begun != sorted(runs.begun, key=int)
    assert runs.results == {number: number * 10 for number in range(40)}


def test_ordered_results_stand_as_their_lines_do(runs: Runs) -> None:
    """The first job ends last of those in flight."""
    runs.give(range(20))
    done = runs.resume("last_first", "-w", "2", "--ordered")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["result"] for line in runs.out.read_text().splitlines()] == [n * 10 for n in range(20)]


@pytest.mark.parametrize("options", [[], ["--shuffle"]])
def test_a_resumed_output_is_in_order(runs: Runs, options: list[str]) -> None:
    lines = [*range(8), 3, 4]
    runs.give(lines)
    runs.resume("odd", "--ordered", "-w", "2")
    runs.touch("mended")
    done = runs.resume("odd", "--ordered", "-w", "2", *options)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in runs.out.read_text().splitlines()]
    assert [record["index"] for record in found] == list(range(10))
    assert [record["result"] for record in found] == [number * 10 for number in lines]


def test_an_interrupted_ordered_run_writes_what_it_has(runs: Runs) -> None:
    runs.give([1, 0, 2, 3])
    runs.touch("go-0")
    with runs.start("jobs:hold", "in.jsonl", *runs.resumable, "-w", "2", "--ordered") as process:
        until(lambda: runs.begun.count("2"), PATIENCE)
        process.send_signal(signal.SIGINT)
        end(process)
    assert process.returncode == 130
    assert runs.results == {1: 0}
    runs.touch("go")
    assert runs.resume("hold", "--ordered").returncode == 0
    assert [json.loads(line)["index"] for line in runs.out.read_text().splitlines()] == [0, 1, 2, 3]


# Interruptions


def test_a_kill_cuts_off_what_ran_and_not_what_waited_for_a_worker(runs: Runs) -> None:
    runs.give(range(30))
    with runs.start("jobs:hold", "in.jsonl", "--journal", "run.db", "-w", "2") as process:
        until(lambda: len(runs.begun) == 2 and JournalView(runs.journal).summary().running == 2, PATIENCE)
        until(lambda: JournalView(runs.journal).summary().logins == 1, PATIENCE)
        process.kill()
        process.wait(PATIENCE)
    summary = JournalView(runs.journal).summary()
    assert (summary.state, summary.cut_off, summary.not_begun) == ("cut off", 2, 28)
    assert (summary.logins, summary.runs[-1].workers) == (1, 2), "noted while it ran"


def test_an_interruption_lets_running_jobs_end_and_says_how_to_go_on(runs: Runs) -> None:
    runs.give_time(PATIENCE)
    runs.give(range(1, 50))
    with runs.start("jobs:hold", "in.jsonl", *runs.resumable) as process:
        until(lambda: "1" in runs.begun, PATIENCE)
        process.send_signal(signal.SIGINT)
        until(lambda: JournalView(runs.journal).summary().running, PATIENCE)
        runs.touch("go-1")
        _, stderr = end(process)
    assert process.returncode == 130
    assert stderr.splitlines()[0].startswith("interrupted: 1 of 49 jobs, 0 failed, 1 login, ")
    assert hints(stderr) == ["hint: the same command goes on where this one ended; shpool status run.db tells more"]
    assert len(stderr.splitlines()) == 2
    assert runs.results == {0: 10}
    assert runs.begun == ["1"]
    assert [run.exit_code for run in JournalView(runs.journal).summary().runs] == [130]


def test_a_journal_in_a_hint_is_quoted_for_the_shell(runs: Runs) -> None:
    runs.give(range(3))
    done = runs.run("jobs:ten", "in.jsonl", "--journal", "my run.db", "--halt", "soon", "--limit", "1")
    assert hints(done.stderr) == [
        "hint: the same command goes on where this one ended; shpool status 'my run.db' tells more"
    ]


def test_the_hint_of_a_fresh_run_does_not_forget_it(runs: Runs) -> None:
    runs.give([1, 2])
    with runs.start("jobs:hold", "in.jsonl", *runs.resumable, "--fresh") as process:
        until(lambda: runs.begun, PATIENCE)
        process.send_signal(signal.SIGINT)
        _, stderr = end(process)
    assert "hint: the same command without --fresh goes on where this one ended" in stderr


def test_a_second_interruption_ends_at_once(runs: Runs) -> None:
    runs.give_time(10 * PATIENCE)
    runs.give(range(5))
    runs.touch("go-0")
    with runs.start("jobs:hold", "in.jsonl", *runs.resumable) as process:
        until(lambda: "1" in runs.begun and runs.out.read_bytes(), PATIENCE)
        children = psutil.Process(process.pid).children(recursive=True)

        def has_ended() -> bool:
            process.send_signal(signal.SIGINT)  # two that are pending at once are one
            try:
                process.wait(1.0)
            except subprocess.TimeoutExpired:
                return False
            return True

        until(has_ended, PATIENCE)
        _, stderr = end(process)
    assert process.returncode in {130, -signal.SIGINT}, "the latter where one meets the end of the interpreter"
    assert "Traceback" not in stderr
    assert stderr.count("interrupted") == 1
    assert not psutil.wait_procs(children, timeout=PATIENCE)[1]
    assert runs.results == {0: 0}
    runs.touch("go")
    assert runs.resume("hold").returncode == 0
    assert runs.results == {number: number * 10 for number in range(5)}


def test_a_terminated_run_goes_on(runs: Runs) -> None:
    runs.give(range(4))
    runs.touch("go-0")
    with runs.start("jobs:hold", "in.jsonl", *runs.resumable) as process:
        until(lambda: "1" in runs.begun and runs.out.read_bytes(), PATIENCE)
        process.terminate()
        _, stderr = end(process)
    assert process.returncode == 143
    assert stderr.startswith("terminated: 1 of 4 jobs, ")
    runs.touch("go")
    done = runs.resume("hold")
    assert first_line(done).startswith("4 jobs, 0 failed, 1 done before, ")
    assert Counter(runs.begun) == {"0": 1, "1": 2, "2": 1, "3": 1}


def test_an_output_that_takes_no_more_ends_the_run_with_jobs_running(runs: Runs) -> None:
    """The job beside would run for ever; its result has nowhere to go."""
    runs.give([1, 0])
    runs.touch("go-0")
    done = runs.shell.sh('"$@" >/dev/full', *runs.arguments(("jobs:hold", "in.jsonl", "-w", "2")))
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot write results to standard output: No space left on device")


# Shell jobs


def test_fields_are_quoted_and_what_a_command_says_is_its_result(runs: Runs) -> None:
    runs.shell.write("in.csv", 'name,n\n"it\'s; echo $HOME",1\nb,2\n')
    done = runs.run("--shell", "echo {name} {n}; echo late >&2", "in.csv", *runs.resumable)
    assert done.returncode == 0, done.stderr
    expected = {
        "stdout": "it's; echo $HOME 1\n",
        "stderr": "late\n",
        "dropped": 0,
        "exit_status": 0,
        "signal": None,
    }
    assert runs.results == {0: expected, 1: {**expected, "stdout": "b 2\n"}}
    again = runs.run("--shell", "echo {name} {n}; echo late >&2", "in.csv", *runs.resumable)
    assert first_line(again).startswith("2 jobs, 0 failed, 2 done before, 0 logins, ")
    other = runs.run("--shell", "echo {name}", "in.csv", *runs.resumable)
    assert_told(other, 2, "not 'sh:echo {name}'")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("echo {naem}", ("in.csv, line 2", "the job has no field {naem}", "{name}")),
        ("echo '{name}'", ("{name} stands inside quotes",)),
        ("echo {name", ("a { has no }",)),
        ("if {name}", ("the shell cannot read it",)),
        ("", ("it is empty",)),
    ],
)
def test_a_command_that_will_not_do_is_refused_before_anything_runs(
    runs: Runs, command: str, words: tuple[str, ...]
) -> None:
    runs.shell.write("in.csv", "name\na\n")
    assert_told(runs.run("--shell", command, "in.csv", *runs.resumable), 2, *words)
    assert runs.made == set()
    assert runs.server.token_requests == 0


def test_how_a_command_failed_is_recorded(runs: Runs) -> None:
    runs.give(["echo said; echo why >&2; exit 7", "kill -9 $$", "true"])
    done = runs.run("--shell", "eval {}", "in.jsonl", *runs.resumable)
    assert done.returncode == 1
    found = records(runs.out.read_text())
    assert "status 7" in found[0]["error"]
    assert "SIGKILL" in found[1]["error"]
    assert found[2]["status"] == "done"
    said = {"stdout": "said\n", "stderr": "why\n", "dropped": 0, "exit_status": 7, "signal": None}
    assert found[0]["result"] == said
    assert (found[1]["result"]["exit_status"], found[1]["result"]["signal"]) == (None, "SIGKILL")
    status = json.loads(runs.shell.run("status", "run.db", "--json").stdout)
    assert said in [kind["example"]["result"] for kind in status["errors"]]


def test_a_late_command_ends_with_all_it_started(runs: Runs) -> None:
    runs.give(["pid"])
    command = "sleep 600 & echo $! >{}; echo begun >&2; wait"
    done = runs.run("--shell", command, "in.jsonl", *runs.resumable, "--timeout", "2")
    assert done.returncode == 1
    [record] = records(runs.out.read_text())
    assert "ShellTimeoutError" in record["error"]
    assert "begun" in record["error"], "what it has said is kept"
    pid = int((runs.folder / "pid").read_text())
    until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def test_the_token_is_in_the_commands_environment_and_in_no_argument(runs: Runs) -> None:
    runs.give(["a"])
    command = 'printf %s "$SHPOOL_TOKEN" >{}; echo "said $SHPOOL_TOKEN"; until [ -e go ]; do sleep 0.1; done'
    token = runs.folder / "a"
    with runs.start("--shell", command, "in.jsonl", *runs.resumable) as process:
        until(lambda: token.exists() and token.read_text(), PATIENCE)
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        arguments = [child.cmdline() for child in family if child.is_running()]
        runs.touch("go")
        end(process)
    secret = token.read_text()
    assert len(secret) > 10
    assert any("until" in str(each) for each in arguments), "the command itself was looked at"
    assert secret not in str(arguments)
    assert secret not in runs.out.read_text()
    assert secret.encode() not in runs.journal.read_bytes()
    assert runs.server.logins == 1


# What makes no sense


@pytest.mark.parametrize(
    "wrong",
    [
        ("--workers", "0"),
        ("--workers", "many"),
        ("--retries", "-1"),
        ("--retries", "1.5"),
        ("--timeout", "0"),
        ("--timeout", "soon"),
        ("--timeout", "30d"),
        ("--max-time", "-1"),
        ("--max-time", "1w"),
        ("--halt", "later"),
        ("--halt", "never,fail=1"),
        ("--halt", "soon,fail=0"),
        ("--halt", "now,fail=101%"),
        ("--limit", "0"),
        ("--limit", "x"),
        ("--limit", "9" * 30),
        ("--retries", "9" * 30),
        ("--workers", "9" * 30),
        ("--scope", ""),
        ("--format", "xml"),
        ("--only-failed", "--fresh"),
        ("--output", "nowhere/out.jsonl"),
        ("--output", "nowhere/out.parquet"),
        ("--output", "."),
        ("--output", "new/"),
        ("--output", ""),
        ("--journal", "nowhere/run.db"),
        ("--journal", "."),
        ("--journal", "in.jsonl"),
        ("--journal", "out.jsonl"),
        ("--journal", "jobs.py"),
        ("--key", "id"),
        ("--client-id", ""),
        ("--client-secret-file", "nowhere"),
        ("--token-url", ""),
        ("--no-such-option",),
    ],
    ids=" ".join,
)
def test_a_wrong_value_is_named_and_nothing_is_made(runs: Runs, wrong: tuple[str, ...]) -> None:
    runs.give(range(3))
    before = runs.files
    done = runs.resume("odd", *wrong)
    assert_told(done, 2)
    assert any(word.lstrip("-").replace("-", " ") in done.stderr.replace("-", " ") for word in wrong if word)
    assert runs.files == before
    assert runs.server.token_requests == 0


def test_more_workers_than_there_is_room_for_are_refused(runs: Runs) -> None:
    runs.give(range(3))
    done = runs.shell.sh('ulimit -n 1024; exec "$@"', "run", "jobs:ten", "in.jsonl", "-w", "329", *runs.login)
    assert_told(done, 2, "--workers 329 is more than", "give at most 328, or raise the limit of open files (ulimit -n)")
    assert_told(runs.run("jobs:ten", "in.jsonl", "-w", "1000000000"), 2, "--workers 1000000000 is more than")
    assert runs.made == set()


@pytest.mark.parametrize(("options", "started"), [([], 3), (["--limit", "2"], 2)], ids=["", "limit"])
def test_no_more_workers_are_started_than_there_are_jobs(runs: Runs, options: list[str], started: int) -> None:
    runs.give(range(3))
    assert runs.run("jobs:ten", "in.jsonl", "-w", "50", "--journal", "run.db", *options).returncode == 0
    assert [run.workers for run in JournalView(runs.journal).summary().runs] == [started]


def test_a_wrong_value_costs_a_resumed_run_nothing(runs: Runs) -> None:
    runs.give(range(3))
    runs.resume("odd")
    before, known, logins = runs.files, list(JournalView(runs.journal).records()), runs.server.token_requests
    for wrong in (
        ("--halt", "later"),
        ("--key", "id"),
        ("--fresh", "--client-secret-file", "nowhere"),
        ("--fresh", "--output", "nowhere/out.jsonl"),
        ("--fresh", "--output", "new.jsonl", "--client-secret-file", "nowhere"),
        ("--output", "in.jsonl"),
        ("--client-secret-file", "nowhere"),
    ):
        assert_told(runs.resume("odd", *wrong), 2)
        after = runs.files
        assert {name: after[name] for name in after if name != "run.db"} == {
            name: before[name] for name in before if name != "run.db"
        }
    assert list(JournalView(runs.journal).records()) == known
    assert runs.server.token_requests == logins


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("jobs:ten", "in.jsonl", "--only-failed"), "--only-failed goes with --journal"),
        (("jobs:ten", "in.jsonl", "--fresh"), "--fresh goes with --journal"),
        (("jobs:ten", "in.jsonl", "--key", "id"), "--key goes with --journal"),
        (("jobs:ten", "in.jsonl", "--journal", "run.db", "--output", "./run.db"), "are the same file"),
        (("jobs:ten", "in.jsonl", "--journal", "bin/../in.jsonl"), "are the same file"),
        (("jobs:ten", "in.jsonl", "more"), "TARGET and INPUT are enough"),
        (("in.jsonl",), "INPUT is missing"),
        (("jobs:ten", "in.jsonl", "--journal", "-"), "--journal - is no file"),
        (("jobs:ten", "in.jsonl", "--shell", "echo {}"), "with --shell there is INPUT alone"),
    ],
)
def test_what_makes_no_sense_together_is_refused(runs: Runs, words: tuple[str, ...], told: str) -> None:
    runs.give(range(3))
    assert_told(runs.run(*words), 2, told)
    assert runs.made == set()
    assert runs.server.token_requests == 0


def test_a_refused_login_leaves_no_output(runs: Runs) -> None:
    runs.give(range(3))
    runs.shell.env["SH_CLIENT_SECRET"] = "invented-and-wrong"
    assert_told(runs.resume("ten"), 3, "refused client")
    assert not runs.out.exists()
    assert runs.begun == []
    runs.shell.env["SH_CLIENT_SECRET"] = runs.server.client_secret
    assert runs.resume("ten").returncode == 0, "the same command goes on"


def handles_sigterm(pid: int) -> bool:
    """Tell whether a process has a handler for it."""
    [caught] = re.findall(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def test_any_interruption_anywhere_is_made_good_by_the_same_command(runs: Runs) -> None:
    """SIGTERM, SIGINT and SIGKILL at random moments, until a run gets through."""
    chance = random.Random(4711)
    runs.shell.is_struck_anywhere = True
    runs.give([*range(30), *range(10)])
    words = ("jobs:brief", "in.jsonl", *runs.resumable, "-w", "2", "--retries", "1")
    codes = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL, signal.SIGTERM):
        with runs.start(*words) as process:
            until(functools.partial(handles_sigterm, process.pid))  # before that, it is the interpreter that they hit
            try:
                process.wait(chance.uniform(0.0, 3.0))
            except subprocess.TimeoutExpired:
                process.send_signal(number)
            _, stderr = end(process)
            codes.append(process.returncode)
            assert "Traceback" not in stderr
    assert set(codes) <= {0, 130, 143, -signal.SIGKILL}
    done = runs.run(*words)
    assert done.returncode == 0, done.stderr
    assert runs.results == {index: number * 10 for index, number in enumerate([*range(30), *range(10)])}
