"""Show how a batch goes: a bar on a terminal, nothing elsewhere; the only import of tqdm."""

from __future__ import annotations

import contextlib
import sys
import threading
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType

    from typing_extensions import Self


_THOUSAND = 1000
_USUAL_BAR = 10  # characters, as tqdm draws it where a line has no end
_LEAST_BAR = 3  # characters
_TICK = 1.0  # s between redraws while nothing finishes; the finest unit the bar shows


class Progress:
    """Count finished items and show done, failed, rate, time left and the token's seconds left.

    A class, because the counts outlive any single call. Disabled, it only counts: no import, no thread,
    no output. Shown, a thread of its own redraws it every second until the block ends, so that the times move
    while a long job runs. It never writes to standard output.

    Where it is known how many bytes all items have, the bar, its rate and its time left are of bytes; else of items.

    Args:
        total: Items to come, or None when nobody knows.
        desc: One or two words in front of the bar.
        unit: What an item is called.
        enabled: Show a bar; None means only where ``stream`` is a terminal.
        stream: Where the bar is drawn; None is ``sys.stderr`` as it is then.
        token: Asked for the token's seconds left at every redraw of the thread, from that thread; None leaves it
            to ``update_token``.
        notes: Asked for words to show besides the counts at every redraw, from that thread too: those that matter most
            come first, and those for which a line has no room are left out.
        size: Bytes of all items; 0 where that is not known.
        moved: Asked for the bytes that have come so far, where ``size`` is known; from that thread too.
        tick: Seconds between the thread's redraws.

    >>> with Progress(3, desc="tiles", enabled=False) as progress:
    ...     progress.done(2)
    ...     progress.failed()
    >>> progress.done_count, progress.failed_count
    (2, 1)
    """

    def __init__(  # noqa: PLR0913 - each has its default
        self,
        total: int | None,
        *,
        desc: str,
        unit: str = "job",
        enabled: bool | None = None,
        stream: TextIO | None = None,
        token: Callable[[], float | None] | None = None,
        notes: Callable[[], Sequence[str]] = tuple,
        size: int = 0,
        moved: Callable[[], int] = int,
        tick: float = _TICK,
    ) -> None:
        self.done_count = 0
        self.failed_count = 0
        self._total = total
        self._desc = desc
        self._unit = unit
        self._stream = sys.stderr if stream is None else stream
        self._enabled = _is_terminal(self._stream) if enabled is None else enabled
        self._seconds_left: float | None = None
        self._token = token
        self._notes = notes
        self._size = size
        self._moved = moved
        self._room: int | None = None  # characters for what follows the rate; None for any number
        self._tick = tick
        self._lock = threading.Lock()  # guards the bar's drawing
        self._bar: Any = None  # a tqdm, imported only when drawn
        self._has_ended = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def is_shown(self) -> bool:
        """Tell whether a bar is drawn."""
        return self._enabled

    def __enter__(self) -> Self:
        """Draw the empty bar."""
        if self._enabled:
            total, unit = (self._size, "B") if self._size else (self._total, self._unit)
            self._bar = _new_bar(total, self._desc, unit, self._stream, is_scaled=bool(self._size))
            self._has_ended.clear()
            self._thread = threading.Thread(target=self._redraw, name="shpool-progress")
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the bar as it stands and end its line."""
        if self._thread is not None:
            self._has_ended.set()
            self._thread.join()
            self._thread = None
        if self._bar is not None:
            self._room = _room_of(self._bar)
            self._advance(0)
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

    def pass_over(self, n: int = 1, size: int = 0) -> None:
        """Move the bar over ``n`` items that took no time now, as they were done before; the rate leaves them out.

        Args:
            n: How many.
            size: Bytes they have, where the bar is of bytes; ``moved`` counts them too.
        """
        if self._bar is not None:
            with self._lock:
                self._bar.initial += size if self._size else n
                self._move(max(self._moved() - self._bar.n, 0) if self._size else n)

    @contextlib.contextmanager
    def hidden(self) -> Iterator[None]:
        """Take the bar off its terminal while a block writes whole lines to the same one, and draw it below them."""
        if self._bar is None or not _is_terminal(self._stream):
            yield
            return
        with self._lock:
            self._bar.clear()
            self._stream.flush()
            yield
            self._bar.refresh()

    def update_token(self, seconds_left: float | None) -> None:
        """Tell how long the token lives; None when there is none. Shown at the next redraw."""
        self._seconds_left = seconds_left
        self._advance(0)

    def _advance(self, n: int) -> None:
        if self._bar is not None:
            with self._lock:
                self._bar.set_postfix_str(self._postfix(), refresh=False)
                self._move(max(self._moved() - self._bar.n, 0) if self._size else n)

    def _move(self, n: int) -> None:
        if n:
            self._bar.update(n)

    def _redraw(self) -> None:
        """Redraw at once and at every tick; runs in the thread."""
        while True:
            if self._token is not None:
                self._seconds_left = self._token()
            self._advance(0)
            with self._lock:
                self._room = _room_of(self._bar)
                self._bar.set_postfix_str(self._postfix(), refresh=True)
            if self._has_ended.wait(self._tick):
                return

    def _postfix(self) -> str:
        """Return what follows the rate: of what there is to say, as much as a line has room for."""
        first, *others = [*self._notes(), ""]
        failed = f"failed {self.failed_count}"
        token = "" if self._seconds_left is None else f"token {max(self._seconds_left, 0.0):.0f} s"
        kept: set[str] = set()
        left = float("inf") if self._room is None else self._room
        for part in (failed, first, token, *others):  # by what matters
            if part and (left := left - len(part) - len(", ")) >= 0:
                kept.add(part)
        return ", ".join(part for part in (first, *others, failed, token) if part in kept)


def _room_of(bar: Any) -> int | None:  # noqa: ANN401 - a tqdm
    """Return how many characters of a line are left beside a short bar; None where lines have no end."""
    shape = bar.format_dict
    columns: int | None = shape.get("ncols")
    if not columns:
        return None
    shape |= {"ncols": None, "postfix": ""}
    bare = max(
        len(bar.format_meter(**shape | {"rate": rate})) for rate in (shape["rate"], None)
    )  # None: over all, at the end
    return columns - bare + _USUAL_BAR - _LEAST_BAR


def shown_bytes(number: float) -> str:
    """Return a number of bytes for people.

    >>> shown_bytes(999), shown_bytes(1_234_567), shown_bytes(5e15)
    ('999 B', '1.2 MB', '5000.0 TB')
    """
    if number < _THOUSAND:
        return f"{number:.0f} B"
    units = ["TB", "GB", "MB", "kB"]
    number /= _THOUSAND
    while number >= _THOUSAND and len(units) > 1:
        number /= _THOUSAND
        units.pop()
    return f"{number:.1f} {units[-1]}"


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, ValueError):  # no stream at all under pythonw; a closed one
        return False


def _new_bar(total: int | None, desc: str, unit: str, stream: TextIO, *, is_scaled: bool) -> Any:  # noqa: ANN401 - tqdm.auto picks the class
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
        unit_scale=is_scaled,
        file=stream,
        dynamic_ncols=True,
        bar_format=form if total is not None else None,
        leave=True,
    )
