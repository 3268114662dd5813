"""The shipped test tools, over real sockets; and the fixture that guards all other tests."""

from __future__ import annotations

import socket
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import requests

from shpool.testing import FakeClock, LoopbackServer, tile_bytes
from shpool.testing.messages import Request, Response, take_request
from shpool.tokens import Instant, decode_claims

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shpool.testing.issuer import ExpiresIn

TIMEOUT = 30.0  # s; nothing on loopback takes that long


@pytest.fixture
def http() -> Iterator[requests.Session]:
    with requests.Session() as session:
        yield session


def ask_token(server: LoopbackServer, http: requests.Session, **changes: str) -> requests.Response:
    form = {
        "grant_type": "client_credentials",
        "client_id": server.client_id,
        "client_secret": server.client_secret,
        **changes,
    }
    return http.post(server.token_url, data=form, timeout=TIMEOUT)


def bearer(server: LoopbackServer, http: requests.Session) -> dict[str, str]:
    return {"Authorization": "Bearer " + ask_token(server, http).json()["access_token"]}


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.005)


def test_the_fake_clock_moves_only_when_told(clock: FakeClock) -> None:
    start = clock.now()
    assert clock.now() == start
    clock.advance(10.0)
    assert clock.now() == Instant(start.wall + 10.0, start.boot + 10.0)
    clock.step_wall(-3_600.0)
    assert clock.now() == Instant(start.wall - 3_590.0, start.boot + 10.0)


def test_the_fake_clock_refuses_to_run_backwards(clock: FakeClock) -> None:
    with pytest.raises(ValueError, match="step_wall"):
        clock.advance(-1.0)


def test_a_login_gives_a_token_that_opens_the_data(server: LoopbackServer, http: requests.Session) -> None:
    headers = bearer(server, http)
    answer = http.get(server.data_url(7, size=5_000), headers=headers, timeout=TIMEOUT)
    assert answer.status_code == 200
    assert answer.content == tile_bytes(7, 5_000)
    assert (server.logins, server.token_requests, server.requests) == (1, 1, 2)
    assert (server.unauthorized, server.bytes_sent) == (0, 5_000)


def test_tiles_differ_and_stay_the_same() -> None:
    assert len({tile_bytes(n, 32) for n in range(100)}) == 100
    assert tile_bytes(3, 32) == tile_bytes(3, 32)


def test_claims_of_a_jwt_name_client_and_end(http: requests.Session, clock: FakeClock) -> None:
    with LoopbackServer(lifetime=60.0, clock=clock) as server:
        claims = decode_claims(ask_token(server, http, scope="tiles").json()["access_token"])
    assert claims["azp"] == server.client_id
    assert claims["scope"] == "tiles"
    assert (claims["iat"], claims["exp"]) == (1_800_000_000, 1_800_000_060)


def test_opaque_tokens_are_not_jwts(http: requests.Session) -> None:
    with LoopbackServer(jwt=False) as server:
        assert "." not in ask_token(server, http).json()["access_token"]


@pytest.mark.parametrize(
    ("form", "stated"),
    [
        ("int", {"expires_in": 90}),
        ("str", {"expires_in": "90"}),
        ("float", {"expires_in": 90.0}),
        ("null", {"expires_in": None}),
        ("missing", {}),
    ],
)
def test_expires_in_takes_each_form(http: requests.Session, form: ExpiresIn, stated: dict[str, Any]) -> None:
    with LoopbackServer(lifetime=90.0, expires_in=form) as server:
        answer = ask_token(server, http).json()
    found = {key: answer[key] for key in answer if key == "expires_in"}
    assert found == stated
    assert {type(value) for value in found.values()} == {type(value) for value in stated.values()}


def test_basic_credentials_are_taken_too(server: LoopbackServer, http: requests.Session) -> None:
    form = {"grant_type": "client_credentials"}
    right, wrong = (server.client_id, server.client_secret), (server.client_id, "wrong")
    assert http.post(server.token_url, data=form, auth=right, timeout=TIMEOUT).status_code == 200
    refused = http.post(server.token_url, data=form, auth=wrong, timeout=TIMEOUT)
    assert (refused.status_code, refused.json()["error"]) == (401, "invalid_client")
    assert refused.headers["WWW-Authenticate"].startswith("Basic")


def test_refusals_carry_the_error_codes_of_the_rfc(server: LoopbackServer, http: requests.Session) -> None:
    secret = ask_token(server, http, client_secret="wrong")
    grant = ask_token(server, http, grant_type="password")
    assert (secret.status_code, secret.json()) == (401, {"error": "invalid_client"})
    assert (grant.status_code, grant.json()) == (400, {"error": "unsupported_grant_type"})
    assert http.get(server.token_url, timeout=TIMEOUT).status_code == 405
    assert server.logins == 0


