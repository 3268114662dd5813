"""Downloads from end to end: check everything, open journal and output, log in, and let ``filerun`` fetch the files."""

from __future__ import annotations

import contextlib
import json
import os
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO

from shpool_cli.console import CommandError, say
from shpool_cli.credentials import make_session
from shpool_cli.filelist import Files
from shpool_cli.filerun import Ends, FileRun
from shpool_cli.inputs import open_input
from shpool_cli.journaling import opened_journal, opened_output
from shpool_cli.output.records import recalled
from shpool_cli.output.results import open_output

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from shpool.journal import JobRecord, Journal
    from shpool_cli.filereport import FileReport, FileSummary
    from shpool_cli.filerun import Order
    from shpool_cli.output.records import Record
    from shpool_cli.output.results import ResultWriter


def carry_out(order: Order, stdout: BinaryIO, summary: FileSummary) -> None:
    """Fetch the files; cheap checks come first, and ``summary.jobs`` is set once all of them have passed."""
    from shpool.downloads.curling import load_pycurl

    load_pycurl()
    with (
        open_input(order.source, order.form) as source,
        contextlib.ExitStack() as outputs,
        contextlib.ExitStack() as journals,  # ends before the output does: its last words go there
    ):
        files = Files(source, order.target)
        files.check()
        _check_folder(order.folder)
        session = make_session(order.login, may_prompt=order.source != "-") if files.count else None
        writer = outputs.enter_context(open_output(order.output, stdout)) if order.is_begun_anew else None
        told: list[FileReport] = []
        journal = None
        if order.journal is not None:
            journal = journals.enter_context(
                opened_journal(order.journal, order.target, told, summary, jobs=files.count, fresh=order.fresh)
            )
        if writer is None:
            writer = outputs.enter_context(opened_output(order.output, stdout, journal))
        former = _catch_up(order, files, writer, journal)
        summary.lost = len(former.lost)
        former.tell(only_failed=order.only_failed)
        if session is not None and former.left:
            FileRun(order, files, session, Ends(writer, journal, told, former.done, former.lost), summary).carry()
        else:  # nothing to do is no reason to log in
            summary.jobs, summary.before = files.count, former.done
            summary.skipped = files.count - former.done


def _check_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        msg = f"the folder {folder} cannot be made: {exc.strerror}"
        raise CommandError(msg, "give another --to") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        msg = f"the folder {folder} cannot be written to"
        raise CommandError(msg, "give another --to, or change its mode")


@dataclass
class _Former:
    """What former runs have left.

    Attributes:
        done: Files that are done and there.
        left: Files to fetch.
        lost: Indexes of files that were done and are not there as they were, in order.
        example: One of these.
    """

    done: int = 0
    left: int = 0
    lost: array[int] = field(default_factory=lambda: array("q"))
    example: str = ""

    def tell(self, *, only_failed: bool) -> None:
        """Say what is lost."""
        if self.lost:
            count = "1 file that was done is" if len(self.lost) == 1 else f"{len(self.lost)} files that were done are"
            then = "--only-failed leaves that so" if only_failed else "fetched anew"
            say(f"warning: {count} gone or of another size, such as {self.example}: {then}")


def _catch_up(order: Order, files: Files, writer: ResultWriter, journal: Journal | None) -> _Former:
    """Write what former runs have done, as far as it is still there."""
    from shpool.journal import JournalView

    if journal is None or journal.run == 1:
        return _Former(left=0 if order.only_failed else files.count)
    former = _Former()

    def before() -> Iterator[Record]:
        for job, record in JournalView(journal.path).lookup(files.jobs()):
            if record is None or record.status != "done":
                former.left += not order.only_failed or (record is not None and record.has_failed)
            elif lost := _lost_file(record):
                former.lost.append(job.index)
                former.example = former.example or lost
                former.left += not order.only_failed
            else:
                former.done += 1
                yield recalled(job.index, record)

    writer.catch_up(before())
    return former


def _lost_file(record: JobRecord) -> str:
    """Return the path of a file that was done and is gone or has another size now; empty while it is there."""
    from shpool.downloads.partfile import file_size

    told = json.loads(record.result or "{}")
    path, size = told.get("path"), told.get("bytes")
    return str(path) if path is None or file_size(path) != size else ""
