"""The way of calls to Dask, and of their answers back; all of it in the event loop.

Dask would run the tasks of a lost worker again on the next one, up to three times, and tell nobody. So each call goes
to one worker and no other, and when that is gone, Dask is to forget it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any

import dask
from distributed import KilledWorker

from shpool.engines.cluster import Lost
from shpool.engines.dask_border import outcome_now, outcome_of
from shpool.engines.dask_outpost import REFUSED, run_call

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from distributed import Client

    from shpool.engines.dask_link import Link
    from shpool.engines.dask_places import Placed

# s until results are released, unless calls are sent before: the client sends once in 10 ms, and a release by itself
# would let the next call wait for that.
_RELEASE_AFTER = 0.05
_LARGE = 4 * 1024 * 1024  # bytes of calls from which Dask might warn of a large graph, which these are not


class Sender:
    """Hand calls to Dask, and tell what comes of each.

    Args:
        link: The connection.
        ended: Called with the number of each call that has ended where it was sent, and how: with the outpost's answer,
            ``Lost``, or an error.
    """

    def __init__(self, link: Link, ended: Callable[[int, bytes | Exception], None]) -> None:
        self._link = link
        self._ended = ended
        self._spent: list[Any] = []  # futures to release

    def send(self, address: str, group: list[Placed]) -> None:
        """Send calls to the worker that is their place."""
        client = self._link.client
        if client is None:
            return
        futures = outcome_now(functools.partial(self._map, client, address, group))
        if isinstance(futures, Exception):
            for placed in group:
                self._ended(placed.call.number, futures)
            return
        for placed, future in zip(group, futures, strict=True):
            placed.future = future
            self._link.spawn(self._await_answer(client, placed, placed.ticket))

    def cancel(self, calls: Iterable[Placed]) -> None:
        """Have Dask forget what it has not done."""
        futures = [placed.future for placed in calls if placed.future is not None and not placed.future.done()]
        if futures and self._link.client is not None:
            self._link.spawn(self._link.client.cancel(futures, force=True))

    def let_go(self, placed: Placed) -> None:
        """Have Dask forget a call that has ended: soon, if it has its result."""
        if placed.future is not None and placed.future.done():
            if not self._spent:
                asyncio.get_running_loop().call_later(_RELEASE_AFTER, self._spent.clear)
            self._spent.append(placed.future)
        self.cancel([placed])

    def release(self) -> None:
        """Have it forget results now, as there is a message to send anyway."""
        self._spent.clear()

    def _map(self, client: Client, address: str, group: list[Placed]) -> list[Any]:
        """Hand calls to Dask, in one message; without the pause for which it would let later ones overtake them."""
        size = sum(len(placed.call.payload) + len(placed.call.function) for placed in group)
        quiet = {} if size < _LARGE else {"distributed.admin.large-graph-warning-threshold": f"{2 * size} B"}
        with dask.config.set(quiet) if quiet else contextlib.nullcontext():
            futures: list[Any] = client.map(
                run_call,
                [placed.call for placed in group],
                [placed.ticket for placed in group],
                key=[self._link.key(placed.ticket) for placed in group],
                workers=[address],
                pure=False,
                retries=0,
                batch_size=None,
                fifo_timeout="0 ms",
            )
        return futures

    async def _await_answer(self, client: Client, placed: Placed, ticket: int) -> None:
        outcome: bytes | Exception
        try:
            outcome = await outcome_of(client.gather(placed.future))
        except asyncio.CancelledError:  # somebody restarts the cluster
            outcome = Lost()
        # Where the answer is a refusal, the call has run before, and Dask has lost the answer.
        if isinstance(outcome, (KilledWorker, CancelledError)) or outcome == REFUSED:
            outcome = Lost()
        if not isinstance(outcome, bytes) and client.status != "running":
            outcome = self._link.lost()
        if placed.ticket == ticket:  # else it was taken from there meanwhile
            self._ended(placed.call.number, outcome)
