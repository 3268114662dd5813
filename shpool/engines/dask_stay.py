"""A pool's stay at a Dask cluster, from connecting until nothing of it is left there; all of it in the event loop."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from shpool.engines.dask_border import outcome_now, outcome_of, words_of
from shpool.engines.dask_calls import Calls
from shpool.engines.dask_link import Link, now
from shpool.engines.dask_outpost import OutpostPlugin, describe, forget_topic, topic_of
from shpool.engines.dask_stopping import stop_call
from shpool.engines.dask_workers import Workers
from shpool.errors import ClusterError

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from distributed import Client

    from shpool.engines.cluster import Events
    from shpool.engines.dask_watch import SchedulerWatch

logger = logging.getLogger(__name__)

# s from the first try until the workers have opened their outposts, or an error is known; with what leaving takes
# then, that makes less than 10 s.
_OPEN_WITHIN = 7.5
_LAST_WORD_WITHIN = 0.5  # s of these for the scheduler to show that it is not to blame
_NO_ANSWER = "no worker has answered"
LEAVE_WITHIN = 5.0  # s for each of the steps of leaving
_WORD_WITHIN = 2.0  # s for a sign that the scheduler is there, before these steps


class Stay:
    """The stay.

    Args:
        link: What is to connect it.
        events: What the engine is told.

    Attributes:
        calls: What runs there.
        workers: What runs it.
    """

    def __init__(self, link: Link, events: Events) -> None:
        self._link = link
        self._events = events
        self.calls = Calls(link, events)
        self.workers = Workers(link, self.calls, events)

    async def begin(self, address: str, setup: bytes) -> None:
        """Connect to a scheduler, and open the outposts.

        Raises:
            ClusterError: That cannot be done.
        """
        give_up = now() + _OPEN_WITHIN
        client, watch = await self._link.connect(address)
        client.subscribe_topic(topic_of(self._link.pool), self.workers.hear)
        client.subscribe_topic("all", self.workers.hear_of)
        await watch.begin()
        registering = self._link.spawn(outcome_of(self._register(client, setup)))
        await asyncio.wait({registering}, timeout=max(0.0, give_up - _LAST_WORD_WITHIN - now()))
        error: Exception | None = None
        if registering.done():
            error = registering.result()
        elif not self.calls.places.members:
            error = TimeoutError(_NO_ANSWER)
        if error is not None:
            raise await self._explain(error, watch) from error
        self.workers.recount()
        self._link.spawn(self._keep_watch(watch))

    async def stop(self, number: int) -> bool:
        """Stop a call; see ``Cluster``."""
        return await stop_call(self._link, self.calls, number)

    async def end(self) -> None:
        """Leave the cluster as it was found; what cannot be done any more is left."""
        link = self._link
        client, link.client = link.client, None
        self.calls.release()
        if client is None:
            return
        if client.status == "running" and (link.watch is None or await link.watch.answer_within(_WORD_WITHIN)):
            self.calls.drop(self.calls.places.numbers)
            await self._remove_traces(client)
        if link.watch is not None:
            link.watch.close()
        await link.end_tasks()
        await _try(client.close(_WORD_WITHIN))

    async def _register(self, client: Client, setup: bytes) -> None:
        """Open the outposts. Each tells of itself too, so that a worker that never answers keeps no other from work."""
        pool = self._link.pool
        await client.register_plugin(OutpostPlugin(pool, setup), name=topic_of(pool))
        for hello in (await client.run(describe, pool)).values():
            if hello is not None:
                self.workers.admit(hello)

    async def _explain(self, error: Exception, watch: SchedulerWatch) -> ClusterError:
        """Return why the outposts could not be opened."""
        if not await watch.answer_within(_LAST_WORD_WITHIN):
            watch.is_given_up = True
            return self._link.lost("the scheduler does not answer")
        reason = f"its workers cannot take part ({words_of(error)}); they need the same version of shpool"
        return ClusterError(self._link.address, reason)

    async def _keep_watch(self, watch: SchedulerWatch) -> None:
        """Tell the engine when the scheduler is gone: what was sent there is lost, and the plugin with it."""
        reason = await watch.run(self.workers.recount)
        if self._link.client is not None:
            self._events.failed(self._link.lost(reason))

    async def _remove_traces(self, client: Client) -> None:
        topic = topic_of(self._link.pool)
        await _try(client.unregister_worker_plugin(topic))
        outcome_now(lambda: client.unsubscribe_topic("all"))
        if not await _try(client.run_on_scheduler(forget_topic, topic)):
            outcome_now(lambda: client.unsubscribe_topic(topic))  # not before: it would bring the topic back


async def _try(step: Awaitable[Any]) -> bool:
    """Take a step towards the end, if it can be taken in time; tell whether it could."""
    outcome = await outcome_of(step, LEAVE_WITHIN)
    if isinstance(outcome, Exception):
        logger.debug("the cluster was not left in order: %s", words_of(outcome))
    return not isinstance(outcome, Exception)
