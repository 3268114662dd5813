from __future__ import annotations

import json
import os
import signal
import time
from typing import TYPE_CHECKING

import psutil
import pytest
from cli_shell import PATIENCE, Shell, assert_told, lines_on_terminal, records

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from pathlib import Path

    from shpool.testing import LoopbackServer

pytestmark = pytest.mark.slow

TILES = """
import os
import pathlib
import time
import urllib.request

from shpool import current_session

def double(number):
    print("printed by the worker", flush=True)
    return number * 2

def length(text):
    return len(text)

def add(a, b="0"):
    return int(a) + int(b)

def fetch(url):
    request = urllib.request.Request(url, headers=current_session().session_headers)
    return len(urllib.request.urlopen(request, timeout=30).read())

def fail_odd(number):
    if number % 2:
        raise ValueError(f"bad tile {number}")
    return number

def fail_once(path):
    mark = pathlib.Path(path)
    if not mark.exists():
        mark.touch()
        raise ConnectionError("reset")
    return "done"

def strange(number):
    return object() if number else number

def die(number):
    os._exit(1)

def linger(number):
    pathlib.Path(f"begun-{number}").touch()
    time.sleep(600 if number else 0)
    return number
"""


@pytest.fixture
def shell(tmp_path: Path, child_env: dict[str, str]) -> Shell:
    shell = Shell(tmp_path, child_env)
    shell.write("tiles.py", TILES)
    shell.write("three.jsonl", "0\n1\n2\n")
    return shell


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def end(process: subprocess.Popen[str]) -> tuple[str, str]:
    stdout, stderr = process.communicate(timeout=PATIENCE)
    return stdout, stderr


def test_results_stand_on_stdout_and_the_summary_on_stderr(shell: Shell, server: LoopbackServer) -> None:
    shell.write("jobs.jsonl", "".join(f'["{server.data_url(n, 100 + n)}"]\n' for n in range(20)))
    done = shell.run("run", "tiles:fetch", "jobs.jsonl", "--workers", "2", *shell.log_in_at(server))
    assert done.returncode == 0, done.stderr
    found = records(done.stdout)
    assert [record["result"] for record in found] == [100 + n for n in range(20)]
    assert set(found[0]) == {"index", "key", "status", "result", "attempts", "seconds"}
    assert done.stderr.startswith("20 jobs, 0 failed, 1 login, 0 refreshes, ")
    assert len(done.stderr.splitlines()) == 1
    assert (server.logins, server.unauthorized) == (1, 0)


def test_a_file_is_a_target_and_its_prints_stay_off_stdout(shell: Shell, server: LoopbackServer) -> None:
    done = shell.run("run", "./tiles.py:double", "three.jsonl", "-w", "1", *shell.log_in_at(server))
    assert [record["result"] for record in records(done.stdout)] == [0, 2, 4]
    assert "printed by the worker" in done.stderr


def test_csv_rows_are_keywords(shell: Shell, server: LoopbackServer) -> None:
    shell.write("jobs.csv", "a,b\n1,2\n3,4\n")
    done = shell.run("run", "tiles:add", "jobs.csv", "-w", "1", *shell.log_in_at(server))
    assert [record["result"] for record in records(done.stdout)] == [3, 7]


def test_text_lines_are_arguments(shell: Shell, server: LoopbackServer) -> None:
    shell.write("jobs.txt", "abc\n\nde\n")
    done = shell.run("run", "tiles:length", "jobs.txt", "-w", "1", *shell.log_in_at(server))
    assert [record["result"] for record in records(done.stdout)] == [3, 2]


def test_standard_input_is_json_lines(shell: Shell, server: LoopbackServer) -> None:
    done = shell.run("run", "tiles:add", "-", "-w", "1", *shell.log_in_at(server), stdin='[1, 2]\n{"a": 5}\n')
    assert [record["result"] for record in records(done.stdout)] == [3, 5]


