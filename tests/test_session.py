"""Sessions against a real authorization server and one that misbehaves on demand; secrets stay unseen throughout."""

from __future__ import annotations

import contextlib
import gzip
import io
import logging
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, quote_plus

import cloudpickle
import pytest
import requests
from patience import NEVER, PATIENCE, in_time, until

from shpool.config import SHConfig
from shpool.errors import (
    LoginError,
    LoginRefusedError,
    OpaqueTokenError,
    ShpoolError,
    SHUserWarning,
    TokenResponseError,
)
from shpool.redaction import Secret
from shpool.renewal import LONGEST_WAIT
from shpool.session import OAuthSession, SentinelHubSession
from shpool.testing import FakeClock, LoopbackServer
from shpool.tokens import decode_claims

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from authlib_fixture import AuthlibServer

    from shpool.endpoint import ClientAuth
    from shpool.tokens import Instant

_CANARY = "canary-secret-5583"


def session_for(server: LoopbackServer | AuthlibServer, **options: Any) -> OAuthSession:
    options = {"client_id": server.client_id, "client_secret": server.client_secret, "retry_delay": 0.01, **options}
    return OAuthSession(server.token_url, **options)


@pytest.fixture
def fake() -> Iterator[tuple[LoopbackServer, FakeClock]]:
    """Run a server and give it and its sessions one clock that moves when told."""
    clock = FakeClock()
    with LoopbackServer(lifetime=600, clock=clock) as server:
        yield server, clock


# Logging in


@pytest.mark.slow
@pytest.mark.parametrize("client_auth", ["post", "basic"])
def test_token_opens_the_data_of_a_real_server(authlib_server: AuthlibServer, client_auth: ClientAuth) -> None:
    """Authlib takes the credentials either way, and its resource protector takes the token."""
    before = authlib_server.stats()
    session = session_for(authlib_server, client_auth=client_auth, scope="tiles")
    answer = requests.get(authlib_server.data_url(12), headers=session.session_headers, timeout=PATIENCE)
    assert answer.json() == {"number": 12, "square": 144}
    assert session.token["scope"] == "tiles"
    assert authlib_server.stats()["logins"] - before["logins"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [{"client_id": "nobody"}, {"client_secret": "wrong"}])
def test_real_server_refuses_wrong_credentials_for_good(authlib_server: AuthlibServer, wrong: dict[str, str]) -> None:
    session = session_for(authlib_server, **wrong)
    with pytest.raises(LoginRefusedError, match="check the client id and secret") as caught:
        _ = session.token
    assert caught.value.code == "invalid_client"
    assert caught.value.client_id == session.client_id


@pytest.mark.slow
def test_expired_token_is_replaced_at_a_real_server(authlib_server: AuthlibServer, clock: FakeClock) -> None:
    before = authlib_server.stats()
    session = session_for(authlib_server, clock=clock)
    first = session.token
    clock.advance(3601)
    assert session.token["access_token"] != first["access_token"]
    answer = requests.get(authlib_server.data_url(1), headers=session.session_headers, timeout=PATIENCE)
    assert answer.status_code == 200
    assert authlib_server.stats()["logins"] - before["logins"] == 2


def test_nothing_is_asked_before_the_first_read(server: LoopbackServer) -> None:
    session = session_for(server)
    assert server.requests == 0
    assert "no token yet" in repr(session)
    assert session.token["access_token"]
    assert session.token["access_token"]
    assert server.logins == 1


def test_token_is_a_dictionary_of_its_own(server: LoopbackServer) -> None:
    session = session_for(server)
    session.token["access_token"] = "spoilt"
    assert session.token["access_token"] != "spoilt"
    assert session.token["token_type"] == "Bearer"
    assert session.token["expires_at"] == pytest.approx(time.time() + 3600, abs=60)


def test_special_characters_of_credentials_arrive(client_auth_server: Callable[..., LoopbackServer]) -> None:
    server = client_auth_server(client_id="id:with/ö &=", client_secret="se:cret+%20 é&=")
    assert session_for(server).token
    assert session_for(server, client_auth="basic").token


@pytest.fixture
def client_auth_server() -> Iterator[Callable[..., LoopbackServer]]:
    with contextlib.ExitStack() as running:
        yield lambda **options: running.enter_context(LoopbackServer(**options))


def test_scope_and_audience_are_sent() -> None:
    with one_answer(b'{"access_token": "invented", "expires_in": 60}') as seen:
        session = OAuthSession(
            seen.url, "me", "invented-secret", scope=["tiles", "stats"], audience="https://api.example"
        )
        assert session.token
    request = seen.text()
    assert "scope=tiles+stats" in request
    assert "audience=https%3A%2F%2Fapi.example" in request
    assert "grant_type=client_credentials" in request
    assert "User-Agent: shpool" in request


