"""Parcels, cells and outposts: what a pool has in a process that is not its own."""

from __future__ import annotations

import logging
import math
import os
import pickle
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from patience import PATIENCE, in_time, until
from pool_tasks import begin_and_wait

from shpool.board import CLOSED
from shpool.engines.messages import Kind
from shpool.engines.outpost import Outpost, close_outpost, note_home, open_outpost, outpost_of
from shpool.engines.packing import dump_setup, pack_function
from shpool.engines.parcels import Parcel, TokenCell
from shpool.engines.sealed import Answer, Call
from shpool.engines.setup import WorkerSetup
from shpool.errors import NoSessionError, TokenUnavailableError
from shpool.pickling import dump, load
from shpool.shared import SharedSession, current_session
from shpool.tokens import Posting, Token, boot_time
from shpool.worker import load_error

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CANARY = "canary-token-not-real-77"


def posting(generation: int = 1, lifetime: float = 100.0, text: str = CANARY) -> Posting:
    import time

    return Posting(Token(text, time.time() + lifetime, boot_time() + lifetime, lifetime, generation=generation))


def parcel(number: int = 1, **words: Any) -> Parcel:
    return Parcel.of(posting(number, **words), number)


def call_of(fn: Any, *args: Any, pool: str = "p", is_timed: bool = False, lean: bool = False) -> Call:
    packed = pack_function(fn)
    function = b"" if lean else packed.pickled
    return Call(pool, 5, Kind.CALL, packed.key, function, dump((args, {})), is_timed)


def outpost(pool: str = "p", number: int = 1, **setup: Any) -> Outpost:
    cell = TokenCell()
    cell.take(parcel(number, text=f"{CANARY}-{pool}"))
    return Outpost(pool, dump_setup(WorkerSetup(**setup)), cell, lambda _: None)


def outcome(data: bytes) -> Any:
    answer = Answer.from_bytes(data)
    if answer.kind != Kind.RESULT:
        raise load_error(answer.payload)
    return load(answer.payload)


def my_token() -> str:
    return current_session().token.access_token


# Parcels and cells


def test_neither_a_parcel_nor_a_call_shows_what_it_carries() -> None:
    texts = [repr(parcel()), str([parcel()]), repr(call_of(len, CANARY)), f"{call_of(len, CANARY)}"]
    assert not [text for text in texts if CANARY in text]


def test_a_cell_takes_no_parcel_older_than_its_own() -> None:
    cell = TokenCell()
    for number in (2, 1, 2):
        cell.take(parcel(number))
    assert cell.read()[0] == 2


def test_a_closed_cell_takes_none_at_all_and_holds_nothing() -> None:
    cell = TokenCell()
    cell.take(parcel())
    cell.close()
    cell.take(parcel(2))
    assert cell.read() == (CLOSED, b"")


def deadline_in(cell: TokenCell) -> float:
    token = Posting.from_bytes(cell.read()[1]).token
    assert token is not None
    return token.deadline


@pytest.mark.parametrize("offset", [-1e6, 0.0, 1e6])
def test_a_tokens_time_counts_on_the_clock_where_it_arrives(offset: float) -> None:
    """The sender's boot clock may say anything."""
    cell = TokenCell()
    before = boot_time()
    cell.take(replace(parcel(), sealed=before + offset, remaining=50.0))
    assert before + 50 <= deadline_in(cell) <= boot_time() + 50


def test_an_answers_journey_shortens_the_tokens_time_and_never_lengthens_it() -> None:
    cell = TokenCell()
    asked = boot_time() - 7.0  # the question and its answer took seven seconds
    cell.take(replace(parcel(), sealed=1e6, remaining=50.0, asked=asked))
    assert deadline_in(cell) == pytest.approx(asked + 50)


def test_what_was_learned_of_the_senders_clock_holds_for_parcels_that_come_unasked() -> None:
    cell = TokenCell()
    asked = boot_time() - 7.0
    cell.take(replace(parcel(1), sealed=1e6, asked=asked))
    cell.take(replace(parcel(2), sealed=1e6 + 3.0, remaining=50.0))
    assert deadline_in(cell) == pytest.approx(asked + 3 + 50)


def test_a_parcel_that_waited_has_less_time_left() -> None:
    waited = replace(parcel(), sealed=boot_time() - 30.0, remaining=50.0).resealed()
    assert waited.remaining == pytest.approx(20.0, abs=PATIENCE)
    assert waited.remaining <= 20.0


def test_a_cell_asks_when_it_has_nothing_of_use_and_not_all_the_time() -> None:
    asked: list[float] = []
    cell = TokenCell(asked.append)
    cell.read()
    cell.read()
    assert len(asked) == 1
    cell.take(parcel())
    cell._asked = -1e9
    cell.read()
    assert len(asked) == 1
    cell.take(parcel(2, lifetime=-1.0))
    cell.read()
    assert len(asked) == 2