def test_a_token_ends_with_its_lifetime(http: requests.Session, clock: FakeClock) -> None:
    with LoopbackServer(lifetime=60.0, clock=clock) as server:
        headers = bearer(server, http)
        clock.advance(59.9)
        assert http.get(server.data_url(1), headers=headers, timeout=TIMEOUT).status_code == 200
        clock.advance(0.1)
        answer = http.get(server.data_url(1), headers=headers, timeout=TIMEOUT)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == 'Bearer error="invalid_token"'
    assert server.unauthorized == 1


def test_revoked_and_unknown_tokens_are_refused(server: LoopbackServer, http: requests.Session) -> None:
    headers = bearer(server, http)
    server.revoke_all()
    for refused in (headers, {"Authorization": "Bearer invented"}):
        answer = http.get(server.data_url(1), headers=refused, timeout=TIMEOUT)
        assert answer.headers["WWW-Authenticate"] == 'Bearer error="invalid_token"'
    assert http.get(server.data_url(1), headers=bearer(server, http), timeout=TIMEOUT).status_code == 200


def test_a_request_without_a_token_gets_no_error_code(server: LoopbackServer, http: requests.Session) -> None:
    answer = http.get(server.data_url(1), timeout=TIMEOUT)
    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")


def test_whoami_tells_tokens_apart(server: LoopbackServer, http: requests.Session) -> None:
    answers = [
        http.get(f"{server.base_url}/whoami", headers=bearer(server, http), timeout=TIMEOUT).json() for _ in range(2)
    ]
    assert [answer["number"] for answer in answers] == [1, 2]
    assert answers[0]["id"] != answers[1]["id"]


def test_redirect_names_its_target(server: LoopbackServer, http: requests.Session) -> None:
    target = "http://localhost:1/elsewhere?x=1&y=2"
    answer = http.get(f"{server.base_url}/redirect", params={"to": target}, allow_redirects=False, timeout=TIMEOUT)
    assert (answer.status_code, answer.headers["Location"]) == (302, target)


@pytest.mark.parametrize("path", ["/", "/tiles/x", "/tiles/1?size=-1", "/tiles/1?size=99999999999", "/token"])
def test_unknown_paths_are_not_found(server: LoopbackServer, http: requests.Session, path: str) -> None:
    assert http.get(server.base_url + path, headers=bearer(server, http), timeout=TIMEOUT).status_code == 404


