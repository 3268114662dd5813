"""What a worker adds to a job's function: how long it took, where it failed, and which process ran it."""

from __future__ import annotations

import os
import sysconfig
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from shpool.errortexts import attribute_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from typing_extensions import Self


class Timed(NamedTuple):
    """What a call returned.

    Attributes:
        result: The function's result.
        seconds: Time it took.
        worker: Id of the process that ran it.
    """

    result: Any
    seconds: float
    worker: int

    def __repr__(self) -> str:
        return repr(self.result)  # in errors about a result that cannot travel: this wrapper is nobody's business


# Set on errors in the worker; most errors keep their attributes when pickled.
_SECONDS = "_shpool_seconds"
_PLACE = "_shpool_place"
_WORKER = "_shpool_worker"


def place_of(error: BaseException) -> str:
    """Return file and line of the user's code that raised a job's error, as ``tiles.py:12``; empty if unknown."""
    place = attribute_of(error, _PLACE)
    return place if isinstance(place, str) else ""


def seconds_of(error: BaseException) -> float | None:
    """Return how long the call took that raised an error; None if it never came to its end."""
    seconds = attribute_of(error, _SECONDS)
    return seconds if isinstance(seconds, float) else None


def worker_of(error: BaseException) -> int | None:
    """Return the id of the process that raised an error, or was lost with it; None if unknown."""
    for name in (_WORKER, "pid"):
        if isinstance(worker := attribute_of(error, name), int):
            return worker
    return None


def _place(trace: TracebackType | None) -> str:
    """Return the innermost line that is neither ours nor of an installed package; else the innermost not ours."""
    ours = str(Path(__file__).parent)
    installed = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
    outer = inner = ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not file.startswith((ours, "<frozen ")):
            inner = f"{Path(file).name}:{trace.tb_lineno}"
            outer = outer if file.startswith(installed) else inner
        trace = trace.tb_next
    return outer or inner


class TimedCall:
    """A function that reports how long it took where it ran; as picklable as the function."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self._fn = fn
        has_own_text = "__str__" in vars(type(fn))
        # Executors name tasks by this; the text of a partial may be as long as its arguments.
        self.__qualname__ = getattr(fn, "__qualname__", None) or (str(fn) if has_own_text else type(fn).__name__)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Timed:  # noqa: ANN401 - whatever the function takes
        """Return the function's result, the seconds it took, and this process's id."""
        with _Stopwatch() as watch:
            result = self._fn(*args, **kwargs)
        return Timed(result, watch.seconds, os.getpid())

    def __repr__(self) -> str:
        return self.__qualname__


class _Stopwatch:
    """Measure a block; an error that leaves it carries the seconds along."""

    seconds = 0.0

    def __enter__(self) -> Self:
        self._begun = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.perf_counter() - self._begun
        if error is not None:
            with suppress(Exception):  # an error class may refuse attributes, in any way
                setattr(error, _SECONDS, self.seconds)
                setattr(error, _WORKER, os.getpid())
                setattr(error, _PLACE, _place(trace))
