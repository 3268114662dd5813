"""What a pool keeps an eye on at Dask's scheduler: whether it answers, and where others' tasks take the room.

All of it runs in the event loop of the pool's client.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, Any

from shpool.engines.dask_border import outcome_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from distributed import Client, Scheduler

_LOOK = 0.25  # s between two looks whether the connection is there
_ASK = 1.0  # s between an answer and the next question
_SILENT = 2.5  # s without an answer after which nobody waits for the scheduler any more
_LOST = 30.0  # s without one after which it is lost; a busy one may well be deaf for ten
_MOST_ADVANCE = 1.0  # s that the first answer may take


class SchedulerWatch:
    """Ask the scheduler over and over what it runs.

    Args:
        client: Connected to it.
        prefix: What the keys of the pool's own tasks begin with.

    Attributes:
        strangers: How many tasks of others each worker has.
        is_given_up: Nobody waits for it any more.
    """

    def __init__(self, client: Client, prefix: str) -> None:
        self._client = client
        self._prefix = prefix
        self._question: asyncio.Future[Any] | None = None
        self._heard = _now()
        self.strangers: dict[str, int] = {}
        self.is_given_up = False

    @property
    def silence(self) -> float:
        """Seconds since the scheduler was heard, if it has been asked."""
        return _now() - self._heard if self._question is not None else 0.0

    @property
    def is_silent(self) -> bool:
        """Tell whether there is no hope that it answers in time."""
        return self.is_given_up or self.silence > _SILENT

    async def begin(self) -> None:
        """Ask for the first time."""
        self._ask()
        await self.answer_within(_MOST_ADVANCE)

    async def answer_within(self, seconds: float) -> bool:
        """Wait for an answer, unless that is hopeless; tell whether it came."""
        if self.is_silent:
            return False
        question = self._ask()
        await asyncio.wait({question}, timeout=seconds)
        self._take_answer()
        return self._question is None

    async def run(self, changed: Callable[[], None]) -> str:
        """Watch until the scheduler is lost; return what tells that.

        Args:
            changed: Called when there is more or less room than before.
        """
        next_question = _now() + _ASK
        while self._client.status == "running":
            await asyncio.sleep(_LOOK)
            if _now() >= next_question:
                self._ask()
            before = self.strangers
            if self._take_answer():
                next_question = _now() + _ASK
                if self.strangers != before:
                    changed()
            if self.silence > _LOST:
                return f"the scheduler has not answered in {_LOST:.0f} s"
        return "the connection to the scheduler was lost"

    def close(self) -> None:
        """Wait for no answer any more."""
        if self._question is not None:
            self._question.cancel()

    def _ask(self) -> asyncio.Future[Any]:
        """Ask, unless there is a question without an answer."""
        if self._question is None:
            self._heard = _now()
            asking = outcome_of(self._client.run_on_scheduler(count_strangers, self._prefix))
            self._question = asyncio.ensure_future(asking)
        return self._question

    def _take_answer(self) -> bool:
        question = self._question
        if question is None or not question.done():
            return False
        self._question = None
        strangers = self.strangers if question.cancelled() else question.result()
        if not isinstance(strangers, Exception):  # the connection's end is seen elsewhere
            self.strangers = strangers
        return True


def count_strangers(prefix: str, dask_scheduler: Scheduler) -> dict[str, int]:
    """Return how many tasks whose keys do not begin like this each worker has; runs at the scheduler."""
    counts = Counter(
        {
            address: sum(not str(task.key).startswith(prefix) for task in worker.processing)
            for address, worker in dask_scheduler.workers.items()
        }
    )
    return dict(+counts)


def _now() -> float:
    return asyncio.get_running_loop().time()
