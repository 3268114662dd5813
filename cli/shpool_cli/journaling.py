"""A run's journal and the output that goes with it, whatever its jobs are."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import threading
from typing import TYPE_CHECKING, BinaryIO, Protocol

from shpool.errors import JournalError, ShpoolError
from shpool_cli.console import CommandError
from shpool_cli.output.former import first_key
from shpool_cli.output.records import recalled
from shpool_cli.output.results import open_output
from shpool_cli.stopping import code_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from shpool.journal import Ended, Journal, JournalView
    from shpool.pool import AuthenticatedProcessPool, PoolStats
    from shpool_cli.output.records import Record
    from shpool_cli.output.results import ResultWriter
    from shpool_cli.summary import Summary


_NOTE_EVERY = 1.0  # s; half of what `shpool status --watch` waits between two looks


class Teller(Protocol):
    """Where records that are durable go."""

    def tell(self, records: Sequence[Record]) -> None:
        """Write and count them."""


def check_place_of(journal: Path | None) -> None:
    """Refuse, before anything is made, a --journal that cannot be one."""
    if journal is not None:
        from shpool.journal.file import check_place, resolved

        check_place(resolved(journal))


def is_begun_anew(journal: Path | None, *, fresh: bool) -> bool:
    """Tell whether no former run matters: then an output that holds something cannot be of these jobs.

    Args:
        journal: The journal, past ``check_place_of``.
        fresh: Whether it is to be emptied first.
    """
    return journal is None or fresh or not journal.exists() or (journal.is_file() and not journal.stat().st_size)


@contextlib.contextmanager
def opened_journal(  # noqa: PLR0913 - facts of one run
    path: Path,
    target: str,
    told: Sequence[Teller],
    summary: Summary,
    *,
    jobs: int,
    fresh: bool,
    replaced: Path | None = None,
    key_field: str | None = None,
) -> Iterator[Journal]:
    """Open the journal, and note how the run ends.

    Args:
        path: The file.
        target: What its jobs are of.
        told: What becomes durable goes to the first of these, once there is one.
        summary: What the run comes to.
        jobs: Jobs of the input.
        fresh: Empty it first.
        replaced: The output of its former runs, which is emptied after it; killed between the two, the same command
            still knows it.
        key_field: The field that names the jobs.
    """
    from shpool.journal import Journal

    def tell(ended: list[Ended]) -> None:
        told[0].tell([recalled(index, each.record) for each in ended for index in each.indexes])

    command = shlex.join(["shpool", *sys.argv[1:]])
    left = "" if replaced is None else _told_apart(replaced, first_key(replaced))
    with Journal(
        path, target, key_field=key_field, fresh=fresh, replaced=left, command=command, on_durable=tell
    ) as journal:
        journal.note(jobs=jobs)
        try:
            yield journal
        except BaseException as stop:
            journal.note(exit_code=code_of(stop), reason=_reason_of(stop))
            raise
        journal.note(exit_code=summary.outcome, reason=summary.reason)


@contextlib.contextmanager
def noting(journal: Journal | None, pool: AuthenticatedProcessPool) -> Iterator[None]:
    """Note logins and waits as they come, for whoever watches the run; what has not changed costs nothing."""
    if journal is None:
        yield
        return
    is_over = threading.Event()

    def keep_noting() -> None:
        while not is_over.wait(_NOTE_EVERY):
            note_counts(journal, pool.stats())

    thread = threading.Thread(target=keep_noting, name="shpool-notes", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def note_counts(journal: Journal, stats: PoolStats) -> None:
    """Note a pool's counters."""
    gate = stats.gate
    journal.note(logins=stats.logins, workers=stats.workers, waits=gate.waits, waited=gate.waited)


def _reason_of(stop: BaseException) -> str:
    """Return why a run ended early: the signal's word, or the error's."""
    if isinstance(stop, (KeyboardInterrupt, SystemExit)):
        return code_of(stop).name.lower().replace("_", " ")
    return str(stop) if isinstance(stop, (ShpoolError, CommandError)) else type(stop).__name__


def opened_output(
    output: Path | None, stdout: BinaryIO, journal: Path | None, *, is_begun_anew: bool
) -> contextlib.AbstractContextManager[ResultWriter]:
    """Open the output of a run with a journal; it may hold the results of former ones. Arguments as ``is_former``'s."""
    return open_output(output, stdout, replace=is_former(output, journal, is_begun_anew=is_begun_anew))


def is_former(output: Path | None, journal: Path | None, *, is_begun_anew: bool) -> bool:
    """Tell whether an output is there that former runs with a journal have written, and is to be written anew.

    Args:
        output: The file, None for standard output.
        journal: The journal's, as it is before a run empties it; None for no journal.
        is_begun_anew: There may be none yet, or one that --fresh will replace.

    Raises:
        CommandError: It is something else, or cannot be read.
        JournalError: The journal cannot be read.
    """
    from shpool.journal import JournalView

    if output is None or journal is None or not os.path.isfile(output):  # noqa: PTH113 - the path's own method raises where it is out of reach
        return False
    try:
        view = JournalView(journal)
    except JournalError:
        if is_begun_anew:
            return False
        raise
    if not _is_of(output, view):
        msg = f"{output} exists and is no output of the runs in {journal}"
        raise CommandError(msg, "choose another --output, or remove the file")
    return True


def _is_of(output: Path, view: JournalView) -> bool:
    try:
        key = first_key(output)
    except OSError as exc:
        msg = f"{output} cannot be read: {exc.strerror}"
        raise CommandError(msg, "choose another --output") from None
    if key is None:
        return False
    return not key or view.record(key) is not None or view.replaced() == _told_apart(output, key)


def _told_apart(output: Path, key: str | None) -> str:
    """Return what tells an output from others: the file and its first job."""
    return json.dumps([os.path.realpath(output), key])
