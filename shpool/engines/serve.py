"""A worker's main function: begin, then run tasks one after another until told to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from shpool.engines.keeping import may_be_kept
from shpool.engines.messages import CALLS, Kind
from shpool.errors import UnpicklableError
from shpool.gate import unanswered
from shpool.logs import relay
from shpool.pickling import load
from shpool.shared import SharedSession, adopt_session
from shpool.talk import take_line
from shpool.worker import call, call_each, dump_each, dump_error

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shpool.board import BoardHandle, BoardReader
    from shpool.engines.lifeline import Lifeline
    from shpool.engines.messages import Message
    from shpool.engines.setup import WorkerSetup
    from shpool.gate import Gate, GateHandle
    from shpool.pickling import Pieces

_PART_AFTER = 0.05  # s of a batch's results that a lost worker may take along
_SLICE_GROWTH = 8  # times; of a batch that proves to be of tiny calls
_MEMORY_LOOK = 0.05  # s between two looks at the memory in use, each of which costs 10 µs
_PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")


def work(
    lifeline: Lifeline,
    board: BoardHandle | BoardReader,
    setup: bytes,
    blanked: tuple[str, ...],
    gate: GateHandle | Gate | None = None,
) -> None:
    """Be a worker: take the shared session, serve tasks until told to stop. The process's main function.

    Args:
        lifeline: The worker's end of it; a ``LifelineHandle`` before it was pickled.
        board: The pool's board; a ``BoardHandle`` before it was pickled.
        setup: The pickled ``WorkerSetup``.
        blanked: Environment variables that came blank, so that no secret is inherited; removed here.
        gate: The pool's gate; a ``GateHandle`` before it was pickled.
    """
    # The terminal's ^C reaches the whole foreground group; what happens then is the parent's to decide. The signal
    # came blocked, so that none could strike while Python was starting.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    _die_with_parent()
    for name in blanked:
        if not os.environ.get(name):
            os.environ.pop(name, None)
    # What a task forks must not keep the lifeline open: the parent would not see this worker's end.
    os.register_at_fork(after_in_child=lifeline.let_go)
    threading.Thread(target=lifeline.watch, name="shpool-watch", daemon=True).start()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the parent has gone
        try:
            max_memory = _initialise(lifeline, board, setup, gate)
        except BaseException as exc:  # noqa: BLE001 - border: the initializer is the user's
            lifeline.send(Kind.UNFIT, payload=dump_error(exc))
            return
        lifeline.send(Kind.READY, os.getpid())
        take_line(lifeline)
        serve(lifeline, max_memory)


def _initialise(lifeline: Lifeline, board: Any, pickled_setup: bytes, gate: Any) -> int | None:  # noqa: ANN401 - a reader and a gate by now
    """Make this process what the ``WorkerSetup`` says; return the memory it may hold."""
    setup: WorkerSetup = load(pickled_setup)
    session = SharedSession(board, report=lifeline.report, gate=gate)
    adopt_session(session)
    if setup.log_level is not None:
        relay(setup.log_level, lifeline.log, session.known_secrets)
    if setup.initializer is not None:
        setup.initializer(*setup.initargs)
    return setup.max_memory


def _die_with_parent() -> None:
    """Let the kernel end this process with its parent, even in the middle of C code that never lets a thread run.

    The signal comes when the *thread* that started this process ends: the crew's loop, which outlives its workers.
    """
    if sys.platform == "linux":
        import ctypes

        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def serve(lifeline: Lifeline, max_memory: int | None = None) -> None:
    """Run tasks one after another until STOP or the parent's end; tell when they have left too much memory in use."""
    functions: dict[bytes, bytes | Callable[..., Any]] = {}
    next_look = 0.0
    for message in lifeline.messages():
        if message.kind in CALLS:
            begun = time.perf_counter()
            lifeline.number, lifeline.is_recalled = message.number, False
            done, payload, begun = _run(functions, message, lifeline, begun)
            kind = Kind.RESULT if done else Kind.ERROR
            unanswered.give_back()
            ended = time.perf_counter()
            lifeline.send(kind, message.number, payload, seconds=ended - begun)
            del payload  # the next call may want to let go of the memory that it is
            if max_memory is not None and ended >= next_look:
                next_look = ended + _MEMORY_LOOK
                if (held := resident_memory()) > max_memory:
                    lifeline.send(Kind.GREW, held)
                    max_memory = None  # said once; the parent sends nothing new from then on
        elif message.kind == Kind.FUNCTION:
            functions[message.key] = bytes(message.payload)
            lifeline.free(message)
        elif message.kind == Kind.FORGET:
            functions.pop(message.key, None)
        elif message.kind == Kind.STOP:
            return


def resident_memory() -> int:
    """Return the bytes of memory this process holds; where the system does not tell, the most it ever held."""
    try:
        with open("/proc/self/statm", "rb") as file:  # noqa: PTH123 - a third of pathlib's time
            return int(file.read().split()[1]) * _PAGE_SIZE
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _run(
    functions: dict[bytes, bytes | Callable[..., Any]], message: Message, lifeline: Lifeline, begun: float
) -> tuple[bool, bytes | Pieces, float]:
    """Return whether it went well, what to send, and since when that took."""
    try:
        fn = functions[message.key]
        if isinstance(fn, bytes):
            fn = load(pickled := fn)
            if may_be_kept(message.key, fn, pickled):
                functions[message.key] = fn
            if message.kind != Kind.CALL:
                begun = time.perf_counter()  # once for all of a map: no measure of the size that batches should have
    except BaseException as exc:  # noqa: BLE001 - border: unpickling imports the user's modules
        return False, unreadable("function", exc), begun
    try:
        args = load(message.payload)
    except BaseException as exc:  # noqa: BLE001 - border: unpickling runs the arguments' own code
        return False, unreadable("arguments", exc), begun
    lifeline.free(message)
    if message.kind == Kind.CALL:
        return *call(fn, *args), begun
    return _run_batch(fn, args, message, lifeline, begun)


def _run_batch(
    fn: Callable[..., Any], items: Sequence[Any], message: Message, lifeline: Lifeline, begun: float
) -> tuple[bool, bytes | Pieces, float]:
    """Call the function on each item; what has taken a while is sent ahead, lest it is lost with the rest."""
    results: list[Any] = []
    errors: dict[int, bytes] = {}
    start, size, looked = 0, 1, begun
    while True:
        some, wrong = call_each(fn, items[start : start + size], star=message.kind == Kind.BATCH_STAR)
        errors |= {len(results) + index: error for index, error in wrong.items()}
        results += some
        start += size
        if start >= len(items):
            return True, dump_each(results, errors), begun
        now = time.perf_counter()
        size = max(1, min(size * _SLICE_GROWTH, int(size * _PART_AFTER / max(now - looked, 1e-9))))
        looked = now
        if now - begun >= _PART_AFTER:
            lifeline.send(Kind.PART, message.number, dump_each(results, errors), seconds=now - begun)
            results, errors, begun = [], {}, now


def unreadable(what: str, error: BaseException) -> bytes:
    """Pickle the error that what the parent sent could not be unpickled."""
    reason = f"it cannot be unpickled in the worker: {type(error).__name__}: {error}"
    return dump_error(UnpicklableError(what, "what the parent sent", reason).with_traceback(error.__traceback__))
