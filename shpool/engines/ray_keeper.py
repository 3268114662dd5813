"""A pool's token on a Ray cluster: the actor that keeps it, and the worker processes' way to it.

1. The driver pushes each posting to the keeper, as a parcel in the argument of a method call. Arguments this small
   travel inside the call, from process to process; only larger ones go to the object store, which spills to disk.
   The actor's constructor gets nothing: Ray keeps what it was given, to build it again.
2. A worker process has an outpost for each pool whose calls it runs, and a thread for each outpost that waits at the
   keeper for the next parcel. So a copy is renewed once for each rotation, and reading it asks nobody.
3. What workers have to tell, the driver fetches in the same way: it waits at the keeper for what it has not seen.
4. A keeper that was lost with its process is built again by Ray, and empty: calls wait until the driver has begun it.
5. A keeper is gone for good when the pool has ended without saying so: then the driver is gone. Outposts serve their
   token until it expires, and close.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import pickle
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import ray
from ray.exceptions import ActorDiedError, RayError

from shpool.board import CLOSED
from shpool.engines.outpost import Outpost, Parcel, TokenCell, close_outpost, open_outpost, outpost_of
from shpool.tokens import Posting, boot_time

if TYPE_CHECKING:
    from collections.abc import Callable

NAMESPACE = "shpool"
_LONGEST_POLL = 5.0  # s a question waits at the keeper for something new
_LONGEST_ANSWER = 15.0  # s until a question is taken for lost
_FAREWELL = 1.0  # s that outposts get to wipe their tokens; those of killed workers never say so
_PAUSE = 0.2  # s before a lost question is asked again


class News(NamedTuple):
    """Something a worker has told the keeper.

    Attributes:
        serial: Number of the news, from 1.
        kind: ``refused`` or ``begun``.
        value: The generation, or the call's number.
    """

    serial: int
    kind: str
    value: int


def keeper_name(pool: str) -> str:
    """Return the name of a pool's keeper, in ``NAMESPACE``."""
    return f"shpool-{pool}"


class Keeper:
    """Keep a pool's token and set-up for its workers; an actor, all of whose methods run in one event loop."""

    def __init__(self) -> None:
        self._cell = TokenCell()
        self._setup: bytes | None = None
        self._is_closed = False
        self._outposts = 0
        self._serial = 0
        self._news: list[News] = []
        self._posted = asyncio.Condition()  # there is something for the workers
        self._told = asyncio.Condition()  # there is something for the driver

    # For the driver

    async def begin(self, setup: bytes) -> float:
        """Take the outposts' set-up; return this host's boot clock, from before the driver seals its first parcel."""
        self._setup = setup
        await _wake(self._posted)
        return boot_time()

    async def take(self, parcel: Parcel) -> None:
        """Take a posting."""
        self._cell.take(parcel)
        await _wake(self._posted)

    async def news(self, seen: int) -> list[News]:
        """Wait a while for news later than the number ``seen``; return them all."""
        self._news = [news for news in self._news if news.serial > seen]
        await _wait(self._told, lambda: self._is_closed or self._news)
        return self._news

    async def close(self) -> None:
        """Send the outposts home, and wait a moment until they have gone; nothing waits here any more then."""
        self._cell.close()
        self._is_closed = True
        await _wake(self._posted)
        await _wake(self._told)
        await _wait(self._told, lambda: not self._outposts, _FAREWELL)

    # For the workers

    async def enrol(self, asked: float) -> tuple[bytes | None, Parcel | None]:
        """Return the set-up, None while the driver has not begun, and the newest parcel, None while there is none."""
        await _wait(self._posted, lambda: self._setup is not None)
        self._outposts += self._setup is not None
        return self._setup, self._parcel(0, asked)

    async def newer(self, than: int, asked: float) -> Parcel | None:
        """Wait a while for a later parcel than number ``than``; None if none came.

        Args:
            than: The number of the parcel the worker has.
            asked: The worker's boot clock when it asked.
        """
        await _wait(self._posted, lambda: self._is_closed or self._cell.version_word[0] > than)
        return self._parcel(than, asked)

    async def leave(self) -> None:
        """Take note that an outpost has wiped its token."""
        self._outposts -= 1
        await _wake(self._told)

    async def refused(self, generation: int) -> None:
        """Pass on that a server has refused the token."""
        await self._add("refused", generation)

    async def begun(self, number: int) -> None:
        """Pass on that a call has begun."""
        await self._add("begun", number)

    async def _add(self, kind: str, value: int) -> None:
        self._serial += 1
        self._news.append(News(self._serial, kind, value))
        await _wake(self._told)

    def _parcel(self, than: int, asked: float) -> Parcel | None:
        if self._is_closed:
            return Parcel(CLOSED, b"", 0.0, 0.0)
        number, payload = self._cell.read()
        if number <= than:
            return None
        now = boot_time()
        return Parcel(number, payload, _deadline_of(payload) - now, now, asked)


