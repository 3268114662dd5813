"""The Dask engine, as one describes it; nothing of Dask is imported before it is built."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from shpool.errors import MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shpool.engines.base import Engine
    from shpool.engines.setup import WorkerSetup
    from shpool.gate import Gate


@dataclass(frozen=True)
class DaskEngine:
    """Run a pool's tasks on a Dask cluster.

    The workers need shpool and the functions' modules. Who can connect to the scheduler can run code on the workers and
    so read the token: give the cluster TLS certificates (``distributed.Security``) on any network you share.

    Args:
        address: The scheduler's, as ``tcp://host:8786``, or a ``distributed.Client`` whose scheduler is to be used.
            None starts a cluster on this machine, and ends it with the pool: for trying out.
        security: The ``distributed.Security`` to connect with; None for the client's, or what Dask's settings say.
    """

    address: Any = None
    security: Any = None
    name: ClassVar[str] = "dask"

    def build(
        self,
        workers: int | None,
        setup: WorkerSetup,
        blanked: Callable[[], Sequence[str]] = tuple,
        gate: Gate | None = None,
    ) -> Engine:
        """Return the engine.

        Args:
            workers: Most tasks to run at once; None for as many as the cluster has threads.
            setup: How each worker begins.
            blanked: Returns the environment variables that workers started here must not inherit.
            gate: What all requests go through; None for a gate without limits.

        Raises:
            MissingExtraError: ``distributed`` is not installed.
            ValueError: A limit is set that Dask's workers do not know.
        """
        if setup.max_tasks is not None or setup.max_memory is not None:
            msg = (
                "max_tasks_per_worker and max_worker_memory are not Dask's; see dask worker --lifetime, --memory-limit"
            )
            raise ValueError(msg)
        try:
            from shpool.engines.dask_cluster import DaskCluster
        except ModuleNotFoundError as exc:
            raise MissingExtraError(exc.name or "distributed", "dask") from exc
        from shpool.engines.remote import RemoteEngine

        address, security = self.address, self.security
        if is_dask_client(address):
            security = security or address.security
            address = address.scheduler.address
        return RemoteEngine(DaskCluster(address, security, workers, blanked), setup, workers, gate)


def is_dask_client(thing: object) -> bool:
    """Tell whether this is a ``distributed.Client``; without importing that, as one who has a client has done so."""
    distributed = sys.modules.get("distributed")
    return distributed is not None and isinstance(thing, distributed.Client)