def test_headers_and_claims_come_from_the_token(server: LoopbackServer) -> None:
    session = session_for(server)
    assert session.session_headers == {"Authorization": f"Bearer {session.token['access_token']}"}
    assert session.info() == decode_claims(session.token["access_token"])


def test_claims_of_an_opaque_token_are_a_clear_error(client_auth_server: Callable[..., LoopbackServer]) -> None:
    with pytest.raises(OpaqueTokenError):
        session_for(client_auth_server(jwt=False)).info()


def test_lifetime_counts_from_before_the_request(fake: tuple[LoopbackServer, FakeClock]) -> None:
    """An answer that takes 40 s leaves 560 of 600: the provider's own count began no later than its answer."""
    server, clock = fake
    sent = clock.now()

    class SlowNetwork:
        """Move the clock once the request's start has been noted."""

        asked = 0

        def now(self) -> Instant:
            self.asked += 1
            if self.asked == 2:
                clock.advance(40)
            return clock.now()

    token = session_for(server, clock=SlowNetwork()).renew(None)
    assert token.expires_at == sent.wall + 600


# Refreshing


def test_token_is_refreshed_in_time(fake: tuple[LoopbackServer, FakeClock]) -> None:
    server, clock = fake
    session = session_for(server, clock=clock, refresh_before_expiry=120)
    first = session.token
    clock.advance(479)
    assert session.token == first
    clock.advance(2)
    assert session.token["expires_at"] == clock.now().wall + 600
    assert server.logins == 2


def test_short_token_is_refreshed_at_a_quarter_of_its_life(fake: tuple[LoopbackServer, FakeClock]) -> None:
    """A lifetime below refresh_before_expiry must not mean a login at every read."""
    server, clock = fake
    server.lifetime = 60
    session = session_for(server, clock=clock, refresh_before_expiry=120)
    for _ in range(50):
        _ = session.token
    assert server.logins == 1
    clock.advance(44)
    _ = session.token
    assert server.logins == 1
    clock.advance(2)
    _ = session.token
    assert server.logins == 2


def test_failed_refresh_serves_the_old_token_and_warns(
    fake: tuple[LoopbackServer, FakeClock], caplog: pytest.LogCaptureFixture
) -> None:
    server, clock = fake
    session = session_for(server, clock=clock, retry_delay=5.0)
    first = session.token
    clock.advance(500)
    server.answer_always(503)
    assert session.token == first
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "serves on for 100 s" in caplog.text


def test_failed_refresh_is_not_repeated_at_once(fake: tuple[LoopbackServer, FakeClock]) -> None:
    server, clock = fake
    session = session_for(server, clock=clock, retry_delay=5.0)
    _ = session.token
    clock.advance(500)
    server.answer_always(503)
    for _ in range(20):
        _ = session.token
    assert server.token_requests == 2
    clock.advance(6)
    _ = session.token
    assert server.token_requests == 3


def test_wait_asked_for_by_the_provider_holds_for_refreshes(fake: tuple[LoopbackServer, FakeClock]) -> None:
    server, clock = fake
    session = session_for(server, clock=clock)
    _ = session.token
    clock.advance(500)
    server.fail_next(1, status=429, retry_after=30)
    _ = session.token
    clock.advance(29)
    _ = session.token
    assert server.token_requests == 2
    clock.advance(2)
    _ = session.token
    assert server.logins == 2


def test_expired_token_with_a_dead_endpoint_is_an_error(fake: tuple[LoopbackServer, FakeClock]) -> None:
    server, clock = fake
    session = session_for(server, clock=clock)
    _ = session.token
    clock.advance(601)
    server.answer_always(503)
    with pytest.raises(LoginError, match="HTTP 503"):
        _ = session.token
    assert "expired" in repr(session)


@pytest.mark.parametrize("step", [-3600, 3600])
def test_stepped_clock_costs_one_login_at_most(fake: tuple[LoopbackServer, FakeClock], step: float) -> None:
    server, clock = fake
    session = session_for(server, clock=clock)
    _ = session.token
    clock.step_wall(step)
    for _ in range(10):
        _ = session.token
    assert server.logins <= 2


def test_session_that_does_not_refresh_warns_once_its_token_has_expired(fake: tuple[LoopbackServer, FakeClock]) -> None:
    server, clock = fake
    session = session_for(server, clock=clock, refresh_before_expiry=None)
    first = session.token
    assert not session.refreshes
    clock.advance(601)
    with pytest.warns(SHUserWarning, match="expired"):
        assert session.token == first
    assert server.logins == 1


# Trying again


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_temporary_failure_is_retried(server: LoopbackServer, status: int) -> None:
    server.fail_next(3, status=status)
    assert session_for(server).token
    assert server.token_requests == 4


