"""Where the gate bites: the clients of workers, downloads, pools of all kinds, the command line."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import requests
from cli_shell import Shell
from patience import PATIENCE, in_time, until
from stress_gate import Crowd
from test_client import Echo, Holder, login_at

from shpool import AuthenticatedProcessPool, Gate, OAuthSession, SessionSharing, collect_shared_session, current_session
from shpool.auth import BearerAuth
from shpool.client import HTTPClient
from shpool.downloads import download
from shpool.errors import GateInUseError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shpool.gate import GateStats, Ticket
    from shpool.testing import LoopbackServer


def session_at(server: LoopbackServer) -> OAuthSession:
    return OAuthSession(server.token_url, server.client_id, server.client_secret)


def status_by_client(url: str) -> int:
    return current_session().http.get(url).status_code


def status_by_auth(url: str) -> int:
    return requests.get(url, auth=current_session().auth, timeout=30).status_code


def status_by_hand(url: str) -> int:
    with current_session().gate.acquire(cost=2):
        return requests.get(url, headers=current_session().session_headers, timeout=30).status_code


def gate_stats() -> GateStats:
    gate = current_session().gate
    assert isinstance(gate, Gate)
    return gate.stats()


def data_times(server: LoopbackServer) -> list[float]:
    return [at for at, target, _ in server.log if target.startswith("/tiles")]


@pytest.fixture
def gate() -> Iterator[Gate]:
    """A gate of one connection: what asks for a second one before it gives back the first never ends."""
    made = Gate(connections=1)
    yield made
    made.close()


# Pools


@pytest.mark.slow
@pytest.mark.parametrize("ask", [status_by_client, status_by_auth, status_by_hand])
def test_workers_keep_one_rate_between_them(server: LoopbackServer, ask: Any) -> None:
    gate = Gate("20/s", burst=1)
    with AuthenticatedProcessPool(session_at(server), 3, gate=gate) as pool:
        assert set(pool.map(ask, [server.data_url(1)] * 12, chunksize=1)) == {200}
        stats = pool.stats().gate
    times = data_times(server)
    assert times[-1] - times[0] > 10 / 20, "eleven steps of a twentieth of a second, less what the first was late"
    assert (stats.requests, stats.connections, stats.refusals) == (20.0, None, 0)
    assert stats.waits > 0
    gate.close()


@pytest.mark.slow
def test_a_refusal_met_by_one_worker_is_known_to_all(server: LoopbackServer) -> None:
    """Without any setting."""
    with AuthenticatedProcessPool(session_at(server), 2) as pool:
        server.fail_next(1, 429, retry_after=100, at="data")
        assert pool.submit(status_by_auth, server.data_url(1)).result(PATIENCE) == 429
        assert all(stats.paused_for > 30 for stats in pool.map(gate_stats_of, range(6), chunksize=1))
        assert pool.stats().gate.pauses == 1


def gate_stats_of(_: int) -> GateStats:
    return gate_stats()


@pytest.mark.slow
def test_two_pools_with_one_gate_keep_one_limit(server: LoopbackServer, memory_name: str) -> None:
    session = session_at(server)
    with (
        AuthenticatedProcessPool(session, 1, gate=Gate("20/s", burst=1, name=memory_name)) as first,
        AuthenticatedProcessPool(session, 1, gate=Gate("20/s", burst=1, name=memory_name)) as second,
    ):
        futures = [pool.submit(status_by_client, server.data_url(1)) for _ in range(5) for pool in (first, second)]
        assert {future.result(PATIENCE) for future in futures} == {200}
        assert first.stats().gate.waits == second.stats().gate.waits > 0
    times = data_times(server)
    assert times[-1] - times[0] > 8 / 20


@pytest.mark.parametrize("name", [None, "given"])
def test_a_pool_keeps_the_gate_it_was_given_when_its_maker_closes_it(
    server: LoopbackServer, memory_name: str, name: str | None
) -> None:
    """Workers that are lost later must still be replaced by ones behind the same gate."""
    gate = Gate("100/s", connections=2, name=name and memory_name)
    with AuthenticatedProcessPool(session_at(server), 1, gate=gate, retries=0) as pool:
        former = pool.submit(os.getpid).result(PATIENCE)
        gate.close()
        os.kill(former, signal.SIGKILL)
        until(lambda: pool.stats().workers_lost)
        asked = pool.submit(gate_stats)
        if wait([asked], PATIENCE).not_done:
            pool.terminate()  # which would never end by itself
        stats = asked.result()
        assert (stats.requests, stats.connections) == (100.0, 2)
        if name:
            with pytest.raises(GateInUseError):
                Gate("5/s", name=memory_name)
    if name:
        Gate("5/s", name=memory_name).close()


def test_a_gate_that_is_closed_before_its_pool_starts_holds_all_the_same(server: LoopbackServer, gate: Gate) -> None:
    pool = AuthenticatedProcessPool(session_at(server), engine="inline", gate=gate)
    gate.close()
    with pytest.raises(ValueError, match="the gate is closed"):
        gate.acquire()
    with pool:
        assert pool.submit(gate_stats).result().connections == 1


def test_the_inline_engine_goes_through_the_gate_too(server: LoopbackServer, gate: Gate) -> None:
    with AuthenticatedProcessPool(session_at(server), engine="inline", gate=gate) as pool:
        assert in_time(lambda: list(pool.map(status_by_client, [server.data_url(1)] * 3))) == [200] * 3
        assert pool.submit(gate_stats).result().connections == 1


def test_a_preset_is_named(server: LoopbackServer) -> None:
    with AuthenticatedProcessPool(session_at(server), engine="inline", gate="cdse") as pool:
        stats = pool.stats().gate
    assert (stats.requests, stats.units, stats.connections) == (5.0, 5.0, 4)


def test_what_is_no_gate_is_refused(server: LoopbackServer) -> None:
    with pytest.raises(ValueError, match="no gate 'banana'; there are cdse, sentinelhub"):
        AuthenticatedProcessPool(session_at(server), gate="banana")
    with pytest.raises(TypeError, match="gate must be a Gate"):
        AuthenticatedProcessPool(session_at(server), gate=5)  # type: ignore[arg-type]  # the mistake that is tested
    closed = Gate()
    closed.close()
    with pytest.raises(ValueError, match="the gate is closed; make a new one"):
        AuthenticatedProcessPool(session_at(server), gate=closed)


def test_a_collected_session_has_a_gate_of_its_own(server: LoopbackServer, memory_name: str) -> None:
    with SessionSharing(session_at(server), memory_name=memory_name):
        session = collect_shared_session(memory_name)
        assert session.gate is session.gate
        assert session.http.get(server.data_url(1)).status_code == 200
        assert isinstance(session.gate, Gate)
        assert session.gate.stats().requests is None


def test_by_hand_too_a_number_in_retry_after_counts_what_it_does_at_the_provider(server: LoopbackServer) -> None:
    session = OAuthSession(server.token_url, server.client_id, server.client_secret, retry_after_unit="ms")
    with AuthenticatedProcessPool(session, engine="inline") as pool:
        assert 1.0 < pool.submit(paused_by_hand).result() < 3.5


def paused_by_hand() -> float:
    with current_session().gate.acquire() as ticket:
        ticket.heed(429, {"Retry-After": "3500"})
    return gate_stats().paused_for


# The client


def test_a_slot_is_given_back_when_the_answer_is_read(server: LoopbackServer, gate: Gate) -> None:
    with HTTPClient(Holder(login_at(server)), gate=gate) as http:
        assert in_time(http.get, server.data_url(1)).status_code == 200
        answer = in_time(http.get, server.data_url(1, 100_000), stream=True)
        assert gate.stats().connected == 1
        assert len(answer.content) == 100_000
        assert gate.stats().connected == 0
        with in_time(http.get, server.data_url(1, 100_000), stream=True):
            assert gate.stats().connected == 1
        assert gate.stats().connected == 0


def test_an_auth_object_gives_its_slot_back_too(server: LoopbackServer, gate: Gate) -> None:
    auth = BearerAuth(Holder(login_at(server)), gate)
    assert in_time(requests.get, server.data_url(1), auth=auth, timeout=30).status_code == 200
    assert gate.stats().connected == 0
    with in_time(requests.get, server.data_url(1, 100_000), auth=auth, timeout=30, stream=True):
        assert gate.stats().connected == 1
    assert gate.stats().connected == 0


@pytest.mark.parametrize("path", ["/redirect", "/refused"])
def test_a_client_with_an_auth_object_waits_for_no_slot_of_its_own(path: str, gate: Gate) -> None:
    echo, holder = Echo("invented-b"), Holder("invented-b" if path == "/redirect" else "invented-a", "invented-b")
    echo.redirect_to = "/target"
    with echo.running() as url, HTTPClient(holder, gate=gate) as http:
        assert in_time(http.get, url + path, auth=BearerAuth(holder, gate)).status_code == 200
    assert len(echo.seen) == 2
    assert gate.stats().connected == 0


@pytest.mark.parametrize("kind", ["client", "auth"])
def test_redirected_requests_keep_the_limit_of_connections(server: LoopbackServer, gate: Gate, kind: str) -> None:
    crowd, holder = Crowd(server, 0.01), Holder(login_at(server))
    url = f"{server.base_url}/redirect?to={server.data_url(1)}"

    def ask() -> None:
        with HTTPClient(holder, gate=gate) as http:
            get, auth = (http.get, None) if kind == "client" else (requests.get, BearerAuth(holder, gate))
            for _ in range(3):
                assert get(url, auth=auth, timeout=30).status_code == 200

    with ThreadPoolExecutor(4) as threads:
        futures = [threads.submit(ask) for _ in range(4)]
        in_time(lambda: [future.result() for future in futures])
    assert (crowd.served, crowd.most) == (24, 1)
    assert gate.stats().connected == 0


@pytest.mark.parametrize("kind", ["client", "auth"])
def test_a_refusal_after_a_redirect_is_heeded(kind: str) -> None:
    echo, holder, gate = Echo("invented-a"), Holder("invented-a"), Gate()
    echo.redirect_to, echo.failures = "/target", [302, 429]
    with echo.running() as url, HTTPClient(holder, gate=gate) as http:
        get, auth = (http.get, None) if kind == "client" else (requests.get, BearerAuth(holder, gate))
        answer = in_time(get, f"{url}/redirect", auth=auth, timeout=30)
    assert answer.status_code == (200 if kind == "client" else 429), "with an auth object that is the caller's"
    assert gate.stats().refusals == 1
    gate.close()


@pytest.mark.parametrize("kind", ["client", "auth"])
def test_a_streamed_answer_that_is_forgotten_gives_its_slot_back_at_once(
    server: LoopbackServer, gate: Gate, kind: str
) -> None:
    """Not when the cycle collector comes by: the next request of the same task would wait for it."""
    holder, url = Holder(login_at(server)), server.data_url(1, 100_000)
    gc.disable()
    try:
        with HTTPClient(holder, gate=gate) as http, requests.Session() as plain:
            get = http.get if kind == "client" else plain.get
            auth = None if kind == "client" else BearerAuth(holder, gate)
            for _ in range(3):
                assert in_time(lambda: get(url, auth=auth, timeout=30, stream=True).status_code) == 200
                assert gate.stats().connected == 0
    finally:
        gc.enable()


def test_a_request_with_both_goes_through_once(server: LoopbackServer, gate: Gate) -> None:
    holder = Holder(login_at(server))
    with HTTPClient(holder, gate=gate) as http:
        assert in_time(http.get, server.data_url(1), auth=BearerAuth(holder, gate)).status_code == 200
    assert gate.stats().connected == 0


@pytest.mark.parametrize("kind", ["client", "auth"])
def test_a_refused_token_costs_a_second_ticket_and_no_more_slots(kind: str, gate: Gate) -> None:
    echo, holder = Echo("invented-b"), Holder("invented-a", "invented-b")
    with echo.running() as url, HTTPClient(holder, gate=gate) as http, requests.Session() as plain:
        get = http.get if kind == "client" else plain.get
        auth = None if kind == "client" else BearerAuth(holder, gate)
        assert in_time(get, url, auth=auth, timeout=30).status_code == 200
    assert len(echo.seen) == 2
    assert gate.stats().connected == 0


def test_a_request_that_fails_gives_its_slot_back(server: LoopbackServer, gate: Gate) -> None:
    holder = Holder(login_at(server))
    server.refuse_connections(at="data")
    with HTTPClient(holder, gate=gate) as http:
        http.get_adapter("http://").max_retries.total = 0  # type: ignore[attr-defined]  # an HTTPAdapter
        with pytest.raises(requests.ConnectionError):
            in_time(http.get, server.data_url(1))
    assert gate.stats().connected == 0


def test_a_request_that_fails_with_an_auth_object_keeps_no_slot_beyond_its_task(server: LoopbackServer) -> None:
    """Nobody tells an auth object that its request has failed, and the error holds the request."""
    gate = Gate(connections=1)
    server.refuse_connections(at="data")
    with AuthenticatedProcessPool(session_at(server), 1, gate=gate) as pool:
        for _ in range(2):
            with pytest.raises(requests.ConnectionError) as caught:
                pool.submit(fail_twice, server.data_url(1)).result(PATIENCE)
            assert caught.value.request is not None
            assert "Authorization" not in caught.value.request.headers, "the error came home without the token"
            assert gate.stats().connected == 0
    gate.close()


def fail_twice(url: str) -> int:
    with contextlib.suppress(requests.ConnectionError):
        status_by_auth(url)
    return status_by_auth(url)


@pytest.mark.slow
def test_each_attempt_goes_through_the_gate_and_the_first_refusal_is_heeded_at_once(server: LoopbackServer) -> None:
    gate = Gate("100/s", burst=1)
    server.fail_next(2, 429, retry_after=1, at="data")
    with HTTPClient(Holder(login_at(server)), gate=gate) as http:
        assert in_time(http.get, server.data_url(1)).status_code == 200
    stats = gate.stats()
    assert (stats.pauses, stats.refusals) == (2, 2)
    first, second, third = data_times(server)
    assert second - first >= 1
    assert third - second >= 1
    gate.close()


@pytest.mark.slow
def test_no_slot_is_held_while_a_request_waits_for_its_next_attempt(server: LoopbackServer, gate: Gate) -> None:
    server.fail_next(1, 503, retry_after=2, at="data")
    with HTTPClient(Holder(login_at(server)), gate=gate) as http:
        thread = threading.Thread(target=http.get, args=[server.data_url(1)])
        thread.start()
        until(lambda: gate.stats().pauses and not gate.stats().connected)
        assert len(data_times(server)) == 1, "the next attempt has not been sent yet"
        thread.join()


def test_the_client_counts_what_the_provider_counts(server: LoopbackServer, gate: Gate) -> None:
    server.fail_next(1, 429, retry_after=100, at="data")
    with HTTPClient(Holder(login_at(server)), "ms", gate) as http:
        assert in_time(http.get, server.data_url(1)).status_code == 200


def test_an_auth_object_counts_what_the_provider_counts(server: LoopbackServer, gate: Gate) -> None:
    server.fail_next(1, 429, retry_after=100, at="data")
    auth = BearerAuth(Holder(login_at(server)), gate, "ms")
    assert in_time(requests.get, server.data_url(1), auth=auth, timeout=30).status_code == 429
    assert in_time(requests.get, server.data_url(1), auth=auth, timeout=30).status_code == 200


class LongGate(Gate):
    """A gate in which each wait outlives the token."""

    def __init__(self, holder: Holder) -> None:
        super().__init__()
        self._holder = holder

    def acquire(self, cost: float = 1.0) -> Ticket:
        self._holder.token = self._holder._next(self._holder.token.generation + 1)
        return super().acquire(cost)


def test_each_attempt_carries_the_token_of_the_moment_after_its_wait() -> None:
    holder, echo = Holder("invented-a", "invented-b", "invented-c"), Echo("invented-c")
    echo.failures = [503]
    with contextlib.closing(LongGate(holder)) as gate, HTTPClient(holder, gate=gate) as http, echo.running() as url:
        answer = in_time(http.get, url)
    assert answer.status_code == 200
    assert [bearer for _, bearer, _ in echo.seen] == ["Bearer invented-b", "Bearer invented-c"]
    assert "Authorization" not in answer.request.headers
    assert holder.reports == []


@pytest.mark.parametrize("kind", ["client", "auth"])
def test_a_refused_token_that_was_renewed_in_the_gate_is_reported_as_what_it_was(kind: str) -> None:
    texts = [f"invented-{letter}" for letter in "abcde"]
    holder, echo = Holder(*texts), Echo("invented-d")
    with contextlib.closing(LongGate(holder)) as gate, HTTPClient(holder, gate=gate) as http, echo.running() as url:
        if kind == "client":
            answer = in_time(http.get, url)
        else:
            answer = in_time(requests.get, url, auth=BearerAuth(holder, gate), timeout=30)
    assert answer.status_code == 200
    assert [bearer for _, bearer, _ in echo.seen] == ["Bearer invented-b", "Bearer invented-d"]
    assert holder.reports == [2]


def test_with_an_auth_object_each_redirect_carries_the_token_of_the_moment_after_its_wait() -> None:
    holder, echo = Holder(*[f"invented-{letter}" for letter in "abcd"]), Echo("invented-c", "invented-d")
    echo.redirect_to = "/target"
    with contextlib.closing(LongGate(holder)) as gate, echo.running() as url, requests.Session() as http:
        auth = BearerAuth(holder, gate)
        answer = in_time(http.get, f"{url}/redirect", auth=auth, allow_redirects=False)
        assert answer.next is not None
        assert holder.token.generation == 2, "a redirect that is not followed has no wait"
        assert in_time(http.send, answer.next, timeout=30).status_code == 200
    assert [bearer for _, bearer, _ in echo.seen] == ["Bearer invented-b", "Bearer invented-c"]


def test_a_redirect_to_another_origin_needs_no_leave() -> None:
    first, second, holder = Echo("invented-b"), Echo(), Holder("invented-a", "invented-b")
    with first.running() as url, second.running() as elsewhere, contextlib.closing(LongGate(holder)) as gate:
        first.redirect_to = f"{elsewhere}/target"
        auth = BearerAuth(holder, gate)
        assert in_time(requests.get, f"{url}/redirect", auth=auth, timeout=30).status_code == 401
    assert [bearer for _, bearer, _ in second.seen] == [None]
    assert holder.token.generation == 2


def test_what_goes_without_the_token_needs_no_leave(gate: Gate) -> None:
    taken = gate.acquire()
    echo = Echo()
    with echo.running() as url, HTTPClient(Holder("invented-a", allowed_hosts=("api.example",)), gate=gate) as http:
        assert in_time(http.get, url).status_code == 401
    assert [bearer for _, bearer, _ in echo.seen] == [None]
    taken.release()


# Downloads


@pytest.mark.slow
def test_downloads_keep_the_limits(server: LoopbackServer, tmp_path: Path) -> None:
    gate = Gate("1000/s", "100/s", connections=2)
    url = server.put_file("dear.bin", b"x" * 1000, {"X-ProcessingUnits-Spent": "20"})
    urls = [f"{url}?{number}" for number in range(6)]
    with AuthenticatedProcessPool(session_at(server), 2, gate=gate) as pool:
        items = [{"url": each, "path": f"{number}.bin"} for number, each in enumerate(urls)]
        results = list(download(pool, items, tmp_path / "got"))
    assert {result.status for result in results} == {"done"}
    stats = gate.stats()
    assert stats.connected == 0
    assert stats.waits > 0
    times = [at for at, target, _ in server.log if target.startswith("/files")]
    assert times[-1] - times[0] > 3 * 0.2, "what two connections at a time cost in units is waited for"
    gate.close()


@pytest.mark.slow
def test_a_download_that_is_refused_pauses_the_account(server: LoopbackServer, tmp_path: Path) -> None:
    server.fail_next(1, 429, retry_after=1, at="data")
    with AuthenticatedProcessPool(session_at(server), 1) as pool:
        results = list(download(pool, [server.data_url(number) for number in range(5)], tmp_path / "got"))
        assert pool.stats().gate.pauses >= 1
    assert {result.status for result in results} == {"done"}


@pytest.mark.slow
def test_downloads_count_what_the_provider_counts(server: LoopbackServer, tmp_path: Path) -> None:
    server.fail_next(1, 429, retry_after=500, at="data")
    session = OAuthSession(server.token_url, server.client_id, server.client_secret, retry_after_unit="ms")
    with AuthenticatedProcessPool(session, 1) as pool:
        results = in_time(lambda: list(download(pool, [server.data_url(1)], tmp_path / "got")))
        assert pool.stats().gate.pauses == 1
    assert [result.status for result in results] == ["done"]


@pytest.mark.slow
def test_files_that_are_redirected_give_their_slots_back(server: LoopbackServer, tmp_path: Path) -> None:
    gate = Gate(connections=1)
    public = server.put_file("free.bin", b"free", public=True).replace("127.0.0.1", "localhost")
    urls = [f"{server.base_url}/redirect?to={public}?{number}" for number in range(3)]
    urls += [f"{server.base_url}/redirect?to={server.data_url(number)}" for number in range(3)]
    with AuthenticatedProcessPool(session_at(server), 1, gate=gate) as pool:
        items = [{"url": each, "path": f"{number}.bin"} for number, each in enumerate(urls)]
        results = in_time(lambda: list(download(pool, items, tmp_path / "got")))
    assert {result.status for result in results} == {"done"}
    assert gate.stats().connected == 0
    gate.close()


# The command line


@pytest.fixture
def shell(tmp_path: Path, child_env: dict[str, str]) -> Shell:
    return Shell(tmp_path, child_env)


_TASK = """
from shpool import current_session


