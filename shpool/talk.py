"""What a task and its parent say to each other while it runs: first results up, a request to come to an end down.

On the loky engine and the inline one; on a cluster nobody listens, and a task's return value has to tell everything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable


class Line(Protocol):
    """The way between the task that runs in this process and its parent."""

    @property
    def tell(self) -> Callable[[object], object]:
        """Sends a value."""

    @property
    def is_recalled(self) -> bool:
        """Whether the parent has asked for what has not begun, since this task began."""


def tell(value: object) -> bool:
    """Tell the parent something before the task ends; return whether anybody listens.

    Args:
        value: Anything that can be pickled.
    """
    if _line is None:
        return False
    _line.tell(value)
    return True


def is_recalled() -> bool:
    """Tell whether the parent wants back what this task has not begun."""
    return _line is not None and _line.is_recalled


def take_line(line: Line | None) -> Line | None:
    """Let tasks of this process speak over a line from now on; return the former one."""
    global _line
    former, _line = _line, line
    return former


_line: Line | None = None  # of the process, which runs one task at a time