def test_attempts_are_bounded(server: LoopbackServer) -> None:
    server.answer_always(503)
    with pytest.raises(LoginError) as caught:
        _ = session_for(server, max_attempts=3).token
    assert caught.value.status == 503
    assert server.token_requests == 3


@pytest.mark.slow
def test_wait_asked_for_is_respected(server: LoopbackServer) -> None:
    server.fail_next(1, status=429, retry_after=300)
    began = time.monotonic()
    assert session_for(server, retry_after_unit="ms").token
    assert time.monotonic() - began >= 0.3


def test_wait_beyond_patience_is_an_error_at_once(server: LoopbackServer) -> None:
    """A read that slept for an hour would look like a hang; the error carries the time instead."""
    server.fail_next(1, status=429, retry_after=3600)
    with pytest.raises(LoginError) as caught:
        _ = session_for(server).token
    assert caught.value.retry_after == 3600
    assert server.token_requests == 1


def test_refused_connection_is_retried_and_named(server: LoopbackServer) -> None:
    server.refuse_connections()
    with pytest.raises(LoginError, match="Connection refused") as caught:
        _ = session_for(server).token
    assert caught.value.status is None
    server.refuse_connections(False)
    assert session_for(server).token


@pytest.mark.parametrize("code", ["invalid_client", "unauthorized_client", "invalid_scope", "unsupported_grant_type"])
def test_final_refusal_is_not_retried(server: LoopbackServer, code: str) -> None:
    server.answer_always(400, body={"error": code, "error_description": "not you"})
    with pytest.raises(LoginRefusedError, match="not you") as caught:
        _ = session_for(server).token
    assert caught.value.code == code
    assert server.token_requests == 1


@pytest.mark.parametrize(
    ("status", "body"),
    [(400, {"error": "invalid_request"}), (401, b""), (403, b"<html>"), (404, {"message": "no"}), (400, {"error": {}})],
)
def test_other_client_error_is_no_final_refusal(
    server: LoopbackServer, status: int, body: Mapping[str, Any] | bytes
) -> None:
    """Without one of the final codes it may be the gateway's; so it is a LoginError, with its status."""
    server.answer_always(status, body=body)
    with pytest.raises(LoginError) as caught:
        _ = session_for(server).token
    assert type(caught.value) is LoginError
    assert caught.value.status == status
    assert server.token_requests == 1


@pytest.mark.parametrize("status", [429, 500, 503])
def test_status_counts_more_than_an_error_code_in_its_body(server: LoopbackServer, status: int) -> None:
    server.answer_always(status, body={"error": "invalid_client"})
    with pytest.raises(LoginError) as caught:
        session_for(server).renew(None)
    assert type(caught.value) is LoginError


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"null", b"[]", b'{"access_token":', b"\xff\xfe", b"[" * 50_000, {}, {"access_token": 5}]
)
def test_answer_that_is_no_token_is_one_named_error(server: LoopbackServer, body: Mapping[str, Any] | bytes) -> None:
    server.fail_next(1, status=200, body=body)
    with pytest.raises(TokenResponseError):
        _ = session_for(server).token
    assert server.token_requests == 1


def test_endless_answer_is_cut_off(server: LoopbackServer) -> None:
    server.fail_next(1, status=200, body=b"x" * (2 << 20))
    with pytest.raises(LoginError, match="longer than"):
        session_for(server).renew(None)


@pytest.mark.slow
def test_hanging_endpoint_is_given_up(server: LoopbackServer) -> None:
    server.hang()
    with pytest.raises(LoginError, match=r"no answer within 0\.3 s"):
        session_for(server, timeout=(5.0, 0.3)).renew(None)
    server.hang(False)


@pytest.mark.slow
def test_answer_that_drips_is_given_up_in_the_end() -> None:
    """A byte now and then meets every read timeout; the sum of both timeouts bounds the whole."""
    pause = 0.05  # s
    with one_answer(b"{" * int(NEVER / pause), pause=pause) as seen:
        # No shorter, or a listener that stalls with the machine would be taken for one that does not answer.
        session = OAuthSession(seen.url, "me", "invented-secret", timeout=(0.5, 6.0))
        with pytest.raises(LoginError, match=r"did not end within 6\.5 s"):
            in_time(session.renew, None)


@pytest.mark.parametrize("headers", ["Content-Encoding: gzip\r\n", "Transfer-Encoding: chunked\r\n"])
def test_encoded_answer_is_read(headers: str) -> None:
    body = b'{"access_token": "invented", "expires_in": 60}'
    body = gzip.compress(body) if "gzip" in headers else b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    with one_answer(body, headers=headers) as seen:
        assert OAuthSession(seen.url, "me", "invented-secret").renew(None).access_token == "invented"