def test_standard_input_that_finds_no_room_or_cannot_be_read_is_told(shell: Shell) -> None:
    """A limit on the size of files stands for a full disk, what can be opened and not read, for a disk that fails."""
    for line, words in (
        (
            'export PYTHONDONTWRITEBYTECODE=1; ulimit -f 4; seq 100000 | "$@"',
            ("standard input: cannot be copied to a temporary file: ", "in TMPDIR"),
        ),
        ('"$@" < /proc/self/mem', ("standard input: cannot be read: Input/output error", "give a file")),
    ):
        assert_told(shell.sh(line, "run", "tiles:double", "-"), 2, *words)


def test_failed_jobs_are_recorded_and_exit_1(shell: Shell, server: LoopbackServer) -> None:
    done = shell.run("run", "tiles:fail_odd", "three.jsonl", "-w", "1", *shell.log_in_at(server))
    assert done.returncode == 1
    assert [record["status"] for record in records(done.stdout)] == ["done", "failed", "done"]
    line = 1 + TILES[: TILES.index("raise ValueError")].count("\n")
    assert records(done.stdout)[1]["error"] == f"ValueError: bad tile 1 (tiles.py:{line})"
    assert done.stderr.startswith("3 jobs, 1 failed, ")


def test_temporary_trouble_is_tried_again(shell: Shell, server: LoopbackServer) -> None:
    shell.write("jobs.txt", "mark\n")
    done = shell.run("run", "tiles:fail_once", "jobs.txt", "-w", "1", "--retries", "1", *shell.log_in_at(server))
    assert done.returncode == 0
    assert records(done.stdout)[0]["attempts"] == 2


def test_a_result_without_a_json_form_is_a_failed_job(shell: Shell, server: LoopbackServer) -> None:
    done = shell.run("run", "tiles:strange", "three.jsonl", "-w", "1", *shell.log_in_at(server))
    assert done.returncode == 1
    failed = records(done.stdout)[1]
    assert f"the result of job {failed['key']} " in failed["error"]


def test_a_result_that_cannot_travel_is_named_as_the_function_returned_it(shell: Shell, server: LoopbackServer) -> None:
    shell.write("lazy.py", "def squares(number):\n    return (n * n for n in range(number))\n")
    done = shell.run("run", "lazy:squares", "three.jsonl", "-w", "1", *shell.log_in_at(server))
    assert done.returncode == 1
    (error,) = {record["error"].partition(" at 0x")[0] for record in records(done.stdout)}
    words = "the task's result cannot travel between processes: <generator object squares.<locals>.<genexpr>"
    assert error == f"UnpicklableError: {words}"


def test_the_summary_goes_to_stdout_when_the_results_do_not(shell: Shell, server: LoopbackServer) -> None:
    options = ["-w", "1", "--output", "out.jsonl", "--json", *shell.log_in_at(server)]
    done = shell.run("run", "tiles:double", "three.jsonl", *options)
    summary = json.loads(done.stdout)
    assert summary.pop("seconds") > 0
    counts = {"jobs": 3, "done": 3, "failed": 0, "errors": {}, "before": 0, "skipped": 0, "logins": 1, "refreshes": 0}
    assert summary == {**counts, "halted": None, "exit_code": 0}
    assert len(records((shell.folder / "out.jsonl").read_text())) == 3
    assert done.stderr.splitlines()[-1].startswith("3 jobs, 0 failed, ")


def test_the_summary_is_the_last_line_of_stderr_otherwise(shell: Shell, server: LoopbackServer) -> None:
    done = shell.run("run", "tiles:double", "three.jsonl", "-w", "1", "--json", *shell.log_in_at(server))
    assert json.loads(done.stderr.splitlines()[-1])["jobs"] == 3
    assert len(records(done.stdout)) == 3


def test_the_bar_is_drawn_on_stderr_when_asked_for(shell: Shell, server: LoopbackServer) -> None:
    done = shell.run("run", "tiles:double", "three.jsonl", "-w", "1", "--progress", *shell.log_in_at(server))
    assert "3/3" in done.stderr
    assert "token 3" in done.stderr, "seconds left of an hour"
    assert len(records(done.stdout)) == 3


