"""`shpool download`: files arrive whole or are named, whatever is wrong with the input, the server or the process."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from cli_shell import Shell, assert_told, records
from patience import PATIENCE, until

from shpool.errors import InputError
from shpool.journal import Journal, JournalView
from shpool.testing import FileFault, tile_bytes
from shpool_cli.filelist import Files
from shpool_cli.filereport import FileSummary, Traffic
from shpool_cli.inputs import Format, Input

if TYPE_CHECKING:
    from collections.abc import Iterable
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


def test_a_dash_is_standard_output(shell: Shell, server: LoopbackServer) -> None:
    shell.write("urls.txt", offer(server, 2)[0])
    done = shell.run("download", "urls.txt", "--to", "./-", "-o", "-", "-w", "1", *shell.log_in_at(server))
    assert len(records(done.stdout)) == 2, done.stderr
    assert sorted(files_in(shell.folder / "-")) == ["t0.tif", "t1.tif"]


def test_a_limit_leaves_the_rest(shell: Shell, server: LoopbackServer) -> None:
    shell.write("urls.txt", offer(server, 5)[0])
    done = shell.run("download", "urls.txt", "--to", "d", "-w", "1", "--limit", "2", *shell.log_in_at(server))
    assert done.returncode == 0, done.stderr
    assert sorted(files_in(shell.folder / "d")) == ["t0.tif", "t1.tif"]


@pytest.mark.parametrize("journal", [[], ["--journal", "run.db"]], ids=["without a journal", "with one"])
def test_a_limit_goes_on_behind_what_was_there(shell: Shell, server: LoopbackServer, journal: list[str]) -> None:
    text, data = offer(server, 7)
    shell.write("urls.txt", text)
    (shell.folder / "d").mkdir()
    (shell.folder / "d" / "t1.tif").write_bytes(data["t1.tif"])
    args = ["download", "urls.txt", "--to", "d", "-w", "1", "--limit", "3", *journal, *shell.log_in_at(server)]
    for there in (4, 7):
        done = shell.run(*args)
        assert done.returncode == 0, done.stderr
        assert sorted(files_in(shell.folder / "d")) == sorted(data)[:there]
        assert ("hint: the same command goes on where this one ended" in done.stderr) is (there < 7)
    assert done.stderr.startswith("7 files, ")
    assert shell.run(*args).stderr.startswith("7 files, ")


def test_overwriting_without_a_journal_does_not_promise_to_go_on(shell: Shell, server: LoopbackServer) -> None:
    shell.write("urls.txt", offer(server, 5)[0])
    args = ["download", "urls.txt", "--to", "d", "-w", "1", "--limit", "2", "--overwrite", *shell.log_in_at(server)]
    for _ in range(2):
        done = shell.run(*args)
        assert sorted(files_in(shell.folder / "d")) == ["t0.tif", "t1.tif"]
        assert "goes on where this one ended" not in done.stderr
        assert done.stderr.endswith(
            "hint: the same command begins anew; with --journal, too, it would go on where it ended\n"
        )


def last_bar(text: str) -> str:
    """Return the bar as it stood in the end."""
    return [line for line in re.split(r"[\r\n]", text) if line.startswith("download ")][-1]


def test_the_bar_tells_bytes(shell: Shell, server: LoopbackServer) -> None:
    shell.write("urls.txt", offer(server, 4)[0])
    done = shell.run("download", "urls.txt", "--to", "d", "-w", "1", "--progress", *shell.log_in_at(server))
    last = last_bar(done.stderr)
    assert "4/4" in last
    assert ", 8.0 kB, " in last
    assert ", failed 0" in last


def test_where_sizes_are_known_the_bar_is_of_bytes(shell: Shell, server: LoopbackServer) -> None:
    urls = offer(server, 4)[0].split()
    shell.write("files.jsonl", jsonl(*({"url": url, "size": 2_000} for url in urls)))
    done = shell.run("download", "files.jsonl", "--to", "d", "-w", "1", "--progress", *shell.log_in_at(server))
    last = last_bar(done.stderr)
    assert "download 100%" in last
    assert "8.00k/8.00k" in last
    assert "4/4 files, failed 0" in last


def test_traffic_counts_what_is_under_way() -> None:
    summary = FileSummary(jobs=5, done=2, failed=1, before=1, bytes=1_500_000)
    known = Traffic(summary, 3_000_000, before=500_000, under_way=lambda: 200_000)
    assert (known.moved(), known.words()) == (2_200_000, ["4/5 files"])
    assert Traffic(summary, under_way=lambda: 200_000).words()[0] == "1.7 MB"


# Lines that name the same file


@pytest.mark.parametrize("journal", [[], ["--journal", "run.db"]], ids=["without a journal", "with one"])
def test_equal_lines_are_fetched_once_and_reported_for_each(
    shell: Shell, server: LoopbackServer, journal: list[str]
) -> None:
    text, data = offer(server, 30)
    missing = f"{server.base_url}/files/missing.tif\n"
    shell.write("urls.txt", f"{text}{missing}{text}{text}{missing}")
    args = ["download", "urls.txt", "--to", "d", "-w", "1", "--retries", "0", *journal, *shell.log_in_at(server)]
    done = shell.run(*args)
    assert done.returncode == 1, done.stderr
    assert files_in(shell.folder / "d") == data
    found = records(done.stdout)
    assert [record["index"] for record in found] == list(range(92))
    assert [found[n]["status"] for n in (30, 91)] == ["failed", "failed"]
    assert [{**found[n], "index": 7} for n in (38, 68)] == [found[7]] * 2
    assert done.stderr.startswith("92 files, 60.0 kB, 2 failed, 1 login, ")
    assert [len(server.file_requests(name)) for name in (*data, "missing.tif")] == [1] * 31


def test_equal_lines_are_known_again_in_the_next_run(shell: Shell, server: LoopbackServer) -> None:
    text, _ = offer(server, 3)
    shell.write("urls.txt", text)
    args = ["download", "urls.txt", "--to", "d", "-w", "1", "--journal", "run.db", *shell.log_in_at(server)]
    assert shell.run(*args).returncode == 0
    (shell.folder / "d" / "t1.tif").unlink()
    shell.write("urls.txt", text * 2)
    done = shell.run(*args, "--json")
    told = json.loads(done.stderr.splitlines()[-1])
    assert (told["jobs"], told["before"], told["done"], told["bytes"]) == (6, 4, 2, 2_000)
    assert [record["index"] for record in records(done.stdout)] == list(range(6))
    assert [len(server.file_requests(f"t{n}.tif")) for n in range(3)] == [1, 2, 1]


def test_the_bar_counts_the_bytes_of_equal_lines_once(shell: Shell, server: LoopbackServer) -> None:
    items = [{"url": server.data_url(n, 2_000), "path": f"{n}.bin", "size": 2_000} for n in range(3)]
    shell.write("i.jsonl", jsonl(*items, *items))
    shell.env["COLUMNS"] = "200"
    args = ["download", "i.jsonl", "--to", "d", "-w", "1", "--progress", *shell.log_in_at(server)]
    assert "| 6.00k/6.00k " in shell.run(*args).stderr


def test_lines_that_differ_and_have_one_path_are_refused(shell: Shell, server: LoopbackServer) -> None:
    url = server.data_url(1, 900)
    item = {"url": url, "path": "a.bin"}
    shell.write("i.jsonl", jsonl(item, item, {**item, "size": 900}))
    words = "i.jsonl, line 3: a.bin: another file of this run has this path"
    assert_told(shell.run("download", "i.jsonl", "--to", "d", *shell.log_in_at(server)), 2, words)


# What is refused before anything is fetched


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("i.txt", "http://127.0.0.1:9/a.tif\nnonsense\n", "i.txt, line 2: it is no URL to fetch"),
        ("i.txt", "http://127.0.0.1:9/a.tif\n\nhttp://127.0.0.1:9/x/a.tif\n", "i.txt, line 3"),
        ("i.jsonl", '{"url": "http://127.0.0.1:9/a", "paht": "x"}\n', "unknown field 'paht'"),
        ("i.jsonl", '{"url": null}\n', "it has no url"),
        ("i.jsonl", '{"url": "http://127.0.0.1:9/a", "path": "../x"}\n', "leaves the folder"),
        ("i.jsonl", '{"url": "http://127.0.0.1:9/a", "size": 1e999}\n', "size Infinity is no number of bytes"),
        ("i.jsonl", '{"url": "http://127.0.0.1:9/a", "size": -1}\n', "line 1: size -1 is no number of bytes"),
        ("i.jsonl", '{"url": "http://127.0.0.1:9/a", "size": 10000.7}\n', "size 10000.7 is no number of bytes"),
        ("i.jsonl", '{"url": "http://127.0.0.1:9/a", "size": "1_0000"}\n', 'size "1_0000" is no number of bytes'),
        ("i.jsonl", '{"url": "http://127.0.0.1:9/a", "size": true}\n', "size true is no number of bytes"),
        ("i.jsonl", '{"url": "http://127.0.0.1:9/a", "md5": 5}\n', "md5 5 is no text"),
        ("i.jsonl", '{"url": "http://127.0.0.1:9/a", "path": 5}\n', "path 5 is no text"),
        ("i.csv", "url,size\nhttp://127.0.0.1:9/a,x\n", 'i.csv, line 2: size "x" is no number of bytes'),
        (
            "i.jsonl",
            '"http://127.0.0.1:9/a"\n{"url": "http://api.example/a"}\n',
            "line 2: the token is not sent to api.example",
        ),
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


def test_hosts_that_get_no_token_may_be_asked_over_any_connection() -> None:
    """Which these are the session says; it names none where any host may have it."""
    text = (
        b"https://open.example/a.tif\nhttp://localhost:9/b.tif\nhttp://open.example/c.tif\nhttp://other.example/d.tif\n"
    )
    files = Files(Input(io.BytesIO(text), "urls.txt", Format.TEXT), "downloads")
    files.check()
    files.check_connections(["api.example"])
    for hosts, line in (([], 3), (["other.example"], 4)):
        with pytest.raises(InputError, match=f"urls.txt, line {line}: the token is not sent to .*; use https"):
            files.check_connections(hosts)
    assert files.count == 4


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
        ("--to", "-"),
        ("--to", ""),
        ("--output", "new/"),
        ("--journal", "u.txt"),
    ],
)
def test_wrong_values_are_bad_usage(shell: Shell, server: LoopbackServer, option: str, value: str) -> None:
    shell.write("u.txt", f"{server.data_url(1)}\n")
    login = shell.log_in_at(server)
    assert_told(shell.run("download", "u.txt", "--to", "d", *login, option, value), 2, value)
    assert server.requests == 0


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--output", "out.gz"], 2),
        (["--output", "."], 2),
        (["--output", "u.txt"], 2),
        (["--output", "new/folder/out.gz"], 2),
        (["--journal", ""], 2),
        (["--journal", "nowhere/run.db"], 2),
        (["--journal", "other"], 2),
        (["--client-secret-file", "nowhere"], 2),
        (["--client-secret-file", "other"], 3),
        (["--scope", ""], 2),
        (["--profile", "nope"], 2),
        (["--client-id", ""], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_a_refused_command_leaves_no_folder(
    shell: Shell, server: LoopbackServer, options: list[str], code: int
) -> None:
    """Those that were there stay, of course."""
    shell.write("u.txt", f"{server.data_url(1)}\n")
    shell.write("other", "no journal, and no secret\n")
    (shell.folder / "there").mkdir()
    before = {path.name for path in shell.folder.iterdir()}
    login = shell.log_in_at(server)
    for folder in ("new/folder", "there"):
        assert_told(shell.run("download", "u.txt", "--to", folder, *login, *options), code)
        assert {path.name for path in shell.folder.iterdir()} == before


def test_output_and_journal_may_lie_in_a_folder_that_is_made_for_the_files(
    shell: Shell, server: LoopbackServer
) -> None:
    shell.write("u.txt", offer(server, 2)[0])
    ends = ["--output", "a/b/out.jsonl", "--journal", "a/b/run.db"]
    done = shell.run("download", "u.txt", "--to", "a/b", "-w", "1", *ends, *shell.log_in_at(server))
    assert done.returncode == 0, done.stderr
    assert set(files_in(shell.folder / "a" / "b")) == {"out.jsonl", "run.db", "t0.tif", "t1.tif"}


def test_more_transfers_than_there_are_descriptors_are_bad_usage(shell: Shell, server: LoopbackServer) -> None:
    shell.write("u.txt", f"{server.data_url(1)}\n")
    args = ["download", "u.txt", "--to", "d", *shell.log_in_at(server), "--transfers", "1200"]
    done = shell.sh('ulimit -n 1024; exec "$@"', *args)
    assert_told(done, 2, "--transfers 1200", "give at most 256, or raise the limit: ulimit -n 2912")
    assert server.requests == 0
    assert not (shell.folder / "d").exists()


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
    assert "halted after 1 failed file: " in done.stderr
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


def test_a_run_does_not_replace_what_it_reads_and_writes_itself(shell: Shell, server: LoopbackServer) -> None:
    """Whoever chose the name: the list of files, or the server."""
    own = ["urls.jsonl", "out.jsonl", "run.db", "run.db-wal", "run.db.lock", "link.jsonl"]
    urls = [server.put_file(name, b"anything") for name in own]
    urls.append(server.put_file("late", b"any", {"Content-Disposition": 'attachment; filename="urls.jsonl"'}))
    text, data = offer(server, 1)
    path = shell.write("urls.jsonl", jsonl(*({"url": url} for url in [*urls, text.strip()])))
    (shell.folder / "link.jsonl").symlink_to("urls.jsonl")
    content = path.read_text()
    args = ["--to", ".", "--output", "out.jsonl", "--journal", "run.db", "--overwrite", "--retries", "0", "-w", "1"]
    done = shell.run("download", "link.jsonl", *args, *shell.log_in_at(server))
    assert done.returncode == 1, done.stderr
    assert "the run itself reads or writes this file; give the download another path" in done.stderr
    assert path.read_text() == content
    assert (shell.folder / "link.jsonl").is_symlink()
    found = records((shell.folder / "out.jsonl").read_text())
    assert [record["status"] for record in found] == ["failed"] * 7 + ["done"]
    assert all("TargetPathError: " in record["error"] for record in found[:7])
    assert (shell.folder / "t0.tif").read_bytes() == data["t0.tif"]
    assert JournalView(shell.folder / "run.db").summary().failed == 7


@pytest.mark.parametrize("end", [["--max-time", "2"], ["--halt", "soon"]])
def test_files_that_wait_for_leave_are_not_asked_for_once_a_run_is_to_end(
    shell: Shell, server: LoopbackServer, end: list[str]
) -> None:
    missing = f"{server.base_url}/files/missing.tif\n"
    shell.write("u.txt", missing + offer(server, 9)[0])
    args = ["download", "u.txt", "--to", "d", "-w", "1", "--transfers", "24", "--rate", "1/min", *end]
    done = shell.run(*args, *shell.log_in_at(server))
    assert done.returncode == 1, done.stderr
    assert len([target for _, target, _ in server.log if target.startswith("/files/")]) <= 1


def test_files_that_wait_in_a_group_have_not_begun(shell: Shell, server: LoopbackServer) -> None:
    text, _ = offer(server, 30)
    shell.write("u.txt", text)
    args = ["download", "u.txt", "--to", "d", "-w", "1", "--transfers", "2", "--journal", "run.db"]
    args += ["--stall-timeout", "600", *shell.log_in_at(server)]
    for name in ("t2.tif", "t3.tif"):
        server.fail_file(name, FileFault(stall_at=100))
    with shell.start(*args) as process:
        until(lambda: all(server.file_requests(name) for name in ("t0.tif", "t1.tif", "t2.tif", "t3.tif")))
        until((shell.folder / "d" / "t1.tif").exists)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, stderr
    assert "2 cut off" in shell.run("status", "run.db").stdout
    assert statuses(shell) == {"done": 2, "running": 2}


def statuses(shell: Shell) -> dict[str, int]:
    """Return how many rows of the journal have which status."""
    with contextlib.closing(sqlite3.connect(shell.folder / "run.db")) as journal:
        return dict(journal.execute("SELECT status, count(*) FROM jobs GROUP BY status").fetchall())


def test_overwriting_leaves_what_waits_in_a_group_as_it_was(shell: Shell, server: LoopbackServer) -> None:
    text, data = offer(server, 8, 5_000)
    shell.write("u.txt", text)
    args = ["download", "u.txt", "--to", "d", "-w", "1", "--transfers", "2", "--journal", "run.db"]
    args += ["--stall-timeout", "600", *shell.log_in_at(server)]
    assert shell.run(*args).returncode == 0
    for name in ("t0.tif", "t1.tif"):
        server.fail_file(name, FileFault(stall_at=3_000))
    with start(shell, *args, "--overwrite") as process:
        try:
            until(lambda: statuses(shell) == {"done": 6, "running": 2})
        finally:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=PATIENCE)
    assert shell.run(*args).returncode == 0
    assert times_asked(server, data)[2:] == [1] * 6


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


def times_asked(server: LoopbackServer, names: Iterable[str]) -> list[int]:
    return [len(server.file_requests(name)) for name in names]


def test_files_that_are_done_are_fetched_anew_where_asked(shell: Shell, server: LoopbackServer) -> None:
    text, data = offer(server, 4)
    shell.write("u.txt", text + text)
    args = ["download", "u.txt", "--to", "d", "-w", "1", "--journal", "run.db", *shell.log_in_at(server)]
    args += ["--output", "out.jsonl"]
    assert shell.run(*args).returncode == 0
    (shell.folder / "d" / "t1.tif").write_bytes(bytes(2_000))
    (shell.folder / "d" / "t2.tif").unlink()
    only_failed = shell.run(*args, "--overwrite", "--only-failed")
    assert (only_failed.returncode, times_asked(server, data)) == (0, [1] * 4), only_failed.stderr
    for times in (2, 3):
        done = shell.run(*args, "--overwrite")
        assert done.returncode == 0, done.stderr
        assert done.stderr.startswith("8 files, 8.0 kB, 0 failed, 1 login, ")
        assert files_in(shell.folder / "d") == data
        assert times_asked(server, data) == [times] * 4
        assert [record["index"] for record in records((shell.folder / "out.jsonl").read_text())] == list(range(8))
    assert ", 8 done before, 0 logins" in shell.run(*args).stderr


def test_overwriting_goes_on_where_it_was_killed(shell: Shell, server: LoopbackServer) -> None:
    """What it has fetched is not fetched again; what a former run has done is."""
    text, data = offer(server, 5)
    shell.write("u.txt", text)
    args = ["download", "u.txt", "--to", "d", "-w", "1", "--transfers", "1", "--journal", "run.db"]
    args += shell.log_in_at(server)
    assert shell.run(*args).returncode == 0
    server.fail_file("t2.tif", FileFault(stall_at=100))
    with start(shell, *args, "--overwrite") as process:
        try:
            until(lambda: len(server.file_requests("t2.tif")) == 2)
            until(lambda: JournalView(shell.folder / "run.db").summary().runs[-1].done == 2)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=PATIENCE)
    assert "--overwrite" in resuming(shell)
    again = shell.run(*args, "--overwrite")
    assert again.returncode == 0, again.stderr
    assert ", 2 done before, " in again.stderr
    assert times_asked(server, data) == [2, 2, 3, 2, 2]
    assert files_in(shell.folder / "d") == data


def test_a_former_run_may_be_called_anything(shell: Shell, server: LoopbackServer) -> None:
    """A program that uses the library calls it what it likes."""
    text, data = offer(server, 1)
    shell.write("u.txt", text)
    with Journal(shell.folder / "run.db", f"download to {shell.folder / 'd'}", command="it's mine") as journal:
        journal.note(reason="cut short")
    args = ["--overwrite", "--journal", "run.db", *shell.log_in_at(server)]
    done = shell.run("download", "u.txt", "--to", "d", "-w", "1", *args)
    assert done.returncode == 0, done.stderr
    assert files_in(shell.folder / "d") == data


def test_overwriting_by_limits_goes_on_and_begins_again_once_all_is_done(shell: Shell, server: LoopbackServer) -> None:
    text, data = offer(server, 3)
    shell.write("u.txt", text)
    args = ["download", "u.txt", "--to", "d", "-w", "1", "--journal", "run.db", *shell.log_in_at(server)]
    assert shell.run(*args).returncode == 0
    for times in ([2, 2, 1], [2, 2, 2], [3, 3, 2]):
        done = shell.run(*args, "--overwrite", "--limit", "2")
        assert (done.returncode, times_asked(server, data)) == (0, times), done.stderr
    assert "with exit code 0: --limit is reached" in shell.run("status", "run.db").stdout


def test_what_failed_to_be_overwritten_is_resumed_without_the_others(shell: Shell, server: LoopbackServer) -> None:
    """The file that is there in the place of what failed is not taken for it, though its size is right."""
    text, data = offer(server, 2)
    shell.write("u.txt", text)
    (shell.folder / "d").mkdir()
    for name in data:
        (shell.folder / "d" / name).write_bytes(bytes(2_000))
    args = ["download", "u.txt", "--to", "d", "-w", "1", "--journal", "run.db", *shell.log_in_at(server), "--overwrite"]
    server.fail_file("t1.tif", FileFault(status=404))
    assert shell.run(*args).returncode == 1
    assert "--overwrite" in resuming(shell)
    done = shell.run(*args)
    assert done.stderr.startswith("2 files, 2.0 kB, 0 failed, 1 done before, "), done.stderr
    assert times_asked(server, data) == [1, 2]
    assert files_in(shell.folder / "d") == data
    assert shell.run(*args).returncode == 0
    assert times_asked(server, data) == [2, 3]


def resuming(shell: Shell) -> str:
    """Return the command that the journal's report offers."""
    [line] = [line for line in shell.run("status", "run.db").stdout.splitlines() if line.startswith("resume:")]
    return line


