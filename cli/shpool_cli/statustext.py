"""What `shpool status` says of a journal, for a terminal of 80 columns."""

from __future__ import annotations

import json
import shlex
import textwrap
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shpool.journal import JobRecord, JournalSummary, RunRecord
    from shpool.journal.view import ErrorKind

_WIDTH = 80  # columns of the smallest usual terminal
_MOST_KINDS = 10  # kinds of errors that are shown; --json has more
_ERROR_LINES = 3  # of an example's text
_LONGEST_KEY = 20  # characters; shpool's own keys have 16, a user's may have any number


def report_lines(summary: JournalSummary, now: float) -> list[str]:
    """Return the report.

    Args:
        summary: What the journal holds.
        now: The time, in seconds since the epoch.
    """
    return [
        *(f"{name + ':':<10}{_printable(value)}" for name, value in _facts(summary, now)),
        *_slowest(summary.slowest),
        *_errors(summary.errors),
    ]


def _facts(summary: JournalSummary, now: float) -> Iterator[tuple[str, str]]:
    run = summary.runs[-1] if summary.runs else None
    yield "target", summary.target
    yield "state", _state(summary, run, now)
    if run is not None and run.command:
        yield ("resume", _resuming(summary, run)) if _is_unfinished(summary, run) else ("command", run.command)
    parts = [f"{summary.done} done", f"{summary.failed} failed", f"{summary.running} running"]
    parts.append(f"{summary.cut_off} cut off")
    yield "jobs", ", ".join(parts if summary.not_begun is None else [*parts, f"{summary.not_begun} not begun"])
    if run is None:
        return
    if run.jobs is not None:
        yield "input", f"{_counted(run.jobs, 'job')} in the last run, about {summary.left} of them left"
    left = "" if summary.seconds_left is None else f", about {_duration(summary.seconds_left)} left"
    yield "rate", f"{_rate(summary.rate)} in the last run{left}"
    if summary.first is not None:
        until = "" if summary.last is None else f" to {_moment(summary.last)}"
        yield "times", f"{_moment(summary.first)}{until} UTC"
    yield "logins", f"{summary.logins} in {_counted(len(summary.runs), 'run')}"
    waited = f", {_duration(summary.waited)} in all" if summary.waits else ""
    yield "waits", f"{summary.waits} for the account's limits{waited}"


def _state(summary: JournalSummary, run: RunRecord | None, now: float) -> str:
    if summary.state == "running":
        process = f"process {summary.live_pid}" if summary.live_pid else "a process that did not tell its number"
        return f"running, {process}" + ("" if run is None else f", for {_duration(now - run.begun)}")
    if run is None:
        return "empty: no run has begun"
    if run.ended is None:
        return f"cut off: the run was killed, its last sign is of {_moment(run.updated)} UTC"
    code = "" if run.exit_code is None else f" with exit code {run.exit_code}"
    reason = "" if run.reason is None else f": {run.reason}"
    return f"ended after {_duration(run.ended - run.begun)}{code}{reason}"


def _is_unfinished(summary: JournalSummary, run: RunRecord) -> bool:
    """Tell whether the same command would find something to do."""
    if summary.state == "running":
        return False
    return summary.state == "cut off" or bool(run.exit_code or summary.failed or summary.cut_off or summary.left)


def _resuming(summary: JournalSummary, run: RunRecord) -> str:
    """Return the command that finishes the rest: without options by which it would do something else.

    With --fresh it would forget what is done, with --only-failed leave out what was cut off or not begun, and with
    --overwrite fetch all files once more, but for a run that has left some: for these it is needed.
    """
    harmful = {"--fresh"}
    harmful |= {"--only-failed"} if summary.cut_off or summary.not_begun else set()
    harmful |= {"--overwrite"} if run.is_over else set()
    words = run.words
    end = words.index("--") if "--" in words else len(words)
    kept = [word for word in words[:end] if word not in harmful]
    return run.command if len(kept) == end else shlex.join([*kept, *words[end:]])