@pytest.mark.parametrize("option", [[], ["--ordered"]], ids=["", "ordered"])
def test_results_and_the_bar_share_a_terminal(shell: Shell, server: LoopbackServer, option: list[str]) -> None:
    """Each result has a line of its own, and nothing of the bar is left in it."""
    done = shell.run_on_terminal("run", "operator:neg", "three.jsonl", "-w", "1", *option, *shell.log_in_at(server))
    assert done.returncode == 0, done.stdout
    shown = lines_on_terminal(done.stdout)
    assert [record["result"] for record in records("\n".join(shown[:3]))] == [0, -1, -2], done.stdout
    assert "neg 100%|" in shown[3]
    assert "| 3/3 [" in shown[3]
    assert shown[4].startswith("3 jobs, 0 failed, ")


def test_jobs_may_be_typed_and_end_with_one_keystroke(shell: Shell, server: LoopbackServer) -> None:
    done = shell.run_on_terminal("run", "operator:neg", "-", "-w", "1", *shell.log_in_at(server), keys=b"5\n7\n\x04")
    assert done.returncode == 0, done.stdout
    assert '"result": -5' in done.stdout
    assert "2 jobs, 0 failed, " in done.stdout


def test_equal_calls_have_equal_keys_in_every_run(shell: Shell, server: LoopbackServer) -> None:
    options = ["-w", "1", *shell.log_in_at(server)]
    first = records(shell.run("run", "tiles:double", "three.jsonl", *options).stdout)
    again = records(shell.run("run", "tiles:double", "-", *options, stdin="1\n5\n").stdout)
    assert first[1]["key"] == again[0]["key"]
    assert len({record["key"] for record in [*first, again[1]]}) == 4


@pytest.mark.parametrize(("name", "text"), [("none.jsonl", ""), ("none.csv", "a,b\n"), ("none.txt", "\n\n")])
def test_no_jobs_is_success_without_a_login(shell: Shell, name: str, text: str) -> None:
    """There are no credentials either: nothing needs them."""
    shell.write(name, text)
    done = shell.run("run", "tiles:double", name)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith("0 jobs, 0 failed, 0 logins, ")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("bad.jsonl", "0\n{oops\n2\n", ("bad.jsonl, line 2", "not JSON")),
        ("bad.csv", "a,b\n1,2\n3\n", ("bad.csv, line 3", "1 fields where the header has 2")),
        ("bad.csv", "a,b\n1,2,3\n", ("bad.csv, line 2", "3 fields where the header has 2")),
        ("bad.csv", "a,c\n1,2\n", ("bad.csv, line 2", "do not fit the function", "'c'")),
    ],
)
def test_bad_input_is_named_and_nothing_runs(shell: Shell, name: str, text: str, words: tuple[str, ...]) -> None:
    """No credentials are given: TARGET and INPUT come first."""
    shell.write(name, text)
    assert_told(shell.run("run", "tiles:add", name), 2, *words)


def test_bytes_that_are_not_utf8_are_named(shell: Shell) -> None:
    (shell.folder / "bad.txt").write_bytes(b"abc\ncaf\xe9\n")
    assert_told(shell.run("run", "tiles:length", "bad.txt"), 2, "bad.txt, line 2", "byte 8", "UTF-8")


def test_a_missing_input_is_named(shell: Shell) -> None:
    assert_told(shell.run("run", "tiles:double", "missing.jsonl"), 2, "missing.jsonl", "No such file")


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("tiles", "TARGET names no function"),
        ("no_such_module_anywhere:f", "there is no module no_such_module_anywhere"),
        ("missing.py:f", "there is no file missing.py"),
        ("tiles:duoble", "did you mean double?"),
        ("tiles:time", "it is a module, not a function"),
        ("broken:f", "broken.py, line 2"),
        ("broken.py:f", "RuntimeError: boom"),
    ],
)
def test_a_bad_target_is_named(shell: Shell, target: str, words: str) -> None:
    shell.write("broken.py", "print('spoils stdout')\nraise RuntimeError('boom')\n")
    done = shell.run("run", target, "three.jsonl")
    done.stderr = done.stderr.removeprefix("spoils stdout\n")
    assert_told(done, 2, words)


