"""Tasks on a Ray cluster: each is one call of one remote function, and a named actor brings the token."""

from __future__ import annotations

import concurrent.futures
import functools
import logging
import os
import pickle
import threading
import time
import warnings
from typing import TYPE_CHECKING, Any

import ray
from ray import exceptions

from shpool.engines.cluster import Lost
from shpool.engines.ray_answers import Answers
from shpool.engines.ray_head import Errand, Watch
from shpool.engines.ray_keeper import NAMESPACE, Keeper, keeper_name, run_call
from shpool.engines.ray_link import LINK
from shpool.errors import ClusterError, ClusterUnreachableError, SHUserWarning, TokenTooLargeError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shpool.engines.cluster import Events
    from shpool.engines.parcels import Parcel
    from shpool.engines.ray import RayEngine
    from shpool.engines.sealed import Call

logger = logging.getLogger(__name__)

_LARGEST_PARCEL = 64 * 1024  # bytes of a posting: a board's limit, and below the 100 kB from which Ray stores objects
_MOST_POLLS = 100_000  # questions that may wait at the keeper at once, one from each worker process and one of ours
_LONGEST_FAREWELL = 5.0  # s that the keeper gets to send the outposts home
_SHORT_FAREWELL = 1.0  # s that it gets where the cluster's head does not answer
_LONGEST_OPENING = 9.0  # s to send for the keeper, or for the first call; a tenth is usual
_SILENCE = f"it has not answered in {_LONGEST_OPENING:.0f} s"
_PAUSE = 0.2  # s before a keeper that does not answer is asked again
_LOOK = 1.0  # s between two looks whether this process is connected
_LOSSES = (
    exceptions.WorkerCrashedError,
    exceptions.OutOfMemoryError,
    exceptions.NodeDiedError,
    exceptions.LocalRayletDiedError,
    exceptions.ObjectLostError,  # its node is gone, and with it an answer that was too large to travel at once
)


