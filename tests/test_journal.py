"""The journal: what was told is there, whatever dies; what is not its own is left alone."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from shpool.errors import (
    JournalError,
    JournalFullError,
    JournalInUseError,
    JournalMismatchError,
    JournalNotFoundError,
    NotAJournalError,
)
from shpool.jobs import Job, JobResult
from shpool.journal import Claim, Ended, Journal, lock
from shpool.journal.file import FORMAT_VERSION
from shpool.journal.keys import KeyFilter
from shpool.journal.lock import RunLock
from shpool.journal.view import JournalView

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


TARGET = "tiles:fetch"
_PATIENCE = 30  # s; what takes longer hangs


def a_job(number: int, index: int | None = None) -> Job:
    return Job(number if index is None else index, f"key-{number}", (number,), {"size": 10})


def done(job: Job, seconds: float = 0.5) -> JobResult:
    return JobResult(job.index, job.key, "done", None, None, 1, seconds)


def failed(job: Job, error: Exception | None = None) -> JobResult:
    return JobResult(job.index, job.key, "failed", None, error or ValueError("no data"), 3, 0.25)


def begin(journal: Journal, *jobs: Job) -> None:
    for job in jobs:
        assert journal.claim(job).verdict == "run"
        journal.begin(job, 4711)


def carry_out(journal: Journal, *jobs: Job, fails: bool = False) -> None:
    """Run jobs that the journal wants to be run."""
    for job in jobs:
        begin(journal, job)
        journal.end(failed(job) if fails else done(job), None if fails else f'{{"n": {job.args[0]}}}')


def verdicts(path: Path, *numbers: int, only_failed: bool = False) -> list[str]:
    """Return what a new run is told to do."""
    with Journal(path, TARGET) as journal:
        return [journal.claim(a_job(number), only_failed=only_failed).verdict for number in numbers]


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.db"


@contextlib.contextmanager
def script(text: str, *args: object, env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """Run a script in a process that is gone in the end."""
    command = [sys.executable, "-c", text, *map(str, args)]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


# What a run is told to do


def test_what_is_done_is_not_run_again(path: Path) -> None:
    with Journal(path, TARGET) as journal:
        carry_out(journal, a_job(1))
    with Journal(path, TARGET) as journal:
        claim = journal.claim(a_job(1, index=7))
    assert claim.verdict == "done"
    assert claim.record is not None
    assert (claim.record.result, claim.record.attempts, claim.record.seconds) == ('{"n": 1}', 1, 0.5)


def test_what_failed_is_run_again(path: Path) -> None:
    with Journal(path, TARGET) as journal:
        carry_out(journal, a_job(1), fails=True)
    with Journal(path, TARGET) as journal:
        claim = journal.claim(a_job(1))
        assert claim.verdict == "run"
        assert claim.record is not None
        assert (claim.record.error_type, claim.record.error) == ("ValueError", "no data")
        journal.end(done(a_job(1)), "1")
    record = JournalView(path).record("key-1")
    assert record is not None
    assert (record.status, record.error, record.traceback, record.starts) == ("done", None, None, 2)


def test_what_was_cut_off_is_run_again(path: Path) -> None:
    with Journal(path, TARGET) as journal:
        journal.claim(a_job(1))
        journal.begin(a_job(1))
    assert JournalView(path).summary().cut_off == 1
    assert verdicts(path, 1) == ["run"]


def test_only_failed_skips_the_new_and_the_cut_off(path: Path) -> None:
    with Journal(path, TARGET) as journal:
        carry_out(journal, a_job(1))
        carry_out(journal, a_job(2), fails=True)
        journal.claim(a_job(3))
        journal.begin(a_job(3))
    assert verdicts(path, 1, 2, 3, 4, only_failed=True) == ["done", "run", "skip", "skip"]


def test_a_failed_job_that_is_cut_off_the_next_time_has_still_failed(path: Path) -> None:
    with Journal(path, TARGET) as journal:
        carry_out(journal, a_job(1), fails=True)
    with Journal(path, TARGET) as journal:
        journal.claim(a_job(1))
        journal.begin(a_job(1))
    assert verdicts(path, 1, only_failed=True) == ["run"]


def test_keys_count_and_places_in_the_input_do_not(path: Path) -> None:
    with Journal(path, TARGET) as journal:
        carry_out(journal, *(a_job(number, index=99 - number) for number in range(100)))
    with Journal(path, TARGET) as journal:
        claims = [journal.claim(a_job(number, index=number)) for number in range(101)]
    assert [claim.verdict for claim in claims] == ["done"] * 100 + ["run"]


def test_a_duplicate_of_a_running_job_is_told_with_it(path: Path) -> None:
    told: list[Ended] = []
    with Journal(path, TARGET, on_durable=told.extend) as journal:
        journal.claim(a_job(1, index=0))
        assert journal.claim(a_job(1, index=3)) == Claim("duplicate")
        journal.begin(a_job(1))
        assert journal.claim(a_job(1, index=5)) == Claim("duplicate")
        journal.end(done(a_job(1)), "1")
    assert [(ended.indexes, ended.record.key) for ended in told] == [((0, 3, 5), "key-1")]


@pytest.mark.parametrize("fails", [False, True])
def test_a_duplicate_of_an_ended_job_has_its_record(path: Path, *, fails: bool) -> None:
    """A failed one is not run again either: not in the same run."""
    with Journal(path, TARGET) as journal:
        carry_out(journal, a_job(1), fails=fails)
        journal.flush()
        claim = journal.claim(a_job(1, index=5))
    assert claim.verdict == "duplicate"
    assert claim.record is not None
    assert claim.record.status == ("failed" if fails else "done")


def test_a_job_ends_once(path: Path) -> None:
    with Journal(path, TARGET) as journal:
        with pytest.raises(ValueError, match="claim each job once"):
            journal.begin(a_job(1))
        carry_out(journal, a_job(1))
        with pytest.raises(ValueError, match="end it once"):
            journal.end(done(a_job(1)))


def test_a_key_that_was_never_added_may_be_denied_and_an_added_one_never() -> None:
    keys = KeyFilter()
    for number in range(1000):
        keys.add(f"old-{number}")
    assert all(f"old-{number}" in keys for number in range(1000))
    assert sum(f"new-{number}" in keys for number in range(1000)) < 10


# What is told


@pytest.mark.parametrize("is_begun_before", [False, True])
def test_ends_are_told_in_order_and_only_when_another_process_could_read_them(
    path: Path, *, is_begun_before: bool
) -> None:
    """As the file has them, whether their beginnings were in it already or not."""
    told: list[str] = []

    def tell(ended: list[Ended]) -> None:
        for one in ended:
            record = view.record(one.record.key)
            assert record == one.record
            told.append(one.record.key)

    jobs = [a_job(number) for number in range(50)]
    with Journal(path, TARGET, on_durable=tell) as journal:
        view = JournalView(path)
        if is_begun_before:
            begin(journal, *jobs)
            journal.flush()
            for job in jobs:
                journal.end(done(job), f'{{"n": {job.index}}}')
        else:
            carry_out(journal, *jobs)
        journal.flush()
        assert told == [job.key for job in jobs]


def test_begun_jobs_are_seen_before_they_end(path: Path) -> None:
    with Journal(path, TARGET) as journal:
        journal.claim(a_job(1))
        journal.begin(a_job(1), 4711)
        view = JournalView(path)
        eventually(lambda: view.summary().running == 1)
        journal.end(done(a_job(1)), "1")
        journal.flush()
        record = view.record("key-1")
    assert record is not None
    assert (record.status, record.worker, record.starts) == ("done", 4711, 1)


def test_a_job_that_is_begun_again_in_a_run_has_been_started_once(path: Path) -> None:
    """Whether a beginning was written or not when the next attempt begins."""
    with Journal(path, TARGET) as journal:
        for number in (1, 2):
            journal.claim(a_job(number))
            journal.begin(a_job(number), 4711)
            if number == 1:
                journal.flush()
            journal.begin(a_job(number), 4712)
            journal.end(done(a_job(number)), "1")
    assert [record.starts for record in JournalView(path).records()] == [1, 1]


def test_what_the_callback_raises_reaches_the_run_and_costs_no_row(path: Path) -> None:
    told: list[int] = []

    def tell(ended: list[Ended]) -> None:
        told.append(len(ended))
        raise BrokenPipeError

    with Journal(path, TARGET, on_durable=tell) as journal:
        carry_out(journal, a_job(1))
        with pytest.raises(BrokenPipeError):
            journal.flush()
        with pytest.raises(BrokenPipeError):
            journal.claim(a_job(2))
    assert told == [1]
    assert JournalView(path).summary().done == 1


def test_an_error_that_nobody_met_is_raised_at_the_end(path: Path) -> None:
    def tell(ended: list[Ended]) -> None:
        raise BrokenPipeError

    journal = Journal(path, TARGET, on_durable=tell)
    carry_out(journal, a_job(1))
    with pytest.raises(BrokenPipeError):
        journal.close()
    journal.close()
    assert verdicts(path, 1) == ["done"]


@pytest.mark.slow
def test_a_slow_reader_of_results_holds_up_the_run_and_not_the_memory(path: Path) -> None:
    """Rows gather up to a bound; then whoever brings more waits."""
    may_go = threading.Event()
    ended: list[int] = []

    def tell(batch: list[Ended]) -> None:
        assert may_go.wait(_PATIENCE)

    def work() -> None:
        for number in range(20_000):
            carry_out(journal, a_job(number))
            ended.append(number)

    with Journal(path, TARGET, on_durable=tell) as journal:
        worker = threading.Thread(target=work)
        worker.start()
        # A condition does not tell otherwise who waits on it.
        eventually(lambda: getattr(journal._writer._room, "_waiters") or not worker.is_alive())  # noqa: B009 - no stub
        assert len(ended) < 10_000
        may_go.set()
        worker.join(_PATIENCE)
        journal.flush()
    assert JournalView(path).summary().done == 20_000


def test_texts_that_are_no_unicode_are_recorded(path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.tif")
    job = Job(0, name, (name, {1}, Path("a")))
    with Journal(path, name) as journal:
        journal.claim(job)
        journal.end(failed(job, ValueError(name)), place=name)
    record = JournalView(path).record(name)
    assert record is not None
    assert record.error == "caf\\udce9.tif"


def test_errors_that_cannot_be_shown_and_endless_ones_are_recorded(path: Path) -> None:
    class SilentError(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    with Journal(path, TARGET) as journal:
        for number, error in enumerate((SilentError(), ValueError("x" * 10**6))):
            journal.claim(a_job(number))
            journal.end(failed(a_job(number), error))
    silent, endless = JournalView(path).records()
    assert silent.error_type is not None
    assert silent.error_type.endswith("SilentError")
    assert len(endless.error or "") < 5000
    assert len(endless.traceback or "") < 25_000


def test_arguments_without_json_form_are_shown(path: Path) -> None:
    circle: list[object] = []
    circle.append(circle)
    with Journal(path, TARGET) as journal:
        for number, argument in enumerate((Path("a.tif"), {(1, 2): 3}, circle)):
            job = Job(number, f"key-{number}", (argument,))
            journal.claim(job)
            journal.end(done(job), "1")
    path_record, *_ = JournalView(path).records()
    assert "a.tif" in path_record.arguments


# The file


def test_a_journal_is_for_its_user_only(path: Path) -> None:
    with Journal(path, TARGET) as journal:
        carry_out(journal, a_job(1))
        journal.flush()
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert modes == dict.fromkeys(("run.db", "run.db-wal", "run.db-shm", "run.db.lock"), 0o600)


def test_a_closed_journal_is_one_file(path: Path) -> None:
    with Journal(path, TARGET) as journal:
        carry_out(journal, a_job(1))
    assert list(path.parent.iterdir()) == [path]


def test_an_empty_file_may_become_a_journal(path: Path) -> None:
    path.touch()
    with Journal(path, TARGET) as journal:
        carry_out(journal, a_job(1))
    assert verdicts(path, 1) == ["done"]


def test_fresh_forgets_everything_of_whatever_target_and_format(path: Path) -> None:
    with Journal(path, "other:target") as journal:
        carry_out(journal, a_job(1), a_job(2))
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {FORMAT_VERSION + 1}")
    with Journal(path, TARGET, fresh=True) as journal:
        assert journal.run == 1
        carry_out(journal, a_job(1))
    assert verdicts(path, 1, 2) == ["done", "run"]


def test_what_is_to_be_replaced_is_known_from_the_emptying_to_the_first_job(path: Path) -> None:
    """Also after runs that were killed before it."""
    with Journal(path, TARGET) as journal:
        carry_out(journal, a_job(1))
    Journal(path, TARGET, replaced="not emptied, nothing to replace").close()
    assert JournalView(path).replaced() == ""
    Journal(path, TARGET, fresh=True, replaced="the output").close()
    Journal(path, TARGET).close()
    assert JournalView(path).replaced() == "the output"
    with Journal(path, TARGET) as journal:
        carry_out(journal, a_job(1))
    assert JournalView(path).replaced() == ""


def test_another_target_is_refused(path: Path) -> None:
    Journal(path, "other:target").close()
    before = path.read_bytes()
    with pytest.raises(JournalMismatchError, match=r"'other:target', not 'tiles:fetch'.*--fresh"):
        Journal(path, TARGET)
    assert path.read_bytes()[100:] == before[100:]
    assert list(path.parent.iterdir()) == [path]


def test_other_names_for_the_jobs_are_refused(path: Path) -> None:
    Journal(path, TARGET, key_field="id").close()
    with pytest.raises(JournalMismatchError, match=r"by their field 'id', not by all their arguments; add --key id"):
        Journal(path, TARGET)
    Journal(path, TARGET, fresh=True).close()
    with pytest.raises(JournalMismatchError, match="leave out --key"):
        JournalView(path).check_purpose(TARGET, "id")


def test_a_journal_that_does_not_say_what_names_its_jobs_goes_on(path: Path) -> None:
    """An earlier version wrote no such note."""
    Journal(path, TARGET, key_field="id").close()
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DELETE FROM meta WHERE name = 'key_field'")
    for key_field in ("id", None, "name"):
        Journal(path, TARGET, key_field=key_field).close()


def test_another_format_is_refused(path: Path) -> None:
    Journal(path, TARGET).close()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {FORMAT_VERSION + 1}")
    with pytest.raises(
        JournalMismatchError, match=rf"format version {FORMAT_VERSION + 1}, not {FORMAT_VERSION}.*--fresh"
    ):
        Journal(path, TARGET)
    with pytest.raises(JournalMismatchError):
        JournalView(path)


@pytest.mark.parametrize("begin", [100, 8192], ids=["tables", "rows"])
def test_a_damaged_journal_begins_anew_where_asked(path: Path, begin: int) -> None:
    with Journal(path, TARGET) as journal:
        carry_out(journal, *map(a_job, range(500)))
    content = path.read_bytes()
    path.write_bytes(content[:begin] + b"\xff" * (len(content) - begin))
    with pytest.raises(JournalError, match=r"it is damaged .*begin anew with --fresh"):
        verdicts(path, *range(500))
    with Journal(path, TARGET, fresh=True) as journal:
        carry_out(journal, a_job(1))
    assert verdicts(path, 1, 2) == ["done", "run"]


def test_what_is_damaged_beyond_recognition_is_kept(path: Path) -> None:
    Journal(path, TARGET).close()
    path.write_bytes(path.read_bytes()[:50])
    for fresh in (False, True):
        with pytest.raises(JournalError, match=r"it is damaged .*give another --journal"):
            Journal(path, TARGET, fresh=fresh)
    assert path.stat().st_size == 50


@pytest.mark.parametrize("content", [b"notes\n", b"x" * 10_000, b"SQLite format 3\0" + b"\xff" * 4096])
@pytest.mark.parametrize("fresh", [False, True])
def test_a_file_that_is_no_journal_is_refused_and_kept(path: Path, content: bytes, *, fresh: bool) -> None:
    path.write_bytes(content)
    with pytest.raises(NotAJournalError, match="give another --journal"):
        Journal(path, TARGET, fresh=fresh)
    with pytest.raises(NotAJournalError):
        JournalView(path)
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("fresh", [False, True])
def test_another_database_is_refused_and_kept(path: Path, *, fresh: bool) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE jobs (id INTEGER)")
    content = path.read_bytes()
    with pytest.raises(NotAJournalError, match="another SQLite database"):
        Journal(path, TARGET, fresh=fresh)
    assert path.read_bytes() == content


def test_places_that_hold_no_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="it is a folder"):
        Journal(tmp_path, TARGET)
    with pytest.raises(JournalError, match=r"no folder .*missing; create it"):
        Journal(tmp_path / "missing" / "run.db", TARGET)
    with pytest.raises(NotAJournalError, match="no regular file"):
        Journal("/dev/null", TARGET)
    with pytest.raises(JournalNotFoundError):
        JournalView(tmp_path / "run.db")
    assert list(tmp_path.iterdir()) == []


def test_a_removed_journal_ends_the_run_and_tells_nothing_more(path: Path) -> None:
    """SQLite would go on writing to a file that nobody can open any more."""
    told: list[Ended] = []
    with Journal(path, TARGET, on_durable=told.extend) as journal:
        carry_out(journal, a_job(1))
        journal.flush()
        path.unlink()
        carry_out(journal, a_job(2))
        with pytest.raises(JournalError, match="removed or replaced"):
            journal.flush()
    assert [ended.record.key for ended in told] == ["key-1"]


@pytest.mark.slow
def test_links_lead_to_the_one_lock_of_the_file(path: Path) -> None:
    link = path.with_name("link.db")
    link.symlink_to(path)
    with Journal(link, TARGET), pytest.raises(JournalInUseError):
        Journal(path, TARGET)


# One run at a time


@pytest.mark.slow
def test_a_second_run_is_refused_and_named(path: Path) -> None:
    with Journal(path, TARGET) as journal:
        for fresh in (False, True):
            with pytest.raises(JournalInUseError, match=str(os.getpid())):
                Journal(path, TARGET, fresh=fresh)
        carry_out(journal, a_job(1))
    assert verdicts(path, 1) == ["done"]


@pytest.mark.slow
def test_no_two_hold_a_lock_whose_file_comes_and_goes(path: Path) -> None:
    """Whoever opened the lock file just before its holder removed it must not take that for the lock."""
    holders: list[int] = []
    most: list[int] = []

    def come_and_go(number: int) -> None:
        for _ in range(300):
            with contextlib.suppress(JournalInUseError):
                lock = RunLock(path)
                holders.append(number)
                time.sleep(0)  # lets the others run
                most.append(len(holders))
                holders.remove(number)
                lock.release()

    threads = [threading.Thread(target=come_and_go, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_PATIENCE)
    assert set(most) == {1}


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # of 3.12 and later
def test_a_forked_child_does_not_hold_the_lock(path: Path) -> None:
    """It may outlive a killed run."""
    first = RunLock(path)
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write_end)
        os.read(read_end, 1)  # until the parent lets go
        os._exit(0)
    os.close(read_end)
    try:
        os.close(first._descriptor)  # as when the run is killed: the file stays
        lock._held.discard(first._descriptor)
        RunLock(path).release()
    finally:
        os.close(write_end)
        os.waitpid(child, 0)


# Killed at any moment

WRITER = """
import sys
from shpool.jobs import Job, JobResult
from shpool.journal import Journal

