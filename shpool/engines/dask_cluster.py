"""Calls on a Dask cluster: each goes to a worker of the pool's own choice, and answers come back in bundles.

Dask would run the tasks of a lost worker again on the next one, up to three times, and tell nobody. So the pool places
each call itself, on one worker and no other: when that is gone, the scheduler says which calls went with it, they are
dropped, and the engine decides about another attempt.

The client is the pool's own, with an event loop in a thread of its own. All that follows the words "in the loop" runs
there, so nothing of it needs a lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import warnings
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import dask
from distributed import Client, KilledWorker

from shpool.engines.cluster import Lost, Unbegun
from shpool.engines.dask_local import LocalDask
from shpool.engines.dask_outpost import (
    OutpostPlugin,
    describe,
    forget_topic,
    kill_worker,
    run_call,
    take_grant,
    take_parcel,
    topic_of,
)
from shpool.engines.dask_watch import SchedulerWatch
from shpool.errors import ClusterError, ClusterUnreachableError, SHUserWarning
from shpool.origins import host_of, is_loopback_host

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence

    from shpool.engines.cluster import Events
    from shpool.engines.parcels import Parcel
    from shpool.engines.sealed import Call

    Message = dict[str, Any]

T = TypeVar("T")
logger = logging.getLogger(__name__)

CONNECT_WITHIN = 7.0  # s
_ADMIT_WITHIN = 10.0  # s for the workers to open their outposts
_NO_ANSWER = "no worker has answered"
_LEAVE_WITHIN = 5.0  # s for each of the steps of leaving
_WORD_WITHIN = 2.0  # s for a sign that the scheduler is there, before these steps
_STOP_WITHIN = 3.0  # s to kill a worker
# s until results are released, unless calls are sent before: the client sends once in 10 ms, and a release by itself
# would let the next call wait for that.
_RELEASE_AFTER = 0.05
_LARGE = 4 * 1024 * 1024  # bytes of calls from which Dask might warn of a large graph, which these are not
_PRIVATE = ("tls://", "wss://", "inproc://")  # what nobody on the network can read


@dataclass
class _Member:
    """A worker with an outpost of the pool's.

    Attributes:
        address: Its address.
        threads: How many calls it runs at once.
        pid: Its process id.
        has_nanny: It can be killed, as it is started again then.
        calls: Numbers of the calls that were sent there and have not ended, oldest first.
        strangers: How many tasks of others it has.
    """

    address: str
    threads: int
    pid: int
    has_nanny: bool
    calls: dict[int, None] = field(default_factory=dict)
    strangers: int = 0

    @property
    def room(self) -> int:
        """How many calls can run here at once beside what others have here."""
        return max(0, self.threads - self.strangers)

    @property
    def load(self) -> tuple[bool, float]:
        """What tells who is next to get a call: those without room last."""
        return not self.room, len(self.calls) / (self.room or self.threads)


class DaskCluster:
    """A ``Cluster`` on Dask.

    Args:
        address: The scheduler's; None starts a cluster on this machine.
        security: What to connect with; None for what Dask's configuration says.
        workers: Worker processes of a cluster started here; None for one each processor.
        blanked: Returns the environment variables these must not inherit.
    """

    tells_begin = True

    def __init__(
        self,
        address: str | None,
        security: Any = None,  # noqa: ANN401 - whatever distributed.Client takes
        workers: int | None = None,
        blanked: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        self._address = address
        self._security = security
        self._workers = workers
        self._blanked = blanked
        self._local: LocalDask | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run_loop, name="shpool-dask", daemon=True)
        self._has_loop = threading.Event()

        # What follows is the loop's alone, once it runs.
        self._events: Events
        self._pool = ""
        self._client: Client | None = None
        self._watch: SchedulerWatch | None = None
        self._members: dict[str, _Member] = {}
        self._futures: dict[int, Any] = {}
        self._waiting: dict[int, Call] = {}  # until there is a worker; Dask would run them as often as it likes
        self._marker: Any = None  # a task that shows a cluster which grows on demand that there is something to do
        self._spent: list[Any] = []  # futures to release
        self._parcel: Parcel | None = None
        self._tasks: set[asyncio.Task[Any]] = set()  # kept, as the loop itself holds them weakly
        self.capacity = 0

    def open(self, pool: str, setup: bytes, events: Events) -> None:
        """Connect, start the local cluster first if one is wanted, and open the outposts.

        Raises:
            ClusterError: It cannot be used.
        """
        if self._address is None:
            self._local = LocalDask(self._workers or _processors(), self._blanked())
        self._pool, self._events = pool, events
        self._thread.start()
        self._has_loop.wait()
        try:
            if self._local is not None:
                self._address = self._local.address()
            self._await(self._open(self._address or "", setup))
        except BaseException:
            self.close()
            raise

    def launch(self, calls: Sequence[Call]) -> None:
        """Send calls to run."""
        self._soon(self._launch, calls)

    def cancel(self, numbers: Sequence[int]) -> None:
        """Drop calls."""
        self._soon(self._drop, numbers)

    def stop(self, number: int) -> bool:
        """Kill the worker that runs a call, if it has a nanny and runs nothing else."""
        try:
            return self._await(self._stop(number), _STOP_WITHIN)
        except Exception as exc:  # noqa: BLE001 - border: the cluster's own code
            logger.warning("a worker cannot be stopped: %s: %s", type(exc).__name__, exc)
            return False

    def push(self, parcel: Parcel) -> None:
        """Bring a parcel to every outpost."""
        self._soon(self._push, parcel)

    def post(self, worker: str | None, note: bytes) -> None:
        """Hand a worker, or all, what the gate grants."""
        self._soon(self._post, worker, note)

    def close(self) -> None:
        """Close the outposts, let go of the cluster."""
        loop, self._loop = self._loop, None
        if loop is not None:
            future = asyncio.run_coroutine_threadsafe(self._close(), loop)
            with contextlib.suppress(FutureTimeoutError, OSError):
                future.result(4 * _LEAVE_WITHIN)
            loop.call_soon_threadsafe(loop.stop)
            self._thread.join()
        if self._local is not None:
            self._local.close()

    # From other threads into the loop

    def _run_loop(self) -> None:
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        self._loop = loop
        loop.call_soon(self._has_loop.set)
        try:
            loop.run_forever()
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()

    def _soon(self, function: Callable[..., object], *args: object) -> None:
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # closed meanwhile
                loop.call_soon_threadsafe(function, *args)

    def _await(self, coroutine: Coroutine[Any, Any, T], seconds: float | None = None) -> T:
        if self._loop is None:
            coroutine.close()
            raise ClusterUnreachableError(self._address or "dask", "it was left")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(seconds)

    # In the loop: life

    async def _open(self, address: str, setup: bytes) -> None:
        _warn_of_open_network(address)
        self._client = client = await _connected(address, self._security)
        client.subscribe_topic(topic_of(self._pool), self._hear)
        client.subscribe_topic("all", self._hear_of_workers)
        registering = asyncio.ensure_future(self._register(client, setup))
        done, _ = await asyncio.wait({registering}, timeout=_ADMIT_WITHIN)
        self._spawn(_settled(registering))
        try:
            if done:
                registering.result()
            elif not self._members:
                raise TimeoutError(_NO_ANSWER)  # noqa: TRY301 - as any other reason
        except Exception as exc:
            reason = f"its workers cannot take part ({_words_of(exc)}); they need the same version of shpool"
            raise ClusterError(address, reason) from exc
        self._watch = SchedulerWatch(client, self._key(""))
        await self._watch.begin()
        self._recount()
        self._spawn(self._keep_watch(self._watch))

    async def _register(self, client: Client, setup: bytes) -> None:
        """Open the outposts. Each tells of itself too, so that a worker that never answers keeps no other from work."""
        await client.register_plugin(OutpostPlugin(self._pool, setup), name=topic_of(self._pool))
        for hello in (await client.run(describe)).values():
            self._admit(hello)

    async def _keep_watch(self, watch: SchedulerWatch) -> None:
        """Tell the engine when the scheduler is gone: what was sent there is lost, and the plugin with it."""
        reason = await watch.run(self._recount)
        if self._client is not None:
            self._events.failed(self._lost_scheduler(reason))

    def _lost_scheduler(self, reason: str = "the connection to the scheduler was lost") -> ClusterUnreachableError:
        return ClusterUnreachableError(self._address or "dask", reason)

    async def _close(self) -> None:
        """Leave the cluster as it was found; what cannot be done any more is left."""
        client, self._client = self._client, None
        self._spent.clear()
        if client is None:
            return
        topic, watch = topic_of(self._pool), self._watch
        if client.status == "running" and (watch is None or await watch.answer_within(_WORD_WITHIN)):
            self._drop(list(self._futures))
            await _try(client.unregister_worker_plugin(topic))
            client.unsubscribe_topic("all")
            if not await _try(client.run_on_scheduler(forget_topic, topic)):
                client.unsubscribe_topic(topic)  # not before: it would bring the topic back
        if watch is not None:
            watch.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await _try(client.close(_WORD_WITHIN))

    def _spawn(self, coroutine: Coroutine[Any, Any, object]) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # In the loop: workers and tokens

    def _hear(self, event: tuple[float, Message]) -> None:
        """Heed what an outpost tells."""
        message = event[1]
        if "hello" in message:
            self._admit(message)
        elif "ask" in message:
            self._answer(message)
        elif "lease" in message:
            self._events.asked(message["lease"], message["note"])
        elif "refused" in message:
            self._events.refused(message["refused"])
        elif "begun" in message:
            self._events.begun(message["begun"])

    def _hear_of_workers(self, event: tuple[float, Message]) -> None:
        """Heed what the scheduler tells of its workers."""
        message = event[1]
        if isinstance(message, dict) and message.get("action") == "remove-worker":
            self._dismiss(message)

    def _admit(self, hello: Message) -> None:
        address = hello["hello"]
        if address not in self._members:
            self._members[address] = _Member(address, hello["threads"], hello["pid"], hello["has_nanny"])
            self._recount()
            self._launch_waiting()
        self._events.joined(address)
        self._answer({"ask": address, "clock": hello["clock"]})

    def _dismiss(self, message: Message) -> None:
        """Take a worker out, and with it what it had: those that may have begun are lost, the others may go again.

        So may all of a worker that was sent away in order, as Dask's own tasks do then.
        """
        member = self._members.pop(message["worker"], None)
        if member is None:
            return
        self._recount()
        self._events.left(member.address)
        if not message.get("expected"):
            self._events.lost_worker(member.pid)
        done = message.get("lost-computed-tasks", ())
        running = member.threads
        for number in list(member.calls):
            is_lost = not message.get("expected") and (self._key(number) in done or running > 0)
            running -= self._key(number) not in done
            self._end(number, Lost(member.pid) if is_lost else Unbegun())

    def _recount(self) -> None:
        """Count what can run at once: beside the tasks of others, or with them, where they are everywhere."""
        strangers = {} if self._watch is None else self._watch.strangers
        for member in self._members.values():
            member.strangers = strangers.get(member.address, 0)
        members = self._members.values()
        self.capacity = sum(member.room for member in members) or sum(member.threads for member in members)
        self._events.changed()

    def _push(self, parcel: Parcel) -> None:
        self._parcel = parcel
        if self._members:
            self._spawn(self._bring(parcel.resealed(), list(self._members)))

    def _answer(self, message: Message) -> None:
        if self._parcel is not None:
            self._spawn(self._bring(self._parcel.resealed(message["clock"]), [message["ask"]]))

    async def _bring(self, parcel: Parcel, addresses: list[str]) -> None:
        await self._run_there(take_parcel, parcel, addresses)

    def _post(self, worker: str | None, note: bytes) -> None:
        addresses = list(self._members) if worker is None else [worker]
        if addresses:
            self._spawn(self._run_there(take_grant, note, addresses))

    async def _run_there(self, function: Callable[[str, Any], None], thing: object, addresses: list[str]) -> None:
        if self._client is not None:
            try:
                await self._client.run(function, self._pool, thing, workers=addresses, on_error="ignore")
            except Exception as exc:  # noqa: BLE001 - border: workers come and go; one that lacks a token asks again
                logger.debug("a token or a grant could not be brought: %s", _words_of(exc))

    # In the loop: calls

    def _launch(self, calls: Sequence[Call]) -> None:
        groups: dict[str, list[Call]] = {}
        for call in calls:
            self._futures[call.number] = None
            member = min(self._members.values(), key=lambda member: member.load, default=None)
            if member is None:
                self._await_worker(call)
            else:
                member.calls[call.number] = None
                groups.setdefault(member.address, []).append(call)
        for address, group in groups.items():
            self._send(address, group)
        self._spent.clear()

    def _await_worker(self, call: Call) -> None:
        self._waiting[call.number] = call
        if self._marker is None and self._client is not None:
            self._marker = self._client.submit(int, key=self._key("wanted"), pure=False)

    def _launch_waiting(self) -> None:
        waiting, self._waiting, self._marker = self._waiting, {}, None
        self._launch(list(waiting.values()))

    def _send(self, address: str, calls: list[Call]) -> None:
        try:
            self._map(address, calls)
        except Exception as exc:  # noqa: BLE001 - border: the cluster's own code
            for call in calls:
                self._end(call.number, exc)

    def _map(self, address: str, calls: list[Call]) -> None:
        """Hand calls to Dask, in one message."""
        if self._client is None:
            return
        size = sum(len(call.payload) + len(call.function) for call in calls)
        quiet = {} if size < _LARGE else {"distributed.admin.large-graph-warning-threshold": f"{2 * size} B"}
        keys = [self._key(call.number) for call in calls]
        with dask.config.set(quiet) if quiet else contextlib.nullcontext():
            futures = self._client.map(
                run_call,
                calls,
                key=keys,
                workers=[address],
                pure=False,
                retries=0,
                batch_size=None,
            )
        for call, future in zip(calls, futures, strict=True):
            self._futures[call.number] = future
            self._spawn(self._await_answer(call.number, future))

    async def _await_answer(self, number: int, future: Any) -> None:  # noqa: ANN401 - distributed has no types
        client = self._client
        if client is None:
            return
        outcome: bytes | BaseException
        try:
            outcome = await client.gather(future)
        except (KilledWorker, CancelledError, asyncio.CancelledError):  # the latter where somebody restarts the cluster
            outcome = Lost()
        except Exception as exc:  # noqa: BLE001 - border: the cluster's own code
            outcome = exc
        if not isinstance(outcome, bytes) and client.status != "running":
            outcome = self._lost_scheduler()
        self._end(number, outcome)

    def _end(self, number: int, outcome: bytes | BaseException) -> None:
        """Tell the end of a call, once; let go of its result."""
        for member in self._members.values():
            member.calls.pop(number, None)
        if number not in self._futures:
            return
        future = self._futures[number]
        if future is not None and future.done():
            if not self._spent:
                asyncio.get_running_loop().call_later(_RELEASE_AFTER, self._spent.clear)
            self._spent.append(future)
        self._drop([number])
        self._events.ended(number, outcome)

    def _drop(self, numbers: Sequence[int]) -> None:
        """Let go of calls' results; what has not ended is not to run any more."""
        futures = [self._futures.pop(number, None) for number in numbers]
        for number in numbers:
            self._waiting.pop(number, None)
        dropped = [future for future in futures if future is not None and not future.done()]
        if dropped and self._client is not None:
            self._spawn(self._client.cancel(dropped, force=True))

    async def _stop(self, number: int) -> bool:
        if number in self._waiting:
            self._end(number, Unbegun())
            return True
        if self._watch is None or self._watch.is_silent:
            return False
        member = next((member for member in self._members.values() if number in member.calls), None)
        if member is None or self._client is None or not member.has_nanny:
            return False
        begun = list(member.calls)[: member.threads]
        if number not in begun:
            self._end(number, Unbegun())
            return True
        processing = (await self._client.processing([member.address])).get(member.address, ())
        others = [key for key in processing if key not in {self._key(mine) for mine in member.calls}]
        if others or begun != [number]:
            return False
        await self._client.run(kill_worker, workers=[member.address], nanny=True)
        return True

    def _key(self, number: int | str) -> str:
        return f"shpool-{self._pool}-{number}"