class RayCluster:
    """What an engine needs of Ray; see ``Cluster``.

    Args:
        engine: Where it is.
        workers: How many processors a Ray of our own gets; None for those of this machine.
        max_calls: Calls after which a worker process is replaced; None for no limit.
        blanked: Returns the environment variables that the processes of a Ray of our own must not inherit.
    """

    tells_begin = True

    def __init__(
        self, engine: RayEngine, workers: int | None, max_calls: int | None, blanked: Callable[[], Sequence[str]]
    ) -> None:
        self._engine = engine
        self._workers = workers
        self._max_calls = max_calls or 0  # Ray's word for no limit
        self._blanked = blanked
        self._watch = Watch(engine.num_cpus)
        self._is_linked = False
        self._has_launched = False
        self._is_closing = threading.Event()
        self._listener = threading.Thread(target=self._listen, name="shpool-ray", daemon=True)
        self._answers = Answers(self._take_end)
        self._lock = threading.Lock()  # guards the three below
        self._refs: dict[int, Any] = {}  # Ray's references to the answers of calls under way
        self._parcel: Parcel | None = None
        self._asked: float | None = None  # the keeper's boot clock when it was begun; None while it is not

    def open(self, pool: str, setup: bytes, events: Events) -> None:
        """Connect, and send for a keeper.

        Raises:
            ClusterError: There is no cluster, or it cannot be reached within 10 s.
        """
        LINK.take(self._engine.address, self._workers, self._blanked)
        settling = Errand("shpool-ray-open", functools.partial(self._settle, pool, setup, events))
        try:
            _outcome_of(settling, self._engine.address or "ray")
        except BaseException:
            LINK.give_back(is_answering=not settling.is_alive())
            raise
        self._is_linked = True
        self._answers.start()
        self._listener.start()
        self._watch.start(events.changed, events.failed)

    def _settle(self, pool: str, setup: bytes, events: Events) -> None:
        self._setup, self._events = setup, events
        self._watch.look()
        _warn_of_eavesdroppers(ray.nodes())
        keeper = ray.remote(num_cpus=0, max_restarts=-1, max_concurrency=_MOST_POLLS)(Keeper)
        self._keeper = keeper.options(name=keeper_name(pool), namespace=NAMESPACE).remote()
        cost, calls = self._engine.num_cpus, self._max_calls
        self._run = ray.remote(name="shpool", num_cpus=cost, max_retries=0, max_calls=calls)(run_call)

    @property
    def capacity(self) -> int:
        """How many calls can run at once, as of a few seconds ago."""
        return self._watch.capacity

    def launch(self, calls: Sequence[Call]) -> None:
        """Send calls to run."""
        if not ray.is_initialized():  # else Ray would start a cluster of its own, unasked
            self._events.failed(_disconnected())
            return
        if not self._has_launched:
            # With its first call a function goes to the head, and Ray would wait for that without end.
            launching = Errand("shpool-ray-launch", functools.partial(self._remote, calls))
            numbers = _outcome_of(launching, self._engine.address or "ray")
            self._has_launched = True
        else:
            numbers = self._remote(calls)
        with self._lock:
            self._refs.update((number, ref) for ref, number in numbers.items())
        self._answers.expect(numbers)

    def _remote(self, calls: Sequence[Call]) -> dict[Any, int]:
        # Bytes, as all else goes through a pickler in Python.
        return {self._run.remote(pickle.dumps(call, protocol=5)): call.number for call in calls}

    def cancel(self, numbers: Sequence[int]) -> None:
        """Drop calls, and stop those that run."""
        for number in numbers:
            self.stop(number)

    def stop(self, number: int) -> bool:
        """End the worker process that runs a call: it runs no other."""
        with self._lock:
            ref = self._refs.get(number)
        if ref is not None and ray.is_initialized():
            ray.cancel(ref, force=True)
        return True

    def push(self, parcel: Parcel) -> None:
        """Send a parcel to the keeper; it fetches what was pushed before it has begun.

        Raises:
            TokenTooLargeError: So large that Ray would store it.
        """
        if len(parcel.payload) > _LARGEST_PARCEL:
            raise TokenTooLargeError(len(parcel.payload), _LARGEST_PARCEL)
        with self._lock:
            self._parcel = parcel
            if self._asked is not None and not self._is_closing.is_set():
                self._keeper.take.remote(parcel.resealed(self._asked))

    def post(self, outpost: str | None, note: bytes) -> None:
        """Leave what the gate grants at the keeper."""
        with self._lock:
            if self._asked is not None and not self._is_closing.is_set() and ray.is_initialized():
                self._keeper.post.remote(outpost, note)

    def close(self) -> None:
        """Send the outposts home, end the keeper, and disconnect if nobody else here is connected."""
        if not self._is_linked:
            return
        self._is_linked = False
        self._is_closing.set()
        with self._lock:
            self._parcel = None
        is_answering = self._watch.close()
        seconds = _LONGEST_FAREWELL if is_answering else _SHORT_FAREWELL
        try:
            self._answers.close(seconds)
            self._end_keeper(seconds)
        finally:
            LINK.give_back(is_answering=is_answering)

    def _end_keeper(self, seconds: float) -> None:
        if ray.is_initialized():
            try:
                ray.get(self._keeper.close.remote(), timeout=seconds)
            except exceptions.RayError as exc:
                logger.warning("workers on Ray may not have wiped their tokens: %s", exc)
            self._listener.join(seconds)  # its question has been answered, or it asks no more
            Errand("shpool-ray-kill", functools.partial(ray.kill, self._keeper)).has_ended(seconds)
        del self._keeper  # an actor's handle that outlives the connection keeps a socket open for good

    # What follows runs in threads of Ray's, of the answers', and in the listener's.

    def _take_end(self, number: int, outcome: bytes | BaseException) -> None:
        """Tell the engine of a call's end."""
        with self._lock:
            self._refs.pop(number, None)
        if isinstance(outcome, exceptions.TaskCancelledError):
            outcome = Lost()
        elif isinstance(outcome, _LOSSES):
            self._events.lost_worker(0, type(outcome).__name__)
            outcome = Lost()
        self._events.ended(number, outcome)

    def _listen(self) -> None:
        """Begin the keeper, and again whenever Ray has built it anew; fetch its news."""
        while (error := self._talk_while_it_answers()) is not None and not self._is_closing.is_set():
            if not ray.is_initialized():
                error = _disconnected()
            if isinstance(error, exceptions.ActorDiedError):
                error = ClusterError("ray", f"the actor that keeps the token has died: {error}")
            if isinstance(error, ClusterError):
                self._events.failed(error)
                return
            with self._lock:
                self._asked = None
            logger.info("the actor that keeps the token does not answer and is begun anew: %s", error)
            time.sleep(_PAUSE)

    def _talk_while_it_answers(self) -> Exception | None:
        """Return why the keeper does not answer; None if the pool is closing."""
        try:
            self._begin_keeper(self._answer_to(self._keeper.begin.remote(self._setup)))
            self._pass_on_news()
        except (exceptions.RayError, ClusterError) as exc:
            return exc
        return None

    def _begin_keeper(self, asked: float) -> None:
        with self._lock:
            self._asked = asked
            if self._parcel is not None:
                self._keeper.take.remote(self._parcel.resealed(asked))

    def _pass_on_news(self) -> None:
        seen = 0
        while not self._is_closing.is_set():
            for news in self._answer_to(self._keeper.news.remote(seen)):
                seen = news.serial
                getattr(self._events, news.kind)(*news.values)

    def _answer_to(self, question: Any) -> Any:  # noqa: ANN401 - an actor's methods return anything
        """Wait for an actor's answer; ``ray.get`` would wait for ever once another thread has called ``ray.shutdown``.

        Raises:
            ClusterError: One has, or the pool is closing.
            RayError: The actor does not answer.
        """
        future = question.future()
        while not concurrent.futures.wait([future], _LOOK).done:
            if not ray.is_initialized() or self._is_closing.is_set():
                raise _disconnected()
        return future.result()


def _outcome_of(errand: Errand, where: str) -> Any:  # noqa: ANN401 - whatever the errand is
    if not errand.has_ended(_LONGEST_OPENING):
        raise ClusterUnreachableError(where, _SILENCE)
    return errand.outcome.result()


def _disconnected() -> ClusterError:
    where, reason = "ray", "this process has called ray.shutdown()"
    return ClusterError(where, reason)


def _warn_of_eavesdroppers(nodes: Sequence[dict[str, Any]]) -> None:
    hosts = {node.get("NodeManagerAddress") for node in nodes if node.get("Alive")}
    if len(hosts) > 1 and os.environ.get("RAY_USE_TLS", "0") != "1":
        text = "the token travels unencrypted between the nodes of this Ray cluster; set up TLS there (RAY_USE_TLS=1)"
        warnings.warn(text, SHUserWarning, stacklevel=2)