path, total = sys.argv[1], int(sys.argv[2])

def tell(ended):
    print(*(one.record.key for one in ended), sep="\\n", flush=True)

with Journal(path, "tiles:fetch", on_durable=tell) as journal:
    print("begun", flush=True)
    for number in range(total):
        job = Job(number, f"key-{number}", (number,))
        if journal.claim(job).verdict == "run":
            journal.begin(job)
            journal.end(JobResult(number, job.key, "done", None, None, 1, 0.0), f'"{"x" * (number % 3000)}"')
"""


STAYING_WRITER = WRITER + "    import signal; signal.pause()"


def intact(path: Path) -> bool:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def files_beside(path: Path) -> set[str]:
    return {file.name for file in path.parent.iterdir()}


@pytest.mark.slow
def test_a_killed_run_loses_nothing_that_it_told(path: Path, child_env: dict[str, str]) -> None:
    told: set[str] = set()
    dice = random.Random(4711)
    for _ in range(8):
        with script(WRITER, path, 100_000, env=child_env) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "begun\n"
            told |= {child.stdout.readline().strip() for _ in range(dice.choice([0, 1, 300, 3000]))}
            child.kill()
            told |= set(child.stdout.read().split("\n")[:-1])  # a last line without its end was cut off
        before = files_beside(path)
        view = JournalView(path)
        records = {record.key: record for record in view.records("done")}
        assert told <= records.keys()
        assert all(len(r.result or "") == int(r.key.removeprefix("key-")) % 3000 + 2 for r in records.values())
        assert view.live_pid() is None
        assert files_beside(path) == before
    with Journal(path, TARGET) as journal:
        assert all(journal.claim(a_job(int(key.removeprefix("key-")))).verdict == "done" for key in told)
    assert told
    assert intact(path)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.slow
def test_a_run_killed_while_it_opens_or_closes_leaves_a_usable_journal(path: Path, child_env: dict[str, str]) -> None:
    dice = random.Random(4711)
    for _ in range(6):
        with script(WRITER, path, 3, env=child_env) as child:
            eventually(path.exists)
            time.sleep(dice.uniform(0, 0.15))
            child.kill()
    with Journal(path, TARGET) as journal:
        for number in range(3):
            if journal.claim(a_job(number)).verdict == "run":
                journal.end(done(a_job(number)), "1")
    assert intact(path)
    assert JournalView(path).summary().done == 3


@pytest.mark.slow
def test_another_process_is_named_while_it_lives_and_forgotten_when_killed(
    path: Path, child_env: dict[str, str]
) -> None:
    with script(STAYING_WRITER, path, 1, env=child_env) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "begun\n"
        assert JournalView(path).live_pid() == child.pid
        with pytest.raises(JournalInUseError, match=str(child.pid)):
            Journal(path, TARGET)
        child.send_signal(signal.SIGKILL)
        child.wait(_PATIENCE)
    Journal(path, TARGET).close()


# A full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of a megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk takes root, and a kernel that lets it")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(disk: Path) -> Path:
    """Leave no byte free."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 4096):
            pass
    return ballast


