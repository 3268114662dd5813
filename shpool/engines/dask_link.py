"""A pool's connection to its Dask scheduler, and what runs there on its behalf. All of it is the event loop's."""

from __future__ import annotations

import asyncio
import logging
import warnings
from typing import TYPE_CHECKING, Any

from distributed import Client

from shpool.engines.dask_border import outcome_of, words_of
from shpool.engines.dask_outpost import topic_of
from shpool.engines.dask_watch import SchedulerWatch
from shpool.errors import ClusterUnreachableError, SHUserWarning
from shpool.origins import host_of, is_loopback_host

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence

logger = logging.getLogger(__name__)

CONNECT_WITHIN = 6.0  # s
_PRIVATE = ("tls://", "wss://", "inproc://")  # what nobody on the network can read


class Link:
    """The connection.

    Args:
        pool: The pool's id.
        security: What to connect with; None for what Dask's configuration says.

    Attributes:
        address: The scheduler's; "dask" while that is not known.
        client: The pool's own; None until it is connected, and once it is being left.
        watch: On the scheduler; None until it is connected.
    """

    def __init__(self, pool: str, security: Any) -> None:  # noqa: ANN401 - whatever distributed.Client takes
        self.pool = pool
        self.address = "dask"
        self.client: Client | None = None
        self.watch: SchedulerWatch | None = None
        self._security = security
        self._tasks: set[asyncio.Task[Any]] = set()  # kept, as the loop itself holds them weakly

    @property
    def is_silent(self) -> bool:
        """Tell whether there is no hope that the scheduler answers in time."""
        return self.client is None or self.watch is None or self.watch.is_silent

    @property
    def strangers(self) -> Mapping[str, int]:
        """How many tasks of others each worker has."""
        return {} if self.watch is None else self.watch.strangers

    async def connect(self, address: str) -> tuple[Client, SchedulerWatch]:
        """Connect to a scheduler.

        Raises:
            ClusterUnreachableError: That cannot be done.
        """
        self.address = address
        _warn_of_open_network(address)
        client = Client(
            address, security=self._security, asynchronous=True, set_as_default=False, timeout=CONNECT_WITHIN
        )
        # Its own limit does not hold for a scheduler that is stuck.
        outcome = await outcome_of(client, CONNECT_WITHIN + 0.5)
        if isinstance(outcome, Exception):
            await outcome_of(client.close(1))
            raise ClusterUnreachableError(address, words_of(outcome)) from outcome
        self.client, self.watch = client, SchedulerWatch(client, self.key(""))
        return self.client, self.watch

    def key(self, name: int | str) -> str:
        """Return Dask's key of a task of the pool's; they all begin with ``key("")``."""
        return f"{topic_of(self.pool)}-{name}"

    def lost(self, reason: str = "the connection to the scheduler was lost") -> ClusterUnreachableError:
        """Return what there is to say once the scheduler is gone."""
        return ClusterUnreachableError(self.address, reason)

    async def ask(self, function: Callable[..., Any], *args: object, worker: str, seconds: float | None = None) -> Any:  # noqa: ANN401 - of any function
        """Run a function at one worker, or nanny, beside its tasks; return the outcome."""
        if self.client is None:
            return self.lost()
        answers = await outcome_of(self.client.run(function, *args, workers=[worker]), seconds)
        return answers if isinstance(answers, Exception) else answers[worker]

    async def bring(self, function: Callable[[str, Any], None], thing: object, workers: Sequence[str]) -> None:
        """Hand something to the pool's outposts at these workers; they come and go, and one that lacks it asks."""
        if self.client is not None:
            bringing = self.client.run(function, self.pool, thing, workers=list(workers), on_error="ignore")
            outcome = await outcome_of(bringing)
            if isinstance(outcome, Exception):
                logger.debug("a token or a grant could not be brought: %s", words_of(outcome))

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Let this go on beside all else."""
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def end_tasks(self) -> None:
        """Let nothing of that go on."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def now() -> float:
    """Return the loop's time, in seconds."""
    return asyncio.get_running_loop().time()


def _warn_of_open_network(address: str) -> None:
    if not address.startswith(_PRIVATE) and not is_loopback_host(
        host_of(address if "://" in address else f"//{address}")
    ):
        text = (
            f"the token travels unencrypted to {address} and its workers, and who can connect there can use it; "
            "give the cluster TLS certificates: DaskEngine(address, security=distributed.Security(...))"
        )
        warnings.warn(text, SHUserWarning, stacklevel=2)
