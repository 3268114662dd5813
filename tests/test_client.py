"""The 401 rule, host binding and redirects of the HTTP client, against real servers."""

from __future__ import annotations

import contextlib
import io
import pickle
import threading
import traceback
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests
from patience import PATIENCE

from shpool.auth import BearerAuth
from shpool.client import HTTPClient
from shpool.errors import InsecureUrlError, TokenUnavailableError
from shpool.testing import LoopbackServer, tile_bytes
from shpool.tokens import SYSTEM_CLOCK, Token, token_from_response


class Holder:
    """A shared session whose parent logs in, or does not, at each report."""

    def __init__(self, *texts: str, allowed_hosts: tuple[str, ...] = ()) -> None:
        self.texts = list(texts)
        self.allowed_hosts = allowed_hosts
        self.reports: list[int] = []
        self.token = self._next(1)

    def _next(self, generation: int) -> Token:
        return token_from_response({"access_token": self.texts.pop(0)}, SYSTEM_CLOCK.now()).numbered(generation)

    def report_refused(self, generation: int) -> None:
        self.reports.append(generation)
        if self.texts:
            self.token = self._next(generation + 1)

    def wait_for_token(self, seconds: float, *, newer_than: int = -1) -> Token:
        assert seconds > 0
        if self.token.generation <= newer_than:
            reason = "refused"
            raise TokenUnavailableError(reason)
        return self.token


class Echo:
    """An origin of its own: accepts the tokens it is told to, remembers what it was asked."""

    def __init__(self, *accepted: str, refusal: str = 'Bearer error="invalid_token"') -> None:
        self.accepted = accepted
        self.refusal = refusal
        self.seen: list[tuple[str, str | None, bytes]] = []
        self.redirect_to = ""
        self.failures: list[int] = []  # statuses that the next requests are answered
        self.retry_after = ""  # said with these

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        echo = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                bearer = self.headers.get("Authorization")
                echo.seen.append((self.path, bearer, body))
                is_known = bearer in {f"Bearer {text}" for text in echo.accepted}
                redirect = echo.redirect_to if self.path == "/redirect" else ""
                failure = echo.failures.pop(0) if echo.failures else 0
                self.send_response(failure or (302 if redirect else 200 if is_known else 401))
                if redirect:
                    self.send_header("Location", redirect)
                elif not is_known:
                    self.send_header("WWW-Authenticate", echo.refusal)
                if failure and echo.retry_after:
                    self.send_header("Retry-After", echo.retry_after)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_POST = do_PUT = do_PATCH = do_GET  # noqa: N815 - the names http.server looks for

            def log_message(self, *args: object) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            try:
                yield f"http://127.0.0.1:{server.server_address[1]}"
            finally:
                server.shutdown()
                thread.join()


def login_at(server: LoopbackServer) -> str:
    """Return a token of the server."""
    form = {"grant_type": "client_credentials", "client_id": server.client_id, "client_secret": server.client_secret}
    return str(requests.post(server.token_url, data=form, timeout=30).json()["access_token"])


def test_a_request_carries_the_token_of_the_moment() -> None:
    echo, holder = Echo("invented-a", "invented-b"), Holder("invented-a", "invented-b")
    with echo.running() as url, HTTPClient(holder) as http:
        assert http.get(url).status_code == 200
        holder.token = holder._next(2)
        assert http.get(url).status_code == 200
    assert [bearer for _, bearer, _ in echo.seen] == ["Bearer invented-a", "Bearer invented-b"]
    assert holder.reports == []


def test_a_refused_token_is_reported_and_the_request_sent_once_more() -> None:
    echo, holder = Echo("invented-b"), Holder("invented-a", "invented-b")
    with echo.running() as url, requests.Session() as http:
        answer = http.post(url, data=b"body", auth=BearerAuth(holder))
    assert answer.status_code == 200
    assert [first.status_code for first in answer.history] == [401]
    assert holder.reports == [1]
    assert [(bearer, body) for _, bearer, body in echo.seen] == [
        ("Bearer invented-a", b"body"),
        ("Bearer invented-b", b"body"),
    ]


def test_a_second_refusal_is_the_callers() -> None:
    echo, holder = Echo(), Holder("invented-a", "invented-b", "invented-c")
    with echo.running() as url, HTTPClient(holder) as http:
        assert http.get(url).status_code == 401
    assert len(echo.seen) == 2
    assert holder.reports == [1]