def test_a_full_disk_ends_the_run_and_loses_nothing_told(small_disk: Path) -> None:
    path, told = small_disk / "run.db", list[Ended]()
    with pytest.raises(JournalFullError, match="free some and run the same command again, "):
        run_until_full(path, told)
    records = {record.key for record in JournalView(path).records("done")}
    assert {ended.record.key for ended in told} == records
    assert len(records) > 10
    path.with_name("ballast").unlink()
    expected = ["done" if f"key-{number}" in records else "run" for number in range(1000)]
    assert verdicts(path, *range(1000)) == expected


def run_until_full(path: Path, told: list[Ended]) -> None:
    (path.parent / "ballast").write_bytes(b"x" * 300_000)
    with Journal(path, TARGET, on_durable=told.extend) as journal:
        for number in range(1000):
            journal.claim(a_job(number))
            journal.begin(a_job(number))
            journal.end(done(a_job(number)), f'"{"x" * 2000}"')
            if number % 10 == 0:
                journal.flush()


def test_the_error_of_a_full_disk_counts_what_is_recorded(small_disk: Path) -> None:
    path, told = small_disk / "run.db", list[Ended]()
    with pytest.raises(JournalFullError) as caught:
        run_until_full(path, told)
    assert caught.value.recorded == len(told)


