"""Log records of workers arrive in the parent, complete, attributed, and without secrets."""

from __future__ import annotations

import logging
import os
import pickle
import warnings
from typing import TYPE_CHECKING, Any

import pytest

from shpool import AuthenticatedProcessPool, OAuthSession, current_session
from shpool.logs import RelayHandler, deliver

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shpool.testing import LoopbackServer

PATIENCE = 30.0  # s
TOKEN = "invented.token-of-no-provider"

slow = pytest.mark.slow  # worker processes take a quarter of a second to start


class Records(logging.Handler):
    """Keep what arrives."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[Any] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.all.append(record)


@pytest.fixture
def records() -> Iterator[Records]:
    """What the root logger's handlers get."""
    handler = Records()
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield handler
    root.removeHandler(handler)
    root.setLevel(level)


def packed(level: int = logging.WARNING, text: object = "text %s", *args: object, **fields: Any) -> bytes:
    """What a worker sends for a record."""
    sent: list[bytes] = []
    handler = RelayHandler(sent.append, lambda: (TOKEN,))
    handler.handle(logging.LogRecord("some.module", level, __file__, 1, text, args, fields.get("exc_info")))
    [data] = sent
    return data


def test_a_record_arrives_under_its_name_with_worker_and_task(records: Records) -> None:
    deliver(packed(logging.WARNING, "%d of %d", 3, 4), 4711, "fetch")
    [record] = records.all
    assert (record.name, record.levelno, record.getMessage()) == ("some.module", logging.WARNING, "3 of 4")
    assert (record.worker, record.process, record.task) == (4711, 4711, "fetch")


def test_the_parents_levels_decide_what_is_shown(records: Records) -> None:
    deliver(packed(logging.DEBUG), 1, None)
    assert not records.all


def test_a_traceback_travels_as_text(records: Records) -> None:
    try:
        int("x")
    except ValueError as error:
        deliver(packed(exc_info=(ValueError, error, error.__traceback__)), 1, "fetch")
    assert "ValueError: invalid literal" in logging.Formatter().format(records.all[0])


@pytest.mark.parametrize(
    "text",
    [
        f"the token is {TOKEN}",
        "Authorization: Bearer another-invented-token",
        "authorization: bearer another-invented-token",
        "eyJhbGciOiJub25lIn0.eyJzdWIiOiJpbnZlbnRlZCJ9.invented",
    ],
)
def test_tokens_are_masked(records: Records, text: str) -> None:
    deliver(packed(logging.WARNING, "%s!", text), 1, None)
    message = records.all[0].getMessage()
    assert "***" in message
    assert "invented" not in message
    assert "eyJ" not in message


def test_tokens_in_tracebacks_are_masked(records: Records) -> None:
    error = ValueError(f"bad header {TOKEN}")
    deliver(packed(exc_info=(ValueError, error, None)), 1, None)
    text = logging.Formatter().format(records.all[0])
    assert "bad header ***" in text
    assert TOKEN not in text


def test_a_message_of_any_length_is_bounded() -> None:
    assert len(packed(logging.WARNING, "x" * 10_000_000)) < 100_000


def test_a_record_that_cannot_be_formatted_breaks_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    sent: list[bytes] = []
    RelayHandler(sent.append, tuple).handle(logging.LogRecord("x", logging.ERROR, __file__, 1, "%d", ("no",), None))
    assert not sent
    said = capsys.readouterr().err
    assert "--- Logging error ---" in said
    assert "no" not in said.rpartition("Arguments:")[2]


def test_what_cannot_be_sent_is_shown_where_it_was_logged(capsys: pytest.CaptureFixture[str]) -> None:
    """As in a child that a task has forked: the lifeline is its parent's."""

    def closed(_: bytes) -> None:
        raise OSError

    handler = RelayHandler(closed, lambda: (TOKEN,))
    handler.handle(logging.LogRecord("x", logging.WARNING, __file__, 1, "seen %s", (TOKEN,), None))
    handler.handle(logging.LogRecord("x", logging.INFO, __file__, 1, "not by default", (), None))
    assert capsys.readouterr().err == "seen ***\n"