def test_a_token_that_has_ended_is_not_handed_out() -> None:
    cell = TokenCell()
    cell.take(parcel(lifetime=-1.0))
    with pytest.raises(TokenUnavailableError, match="expired"):
        SharedSession(cell).wait_for_token(0.0)


def test_a_cell_holds_a_token_to_its_end_and_no_longer() -> None:
    cell = TokenCell()
    assert cell.wipe() == -math.inf
    cell.take(parcel(lifetime=50.0))
    assert 0 < cell.wipe() <= 50
    assert CANARY in str(vars(cell))
    cell._deadline = boot_time()
    assert cell.wipe() <= 0
    assert CANARY not in str(vars(cell))
    cell.take(parcel(2))
    assert CANARY in str(cell.read())
    cell._deadline = boot_time()
    assert CANARY not in str(cell.read())
    cell.take(parcel(3, lifetime=-1.0))
    assert CANARY not in str(vars(cell))


# Outposts


def test_a_call_has_its_pools_session_and_nothing_else_has() -> None:
    first, second = outpost("a"), outpost("b")
    assert outcome(first.run(call_of(my_token))) == f"{CANARY}-a"
    assert outcome(second.run(call_of(my_token))) == f"{CANARY}-b"
    with pytest.raises(NoSessionError):
        current_session()


def test_calls_of_two_pools_run_at_once_without_mixing() -> None:
    both = threading.Barrier(2, timeout=PATIENCE)

    def meet_and_tell() -> str:
        both.wait()
        return my_token()

    packed = Call("a", 1, Kind.CALL, b"k" * 16, b"", dump(((), {})), False)
    seen: dict[str, str] = {}

    def run(pool: str) -> None:
        there = outpost(pool)
        there._functions[packed.key] = meet_and_tell
        seen[pool] = outcome(there.run(packed))

    threads = [threading.Thread(target=run, args=(pool,)) for pool in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"a": f"{CANARY}-a", "b": f"{CANARY}-b"}


def token_in_a_thread() -> str:
    seen: list[str] = []

    def look() -> None:
        try:
            seen.append(my_token())
        except NoSessionError:
            seen.append("none")

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return seen[0]


def test_a_tasks_threads_have_the_session_while_there_is_one_pool_only() -> None:
    """With two, nobody can tell whose a thread is, and none is better than a stranger's."""
    first, second = open_outpost(outpost("a")), outpost("b")
    try:
        assert outcome(first.run(call_of(token_in_a_thread))) == f"{CANARY}-a"
        open_outpost(second)
        assert outcome(first.run(call_of(token_in_a_thread))) == "none"
        close_outpost("b")
        assert outcome(first.run(call_of(token_in_a_thread))) == f"{CANARY}-a"
    finally:
        close_outpost("a")
        close_outpost("b")
    with pytest.raises(NoSessionError):
        current_session()


def test_in_the_parents_own_process_threads_do_not_have_it() -> None:
    note_home("home")
    there = open_outpost(outpost("home"))
    try:
        assert outcome(there.run(call_of(my_token))) == f"{CANARY}-home"
        with pytest.raises(NoSessionError):
            current_session()
    finally:
        close_outpost("home")


def test_an_outpost_that_was_opened_twice_is_closed_at_the_second_time() -> None:
    """Two workers in one process share it."""
    open_outpost(outpost("twice"))
    open_outpost(outpost("twice"))
    close_outpost("twice")
    assert outpost_of("twice") is not None
    close_outpost("twice")
    assert outpost_of("twice") is None


def test_a_function_is_unpickled_once_and_asked_for_where_it_lacks() -> None:
    there = outpost()
    assert Answer.from_bytes(there.run(call_of(my_token, lean=True))).kind == Kind.FUNCTION
    assert outcome(there.run(call_of(my_token))) == f"{CANARY}-p"
    assert outcome(there.run(call_of(my_token, lean=True))) == f"{CANARY}-p"


def test_a_timed_call_tells_when_it_begins() -> None:
    begun: list[int] = []
    outpost().run(call_of(my_token, is_timed=True), begun.append)
    outpost().run(call_of(my_token), begun.append)
    assert begun == [5]


def test_an_initializer_that_fails_makes_the_outpost_unfit() -> None:
    def refuse() -> None:
        raise OSError

    answer = Answer.from_bytes(outpost(initializer=refuse).run(call_of(my_token)))
    assert (answer.kind, type(load_error(answer.payload))) == (Kind.UNFIT, OSError)