def test_a_full_disk_is_how_the_run_ended_and_no_kill(small_disk: Path) -> None:
    path, told = small_disk / "run.db", list[Ended]()
    with pytest.raises(JournalFullError):
        run_until_full(path, told)
    summary = JournalView(path).summary()
    (run,) = summary.runs
    assert (summary.state, run.reason, run.done) == ("ended", "no space is left on its disk", len(told))


@pytest.mark.parametrize("is_refused", [True, False])
def test_a_run_that_ends_on_a_disk_without_a_free_byte_says_so(small_disk: Path, *, is_refused: bool) -> None:
    """Whether it was the journal or something else that found no space: output and results may lie there as well."""
    path = small_disk / "run.db"
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.raises(JournalFullError) if is_refused else contextlib.nullcontext())
        journal = stack.enter_context(Journal(path, TARGET))
        carry_out(journal, a_job(1))
        journal.flush()
        fill(small_disk)
        journal.note(exit_code=1)
        if is_refused:
            carry_out(journal, a_job(2))
            journal.flush()
    assert not path.with_name("run.db.lock").exists()
    summary = JournalView(path).summary()
    (run,) = summary.runs
    assert (summary.state, summary.done, run.exit_code) == ("ended", 1, 1)
    assert run.reason == ("no space is left on its disk" if is_refused else None)