def test_a_scope_that_is_missing_costs_no_login() -> None:
    """RFC 6750, section 3.1: insufficient_scope says nothing against the token itself."""
    echo, holder = Echo(refusal='Bearer error="insufficient_scope"'), Holder("invented-a", "invented-b")
    with echo.running() as url, HTTPClient(holder) as http:
        assert http.get(url).status_code == 401
    assert holder.reports == []


def test_without_a_newer_token_the_error_says_so() -> None:
    holder = Holder("invented-a")
    with Echo().running() as url, HTTPClient(holder) as http, pytest.raises(TokenUnavailableError, match="refused"):
        http.get(url)


@pytest.mark.parametrize(
    ("method", "status", "retry_after", "attempts"),
    [
        ("POST", 429, "20", 2),
        ("POST", 429, "", 2),
        ("POST", 503, "20", 2),
        ("PATCH", 429, "20", 2),
        ("PATCH", 503, "20", 2),
        ("PUT", 500, "", 2),
        ("POST", 503, "", 1),
        ("POST", 413, "20", 1),
        ("POST", 500, "20", 1),
        ("PATCH", 502, "", 1),
    ],
)
def test_what_might_have_been_done_is_sent_again_only_when_the_server_did_not_take_it_up(
    method: str, status: int, retry_after: str, attempts: int
) -> None:
    """RFC 6585, section 4, and RFC 9110, section 15.6.4."""
    echo, body = Echo("invented-a"), io.BytesIO(b"skipped and sent")
    body.seek(12)
    echo.failures, echo.retry_after = [status], retry_after
    with echo.running() as url, HTTPClient(Holder("invented-a"), "ms") as http:
        assert http.request(method, url, data=body).status_code == (status if attempts == 1 else 200)
    assert [sent for _, _, sent in echo.seen] == [b"sent"] * attempts


def test_refusals_without_end_are_the_callers() -> None:
    echo = Echo("invented-a")
    echo.failures, echo.retry_after = [429] * 9, "1"
    with echo.running() as url, HTTPClient(Holder("invented-a"), "ms") as http:
        assert http.post(url, data=b"body").status_code == 429
    assert [sent for _, _, sent in echo.seen] == [b"body"] * 4


@pytest.mark.parametrize(("method", "status"), [("POST", 429), ("PUT", 503)])
def test_a_body_that_can_be_read_once_is_sent_once(method: str, status: int) -> None:
    """A second attempt would send what is left of it, which is nothing."""
    echo = Echo("invented-a")
    echo.failures, echo.retry_after = [status], "20"
    with echo.running() as url, HTTPClient(Holder("invented-a"), "ms") as http:
        # A length, since the little server reads no chunks.
        answer = http.request(method, url, data=iter([b"once"]), headers={"Content-Length": "4"}, timeout=PATIENCE)
    assert answer.status_code == status
    assert [sent for _, _, sent in echo.seen] == [b"once"]


def test_a_file_is_sent_again_from_where_it_stood() -> None:
    echo, holder = Echo("invented-b"), Holder("invented-a", "invented-b")
    body = io.BytesIO(b"skipped and sent")
    body.seek(12)
    with echo.running() as url, HTTPClient(holder) as http:
        assert http.post(url, data=body).status_code == 200
    assert [sent for _, _, sent in echo.seen] == [b"sent", b"sent"]


def test_a_generator_cannot_be_sent_again_but_is_reported() -> None:
    holder = Holder("invented-a", "invented-b")
    with Echo().running() as url, HTTPClient(holder) as http:
        # A length, since the little server reads no chunks.
        answer = http.post(url, data=iter([b"once"]), headers={"Content-Length": "4"})
    assert answer.status_code == 401
    assert holder.reports == [1]


def test_only_allowed_hosts_get_the_token(caplog: pytest.LogCaptureFixture) -> None:
    echo, holder = Echo(), Holder("invented-a", allowed_hosts=("api.example",))
    with echo.running() as url, HTTPClient(holder) as http:
        assert http.get(url).status_code == 401
        assert http.get(url).status_code == 401
    assert [bearer for _, bearer, _ in echo.seen] == [None, None]
    assert holder.reports == []
    assert [record.message for record in caplog.records if record.name == "shpool.bearer"] == [
        "127.0.0.1 is asked without the token; name it in the session's allowed_hosts if it should have it"
    ]


def test_an_unencrypted_connection_never_gets_the_token() -> None:
    with HTTPClient(Holder("invented-a")) as http, pytest.raises(InsecureUrlError, match=r"api\.example .* use https"):
        http.get("http://api.example/tile")


