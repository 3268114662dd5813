"""The worker's side of the Dask engine: a plugin that opens the pool's outpost, and what the client has run there.

The plugin's pickled form lies in the scheduler for workers that come later, so it holds no token: each outpost asks for
one by an event, and the client brings it by ``Client.run``, which is stored nowhere. So it is with leases of the gate.
Events do stay in the scheduler's memory: there is nothing in them but numbers and addresses.

A driver that was killed has removed nothing. Outposts serve its token to the end; then each has the scheduler look
whether the pool's client is still connected, and if it is not, remove plugin and topic, which closes the outposts. A
driver that is silent, as its provider is down or it was stopped, keeps them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from typing import TYPE_CHECKING, Any

from distributed import WorkerPlugin, get_worker
from distributed.core import Status
from distributed.protocol.pickle import dumps

from shpool.engines.dask_border import outcome_of
from shpool.engines.dask_logbook import Logbook, TakenBack, logbook_path, sweep
from shpool.engines.dask_places import DEPTH
from shpool.engines.outpost import Outpost, close_outpost, open_outpost, outpost_of
from shpool.engines.parcels import TokenCell
from shpool.errors import ClusterError
from shpool.tokens import boot_time

if TYPE_CHECKING:
    from collections.abc import Sequence

    from distributed import Nanny, Scheduler, Worker

    from shpool.engines.parcels import Parcel
    from shpool.engines.sealed import Call

    Message = dict[str, Any]

logger = logging.getLogger(__name__)

_LEAST_PAUSE = 2.0  # s without a token until the scheduler is asked whether the pool's client is still there
_LONGEST_PAUSE = 60.0  # s between two such questions
REFUSED = b""  # the answer of a call that has begun before, or was taken back
_LOOK = 5.0  # s between two looks at a token's time: the next one may end before this one would have


def topic_of(pool: str) -> str:
    """Return the topic of a pool's events, which is its plugin's name too."""
    return f"shpool-{pool}"


class OutpostPlugin(WorkerPlugin):
    """Open a pool's outpost in each worker, those to come included, and close it at the end of either.

    Args:
        pool: The pool's id.
        setup: Its pickled ``WorkerSetup``.
    """

    def __init__(self, pool: str, setup: bytes) -> None:
        self.pool = pool
        self._setup = setup
        self.logbook: Logbook | None = None  # on a worker, as is the next
        self._watching: asyncio.Task[None] | None = None

    def setup(self, worker: Worker) -> None:
        """Open the outpost, and tell the client of it."""
        topic, address = topic_of(self.pool), worker.address

        def ask(clock: float) -> None:
            worker.log_event(topic, {"ask": address, "clock": clock})

        def report(generation: int) -> None:
            worker.log_event(topic, {"refused": generation})

        def tell(note: bytes) -> None:
            worker.log_event(topic, {"lease": address, "note": note})

        sweep(worker.local_directory)
        path = logbook_path(worker.local_directory, self.pool) if worker.nanny else None
        self.logbook = Logbook(path, worker.state.nthreads * DEPTH)
        outpost = open_outpost(Outpost(self.pool, self._setup, TokenCell(ask), report, tell))
        self._watching = asyncio.ensure_future(_watch(outpost.cell, worker, topic))
        worker.log_event(topic, description_of(worker, self.logbook))

    def teardown(self, worker: Worker) -> None:
        """Close the outpost."""
        if self._watching is not None:
            self._watching.cancel()
        if self.logbook is not None:
            if worker.status in {Status.running, Status.paused}:  # so the pool ends, not the worker
                self.logbook.close()
            else:
                worker.log_event(topic_of(self.pool), {"bye": worker.address, "begun": self.logbook.seal()})
        close_outpost(self.pool)


async def _watch(cell: TokenCell, worker: Worker, topic: str) -> None:
    """Wipe the token when it ends, and while there is none, have the scheduler look after the pool."""
    asked, pause = boot_time(), _LEAST_PAUSE
    while True:
        left, now = cell.wipe(), boot_time()
        if left > 0:
            wait, pause = left, _LEAST_PAUSE
        else:
            wait = max(asked, now + left) + pause - now
            if wait <= 0:
                await _have_removed(worker, topic)
                asked, pause = now, min(2 * pause, _LONGEST_PAUSE)
                continue
        await asyncio.sleep(min(wait, _LOOK))


async def _have_removed(worker: Worker, topic: str) -> None:
    """Call ``remove_if_left`` on the scheduler, as ``Client.run_on_scheduler`` does, without waiting for its end."""
    function, args, kwargs = dumps(remove_if_left), dumps((topic,)), dumps({})
    outcome = await outcome_of(worker.scheduler.run_function(function=function, args=args, kwargs=kwargs, wait=False))
    if isinstance(outcome, Exception):  # it may not let anybody do this
        logger.debug("the scheduler cannot be asked after the pool: %s", type(outcome).__name__)


def description_of(worker: Worker, logbook: Logbook) -> Message:
    """Return what the client must know of a worker."""
    return {
        "hello": worker.address,
        "clock": boot_time(),
        "threads": worker.state.nthreads,
        "pid": os.getpid(),
        "nanny": worker.nanny or "",
        "logbook": logbook.path or "",
    }


def describe(pool: str, dask_worker: Worker) -> Message | None:
    """Return the same, for ``Client.run``; None where the plugin is on its way, which then tells it by itself."""
    plugin = dask_worker.plugins.get(topic_of(pool))
    return None if plugin is None else description_of(dask_worker, _logbook_of(pool, dask_worker))


def run_call(call: Call, ticket: int) -> bytes:
    """Run a call, as a Dask task, unless the logbook says that it must not."""
    worker, outpost = get_worker(), outpost_of(call.pool)
    if outpost is None:
        raise _missing_plugin()
    logbook = _logbook_of(call.pool, worker)
    if not logbook.begin(ticket):
        return REFUSED
    topic = topic_of(call.pool)
    answer = outpost.run(call, lambda number: worker.log_event(topic, {"begun": number}))
    logbook.end(ticket, answer)
    return answer


def take_back(pool: str, tickets: Sequence[int], least: float, dask_worker: Worker) -> TakenBack:
    """Take back what has not begun; see ``Logbook.take_back``."""
    own = topic_of(pool)
    is_blocked = any(not str(task.key).startswith(own) for task in dask_worker.state.executing)
    return _logbook_of(pool, dask_worker).take_back(tickets, least, is_blocked=is_blocked)


def _logbook_of(pool: str, worker: Worker) -> Logbook:
    logbook = getattr(worker.plugins.get(topic_of(pool)), "logbook", None)
    if not isinstance(logbook, Logbook):
        raise _missing_plugin()
    return logbook


def _missing_plugin() -> ClusterError:
    where, reason = "dask", "the pool's plugin is not on the worker"
    return ClusterError(where, reason)


def take_parcel(pool: str, parcel: Parcel) -> None:
    """Put a parcel into the outpost's cell; it may have been closed meanwhile."""
    outpost = outpost_of(pool)
    if outpost is not None:
        outpost.cell.take(parcel)


