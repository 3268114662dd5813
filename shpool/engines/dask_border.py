"""The border to Dask: its errors become outcomes here, and nowhere else.

What the scheduler, a nanny or a worker is asked to do comes back with whatever error it met there, of any class. When
a connection ends, that shows as ``OSError``, ``ClosedClientError``, ``AssertionError`` or ``AttributeError``, as the
moment wants it, since the client takes itself apart. So no list of classes would hold, and all of them are caught; but
those who ask are given the error, and decide what it means.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")


async def outcome_of(step: Awaitable[T], seconds: float | None = None) -> T | Exception:
    """Wait for a step of Dask's; return what came of it, or the error.

    Args:
        step: The step.
        seconds: How long it may take, else it is cancelled, and the error is a ``TimeoutError``; None for any time.
    """
    try:
        return await step if seconds is None else await asyncio.wait_for(step, seconds)
    except Exception as exc:  # noqa: BLE001 - border: as said
        return exc


def outcome_now(step: Callable[[], T]) -> T | Exception:
    """Take a step of Dask's that does not wait; return what came of it, or the error."""
    try:
        return step()
    except Exception as exc:  # noqa: BLE001 - border: as said
        return exc


def words_of(error: BaseException) -> str:
    """Return an error as a line of a message."""
    return f"{type(error).__name__}: {error}".removesuffix(": ")