def test_a_redirect_to_another_origin_loses_the_token_and_is_not_asked_again() -> None:
    first, second, holder = Echo("invented-a"), Echo(), Holder("invented-a", "invented-b")
    with first.running() as url, second.running() as elsewhere, HTTPClient(holder) as http:
        first.redirect_to = f"{elsewhere}/target"
        assert http.get(f"{url}/redirect").status_code == 401
    assert [bearer for _, bearer, _ in second.seen] == [None]
    assert holder.reports == []


def test_a_redirect_within_the_origin_keeps_the_token_whatever_netrc_says(own_home: Path) -> None:
    netrc = own_home / ".netrc"
    netrc.write_text("machine 127.0.0.1 login someone password not-a-real-password\n")
    netrc.chmod(0o600)
    echo, holder = Echo("invented-a"), Holder("invented-a")
    echo.redirect_to = "/target"
    with echo.running() as url, HTTPClient(holder) as http:
        assert http.get(f"{url}/redirect").status_code == 200
    assert {bearer for _, bearer, _ in echo.seen} == {"Bearer invented-a"}


def test_plain_requests_keep_the_token_on_a_redirect_whatever_netrc_says(own_home: Path) -> None:
    netrc = own_home / ".netrc"
    netrc.write_text("machine 127.0.0.1 login someone password not-a-real-password\n")
    netrc.chmod(0o600)
    echo, holder = Echo("invented-a"), Holder("invented-a")
    echo.redirect_to = "/target"
    with echo.running() as url:
        assert requests.get(f"{url}/redirect", auth=BearerAuth(holder), timeout=30).status_code == 200
    assert {bearer for _, bearer, _ in echo.seen} == {"Bearer invented-a"}


def test_a_proxy_never_stands_between_this_machine_and_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    proxy, echo, holder = Echo(), Echo("invented-a"), Holder("invented-a")
    with proxy.running() as proxy_url, echo.running() as url, HTTPClient(holder) as http:
        monkeypatch.setenv("http_proxy", proxy_url)
        assert http.get(url).status_code == 200
    assert proxy.seen == []


def test_a_redirect_after_a_refusal_carries_the_new_token() -> None:
    echo, holder = Echo("invented-b"), Holder("invented-a", "invented-b")
    with echo.running() as url, HTTPClient(holder) as http:
        echo.redirect_to = ""
        answer = http.get(f"{url}/first", hooks={"response": lambda *_, **__: setattr(echo, "redirect_to", "/target")})
        assert answer.status_code == 200
        assert http.get(f"{url}/redirect").status_code == 200
    assert echo.seen[-1][:2] == ("/target", "Bearer invented-b")


def test_answers_and_errors_hold_no_token(server: LoopbackServer) -> None:
    """A task may return an answer or fail with an error; both are pickled on the way to the parent."""
    holder, echo = Holder("invented-canary"), Echo("invented-canary")
    with echo.running() as url, HTTPClient(holder) as http:
        assert b"invented-canary" not in pickle.dumps(http.get(url))
    server.refuse_connections(at="data")
    with HTTPClient(holder) as http:
        http.get_adapter("http://").max_retries = 0  # type: ignore[attr-defined]  # an HTTPAdapter
        with pytest.raises(requests.ConnectionError, match="refused") as caught:
            http.get(server.data_url(1))
    assert b"invented-canary" not in pickle.dumps(caught.value)
    frames = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    assert "invented-canary" not in "".join(frames.format())


@pytest.mark.parametrize("odd", ["soon", "0.5", "-1", ""])
def test_an_odd_retry_after_fails_no_request(server: LoopbackServer, odd: str) -> None:
    server.fail_next(1, 503, retry_after=odd, at="data")
    with HTTPClient(Holder(login_at(server))) as http:
        http.get_adapter("http://").max_retries.backoff_factor = 0.01  # type: ignore[attr-defined]  # an HTTPAdapter
        http.get_adapter("http://").max_retries.backoff_jitter = 0.0  # type: ignore[attr-defined]  # an HTTPAdapter
        assert http.get(server.data_url(1)).status_code == 200


def test_passing_trouble_is_tried_again(server: LoopbackServer) -> None:
    holder = Holder(login_at(server))
    server.fail_next(2, 503, retry_after=0, at="data")
    with HTTPClient(holder) as http:
        assert http.get(server.data_url(3, 100)).content == tile_bytes(3, 100)


def test_retry_after_counts_in_the_providers_unit() -> None:
    with HTTPClient(Holder("invented-a"), "ms") as http:
        retries = http.get_adapter("https://api.example").max_retries  # type: ignore[attr-defined]  # an HTTPAdapter
        assert retries.parse_retry_after("1500") == pytest.approx(1.5)
        assert retries.new().parse_retry_after("1500") == pytest.approx(1.5)
