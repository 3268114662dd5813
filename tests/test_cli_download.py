"""`shpool download`: files arrive whole or are named, whatever is wrong with the input, the server or the process."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sqlite3
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from cli_shell import Shell, assert_told, records
from patience import PATIENCE, until

from shpool.testing import FileFault, tile_bytes
from shpool_cli.filereport import FileSummary, Traffic

if TYPE_CHECKING:
    from pathlib import Path

    from shpool.testing import LoopbackServer

pytestmark = pytest.mark.slow


@pytest.fixture
def shell(tmp_path: Path, child_env: dict[str, str]) -> Shell:
    return Shell(tmp_path, child_env)


def content(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def jsonl(*items: dict[str, Any]) -> str:
    return "".join(f"{json.dumps(item)}\n" for item in items)


def offer(server: LoopbackServer, count: int, size: int = 2_000) -> tuple[str, dict[str, bytes]]:
    """Offer files; return a list of their URLs and what the folder has to hold in the end."""
    data = {f"t{n}.tif": content(size, n) for n in range(count)}
    return "".join(f"{server.put_file(name, data[name])}\n" for name in data), data


# The usual way


def test_urls_of_a_text_become_files_and_a_summary(shell: Shell, server: LoopbackServer) -> None:
    text, data = offer(server, 30)
    shell.write("urls.txt", text)
    done = shell.run("download", "urls.txt", "--to", "d", "-w", "2", *shell.log_in_at(server))
    assert done.returncode == 0, done.stderr
    assert files_in(shell.folder / "d") == data
    found = records(done.stdout)
    assert [record["result"]["bytes"] for record in found] == [2_000] * 30
    assert found[3]["result"]["path"] == str(shell.folder / "d" / "t3.tif")
    assert done.stderr.startswith("30 files, 60.0 kB, 0 failed, 1 login, 0 refreshes, ")
    assert server.logins == 1


def test_records_say_path_size_and_checksum(shell: Shell, server: LoopbackServer) -> None:
    url = server.data_url(1, 5_000)
    digest = hashlib.sha256(tile_bytes(1, 5_000)).hexdigest()
    shell.write("items.csv", f"url,path,size,sha256,md5\n{url},a/b.bin,5000,{digest},\n")
    done = shell.run("download", "items.csv", "--to", "d", "-w", "1", *shell.log_in_at(server))
    assert done.returncode == 0, done.stderr
    assert files_in(shell.folder / "d") == {"a/b.bin": tile_bytes(1, 5_000)}


def test_the_summary_is_an_object_where_asked(shell: Shell, server: LoopbackServer) -> None:
    shell.write("urls.txt", offer(server, 3)[0])
    args = ["download", "urls.txt", "--to", "d", "-w", "1", "--output", "out.jsonl", "--json"]
    done = shell.run(*args, *shell.log_in_at(server))
    told = json.loads(done.stdout)
    assert (told["jobs"], told["done"], told["bytes"], told["received"], told["logins"]) == (3, 3, 6_000, 6_000, 1)
    assert len(records((shell.folder / "out.jsonl").read_text())) == 3


def test_right_files_that_are_there_are_not_fetched_again(shell: Shell, server: LoopbackServer) -> None:
    text, _ = offer(server, 6)
    shell.write("urls.txt", text)
    args = ["download", "urls.txt", "--to", "d", "-w", "1", *shell.log_in_at(server)]
    assert shell.run(*args).returncode == 0
    sent = server.bytes_sent
    done = shell.run(*args, "--json")
    told = json.loads(done.stderr.splitlines()[-1])
    assert (done.returncode, told["present"], told["by_size"], told["received"]) == (0, 6, 6, 0)
    assert server.bytes_sent == sent
    done = shell.run(*args)
    assert ", 6 were there (6 by size alone), " in done.stderr
    assert all(record["result"]["by_size"] for record in records(done.stdout))


def test_a_limit_leaves_the_rest(shell: Shell, server: LoopbackServer) -> None:
    shell.write("urls.txt", offer(server, 5)[0])
    done = shell.run("download", "urls.txt", "--to", "d", "-w", "1", "--limit", "2", *shell.log_in_at(server))
    assert done.returncode == 0, done.stderr
    assert sorted(files_in(shell.folder / "d")) == ["t0.tif", "t1.tif"]


def test_the_bar_tells_bytes(shell: Shell, server: LoopbackServer) -> None:
    shell.write("urls.txt", offer(server, 4)[0])
    shell.env["COLUMNS"] = "200"
    done = shell.run("download", "urls.txt", "--to", "d", "-w", "1", "--progress", *shell.log_in_at(server))
    assert "4/4" in done.stderr
    assert "8.0 kB, " in done.stderr
    assert "failed 0" in done.stderr


def test_traffic_says_how_much_of_all_has_come() -> None:
    words = Traffic(FileSummary(bytes=1_500_000), 3_000_000)()
    assert words.startswith("1.5 MB/3.0 MB, ")


# What is refused before anything is fetched


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("i.txt", "http://127.0.0.1:9/a.tif\nnonsense\n", "i.txt, line 2: it is no URL to fetch"),
        ("i.txt", "http://127.0.0.1:9/a.tif\n\nhttp://127.0.0.1:9/x/a.tif\n", "i.txt, line 3"),
        ("i.jsonl", '{"url": "http://127.0.0.1:9/a", "paht": "x"}\n', "unknown field 'paht'"),
        ("i.jsonl", '{"url": null}\n', "it has no url"),
        ("i.jsonl", '{"url": "http://127.0.0.1:9/a", "path": "../x"}\n', "leaves the folder"),
        ("i.jsonl", '{"url": "http://127.0.0.1:9/a", "size": 1e999}\n', "infinity"),
        ("i.jsonl", '{"url": "http://127.0.0.1:9/a", "size": -1}\n', "line 1: size -1"),
        ("i.jsonl", "[]\n", "it names no file"),
        ("i.csv", "url,sha256\nhttp://127.0.0.1:9/a,abc\n", "i.csv, line 2: sha256 is 64 hex digits"),
        ("i.csv", "path\nx\n", "it has no url"),
    ],
)
def test_a_line_that_will_not_do_is_named(
    shell: Shell, server: LoopbackServer, name: str, text: str, words: str
) -> None:
    shell.write(name, text)
    assert_told(shell.run("download", name, "--to", "d", *shell.log_in_at(server)), 2, words)
    assert server.token_requests == 0
    assert not (shell.folder / "d").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--workers", "0"),
        ("--transfers", "0"),
        ("--connections", "0"),
        ("--connections", "1000000"),
        ("--rate", "banana"),
        ("--rate", "0/s"),
        ("--units", "-3/min"),
        ("--gate", "cds"),
        ("--retries", "-1"),
        ("--timeout", "0"),
        ("--stall-timeout", "0"),
        ("--max-time", "soon"),
        ("--limit", "none"),
        ("--halt", "later"),
        ("--format", "xml"),
        ("--ca-bundle", "nowhere.pem"),
        ("--output", "nowhere/out.jsonl"),
        ("--journal", "nowhere/run.db"),
        ("--to", "u.txt"),
        ("--journal", "u.txt"),
    ],
)
def test_wrong_values_are_bad_usage(shell: Shell, server: LoopbackServer, option: str, value: str) -> None:
    shell.write("u.txt", f"{server.data_url(1)}\n")
    login = shell.log_in_at(server)
    assert_told(shell.run("download", "u.txt", "--to", "d", *login, option, value), 2, value)
    assert server.requests == 0


@pytest.mark.parametrize("options", [["--fresh"], ["--only-failed"], ["--journal", "j.db", "--fresh", "--only-failed"]])
def test_options_that_make_no_sense_are_bad_usage(shell: Shell, options: list[str]) -> None:
    shell.write("u.txt", "http://127.0.0.1:9/a.tif\n")
    assert_told(shell.run("download", "u.txt", "--to", "d", *options), 2, options[-1].removeprefix("--"))


def test_a_missing_folder_option_is_bad_usage(shell: Shell) -> None:
    assert_told(shell.run("download", "u.txt"), 2, "--to")


def test_wrong_credentials_exit_3(shell: Shell, server: LoopbackServer) -> None:
    shell.write("u.txt", f"{server.data_url(1)}\n")
    shell.write("secret", "invented-and-wrong\n")
    login = [*shell.log_in_at(server), "--client-secret-file", "secret"]
    done = shell.run("download", "u.txt", "--to", "d", *login)
    assert_told(done, 3, "refused client")
    assert "invented-and-wrong" not in done.stderr


# What goes wrong on the way


def test_a_page_in_place_of_data_is_refused_and_named(shell: Shell, server: LoopbackServer) -> None:
    page = b"<html>log in first</html>"
    shell.write("u.txt", server.put_file("t.tif", page, {"Content-Type": "text/html"}) + "\n")
    done = shell.run("download", "u.txt", "--to", "d", "-w", "1", "--retries", "0", *shell.log_in_at(server))
    assert done.returncode == 1
    assert "text/html in place of data" in records(done.stdout)[0]["error"]
    assert files_in(shell.folder / "d") == {}
    assert done.stderr.startswith("1 file, 0 B, 1 failed, ")


def test_a_wrong_checksum_fails_its_file_alone(shell: Shell, server: LoopbackServer) -> None:
    items = [
        {"url": server.data_url(n, 900), "path": f"{n}.bin", "sha256": "0" * 64 if n == 1 else None} for n in (0, 1)
    ]
    shell.write("i.jsonl", jsonl(*items))
    done = shell.run("download", "i.jsonl", "--to", "d", "-w", "1", "--retries", "0", *shell.log_in_at(server))
    assert done.returncode == 1
    assert [record["status"] for record in records(done.stdout)] == ["done", "failed"]
    assert files_in(shell.folder / "d") == {"0.bin": tile_bytes(0, 900)}


def test_signatures_in_urls_are_in_no_output_and_no_journal(shell: Shell, server: LoopbackServer) -> None:
    url = server.put_file("s.tif", b"data")
    shell.write("u.txt", f"{url}?signature=invented-canary\n")
    args = ["download", "u.txt", "--to", "d", "-w", "1", "--journal", "run.db", "--output", "out.jsonl"]
    done = shell.run(*args, *shell.log_in_at(server))
    assert done.returncode == 0, done.stderr
    texts = [path.read_bytes() for path in shell.folder.glob("run.db*")] + [(shell.folder / "out.jsonl").read_bytes()]
    assert not any(b"invented-canary" in text for text in texts)
    assert "invented-canary" not in done.stdout + done.stderr


def test_a_halt_ends_the_run(shell: Shell, server: LoopbackServer) -> None:
    urls = [f"{server.base_url}/files/missing{n}.tif" for n in range(200)]
    shell.write("u.txt", "\n".join(urls))
    args = ["-w", "1", "--transfers", "1", "--halt", "soon", "--journal", "run.db", *shell.log_in_at(server)]
    done = shell.run("download", "u.txt", "--to", "d", *args)
    assert done.returncode == 1
    assert "halted after 1 failed" in done.stderr
    assert 0 < len(records(done.stdout)) < 200


def test_a_file_that_takes_too_long_fails_alone_and_says_so(shell: Shell, server: LoopbackServer) -> None:
    text, data = offer(server, 3)
    shell.write("u.txt", text)
    server.fail_file("t1.tif", FileFault(stall_at=100))
    args = ["download", "u.txt", "--to", "d", "-w", "1", "--timeout", "3", "--retries", "0", *shell.log_in_at(server)]
    done = shell.run(*args)
    assert done.returncode == 1
    assert "error: DownloadTimeoutError in 1 file, first in file 1: " in done.stderr
    assert "it took longer than 3 s; raise the timeout" in done.stderr
    assert set(files_in(shell.folder / "d")) >= {"t0.tif", "t2.tif"}
    assert shell.run(*args).returncode == 0
    assert files_in(shell.folder / "d") == data


def test_a_time_limit_ends_the_run(shell: Shell, server: LoopbackServer) -> None:
    shell.write("u.txt", offer(server, 40)[0])
    server.delay(0.2, at="data")
    args = ["-w", "1", "--transfers", "1", "--max-time", "0.5", *shell.log_in_at(server)]
    done = shell.run("download", "u.txt", "--to", "d", *args)
    assert done.returncode == 1
    assert "stopped after --max-time" in done.stderr
    assert "hint: the same command goes on" in done.stderr


# Going on


def test_a_journal_spares_what_is_done(shell: Shell, server: LoopbackServer) -> None:
    text, data = offer(server, 8)
    shell.write("u.txt", text)
    server.fail_file("t3.tif", FileFault(status=404))
    args = ["download", "u.txt", "--to", "d", "-w", "1", "--journal", "run.db", *shell.log_in_at(server)]
    first = shell.run(*args, "--output", "out.jsonl")
    assert (first.returncode, first.stdout) == (1, "")
    second = shell.run(*args, "--output", "out.jsonl")
    assert second.returncode == 0, second.stderr
    assert "7 done before" in second.stderr
    assert files_in(shell.folder / "d") == data
    found = records((shell.folder / "out.jsonl").read_text())
    assert [(record["index"], record["status"]) for record in found] == [(n, "done") for n in range(8)]
    assert [len(server.file_requests(name)) for name in data] == [2 if name == "t3.tif" else 1 for name in data]


def test_a_done_file_that_is_gone_or_has_changed_is_fetched_anew(shell: Shell, server: LoopbackServer) -> None:
    text, data = offer(server, 5)
    shell.write("u.txt", text)
    args = ["download", "u.txt", "--to", "d", "-w", "1", "--journal", "run.db", *shell.log_in_at(server)]
    assert shell.run(*args, "--output", "out.jsonl").returncode == 0
    (shell.folder / "d" / "t1.tif").unlink()
    (shell.folder / "d" / "t3.tif").write_bytes(b"cut")
    only_failed = shell.run(*args, "--only-failed")
    assert "2 files that were done are gone or of another size, such as" in only_failed.stderr
    assert len(files_in(shell.folder / "d")) == 4
    done = shell.run(*args, "--output", "out.jsonl")
    assert done.returncode == 0, done.stderr
    assert "t1.tif: fetched anew" in done.stderr
    assert "5 files, 4.0 kB, 2 lost since, 0 failed, 3 done before, " in done.stderr
    assert files_in(shell.folder / "d") == data
    found = records((shell.folder / "out.jsonl").read_text())
    assert sorted(record["index"] for record in found) == list(range(5))
    assert shell.run(*args).stderr.startswith("5 files, 0 B, 0 failed, 5 done before, 0 logins")


def test_nothing_left_needs_no_login(shell: Shell, server: LoopbackServer) -> None:
    shell.write("u.txt", offer(server, 3)[0])
    args = ["download", "u.txt", "--to", "d", "-w", "1", "--journal", "run.db", *shell.log_in_at(server)]
    assert shell.run(*args).returncode == 0
    again = shell.run(*args)
    assert again.returncode == 0, again.stderr
    assert again.stderr.startswith("3 files, 0 B, 0 failed, 3 done before, 0 logins")
    assert server.logins == 1


def test_only_failed_files_are_fetched_where_asked(shell: Shell, server: LoopbackServer) -> None:
    urls = [server.put_file("a.tif", b"a"), f"{server.base_url}/files/b.tif"]
    shell.write("u.txt", "\n".join(urls))
    args = ["download", "u.txt", "--to", "d", "-w", "1", "--journal", "run.db", *shell.log_in_at(server)]
    assert shell.run(*args).returncode == 1
    server.put_file("b.tif", b"b")
    shell.write("u.txt", "\n".join([*urls, server.put_file("c.tif", b"c")]))
    done = shell.run(*args, "--only-failed")
    assert done.returncode == 0, done.stderr
    assert files_in(shell.folder / "d") == {"a.tif": b"a", "b.tif": b"b"}


def test_the_journal_of_another_folder_is_refused(shell: Shell, server: LoopbackServer) -> None:
    shell.write("u.txt", offer(server, 1)[0])
    args = ["download", "u.txt", "-w", "1", "--journal", "run.db", *shell.log_in_at(server)]
    assert shell.run(*args, "--to", "d").returncode == 0
    assert_told(shell.run(*args, "--to", "e"), 2, "it was written for target", "not")


def start(shell: Shell, *args: str) -> subprocess.Popen[str]:
    """Start the command at the head of a process group of its own."""
    pipe = subprocess.PIPE
    return subprocess.Popen(
        shell.command(*args),
        cwd=shell.folder,
        env=shell.env,
        stdout=pipe,
        stderr=pipe,
        text=True,
        start_new_session=True,
    )


def test_a_killed_group_goes_on_where_it_stood(shell: Shell, server: LoopbackServer) -> None:
    text, data = offer(server, 24, 50_000)
    big = content(6_000_000, 99)
    shell.write("u.txt", text + server.put_file("big.tif", big) + "\n")
    server.fail_file("big.tif", FileFault(stall_at=4_000_000))
    args = ["download", "u.txt", "--to", "d", "-w", "2", "--transfers", "2", "--journal", "run.db"]
    args += ["--output", "out.jsonl", *shell.log_in_at(server)]
    part = shell.folder / "d" / "big.tif.part"
    with start(shell, *args) as process:
        try:
            until(lambda: part.exists() and part.stat().st_size >= 3_000_000)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=PATIENCE)
    assert "big.tif" not in files_in(shell.folder / "d")
    done = shell.run(*args)
    assert done.returncode == 0, done.stderr
    assert files_in(shell.folder / "d") == {**data, "big.tif": big}
    assert server.file_requests("big.tif")[-1].headers["range"].startswith("bytes=")
    found = records((shell.folder / "out.jsonl").read_text())
    assert [record["index"] for record in found] == list(range(25))
    with sqlite3.connect(shell.folder / "run.db") as journal:
        assert journal.execute("SELECT status, count(*) FROM jobs GROUP BY status").fetchall() == [("done", 25)]
    journal.close()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_and_the_part_is_kept(
    shell: Shell, server: LoopbackServer, number: signal.Signals, code: int
) -> None:
    shell.write("u.txt", server.put_file("big.tif", content(4_000_000)) + "\n")
    server.fail_file("big.tif", FileFault(stall_at=2_000_000))
    args = ["download", "u.txt", "--to", "d", "-w", "1", "--journal", "run.db", *shell.log_in_at(server)]
    part = shell.folder / "d" / "big.tif.part"
    with shell.start(*args) as process:
        until(lambda: part.exists() and part.stat().st_size >= 1_000_000)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, stderr
    assert "hint: the same command goes on" in stderr
    assert part.exists()
    assert shell.run(*args).returncode == 0
    assert files_in(shell.folder / "d") == {"big.tif": content(4_000_000)}
