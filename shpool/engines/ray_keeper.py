"""A pool's token on a Ray cluster: the actor that keeps it, and the worker processes' way to it.

1. The driver pushes each posting to the keeper, as a parcel in the argument of a method call. Arguments this small
   travel inside the call, from process to process; only larger ones go to the object store, which spills to disk.
   The actor's constructor gets nothing: Ray keeps what it was given, to build it again.
2. A worker process has an outpost for each pool whose calls it runs, and a thread for each outpost that waits at the
   keeper for the next parcel. So a copy is renewed once for each rotation, and reading it asks nobody.
   What the gate grants an outpost waits there too, for the same thread.
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
import secrets
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import ray
from ray.exceptions import ActorDiedError, RayError

from shpool.board import CLOSED
from shpool.engines.outpost import Outpost, close_outpost, open_outpost, outpost_of
from shpool.engines.parcels import Parcel, TokenCell
from shpool.tokens import Posting, boot_time

if TYPE_CHECKING:
    from collections.abc import Callable

NAMESPACE = "shpool"
_LONGEST_POLL = 5.0  # s a question waits at the keeper for something new
_LONGEST_ANSWER = 15.0  # s until a question is taken for lost
_FAREWELL = 1.0  # s that outposts get to wipe their tokens; those of killed workers never say so
_PAUSE = 0.2  # s before a lost question is asked again
_MOST_NOTES = 64  # that wait for an outpost; older ones are of no use any more
_FORGOTTEN = 15.0  # s after which an outpost that does not ask is gone, as nothing tells


class News(NamedTuple):
    """Something a worker has told the keeper.

    Attributes:
        serial: Number of the news, from 1.
        kind: The name of one of ``Events``' methods.
        values: Its arguments.
    """

    serial: int
    kind: str
    values: tuple[Any, ...]


@dataclass(eq=False)
class _Box:
    """What the gate has for an outpost.

    Attributes:
        notes: The driver's, not fetched yet.
        polled: When the outpost last asked, by ``time.monotonic``.
        change: There is something to fetch, here or for all.
    """

    notes: deque[bytes] = field(default_factory=lambda: deque(maxlen=_MOST_NOTES))
    polled: float = field(default_factory=time.monotonic)
    change: asyncio.Condition = field(default_factory=asyncio.Condition)


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
        self._boxes: dict[str, _Box] = {}
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
        await self._wake_all()

    async def post(self, outpost: str | None, note: bytes) -> None:
        """Keep a note for an outpost, or for all there are, until it is fetched."""
        boxes = self._boxes.values() if outpost is None else filter(None, [self._boxes.get(outpost)])
        for box in list(boxes):
            box.notes.append(note)
            await _wake(box.change)

    async def news(self, seen: int) -> list[News]:
        """Wait a while for news later than the number ``seen``; return them all."""
        self._news = [news for news in self._news if news.serial > seen]
        for outpost, box in list(self._boxes.items()):
            if box.polled < time.monotonic() - _FORGOTTEN:
                del self._boxes[outpost]
                await self._add("left", outpost)
        await _wait(self._told, lambda: self._is_closed or self._news)
        return self._news

    async def close(self) -> None:
        """Send the outposts home, and wait a moment until they have gone; nothing waits here any more then."""
        self._cell.close()
        self._is_closed = True
        await self._wake_all()
        await _wake(self._told)
        await _wait(self._told, lambda: not self._outposts, _FAREWELL)

    # For the workers

    async def enrol(self, outpost: str, asked: float) -> tuple[bytes | None, Parcel | None]:
        """Return the set-up, None while the driver has not begun, and the newest parcel, None while there is none."""
        await _wait(self._posted, lambda: self._setup is not None)
        if self._setup is not None:
            self._outposts += 1
            await self._box(outpost)
        return self._setup, self._parcel(0, asked)

    async def newer(self, outpost: str, than: int, asked: float) -> tuple[Parcel | None, list[bytes]]:
        """Wait a while for a later parcel than number ``than``, or notes; return what there is.

        Args:
            outpost: Who asks.
            than: The number of the parcel the worker has.
            asked: The worker's boot clock when it asked.
        """
        box = await self._box(outpost)
        await _wait(box.change, lambda: self._is_closed or box.notes or self._cell.version_word[0] > than)
        notes = list(box.notes)
        box.notes.clear()
        box.polled = time.monotonic()
        return self._parcel(than, asked), notes

    async def leave(self, outpost: str) -> None:
        """Take note that an outpost has wiped its token."""
        self._outposts -= 1
        self._boxes.pop(outpost, None)
        await _wake(self._told)

    async def asked(self, outpost: str, note: bytes) -> None:
        """Pass on what an outpost asks the gate."""
        await self._add("asked", outpost, note)

    async def refused(self, generation: int) -> None:
        """Pass on that a server has refused the token."""
        await self._add("refused", generation)

    async def begun(self, number: int) -> None:
        """Pass on that a call has begun."""
        await self._add("begun", number)

    async def _box(self, outpost: str) -> _Box:
        """Return an outpost's box; one that is new, or that a keeper before this one had, is told of."""
        if outpost not in self._boxes:
            self._boxes[outpost] = _Box()
            await self._add("joined", outpost)
        box = self._boxes[outpost]
        box.polled = time.monotonic()
        return box

    async def _wake_all(self) -> None:
        await _wake(self._posted)
        for box in list(self._boxes.values()):
            await _wake(box.change)

    async def _add(self, kind: str, *values: Any) -> None:  # noqa: ANN401 - as of ``Events``' methods
        self._serial += 1
        self._news.append(News(self._serial, kind, values))
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
    name = secrets.token_hex(8)
    setup: bytes | None = None
    parcel: Parcel | None = None
    while setup is None:
        setup, parcel = ray.get(keeper.enrol.remote(name, boot_time()))
    cell = TokenCell()
    if parcel is not None and parcel.number != CLOSED:
        cell.take(parcel)
    report, ask = functools.partial(_tell, pool, "refused"), functools.partial(_tell, pool, "asked", name)
    outpost = open_outpost(Outpost(pool, setup, cell, report, ask))
    _keepers[pool] = keeper
    threading.Thread(target=_follow, args=(outpost, keeper, name), name="shpool-follow", daemon=True).start()
    return outpost