async def _wake(change: asyncio.Condition) -> None:
    async with change:
        change.notify_all()


async def _wait(change: asyncio.Condition, is_true: Callable[[], object], seconds: float = _LONGEST_POLL) -> None:
    """Return once a condition holds, or the time is over."""
    async with change:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(change.wait_for(lambda: bool(is_true())), seconds)


def run_call(sealed: bytes) -> bytes:
    """Run a pickled ``Call`` in the outpost of its pool; the one function that Ray knows of."""
    call = pickle.loads(sealed)
    outpost = outpost_of(call.pool) or _settle(call.pool)
    return outpost.run(call, functools.partial(_tell, call.pool, "begun"))


def _settle(pool: str) -> Outpost:
    """Open the pool's outpost in this process, and a thread that keeps its token fresh."""
    keeper = ray.get_actor(keeper_name(pool), namespace=NAMESPACE)
    setup: bytes | None = None
    parcel: Parcel | None = None
    while setup is None:
        setup, parcel = ray.get(keeper.enrol.remote(boot_time()))
    cell = TokenCell()
    if parcel is not None and parcel.number != CLOSED:
        cell.take(parcel)
    outpost = open_outpost(Outpost(pool, setup, cell, functools.partial(_tell, pool, "refused")))
    _keepers[pool] = keeper
    threading.Thread(target=_follow, args=(pool, keeper, cell), name="shpool-follow", daemon=True).start()
    return outpost


def _tell(pool: str, kind: str, value: int) -> None:
    """Tell the keeper something, without waiting for it."""
    keeper = _keepers.get(pool)
    if keeper is not None:  # else the pool has ended
        getattr(keeper, kind).remote(value)


def _follow(pool: str, keeper: Any, cell: TokenCell) -> None:  # noqa: ANN401 - Ray's handle of an actor
    """Put each parcel into the cell, until the pool has ended or the keeper is gone for good; runs in a thread."""
    while True:
        try:
            # The future of it: ray.get() would tell Ray that the task waits and its processor is free for another.
            question = keeper.newer.remote(cell.version_word[0], boot_time())
            parcel = question.future().result(_LONGEST_ANSWER)
        except ActorDiedError:
            time.sleep(max(0.0, _deadline_of(cell.read()[1]) - boot_time()))
            _withdraw(pool)
            return
        except (RayError, concurrent.futures.TimeoutError):
            time.sleep(_PAUSE)
            continue
        if parcel is not None and parcel.number == CLOSED:
            _withdraw(pool)
            keeper.leave.remote()
            return
        if parcel is not None:
            cell.take(parcel)


def _withdraw(pool: str) -> None:
    _keepers.pop(pool, None)
    close_outpost(pool)


def _deadline_of(payload: bytes) -> float:
    """Return until when a posting's token lives, by this host's boot clock; 0 without one."""
    token = Posting.from_bytes(payload).token if payload else None
    return 0.0 if token is None else token.deadline


_keepers: dict[str, Any] = {}  # by pool, in a worker process
