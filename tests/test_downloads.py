"""Files arrive whole, once, and nowhere but in their folder, whatever server and network do."""

from __future__ import annotations

import base64
import collections
import errno
import hashlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pytest
from interrupting import interrupted
from patience import NEVER, in_time, until

from shpool import AuthenticatedProcessPool, DownloadResult, OAuthSession, download
from shpool.downloads import FetchGroup, GroupRun, GroupSizer
from shpool.downloads.curling import CurlOptions
from shpool.downloads.fetching import FetchedGroup, GroupNews, close_loop
from shpool.downloads.items import DownloadItem, FetchSettings, PlannedItem, Planner, as_item
from shpool.downloads.partfile import PartFile
from shpool.errors import (
    ContentError,
    DownloadError,
    DownloadTimeoutError,
    InputError,
    InsecureUrlError,
    PartInUseError,
    StorageFullError,
    TargetPathError,
    TransferError,
)
from shpool.retry import Backoff
from shpool.submitting import Submitting
from shpool.testing import FileFault, LoopbackServer, tile_bytes

PATIENCE = 30.0  # s
AT_ONCE = Backoff(base=0.0, cap=0.0)
MB = 1_000_000


def inline_pool(server: LoopbackServer) -> AuthenticatedProcessPool:
    return AuthenticatedProcessPool(
        OAuthSession(server.token_url, server.client_id, server.client_secret), 1, engine="inline"
    )


class Fetch(Protocol):
    """Fetch items into ``tmp_path/d``, without waits between attempts."""

    def __call__(self, *items: Any, **settings: Any) -> list[DownloadResult]: ...


@pytest.fixture
def fetch(server: LoopbackServer, tmp_path: Path) -> Iterator[Fetch]:
    pools = [inline_pool(server)]  # taken out at the end: pytest keeps the fixture, and a pool holds its board

    def run(*items: Any, **settings: Any) -> list[DownloadResult]:
        planner = Planner()
        planned = [planner.plan(index, item) for index, item in enumerate(items)]
        complete = FetchSettings(str(tmp_path / "d"), **{"backoff": AT_ONCE, **settings})
        try:
            return pools[0].submit(FetchGroup(complete), planned).result().results
        finally:
            close_loop()

    yield run
    pools.pop().shutdown()


