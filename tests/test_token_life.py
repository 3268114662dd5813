"""The token's life in a pool: short lives, outages, refusals and reports, against a real server."""

from __future__ import annotations

import threading
import time

import pytest
from patience import NEVER, PATIENCE, in_time, until
from pool_tasks import report_refused
from stress_soak import outage, session_of, soak

from shpool import AuthenticatedProcessPool, OAuthSession, current_session
from shpool.errors import LoginRefusedError, TokenUnavailableError
from shpool.testing import LoopbackServer

pytestmark = pytest.mark.slow


def text_of_token() -> str:
    return current_session().token.access_token


def report_often(times: int) -> int:
    """Be a hostile worker: report each generation as refused, again and again."""
    session = current_session()
    for _ in range(times):
        session.report_refused(session.token.generation)
        time.sleep(0.001)
    return session.token.generation


def shorten_life(server: LoopbackServer, pool: AuthenticatedProcessPool, lifetime: float) -> None:
    """Have the first token replaced by one that lives so long; the first may not expire before it arrives."""
    server.lifetime = lifetime
    pool.submit(report_refused, 1).result(PATIENCE)
    until(lambda: pool.stats().generation > 1)


def test_workers_that_ask_without_pause_never_meet_an_expired_token() -> None:
    tally = soak(4, lifetime=1.0, workers=3)
    assert tally.tasks == 60
    assert tally.failed == 0
    # A refresh takes place after 85 % of a lifetime at the earliest; on a report, which a machine that stalls amid a
    # request may cause, once in 5 s. Beyond these: the two logins of the start, one ahead, and one that came too late.
    assert tally.logins <= tally.seconds / 0.85 + tally.seconds / 5 + 4


@pytest.mark.parametrize("kind", ["503", "refused", "hanging"])
def test_tasks_wait_for_the_end_of_an_outage(kind: str) -> None:
    tally = outage(kind, 2.0, lifetime=1.5, workers=2)
    assert tally.tasks == 70
    assert tally.failed == 0


def test_retry_after_of_a_refused_refresh_is_respected() -> None:
    with LoopbackServer() as server, AuthenticatedProcessPool(session_of(server), 1) as pool:
        first = pool.submit(text_of_token).result()
        server.fail_next(1, 429, retry_after=7)  # s; more than the 5 s between two logins that were asked for
        pool.submit(report_refused, 1).result(PATIENCE)
        until(lambda: pool.stats().login_failures == 1)
        assert "429" in (pool.stats().last_error or "")
        assert pool.submit(text_of_token).result() == first, "the old token serves on"
        until(lambda: pool.stats().refreshes == 1)
        times = [moment for moment, path, _ in server.log if path == "/token"]
        assert times[2] - times[1] >= 7.0
        assert pool.submit(text_of_token).result() != first


def test_a_hostile_worker_causes_one_login() -> None:
    """Forced logins are 5 s apart, so a short storm of reports of ever newer generations costs one."""
    with LoopbackServer() as server, AuthenticatedProcessPool(session_of(server), 2) as pool:
        began = time.monotonic()
        assert list(pool.map(report_often, [300, 300], chunksize=1))
        assert 2 <= server.logins <= 2 + (time.monotonic() - began) / 5


def test_a_final_refusal_of_a_refresh_serves_the_token_to_its_end_and_is_then_raised() -> None:
    with LoopbackServer() as server, AuthenticatedProcessPool(session_of(server), 1) as pool:
        shorten_life(server, pool, 1.5)
        server.answer_always(401, body={"error": "invalid_client"})
        until(lambda: pool.stats().token_state == "refused")
        asked = server.token_requests
        until(lambda: (pool.stats().token_remaining or 0) < 0)
        with pytest.raises(TokenUnavailableError, match="invalid_client"):
            pool.submit(text_of_token)
        assert server.token_requests == asked, "no attempt after a final refusal"
        assert "refused" in repr(pool)
        assert "invalid_client" in repr(pool)


def test_a_refused_first_login_is_raised_on_entering() -> None:
    with LoopbackServer() as server:
        server.answer_always(401, body={"error": "invalid_client"})
        with pytest.raises(LoginRefusedError, match="SH_CLIENT_SECRET"), AuthenticatedProcessPool(session_of(server)):
            pytest.fail("entered")


def test_leaving_does_not_wait_for_a_token_endpoint_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shpool.sharing.ATTEMPT_WITHIN", NEVER)
    with LoopbackServer() as server:
        session = OAuthSession(server.token_url, server.client_id, server.client_secret, timeout=(NEVER, NEVER))
        with AuthenticatedProcessPool(session, 1) as pool:
            shorten_life(server, pool, 1.0)
            server.hang()
            until(lambda: pool.stats().token_state == "expired")
            until(lambda: any(thread.name == "shpool-login" for thread in threading.enumerate()))
            try:
                in_time(pool.__exit__, None, None, None)
            finally:
                server.hang(False)
