"""What a run would do: for --dry-run."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, BinaryIO

from shpool_cli.console import CommandError, ExitCode, say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shpool.jobs import Job
    from shpool.journal import JobRecord
    from shpool_cli.order import Work


def foresee(work: Work, stdout: BinaryIO, check_login: Callable[[], None]) -> None:
    """Say for each job what a run would do with it; nothing runs, and nothing is made.

    Args:
        work: What would be done.
        stdout: Where that is written.
        check_login: Called once, before the first job that would run: without one a run does not log in.

    Raises:
        JournalError: The journal cannot be used.
        CommandError: Standard output takes no more.
    """
    would = done = 0
    try:
        for line in _foreseen(work):
            if line["would_run"] and not would:
                check_login()
            would += line["would_run"] is True
            done += line["status"] == "done"
            stdout.write(f"{json.dumps(line)}\n".encode())
        stdout.flush()
    except OSError as exc:
        msg = f"standard output cannot be written: {exc.strerror}"
        raise CommandError(msg, "make room, or send it elsewhere", ExitCode.FAILED) from None
    say(f"dry run: {would} of {work.count} jobs would run, {done} are done")


def _foreseen(work: Work) -> Iterator[dict[str, object]]:
    order = work.order
    left = work.count if order.limit is None else order.limit
    claimed: set[int] = set()  # hashes of keys: a million of them are 70 MB, the texts would be twice that
    for job, record in _with_records(work):
        state = "new" if record is None else {"running": "cut off"}.get(record.status, record.status)
        is_wanted = state != "done" and (not order.only_failed or (record is not None and record.has_failed))
        if is_wanted and order.journal is not None:
            name = hash(job.key)
            if name in claimed:
                state, is_wanted = "duplicate", False
            claimed.add(name)
        would_run = is_wanted and left > 0
        left -= would_run
        yield {"index": job.index, "key": job.key, "status": state, "would_run": would_run}


def _with_records(work: Work) -> Iterator[tuple[Job, JobRecord | None]]:
    """Pair the jobs with what the journal, if there is one to go on with, knows of them."""
    path = work.order.journal
    if path is None or work.is_begun_anew:
        return ((job, None) for job in work.jobs())
    from shpool.journal import JournalView

    view = JournalView(path)
    view.check_purpose(str(work.function), work.order.key)
    return view.lookup(work.jobs())