def content(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def only(results: list[DownloadResult]) -> DownloadResult:
    assert len(results) == 1
    return results[0]


# The usual way


def test_files_arrive_under_their_names_and_nothing_else_does(
    fetch: Fetch, server: LoopbackServer, tmp_path: Path
) -> None:
    data = {f"t{n}.tif": content(n * 40_000, n) for n in range(12)}
    results = fetch(*(server.put_file(name, data[name]) for name in data))
    assert {(result.status, result.error) for result in results} == {("done", None)}
    assert files_in(tmp_path / "d") == data
    assert {result.index: result.bytes for result in results} == {n: n * 40_000 for n in range(12)}
    assert server.logins == 1


@pytest.mark.slow
def test_a_pool_of_processes_fetches_groups(server: LoopbackServer, tmp_path: Path) -> None:
    session = OAuthSession(server.token_url, server.client_id, server.client_secret)
    items = [{"url": server.data_url(n, 3_000), "path": f"{n % 3}/t{n}.bin"} for n in range(150)]
    results = list(download(session, items, tmp_path / "d", max_workers=2))
    assert collections.Counter(result.status for result in results) == {"done": 150}
    assert sorted(result.index for result in results) == list(range(150))
    assert files_in(tmp_path / "d") == {f"{n % 3}/t{n}.bin": tile_bytes(n, 3_000) for n in range(150)}
    assert server.logins == 1


@pytest.mark.slow
def test_results_come_while_another_file_of_their_group_stalls(server: LoopbackServer, tmp_path: Path) -> None:
    urls = [server.put_file(f"t{n}.bin", b"tile" * 1000) for n in range(7)]
    urls.append(server.put_file("slow.bin", b"tile" * 1000))
    server.fail_file("slow.bin", FileFault(stall_at=2_000))
    session = OAuthSession(server.token_url, server.client_id, server.client_secret)
    with AuthenticatedProcessPool(session, 1) as pool:
        results = download(pool, urls, tmp_path, stall_timeout=600.0)
        assert sorted(next(results).index for _ in range(7)) == list(range(7))
        pool.terminate()


@pytest.mark.slow
def test_a_run_that_stops_begins_no_file_any_more(server: LoopbackServer, tmp_path: Path) -> None:
    """The fast ones make the groups grow; of the slow ones only those under way are waited for."""
    urls = [server.put_file(f"t{n}.bin", b"tile") for n in range(42)]
    for n in range(300):
        urls.append(server.put_file(f"slow{n}.bin", b"tile" * 1000))
        server.fail_file(f"slow{n}.bin", FileFault(stall_at=0))
    planner = Planner()
    planned = [planner.plan(index, url) for index, url in enumerate(urls)]
    curl = CurlOptions(connections=2, stall_timeout=0.3)
    fetch = FetchGroup(FetchSettings(str(tmp_path), curl, retries=0))
    session = OAuthSession(server.token_url, server.client_id, server.client_secret)
    with AuthenticatedProcessPool(session, 1) as pool:
        run = GroupRun(pool, fetch, planned)
        results = []
        for result in run:
            results.append(result)
            if result.status == "failed":
                run.stop()
    assert collections.Counter(result.status for result in results)["done"] == 42
    assert len(results) < 100  # the group under way had 128


class HeldPool(Submitting):
    """Keeps what it is given, and lets a test tell what a worker would."""

    max_workers = 1

    def __init__(self) -> None:
        self.held: list[tuple[Future[Any], Any, list[Any]]] = []

    def _running_engine(self) -> Any:
        return types.SimpleNamespace(hears=True, recall=lambda _: None)

    def _submit(self, _fn: Any, args: Any, _kwargs: Any, hear: Any) -> Future[Any]:
        self.held.append((Future(), hear, args[0]))
        return self.held[-1][0]


def test_files_have_begun_once_their_worker_tells_and_not_when_they_are_over(tmp_path: Path) -> None:
    planned = [Planner().plan(index, f"http://127.0.0.1:9/t{index}.bin") for index in range(4)]
    results = [DownloadResult(each.number, each.item.url, None, "failed", 0, 0, 1, 0.0) for each in planned]
    begun: list[Any] = []
    pool = HeldPool()
    run = GroupRun(pool, FetchGroup(FetchSettings(str(tmp_path))), planned, count=4, begun=begun.extend)

    def tell() -> None:
        until(lambda: bool(pool.held))
        future, hear, _ = pool.held[0]
        hear(GroupNews(results[:1], 0, [2]))
        hear(GroupNews([], 0, [0, 3]))  # by a further attempt, which knows of no result
        future.set_result(FetchedGroup(results[1:], 0.0))

    thread = threading.Thread(target=tell)
    thread.start()
    assert list(run) == results
    thread.join()
    assert begun == [planned[2], planned[3]]


def test_a_stop_that_interrupts_another_is_heard_wherever_it_does(tmp_path: Path) -> None:
    """As ^C does while the time of --max-time is up: that one waits for ever, this one for nothing."""

    def ends_where_interrupted(step: int) -> bool:
        pool = HeldPool()
        more: list[bool] = []

        def planned() -> Iterator[PlannedItem]:
            yield Planner().plan(0, "http://127.0.0.1:9/t.bin")
            while not pool.held:
                yield Planner().plan(1, "http://127.0.0.1:9/u.bin")
            pool.held[0][0].set_running_or_notify_cancel()  # it never ends
            more.append(interrupted(run.stop, step, lambda: run.stop(within=0.0)))
            if not more[0]:  # it was not interrupted
                run.stop(within=0.0)

        run = GroupRun(pool, FetchGroup(FetchSettings(str(tmp_path))), planned())
        assert in_time(list, run) == []
        return more[0]

    assert sum(1 for _ in itertools.takewhile(ends_where_interrupted, itertools.count())) > 0


class EveryOtherWasThere(FetchGroup):
    """Fetches nothing: files of an even number were there."""

    def __call__(self, group: Sequence[PlannedItem]) -> FetchedGroup:
        statuses: list[Literal["skipped", "done"]] = ["skipped", "done"]
        results = [
            DownloadResult(each.number, each.item.url, None, statuses[each.number % 2], 0, 0, 1, 0.0) for each in group
        ]
        return FetchedGroup(results, 0.0)


@pytest.mark.parametrize("count", [None, 100])
@pytest.mark.parametrize(
    ("files", "limit", "last"), [(100, 4, 7), (100, 1, 1), (5, 5, 4), (3, 4, 2), (0, 1, None), (100, None, 99)]
)
def test_a_limit_counts_what_was_fetched(
    tmp_path: Path, files: int, limit: int | None, last: int | None, count: int | None
) -> None:
    """Files that were there do not count, or a limit would never get past them; nor is one more handed out."""
    planner, handed_out = Planner(), 0

    def planned() -> Iterator[PlannedItem]:
        nonlocal handed_out
        for number in range(files):
            handed_out += 1
            yield planner.plan(number, f"http://127.0.0.1:9/{number}.bin")

    fetch = EveryOtherWasThere(FetchSettings(str(tmp_path)))
    count = None if count is None else files
    with ThreadPoolExecutor(2) as executor:
        results = list(GroupRun(executor, fetch, planned(), count=count, limit=limit))
    numbers = sorted(result.index for result in results)
    assert numbers == list(range(len(numbers)))
    assert handed_out == len(numbers)
    assert (numbers[-1] if numbers else None) == last
    assert sum(result.status == "done" for result in results) == min(files // 2, limit or files)


@pytest.mark.slow
def test_no_file_is_begun_once_a_download_is_left(server: LoopbackServer, tmp_path: Path) -> None:
    urls = [server.put_file(f"t{n}.bin", b"tile") for n in range(300)]
    server.delay(0.02, at="data")
    session = OAuthSession(server.token_url, server.client_id, server.client_secret)
    with AuthenticatedProcessPool(session, 1) as pool:
        for _ in download(pool, urls, tmp_path, connections=2):
            break
        asked = len(server.log)
        pool.submit(os.getpid).result()  # behind whatever the worker still does
        assert len(server.log) == asked
        server.delay(0.0, at="data")
        results = list(download(pool, urls, tmp_path))
    assert [result.error for result in results] == [None] * 300


@pytest.mark.slow
def test_what_does_not_end_is_stopped_once_a_download_is_left(server: LoopbackServer, tmp_path: Path) -> None:
    big = content(4 * MB)
    urls = [server.put_file("small.bin", b"tile"), server.put_file("big.bin", big)]
    server.fail_file("big.bin", FileFault(stall_at=2 * MB))
    session = OAuthSession(server.token_url, server.client_id, server.client_secret)
    with AuthenticatedProcessPool(session, 1) as pool:
        results = download(pool, urls, tmp_path, stall_timeout=NEVER)
        assert next(results).index == 0
        until((tmp_path / "big.bin.part").exists)
        in_time(results.close)
        again = list(download(pool, urls, tmp_path))
    assert [result.error for result in again] == [None, None]
    assert (tmp_path / "big.bin").read_bytes() == big


def test_results_come_while_the_input_is_still_read(server: LoopbackServer, tmp_path: Path) -> None:
    def endless() -> Iterator[str]:
        n = 0
        while True:
            yield server.put_file(f"t{n}.bin", b"tile")
            n += 1

    with inline_pool(server) as pool:
        results = download(pool, endless(), tmp_path)
        assert [next(results).status for _ in range(40)] == ["done"] * 40
        results.close()


# Names


def test_a_url_without_a_file_name_takes_the_servers(fetch: Fetch, server: LoopbackServer, tmp_path: Path) -> None:
    header = {"Content-Disposition": 'attachment; filename="../../../S2 A.zip"'}
    named = server.put_file("$value", b"product", header)
    unnamed = server.put_file("plain", b"other")
    results = sorted(fetch(named, unnamed), key=lambda result: result.index)
    assert [result.path for result in results] == [str(tmp_path / "d" / "S2 A.zip"), str(tmp_path / "d" / "plain")]
    assert files_in(tmp_path) == {"d/S2 A.zip": b"product", "d/plain": b"other"}


def test_a_name_the_server_chose_is_known_again_in_a_later_run(
    fetch: Fetch, server: LoopbackServer, tmp_path: Path
) -> None:
    url = server.put_file("$value", content(MB), {"Content-Disposition": "attachment; filename=S2.zip"})
    server.fail_file("$value", FileFault(cut_at=400_000))
    assert only(fetch(url, retries=0)).status == "failed"
    assert only(fetch(url)).received == 600_000
    assert only(fetch(url)).status == "done"  # fetched again and found to be equal: nothing else proves that it is
    assert files_in(tmp_path / "d") == {"S2.zip": content(MB)}


def test_two_answers_with_one_name_never_overwrite_each_other(
    fetch: Fetch, server: LoopbackServer, tmp_path: Path
) -> None:
    header = {"Content-Disposition": "attachment; filename=same.zip"}
    urls = [server.put_file(f"value{n}", b"%d" % n, header) for n in range(2)]
    for _ in range(2):  # the second time one is there from the run before
        results = fetch(*urls)
        assert sorted(result.status for result in results) == ["done", "failed"]
        assert set(files_in(tmp_path / "d")) == {"same.zip"}
        failed = next(result for result in results if result.status == "failed")
        assert "has this name already" in str(failed.error)


def test_a_name_is_taken_where_there_are_no_hard_links(
    fetch: Fetch, server: LoopbackServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FAT and some network file systems have none; a finished file must not be lost for it."""

    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    header = {"Content-Disposition": "attachment; filename=same.zip"}
    urls = [server.put_file(f"value{n}", b"%d" % n, header) for n in range(2)]
    assert sorted(result.status for result in fetch(*urls)) == ["done", "failed"]
    assert set(files_in(tmp_path / "d")) == {"same.zip"}


@pytest.mark.parametrize("path", ["../a.tif", "/etc/a.tif", "a/../../b", "a\0b", "", "x" * 300, "a.part"])
def test_a_path_that_leaves_the_folder_is_refused(path: str) -> None:
    with pytest.raises(TargetPathError):
        Planner().plan(0, DownloadItem("https://api.example/a.tif", path))


def test_a_symbolic_link_that_leads_out_is_refused(fetch: Fetch, server: LoopbackServer, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "d" / "link").symlink_to(tmp_path / "outside")
    url = server.put_file("a.tif", b"tile")
    result = only(fetch({"url": url, "path": "link/a.tif"}))
    assert isinstance(result.error, TargetPathError)
    assert files_in(tmp_path / "outside") == {}


def test_a_link_in_place_of_the_part_is_not_followed(fetch: Fetch, server: LoopbackServer, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "victim").write_bytes(b"mine")
    (tmp_path / "d" / "a.tif.part").symlink_to(tmp_path / "victim")
    result = only(fetch(server.put_file("a.tif", b"tile")))
    assert "symbolic link" in str(result.error)
    assert (tmp_path / "victim").read_bytes() == b"mine"


def test_two_items_with_one_path_are_refused(server: LoopbackServer, tmp_path: Path) -> None:
    urls = [server.put_file(f"{folder}/a.tif", folder.encode()) for folder in ("x", "y")]
    with inline_pool(server) as pool:
        results = sorted(download(pool, urls, tmp_path / "d"), key=lambda result: result.index)
    assert [result.status for result in results] == ["done", "failed"]
    assert "another file of this run has this path" in str(results[1].error)
    assert files_in(tmp_path / "d") == {"a.tif": b"x"}


def test_equal_items_are_fetched_once_and_reported_for_each(server: LoopbackServer, tmp_path: Path) -> None:
    """Whether the first is under way or has ended, and whatever became of it, its copies have its result."""
    named = {"Content-Disposition": 'attachment; filename="named.zip"'}
    urls = [server.put_file("a.tif", content(900)), server.put_file("$value", b"product", named)]
    missing = f"{server.base_url}/files/missing.tif"
    twice: list[Any] = [urls[0], {"url": urls[0], "path": ""}, *urls, missing, urls[1], missing]

    def with_time_to_end() -> Iterator[Any]:
        yield from twice
        yield from (server.put_file(f"t{n}.bin", b"tile") for n in range(60))  # far more than are under way at once
        yield from (urls[0], urls[1], missing, {"url": urls[0], "size": 900})

    with inline_pool(server) as pool:
        results = sorted(download(pool, with_time_to_end(), tmp_path / "d", retries=0), key=lambda result: result.index)
    assert [result.index for result in results] == list(range(len(twice) + 64))
    last = len(results) - 4
    for same, path, size in ((0, 1, 2, last), "a.tif", 900), ((3, 5, last + 1), "named.zip", 7):
        told = {(results[n].status, results[n].path, results[n].bytes) for n in same}
        assert told == {("done", str(tmp_path / "d" / path), size)}
        assert [results[n].received for n in same] == [size] + [0] * (len(same) - 1)
    failed = [results[n] for n in (4, 6, last + 2)]
    assert {(result.status, str(result.error)) for result in failed} == {("failed", str(failed[0].error))}
    assert [result.attempts for result in failed] == [1, 0, 0]
    assert "another file of this run has this path" in str(results[last + 3].error)
    assert [len(server.file_requests(name)) for name in ("a.tif", "$value", "missing.tif")] == [1, 1, 1]


def test_copies_of_a_file_that_was_there_say_so_too(server: LoopbackServer, tmp_path: Path) -> None:
    url = server.put_file("a.tif", content(900))
    with inline_pool(server) as pool:
        list(download(pool, [url], tmp_path))
        results = list(download(pool, [url, url], tmp_path))
    assert [(result.status, result.by_size, result.bytes) for result in results] == [("skipped", True, 900)] * 2


@pytest.mark.parametrize(
    "item",
    [
        "ftp://api.example/a",
        "a.tif",
        "https://",
        "https://api.example:x/",
        "https://api.example/a\nb",
        {"path": "a"},
        {"url": "https://api.example/a", "sha": "00"},
        {"url": "https://api.example/a", "sha256": "00"},
        {"url": "https://api.example/a", "md5": "z" * 32},
        {"url": "https://api.example/a", "size": -1},
        {"url": "https://api.example/a", "size": "big"},
        {"url": "https://api.example/a", "size": "1_0000"},
        {"url": "https://api.example/a", "size": "٣"},
        {"url": "https://api.example/a", "size": "9" * 19},
        {"url": "https://api.example/a", "size": 2**63},
        {"url": "https://api.example/a", "size": 10000.7},
        {"url": "https://api.example/a", "size": float("nan")},
        {"url": "https://api.example/a", "size": True},
        {"url": "https://api.example/a", "size": b"1"},
        {"url": "https://api.example/a", "size": [1]},
        {"url": "https://api.example/a", "md5": 5},
        {"url": "https://api.example/a", "sha256": b"0" * 64},
        {"url": "https://api.example/a", "path": 5},
        {"url": 7},
    ],
    ids=str,
)
def test_an_item_that_makes_no_sense_is_refused(item: Any) -> None:
    with pytest.raises(InputError) as caught:
        as_item(item)
    assert not re.search("object|literal|invalid|convert|DownloadItem", str(caught.value)), "Python's words, not ours"


def test_a_size_is_a_whole_number_however_it_is_written() -> None:
    """CSV has text, and tables with gaps floating-point numbers."""
    for size in (900, "900", " 900 ", 900.0, np.int64(900), np.float64(900.0)):
        assert as_item({"url": "https://api.example/a", "size": size}).size == 900


# What is there already


def test_a_right_file_is_skipped_without_a_request(fetch: Fetch, server: LoopbackServer) -> None:
    data = content(1000)
    item = {
        "url": server.put_file("a.tif", data),
        "size": 1000,
        "sha256": sha256(data),
        "md5": hashlib.md5(data).hexdigest(),
    }
    assert [only(fetch(item)).status for _ in range(2)] == ["done", "skipped"]
    assert len(server.file_requests("a.tif")) == 1


def test_a_wrong_file_is_replaced(fetch: Fetch, server: LoopbackServer, tmp_path: Path) -> None:
    data = content(1000)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.tif").write_bytes(b"\0" * 1000)
    assert only(fetch({"url": server.put_file("a.tif", data), "sha256": sha256(data)})).status == "done"
    assert files_in(tmp_path / "d") == {"a.tif": data}


def test_a_file_of_which_nothing_is_known_is_compared_with_the_servers_length(
    fetch: Fetch, server: LoopbackServer, tmp_path: Path
) -> None:
    data = content(1000)
    url = server.put_file("a.tif", data)
    assert [only(fetch(url)).status for _ in range(2)] == ["done", "skipped"]
    assert server.file_requests("a.tif")[1].headers["range"] == "bytes=1000-"
    server.fail_file("a.tif", FileFault(ignores_range=True))
    assert only(fetch(url)).status == "skipped"
    (tmp_path / "d" / "a.tif").write_bytes(data[:900])
    assert only(fetch(url)).status == "done"
    assert only(fetch(url, overwrite=True)).status == "done"
    assert files_in(tmp_path / "d") == {"a.tif": data}


@pytest.mark.parametrize("size", [None, 1000])
def test_a_file_of_the_right_size_alone_is_said_to_be_that(
    fetch: Fetch, server: LoopbackServer, tmp_path: Path, size: int | None
) -> None:
    item = {"url": server.put_file("a.tif", content(1000)), "size": size}
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.tif").write_bytes(b"\0" * 1000)
    found = only(fetch(item))
    assert (found.status, found.by_size, found.received) == ("skipped", True, 0)
    assert not only(fetch({**item, "sha256": sha256(content(1000))})).by_size


@pytest.mark.parametrize("fault", [FileFault(), FileFault(ignores_range=True)])
def test_a_file_that_has_changed_on_the_server_since_is_fetched_anew(
    fetch: Fetch, server: LoopbackServer, tmp_path: Path, fault: FileFault
) -> None:
    dated = {"Last-Modified": "Wed, 01 May 2024 12:00:00 GMT"}
    data, changed = content(1000), 1_714_564_800.0
    url = server.put_file("a.tif", data, dated)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.tif").write_bytes(b"\0" * 1000)
    os.utime(tmp_path / "d" / "a.tif", (changed, changed))
    server.fail_file("a.tif", fault)
    assert only(fetch(url, retries=0)).by_size
    os.utime(tmp_path / "d" / "a.tif", (changed - 1, changed - 1))
    server.fail_file("a.tif", fault)
    assert only(fetch(url, retries=0)).status == "done"
    assert files_in(tmp_path / "d") == {"a.tif": data}


def test_a_checksum_the_server_sends_says_more_than_the_size(
    fetch: Fetch, server: LoopbackServer, tmp_path: Path
) -> None:
    data = content(1000)
    digest = base64.b64encode(hashlib.sha256(data).digest()).decode()
    url = server.put_file("a.tif", data, {"Repr-Digest": f"sha-256=:{digest}:"})
    (tmp_path / "d").mkdir()
    for there, status in ((b"\0" * 1000, "done"), (data, "skipped")):
        (tmp_path / "d" / "a.tif").write_bytes(there)
        server.fail_file("a.tif", FileFault(ignores_range=True))
        found = only(fetch(url, retries=0))
        assert (found.status, found.by_size) == (status, False)
        assert files_in(tmp_path / "d") == {"a.tif": data}


# Parts


def cut_then_whole(server: LoopbackServer, name: str, data: bytes, *faults: FileFault, **headers: str) -> str:
    url = server.put_file(name, data, headers)
    server.fail_file(name, *faults)
    return url


@pytest.mark.parametrize("cut_at", [5_000, 700_000])
def test_a_cut_connection_is_continued_where_it_stood(
    fetch: Fetch, server: LoopbackServer, tmp_path: Path, cut_at: int
) -> None:
    data = content(MB)
    result = only(fetch(cut_then_whole(server, "a.tif", data, FileFault(cut_at=cut_at))))
    assert (result.status, result.attempts, result.received) == ("done", 2, MB)
    second = server.file_requests("a.tif")[1].headers
    assert second["range"] == f"bytes={cut_at}-"
    assert second["if-range"].startswith('"')
    assert files_in(tmp_path / "d") == {"a.tif": data}


def test_progress_forgives_earlier_failures(fetch: Fetch, server: LoopbackServer, tmp_path: Path) -> None:
    data = content(9 * MB)
    faults = [FileFault(cut_at=1_100_000)] * 7
    result = only(fetch(cut_then_whole(server, "a.tif", data, *faults), retries=1))
    assert (result.status, result.attempts, result.received) == ("done", 8, 9 * MB)
    assert files_in(tmp_path / "d") == {"a.tif": data}


def test_failures_without_progress_come_to_an_end_and_keep_the_part(
    fetch: Fetch, server: LoopbackServer, tmp_path: Path
) -> None:
    data = content(MB)
    url = cut_then_whole(server, "a.tif", data, FileFault(cut_at=400_000), *[FileFault(cut_at=0)] * 3)
    result = only(fetch(url, retries=3))
    assert (result.status, result.attempts, result.bytes) == ("failed", 4, 400_000)
    assert isinstance(result.error, TransferError)
    assert result.error.is_temporary
    assert set(files_in(tmp_path / "d")) == {"a.tif.part", "a.tif.part.json"}
    again = only(fetch(url))
    assert (again.status, again.received) == ("done", 600_000)
    assert files_in(tmp_path / "d") == {"a.tif": data}


def test_a_file_that_has_changed_is_fetched_from_its_start(
    fetch: Fetch, server: LoopbackServer, tmp_path: Path
) -> None:
    """If-Range: the server sends all of it with 200."""
    url = cut_then_whole(server, "a.tif", content(MB), FileFault(cut_at=600_000))
    assert only(fetch(url, retries=0)).status == "failed"
    new = content(MB, seed=2)
    server.put_file("a.tif", new)
    assert only(fetch(url)).status == "done"
    assert files_in(tmp_path / "d") == {"a.tif": new}


def test_a_part_of_another_etag_is_thrown_away_though_the_server_continues_it(
    fetch: Fetch, server: LoopbackServer, tmp_path: Path
) -> None:
    url = cut_then_whole(server, "a.tif", content(MB), FileFault(cut_at=600_000))
    assert only(fetch(url, retries=0)).status == "failed"
    new = content(MB, seed=2)
    server.put_file("a.tif", new)
    server.fail_file("a.tif", FileFault(ignores_validator=True))
    assert only(fetch(url)).status == "done"
    assert files_in(tmp_path / "d") == {"a.tif": new}


@pytest.mark.parametrize(
    "fault",
    [FileFault(ignores_range=True), FileFault(range_shift=1), FileFault(status=416), FileFault(range_shift=MB)],
    ids=["200", "another range", "416", "416 with length"],
)
def test_an_answer_to_another_range_starts_over(
    fetch: Fetch, server: LoopbackServer, tmp_path: Path, fault: FileFault
) -> None:
    data = content(MB)
    assert only(fetch(cut_then_whole(server, "a.tif", data, FileFault(cut_at=300_000), fault))).status == "done"
    assert files_in(tmp_path / "d") == {"a.tif": data}


def test_without_a_validator_a_part_is_worth_nothing(fetch: Fetch, server: LoopbackServer) -> None:
    url = cut_then_whole(server, "a.tif", content(MB), FileFault(cut_at=300_000), ETag='W/"weak"')
    assert only(fetch(url)).status == "done"
    assert "range" not in server.file_requests("a.tif")[1].headers


def test_a_validator_that_cannot_be_sent_back_as_it_came_is_none(fetch: Fetch, server: LoopbackServer) -> None:
    url = cut_then_whole(server, "a.tif", content(MB), FileFault(cut_at=300_000), ETag='"höhe"')
    assert only(fetch(url)).status == "done"
    assert "range" not in server.file_requests("a.tif")[1].headers


def test_a_date_is_a_validator_too(fetch: Fetch, server: LoopbackServer) -> None:
    date = "Mon, 02 Jan 2023 03:04:05 GMT"
    url = server.put_file("a.tif", content(MB), {"Last-Modified": date, "ETag": ""})
    server.fail_file("a.tif", FileFault(cut_at=300_000))
    assert only(fetch(url)).status == "done"
    assert server.file_requests("a.tif")[1].headers["if-range"] == date


def test_a_checksum_makes_any_part_usable_and_tells_when_it_was_wrong(
    fetch: Fetch, server: LoopbackServer, tmp_path: Path
) -> None:
    data = content(MB)
    (tmp_path / "d").mkdir()
    part = tmp_path / "d" / "a.tif.part"
    item = {"url": server.put_file("a.tif", data), "sha256": sha256(data)}
    part.write_bytes(data[:600_000])
    assert (only(fetch(item)).received, part.exists()) == (400_000, False)
    (tmp_path / "d" / "a.tif").unlink()
    part.write_bytes(b"\0" * 600_000)
    assert only(fetch(item)).status == "done"
    assert files_in(tmp_path / "d") == {"a.tif": data}


def test_a_part_that_is_complete_only_takes_its_name(fetch: Fetch, server: LoopbackServer, tmp_path: Path) -> None:
    data = content(MB)
    url = server.put_file("a.tif", data)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.tif.part").write_bytes(data)
    result = only(fetch({"url": url, "sha256": sha256(data), "size": MB}))
    assert (result.status, result.received, server.file_requests("a.tif")) == ("done", 0, ())
    assert files_in(tmp_path / "d") == {"a.tif": data}


@pytest.mark.slow
def test_a_stalled_transfer_is_given_up_and_continued(fetch: Fetch, server: LoopbackServer, tmp_path: Path) -> None:
    data = content(MB)
    url = cut_then_whole(server, "a.tif", data, FileFault(stall_at=500_000))
    result = only(fetch(url, curl=CurlOptions(stall_timeout=0.3)))
    assert (result.status, result.received) == ("done", MB)
    assert files_in(tmp_path / "d") == {"a.tif": data}


@pytest.mark.slow
def test_an_attempt_that_takes_too_long_is_ended_and_continued(
    fetch: Fetch, server: LoopbackServer, tmp_path: Path
) -> None:
    data = content(2 * MB)
    url = cut_then_whole(server, "a.tif", data, FileFault(stall_at=1_500_000))
    found = only(fetch(url, timeout=1.0, retries=20))
    assert (found.status, found.attempts >= 2) == ("done", True)
    assert server.file_requests("a.tif")[1].headers["range"].startswith("bytes=")
    assert files_in(tmp_path / "d") == {"a.tif": data}


@pytest.mark.slow
def test_attempts_that_take_too_long_are_counted_whatever_they_bring(fetch: Fetch, server: LoopbackServer) -> None:
    faults = [FileFault(stall_at=1_500_000)] * 2
    url = cut_then_whole(server, "a.tif", content(4 * MB), *faults)
    found = only(fetch(url, timeout=0.5, retries=1))
    assert isinstance(found.error, DownloadTimeoutError)
    assert found.attempts == 2
    assert "it took longer than 0.5 s; raise the timeout" in str(found.error)


def test_a_part_another_process_writes_is_refused(fetch: Fetch, server: LoopbackServer, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    part = PartFile.open(str(tmp_path / "d" / "a.tif"), create=True)
    assert part is not None
    part.append([b"theirs"])
    result = only(fetch(server.put_file("a.tif", b"tile")))
    assert isinstance(result.error, PartInUseError)
    assert (tmp_path / "d" / "a.tif.part").read_bytes() == b"theirs"
    part.discard()


# Content


@pytest.mark.parametrize(
    "wrong", [{"size": 999}, {"sha256": "0" * 64}, {"md5": "0" * 32}], ids=["size", "sha256", "md5"]
)
def test_wrong_content_never_takes_the_name(
    fetch: Fetch, server: LoopbackServer, tmp_path: Path, wrong: dict[str, Any]
) -> None:
    result = only(fetch({"url": server.put_file("a.tif", content(1000)), **wrong}, retries=1))
    assert (result.status, result.attempts) == ("failed", 2)
    assert isinstance(result.error, ContentError)
    assert files_in(tmp_path / "d") == {}


def digest_fields(data: bytes) -> list[dict[str, str]]:
    sha, md5 = (base64.b64encode(hashlib.new(name, data).digest()).decode() for name in ("sha256", "md5"))
    return [
        {"Repr-Digest": f"sha-256=:{sha}:"},
        {"Digest": f"SHA-256={sha}"},
        {"Content-MD5": md5},
        {"Repr-Digest": f"unixsum=:AAA=:, sha-256=:{sha}:"},
    ]


@pytest.mark.parametrize("number", range(4))
def test_a_checksum_that_the_server_sends_is_verified(
    fetch: Fetch, server: LoopbackServer, tmp_path: Path, number: int
) -> None:
    data = content(1000)
    url = server.put_file("a.tif", data, digest_fields(data)[number])
    server.fail_file("a.tif", FileFault(content=content(1000, seed=2)))
    result = only(fetch(url))
    assert (result.status, result.attempts) == ("done", 2)
    assert files_in(tmp_path / "d") == {"a.tif": data}


def test_a_servers_checksum_covers_a_continued_file(fetch: Fetch, server: LoopbackServer, tmp_path: Path) -> None:
    data = content(MB)
    url = server.put_file("a.tif", data, digest_fields(data)[0])
    server.fail_file("a.tif", FileFault(cut_at=600_000))
    assert (only(fetch(url)).received, files_in(tmp_path / "d")) == (MB, {"a.tif": data})


@pytest.mark.parametrize(
    ("name", "media_type"),
    [
        ("a.tif", "text/html; charset=utf-8"),
        ("$value", "text/html"),
        ("a.tif", "application/json"),
        ("a.json", "application/problem+json"),
        ("a.zip", "application/xml"),
        ("a.jp2", "text/xml"),
        ("a.nc", "application/geo+json"),
        ("a.SAFE", "text/plain"),
        ("a.tif", "text/plain; charset=utf-8"),
    ],
)
def test_an_error_page_in_place_of_data_is_refused(
    fetch: Fetch, server: LoopbackServer, tmp_path: Path, name: str, media_type: str
) -> None:
    url = server.put_file(name, b"<html>log in</html>", {"Content-Type": media_type})
    result = only(fetch(url, retries=0))
    assert isinstance(result.error, ContentError)
    assert files_in(tmp_path / "d") == {}


@pytest.mark.parametrize(
    ("name", "media_type"),
    [
        ("a.html", "text/html"),
        ("a.json", "application/json"),
        ("a.geojson", "application/json"),
        ("items", "application/json"),
        ("a.xml", "application/xml"),
        ("a.gml", "text/xml"),
        ("manifest.safe", "text/xml"),
        ("a.txt", "text/plain"),
        ("a.csv", "text/plain"),
        ("a.jsonl", "text/plain"),
    ],
)
def test_a_page_that_is_the_file_is_fetched(fetch: Fetch, server: LoopbackServer, name: str, media_type: str) -> None:
    assert only(fetch(server.put_file(name, b"content", {"Content-Type": media_type}))).status == "done"


@pytest.mark.parametrize("media_type", ["text/html", "application/json", "application/xml", "text/plain"])
@pytest.mark.parametrize("is_planned", [True, False])
def test_the_suffix_that_counts_is_that_of_the_record_or_of_the_servers_name(
    fetch: Fetch, server: LoopbackServer, tmp_path: Path, media_type: str, *, is_planned: bool
) -> None:
    named = {} if is_planned else {"Content-Disposition": 'attachment; filename="a.zip"'}
    url = server.put_file("$value", b"no such product", {"Content-Type": media_type, **named})
    item = {"url": url, "path": "x/a.zip"} if is_planned else {"url": url}
    assert isinstance(only(fetch(item, retries=0)).error, ContentError)
    assert files_in(tmp_path / "d") == {}


@pytest.mark.parametrize(
    "data", [b"II*\0" + b"a" * 1000, b"PK\x03\x04abc", b"%PDF-1.4\n", b"\x89HDF\r\n", b"\xff\xd8\xff\xe0"]
)
def test_data_that_a_server_calls_text_is_data(
    fetch: Fetch, server: LoopbackServer, tmp_path: Path, data: bytes
) -> None:
    assert only(fetch(server.put_file("a.tif", data, {"Content-Type": "text/plain"}))).status == "done"
    assert files_in(tmp_path / "d") == {"a.tif": data}


def test_a_page_whose_checksum_was_given_is_the_file(fetch: Fetch, server: LoopbackServer) -> None:
    url = server.put_file("a.tif", b"<html>", {"Content-Type": "text/html"})
    assert only(fetch({"url": url, "sha256": sha256(b"<html>")})).status == "done"
    other = server.put_file("b.tif", b"<html>", {"Content-Type": "text/html"})
    assert only(fetch({"url": other, "size": 6})).status == "done"


# Status codes and the token


def test_a_file_that_is_not_there_is_asked_for_once(fetch: Fetch, server: LoopbackServer) -> None:
    result = only(fetch(f"{server.base_url}/files/none.tif?signature=not-a-real-secret"))
    assert isinstance(result.error, TransferError)
    assert (result.error.status, result.attempts) == (404, 1)
    assert "secret" not in str(result.error)


def test_a_server_that_asks_to_wait_is_asked_again_after_that(fetch: Fetch, server: LoopbackServer) -> None:
    busy = FileFault(status=429, headers={"Retry-After": "0.15"})
    begun = time.monotonic()
    result = only(fetch(cut_then_whole(server, "a.tif", b"tile", *[busy] * 2), retries=1))
    assert (result.status, result.attempts) == ("done", 3)
    assert time.monotonic() - begun >= 0.3


def test_a_wait_beyond_the_bound_is_reported(fetch: Fetch, server: LoopbackServer) -> None:
    result = only(
        fetch(cut_then_whole(server, "a.tif", b"tile", FileFault(status=503, headers={"Retry-After": "3600"})))
    )
    assert isinstance(result.error, TransferError)
    assert (result.error.status, result.error.retry_after, result.attempts) == (503, 3600.0, 1)


@pytest.mark.slow
def test_a_revoked_token_is_renewed_and_the_file_goes_on_where_it_stood(
    fetch: Fetch, server: LoopbackServer, tmp_path: Path
) -> None:
    data = content(3 * MB)
    url = cut_then_whole(server, "a.tif", data, FileFault(stall_at=2 * MB))

    def revoke() -> None:
        deadline = time.monotonic() + PATIENCE
        while not server.file_requests("a.tif") and time.monotonic() < deadline:
            time.sleep(0.01)
        server.revoke_all()

    revoking = threading.Thread(target=revoke)
    revoking.start()
    result = only(fetch(url, curl=CurlOptions(stall_timeout=0.3)))
    revoking.join()
    assert (result.status, result.received, server.unauthorized, server.logins) == ("done", 3 * MB, 1, 2)
    assert files_in(tmp_path / "d") == {"a.tif": data}


def test_many_refusals_of_one_generation_are_one_login(fetch: Fetch, server: LoopbackServer) -> None:
    urls = [server.put_file(f"t{n}.tif", b"tile") for n in range(30)]
    assert only(fetch(urls[0], overwrite=True)).status == "done"
    server.revoke_all()
    assert {result.status for result in fetch(*urls, overwrite=True)} == {"done"}
    assert server.logins == 2


def test_a_second_refusal_in_a_row_is_a_failed_attempt(fetch: Fetch, server: LoopbackServer) -> None:
    """Each file makes the parent log in once without being asked to retry, and not twice."""
    refusal = FileFault(status=401, headers={"WWW-Authenticate": 'Bearer error="invalid_token"'})
    result = only(fetch(cut_then_whole(server, "a.tif", b"tile", refusal, refusal), retries=0))
    assert isinstance(result.error, TransferError)
    assert (result.error.status, server.logins) == (401, 2)
    assert only(fetch(cut_then_whole(server, "b.tif", b"tile", refusal, refusal), retries=1)).status == "done"


def test_a_bar_is_drawn_where_it_is_asked_for(
    server: LoopbackServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    urls = [server.put_file("a.tif", b"tile"), f"{server.base_url}/files/nothing.tif"]
    with inline_pool(server) as pool:
        list(download(pool, urls, tmp_path / "d", progress=True))
    told = capsys.readouterr()
    assert "| 2/2 [" in told.err
    assert "4 B, failed 1" in told.err
    assert not told.out


def test_a_scope_that_is_missing_costs_no_login(fetch: Fetch, server: LoopbackServer) -> None:
    refusal = FileFault(status=401, headers={"WWW-Authenticate": 'Bearer error="insufficient_scope"'})
    assert only(fetch(cut_then_whole(server, "a.tif", b"tile", refusal))).status == "failed"
    assert server.logins == 1


def test_a_redirect_to_another_origin_loses_the_token(fetch: Fetch, server: LoopbackServer, tmp_path: Path) -> None:
    with LoopbackServer() as other:
        target = other.put_file("a.tif", b"tile", public=True)
        result = only(fetch({"url": f"{server.base_url}/redirect?to={target}", "path": "a.tif"}))
        assert (result.status, result.attempts) == ("done", 1)
        assert "authorization" not in other.file_requests("a.tif")[0].headers
    assert files_in(tmp_path / "d") == {"a.tif": b"tile"}


def test_a_redirect_within_the_origin_keeps_the_token(fetch: Fetch, server: LoopbackServer) -> None:
    server.put_file("a.tif", b"tile")
    assert only(fetch({"url": f"{server.base_url}/redirect?to=/files/a.tif", "path": "a.tif"})).status == "done"
    assert server.file_requests("a.tif")[0].headers["authorization"].startswith("Bearer ")


def test_redirects_and_names_may_be_raw_utf_8(fetch: Fetch, server: LoopbackServer, tmp_path: Path) -> None:
    raw = "höhe.tif".encode().decode("latin-1")  # as the server writes Latin-1, these are the bytes on the wire
    server.put_file("h%C3%B6he.tif", b"tile", {"Content-Disposition": f'attachment; filename="{raw}"'})
    url = cut_then_whole(server, "first", b"", FileFault(status=302, headers={"Location": f"/files/{raw}"}))
    assert only(fetch(url)).error is None
    assert files_in(tmp_path / "d") == {"höhe.tif": b"tile"}


def test_a_part_is_continued_behind_a_redirect(fetch: Fetch, server: LoopbackServer) -> None:
    cut_then_whole(server, "a.tif", content(MB), FileFault(cut_at=700_000))
    result = only(fetch({"url": f"{server.base_url}/redirect?to=/files/a.tif", "path": "a.tif"}))
    assert (result.status, result.received) == ("done", MB)


def test_redirects_in_a_circle_come_to_an_end(fetch: Fetch, server: LoopbackServer) -> None:
    location = {"Location": "/files/a.tif"}
    url = cut_then_whole(server, "a.tif", b"", *[FileFault(status=302, headers=location)] * 20)
    assert "redirects" in str(only(fetch(url)).error)


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://api.example/a", "http://[bad"])
def test_a_redirect_to_nowhere_is_refused(fetch: Fetch, server: LoopbackServer, location: str) -> None:
    url = cut_then_whole(server, "a.tif", b"", FileFault(status=302, headers={"Location": location}))
    assert only(fetch(url, retries=0)).status == "failed"


def test_the_token_never_travels_unencrypted(fetch: Fetch) -> None:
    result = only(fetch("http://api.example/a.tif"))
    assert isinstance(result.error, InsecureUrlError)


def test_without_authentication_no_token_is_sent(fetch: Fetch, server: LoopbackServer) -> None:
    url = server.put_file("a.tif", b"tile", public=True)
    assert only(fetch(url, authenticated=False)).status == "done"
    assert "authorization" not in server.file_requests("a.tif")[0].headers


def test_a_server_that_refuses_connections_is_reported_by_name(fetch: Fetch, server: LoopbackServer) -> None:
    url = server.put_file("a.tif", b"tile")
    server.refuse_connections(at="data")
    result = only(fetch(url, retries=1))
    assert isinstance(result.error, TransferError)
    assert (result.error.is_temporary, result.attempts) == (True, 2)


# The disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of one megabyte."""
    folder = tmp_path / "d"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_said_plainly_and_keeps_the_part(fetch: Fetch, server: LoopbackServer, small_disk: Path) -> None:
    data = content(900_000)
    (small_disk / "ballast").write_bytes(b"\0" * 400_000)
    url = server.put_file("a.tif", data)
    result = only(fetch(url))
    assert isinstance(result.error, StorageFullError)
    assert "No space left" in str(result.error)
    assert 0 < result.bytes < 900_000
    (small_disk / "ballast").unlink()
    again = only(fetch(url))
    assert (again.status, again.received) == ("done", 900_000 - result.bytes)
    assert files_in(small_disk) == {"a.tif": data}


def test_a_full_disk_ends_the_run_with_that_error(server: LoopbackServer, small_disk: Path) -> None:
    urls = [server.put_file(f"t{n}.tif", content(400_000, n)) for n in range(200)]
    with inline_pool(server) as pool, pytest.raises(StorageFullError):
        list(download(pool, urls, small_disk))
    assert server.requests < 100


# Sudden ends


@pytest.mark.slow
def test_a_killed_run_is_continued(
    server: LoopbackServer, tmp_path: Path, child_env: dict[str, str], fetch: Fetch
) -> None:
    data = content(3 * MB)
    url = cut_then_whole(server, "a.tif", data, FileFault(stall_at=2 * MB))
    program = textwrap.dedent(f"""
        from shpool import AuthenticatedProcessPool, OAuthSession, download
        session = OAuthSession({server.token_url!r}, {server.client_id!r}, {server.client_secret!r})
        with AuthenticatedProcessPool(session, 1, engine="inline") as pool:
            list(download(pool, [{url!r}], {str(tmp_path / "d")!r}))
    """)
    part = tmp_path / "d" / "a.tif.part"
    with subprocess.Popen([sys.executable, "-c", program], env=child_env) as child:
        deadline = time.monotonic() + PATIENCE
        while not (part.exists() and part.stat().st_size > MB) and time.monotonic() < deadline:
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
    kept = part.stat().st_size
    assert json.loads((tmp_path / "d" / "a.tif.part.json").read_text())["validator"].startswith('"')
    result = only(fetch(url))
    assert (result.status, result.received) == ("done", 3 * MB - kept)
    assert files_in(tmp_path / "d") == {"a.tif": data}


@pytest.mark.slow
def test_a_lost_worker_costs_no_file(server: LoopbackServer, tmp_path: Path) -> None:
    session = OAuthSession(server.token_url, server.client_id, server.client_secret)
    items = [{"url": server.data_url(n, 50_000), "path": f"t{n}.bin"} for n in range(300)]
    statuses: collections.Counter[str] = collections.Counter()
    with AuthenticatedProcessPool(session, 2) as pool:
        victim = pool.submit(os.getpid).result()
        server.delay(0.01, at="data")
        for result in download(pool, items, tmp_path / "d"):
            if not statuses:
                os.kill(victim, signal.SIGKILL)
            statuses[result.status] += 1
    assert statuses["done"] + statuses["skipped"] == 300
    assert files_in(tmp_path / "d") == {f"t{n}.bin": tile_bytes(n, 50_000) for n in range(300)}


@pytest.mark.slow
def test_whatever_a_server_does_every_file_is_right_or_reported(server: LoopbackServer, tmp_path: Path) -> None:
    rng = random.Random(7)
    data = {f"t{n}.tif": content(rng.choice([0, 1, 10_000, 10_000, 10_000, 300_000, MB]), n) for n in range(200)}
    items = [{"url": server.put_file(name, text), "sha256": sha256(text)} for name, text in data.items()]
    faults = [
        FileFault(cut_at=0),
        FileFault(cut_at=5_000),
        FileFault(cut_at=280_000),
        FileFault(stall_at=200_000),
        FileFault(ignores_range=True),
        FileFault(content=b"\0" * 10_000),
        FileFault(headers={"ETag": '"another"'}),
        FileFault(ignores_validator=True),
        FileFault(range_shift=3),
        FileFault(status=429, headers={"Retry-After": "0.05"}),
        FileFault(status=503),
        FileFault(status=200, body=b"<html>busy</html>", headers={"Content-Type": "text/html"}),
    ]
    server.fail_files_at_random(0.2, *faults, seed=5)
    session = OAuthSession(server.token_url, server.client_id, server.client_secret)
    results = list(download(session, items, tmp_path / "d", max_workers=2, stall_timeout=0.3))
    assert sorted(result.index for result in results) == list(range(200))
    right = {str(Path(result.path).name) for result in results if result.status == "done" and result.path}
    found = {name: text for name, text in files_in(tmp_path / "d").items() if not name.endswith((".part", ".json"))}
    assert found == {name: data[name] for name in right}
    assert all(result.error is not None for result in results if result.status == "failed")
    assert len(right) > 180
    assert server.logins == 1


# Parts of the whole


def test_groups_grow_until_a_worker_is_busy_for_long_enough() -> None:
    sizer = GroupSizer(8)
    sizes = [sizer.next_size()]
    for _ in range(6):
        sizer.learn(sizer.next_size(), 0.02)
        sizes.append(sizer.next_size())
    assert sizes == [8, 32, 128, 512, 2048, 4096, 4096]
    for _ in range(6):
        sizer.learn(sizer.next_size(), 60.0)
    assert sizer.next_size() == 8


def test_groups_are_large_where_their_results_come_on_the_way() -> None:
    sizer = GroupSizer(8, workers=2, is_heard=True)
    for _ in range(30):
        sizer.learn(sizer.next_size(), sizer.next_size() / 100)  # 100 files/s, whatever the group
    assert sizer.next_size() == 1000  # ten seconds of work
    assert sizer.next_size(1000) == 500


def test_groups_of_a_long_run_keep_a_worker_busy_for_longer() -> None:
    sizer = GroupSizer(8)
    sizes = []
    for _ in range(30):
        sizer.learn(sizer.next_size(), sizer.next_size() / 100)  # 100 files/s, whatever the group
        sizes.append(sizer.next_size())
    assert sizes[2] == 50  # half a second of work
    assert sizes[-1] == 200  # two seconds
    assert sizes[3:] == sorted(sizes[3:])


def test_groups_shrink_towards_the_end_so_that_all_workers_stay_busy() -> None:
    sizer = GroupSizer(8, workers=2)
    for _ in range(4):
        sizer.learn(sizer.next_size(), 0.02)
    left, sizes = 4000, []
    while left:
        sizes.append(sizer.next_size(left))
        left -= sizes[-1]
    assert sizes[:3] == [1000, 750, 562]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-2] == sizes[-1] or sizes[-2] == sizes[-1] + 1
    assert GroupSizer(8, workers=2).next_size(5) == 3
    assert GroupSizer(8, workers=2).next_size(0) == 1


def test_a_wrong_setting_is_refused(server: LoopbackServer, tmp_path: Path) -> None:
    for wrong in ({"connections": 0}, {"retries": -1}, {"stall_timeout": 0.0}, {"timeout": 0.0}):
        with pytest.raises(ValueError, match="at least 1"):
            download(inline_pool(server), [], tmp_path, **wrong)


def test_errors_of_this_family_are_download_errors() -> None:
    assert issubclass(StorageFullError, DownloadError)
