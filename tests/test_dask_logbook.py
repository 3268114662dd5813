"""The logbook of a Dask worker: what it says after a SIGKILL, and what may not begin."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from patience import NEVER, PATIENCE

from shpool.engines import dask_logbook
from shpool.engines.dask_logbook import Logbook, read_logbook, sweep

if TYPE_CHECKING:
    from collections.abc import Iterator

WRITER = """
import sys
from shpool.engines.dask_logbook import Logbook
logbook = Logbook(sys.argv[1], int(sys.argv[2]))
exec(sys.argv[3])
print("written", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "shpool-1")


@pytest.fixture
def logbook(path: str) -> Iterator[Logbook]:
    made = Logbook(path, 10)
    yield made
    made.close()


def start_writer(path: str, env: dict[str, str], code: str, most: int = 10) -> subprocess.Popen[bytes]:
    """Return a process that has written what the code says, and lives on."""
    words = [sys.executable, "-c", WRITER, path, str(most), code]
    writer = subprocess.Popen(words, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"written\n"
    return writer


def end_writer(writer: subprocess.Popen[bytes]) -> None:
    writer.kill()
    writer.communicate()


def test_what_was_written_is_there_after_a_sigkill(path: str, child_env: dict[str, str]) -> None:
    code = (
        "logbook.begin(1); logbook.end(1, b'one'); logbook.begin(2); logbook.begin(3); logbook.end(3, bytes(300_000))"
    )
    end_writer(start_writer(path, child_env, code))
    record = asyncio.run(read_logbook(path, [1, 2, 3, 4]))
    assert record == ([1, 2, 3], {1: b"one"})
    assert not list(Path(path).parent.iterdir())


def test_the_newest_answers_are_there_and_what_runs_for_long(path: str, child_env: dict[str, str]) -> None:
    code = "logbook.begin(0)\nfor n in range(1, 96): logbook.begin(n); logbook.end(n, b'%d' % n)"
    end_writer(start_writer(path, child_env, code))
    record = asyncio.run(read_logbook(path, range(97)))
    assert record is not None
    assert 0 in record.begun
    assert 96 not in record.begun
    assert {number: b"%d" % number for number in range(86, 96)}.items() <= record.answers.items()
    assert len(record.answers) <= 20


def test_a_line_that_was_cut_off_has_not_been_said(path: str, child_env: dict[str, str]) -> None:
    end_writer(start_writer(path, child_env, "logbook.begin(1); logbook.end(1, b'one')"))
    os.truncate(path + ".0", Path(path + ".0").stat().st_size - 1)
    assert asyncio.run(read_logbook(path, [1])) == ([1], {})


def test_nobody_can_tell_without_a_logbook(path: str) -> None:
    assert asyncio.run(read_logbook(path, [1])) is None


def test_the_logbook_of_a_worker_that_lives_is_left_alone(
    path: str, child_env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dask_logbook, "_RELEASED_WITHIN", 0.05)
    writer = start_writer(path, child_env, "logbook.begin(1)")
    assert asyncio.run(read_logbook(path, [1])) is None
    assert Path(path + ".0").exists()
    end_writer(writer)


def test_a_sealed_logbook_is_read_though_its_worker_has_not_quite_ended(
    path: str, child_env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dask_logbook, "_RELEASED_WITHIN", 0.05)
    code = "logbook.begin(1); logbook.begin(2); logbook.seal(); logbook.end(2, b'two'); assert not logbook.begin(3)"
    writer = start_writer(path, child_env, code)
    assert asyncio.run(read_logbook(path, [1, 2, 3])) == ([1, 2], {2: b"two"})
    assert not Path(path + ".0").exists()
    end_writer(writer)


def test_nothing_begins_twice(logbook: Logbook) -> None:
    assert logbook.begin(1)
    assert not logbook.begin(1)
    logbook.end(1, b"")
    assert not logbook.begin(1)


def test_what_was_taken_back_does_not_begin(logbook: Logbook) -> None:
    logbook.begin(1)
    logbook.end(1, b"")
    logbook.begin(2)
    assert logbook.take_back([1, 2, 3, 4], 0.0) == ([3, 4], [2])
    assert not logbook.begin(3)
    assert logbook.begin(5)
    assert logbook.take_back([3, 4], 0.0) == ([], [])


def test_nothing_is_taken_from_behind_what_has_just_begun(logbook: Logbook) -> None:
    logbook.begin(1)
    assert logbook.take_back([1, 2], NEVER) == ([], [1])
    assert logbook.take_back([2], 0.001) == ([], []), "it may be on its way"
    assert logbook.take_back([2], 0.001, is_blocked=True) == ([2], [])
    give_up = time.monotonic() + PATIENCE
    while not (answer := logbook.take_back([1, 3], 0.01)).taken:
        assert time.monotonic() < give_up
    assert answer == ([3], [1])


def test_a_closed_logbook_leaves_no_file(path: str) -> None:
    logbook = Logbook(path, 2)
    for ticket in range(5):
        logbook.begin(ticket)
        logbook.end(ticket, b"")
    assert len(list(Path(path).parent.iterdir())) == 2
    logbook.close()
    assert not list(Path(path).parent.iterdir())
    assert not logbook.begin(9)


def test_a_logbook_that_cannot_be_written_is_none(tmp_path: Path) -> None:
    logbook = Logbook(str(tmp_path / "nowhere" / "shpool-1"), 2)
    assert logbook.path is None
    assert logbook.begin(1)


def test_logbooks_of_the_long_dead_are_swept(tmp_path: Path, child_env: dict[str, str]) -> None:
    old, new = tmp_path / "shpool-old", tmp_path / "shpool-new"
    alive = start_writer(str(tmp_path / "shpool-alive"), child_env, "pass")
    for dead in (old, new):
        end_writer(start_writer(str(dead), child_env, "pass"))
    for file in (tmp_path / "shpool-old.0", tmp_path / "shpool-alive.0"):
        os.utime(file, (1, 1))
    sweep(str(tmp_path / "worker-1"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["shpool-alive.0", "shpool-new.0"]
    end_writer(alive)