@pytest.mark.parametrize("option", ["--workers", "--retries"])
def test_numbers_out_of_range_are_bad_usage(shell: Shell, option: str) -> None:
    value = "0" if option == "--workers" else "-1"
    assert_told(shell.run("run", "tiles:double", "three.jsonl", option, value), 2, option)


def test_an_output_that_holds_something_is_kept(shell: Shell) -> None:
    path = shell.write("out.jsonl", "precious\n")
    assert_told(shell.run("run", "tiles:double", "three.jsonl", "--output", "out.jsonl"), 2, "not empty")
    assert path.read_text() == "precious\n"


def test_a_missing_client_id_exits_3(shell: Shell) -> None:
    assert_told(shell.run("run", "tiles:double", "three.jsonl"), 3, "no client id", "SH_CLIENT_ID")


def test_a_missing_secret_exits_3(shell: Shell) -> None:
    done = shell.run("run", "tiles:double", "three.jsonl", "--client-id", "invented")
    assert_told(done, 3, "no client secret for invented", "SH_CLIENT_SECRET")


def test_wrong_credentials_exit_3_and_leave_no_output(shell: Shell, server: LoopbackServer) -> None:
    options = shell.log_in_at(server)
    shell.write("secret", "invented-and-wrong\n")
    options += ["--client-secret-file", "secret", "--output", "out.jsonl"]
    done = shell.run("run", "tiles:double", "three.jsonl", *options)
    assert_told(done, 3, "refused client 'demo-client' (invalid_client)")
    assert "invented-and-wrong" not in done.stderr
    assert not (shell.folder / "out.jsonl").exists()
    assert server.token_requests == 1, "a refusal is final"


def test_an_unreachable_endpoint_is_given_up_and_exits_3(shell: Shell, server: LoopbackServer) -> None:
    options = shell.log_in_at(server)
    server.refuse_connections()
    done = shell.run("run", "tiles:double", "three.jsonl", *options)
    assert_told(done, 3, server.token_url)


def test_a_passing_trouble_at_the_first_login_is_survived(shell: Shell, server: LoopbackServer) -> None:
    options = shell.log_in_at(server)
    server.fail_next(1, 503)
    done = shell.run("run", "tiles:double", "three.jsonl", "-w", "1", *options)
    assert done.returncode == 0, done.stderr
    assert server.logins == 1


def test_a_secret_from_a_file_will_do(shell: Shell, server: LoopbackServer) -> None:
    shell.write("secret", f"{server.client_secret}\n")
    options = ["--token-url", server.token_url, "--client-id", server.client_id, "--client-secret-file", "secret"]
    assert shell.run("run", "tiles:double", "three.jsonl", "-w", "1", *options).returncode == 0


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated"), (signal.SIGHUP, 129, "hung up")],
)
def test_a_stopped_run_keeps_its_results_and_leaves_no_process(
    shell: Shell, server: LoopbackServer, number: signal.Signals, code: int, word: str
) -> None:
    options = ["-w", "2", "--output", "out.jsonl", *shell.log_in_at(server)]
    shell.write("many.jsonl", "".join(f"{n}\n" for n in range(50)))
    out = shell.folder / "out.jsonl"
    with shell.start("run", "tiles:linger", "many.jsonl", *options) as process:
        wait_for(lambda: out.exists() and bool(out.read_text()) and (shell.folder / "begun-2").exists())
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        stdout, stderr = end(process)
    assert process.returncode == code
    assert stdout == ""
    assert stderr.startswith(f"{word}: 1 of 50 jobs, 0 failed, 1 login, 0 refreshes, ")
    assert len(stderr.splitlines()) == 1
    assert [record["result"] for record in records(out.read_text())] == [0]
    assert not psutil.wait_procs(workers, timeout=PATIENCE)[1]
    assert not (shell.folder / "begun-20").exists()