def _slowest(records: tuple[JobRecord, ...]) -> Iterator[str]:
    if records:
        yield ""
        yield "slowest jobs:"
    for record in records:
        yield _shortened(f"{record.seconds or 0.0:>10.2f} s  {_key(record)}  {_call(record)}", _WIDTH)


def _errors(kinds: tuple[ErrorKind, ...]) -> Iterator[str]:
    if kinds:
        yield ""
        yield "errors:"
    for kind in kinds[:_MOST_KINDS]:
        yield _shortened(f"{kind.count:>7} x {kind.error_type}: {kind.text}".rstrip(": "), _WIDTH)
        yield from _example(kind.example, kind.text)
    if others := kinds[_MOST_KINDS:]:
        jobs = sum(kind.count for kind in others)
        yield f"{jobs:>7} x {_counted(len(others), 'other kind')}, which --json names"


def _example(record: JobRecord, kind: str) -> Iterator[str]:
    indent = " " * 10
    text = _printable(record.error or "")
    if text not in {"", kind}:
        yield from textwrap.wrap(
            text,
            _WIDTH,
            initial_indent=f"{indent}e.g. ",
            subsequent_indent=f"{indent}     ",
            max_lines=_ERROR_LINES,
            placeholder=" ...",
        )
    at = f"at {record.place}, " if record.place else ""
    yield _shortened(f"{indent}{at}job {_key(record)}", _WIDTH)
    yield _shortened(f"{indent}called with {_call(record)}", _WIDTH)


def _key(record: JobRecord) -> str:
    return _shortened(record.key, _LONGEST_KEY)


def _call(record: JobRecord) -> str:
    """Return the arguments as they would stand in a call."""
    args, kwargs = arguments(record)
    named = (f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in kwargs.items())
    return ", ".join([*(json.dumps(value, ensure_ascii=False) for value in args), *named]) or "nothing"


def arguments(record: JobRecord) -> tuple[list[Any], dict[str, Any]]:
    """Return a job's positional and keyword arguments; NaN and infinities, which JSON has not, as their names."""
    args, kwargs = json.loads(record.arguments, parse_constant=str)
    return args, kwargs


def _shortened(text: str, width: int) -> str:
    text = _printable(text)
    return text if len(text) <= width else f"{text[: width - 3]}..."


def _printable(text: str) -> str:
    """Return text for one line; control characters, which a server may have sent, are shown and not obeyed."""
    return "".join(char if char.isprintable() else " " if char.isspace() else repr(char)[1:-1] for char in text)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun if number == 1 else noun + 's'}"


def _moment(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, tz=timezone.utc):%Y-%m-%d %H:%M:%S}"


def _duration(seconds: float) -> str:
    """Return a duration in its two largest units.

    >>> _duration(3.21), _duration(200), _duration(7500), _duration(200000)
    ('3.2 s', '3 min 20 s', '2 h 5 min', '2 d 7 h')
    """
    whole = int(seconds)
    if whole < 60:  # noqa: PLR2004 - seconds of a minute, as below
        return f"{max(seconds, 0.0):.1f} s"
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if not hours:
        return f"{minutes} min {whole % 60} s"
    return f"{days} d {hours % 24} h" if days else f"{hours} h {minutes % 60} min"


def _rate(per_second: float) -> str:
    """Return a rate in the unit in which it is at least 1, if any is.

    >>> _rate(12.34), _rate(0.5), _rate(0.001), _rate(0)
    ('12.3 jobs/s', '30.0 jobs/min', '3.6 jobs/h', '0.0 jobs/h')
    """
    for unit, seconds in (("s", 1), ("min", 60)):
        if per_second * seconds >= 1:
            return f"{per_second * seconds:.1f} jobs/{unit}"
    return f"{per_second * 3600:.1f} jobs/h"