def test_the_next_requests_fail_and_then_none(server: LoopbackServer, http: requests.Session) -> None:
    server.fail_next(2, status=429, retry_after=7)
    answers = [ask_token(server, http) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [429, 429, 200]
    assert [answer.headers.get("Retry-After") for answer in answers] == ["7", "7", None]
    assert (server.logins, server.token_requests) == (1, 3)


def test_an_answer_can_be_forced_until_taken_back(server: LoopbackServer, http: requests.Session) -> None:
    server.answer_always(400, body={"error": "invalid_scope"})
    assert {ask_token(server, http).json()["error"] for _ in range(3)} == {"invalid_scope"}
    server.answer_always(None)
    assert ask_token(server, http).status_code == 200


def test_faults_of_the_data_service_leave_logins_alone(server: LoopbackServer, http: requests.Session) -> None:
    server.fail_next(1, status=503, at="data")
    headers = bearer(server, http)
    statuses = [http.get(server.data_url(1), headers=headers, timeout=TIMEOUT).status_code for _ in range(2)]
    assert statuses == [503, 200]


def test_faults_can_be_set_before_the_start(http: requests.Session) -> None:
    server = LoopbackServer()
    server.fail_next(1)
    with server:
        assert [ask_token(server, http).status_code for _ in range(2)] == [503, 200]


def test_a_hanging_endpoint_answers_once_it_recovers(server: LoopbackServer, http: requests.Session) -> None:
    server.hang()
    with ThreadPoolExecutor(1) as pool:
        login = pool.submit(ask_token, server, http)
        wait_until(lambda: bool(server._endpoints["token"]._held))
        assert not login.done()
        server.hang(False)
        assert login.result(TIMEOUT).status_code == 200


def test_a_client_that_gave_up_counts_no_login(server: LoopbackServer) -> None:
    server.hang()
    endpoint = server._endpoints["token"]
    with socket.create_connection(("127.0.0.1", endpoint.port)) as client:
        client.sendall(b"POST /token HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        wait_until(lambda: bool(endpoint._held))
    wait_until(lambda: not endpoint._held)
    server.hang(False)
    assert (server.logins, server.token_requests) == (0, 0)


def test_refused_connections_come_back_on_the_same_port(server: LoopbackServer, http: requests.Session) -> None:
    url, headers = server.token_url, bearer(server, http)
    server.refuse_connections()
    for _ in range(2):
        with pytest.raises(requests.ConnectionError):
            ask_token(server, http)
    assert http.get(server.data_url(1), headers=headers, timeout=TIMEOUT).status_code == 200
    server.refuse_connections(False)
    assert server.token_url == url
    assert ask_token(server, http).status_code == 200


def test_a_delay_holds_answers_back(server: LoopbackServer, http: requests.Session) -> None:
    server.delay(0.05)
    start = time.monotonic()
    assert ask_token(server, http).status_code == 200
    assert time.monotonic() - start >= 0.05


def test_the_log_tells_when_what_was_answered(http: requests.Session, clock: FakeClock) -> None:
    with LoopbackServer(clock=clock) as server:
        ask_token(server, http)
        clock.advance(5.0)
        http.get(server.data_url(1, size=9), timeout=TIMEOUT)
    assert server.log == [(1_000.0, "/token", 200), (1_005.0, "/tiles/1?size=9", 401)]


@pytest.mark.slow
def test_sixty_four_keep_alive_clients_are_served_at_once(server: LoopbackServer, http: requests.Session) -> None:
    headers = bearer(server, http)
    all_connected = threading.Barrier(64)

    def download(n: int) -> bool:
        with requests.Session() as own:
            first = own.get(server.data_url(n), headers=headers, timeout=TIMEOUT)
            all_connected.wait(TIMEOUT)
            assert len(server._endpoints["data"]._connections) == 64
            second = own.get(server.data_url(n), headers=headers, timeout=TIMEOUT)
            all_connected.wait(TIMEOUT)
        return first.content == second.content == tile_bytes(n, 1024)

    with ThreadPoolExecutor(64) as pool:
        assert all(pool.map(download, range(64)))


def test_leaving_ends_clients_that_hang(http: requests.Session) -> None:
    with ThreadPoolExecutor(1) as pool:
        with LoopbackServer() as server:
            server.hang()
            login = pool.submit(ask_token, server, http)
            wait_until(lambda: bool(server._endpoints["token"]._held))
        with pytest.raises(requests.ConnectionError):
            login.result(TIMEOUT)


def test_a_stopped_server_says_so() -> None:
    with pytest.raises(RuntimeError, match="with statement"):
        LoopbackServer().hang()


@pytest.mark.parametrize("pieces", [1, 2, 7, 200])
def test_a_request_is_whole_however_it_arrives(pieces: int) -> None:
    message = b"POST /token?a=b HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nk=v&l=%20GET"
    size = -(-len(message) // pieces)
    buffer, found = bytearray(), []
    for start in range(0, len(message), size):
        buffer += message[start : start + size]
        if (request := take_request(buffer)) is not None:
            found.append(request)
    assert found == [Request("POST", "/token?a=b", {"host": "x", "content-length": "9"}, b"k=v&l=%20", True)]
    assert (found[0].path, found[0].query("a", ""), found[0].form()) == ("/token", "b", {"k": "v", "l": " "})
    assert buffer == b"GET"


@pytest.mark.parametrize(
    "message",
    [
        b"nonsense\r\n\r\n",
        b"GET / SPDY/3\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: many\r\n\r\n",
    ],
)
def test_bytes_that_are_no_request_are_an_error(message: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the class is all a caller can use
        take_request(bytearray(message))


def test_an_answer_to_head_has_no_body() -> None:
    assert Response(299, b"body", {"X": "y"}).encode(head_only=True) == (
        b"HTTP/1.1 299 Unknown\r\nContent-Length: 4\r\nX: y\r\n\r\n"
    )


LEAKS = """
    import os, socket, subprocess, sys, threading
    from pathlib import Path

    kept = []

    def test_clean():
        assert "SH_CLIENT_SECRET" not in os.environ

    def test_thread():
        kept.append(threading.Thread(target=threading.Event().wait, daemon=True))
        kept[-1].start()

    def test_process():
        kept.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))

    def test_socket():
        kept.append(socket.socket())

    def test_segment(memory_name):
        Path("/dev/shm", memory_name).touch()

    def test_end():
        kept[1].kill()
        kept[1].wait()
        kept[2].close()
        for path in Path("/dev/shm").glob(f"test-{os.getpid()}-*"):
            path.unlink()
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs Linux's /dev/shm")
def test_the_guard_finds_each_kind_of_leak(tmp_path: Path, child_env: dict[str, str]) -> None:
    here = Path(__file__).parent
    guard = (here / "conftest.py").read_text()
    (tmp_path / "conftest.py").write_text(f"{guard}\n\n_PATIENCE = 0.2\n")  # what is left here never ends by itself
    (tmp_path / "test_leaks.py").write_text(textwrap.dedent(LEAKS))
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {here}\n")
    env = {**child_env, "SH_CLIENT_SECRET": "invented"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-q", str(tmp_path)]
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)
    kinds = [line.split("left behind: ")[1].split()[0] for line in run.stdout.splitlines() if "E   " in line]
    assert kinds == ["thread", "process", "descriptor", "shared"], run.stdout
    assert "6 passed, 4 errors" in run.stdout
