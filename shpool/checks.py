"""What the pool's callers may pass: each check returns the value in its final form, or raises and says what would do.

Raises:
    TypeError: It is of another type.
    ValueError: It is out of range.
"""

from __future__ import annotations

import logging
import math
import resource
from collections.abc import Mapping
from typing import Any, TypeVar

from shpool.processors import processor_count

F = TypeVar("F")

_MOST_WORKERS = 4096  # no machine has so many processors, and what is beyond is a slip of the keyboard
_FILES_PER_WORKER = 3  # that this process has open: one for each of its lifeline, its end and its start
_OTHER_FILES = 40  # of the process itself and its libraries: 19 were counted


def checked_workers(max_workers: int | None, *, is_local: bool) -> int | None:
    """Return a number of workers; of a local pool that was given none, one for each processor."""
    if max_workers is None and not is_local:
        return None
    if max_workers is None:
        return min(processor_count(), room_for_workers()[0])
    if isinstance(max_workers, bool) or not isinstance(max_workers, int):
        msg = f"max_workers must be an integer or None, not {type(max_workers).__name__}"
        raise TypeError(msg)
    if max_workers < 1:
        msg = f"max_workers must be at least 1, not {max_workers}"
        raise ValueError(msg)
    most, hint = room_for_workers()
    if is_local and max_workers > most:
        msg = f"max_workers is {max_workers}, more than one machine has room for; {hint}"
        raise ValueError(msg)
    return max_workers


def room_for_workers() -> tuple[int, str]:
    """Return how many workers this process may have on its machine, and what to do about more, in words."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = _MOST_WORKERS if files == resource.RLIM_INFINITY else (files - _OTHER_FILES) // _FILES_PER_WORKER
    if room >= _MOST_WORKERS:
        return _MOST_WORKERS, f"give at most {_MOST_WORKERS}"
    return max(room, 1), f"give at most {max(room, 1)}, or raise the limit of open files (ulimit -n)"


def checked_retries(retries: int) -> int:
    """Return how many more attempts a task may have."""
    if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
        msg = f"retries must be an integer >= 0, not {retries!r}"
        raise ValueError(msg)
    return retries


def checked_timeout(timeout: float | None) -> float | None:
    """Return how many seconds a task may take, None for no limit."""
    if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0):
        msg = f"timeout must be more than 0 seconds, or None, not {timeout!r}"
        raise ValueError(msg)
    return timeout


def checked_arguments(initargs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return arguments as a tuple."""
    try:
        return tuple(initargs)
    except TypeError:
        msg = f"initargs must be a tuple of arguments, not {initargs!r}"
        raise TypeError(msg) from None


def checked_env(env: Mapping[str, str] | None) -> dict[str, str]:
    """Return environment variables as a dict of their own."""
    if env is None:
        return {}
    if not isinstance(env, Mapping):
        msg = f"env must be a mapping of names to texts, not {env!r}"  # type: ignore[unreachable]  # callers without a type checker
        raise TypeError(msg)
    for name, value in env.items():
        is_text = isinstance(name, str) and isinstance(value, str)
        if not is_text or not name or "=" in name or "\0" in name + value:
            msg = f"env must map names without = to texts without NUL, not {name!r} to {value!r}"
            raise ValueError(msg)
    return dict(env)


def checked_limit(name: str, limit: int | None) -> int | None:
    """Return a limit of at least 1, None for none."""
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        msg = f"{name} must be an integer >= 1, or None, not {limit!r}"
        raise ValueError(msg)
    return limit


def checked_function(name: str, function: F) -> F:
    """Return what can be called."""
    if not callable(function):
        msg = f"{name} must be callable, not {function!r}"
        raise TypeError(msg)
    return function


def checked_level(level: int | str | None) -> int | None:
    """Return a log level as a number; 0 becomes the root logger's."""
    if level is None:
        return None
    try:
        number = logging.Handler(level).level  # the one public way to check a level
        if isinstance(level, bool) or number < 0:
            raise ValueError  # noqa: TRY301 - as for any other that is none
    except (TypeError, ValueError):
        msg = f"log_level must be one of logging's levels or None, not {level!r}"
        raise ValueError(msg) from None
    return number or logging.getLogger().getEffectiveLevel()


def checked_number(number: object, name: str) -> float:
    """Return a number from 0.

    Args:
        number: What was given for one.
        name: What to call it in errors.

    Raises:
        TypeError: It is no number.
        ValueError: It is less than 0, or not finite.
    """
    if isinstance(number, bool) or not hasattr(number, "__float__"):
        msg = f"{name} must be a number, not {type(number).__name__}"
        raise TypeError(msg)
    value = float(number)
    if not 0.0 <= value < math.inf:
        msg = f"{name} must be a finite number from 0, not {number!r}"
        raise ValueError(msg)
    return value
