"""What became of a job, as the outputs write it: JSON Lines and CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from shpool.errors import ShellJobError
from shpool.errortexts import text_of
from shpool.timedcall import place_of
from shpool_cli.output.jsonform import to_json

if TYPE_CHECKING:
    from collections.abc import Iterable

    from shpool.jobs import JobResult
    from shpool.journal import JobRecord

_OWN_WORDS = (TypeError, ValueError)  # which to_json raises itself: what they are adds nothing to what they say
COLUMNS = ("index", "key", "status", "result", "error", "attempts", "seconds")


@dataclass(frozen=True)
class Record:
    """One job's line in an output; holds text only, so that a journal can keep it.

    Attributes:
        index: The job's position in the input.
        key: The job's key.
        status: ``done`` or ``failed``.
        result: What the function returned, as JSON text; when it failed, what a shell command said, else None.
        error: Type, text and place of the error; None when it is done.
        attempts: How often it was tried.
        seconds: Time the last attempt took.
    """

    index: int
    key: str
    status: Literal["done", "failed"]
    result: str | None
    error: str | None
    attempts: int
    seconds: float


def recorded(result: JobResult) -> tuple[JobResult, Record]:
    """Return a result with its record; as a failure, in both, when what the function returned has no JSON form."""
    text: str | None = None
    if result.error is None:
        try:
            text = to_json(result.result)
        except Exception as exc:  # noqa: BLE001 - border: a result's own code runs, such as a tolist
            words = text_of(exc) if type(exc) in _OWN_WORDS else f"{type(exc).__name__}: {text_of(exc)}"
            reason = TypeError(f"the result of job {result.key} has no JSON form: {words}; return plain values")
            result = dataclasses.replace(result, status="failed", result=None, error=reason)
    error = None
    if result.error is not None:
        if isinstance(result.error, ShellJobError):
            text = to_json(result.error.output)
        error = _in_words(type(result.error).__name__, text_of(result.error), place_of(result.error))
    seconds = round(result.seconds, 6)
    return result, Record(result.index, result.key, result.status, text, error, result.attempts, seconds)


def recalled(index: int, record: JobRecord) -> Record:
    """Return what a journal knows of a job that has ended, as the record of one of its places in the input."""
    error = None if record.status == "done" else _in_words(record.error_type or "", record.error or "", record.place)
    status: Literal["done", "failed"] = "done" if error is None else "failed"
    return Record(index, record.key, status, record.result, error, record.attempts, round(record.seconds or 0.0, 6))


def _in_words(kind: str, text: str, place: str | None) -> str:
    """Return type, text and, where the worker could tell, the user's line."""
    words = f"{kind}: {text}".removesuffix(": ")
    return f"{words} ({place})" if place else words


def cell(result: str | None) -> str | None:
    """Return a result as one cell of a table: text as it is, null as nothing, anything else as JSON.

    >>> cell('"a.tif"'), cell("0.5"), cell('{"a": 1}'), cell("null")
    ('a.tif', '0.5', '{"a": 1}', None)
    """
    if result is None or result == "null":
        return None
    return str(json.loads(result)) if result.startswith('"') else result


class LineForm(Protocol):
    """How records become lines."""

    header: bytes

    def lines(self, records: Iterable[Record]) -> bytes:
        """Return whole lines."""


class JsonLines:
    """An object a line: index, key, status, result or error, attempts, seconds."""

    header = b""

    def lines(self, records: Iterable[Record]) -> bytes:
        """Return whole lines."""
        return "".join(map(self._line, records)).encode()

    @staticmethod
    def _line(record: Record) -> str:
        content = f'"result": {record.result}' if record.error is None else f'"error": {json.dumps(record.error)}'
        if record.error is not None and record.result is not None:
            content = f'"result": {record.result}, {content}'
        return (
            f'{{"index": {record.index}, "key": {json.dumps(record.key)}, "status": "{record.status}", {content}, '
            f'"attempts": {record.attempts}, "seconds": {json.dumps(record.seconds)}}}\n'
        )


class Csv:
    """RFC 4180 with a header, the same columns for every job; see ``cell`` for the result's."""

    header = ",".join(COLUMNS).encode() + b"\r\n"

    def lines(self, records: Iterable[Record]) -> bytes:
        """Return whole lines; line ends inside a quoted field belong to it."""
        text = io.StringIO()
        # Before Python 3.13 a lone \r is quoted only where it is part of the line's end.
        writer = csv.writer(text, lineterminator="\r\n")
        for each in records:
            row = (each.index, each.key, each.status, cell(each.result), each.error, each.attempts, each.seconds)
            writer.writerow(row)
        return text.getvalue().encode(errors="backslashreplace")  # JSON may hold halves of surrogate pairs