def test_fresh_can_be_repeated_with_the_same_output(shell: Shell, server: LoopbackServer) -> None:
    text, data = offer(server, 2)
    shell.write("u.txt", text)
    args = ["download", "u.txt", "--to", "d", "-w", "1", "--journal", "run.db", *shell.log_in_at(server)]
    for _ in range(2):
        done = shell.run(*args, "--output", "out.jsonl", "--fresh")
        assert done.returncode == 0, done.stderr
        assert [record["index"] for record in records((shell.folder / "out.jsonl").read_text())] == [0, 1]
    assert ", 2 were there (2 by size alone), " in done.stderr
    assert files_in(shell.folder / "d") == data


def test_a_fresh_run_that_is_killed_between_journal_and_output_is_gone_on_with(
    shell: Shell, server: LoopbackServer
) -> None:
    first, second = offer(server, 2)[0].split()
    args = ["download", "u.txt", "--to", "d", "-w", "1", "--journal", "run.db", "--output", "out.csv"]
    args += shell.log_in_at(server)
    shell.write("u.txt", first)
    assert shell.run(*args).returncode == 0
    shell.write("u.txt", second)
    with shell.killed_at("shpool_cli.output.results", "ResultWriter.catch_up"):
        assert shell.run(*args, "--fresh").returncode == -signal.SIGKILL
    done = shell.run(*args)
    assert done.returncode == 0, done.stderr
    assert "t1.tif" in (shell.folder / "out.csv").read_text()


