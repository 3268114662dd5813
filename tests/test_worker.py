from __future__ import annotations

import copyreg
import errno
import pickle
import threading
import traceback
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
from pool_tasks import (
    ExitsOnLoad,
    FailsWhereError,
    KeywordOnlyError,
    LoadsHereOnly,
    Unpicklable,
    add,
    double,
    echo,
    fail,
    fail_at,
    leave,
    raise_keyword_only,
    return_unpicklable_at,
    stop_iteration_at,
)

from shpool import current_session
from shpool.errors import LoginError, NoSessionError, UnpicklableError
from shpool.pickling import dump, load
from shpool.retry import is_retryable
from shpool.worker import WorkerTraceback, call, call_each, dump_each, dump_error, load_error, shortened

if TYPE_CHECKING:
    from collections.abc import Callable


def raised_by(fn: Callable[..., Any], *args: object) -> BaseException:
    """Return the error a guarded call would hand to the parent."""
    done, data = call(fn, args, {})
    assert not done
    return load_error(bytes(data))


def test_outside_a_worker_there_is_no_session() -> None:
    with pytest.raises(NoSessionError, match=r"inside a worker.*collect_shared_session"):
        current_session()


def test_a_call_returns_its_pickled_result() -> None:
    done, data = call(add, (2,), {"second": 3})
    assert (done, load(bytes(data))) == (True, 5)


def test_an_error_has_the_workers_traceback_as_its_cause() -> None:
    error = raised_by(fail, 7)
    assert isinstance(error, ValueError)
    assert isinstance(error.__cause__, WorkerTraceback)
    text = "".join(traceback.format_exception(error))
    assert "pool_tasks.py" in text
    assert "in fail" in text
    assert "shpool/worker.py" not in text


def test_an_errors_own_cause_is_in_the_text() -> None:
    def translate() -> NoReturn:
        try:
            fail(1)
        except ValueError as exc:
            raise LookupError("translated") from exc

    error = raised_by(translate)
    assert "bad number 1" in str(error.__cause__)
    assert "direct cause" in str(error.__cause__)


def test_an_error_keeps_its_attributes() -> None:
    error = load_error(dump_error(LoginError("https://login.invalid", "busy", 503, 2.0)))
    assert isinstance(error, LoginError)
    assert (error.status, error.retry_after) == (503, 2.0)


def test_an_error_with_keyword_only_arguments_arrives() -> None:
    error = raised_by(raise_keyword_only)
    assert isinstance(error, KeywordOnlyError)
    assert (str(error), error.request) == ("no such page", "GET /")
    assert "raise_keyword_only" in str(error.__cause__)


class ApiError(ConnectionError):
    """As those of many a client: what it is made of is not what it shows."""

    def __init__(self, code: int, words: str) -> None:
        super().__init__(f"{code}: {words}")
        self.code = code


class FileApiError(OSError):
    def __init__(self, path: str) -> None:
        super().__init__(errno.ENOENT, "no such tile", path)


def test_an_error_whose_init_wants_other_arguments_arrives() -> None:
    error = load_error(dump_error(ApiError(503, "try again")))
    assert isinstance(error, ApiError)
    assert (str(error), error.code, error.args) == ("503: try again", 503, ("503: try again",))
    assert is_retryable(error)


def test_an_error_of_the_system_keeps_its_number_and_its_path() -> None:
    error = load_error(dump_error(FileApiError("tile.tif")))
    assert isinstance(error, FileApiError)
    assert (error.errno, error.filename, str(error)) == (
        errno.ENOENT,
        "tile.tif",
        f"[Errno {errno.ENOENT}] no such tile: 'tile.tif'",
    )


@pytest.mark.parametrize(("kind", "is_temporary"), [(ConnectionError, True), (ValueError, False)])
def test_an_error_that_is_replaced_is_retried_like_the_one_it_was(kind: type[Exception], is_temporary: object) -> None:
    error = load_error(dump_error(kind(threading.Lock())))
    assert isinstance(error, UnpicklableError)
    assert is_retryable(error) is is_temporary


def test_an_error_that_holds_what_cannot_travel_is_replaced() -> None:
    error = load_error(dump_error(ValueError(threading.Lock())))
    assert isinstance(error, UnpicklableError)
    assert "ValueError" in error.text


