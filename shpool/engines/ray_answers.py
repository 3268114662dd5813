"""The answers of calls on Ray: fetched many at a time while they come fast, else one by one as each comes."""

from __future__ import annotations

import functools
import itertools
import queue
import threading
from typing import TYPE_CHECKING, Any

import ray

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    # A call's number, and its answer or why there is none.
    Tell = Callable[[int, "bytes | BaseException"], object]

_BUNCH = 8  # calls launched at once from which it is worth to wait for them together
_HANDFUL = 16  # answers to fetch at a time
_WINDOW = 2 * _HANDFUL  # calls to look at for these, oldest first; Ray takes a microsecond for each at every look
_PATIENCE = 0.01  # s for a handful; then less will do
_STALL = 0.1  # s for a first answer after that; if none comes, those looked at are told of one by one


class Answers:
    """Wait for answers and tell them.

    Ray's callback for a single answer costs a switch of threads; in a flood of tiny tasks that is a tenth of all.

    Args:
        tell: Called with each call's end, in a thread of Ray's or of this object's; must not wait.
    """

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._bunches: queue.SimpleQueue[dict[Any, int] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._fetch_bunches, name="shpool-ray-answers", daemon=True)

    def start(self) -> None:
        """Begin; before the first call is launched."""
        self._thread.start()

    def expect(self, numbers: dict[Any, int]) -> None:
        """Take note of calls that were launched together: their numbers by Ray's references to their answers."""
        if len(numbers) < _BUNCH:
            self._expect_each(numbers)
        else:
            self._bunches.put(numbers)

    def close(self, seconds: float) -> None:
        """End, and wait so long for that; answers that have not come yet are told of by nobody."""
        self._bunches.put(None)
        if self._thread.ident is not None:
            self._thread.join(seconds)

    def _expect_each(self, numbers: dict[Any, int]) -> None:
        for ref, number in numbers.items():
            ref.future().add_done_callback(functools.partial(self._tell_of, number))

    def _tell_of(self, number: int, future: Future[bytes]) -> None:
        error = future.exception()
        self._tell(number, future.result() if error is None else error)

    # What follows runs in this object's thread.

    def _fetch_bunches(self) -> None:
        expected: dict[Any, int] = {}
        while True:
            while not expected or not self._bunches.empty():
                bunch = self._bunches.get()
                if bunch is None:
                    return
                expected |= bunch
            if not ray.is_initialized():  # else Ray would start a cluster of its own, unasked
                expected.clear()
                continue
            window = list(itertools.islice(expected, _WINDOW))
            done = _wait_for(window)
            for ref, outcome in zip(done, _outcomes(done), strict=True):
                self._tell(expected.pop(ref), outcome)
            if not done:  # the oldest take long, or are held up; those behind them need not be
                self._expect_each({ref: expected.pop(ref) for ref in window})


def _wait_for(window: list[Any]) -> list[Any]:
    """Return a handful of those that have an answer: fewer when they come slowly, none when they do not come."""
    done, _ = ray.wait(window, num_returns=min(_HANDFUL, len(window)), timeout=_PATIENCE)
    if not done:
        done, _ = ray.wait(window, num_returns=1, timeout=_STALL)
    return list(done)


def _outcomes(refs: list[Any]) -> list[Any]:
    """Return answers that have come; where one is an error, one by one."""
    try:
        return list(ray.get(refs))
    except Exception:  # noqa: BLE001 - border: Ray raises what became of a call
        return [_outcome(ref) for ref in refs]


def _outcome(ref: Any) -> bytes | BaseException:  # noqa: ANN401 - Ray's reference
    try:
        return bytes(ray.get(ref))
    except Exception as exc:  # noqa: BLE001 - border: as above
        return exc
