"""`shpool status`: what a journal says of its run, while it is going and after."""

from __future__ import annotations

import json
import math
import os
import select
import shutil
import stat
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from shpool.errors import JournalError, JournalMismatchError
from shpool_cli.console import CommandError
from shpool_cli.options import at_least
from shpool_cli.statustext import arguments, report_lines

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shpool.journal import JobRecord, JournalSummary

_USUAL_INTERVAL = "2"  # s between two looks, unless --watch says; a look at a million jobs takes about one
_INTERVALS = (0.1, 86_400.0)  # s; less would be all looking, and a day is for ever

_HOME = "\x1b[H"  # cursor to the upper left corner
_CLEAR_REST = "\x1b[J"
_CLEAR_ALL = "\x1b[2J"
_END_LINE = "\x1b[K\n"  # clears what an earlier, longer line has left


class StatusCommand(TyperCommand):
    """A command whose --watch may stand without a number, which typer cannot be told otherwise."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 - click's, or typer's copy of it
        """Give --watch its usual number where no number follows."""
        return super().parse_args(ctx, list(_completed(args)))


def _completed(args: list[str]) -> Iterator[str]:
    """Put the usual interval behind a lone ``--watch``.

    >>> list(_completed(["--watch", "run.db"])), list(_completed(["run.db", "--watch", "5"]))
    (['--watch', '2', 'run.db'], ['run.db', '--watch', '5'])
    """
    end = args.index("--") if "--" in args else len(args)
    for position, arg in enumerate(args):
        yield arg
        if arg == "--watch" and position < end and not any(map(_is_number, args[position + 1 : position + 2])):
            yield _USUAL_INTERVAL


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _interval(text: str) -> float:
    least, most = _INTERVALS
    seconds = float(text) if _is_number(text) else math.nan
    if not least <= seconds <= most:
        msg = f"{text!r} is not a number of seconds from {least:g} to {most:g}"
        raise typer.BadParameter(msg)
    return seconds


def status(
    journal: Annotated[Path, typer.Argument(metavar="JOURNAL", help="The file a run was given as --journal.")],
    *,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object instead; with --watch one a line each time.")
    ] = False,
    watch: Annotated[
        float | None,
        typer.Option(
            "--watch",
            parser=_interval,
            metavar="[SECONDS]",
            help="Look again every so many seconds, 2 if left out, until the run has ended.",
            show_default=False,
        ),
    ] = None,
    slowest: Annotated[
        int,
        typer.Option("--slowest", parser=at_least(0), metavar="INTEGER", help="How many of the slowest jobs to name."),
    ] = 5,
) -> None:
    """Tell what a journal says: state, counts, rate, logins and waits, the slowest jobs, errors by kind.

    The run that writes it may be going on; it is not held up. For one that was cut off or has left something to do
    the line `resume` has the command that finishes the rest: the run's own, without --fresh, and without --only-failed
    or --overwrite where that would leave out or repeat some. Of errors that differ only in URLs, paths, numbers and
    ids one is shown, with the count of all. `left` is an estimate: what earlier runs have done is taken to be in the
    input still.

    Jobs are done, failed, running, cut off (begun by a run that did not live to end them), or not begun.

    The object of --json: journal, target, state (running, ended, cut off, empty), pid of a live run, command,
    exit_code, reason (why it ended early), workers and jobs of the last run; done, failed, running, cut_off,
    not_begun; left, rate (jobs per second),
    seconds_left, first and last (when the first job began and the last one ended, seconds since 1970); logins,
    waits, waited (seconds); runs; slowest and errors, each error with type, text, count and an example. What is
    not known is null.

    Exit codes: 0, whatever became of the run; 2 no such file, or no journal.
    """
    from shpool.journal import JournalView

    try:
        view = JournalView(journal)
        summary = view.summary(slowest)
        screen = _Screen(as_json=as_json, is_redrawn=watch is not None and not as_json and _can_redraw())
        while watch is not None and summary.live_pid is not None:
            screen.show(view.path, summary, is_last=False)
            if not _wait(watch):
                return
            summary = view.summary(slowest)
        screen.show(view.path, summary, is_last=True)
    except JournalError as error:
        raise _in_words(error) from None


def _can_redraw() -> bool:
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def _wait(seconds: float) -> bool:
    """Wait, and tell whether anybody reads our output still: else a watch in a pipe outlives its reader."""
    if not stat.S_ISFIFO(os.fstat(1).st_mode):
        time.sleep(seconds)
        return True
    poller = select.poll()
    poller.register(1, 0)  # no events: only that the other end is closed
    return not poller.poll(seconds * 1000)


def _in_words(error: JournalError) -> CommandError:
    """Say what to do in the words of this command, which has no --journal and changes nothing."""
    hint = error.hint
    if isinstance(error, JournalMismatchError):
        hint = "ask the version of shpool that wrote it"
    elif error.reason.startswith("no access"):  # a killed run's, for which SQLite makes a file beside it
        hint = "copy it, with its -wal file, into a folder you may write to, and ask for the copy"
    elif error.reason.startswith("it is damaged"):
        hint = "restore it from a copy"
    elif "--journal" in hint:
        hint = "give the file that a run was given as its --journal"
    return CommandError(str(error).removesuffix(f"; {error.hint}"), hint)


class _Screen:
    """Standard output: reports one after the other, or each in the place of the one before.

    Args:
        as_json: Objects instead of text.
        is_redrawn: In the same place, which takes a terminal.
    """

    def __init__(self, *, as_json: bool, is_redrawn: bool) -> None:
        self._as_json = as_json
        self._is_redrawn = is_redrawn
        self._count = 0

    def show(self, path: Path, summary: JournalSummary, *, is_last: bool) -> None:
        """Show a report; all of it if it is the last, else as much as the terminal has lines for."""
        if self._as_json:
            self._write(json.dumps(_object(path, summary)) + "\n")
            return
        lines = report_lines(summary, time.time())
        if self._is_redrawn:
            shown = lines if is_last else _clipped(lines)
            begin = _HOME if self._count else _CLEAR_ALL + _HOME
            self._write(begin + "".join(line + _END_LINE for line in shown) + _CLEAR_REST)
        else:
            self._write("\n" * bool(self._count) + "".join(f"{line}\n" for line in lines))

    def _write(self, text: str) -> None:
        # A terminal that has not all characters shows their numbers.
        sys.stdout.write(text.encode(sys.stdout.encoding, "backslashreplace").decode(sys.stdout.encoding))
        sys.stdout.flush()
        self._count += 1


def _clipped(lines: list[str]) -> list[str]:
    """Return as many lines as the terminal has room for, one left for the cursor; a long one takes several."""
    columns, rows = shutil.get_terminal_size()
    room = rows - 1
    shown = []
    for line in lines:
        room -= max(math.ceil(len(line) / columns), 1)
        if room < 0:
            break
        shown.append(line)
    return shown


def _object(path: Path, summary: JournalSummary) -> dict[str, Any]:
    """Return what --json promises, whose keys stay what they are."""
    run = summary.runs[-1] if summary.runs else None
    return {
        "journal": str(path),
        "target": summary.target,
        "state": summary.state,
        "pid": summary.live_pid or None,
        "command": run and run.command,
        "exit_code": run and run.exit_code,
        "reason": run and run.reason,
        "workers": run and run.workers,
        "jobs": run and run.jobs,
        "done": summary.done,
        "failed": summary.failed,
        "running": summary.running,
        "cut_off": summary.cut_off,
        "not_begun": summary.not_begun,
        "left": summary.left,
        "rate": summary.rate,
        "seconds_left": summary.seconds_left,
        "first": summary.first,
        "last": summary.last,
        "logins": summary.logins,
        "waits": summary.waits,
        "waited": summary.waited,
        "runs": [asdict(each) for each in summary.runs],
        "slowest": [_job(record) | {"seconds": record.seconds} for record in summary.slowest],
        "errors": [
            {"type": kind.error_type, "text": kind.text, "count": kind.count, "example": _failed_job(kind.example)}
            for kind in summary.errors
        ],
    }


def _job(record: JobRecord) -> dict[str, Any]:
    args, kwargs = arguments(record)
    return {"key": record.key, "args": args, "kwargs": kwargs}


def _failed_job(record: JobRecord) -> dict[str, Any]:
    told = {"type": record.error_type, "text": record.error, "place": record.place, "traceback": record.traceback}
    return _job(record) | told | ({"result": json.loads(record.result)} if record.result is not None else {})
