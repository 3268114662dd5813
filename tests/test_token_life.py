"""The token's life in a pool: short lives, outages, refusals and reports, against a real server."""

from __future__ import annotations

import time

import pytest
from stress_soak import outage, session_of, soak

from shpool import AuthenticatedProcessPool, current_session
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


def wait_until(condition: object, seconds: float = 10.0) -> None:
    give_up = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]  # a function without arguments
        assert time.monotonic() < give_up
        time.sleep(0.01)


def test_workers_that_ask_without_pause_never_meet_an_expired_token() -> None:
    tally = soak(4, lifetime=1.0, workers=3)
    assert tally.tasks == 60
    assert tally.failed == 0
    assert tally.logins <= tally.seconds / 0.75 + 2


@pytest.mark.parametrize("kind", ["503", "refused", "hanging"])
def test_tasks_wait_for_the_end_of_an_outage(kind: str) -> None:
    tally = outage(kind, 2.0, lifetime=1.5, workers=2)
    assert tally.tasks == 70
    assert tally.failed == 0


def test_retry_after_of_a_refused_refresh_is_respected() -> None:
    with LoopbackServer(lifetime=2.0) as server, AuthenticatedProcessPool(session_of(server), 1) as pool:
        first = pool.submit(text_of_token).result()
        server.fail_next(1, 429, retry_after=2)
        wait_until(lambda: pool.stats().login_failures == 1)
        assert pool.submit(text_of_token).result() == first, "the old token serves on"
        assert "429" in (pool.stats().last_error or "")
        wait_until(lambda: pool.stats().refreshes == 1)
        times = [moment for moment, path, _ in server.log if path == "/token"]
        assert times[2] - times[1] >= 2.0
        assert pool.submit(text_of_token).result() != first


def test_a_hostile_worker_causes_one_login() -> None:
    """Forced logins are 5 s apart, so a short storm of reports of ever newer generations costs one."""
    with LoopbackServer() as server, AuthenticatedProcessPool(session_of(server), 2) as pool:
        assert list(pool.map(report_often, [300, 300], chunksize=1))
        assert server.logins == 2


def test_a_final_refusal_of_a_refresh_serves_the_token_to_its_end_and_is_then_raised() -> None:
    with LoopbackServer(lifetime=1.5) as server, AuthenticatedProcessPool(session_of(server), 1) as pool:
        assert pool.submit(text_of_token).result()
        server.answer_always(401, body={"error": "invalid_client"})
        wait_until(lambda: pool.stats().token_state == "refused")
        asked = server.token_requests
        wait_until(lambda: (pool.stats().token_remaining or 0) < 0)
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


def test_leaving_takes_no_longer_because_the_token_endpoint_hangs() -> None:
    with LoopbackServer(lifetime=1.0) as server:
        with AuthenticatedProcessPool(session_of(server), 1) as pool:
            assert pool.submit(text_of_token).result()
            server.hang()
            wait_until(lambda: pool.stats().token_state == "expired")
            began = time.monotonic()
        assert time.monotonic() - began < 5
        server.hang(False)
