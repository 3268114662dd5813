"""What functions return, as JSON."""

from __future__ import annotations

import base64
import dataclasses
import datetime as dt
import decimal
import enum
import json
import math
import uuid
from pathlib import PurePath
from typing import Any


def to_json(value: object) -> str:
    """Return ``value`` as one line of JSON.

    Dates become ISO 8601, durations seconds, bytes base64, paths, UUIDs and decimals text, enums their values, sets
    and arrays lists, dataclasses objects; NaN and the infinities, for which JSON has no word, become null.

    Durations are numbers, as all times that shpool writes: who reads them compares or adds them mostly, and the ISO
    8601 form (``PT1M30S``) needs a parser, which Python's standard library has not.

    Raises:
        TypeError: Some part has no JSON form.
        ValueError: It contains itself.
        Exception: What the code of a part raises: its ``tolist``, a property, a ``__repr__``.

    >>> to_json({"when": dt.date(2024, 5, 1), "mean": math.nan})
    '{"when": "2024-05-01", "mean": null}'
    """
    try:
        return _encode(value)
    except ValueError:  # a NaN somewhere, or a circle, at which this dumps raises as well
        return json.dumps(_without_nan(json.loads(json.dumps(value, default=_plain))))


def _plain(value: object) -> object:  # noqa: PLR0911 - a table of types
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, (dt.date, dt.time)):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, dt.timedelta):
        return value.total_seconds()
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
        return _listed(value) if getattr(value, "dtype", None) is not None else tolist()
    msg = f"{type(value).__name__} is not a JSON type"
    raise TypeError(msg)


_encode = json.JSONEncoder(default=_plain, allow_nan=False).encode  # json.dumps would make one for every result


def _listed(value: Any) -> Any:  # noqa: ANN401 - numpy's, which may not be installed
    listed = _in_microseconds(value).tolist()
    if type(listed) is not type(value):
        return listed
    if value.dtype.kind == "f":  # longdouble, for which Python has no type of its own
        return float(value)
    msg = f"{type(value).__name__} is not a JSON type"
    raise TypeError(msg)


def _in_microseconds(value: Any) -> Any:  # noqa: ANN401 - numpy's, which may not be installed
    """Return numpy's dates and durations in a unit that Python has: of nanoseconds they would be bare numbers."""
    kind = getattr(value.dtype, "kind", "")
    return value.astype(f"{kind}8[us]") if kind in {"m", "M"} else value


def _without_nan(value: Any) -> Any:  # noqa: ANN401 - any JSON
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
