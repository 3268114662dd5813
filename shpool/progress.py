"""Show how a batch goes: a bar on a terminal, nothing elsewhere; the only import of tqdm."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self


class Progress:
    """Count finished items and show done, failed, rate, time left and the token's seconds left.

    A class, because the counts outlive any single call. Disabled, it only counts: no import, no thread,
    no output. It never writes to standard output.

    Args:
        total: Items to come, or None when nobody knows.
        desc: One or two words in front of the bar.
        unit: What an item is called.
        enabled: Show a bar; None means only where ``stream`` is a terminal.
        stream: Where the bar is drawn; None is ``sys.stderr`` as it is then.

    >>> with Progress(3, desc="tiles", enabled=False) as progress:
    ...     progress.done(2)
    ...     progress.failed()
    >>> progress.done_count, progress.failed_count
    (2, 1)
    """

    def __init__(
        self,
        total: int | None,
        *,
        desc: str,
        unit: str = "job",
        enabled: bool | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self.done_count = 0
        self.failed_count = 0
        self._total = total
        self._desc = desc
        self._unit = unit
        self._stream = sys.stderr if stream is None else stream
        self._enabled = _is_terminal(self._stream) if enabled is None else enabled
        self._seconds_left: float | None = None
        self._bar: Any = None  # a tqdm, imported only when drawn

    @property
    def is_shown(self) -> bool:
        """Tell whether a bar is drawn."""
        return self._enabled

    def __enter__(self) -> Self:
        """Draw the empty bar."""
        if self._enabled:
            self._bar = _new_bar(self._total, self._desc, self._unit, self._stream)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the bar as it stands and end its line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def done(self, n: int = 1) -> None:
        """Count ``n`` items that succeeded."""
        self.done_count += n
        self._advance(n)

    def failed(self, n: int = 1) -> None:
        """Count ``n`` items that failed for good; they move the bar too."""
        self.failed_count += n
        self._advance(n)

    def update_token(self, seconds_left: float | None) -> None:
        """Tell how long the token lives; None when there is none. Shown at the next redraw."""
        self._seconds_left = seconds_left
        if self._bar is not None:
            self._bar.set_postfix_str(self._postfix(), refresh=False)

    def _advance(self, n: int) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(self._postfix(), refresh=False)
            self._bar.update(n)

    def _postfix(self) -> str:
        failed = f"failed {self.failed_count}"
        return failed if self._seconds_left is None else f"{failed}, token {max(self._seconds_left, 0.0):.0f} s"


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, ValueError):  # no stream at all under pythonw; a closed one
        return False


def _new_bar(total: int | None, desc: str, unit: str, stream: TextIO) -> Any:  # noqa: ANN401 - tqdm.auto picks the class
    import threading

    from tqdm.auto import tqdm

    class _Bar(tqdm):  # type: ignore[type-arg]  # tqdm is generic in its stubs only, and we never iterate
        # No monitor thread: it would outlive the bar, and counting redraws often enough.
        monitor_interval = 0

    # tqdm's own lock is a process lock as well, whose semaphore starts a tracker process where fork is not the default.
    _Bar.set_lock(threading.RLock())
    # The bar leaves little to the right on 80 columns, so done/total, rate and time left come first.
    form = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
    return _Bar(
        total=total,
        desc=desc,
        unit=unit,
        file=stream,
        dynamic_ncols=True,
        bar_format=form if total is not None else None,
        leave=True,
    )