def test_a_disk_that_is_full_from_the_start_is_told_at_once(small_disk: Path) -> None:
    ballast = fill(small_disk)
    with pytest.raises(JournalFullError):
        Journal(small_disk / "run.db", TARGET)
    ballast.unlink()
    assert verdicts(small_disk / "run.db", 1) == ["run"]


def test_a_read_only_place_is_refused_and_can_be_read(small_disk: Path) -> None:
    path = small_disk / "run.db"
    with Journal(path, TARGET) as journal:
        carry_out(journal, a_job(1))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(JournalError, match=r"Read-only.*give a --journal in a folder you may write to"):
        Journal(path, TARGET)
    assert JournalView(path).summary().done == 1


@pytest.mark.slow
def test_a_killed_journal_in_a_read_only_place_can_be_read(small_disk: Path, child_env: dict[str, str]) -> None:
    path = small_disk / "run.db"
    with script(STAYING_WRITER, path, 3, env=child_env) as child:
        assert child.stdout is not None
        assert [child.stdout.readline() for _ in range(4)] == ["begun\n", "key-0\n", "key-1\n", "key-2\n"]
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert JournalView(path).summary().done == 3


# Reading


def test_a_view_creates_nothing_beside_a_closed_journal(path: Path) -> None:
    with Journal(path, TARGET) as journal:
        carry_out(journal, a_job(1))
    before = path.stat()
    view = JournalView(path)
    assert (view.summary().done, view.live_pid()) == (1, None)
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def test_a_view_of_a_live_run_lets_it_end_cleanly(path: Path) -> None:
    with Journal(path, TARGET) as journal:
        carry_out(journal, a_job(1))
        journal.flush()
        view = JournalView(path)
        records = view.records()
        next(records)
        assert view.live_pid() == os.getpid()
    assert list(path.parent.iterdir()) == [path]