def ask(url):
    return current_session().http.get(url).status_code
"""


@pytest.mark.slow
def test_a_run_keeps_the_limits_and_tells_what_was_waited(shell: Shell, server: LoopbackServer) -> None:
    shell.write("task.py", _TASK)
    shell.write("urls.txt", f"{server.data_url(1)}\n" * 8)
    limits = ["--gate", "cdse", "--rate", "20/s", "--units", "1000/min", "--journal", "run.db", "--key", "n"]
    shell.write("urls.jsonl", "".join(json.dumps({"url": server.data_url(n), "n": n}) + "\n" for n in range(8)))
    shell.write("task.py", _TASK.replace("(url)", "(url, n)", 1))
    done = shell.run("run", "task.py:ask", "urls.jsonl", "-w", "2", *limits, *shell.log_in_at(server))
    assert done.returncode == 0, done.stderr
    times = data_times(server)
    assert times[-1] - times[0] > 6 / 20
    status = json.loads(shell.run("status", "run.db", "--json").stdout)
    assert status["waits"] > 0
    assert status["waited"] > 0


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--rate", "banana", "number a time, such as '300/min'"),
        ("--rate", "0/min", "more than 0"),
        ("--rate", "-5/s", "number a time"),
        ("--units", "300", "number a time"),
        ("--connections", "0", "at least 1"),
        ("--connections", "-4", "at least 1"),
        ("--gate", "atlantis", "no gate 'atlantis'; there are cdse, sentinelhub"),
    ],
)
def test_wrong_limits_are_bad_usage_and_nothing_runs(
    shell: Shell, server: LoopbackServer, option: str, value: str, words: str
) -> None:
    shell.write("task.py", _TASK)
    shell.write("urls.txt", f"{server.data_url(1)}\n")
    done = shell.run("run", "task.py:ask", "urls.txt", option, value, *shell.log_in_at(server))
    assert done.returncode == 2
    error, hint = done.stderr.splitlines()
    assert error.startswith("error:")
    assert words in error
    assert hint.startswith("hint:")
    assert server.requests == 0
