"""Which of the tasks that were handed to an executor have begun: futures tell, but only who asks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

_T = TypeVar("_T")

_LOOK_AGAIN = 0.25  # s; a task that is over before costs nothing, and one of hours is noted soon enough


class Beginnings(Generic[_T]):
    """Notice when tasks begin, by a look at their futures now and then; for one thread.

    Args:
        begun: Called once for each task that is seen to run; None to look for none.
        clock: Seconds that never step back.

    Attributes:
        next_look: When to look again.
    """

    def __init__(self, begun: Callable[[_T], None] | None, clock: Callable[[], float]) -> None:
        self._begun = begun
        self._clock = clock
        self._expected: dict[Future[Any], _T] = {}
        self.next_look = 0.0

    def expect(self, future: Future[Any], task: _T) -> None:
        """Look for the beginning of a task."""
        if self._begun is not None:
            self._expected[future] = task

    def forget(self, future: Future[Any]) -> None:
        """Look for it no more: it is over."""
        self._expected.pop(future, None)

    def look(self, *, at_once: bool = False) -> bool:
        """Tell of tasks that have begun, if it is time to; return whether there are others to look for."""
        if self._begun is None or not self._expected:
            return False
        now = self._clock()
        if at_once or now >= self.next_look:
            self.next_look = now + _LOOK_AGAIN
            for future in [future for future in self._expected if future.running()]:
                self._begun(self._expected.pop(future))
        return bool(self._expected)
