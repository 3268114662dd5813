"""The inline engine: tasks run in the caller's process, at once and one by one; for debugging and for tests."""

from __future__ import annotations

import functools
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from shpool.board import anonymous_board
from shpool.channels import BoardChannel
from shpool.engines.base import BatchResult, Tally
from shpool.engines.setup import WorkerSetup
from shpool.errors import InitializerError
from shpool.gate import unanswered
from shpool.retry import carry_attempts, summary_of
from shpool.shared import SharedSession, adopt_session
from shpool.talk import take_line
from shpool.worker import call_each, load_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from shpool.channels import TokenChannel
    from shpool.engines.base import Task
    from shpool.gate import AccountGate

_turn = threading.RLock()  # current_session() has one answer in a process, so one task runs at a time, of whatever pool


class _Ear:
    """A line to the listener of a task that runs here."""

    is_recalled = False

    def __init__(self, hear: Callable[[Any], object]) -> None:
        self.tell = hear


class Inline:
    """Run each task inside ``submit``. A timeout cannot stop what runs in the caller's own thread, and is not kept.

    Args:
        setup: How the one worker, this process, begins.
        gate: What its requests go through; None for a gate of its own.
    """

    workers = 1
    backlog = 0
    largest_batch = None
    failure = None
    singles = 4
    hears = False  # what a task says is told at once, but to a caller who waits for its end

    def __init__(self, setup: WorkerSetup | None = None, *, gate: AccountGate | None = None) -> None:
        self._setup = setup or WorkerSetup()
        self.on_refused: Callable[[int], None] = lambda _: None
        self.on_end: Callable[[], None] = lambda: None
        board = anonymous_board()
        self._channel = BoardChannel(board)
        self._session = SharedSession(board.reader(), report=self._report, gate=gate)
        self._is_begun = self.has_ended = False
        self.tally = Tally()

    @property
    def channel(self) -> TokenChannel:
        """A board in this process's own memory."""
        return self._channel

    def start(self) -> None:
        """Do nothing: the session is this process's own only while a task runs."""

    def prepare(self, fn: Callable[..., Any], *, serves_many: bool = False) -> Callable[..., Any]:  # noqa: ARG002 - it does here
        """Return the function as it is."""
        return fn

    def submit(self, task: Task, future: Future[Any] | None = None) -> Future[Any]:
        """Run the task now; the future is done when this returns.

        Raises:
            KeyboardInterrupt: It struck the task; the future has it too.
        """
        if self.has_ended:
            msg = "cannot schedule new futures after shutdown"
            raise RuntimeError(msg)
        future = Future() if future is None else future
        future.set_running_or_notify_cancel()
        run = functools.partial(self._run_batch if task.batch else self._run, task)
        with _turn:
            former, line = adopt_session(self._session), take_line(None if task.hear is None else _Ear(task.hear))
            try:
                self._begin()
                self._settle(future, run)
            finally:
                unanswered.give_back()
                adopt_session(former)
                take_line(line)
        return future

    def terminate(self, future: Future[Any]) -> bool:
        """Stop nothing: what was submitted is done."""
        return not future.done()

    def recall(self, future: Future[Any]) -> None:
        """Do nothing: what was submitted is done."""

    def drop_abandoned(self) -> None:
        """Do nothing: what was submitted is done."""

    def shutdown(self, *, cancel: bool = False, kill: bool = False) -> None:  # noqa: ARG002 - nothing is ever pending
        """End at once."""
        if not self.has_ended:
            self.has_ended = True
            self.on_end()
            self._channel.close()

    def join(self, timeout: float | None = None) -> bool:  # noqa: ARG002 - as above
        """Return at once."""
        return self.has_ended

    def _report(self, generation: int) -> None:
        self.on_refused(generation)

    def _begin(self) -> None:
        if not self._is_begun and self._setup.initializer is not None:
            try:
                self._setup.initializer(*self._setup.initargs)
            except Exception as exc:
                raise InitializerError(f"{type(exc).__name__}: {exc}") from exc  # noqa: EM102, TRY003 - a field
        self._is_begun = True

    def _settle(self, future: Future[Any], run: Callable[[], object]) -> None:
        try:
            future.set_result(run())
        except BaseException as exc:  # border: a task may raise anything
            self.tally.failed += 1
            future.set_exception(exc)
            if isinstance(exc, KeyboardInterrupt):
                raise  # it is ^C in the caller's own thread
        else:
            self.tally.done += 1

    def _run(self, task: Task) -> object:
        history = list(task.history)
        if history:
            self.tally.retried += 1
            time.sleep(task.delay)
        while True:
            attempt = len(history) + 1
            try:
                return task.fn(*task.args, **task.kwargs)
            except Exception as exc:
                wait = task.policy.wait_before_retry(exc, attempt, time.time())
                if wait is None:
                    carry_attempts(exc, history)
                    raise
                history.append(summary_of(exc, attempt))
            self.tally.retried += 1
            time.sleep(wait)

    @staticmethod
    def _run_batch(task: Task) -> BatchResult:
        begun = time.perf_counter()
        results, errors = call_each(task.fn, task.args, star=task.star, fatal=(KeyboardInterrupt,))
        seconds = time.perf_counter() - begun
        return BatchResult(results, {index: load_error(data) for index, data in errors.items()}, seconds)