class Mute(Exception):  # noqa: N818 - its name is not the point
    def __str__(self) -> str:
        raise RuntimeError("no words")

    def __reduce__(self) -> NoReturn:
        raise RuntimeError("no pickle")


def test_an_error_without_words_is_replaced_too() -> None:
    error = load_error(dump_error(Mute()))
    assert isinstance(error, UnpicklableError)
    assert "Mute: <Mute>" in error.text


def test_an_error_that_the_parent_cannot_unpickle_is_replaced_and_named() -> None:
    _, text = load(dump_error(FailsWhereError("only here")))
    error = load_error(pickle.dumps((b"no pickle", text)))
    assert isinstance(error, UnpicklableError)
    assert "FailsWhereError: only here" in error.text


def test_an_error_whose_unpickling_asks_to_exit_is_replaced() -> None:
    error = load_error(pickle.dumps((pickle.dumps(ExitsOnLoad()), "Traceback\nAwkwardError: x\n")))
    assert isinstance(error, UnpicklableError)
    assert error.text == "AwkwardError: x"


def test_what_is_no_error_once_unpickled_is_replaced() -> None:
    error = load_error(pickle.dumps((pickle.dumps("a text"), "Traceback\n")))
    assert isinstance(error, UnpicklableError)
    assert "a text" in error.text


def test_system_exit_does_not_leave_the_call() -> None:
    error = raised_by(leave, 3)
    assert isinstance(error, SystemExit)
    assert error.code == 3


@pytest.mark.parametrize(("fn", "text"), [(lambda: leave(3), "3"), (b"\xff".decode, "invalid start byte")])
def test_reducers_that_skip_init_do_not_count(
    fn: Callable[[], object], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``import distributed`` installs them; they would also send frames along."""
    pickling = pytest.importorskip("tblib.pickling_support")
    for kind in (SystemExit, UnicodeDecodeError):
        monkeypatch.setitem(copyreg.dispatch_table, kind, pickling.pickle_exception)
    error = raised_by(fn)
    assert text in str(getattr(error, "code", error))
    assert error.__traceback__ is None


@pytest.mark.parametrize("value", [Unpicklable(), threading.Lock()])
def test_a_result_that_cannot_be_pickled_is_an_error(value: object) -> None:
    error = raised_by(lambda: value)
    assert isinstance(error, UnpicklableError)
    assert error.what == "result"
    assert type(value).__name__ in error.text


def test_each_item_has_a_result_or_an_error() -> None:
    results, errors = call_each(lambda number: fail_at(number, 2), range(5), star=False)
    assert results == [0, 1, None, 3, 4]
    assert list(errors) == [2]
    assert str(load_error(errors[2])) == "bad number 2"


def test_a_batch_of_argument_tuples_is_unpacked() -> None:
    assert call_each(add, [(1, 2), (3, 4)], star=True) == ([3, 7], {})


def test_an_empty_batch_has_no_results() -> None:
    assert call_each(double, [], star=False) == ([], {})


@pytest.mark.parametrize("bad", [0, 2, 4])
def test_stop_iteration_of_a_function_ends_one_call_and_not_the_batch(bad: int) -> None:
    results, errors = call_each(lambda number: stop_iteration_at(number, bad), range(5), star=False)
    assert results == [None if number == bad else number for number in range(5)]
    assert list(errors) == [bad]
    assert isinstance(load_error(errors[bad]), RuntimeError)


def test_every_item_of_a_batch_may_fail() -> None:
    results, errors = call_each(fail, range(3), star=False)
    assert results == [None] * 3
    assert [str(load_error(errors[index])) for index in range(3)] == ["bad number 0", "bad number 1", "bad number 2"]


def test_one_unpicklable_result_of_a_batch_spoils_no_other() -> None:
    outcome = call_each(lambda number: return_unpicklable_at(number, 1), range(3), star=False)
    results, errors = load(bytes(dump_each(*outcome)))
    assert results == [0, None, 2]
    error = load_error(errors[1])
    assert isinstance(error, UnpicklableError)
    assert error.what == "result"


def test_long_texts_are_cut_and_nothing_is_raised() -> None:
    assert len(shortened("x" * 10_000)) == 300
    assert shortened(Mute(), str) == "<Mute>"


def test_a_value_that_loads_nowhere_else_arrives_where_it_was_made() -> None:
    """The fixture itself: the tests of the parent's side rest on it."""
    assert isinstance(load(dump(echo(LoadsHereOnly()))), FailsWhereError)
