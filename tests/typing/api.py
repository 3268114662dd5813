"""What type checkers must see in the public names; read by mypy, run by nobody.

Each ``type: ignore`` marks a mistake that must be reported: an unused one is an error itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, Future
from typing import TYPE_CHECKING, Any

from typing_extensions import assert_type

from shpool import (
    AuthenticatedProcessPool,
    Gate,
    OAuthSession,
    SentinelHubSession,
    SessionSharing,
    SessionSharingThread,
    SharedSession,
    SHConfig,
    collect_shared_session,
    current_session,
)
from shpool.gate import AccountGate, GateStats, Ticket
from shpool.pool import PoolStats, PoolView
from shpool.tokens import Token

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Mapping


def area(width: int, height: float = 1.0, *, scale: str = "m") -> float:
    """Be a task."""
    return width * height * len(scale)


def sessions() -> None:
    """Check what the sessions take and give."""
    session = OAuthSession("https://login.invalid/token", "id", "invented-secret", scope=["read"], client_auth="basic")
    assert_type(session.token, dict[str, Any])
    assert_type(session.session_headers, dict[str, str])
    assert_type(session.info(), dict[str, Any])
    assert_type(OAuthSession.from_token({"access_token": "a", "expires_at": 1.0}), OAuthSession)
    assert_type(SentinelHubSession.from_token({"access_token": "a", "expires_at": 1.0}), SentinelHubSession)
    SentinelHubSession(SHConfig("profile"), refresh_before_expiry=None)
    OAuthSession("https://login.invalid/token", "id", "invented-secret", client_auth="digest")  # type: ignore[arg-type]  # no such way
    OAuthSession("https://login.invalid/token", "id", "invented-secret", "read")  # type: ignore[call-arg]  # scope is keyword-only


def pools(session: OAuthSession) -> None:
    """Check that calls through the pool are checked as the calls themselves."""
    with AuthenticatedProcessPool(session, max_workers=4, retries=1, timeout=60.0) as pool:
        assert_type(pool, AuthenticatedProcessPool)
        executor: Executor = pool
        assert_type(pool.submit(area, 3, height=2.0, scale="km"), Future[float])
        assert_type(pool.submit(lambda: "text"), Future[str])
        pool.submit(area, "3")  # type: ignore[arg-type]  # width is a number
        pool.submit(area, 3, size=1)  # type: ignore[call-arg]  # no such argument
        pool.submit(area)  # type: ignore[call-arg]  # width is missing
        assert_type(pool.map(area, [1, 2], chunksize=10, timeout=None), Iterator[float])
        assert_type(pool.map_unordered(area, range(3), [1.0], buffersize=5), Iterator[float])
        pool.map(area, [1], chunk_size=3)  # type: ignore[call-arg]  # a misspelt setting
        assert_type(pool.stats(), PoolStats)
        assert_type(pool.stats().token_remaining, float | None)
        pool.shutdown(wait=False, cancel_futures=True)
        pool.terminate()
        del executor


def settings(session: OAuthSession, tokens: Mapping[str, Any]) -> None:
    """Check what a pool is made of."""
    AuthenticatedProcessPool(lambda: tokens)
    AuthenticatedProcessPool(session, 2, engine="inline", memory_name="name", env={"OMP_NUM_THREADS": "1"})
    AuthenticatedProcessPool(session, initializer=print, initargs=("hello",))
    AuthenticatedProcessPool("token")  # type: ignore[arg-type]  # a text logs in nowhere
    AuthenticatedProcessPool(session, "4")  # type: ignore[arg-type]  # a number
    AuthenticatedProcessPool(session, 4, "inline")  # type: ignore[call-arg]  # engine is keyword-only
    AuthenticatedProcessPool()  # type: ignore[call-arg]  # it needs a session


def gates(session: OAuthSession) -> None:
    """Check the account's limits."""
    gate = Gate(requests="300/min", units="300/min", connections=4, burst=2, name="account")
    assert_type(Gate.preset("cdse", connections=2), Gate)
    AuthenticatedProcessPool(session, gate=gate)
    pool = AuthenticatedProcessPool(session, gate="sentinelhub")
    assert_type(pool.stats().gate, GateStats)
    assert_type(pool.stats().gate.learned, float | None)
    assert_type(current_session().gate, AccountGate)
    with current_session().gate.acquire(cost=2) as ticket:
        assert_type(ticket, Ticket)
        ticket.settle(1.5)
    assert_type(gate.try_acquire().due_in(), float)
    Gate(requests=5)  # type: ignore[arg-type]  # a number of what time?
    AuthenticatedProcessPool(session, gate=5)  # type: ignore[arg-type]  # no gate


def views(pool: AuthenticatedProcessPool) -> None:
    """Check that a view has the pool's types."""
    view = pool.options(retries=3, timeout=1.5)
    assert_type(view, PoolView)
    assert_type(view.submit(area, 3), Future[float])
    assert_type(view.map(area, [1]), Iterator[float])
    view.submit(area, "3")  # type: ignore[arg-type]  # width is a number


async def event_loops(pool: AuthenticatedProcessPool, loop: asyncio.AbstractEventLoop) -> None:
    """Check that event loops take the pool for an executor."""
    assert_type(await loop.run_in_executor(pool, area, 3), float)


def workers() -> None:
    """Check what a worker sees."""
    session = current_session()
    assert_type(session, SharedSession)
    assert_type(session.token, Token)
    assert_type(session.token["access_token"], Any)
    assert_type(session.session_headers, dict[str, str])
    assert_type(collect_shared_session(), SharedSession)
    assert_type(collect_shared_session("name"), SharedSession)
    session.token = "text"  # type: ignore[misc,assignment]  # read-only


def sharing(session: OAuthSession) -> None:
    """Check sharing without a pool."""
    with SessionSharing(session, memory_name="name") as running:
        assert_type(running, SessionSharing)
    thread = SessionSharingThread(session, "name", daemon=True)
    thread.start()
    thread.join(timeout=5.0)