def test_a_batch_keeps_results_and_errors_apart() -> None:
    packed = pack_function(int)
    there = outpost()
    answer = Answer.from_bytes(
        there.run(Call("p", 1, Kind.BATCH, packed.key, packed.pickled, dump(["1", "x", "3"]), False))
    )
    results, errors = load(answer.payload)
    assert (answer.kind, results, list(errors)) == (Kind.RESULT, [1, None, 3], [1])


def test_closing_undoes_what_opening_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORMER", "before")
    monkeypatch.delenv("NOVEL", raising=False)
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    there = open_outpost(outpost("q", env={"FORMER": "during", "NOVEL": "too"}, log_level=logging.DEBUG))
    assert outcome(there.run(call_of(os.getenv, "FORMER", pool="q"))) == "during"
    session = there.session
    assert session.token.access_token.startswith(CANARY)
    close_outpost("q")
    assert (os.environ["FORMER"], os.environ.get("NOVEL")) == ("before", None)
    assert (root.level, list(root.handlers)) == before
    assert session.known_secrets() == ()
    assert CANARY not in str(vars(session)) + str(vars(there.cell))
    with pytest.raises(TokenUnavailableError, match="sharing has ended"):
        in_time(lambda: session.token)


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> Iterator[logging.Logger]:
    """Prove that the process is left as it was found; return the root logger, which lets warnings pass."""
    monkeypatch.setenv("FORMER", "before")
    monkeypatch.delenv("NOVEL", raising=False)
    root = logging.getLogger()
    before = root.level, list(root.handlers)
    root.setLevel(logging.WARNING)
    try:
        yield root
        assert (os.environ["FORMER"], os.environ.get("NOVEL")) == ("before", None)
        assert (root.level, list(root.handlers)) == (logging.WARNING, before[1])
    finally:
        root.setLevel(before[0])


def begun(pool: str, **setup: Any) -> Outpost:
    there = open_outpost(outpost(pool, **setup))
    assert outcome(there.run(call_of(abs, -1, pool=pool))) == 1
    return there


@pytest.mark.parametrize("order", ["abc", "acb", "bac", "bca", "cab", "cba"])
def test_each_end_leaves_what_those_that_are_still_there_want(untouched: logging.Logger, order: str) -> None:
    """Of a variable, what the latest wants; of the level, what the most curious does."""
    wants = {
        "a": ({"FORMER": "a", "NOVEL": "a"}, logging.INFO),
        "b": ({"FORMER": "b"}, logging.DEBUG),
        "c": ({"NOVEL": "c"}, None),
    }
    for pool, (env, level) in wants.items():
        begun(pool, env=env, log_level=level)
    for number, pool in enumerate(order):
        close_outpost(pool)
        left = [wants[other] for other in sorted(order[number + 1 :])]
        for name, former in (("FORMER", "before"), ("NOVEL", None)):
            assert os.environ.get(name) == [former, *(env[name] for env, _ in left if name in env)][-1]
        assert untouched.level == min([logging.WARNING, *(level for _, level in left if level)])


def test_one_that_is_closed_before_its_first_call_changes_nothing(untouched: logging.Logger) -> None:
    """Such as a call that was on its way in."""
    there = open_outpost(outpost("late", env={"FORMER": "late"}, log_level=logging.DEBUG))
    close_outpost("late")
    with pytest.raises(TokenUnavailableError, match="sharing has ended"):
        there.run(call_of(my_token, pool="late"))
    assert untouched.level == logging.WARNING


def test_one_is_closed_while_its_initializer_runs(untouched: logging.Logger, tmp_path: Path) -> None:
    """Nobody waits for that: least of all the thread in which a cluster's worker answers its scheduler."""
    paths = str(tmp_path / "begun"), str(tmp_path / "cue")
    env = {"FORMER": "slow"}
    there = open_outpost(outpost("slow", initializer=begin_and_wait, initargs=paths, env=env, log_level=logging.DEBUG))
    thread = threading.Thread(target=there.run, args=[call_of(abs, -1, pool="slow")])
    thread.start()
    try:
        until((tmp_path / "begun").exists)
        in_time(close_outpost, "slow")
        assert (os.environ["FORMER"], untouched.level) == ("before", logging.WARNING)
    finally:
        (tmp_path / "cue").touch()
        thread.join()


def test_log_records_of_a_call_come_with_its_answer_and_without_the_token() -> None:
    there = outpost(log_level=logging.INFO)

    def talk() -> None:
        logging.getLogger("tiles").info("with %s", my_token())

    try:
        answer = Answer.from_bytes(there.run(call_of(talk)))
        logging.getLogger("tiles").warning("of nobody's call")
    finally:
        there.close()
    [record] = [pickle.loads(data) for data in answer.records]
    assert record["msg"] == "with ***"