def test_a_handler_that_fails_costs_the_record_only(records: Records) -> None:
    class Failing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise LookupError(record)

    failing = Failing()
    records_logger = logging.getLogger("some.module")
    records_logger.addHandler(failing)
    try:
        deliver(packed(), 1, None)
    finally:
        records_logger.removeHandler(failing)
    deliver(b"no pickle", 1, None)
    deliver(packed(), 1, None)
    assert len(records.all) == 1


def test_a_record_is_plain_data() -> None:
    """So that the parent needs none of the classes that the worker's arguments have."""

    class Local:
        def __str__(self) -> str:
            return "of a class of its own"

    assert pickle.loads(packed(logging.WARNING, "a value %s", Local()))["msg"] == "a value of a class of its own"


# With real workers


def talk(number: int) -> int:
    """Say the number, and the token that must not be said."""
    logging.getLogger("task.module").info("number %d with %s", number, current_session().token.access_token)
    return os.getpid()


def warn(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=1)


class LogsWhenForgotten:
    """Its finalizer logs, wherever the interpreter happens to collect it."""

    def __init__(self) -> None:
        self.me = self

    def __del__(self) -> None:
        logging.getLogger("task.finalizer").warning("forgotten")


def forget_many(size: int) -> bytes:
    for _ in range(1000):
        LogsWhenForgotten()
    return bytes(size)


def session_at(server: LoopbackServer) -> OAuthSession:
    return OAuthSession(server.token_url, server.client_id, server.client_secret)


def of(records: Records, name: str) -> list[Any]:
    return [record for record in records.all if record.name == name]


@slow
def test_records_of_workers_reach_the_parents_handlers(server: LoopbackServer, records: Records) -> None:
    with AuthenticatedProcessPool(session_at(server), 2) as pool:
        pids = [pool.submit(talk, number).result(PATIENCE) for number in range(3)]
    said = of(records, "task.module")
    assert [record.getMessage() for record in said] == [f"number {number} with ***" for number in range(3)]
    assert [record.worker for record in said] == pids
    assert {record.task for record in said} == {"talk"}


@slow
def test_records_come_before_the_result_of_their_task(server: LoopbackServer, records: Records) -> None:
    with AuthenticatedProcessPool(session_at(server), 1) as pool:
        for number in range(20):
            pool.submit(talk, number).result(PATIENCE)
            assert len(of(records, "task.module")) == number + 1


@slow
def test_warnings_of_workers_reach_the_parent(server: LoopbackServer, records: Records) -> None:
    with AuthenticatedProcessPool(session_at(server), 1) as pool:
        pool.submit(warn, "the raster has no overview").result(PATIENCE)
    [record] = of(records, "py.warnings")
    assert "UserWarning: the raster has no overview" in record.getMessage()


@slow
def test_a_level_keeps_the_rest_in_the_worker(server: LoopbackServer, records: Records) -> None:
    with AuthenticatedProcessPool(session_at(server), 1, log_level="WARNING") as pool:
        pool.submit(talk, 1).result(PATIENCE)
        pool.submit(warn, "still").result(PATIENCE)
    assert not of(records, "task.module")
    assert of(records, "py.warnings")


def handlers() -> list[str]:
    return [type(handler).__name__ for handler in logging.getLogger().handlers]


@slow
def test_none_leaves_the_workers_logging_alone(server: LoopbackServer) -> None:
    with AuthenticatedProcessPool(session_at(server), 1, log_level=None) as pool:
        assert "RelayHandler" not in pool.submit(handlers).result(PATIENCE)


@slow
def test_a_finalizer_that_logs_amid_a_write_harms_nothing(server: LoopbackServer, records: Records) -> None:
    with AuthenticatedProcessPool(session_at(server), 1) as pool:
        sizes = [len(result) for result in pool.map(forget_many, [2**20] * 5)]
    assert sizes == [2**20] * 5
    assert of(records, "task.finalizer")


@pytest.mark.parametrize("level", ["LOUD", 1.5, b"INFO"])
def test_a_wrong_level_is_refused(server: LoopbackServer, level: Any) -> None:
    with pytest.raises(ValueError, match="log_level must be one of"):
        AuthenticatedProcessPool(session_at(server), 1, log_level=level)
