"""Calls on a Dask cluster: each goes to a worker of the pool's own choice, and answers come back in bundles.

The client is the pool's own, with an event loop in a thread of its own. What the modules below call the event loop is
that one: they run nowhere else, so nothing there needs a lock.

- ``dask_stay``: coming, staying and leaving
- ``dask_link``: the connection; ``dask_watch``: whether the scheduler is there; ``dask_border``: Dask's errors
- ``dask_workers``: workers that come and go, what they are told, and what becomes of the calls of those gone
- ``dask_calls``: calls from launch to end; ``dask_places``: which goes where; ``dask_sender``: their way to Dask and
  back; ``dask_stopping``: how one is stopped

``dask_outpost`` and ``dask_logbook`` run on the workers.
"""

from __future__ import annotations

import contextlib
import logging
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TYPE_CHECKING, Any

from shpool.engines.dask_link import Link
from shpool.engines.dask_local import LocalDask
from shpool.engines.dask_stay import LEAVE_WITHIN, Stay
from shpool.engines.loop_thread import LoopThread
from shpool.processors import processor_count

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shpool.engines.cluster import Events
    from shpool.engines.parcels import Parcel
    from shpool.engines.sealed import Call

logger = logging.getLogger(__name__)

_STOP_WITHIN = 3.0  # s to kill a worker


class DaskCluster:
    """A ``Cluster`` on Dask.

    Args:
        address: The scheduler's; None starts a cluster on this machine.
        security: What to connect with; None for what Dask's configuration says.
        workers: Worker processes of a cluster started here; None for one each processor.
        blanked: Returns the environment variables these must not inherit.
        stay_of: Makes the pool's stay.
    """

    tells_begin = True

    def __init__(
        self,
        address: str | None,
        security: Any = None,  # noqa: ANN401 - whatever distributed.Client takes
        workers: int | None = None,
        blanked: Callable[[], Sequence[str]] = tuple,
        *,
        stay_of: Callable[[Link, Events], Stay] = Stay,
    ) -> None:
        self._address = address
        self._security = security
        self._workers = workers
        self._blanked = blanked
        self._stay_of = stay_of
        self._local: LocalDask | None = None
        self._loop = LoopThread("shpool-dask")
        self._stay: Stay | None = None
        self._is_open = False

    @property
    def capacity(self) -> int:
        """How many calls can run at once now."""
        return 0 if self._stay is None else self._stay.workers.capacity

    def open(self, pool: str, setup: bytes, events: Events) -> None:
        """Connect, start the local cluster first if one is wanted, and open the outposts.

        Raises:
            ClusterError: It cannot be used.
        """
        if self._address is None:
            self._local = LocalDask(self._workers or processor_count(), self._blanked())
        self._stay = stay = self._stay_of(Link(pool, self._security), events)
        self._loop.start()
        self._is_open = True  # before there is an address, as a parcel may come first
        try:
            address = self._address if self._local is None else self._local.address()
            self._loop.result(stay.begin(address or "", setup))
        except BaseException:
            self.close()
            raise

    def launch(self, calls: Sequence[Call]) -> None:
        """Send calls to run."""
        self._soon(lambda stay: stay.calls.launch(calls))

    def cancel(self, numbers: Sequence[int]) -> None:
        """Drop calls."""
        self._soon(lambda stay: stay.calls.drop(numbers))

    def stop(self, number: int) -> bool:
        """Kill the worker that runs a call, if it has a nanny and runs nothing else."""
        if self._stay is None or not self._is_open:
            return False
        try:
            return self._loop.result(self._stay.stop(number), _STOP_WITHIN)
        except (FutureTimeoutError, CancelledError):  # the latter if the pool is left meanwhile
            logger.warning("a worker cannot be stopped: it has not answered in %.0f s", _STOP_WITHIN)
            return False

    def push(self, parcel: Parcel) -> None:
        """Bring a parcel to every outpost."""
        self._soon(lambda stay: stay.workers.push(parcel))

    def post(self, worker: str | None, note: bytes) -> None:
        """Hand a worker, or all, what the gate grants."""
        self._soon(lambda stay: stay.workers.post(worker, note))

    def close(self) -> None:
        """Close the outposts, let go of the cluster."""
        if self._stay is not None and self._is_open:
            self._is_open = False
            with contextlib.suppress(FutureTimeoutError):
                self._loop.result(self._stay.end(), 4 * LEAVE_WITHIN)
            self._loop.end()
        if self._local is not None:
            self._local.close()

    def _soon(self, act: Callable[[Stay], object]) -> None:
        """Have something done in the event loop, between opening and closing."""
        if self._stay is not None and self._is_open:
            self._loop.soon(act, self._stay)
