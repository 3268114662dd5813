"""Downloads from end to end: check everything, open journal and output, log in, and let ``filerun`` fetch the files."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, BinaryIO

from shpool_cli.console import CommandError
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

    from shpool.journal import Journal
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
        before, left = _catch_up(order, files, writer, journal)
        if session is not None and left:
            FileRun(order, files, session, Ends(writer, journal, told, before), summary).carry()
        else:  # nothing to do is no reason to log in
            summary.jobs, summary.before = files.count, before
            summary.skipped = files.count - before


def _check_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        msg = f"the folder {folder} cannot be made: {exc.strerror}"
        raise CommandError(msg, "give another --to") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        msg = f"the folder {folder} cannot be written to"
        raise CommandError(msg, "give another --to, or change its mode")


def _catch_up(order: Order, files: Files, writer: ResultWriter, journal: Journal | None) -> tuple[int, int]:
    """Write what former runs have done; return how many files that are, and how many are left to fetch."""
    from shpool.journal import JournalView

    if journal is None or journal.run == 1:
        return 0, 0 if order.only_failed else files.count
    done = left = 0

    def before() -> Iterator[Record]:
        nonlocal done, left
        for job, record in JournalView(journal.path).lookup(files.jobs()):
            if record is not None and record.status == "done":
                done += 1
                yield recalled(job.index, record)
            else:
                left += not order.only_failed or (record is not None and record.has_failed)

    writer.catch_up(before())
    return done, left
