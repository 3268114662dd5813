from __future__ import annotations

import contextlib
import functools
import os
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from patience import PATIENCE
from pool_tasks import add, double, fail, functions_held

from shpool.engines.keeping import key_of
from shpool.engines.lifeline import Lifeline
from shpool.engines.messages import HEADER, Kind, Message, MessageBuffer, encode
from shpool.engines.serve import serve
from shpool.errors import UnpicklableError
from shpool.pickling import dump, load
from shpool.worker import load_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KEY = key_of(b"one", serves_many=False)
OTHER_KEY = key_of(b"another", serves_many=False)


class Parent:
    """The parent's end of a lifeline whose worker is a thread of the test."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self._incoming = MessageBuffer()
        self._ready: list[Message] = []

    def send(self, *data: bytes) -> None:
        self.end.sendall(b"".join(data))

    def receive(self) -> Message:
        while not self._ready:
            data = self.end.recv(65536)
            assert data, "the worker has closed its end"
            self._ready.extend(self._incoming.feed(data))
        return self._ready.pop(0)

    def call(self, number: int, *args: object, key: bytes = KEY) -> Message:
        self.send(encode(Kind.CALL, number, dump((args, {})), key=key))
        return self.receive()


def function(fn: Callable[..., Any], key: bytes = KEY) -> bytes:
    return encode(Kind.FUNCTION, payload=dump(fn), key=key)


@pytest.fixture
def parent() -> Iterator[Parent]:
    """Run the serve loop in a thread; it must end once it is told to, or its parent has gone."""
    ours, theirs = socket.socketpair()
    ours.settimeout(30)
    recalled, recall = os.pipe()
    lifeline = Lifeline(theirs, recalled)

    def work() -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            serve(lifeline)

    worker = threading.Thread(target=work)
    worker.start()
    yield Parent(ours)
    ours.close()
    worker.join(30)
    assert not worker.is_alive()
    theirs.close()
    os.close(recalled)
    os.close(recall)


def test_a_call_is_answered_with_its_number_and_time(parent: Parent) -> None:
    parent.send(function(add))
    began = time.monotonic()
    answer = parent.call(41, 2, 3)
    assert (answer.kind, answer.number, load(answer.payload)) == (Kind.RESULT, 41, 5)
    assert 0 <= answer.seconds <= time.monotonic() - began


def test_a_function_is_remembered_under_its_key(parent: Parent) -> None:
    parent.send(function(double), function(fail, OTHER_KEY))
    assert load(parent.call(1, 4).payload) == 8
    error = parent.call(2, 4, key=OTHER_KEY)
    assert error.kind == Kind.ERROR
    assert str(load_error(bytes(error.payload))) == "bad number 4"
    assert load(parent.call(3, 5).payload) == 10


def test_forget_drops_a_function(parent: Parent) -> None:
    parent.send(function(double), function(functions_held, OTHER_KEY))
    assert load(parent.call(1, key=OTHER_KEY).payload) == 2
    parent.send(encode(Kind.FORGET, key=KEY))
    assert load(parent.call(2, key=OTHER_KEY).payload) == 1


class Remembering:
    """Keeps what it is called with."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def see(self, number: int) -> int:
        self.seen.append(number)
        return len(self.seen)


def _counting_closure() -> Callable[[int], int]:
    counting = Remembering()
    return lambda number: counting.see(number)  # noqa: PLW0108 - a closure is the point


@pytest.mark.parametrize(
    "fn", [Remembering().see, functools.partial(Remembering.see, Remembering()), _counting_closure()]
)
def test_no_call_meets_what_another_one_has_left_in_its_function(parent: Parent, fn: Callable[..., Any]) -> None:
    """As with the standard library's executor, and with loky."""
    parent.send(function(fn))
    assert [load(parent.call(number, number).payload) for number in range(3)] == [1, 1, 1]


def test_a_function_that_was_never_sent_is_an_error_of_the_call(parent: Parent) -> None:
    error = load_error(bytes(parent.call(1).payload))
    assert isinstance(error, UnpicklableError)
    assert error.what == "function"


def test_a_function_that_cannot_be_unpickled_is_an_error_of_each_call(parent: Parent) -> None:
    parent.send(encode(Kind.FUNCTION, payload=b"no pickle", key=KEY))
    for number in (1, 2):
        assert isinstance(load_error(bytes(parent.call(number).payload)), UnpicklableError)


def test_arguments_that_cannot_be_unpickled_are_an_error_of_the_call(parent: Parent) -> None:
    parent.send(function(double), encode(Kind.CALL, 1, b"no pickle", key=KEY))
    error = load_error(bytes(parent.receive().payload))
    assert isinstance(error, UnpicklableError)
    assert error.what == "arguments"
    assert load(parent.call(2, 3).payload) == 6


def test_a_batch_is_one_answer(parent: Parent) -> None:
    parent.send(function(double), encode(Kind.BATCH, 1, dump([1, 2, 3]), key=KEY))
    assert load(parent.receive().payload) == ([2, 4, 6], {})


def test_a_batch_of_tuples_is_unpacked(parent: Parent) -> None:
    parent.send(function(add), encode(Kind.BATCH_STAR, 1, dump([(1, 2), (3, 4)]), key=KEY))
    assert load(parent.receive().payload) == ([3, 7], {})


def test_stop_ends_the_loop_after_what_came_before(parent: Parent) -> None:
    parent.send(function(double), encode(Kind.CALL, 1, dump(((4,), {})), key=KEY), encode(Kind.STOP))
    assert load(parent.receive().payload) == 8


@pytest.mark.parametrize("kept", [0, 1, HEADER.size, HEADER.size + 3])
def test_a_stream_that_ends_inside_a_message_ends_the_loop(parent: Parent, kept: int) -> None:
    parent.send(encode(Kind.CALL, 1, b"x" * 10, key=KEY)[:kept])
    parent.end.shutdown(socket.SHUT_WR)


ORPHAN = """
import os, socket, sys
from shpool.board import anonymous_board
from shpool.engines.lifeline import Lifeline
from shpool.engines.packing import dump_setup
from shpool.engines.serve import work
from shpool.engines.setup import WorkerSetup

ours, theirs = socket.socketpair()
recalled, recall = os.pipe()
lifeline = Lifeline(theirs, recalled)
lifeline.watch = lambda: None  # it may be slower to notice than the main thread
ours.close()
board = anonymous_board()
work(lifeline, board.reader(), dump_setup(WorkerSetup(*eval(sys.argv[1]))), ())
print("ended", flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("initializer", ["()", "(int, ('none',))"], ids=["fit", "unfit"])
def test_a_worker_whose_parent_ends_while_it_starts_says_nothing(initializer: str) -> None:
    """After a SIGTERM its traceback would be all that the terminal shows."""
    done = subprocess.run(
        [sys.executable, "-c", ORPHAN, initializer], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == ("ended\n", "", 0)
