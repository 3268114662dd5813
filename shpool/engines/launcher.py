"""Starting workers: how, when the next attempt may come, and when it is in vain.

All of it is called from the crew's loop.
"""

from __future__ import annotations

import logging
import signal
import time
from typing import TYPE_CHECKING

from shpool.engines.messages import Landing
from shpool.errors import WorkerStartError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shpool.board import Board
    from shpool.engines.member import Member
    from shpool.engines.setup import WorkerSetup
    from shpool.gate import Gate

logger = logging.getLogger(__name__)

_MOST_FALSE_STARTS = 3  # workers in a row that end before they are ready: then the code is at fault
_FALSE_STARTS_WITHIN = 30.0  # s of nothing but those: then it is the machine, although a worker was ready once
_PAUSE = 1.0  # s after the system refused a process or a descriptor


def import_all() -> None:
    """Import all that the launch of a worker takes, so that it waits for no other thread's import."""
    import shpool.engines.member  # noqa: F401


class Launcher:
    """Start workers that are all alike.

    Args:
        board: What they read the token from.
        setup: How each of them begins.
        pickled_setup: The same as it travels.
        blanked: Returns the environment variables they must not inherit; asked at each launch.
        gate: What they all go through; None for a gate of its own in each.

    Attributes:
        not_before: When the next launch may come, by ``time.monotonic``.
        has_launched: A process could be started, once at least.
        landing: Where what all workers send arrives.
    """

    def __init__(
        self,
        board: Board,
        setup: WorkerSetup,
        pickled_setup: bytes,
        blanked: Callable[[], Sequence[str]],
        gate: Gate | None = None,
    ) -> None:
        self._board = board
        self._setup = setup
        self._pickled_setup = pickled_setup
        self._blanked = blanked
        self._gate = gate
        self.not_before = 0.0
        self.has_launched = False
        self.landing = Landing()
        self._false_starts: list[float] = []  # when workers ended that had not been ready, since one last was
        self._was_ready = False  # any worker, ever

    def launch(self) -> Member:
        """Start a worker.

        Raises:
            OSError: The system starts no more processes or opens no more descriptors; the next launch must wait.
        """
        from shpool.engines.member import Member  # here: the login need not wait for it

        try:
            member = Member.launch(
                self._board, self._setup, self._pickled_setup, self._blanked(), self.landing, self._gate
            )
        except OSError as exc:
            logger.warning("a worker process cannot be started: %s; next attempt in %.0f s", exc, _PAUSE)
            self.not_before = time.monotonic() + _PAUSE
            raise
        self.has_launched = True
        return member

    def note_ready(self) -> None:
        """Take note that a worker is ready."""
        self._was_ready = True
        self._false_starts.clear()

    def note_false_start(self, exitcode: int | None) -> WorkerStartError | None:
        """Take note that a worker ended before it was ready; return why further ones are in vain, if they are.

        One that was killed proves nothing by itself: memory may be short, and is there again in a moment.
        """
        self._false_starts.append(time.monotonic())
        if len(self._false_starts) < _MOST_FALSE_STARTS:
            return None
        has_failed_by_itself = not self._was_ready and exitcode != -signal.SIGKILL
        if has_failed_by_itself or self._false_starts[-1] - self._false_starts[0] > _FALSE_STARTS_WITHIN:
            return WorkerStartError(
                f"they end before they are ready, the last with exit code {exitcode}; see what they have printed"
            )
        return None
