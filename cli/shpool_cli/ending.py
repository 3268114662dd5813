"""How a run ends: what stopped it, what it came to, and how to go on."""

from __future__ import annotations

import shlex
import time
from typing import TYPE_CHECKING, BinaryIO

from shpool.errors import ShpoolError
from shpool_cli.console import CommandError, private_stdout, report, say
from shpool_cli.stopping import code_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from shpool_cli.summary import Summary


def see_through(carry: Callable[[BinaryIO], None], summary: Summary, output: Path | None, *, as_json: bool) -> None:
    """Do the work with a standard output of its own, and say what it came to; ``summary`` holds the exit code.

    Args:
        carry: Does it, given where data for standard output goes.
        summary: Where it counts; what ends it before ``summary.jobs`` is set passes.
        output: The file of the results, None for standard output.
        as_json: Say it as JSON, too.
    """
    began = time.monotonic()
    with private_stdout() as stdout:
        try:
            carry(stdout)
            summary.exit_code = summary.outcome
        except (KeyboardInterrupt, SystemExit, ShpoolError, CommandError) as stop:
            if summary.jobs is None:
                raise
            if isinstance(stop, (ShpoolError, CommandError)):
                report(stop)
            summary.exit_code = code_of(stop)
        summary.seconds = round(time.monotonic() - began, 3)
        summary.tell(stdout if output is not None else None, as_json=as_json)


def say_how_to_go_on(journal: Path | None, *, fresh: bool, begins_anew: bool = False) -> None:
    """Say what the user may do about a run that is not complete.

    Args:
        journal: The run's, if it has one.
        fresh: It began with an empty one.
        begins_anew: The same command would do again what is done.
    """
    if begins_anew:
        say("hint: the same command begins anew; with --journal, too, it would go on where it ended")
        return
    same = "the same command without --fresh" if fresh else "the same command"
    more = "" if journal is None else f"; shpool status {shlex.quote(str(journal))} tells more"
    say(f"hint: {same} goes on where this one ended{more}")
