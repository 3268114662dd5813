"""What a journal writes down of arguments and errors."""

from __future__ import annotations

import json
import traceback
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shpool.jobs import Job

_LONGEST_ERROR = 4_000  # characters of an error's text; some hold whole answers of a server
_LONGEST_TRACEBACK = 20_000  # characters; both keep their beginning and their end

_encode = json.JSONEncoder(default=repr, separators=(",", ":")).encode


def arguments_of(job: Job) -> str:
    """Return a job's arguments as JSON text; what has no JSON form is shown."""
    try:
        return _encode([job.args, dict(job.kwargs)])
    except (TypeError, ValueError, RecursionError):  # keys that are no text, or a circle
        return _encode([[repr(arg) for arg in job.args], {name: repr(value) for name, value in job.kwargs.items()}])


def error_columns(error: BaseException, place: str) -> tuple[str, str, str, str]:
    """Return type, text, place and traceback."""
    told = traceback.TracebackException.from_exception(error)  # knows errors whose text raises an error
    text, lines = storable(str(told)), storable("".join(told.format()))
    name = storable(type(error).__qualname__)
    return name, _shortened(text, _LONGEST_ERROR), storable(place), _shortened(lines, _LONGEST_TRACEBACK)


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length // 2]}\n[…]\n{text[-length // 2 :]}"


def storable(text: str) -> str:
    """Return a text as SQLite takes it: half characters, as in names of files that are no UTF-8, become escapes."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()
