"""Values of options, read so that a wrong one is named."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import typer

from shpool.halting import HaltPolicy

if TYPE_CHECKING:
    from collections.abc import Callable

_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([smhd]?)")
_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_LONGEST = 20 * 86400.0  # s; epoll waits for 2**31 ms at most, which are 24 days


def at_least(least: int) -> Callable[[str], int]:
    """Return a reader of whole numbers; the parser's own words do not name what was given."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or number < least:
            msg = f"{str(text)!r} is not a whole number of at least {least}"
            raise typer.BadParameter(msg)
        return number

    return read


def duration(text: str) -> float:
    """Return the seconds of ``90``, ``1.5s``, ``15m``, ``48h`` or ``2d``."""
    match = _DURATION.fullmatch(str(text).strip())
    seconds = float(match[1]) * _SECONDS[match[2]] if match else 0.0
    if not 0.0 < seconds <= _LONGEST:
        msg = f"{str(text)!r} is no time of more than 0 and at most {_LONGEST / 86400:g}d, such as 90, 15m or 48h"
        raise typer.BadParameter(msg)
    return seconds


def halt_policy(text: str) -> HaltPolicy:
    """Return when failures end a run."""
    try:
        return HaltPolicy.parse(str(text))
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from None