def _tell(pool: str, kind: str, *values: object) -> None:
    """Tell the keeper something, without waiting for it."""
    keeper = _keepers.get(pool)
    if keeper is not None:  # else the pool has ended
        getattr(keeper, kind).remote(*values)


def _follow(outpost: Outpost, keeper: Any, name: str) -> None:  # noqa: ANN401 - Ray's handle of an actor
    """Hand on each parcel and what the gate grants, until the pool has ended or the keeper is gone for good."""
    pool, cell = outpost.pool, outpost.cell
    while True:
        try:
            # The future of it: ray.get() would tell Ray that the task waits and its processor is free for another.
            question = keeper.newer.remote(name, cell.version_word[0], boot_time())
            parcel, notes = question.future().result(_LONGEST_ANSWER)
        except ActorDiedError:
            time.sleep(max(0.0, _deadline_of(cell.read()[1]) - boot_time()))
            _withdraw(pool)
            return
        except (RayError, concurrent.futures.TimeoutError):
            time.sleep(_PAUSE)
            continue
        if parcel is not None and parcel.number == CLOSED:
            _withdraw(pool)
            keeper.leave.remote(name)
            return
        if parcel is not None:
            cell.take(parcel)
        for note in notes:
            outpost.take_grant(note)


def _withdraw(pool: str) -> None:
    _keepers.pop(pool, None)
    close_outpost(pool)


def _deadline_of(payload: bytes) -> float:
    """Return until when a posting's token lives, by this host's boot clock; 0 without one."""
    token = Posting.from_bytes(payload).token if payload else None
    return 0.0 if token is None else token.deadline


_keepers: dict[str, Any] = {}  # by pool, in a worker process