def test_an_empty_file_is_no_journal_to_read(path: Path) -> None:
    path.touch()
    with pytest.raises(NotAJournalError, match="it is empty"):
        JournalView(path)


def test_the_summary_tells_what_became_of_the_jobs(path: Path) -> None:
    now = [1000.0]
    with Journal(path, TARGET, command="shpool run a", clock=lambda: now[0]) as journal:
        journal.note(jobs=6, workers=2, logins=1, waits=4, waited=2.5)
        for number in range(3):
            journal.claim(a_job(number))
            journal.end(done(a_job(number), seconds=number), "1")
        carry_out(journal, a_job(4), fails=True)
        journal.claim(a_job(5))
        journal.begin(a_job(5))
        now[0] = 1010.0
        journal.flush()
        assert JournalView(path).summary().running == 1
        journal.note(logins=2, exit_code=130)
    summary = JournalView(path).summary(slowest=2)
    assert (summary.done, summary.failed, summary.running, summary.cut_off) == (3, 1, 0, 1)
    assert [record.key for record in summary.slowest] == ["key-2", "key-1"]
    assert (summary.first, summary.target, summary.live_pid) == (1000.0, TARGET, None)
    assert (summary.logins, summary.waits, summary.rate) == (2, 4, 0.4)
    (run,) = summary.runs
    assert (run.pid, run.command, run.jobs, run.workers) == (os.getpid(), "shpool run a", 6, 2)
    assert (run.done, run.failed, run.begun, run.ended, run.exit_code) == (3, 1, 1000.0, 1010.0, 130)