def test_a_reader_that_leaves_ends_the_run(shell: Shell, server: LoopbackServer) -> None:
    """As in ``shpool run ... | head -1``."""
    shell.write("many.jsonl", "".join(f"{n}\n" for n in range(2000)))
    with shell.start("run", "tiles:fail_odd", "many.jsonl", "-w", "1", *shell.log_in_at(server)) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        stderr = process.stderr.read()
        process.wait(PATIENCE)
    assert process.returncode == 1
    assert "Traceback" not in stderr
    assert "error: cannot write results to standard output: Broken pipe" in stderr


def test_a_full_disk_is_told_once(shell: Shell, server: LoopbackServer) -> None:
    done = shell.sh('"$@" >/dev/full', "run", "tiles:length", "jobs.txt", "-w", "1", *shell.log_in_at(server))
    assert done.returncode == 2, "there is no jobs.txt yet"
    shell.write("jobs.txt", "abc\n")
    done = shell.sh('"$@" >/dev/full', "run", "tiles:length", "jobs.txt", "-w", "1", *shell.log_in_at(server))
    lines = done.stderr.splitlines()
    assert done.returncode == 1
    assert lines[0] == "error: cannot write results to standard output: No space left on device"
    assert [line.split()[0] for line in lines[1:]] == ["hint:", "0"]


def test_a_summary_that_cannot_be_written_fails_the_run(shell: Shell, server: LoopbackServer) -> None:
    options = ["-w", "1", "--json", "--output", "out.jsonl", *shell.log_in_at(server)]
    done = shell.sh('"$@" >/dev/full', "run", "tiles:double", "three.jsonl", *options)
    assert done.returncode == 1
    assert "error: standard output cannot be written: No space left on device" in done.stderr
    assert "bug" not in done.stderr


def test_a_closed_stdout_is_no_trouble(shell: Shell, server: LoopbackServer) -> None:
    options = ["-w", "1", "--output", "out.jsonl", *shell.log_in_at(server)]
    done = shell.sh('"$@" >&-', "run", "tiles:length", "-", *options)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_a_lost_worker_names_the_function(shell: Shell, server: LoopbackServer) -> None:
    done = shell.run("run", "tiles:die", "three.jsonl", "-w", "1", *shell.log_in_at(server))
    assert done.returncode == 1
    errors = [record["error"] for record in records(done.stdout)]
    assert all("tiles:die" in error and "TimedCall" not in error for error in errors), errors


def test_the_bar_moves_while_a_job_runs(shell: Shell, server: LoopbackServer) -> None:
    shell.write("one.jsonl", "1\n")
    with shell.start("run", "tiles:linger", "one.jsonl", "-w", "1", "--progress", *shell.log_in_at(server)) as process:
        assert process.stderr is not None
        said = ""
        while not ("00:01<" in said and "00:02<" in said and "token 3" in said):
            piece = process.stderr.read(1)
            assert piece, said
            said += piece
        process.terminate()
        end(process)


def test_the_secret_is_in_no_argument_and_no_environment_of_a_worker(shell: Shell, server: LoopbackServer) -> None:
    with shell.start("run", "tiles:linger", "three.jsonl", "-w", "1", *shell.log_in_at(server)) as process:
        wait_for((shell.folder / "begun-1").exists)
        children = psutil.Process(process.pid).children(recursive=True)
        seen = [
            (child.environ(), child.cmdline())
            for child in children
            if "resource_tracker import main" not in str(child.cmdline())
        ]
        os.kill(process.pid, signal.SIGTERM)
        end(process)
    assert seen
    assert server.client_secret not in str(seen)