def _warn_of_open_network(address: str) -> None:
    if not address.startswith(_PRIVATE) and not is_loopback_host(
        host_of(address if "://" in address else f"//{address}")
    ):
        text = (
            f"the token travels unencrypted to {address} and its workers, and who can connect there can use it; "
            "give the cluster TLS certificates: DaskEngine(address, security=distributed.Security(...))"
        )
        warnings.warn(text, SHUserWarning, stacklevel=2)


async def _connected(address: str, security: Any) -> Client:  # noqa: ANN401 - whatever distributed.Client takes
    client = Client(address, security=security, asynchronous=True, set_as_default=False, timeout=CONNECT_WITHIN)
    try:
        await asyncio.wait_for(client, CONNECT_WITHIN + 1)  # its own limit does not hold for a scheduler that is stuck
    except Exception as exc:
        await _try(client.close(1))
        raise ClusterUnreachableError(address, _words_of(exc)) from exc
    return client


async def _settled(work: Awaitable[object]) -> None:
    """Wait for work whose end nobody waits for."""
    with contextlib.suppress(Exception):
        await work


async def _try(step: Awaitable[object]) -> bool:
    """Take a step towards the end, if it can be taken in time; tell whether it could."""
    try:
        await asyncio.wait_for(step, _LEAVE_WITHIN)
    except Exception as exc:  # noqa: BLE001 - border: the cluster's own code
        logger.debug("the cluster was not left in order: %s", _words_of(exc))
        return False
    return True


def _words_of(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def _processors() -> int:
    from loky import cpu_count

    return int(cpu_count())
