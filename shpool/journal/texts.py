"""What a journal writes down of arguments and errors."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from shpool.errortexts import text_of, traceback_of

if TYPE_CHECKING:
    from shpool.jobs import Job

_LONGEST_ERROR = 4_000  # characters of an error's text; some hold whole answers of a server
_LONGEST_TRACEBACK = 20_000  # characters; both keep their beginning and their end

_encode = json.JSONEncoder(default=repr, separators=(",", ":")).encode


def arguments_of(job: Job) -> str:
    """Return a job's arguments as JSON text; what has no JSON form is shown."""
    try:
        return _encode([job.args, dict(job.kwargs)])
    except Exception:  # noqa: BLE001 - keys that are no text, a circle, or what a repr raises: that is anybody's code
        return _encode([[_shown(arg) for arg in job.args], {name: _shown(value) for name, value in job.kwargs.items()}])


def _shown(value: object) -> str:
    try:
        return repr(value)
    except Exception:  # noqa: BLE001 - as above
        return f"<{type(value).__name__}>"


def error_columns(error: BaseException, place: str) -> tuple[str, str, str, str]:
    """Return type, text, place and traceback."""
    name, text, lines = storable(type(error).__qualname__), storable(text_of(error)), storable(traceback_of(error))
    return name, _shortened(text, _LONGEST_ERROR), storable(place), _shortened(lines, _LONGEST_TRACEBACK)


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length // 2]}\n[…]\n{text[-length // 2 :]}"


def storable(text: str) -> str:
    """Return a text as SQLite takes it: half characters, as in names of files that are no UTF-8, become escapes."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()
