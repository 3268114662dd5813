"""What a task tells before it ends is heard, and a request for what it has not begun reaches it."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from patience import PATIENCE, until

from shpool import AuthenticatedProcessPool
from shpool.submitting import recall, submit_heard
from shpool.talk import is_recalled, tell


def a_token() -> dict[str, Any]:
    return {"access_token": "a-token-for-tests", "expires_at": time.time() + 3600}


def tell_thrice(name: str) -> list[bool]:
    return [tell((name, number)) for number in range(3)]


def take_until_recalled(items: list[int]) -> list[int]:
    tell("begun")
    until(is_recalled)
    return items


def look_whether_recalled() -> bool:
    return is_recalled()


@pytest.mark.parametrize("engine", ["inline", pytest.param("loky", marks=pytest.mark.slow)])
def test_what_a_task_tells_is_heard_before_its_end(engine: str) -> None:
    heard: list[tuple[str, int]] = []
    with AuthenticatedProcessPool(a_token, 1, engine=engine) as pool:
        futures = [submit_heard(pool, heard.append, tell_thrice, name) for name in "ab"]
        assert [future.result(PATIENCE) for future in futures] == [[True] * 3] * 2
        assert heard == [(name, number) for name in "ab" for number in range(3)]


@pytest.mark.slow
def test_a_running_task_can_be_asked_for_what_it_has_not_begun() -> None:
    heard: list[str] = []
    with AuthenticatedProcessPool(a_token, 1) as pool:
        future = submit_heard(pool, heard.append, take_until_recalled, [1, 2])
        until(lambda: heard == ["begun"])
        recall(pool, future)
        assert future.result(PATIENCE) == [1, 2]
        assert not pool.submit(look_whether_recalled).result(PATIENCE)  # it was asked of the other one


@pytest.mark.slow
def test_a_listener_that_fails_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    def fail(value: object) -> None:
        raise ValueError(value)

    with AuthenticatedProcessPool(a_token, 1) as pool:
        assert submit_heard(pool, fail, tell_thrice, "a").result(PATIENCE) == [True] * 3
        assert pool.submit(abs, -1).result(PATIENCE) == 1
    assert "could not be heard" in caplog.text


def test_elsewhere_nobody_listens() -> None:
    heard: list[object] = []
    with ThreadPoolExecutor(1) as pool:
        assert submit_heard(pool, heard.append, tell_thrice, "a").result(PATIENCE) == [False] * 3
        future: Future[bool] = pool.submit(look_whether_recalled)
        recall(pool, future)
        assert not future.result(PATIENCE)
    assert heard == []
