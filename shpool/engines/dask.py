"""The Dask engine, as one describes it; nothing of Dask is imported before it is built."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from shpool.errors import MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shpool.engines.base import Engine
    from shpool.engines.setup import WorkerSetup
    from shpool.gate import Gate

# Those without a port are of another form, as inproc:// is.
_ADDRESS = re.compile(r"((tcp|tls|wss?|ucxx?)://)?[^\s/]+:[0-9]{1,5}/?|inproc://\S+")


@dataclass(frozen=True)
class DaskEngine:
    """Run a pool's tasks on a Dask cluster.

    The workers need shpool and the functions' modules. Who can connect to the scheduler can run code on the workers and
    so read the token: give the cluster TLS certificates (``distributed.Security``) on any network you share.

    Args:
        address: The scheduler's, as ``tcp://host:8786``, or a ``distributed.Client`` whose scheduler is to be used, or
            a cluster that has one, such as ``distributed.LocalCluster``. None starts a cluster on this machine, and
            ends it with the pool: for trying out.
        security: The ``distributed.Security`` to connect with; None for the client's or the cluster's, or what Dask's
            settings say.

    Raises:
        TypeError: The address or the security is something else.
        ValueError: The address is of another form, or the client is closed.
    """

    address: Any = None
    security: Any = None
    name: ClassVar[str] = "dask"

    def __post_init__(self) -> None:
        address, security = self.address, self.security
        if isinstance(address, str):
            _check_address(address)
        elif is_dask_client(address) or _is_dask_cluster(address):
            _check_open(address)
        elif address is not None:
            msg = (
                f"the address must be like 'tcp://host:8786', a distributed.Client, a cluster or None, not {address!r}"
            )
            raise TypeError(msg)
        if not (security is None or isinstance(security, dict) or hasattr(security, "get_connection_args")):
            msg = f"the security must be a distributed.Security or None, not {security!r}"
            raise TypeError(msg)

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
        elif _is_dask_cluster(address):
            security = security or getattr(address, "security", None)
            address = address.scheduler_address
        return RemoteEngine(DaskCluster(address, security, workers, blanked), setup, workers, gate)


def is_dask_client(thing: object) -> bool:
    """Tell whether this is a ``distributed.Client``; without importing that, as one who has a client has done so."""
    distributed = sys.modules.get("distributed")
    return distributed is not None and isinstance(thing, distributed.Client)


def _is_dask_cluster(thing: object) -> bool:
    deploy = sys.modules.get("distributed.deploy")
    return deploy is not None and isinstance(thing, deploy.Cluster)


def _check_open(thing: Any) -> None:  # noqa: ANN401 - a client or a cluster
    status = str(getattr(thing.status, "name", thing.status))  # a client's is a word
    if status in {"closing", "closed", "failed"}:
        msg = f"the {type(thing).__name__} is {status}; give one that is not, or the scheduler's address"
        raise ValueError(msg)


def _check_address(address: str) -> None:
    if not _ADDRESS.fullmatch(address):
        msg = f"{address!r} is no address of a Dask scheduler; give one such as tcp://host:8786, or tls://host:8786"
        raise ValueError(msg)
