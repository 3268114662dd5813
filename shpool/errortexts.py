"""What an error says of itself, where its class may be anybody's: asking runs code that may raise errors of its own."""

from __future__ import annotations

import traceback


def text_of(error: BaseException) -> str:
    """Return an error's text, or why it has none; never raises.

    >>> text_of(ValueError("bad tile"))
    'bad tile'
    """
    try:
        return str(error)
    except Exception as exc:  # noqa: BLE001 - border: anybody's code
        return f"(it has no text: its __str__ raised {type(exc).__name__})"


def attribute_of(error: object, name: str) -> object:
    """Return an attribute of an error, or of what hangs on it; None where there is none, and where asking fails."""
    try:
        return getattr(error, name, None)
    except Exception:  # noqa: BLE001 - border: a property, or a __getattr__ that does not expect such a name
        return None


def traceback_of(error: BaseException, *, skipped: int = 0) -> str:
    """Return an error as Python prints it; where that fails, its last line alone.

    Args:
        error: The error.
        skipped: So many of its outermost frames are not shown.
    """
    frames = error.__traceback__
    for _ in range(skipped):
        frames = frames and frames.tb_next
    try:
        return "".join(traceback.format_exception(type(error), error, frames))
    except Exception:  # noqa: BLE001 - border: it asks for notes, which runs anybody's __getattr__
        return f"{type(error).__qualname__}: {text_of(error)}\n"
