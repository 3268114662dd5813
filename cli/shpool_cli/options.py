"""Values of options, read so that a wrong one is named."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from collections.abc import Callable


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