def test_nothing_left_needs_no_credentials(shell: Shell, server: LoopbackServer) -> None:
    shell.write("u.txt", offer(server, 3)[0])
    args = ["download", "u.txt", "--to", "d", "-w", "1", "--journal", "run.db", *shell.log_in_at(server)]
    assert shell.run(*args).returncode == 0
    del shell.env["SH_CLIENT_ID"], shell.env["SH_CLIENT_SECRET"]
    again = shell.run(*args)
    assert again.returncode == 0, again.stderr
    assert again.stderr.startswith("3 files, 0 B, 0 failed, 3 done before, 0 logins")
    assert server.logins == 1


def test_a_resumed_run_without_credentials_changes_no_output(shell: Shell, server: LoopbackServer) -> None:
    shell.write("u.txt", offer(server, 2)[0])
    args = ["download", "u.txt", "--to", "d", "-w", "1", "--journal", "run.db", "--output", "out.jsonl"]
    args += shell.log_in_at(server)
    assert shell.run(*args).returncode == 0
    results = (shell.folder / "out.jsonl").read_text()
    (shell.folder / "d" / "t1.tif").unlink()
    del shell.env["SH_CLIENT_ID"]
    assert_told(shell.run(*args), 3, "no client id")
    assert (shell.folder / "out.jsonl").read_text() == results


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


def test_a_list_that_is_emptied_during_a_run_ends_it_and_no_half_url_is_fetched(
    shell: Shell, server: LoopbackServer
) -> None:
    """What was under way comes to its end."""
    urls = [server.put_file(f"{'n' * 200}{number}.tif", b"content") for number in range(700)]
    slow = server.put_file("slow.tif", content(2_000_000))
    server.fail_file("slow.tif", FileFault(stall_at=1_000_000))
    path = shell.write("urls.txt", "\n".join([slow, *urls]))
    args = ["download", "urls.txt", "--to", "d", "-w", "1", "--transfers", "1", "--retries", "0"]
    with shell.start(*args, "--stall-timeout", "3", *shell.log_in_at(server)) as process:
        until((shell.folder / "d" / "slow.tif.part").exists)
        path.write_text("")
        stdout, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2, stderr
    assert "error: urls.txt: it was changed during the run\n" in stderr
    assert "hint: the same command goes on" in stderr
    found = records(stdout)
    assert [record["index"] for record in found] == list(range(len(found)))
    assert len(found) < 701
    assert [record["status"] for record in found] == ["failed", *["done"] * (len(found) - 1)]


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