def test_answer_cut_short_is_a_login_error() -> None:
    with one_answer(b'{"access', claimed=500) as seen, pytest.raises(LoginError):
        OAuthSession(seen.url, "me", "invented-secret").renew(None)


def test_error_met_before_is_not_taken_for_the_cause(server: LoopbackServer) -> None:
    """A login inside an except block chains to an error that has nothing to do with it."""
    server.refuse_connections()
    try:
        raise PermissionError(13, "of another story")  # noqa: TRY301 - the handler is what is tested
    except PermissionError:
        with pytest.raises(LoginError, match="Connection refused"):
            session_for(server).renew(None)
    server.refuse_connections(False)


# One login for all


def test_renew_logs_in_once_for_one_generation(server: LoopbackServer) -> None:
    session = session_for(server)
    first = session.renew(None)
    assert (first.generation, session.renew(None)) == (1, first)
    second = session.renew(first)
    assert second.generation == 2
    assert session.renew(first) is second
    assert server.logins == 2


def test_renew_makes_one_attempt_and_does_not_wait(server: LoopbackServer) -> None:
    server.answer_always(503, retry_after=NEVER)
    with pytest.raises(LoginError) as caught:
        in_time(session_for(server).renew, None)
    assert caught.value.retry_after == NEVER
    assert server.token_requests == 1


def test_renew_does_not_return_a_token_that_is_due(fake: tuple[LoopbackServer, FakeClock]) -> None:
    server, clock = fake
    session = session_for(server, clock=clock)
    session.renew(None)
    clock.advance(500)
    assert session.renew(None).generation == 2
    assert server.logins == 2


@pytest.mark.slow
def test_threads_at_expiry_log_in_once(fake: tuple[LoopbackServer, FakeClock]) -> None:
    server, clock = fake
    session = session_for(server, clock=clock)
    _ = session.token
    clock.advance(601)
    server.delay(0.1)
    with ThreadPoolExecutor(16) as threads:
        reads = [threads.submit(lambda: session.token["access_token"]) for _ in range(64)]
        tokens = {read.result() for read in reads}
    assert len(tokens) == 1
    assert server.logins == 2


@pytest.mark.slow
def test_threads_share_the_failure_of_one_of_them(server: LoopbackServer) -> None:
    """Sixteen threads in an outage wait for one series of attempts, not for sixteen in a row."""
    session = session_for(server, max_attempts=2, timeout=(PATIENCE, PATIENCE))
    asked = session._renewal._patience = CountingLock()  # type: ignore[assignment]  # what all of them meet at
    server.answer_always(503)
    server.hang()

    def read() -> str:
        try:
            return str(session.token)
        except LoginError as exc:
            return f"HTTP {exc.status}"

    with ThreadPoolExecutor(16) as threads:
        reads = [threads.submit(read) for _ in range(16)]
        until(lambda: len(asked.times) == 16)
        server.hang(False)
        outcomes = {future.result() for future in reads}
    assert outcomes == {"HTTP 503"}
    assert server.token_requests == 2