def take_grant(pool: str, note: bytes) -> None:
    """Hand the outpost's gate what the driver grants."""
    outpost = outpost_of(pool)
    if outpost is not None:
        outpost.take_grant(note)


def kill_worker(dask_worker: Nanny) -> None:
    """Kill the worker of a nanny, which then starts another."""
    pid = dask_worker.pid
    if pid:
        os.kill(pid, signal.SIGKILL)


async def remove_if_left(topic: str, dask_scheduler: Scheduler) -> None:
    """Remove a pool's plugin and topic if its client has left without doing so."""
    broker = dask_scheduler._broker  # noqa: SLF001 - distributed has no public way to learn who subscribes
    subscribers = broker._topics[topic].subscribers if topic in broker._topics else ()  # noqa: SLF001 - as above
    if any(client in dask_scheduler.clients for client in subscribers):
        return
    if topic in dask_scheduler.worker_plugins:
        await dask_scheduler.unregister_worker_plugin(None, name=topic)
    forget_topic(topic, dask_scheduler)


def forget_topic(topic: str, dask_scheduler: Scheduler) -> None:
    """Forget a topic with its events and subscribers; distributed has no public way to do so."""
    with contextlib.suppress(AttributeError):
        dask_scheduler._broker._topics.pop(topic, None)  # noqa: SLF001 - as said