def test_like_errors_are_one_kind_with_an_example(path: Path) -> None:
    errors = [*(ValueError(f"tile {number} has no data") for number in range(5)), KeyError("B04"), ValueError("late")]
    with Journal(path, TARGET) as journal:
        for number, error in enumerate(errors):
            journal.claim(a_job(number))
            journal.end(failed(a_job(number), error), place="tiles.py:12")
    kinds = JournalView(path).summary().errors
    assert [(kind.error_type, kind.text, kind.count) for kind in kinds] == [
        ("ValueError", "tile # has no data", 5),
        ("KeyError", "'#'", 1),
        ("ValueError", "late", 1),
    ]
    example = kinds[0].example
    assert (example.error, example.place, example.key) == ("tile 0 has no data", "tiles.py:12", "key-0")
    assert "ValueError: tile 0" in (example.traceback or "")


def test_records_come_in_pages_and_by_status(path: Path) -> None:
    with Journal(path, TARGET) as journal:
        carry_out(journal, *map(a_job, range(1200)))
        carry_out(journal, *map(a_job, range(1200, 1210)), fails=True)
    view = JournalView(path)
    assert [record.key for record in view.records()] == [f"key-{number}" for number in range(1210)]
    assert len(list(view.records("failed"))) == 10


def test_jobs_are_looked_up_in_the_order_of_the_input(path: Path) -> None:
    with Journal(path, TARGET) as journal:
        carry_out(journal, a_job(1), a_job(3))
    pairs = JournalView(path).lookup(map(a_job, [3, 2, 1]))
    assert [(job.key, record and record.status) for job, record in pairs] == [
        ("key-3", "done"),
        ("key-2", None),
        ("key-1", "done"),
    ]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_jobs(path: Path) -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    with Journal(path, TARGET) as journal:
        for number in range(100_000):
            carry_out(journal, a_job(number))
        journal.flush()
        assert not journal._in_flight
        assert not journal._unsaved
        assert process.memory_info().rss - before < 30e6
    with Journal(path, TARGET) as journal:
        assert all(journal.claim(a_job(number)).verdict == "done" for number in range(10_000))
        assert process.memory_info().rss - before < 30e6