@pytest.mark.slow
def test_wait_between_attempts_holds_up_no_renewal(server: LoopbackServer) -> None:
    """The renewal goes through at once; the token it brings ends the wait of every reader."""
    session = session_for(server)
    server.fail_next(1, status=503, retry_after=LONGEST_WAIT)
    assert LONGEST_WAIT > PATIENCE
    with ThreadPoolExecutor(4) as threads:
        reads = [threads.submit(lambda: session.token["access_token"]) for _ in range(4)]
        until(lambda: server.token_requests == 1)
        token = in_time(session.renew, None)
        assert {read.result(PATIENCE) for read in reads} == {token.access_token}
    assert server.token_requests == 2


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_fork_during_a_login_leaves_the_child_able_to_log_in(child_env: dict[str, str]) -> None:
    """The thread that holds the lock at the fork does not exist in the child and never gives it back."""
    program = (
        "import os, signal, threading, time\n"
        "import oauthlib.oauth2, requests_oauthlib\n"  # no child can finish an import of the missing thread either
        "from shpool.session import OAuthSession\n"
        "from shpool.testing import LoopbackServer\n"
        "with LoopbackServer() as server:\n"
        "    session = OAuthSession(server.token_url, server.client_id, server.client_secret)\n"
        "    server.hang()\n"
        "    thread = threading.Thread(target=lambda: session.token)\n"
        "    thread.start()\n"
        "    while not session._renewal._lock.locked():\n"
        "        time.sleep(0.01)\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        signal.alarm(30)\n"
        "        os._exit(0 if session.token else 1)\n"
        "    server.hang(False)\n"
        "    thread.join()\n"
        "    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program]
    done = subprocess.run(command, env=child_env, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "0", done.stderr


@pytest.mark.slow
def test_valid_token_is_read_while_another_thread_refreshes(fake: tuple[LoopbackServer, FakeClock]) -> None:
    server, clock = fake
    session = session_for(server, clock=clock)
    first = session.token
    clock.advance(500)
    server.hang()
    with ThreadPoolExecutor(1) as threads:
        refresh = threads.submit(lambda: session.token)
        until(session._renewal._lock.locked)
        assert session.token == first
        server.hang(False)
        assert refresh.result() != first


# Where credentials go


@pytest.mark.parametrize(
    "url",
    [
        "http://idp.example/token",
        "ftp://idp.example/token",
        "idp.example/token",
        "",
        "https://",
        "https://me:pw@idp.example/t",
    ],
)
def test_insecure_token_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="token_url must be https") as caught:
        OAuthSession(url, "me", "invented-secret")
    assert "pw" not in str(caught.value)


def test_insecure_transport_is_not_allowed_for_the_whole_process(server: LoopbackServer) -> None:
    _ = session_for(server).token
    assert "OAUTHLIB_INSECURE_TRANSPORT" not in os.environ


@pytest.mark.parametrize("client_auth", ["post", "basic"])
def test_netrc_does_not_replace_the_credentials(
    server: LoopbackServer, own_home: Path, monkeypatch: pytest.MonkeyPatch, client_auth: ClientAuth
) -> None:
    netrc = own_home / ".netrc"
    netrc.write_text("machine 127.0.0.1 login other password other\ndefault login other password other\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    assert session_for(server, client_auth=client_auth).token


def test_redirect_is_not_followed(server: LoopbackServer) -> None:
    with one_answer(b"", status="307 Temporary Redirect", headers=f"Location: {server.token_url}\r\n") as seen:
        session = OAuthSession(seen.url, server.client_id, server.client_secret)
        with pytest.raises(LoginError, match=r"redirects to http://127\.0\.0\.1, which is not followed"):
            session.renew(None)
    assert server.token_requests == 0


def test_credentials_for_this_machine_pass_no_proxy(server: LoopbackServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """They go there as plain http, which a proxy could read."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert session_for(server).token


def test_proxy_of_the_environment_is_used_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    with one_answer(b"", status="407 Proxy Authentication Required") as seen:
        monkeypatch.setenv("https_proxy", f"http://user:{_CANARY}@127.0.0.1:{seen.port}")
        session = OAuthSession("https://idp.example/token", "me", "invented-secret")
        with pytest.raises(LoginError, match="the proxy of the environment") as caught:
            session.renew(None)
    assert "CONNECT idp.example:443" in seen.text()
    assert _CANARY not in everything_about(caught.value)


def test_endpoint_that_speaks_no_tls_is_a_login_error() -> None:
    with one_answer(b"") as seen:
        session = OAuthSession(seen.url.replace("http:", "https:"), "me", "invented-secret")
        with pytest.raises(LoginError, match="TLS"):
            session.renew(None)


# Arguments


@pytest.mark.parametrize(
    "wrong",
    [
        {"client_id": ""},
        {"client_secret": ""},
        {"client_secret": None},
        {"client_auth": "jwt"},
        {"retry_after_unit": "h"},
        {"timeout": (0, 1)},
        {"timeout": (1, float("inf"))},
        {"max_attempts": 0},
        {"retry_delay": -1.0},
        {"refresh_before_expiry": -1.0},
        {"refresh_before_expiry": float("nan")},
    ],
    ids=str,
)
def test_argument_out_of_range_is_refused_by_name(wrong: dict[str, Any]) -> None:
    options: dict[str, Any] = {"client_id": "me", "client_secret": _CANARY, **wrong}
    with pytest.raises(ValueError, match=next(iter(wrong))) as caught:
        OAuthSession("https://idp.example/token", **options)
    assert _CANARY not in everything_about(caught.value, skip=1)


def test_single_allowed_host_must_be_in_a_sequence() -> None:
    with pytest.raises(TypeError, match="sequence of host names"):
        OAuthSession("https://idp.example/token", "me", "invented-secret", allowed_hosts="api.example")


def test_allowed_hosts_are_kept_in_lower_case() -> None:
    session = OAuthSession("https://idp.example/token", "me", Secret("invented"), allowed_hosts=["API.example"])
    assert session.allowed_hosts == ("api.example",)


@pytest.mark.parametrize(
    "host", ["api.example", "API.example.", "xn--bcher-kva.example", "127.0.0.1", "::1", "tiles_1"]
)
def test_allowed_host_is_a_bare_name_or_address(host: str) -> None:
    session = OAuthSession("https://idp.example/token", "me", "invented-secret", allowed_hosts=[host])
    assert session.allowed_hosts == (host.lower().rstrip("."),)


@pytest.mark.parametrize(
    "entry",
    ["", ".", "https://api.example", "api.example/v1", "api.example:443", "[::1]", " api.example", "*.example", None],
)
def test_allowed_host_that_would_never_match_is_refused(entry: str) -> None:
    """An empty one above all: left out, it would open the token to every host."""
    with pytest.raises(ValueError, match="give the bare host name") as caught:
        OAuthSession("https://idp.example/token", "me", "invented-secret", allowed_hosts=["api.example", entry])
    assert repr(entry) in str(caught.value)


def test_allowed_host_is_given_as_requests_sends_it() -> None:
    with pytest.raises(ValueError, match=r"'bücher\.example'; give the host name in its ASCII form"):
        OAuthSession("https://idp.example/token", "me", "invented-secret", allowed_hosts=["bücher.example"])


# Sessions made of a token


@pytest.mark.parametrize("cls", [OAuthSession, SentinelHubSession])
def test_session_made_of_a_token_serves_it_and_never_refreshes(cls: type[OAuthSession]) -> None:
    session = cls.from_token({"access_token": "invented", "expires_at": time.time() + 60, "region": "eu"})
    assert session.session_headers == {"Authorization": "Bearer invented"}
    assert session.token["region"] == "eu"
    assert not session.refreshes
    assert session.client_id == session.token_url == ""
    with pytest.raises(ShpoolError, match="cannot log in"):
        session.renew(session._renewal.current)


@pytest.mark.parametrize("cls", [OAuthSession, SentinelHubSession])
def test_session_made_of_an_expired_token_warns(cls: type[OAuthSession]) -> None:
    session = cls.from_token({"access_token": "invented", "expires_at": time.time() - 60})
    with pytest.warns(SHUserWarning, match="expired") as caught:
        assert session.token["access_token"] == "invented"
    assert caught[0].filename == __file__


@pytest.mark.parametrize("cls", [OAuthSession, SentinelHubSession])
@pytest.mark.parametrize(
    "token",
    [
        {},
        {"access_token": "a"},
        {"expires_at": 5},
        {"access_token": "", "expires_at": 5},
        {"access_token": "a", "expires_at": "x"},
    ],
    ids=str,
)
def test_mapping_that_is_no_token_is_refused(cls: type[OAuthSession], token: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"access_token|expires_at"):
        cls.from_token(token)


# Sentinel Hub and the Copernicus Data Space


def config_for(server: LoopbackServer, **fields: Any) -> SHConfig:
    fields = {"sh_client_id": server.client_id, "sh_client_secret": server.client_secret, **fields}
    return SHConfig(use_defaults=True, sh_token_url=server.token_url, sh_base_url=server.base_url, **fields)


def test_sentinelhub_session_takes_its_settings_from_the_configuration(server: LoopbackServer) -> None:
    session = SentinelHubSession(config_for(server, max_download_attempts=2, download_sleep_time=0.01))
    assert session.info()["jti"]
    assert session.allowed_hosts == ("127.0.0.1",)
    assert session.refresh_before_expiry == 120
    server.answer_always(503)
    with pytest.raises(LoginError):
        session.renew(session.renew(None))
    assert server.token_requests == 2


@pytest.mark.parametrize(
    ("preset", "host"), [("sentinelhub", "services.sentinel-hub.com"), ("cdse", "sh.dataspace.copernicus.eu")]
)
def test_presets_bind_the_host_and_count_milliseconds(preset: str, host: str) -> None:
    session = SentinelHubSession(SHConfig.preset(preset, sh_client_id="me", sh_client_secret="invented"))
    assert session.allowed_hosts == (host,)
    assert session.retry_after_unit == "ms"


@pytest.mark.parametrize("token", [None, {"access_token": "invented", "expires_at": 5}], ids=["none", "given"])
@pytest.mark.parametrize("url", ["", "services.sentinel-hub.com", "https://", "https://me:canary@[::1/"])
def test_base_url_without_a_host_is_refused(url: str, token: dict[str, Any] | None) -> None:
    """No host means any host."""
    config = SHConfig(use_defaults=True, sh_base_url=url, sh_client_id="me", sh_client_secret="invented")
    with pytest.raises(ValueError, match=r"sh_base_url names no host .* give one like") as caught:
        SentinelHubSession(config, None if token else 120.0, _token=token)
    assert "canary" not in str(caught.value)


def test_other_hosts_count_seconds(server: LoopbackServer) -> None:
    assert SentinelHubSession(config_for(server)).retry_after_unit == "s"
    lookalike = SHConfig(
        use_defaults=True, sh_base_url="https://evil-sentinel-hub.com", sh_client_id="me", sh_client_secret="invented"
    )
    assert SentinelHubSession(lookalike).retry_after_unit == "s"


@pytest.mark.parametrize(
    ("fields", "named", "unnamed"),
    [
        ({}, ["sh_client_id", "SH_CLIENT_ID", "sh_client_secret", "SH_CLIENT_SECRET", "config.toml"], []),
        ({"sh_client_id": "me"}, ["sh_client_secret", "SH_CLIENT_SECRET"], ["SH_CLIENT_ID"]),
        ({"sh_client_secret": "invented"}, ["sh_client_id", "SH_CLIENT_ID"], ["SH_CLIENT_SECRET"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("token", [None, {"access_token": "invented", "expires_at": 5}], ids=["none", "given"])
def test_missing_credentials_are_named_with_the_place_to_set_them(
    fields: dict[str, str], named: list[str], unnamed: list[str], token: dict[str, Any] | None
) -> None:
    with pytest.raises(ValueError, match="set ") as caught:
        SentinelHubSession(SHConfig(use_defaults=True, **fields), _token=token)
    assert all(word in str(caught.value) for word in named)
    assert not any(word in str(caught.value) for word in unnamed)


def test_given_token_is_used_until_it_is_due(server: LoopbackServer) -> None:
    given = {"access_token": "invented", "expires_at": time.time() + 3600}
    session = SentinelHubSession(config_for(server), _token=given)
    assert session.token["access_token"] == "invented"
    assert server.requests == 0
    assert session.renew(session._renewal.current).generation == 2


def test_credentials_of_the_environment_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SH_CLIENT_ID", "me")
    monkeypatch.setenv("SH_CLIENT_SECRET", "invented")
    assert SentinelHubSession().client_id == "me"


# Secrets


FAULTS: dict[str, Callable[[LoopbackServer], None]] = {
    "refused": lambda server: server.answer_always(
        401, body={"error": "invalid_client", "error_description": f"bad secret {_CANARY}\x1b[31m"}
    ),
    "server error": lambda server: server.answer_always(503, body={"echo": _CANARY}),
    "no reason": lambda server: server.answer_always(400, body={"echo": _CANARY}),
    "bad JSON": lambda server: server.answer_always(200, body=b'{"access_token": "canary-token-9120", "expires_in'),
    "bad expiry": lambda server: server.answer_always(
        200, body={"access_token": "canary-token-9120", "expires_in": "soon"}
    ),
    "timeout": lambda server: server.hang(),
    "no connection": lambda server: server.refuse_connections(),
}


@pytest.fixture
def all_logs() -> Iterator[io.StringIO]:
    """Collect everything that any logger says at DEBUG."""
    root, stream = logging.getLogger(), io.StringIO()
    handler = logging.StreamHandler(stream)
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield stream
    root.setLevel(before)
    root.removeHandler(handler)


@pytest.mark.slow
@pytest.mark.parametrize("client_auth", ["post", "basic"])
@pytest.mark.parametrize("fault", FAULTS)
def test_no_failure_shows_a_secret(
    client_auth_server: Callable[..., LoopbackServer], all_logs: io.StringIO, fault: str, client_auth: ClientAuth
) -> None:
    """Not in a log at DEBUG, the text, the arguments, a pickle, or a traceback with all local variables."""
    server = client_auth_server(client_secret=_CANARY)
    session = OAuthSession(
        server.token_url,
        "demo-client",
        _CANARY,
        client_auth=client_auth,
        timeout=(1.0, 0.3),
        max_attempts=2,
        retry_delay=0.01,
    )
    FAULTS[fault](server)
    with pytest.raises(LoginError) as caught:
        _ = session.token
    server.hang(False)
    seen = everything_about(caught.value, skip=1) + all_logs.getvalue() + repr(session) + repr(vars(session))
    assert "canary" not in seen
    assert "\x1b" not in seen


_SPECIAL = "canary/secret+4711qzvxj=~ é"


@pytest.mark.parametrize(
    "echo",
    [
        _SPECIAL,
        quote(_SPECIAL),
        quote(_SPECIAL, safe=""),
        quote_plus(_SPECIAL),
        re.sub("%..", lambda code: code[0].lower(), quote_plus(_SPECIAL)),
        b64encode(f"demo-client:{_SPECIAL}".encode()).decode(),
        b64encode(f"demo-client:{quote(_SPECIAL, safe='')}".encode()).decode(),
    ],
)
@pytest.mark.parametrize("field", ["error", "error_description"])
def test_secret_is_masked_in_every_form_a_request_carries_it(server: LoopbackServer, echo: str, field: str) -> None:
    server.answer_always(400, body={"error": "invalid_client", field: f"not <{echo}>"})
    with pytest.raises(LoginError, match=r"not <\*\*\*=*>") as caught:
        OAuthSession(server.token_url, "demo-client", _SPECIAL).renew(None)
    seen = everything_about(caught.value, skip=1)
    assert "4711qzvxj" not in seen  # a number alone may be a port or an address
    assert echo not in seen


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="interrupts a system call of the main thread")
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, RuntimeError])
@pytest.mark.parametrize("client_auth", ["post", "basic"])
def test_interrupted_login_shows_no_secret(client_auth: ClientAuth, kind: type[BaseException]) -> None:
    """An interrupt comes up through the frames of the HTTP libraries, whose variables hold the request's body."""

    def interrupt(*_: object) -> None:
        raise kind

    main = threading.main_thread().ident
    assert main == threading.get_ident()
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with one_answer(b"", before=lambda: signal.pthread_kill(main, signal.SIGUSR1)) as seen:
            session = OAuthSession(seen.url, "me", _CANARY, client_auth=client_auth)
            with pytest.raises(kind) as caught:
                session.renew(None)
    finally:
        signal.signal(signal.SIGUSR1, before)
    shown = everything_about(caught.value, skip=1)
    assert "shpool/endpoint.py" in shown
    assert "canary" not in shown
    assert b64encode(f"me:{_CANARY}".encode()).decode() not in shown


def test_success_shows_neither_secret_nor_token(
    client_auth_server: Callable[..., LoopbackServer], all_logs: io.StringIO
) -> None:
    session = session_for(client_auth_server(client_secret=_CANARY))
    access_token = session.token["access_token"]
    seen = all_logs.getvalue() + repr(session) + repr(vars(session)) + repr(vars(session._renewal))
    assert "login 1 at" in seen
    assert _CANARY not in seen
    assert access_token not in seen


@pytest.mark.parametrize("dumps", [pickle.dumps, cloudpickle.dumps])
def test_session_refuses_to_travel(dumps: Callable[[object], bytes]) -> None:
    for session in (
        OAuthSession("https://idp.example/token", "me", _CANARY),
        OAuthSession.from_token({"access_token": "invented", "expires_at": 5}),
    ):
        with pytest.raises(TypeError, match="current_session"):
            dumps(session)


def test_making_a_session_imports_no_http_stack(child_env: dict[str, str]) -> None:
    """The workers are launched before it is: their start must not wait for it."""
    program = (
        "import sys; from shpool.session import OAuthSession; OAuthSession('https://idp.example/t', 'me', 'invented'); "
        "print([name for name in ('requests', 'oauthlib', 'requests_oauthlib', 'urllib3') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], env=child_env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Tools


class OneAnswer:
    """A listener that gives one raw answer; afterwards it knows what it was asked."""

    def __init__(self, answer: bytes, drip: bytes, pause: float, before: Callable[[], None]) -> None:
        self._answer = answer
        self._drip = drip
        self._pause = pause
        self._before = before
        self._is_over = threading.Event()
        self._request = bytearray()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(PATIENCE)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/token"
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def text(self) -> str:
        self._thread.join()
        return self._request.decode()

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            connection.settimeout(PATIENCE)
            self._request += connection.recv(65536)
            while self._request.startswith(b"POST") and not self._is_whole():
                self._request += connection.recv(65536)
            self._before()
            with contextlib.suppress(OSError):  # the client may leave in the middle
                connection.sendall(self._answer)
                for byte in self._drip:
                    if self._is_over.wait(self._pause):
                        return
                    connection.sendall(bytes([byte]))

    def _is_whole(self) -> bool:
        head, end, body = self._request.partition(b"\r\n\r\n")
        length = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
        return bool(end) and len(body) >= int(length.split(b":")[1])


@contextlib.contextmanager
def one_answer(  # noqa: PLR0913 - each is one way for an answer to go wrong
    body: bytes,
    *,
    status: str = "200 OK",
    headers: str = "",
    claimed: int | None = None,
    pause: float = 0.0,
    before: Callable[[], None] = lambda: None,
) -> Iterator[OneAnswer]:
    """Run a listener whose answer may claim a length it does not have, or pause before each byte of its body.

    It calls ``before`` once it has the whole request.
    """
    length = len(body) if claimed is None else claimed
    if "chunked" not in headers:
        headers += f"Content-Length: {length}\r\n"
    head = f"HTTP/1.1 {status}\r\n{headers}\r\n".encode()
    listener = OneAnswer(head, body, pause, before) if pause else OneAnswer(head + body, b"", 0.0, before)
    try:
        yield listener
    finally:
        listener.close()


class CountingLock:
    """A lock that notes when it is asked for."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self.times.append(time.monotonic())
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def everything_about(error: BaseException, skip: int = 0) -> str:
    """Return all that a crash reporter would send, less the first frames: those of the test itself."""
    tb = error.__traceback__
    for _ in range(skip):
        tb = tb and tb.tb_next
    report = traceback.TracebackException(type(error), error, tb, capture_locals=True)
    return "".join(report.format()) + repr(error) + str(error) + repr(vars(error)) + repr(pickle.dumps(error))
