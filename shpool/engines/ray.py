"""Where on Ray tasks run: a description, which costs nothing until a pool starts with it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from shpool.errors import MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shpool.engines.base import Engine
    from shpool.engines.setup import WorkerSetup
    from shpool.gate import Gate

_ADDRESS = re.compile(r"[^\s/]+:[0-9]{1,5}")


@dataclass(frozen=True)
class RayEngine:
    """Where on Ray tasks run.

    Args:
        address: Of the cluster's head, such as ``10.0.0.5:6379``, for a program on one of its nodes; ``auto`` for the
            one that runs on this machine. None for the one this process is connected to, or that ``RAY_ADDRESS``
            names, else a Ray of our own on this machine.
        num_cpus: Processors a task takes, as Ray counts them.

    Raises:
        TypeError: ``num_cpus`` is no number, or the address no text.
        ValueError: ``num_cpus`` is not more than 0, or the address is of another form, such as one of Ray Client, which
            starts with ``ray://``.
    """

    address: str | None = None
    num_cpus: float = 1.0
    name: ClassVar[str] = "ray"

    def __post_init__(self) -> None:
        address: object = self.address
        number: object = self.num_cpus
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            msg = f"num_cpus must be a number of processors, such as 1 or 0.5, not {number!r}"
            raise TypeError(msg)
        if not 0 < number < math.inf:
            msg = f"num_cpus must be more than 0, not {number!r}"
            raise ValueError(msg)
        if isinstance(address, str):
            check_ray_address(address)
        elif address is not None:
            msg = f"the address must be text, such as '10.0.0.5:6379' or 'auto', or None, not {address!r}"
            raise TypeError(msg)

    def build(
        self,
        workers: int | None,
        setup: WorkerSetup,
        blanked: Callable[[], Sequence[str]] = tuple,
        gate: Gate | None = None,
    ) -> Engine:
        """Return an engine that is not connected yet.

        Args:
            workers: Most tasks to run at once; None for as many as the cluster has processors for.
            setup: How each outpost begins.
            blanked: Returns the environment variables that no worker may inherit; for a Ray of our own.
            gate: What all requests go through; None for a gate without limits.

        Raises:
            MissingExtraError: ``ray`` is not installed.
            ValueError: A limit is set that Ray's workers do not know.
        """
        if setup.max_memory is not None:
            msg = "max_worker_memory is not Ray's; max_tasks_per_worker is, or see RAY_memory_usage_threshold"
            raise ValueError(msg)
        try:
            from shpool.engines.ray_cluster import RayCluster
        except ModuleNotFoundError as exc:
            raise MissingExtraError(exc.name or "ray", "ray") from exc
        from shpool.engines.remote import RemoteEngine

        return RemoteEngine(RayCluster(self, workers, setup.max_tasks, blanked), setup, workers, gate)


def check_ray_address(address: str) -> None:
    """Refuse what is no address of a cluster's head.

    Raises:
        ValueError: It is not; what is one is said after a semicolon.
    """
    if address.startswith("ray://"):
        msg = f"{address} is an address of Ray Client; run this on a node of the cluster, or by: ray job submit"
        raise ValueError(msg)
    if address != "auto" and not _ADDRESS.fullmatch(address):
        msg = f"{address!r} is no address of a Ray; give host:port as of its head, such as 10.0.0.5:6379, or auto"
        raise ValueError(msg)
