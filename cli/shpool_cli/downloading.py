"""Downloads from end to end: check everything, open journal and output, log in, and let ``filerun`` fetch the files."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO

from shpool_cli.console import CommandError, say
from shpool_cli.credentials import make_session
from shpool_cli.filelist import Files
from shpool_cli.filerun import Ends, FileRun
from shpool_cli.inputs import open_input
from shpool_cli.journaling import check_place_of, opened_journal, opened_output
from shpool_cli.output.records import recalled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from shpool.journal import Journal
    from shpool.session import OAuthSession
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
        contextlib.ExitStack() as folders,  # ends last: what is made in them is gone again then, if it is in vain
        contextlib.ExitStack() as outputs,
        contextlib.ExitStack() as journals,  # ends before the output does: its last words go there
    ):
        files = Files(source, order.target)
        files.check()
        folders.enter_context(_made(order.folder))
        check_place_of(order.journal)
        session = functools.cache(lambda: _session_for(order, files))
        writer = replaced = None
        if order.is_begun_anew:  # before a journal is made or emptied
            writer = outputs.enter_context(opened_output(order.output, stdout, order.journal, is_begun_anew=True))
            replaced = order.output if writer.is_behind else None
            if files.count and not order.only_failed:
                session()
        told: list[FileReport] = []
        journal = None
        if order.journal is not None:
            journal = journals.enter_context(
                opened_journal(
                    order.journal,
                    order.target,
                    told,
                    summary,
                    jobs=files.count,
                    fresh=order.fresh,
                    replaced=replaced,
                )
            )
        if writer is None:
            writer = outputs.enter_context(opened_output(order.output, stdout, order.journal, is_begun_anew=False))
        since = _first_run_that_counts(order, journal)
        former = _catch_up(order, files, writer, journal, since, session)
        summary.lost = len(former.lost)
        former.tell(only_failed=order.only_failed)
        if former.left:
            FileRun(
                order,
                files,
                session(),
                Ends(writer, journal, told, former.done, former.bytes, former.lost, since),
                summary,
            ).carry()
        else:  # nothing to do is no reason to log in
            summary.jobs, summary.before = files.count, former.done
            summary.skipped = files.count - former.done


def _session_for(order: Order, files: Files) -> OAuthSession:
    """Make the session, which has not logged in yet, once it is known that files can be asked for with its token."""
    session = make_session(order.login, may_prompt=order.source != "-")
    files.check_connections(session.allowed_hosts)
    return session


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder that is missing, for output and journal may be in it; an error that leaves it empty removes it.

    Raises:
        CommandError: It cannot be made, or not be written to.
    """
    try:
        missing = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        msg = f"the folder {folder} cannot be made: {exc.strerror}"
        raise CommandError(msg, "give another --to") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        msg = f"the folder {folder} cannot be written to"
        raise CommandError(msg, "give another --to, or change its mode")
    try:
        yield
    except BaseException:
        for each in missing:
            with contextlib.suppress(OSError):  # something is in it
                each.rmdir()
        raise


@dataclass
class _Former:
    """What former runs have left.

    Attributes:
        done: Files that are done and there.
        bytes: What they have, each file counted once.
        left: Files to fetch.
        lost: Indexes of files that were done and are not there as they were, in order.
        example: One of these.
    """

    done: int = 0
    bytes: int = 0
    left: int = 0
    lost: array[int] = field(default_factory=lambda: array("q"))
    example: str = ""

    def tell(self, *, only_failed: bool) -> None:
        """Say what is lost."""
        if self.lost:
            count = "1 file that was done is" if len(self.lost) == 1 else f"{len(self.lost)} files that were done are"
            then = "--only-failed leaves that so" if only_failed else "fetched anew"
            say(f"warning: {count} gone or of another size, such as {self.example}: {then}")


def _first_run_that_counts(order: Order, journal: Journal | None) -> int:
    """Return the first of the runs whose files are not fetched anew.

    With --overwrite it is this one, or the first of those before it with --overwrite that have left something to do,
    one after the other: it goes on where they ended.
    """
    from shpool.journal import JournalView

    if journal is None or not order.overwrite or order.only_failed:
        return 0
    first = journal.run
    for run in reversed(JournalView(journal.path).runs()[: journal.run - 1]):
        if run.is_over or "--overwrite" not in run.words:
            break
        first = run.id
    return first


def _catch_up(  # noqa: PLR0913, PLR0917 - the parts of a run meet here
    order: Order,
    files: Files,
    writer: ResultWriter,
    journal: Journal | None,
    since: int,
    session: Callable[[], OAuthSession],
) -> _Former:
    """Write what former runs have done, as far as it is still there.

    The session is made before the former output is replaced: where it cannot be, all stays as it is.
    """
    from shpool.journal import JournalView

    if journal is None or journal.run == 1:
        if writer.is_behind:  # what --fresh has found: a journal and its output are emptied together
            writer.catch_up(())
        return _Former(left=0 if order.only_failed else files.count)
    former = _Former()

    def before() -> Iterator[Record]:
        for job, record in JournalView(journal.path).lookup(files.jobs()):
            if record is None or record.status != "done":
                former.left += not order.only_failed or (record is not None and record.has_failed)
                continue
            if record.run < since:
                former.left += 1
                continue
            told = json.loads(record.result or "{}")
            if _is_lost(told):
                former.lost.append(job.index)
                former.example = former.example or str(told.get("path"))
                former.left += not order.only_failed
            else:
                former.done += 1
                former.bytes += 0 if files.is_copy(job.index) else told["bytes"]
                yield recalled(job.index, record)
        if former.left:
            session()

    writer.catch_up(before())
    return former


def _is_lost(told: Mapping[str, Any]) -> bool:
    """Tell whether a file that was done, as ``file_of`` told it, is gone or has another size now."""
    from shpool.downloads.partfile import file_size

    path = told.get("path")
    return path is None or file_size(path) != told.get("bytes")
