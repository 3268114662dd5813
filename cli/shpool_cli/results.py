"""The results of a batch as JSON Lines: one complete line per job, flushed at once."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import datetime as dt
import decimal
import enum
import json
import math
import os
import uuid
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, BinaryIO

from shpool_cli.console import CommandError, ExitCode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shpool.jobs import JobResult


class ResultWriter:
    """Write results to a binary stream, a line each; an interrupted run keeps every line written so far."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream = stream
        self._name = name

    def write(self, result: JobResult) -> JobResult:
        """Write one result and return it; as a failure when what the function returned has no JSON form.

        Raises:
            CommandError: The stream takes no more: the disk is full, or the reader has gone.
        """
        try:
            line = _line(result)
        except (TypeError, ValueError, RecursionError) as exc:
            reason = TypeError(f"the result of job {result.key} has no JSON form: {exc}; return plain values")
            result = dataclasses.replace(result, status="failed", result=None, error=reason)
            line = _line(result)
        try:
            self._stream.write(line)
            self._stream.flush()
        except OSError as exc:
            message = f"cannot write results to {self._name}: {exc.strerror}"
            raise CommandError(message, "the jobs after this one were not recorded", ExitCode.FAILED) from None
        return result


@contextlib.contextmanager
def open_output(path: Path | None, stdout: BinaryIO) -> Iterator[ResultWriter]:
    """Open where the results go; a file that already holds something is never touched.

    Lines are appended as jobs finish, so that an interruption leaves what is done. A file that got no line
    because of an error is removed again.

    Args:
        path: A new or empty file, or a device; None is standard output.
        stdout: The stream for None.

    Raises:
        CommandError: The file cannot be created, or holds something.
    """
    if path is None:
        yield ResultWriter(stdout, "standard output")
        return
    is_new = not path.exists()
    try:
        stream = path.open("ab")
    except OSError as exc:
        msg = f"cannot write to {path}: {exc.strerror}"
        raise CommandError(msg, "choose another --output") from None
    with contextlib.closing(_Quiet(stream)):
        if path.is_file() and path.stat().st_size:
            msg = f"{path} exists and is not empty"
            raise CommandError(msg, "choose another --output, or remove the file")
        try:
            yield ResultWriter(stream, str(path))
        except BaseException:
            if is_new and not os.fstat(stream.fileno()).st_size:
                path.unlink(missing_ok=True)
            raise


class _Quiet:
    """Close a stream whose last write may have failed, and was reported, without failing again."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.close()


def _line(result: JobResult) -> bytes:
    fields: dict[str, Any] = {"index": result.index, "key": result.key, "status": result.status}
    if result.error is None:
        fields["result"] = result.result
    else:
        fields["error"] = _in_words(result.error)
    fields |= {"attempts": result.attempts, "seconds": round(result.seconds, 6)}
    return f"{to_json(fields)}\n".encode()


def _in_words(error: BaseException) -> str:
    """Return type, text and, where the worker could tell, the user's line."""
    from shpool.batch import place_of

    place = place_of(error)
    text = f"{type(error).__name__}: {error}".removesuffix(": ")
    return f"{text} ({place})" if place else text


def to_json(value: object) -> str:
    """Return ``value`` as one line of JSON.

    Dates become ISO 8601, bytes base64, paths, UUIDs and decimals text, enums their values, sets and arrays
    lists, dataclasses objects; NaN and the infinities, for which JSON has no word, become null.

    Raises:
        TypeError: Some part has no JSON form.
        ValueError: It contains itself.

    >>> to_json({"when": dt.date(2024, 5, 1), "mean": math.nan})
    '{"when": "2024-05-01", "mean": null}'
    """
    try:
        return json.dumps(value, default=_plain, allow_nan=False)
    except ValueError:  # a NaN somewhere, or a circle, at which this dumps raises as well
        return json.dumps(_without_nan(json.loads(json.dumps(value, default=_plain))))


def _plain(value: object) -> object:  # noqa: PLR0911 - a table of types
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, (dt.date, dt.time)):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, (PurePath, uuid.UUID, decimal.Decimal)):
        return str(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return base64.b64encode(value).decode()
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=repr)  # the same in every run
    tolist = getattr(value, "tolist", None)  # numpy's arrays and scalars, and their imitators
    if callable(tolist):
        return tolist()
    msg = f"{type(value).__name__} is not a JSON type"
    raise TypeError(msg)


def _without_nan(value: Any) -> Any:  # noqa: ANN401 - any JSON
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
