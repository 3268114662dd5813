"""A run's journal and the output that goes with it, whatever its jobs are."""

from __future__ import annotations

import contextlib
import shlex
import sys
import threading
from typing import TYPE_CHECKING, BinaryIO, Protocol

from shpool.errors import ShpoolError
from shpool_cli.console import CommandError, ExitCode
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


@contextlib.contextmanager
def opened_journal(  # noqa: PLR0913 - facts of one run
    path: Path, target: str, told: Sequence[Teller], summary: Summary, *, jobs: int, fresh: bool
) -> Iterator[Journal]:
    """Open the journal, and note how the run ends.

    Args:
        path: The file.
        target: What its jobs are of.
        told: What becomes durable goes to the first of these, once there is one.
        summary: What the run comes to.
        jobs: Jobs of the input.
        fresh: Empty it first.
    """
    from shpool.journal import Journal

    def tell(ended: list[Ended]) -> None:
        told[0].tell([recalled(index, each.record) for each in ended for index in each.indexes])

    command = shlex.join(["shpool", *sys.argv[1:]])
    with Journal(path, target, fresh=fresh, command=command, on_durable=tell) as journal:
        journal.note(jobs=jobs)
        try:
            yield journal
        except BaseException as stop:
            journal.note(exit_code=code_of(stop), reason=_reason_of(stop))
            raise
        code = ExitCode.FAILED if summary.failed or summary.halted else ExitCode.OK
        journal.note(exit_code=code, reason=summary.halted)


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
    output: Path | None, stdout: BinaryIO, journal: Journal | None
) -> contextlib.AbstractContextManager[ResultWriter]:
    """Open the output of a run that goes on with a journal; it may hold the results of former ones."""
    from shpool.journal import JournalView

    if output is None or journal is None or not output.is_file():
        return open_output(output, stdout)
    if not _is_former(output, JournalView(journal.path)):
        msg = f"{output} exists and is no output of the runs in {journal.path}"
        raise CommandError(msg, "choose another --output, or remove the file")
    return open_output(output, stdout, replace=True)


def _is_former(output: Path, view: JournalView) -> bool:
    try:
        key = first_key(output)
    except OSError as exc:
        msg = f"{output} cannot be read: {exc.strerror}"
        raise CommandError(msg, "choose another --output") from None
    return key is not None and (not key or view.record(key) is not None)
