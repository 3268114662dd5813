"""What a pool has in a worker process of a cluster: the token, a session on it, functions, and the calls it runs.

The process belongs to the cluster: it was there before the pool and will be after it, it may run tasks of others, also
of other pools, and several at once in threads. So nothing here is the process's own: an outpost is found by its pool's
random id, ``current_session()`` is the call's, and closing undoes what opening did, whichever outpost closes first.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from shpool.engines.keeping import KeptFunctions, may_be_kept
from shpool.engines.leased_gate import LeasedGate
from shpool.engines.messages import Kind
from shpool.engines.sealed import Answer, Call
from shpool.engines.serve import unreadable
from shpool.engines.traces import Traces
from shpool.errors import TokenUnavailableError
from shpool.gate import unanswered
from shpool.logs import RelayHandler
from shpool.pickling import load
from shpool.shared import SharedSession, adopt_session, is_session_here, leave_session, take_session
from shpool.worker import call, call_each, dump_each, dump_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shpool.engines.parcels import TokenCell
    from shpool.engines.setup import WorkerSetup

_MOST_RECORDS = 1000  # log records that an answer carries


class Outpost:
    """One pool in one worker process.

    Args:
        pool: The pool's id.
        pickled_setup: Its ``WorkerSetup``, as ``dump_setup`` pickled it.
        cell: What the session reads; whoever brings parcels puts them there.
        report: Tells the parent that a server refused a generation; called in any thread, must not wait.
        tell: Sends the driver's gate a note, likewise; None for a gate of this process alone.

    Attributes:
        openings: How many workers of this process have it open.
    """

    def __init__(
        self,
        pool: str,
        pickled_setup: bytes,
        cell: TokenCell,
        report: Callable[[int], None],
        tell: Callable[[bytes], object] | None = None,
    ) -> None:
        self.pool = pool
        self.cell = cell
        self.gate = None if tell is None else LeasedGate(tell)
        self.session = SharedSession(cell, report=report, gate=self.gate)
        self.openings = 0
        self._pickled_setup = pickled_setup
        self._functions: dict[bytes, bytes | Callable[..., Any]] = {}
        self._kept = KeptFunctions()  # these, by size
        self._lock = threading.RLock()  # guards what follows, and is held while the initializer runs
        self._is_begun = False
        self._unfit = b""  # the pickled error of the initializer
        self._is_closed = False
        self._handler: _RecordsOfCalls | None = None

    def run(self, call: Call, begun: Callable[[int], object] = lambda _: None) -> bytes:
        """Run a call in this thread; return the answer.

        Args:
            call: The call.
            begun: Told the call's number right before the function begins, if the call is timed.
        """
        records: list[bytes] = []
        with self._entered(records):
            if not self._is_begun:
                self._begin()
            if self._unfit:
                return Answer(Kind.UNFIT, 0.0, os.getpid(), self._unfit).to_bytes()
            fn = self._keep(call)
            if fn is None:
                return Answer(Kind.FUNCTION, 0.0, os.getpid()).to_bytes()
            if call.is_timed:
                begun(call.number)
            since = time.perf_counter()
            done, payload = self._outcome(call, fn)
            seconds = time.perf_counter() - since
        kind = Kind.RESULT if done else Kind.ERROR
        return Answer(kind, seconds, os.getpid(), payload, tuple(records)).to_bytes()

    def take_grant(self, note: bytes) -> None:
        """Hand the gate what the driver grants."""
        if self.gate is not None:
            self.gate.take(note)

    def close(self) -> None:
        """Forget the token, and leave the process as it was found."""
        self.cell.close()
        if self.gate is not None:
            self.gate.close()
        self.session.forget()
        self._is_closed = True
        self._clear_up()  # at once, though an initializer may run and hold the lock: a cluster's own thread is here
        self._functions.clear()

    @contextlib.contextmanager
    def _entered(self, records: list[bytes]) -> Iterator[None]:
        former, collected = take_session(self.session), _records.set(records)
        try:
            yield
        finally:
            unanswered.give_back()
            _records.reset(collected)
            leave_session(former)

    def _begin(self) -> None:
        """Make the outpost what the ``WorkerSetup`` says; the first call does, others wait for that."""
        with self._lock:
            if self._is_begun:
                return
            if self._is_closed:  # while the call was on its way in; nobody would undo what this does
                reason = "sharing has ended"
                raise TokenUnavailableError(reason)
            try:
                setup: WorkerSetup = load(self._pickled_setup)
                self._leave_traces(setup)
                if setup.initializer is not None:
                    setup.initializer(*setup.initargs)
            except BaseException as exc:  # noqa: BLE001 - border: the initializer is the user's
                self._unfit = dump_error(exc)
            self._is_begun = True

    def _leave_traces(self, setup: WorkerSetup) -> None:
        _traces.add(self, setup.env, setup.log_level)
        if setup.log_level is not None:
            self._handler = _RecordsOfCalls(setup.log_level, self.session)
            logging.getLogger().addHandler(self._handler)
        if self._is_closed:  # meanwhile, perhaps too early to undo all of this
            self._clear_up()

    def _clear_up(self) -> None:
        _traces.remove(self)
        if self._handler is not None:
            logging.getLogger().removeHandler(self._handler)

    def _keep(self, sealed: Call) -> bytes | Callable[..., Any] | None:
        """Return a call's function in the form it is kept in; None where it is not here."""
        with self._lock:
            kept = self._functions.get(sealed.key)
            if kept is not None:
                self._kept.has(sealed.key)
                return kept
            if sealed.function:
                for former in self._kept.add(sealed.key, len(sealed.function)):
                    self._functions.pop(former, None)
                self._functions[sealed.key] = sealed.function
            return sealed.function or None

    def _outcome(self, sealed: Call, kept: bytes | Callable[..., Any]) -> tuple[bool, bytes]:
        try:
            fn = self._function_of(sealed, kept)
        except BaseException as exc:  # noqa: BLE001 - border: unpickling imports the user's modules
            return False, unreadable("function", exc)
        try:
            args = load(sealed.payload)
        except BaseException as exc:  # noqa: BLE001 - border: unpickling runs the arguments' own code
            return False, unreadable("arguments", exc)
        if sealed.kind == Kind.CALL:
            done, payload = call(fn, *args)
            return done, bytes(payload)
        return True, bytes(dump_each(*call_each(fn, args, star=sealed.kind == Kind.BATCH_STAR)))

    def _function_of(self, sealed: Call, kept: bytes | Callable[..., Any]) -> Callable[..., Any]:
        if not isinstance(kept, bytes):
            return kept
        fn: Callable[..., Any] = load(kept)
        if may_be_kept(sealed.key, fn, kept):
            with self._lock:
                if sealed.key in self._functions:
                    self._functions[sealed.key] = fn
        return fn


def open_outpost(outpost: Outpost) -> Outpost:
    """Put an outpost where calls find it; return the one of its pool, where another worker of this process has one."""
    with _registry:
        found = _outposts.setdefault(outpost.pool, outpost)
        found.openings += 1
        _adopt_the_only_one()
    return found


def outpost_of(pool: str) -> Outpost | None:
    """Return the outpost of a pool in this process."""
    return _outposts.get(pool)


def close_outpost(pool: str) -> None:
    """Close the outpost of a pool, if it has one here, once that was asked for as often as it was opened."""
    with _registry:
        outpost = _outposts.get(pool)
        if outpost is None:
            return
        outpost.openings -= 1
        if outpost.openings:
            return
        del _outposts[pool]
        _adopt_the_only_one()
    outpost.close()


def note_home(pool: str) -> None:
    """Take note that this process is the pool's parent, whose threads do not get the session by themselves."""
    _homes.add(pool)


def _adopt_the_only_one() -> None:
    """Let threads that tasks start have the session too, as long as there is no doubt about which."""
    global _adopted  # noqa: PLW0603 - one for the process, as its registry is
    guests = [outpost.session for pool, outpost in _outposts.items() if pool not in _homes]
    wanted = guests[0] if len(guests) == len(_outposts) == 1 else None
    if wanted is not _adopted:
        adopt_session(wanted)
        _adopted = wanted


class _RecordsOfCalls(RelayHandler):
    """Add what a call logs to its answer."""

    def __init__(self, level: int, session: SharedSession) -> None:
        super().__init__(_collect, session.known_secrets)
        self.setLevel(level)
        self._session = session

    def filter(self, record: logging.LogRecord) -> Any:  # noqa: ANN401 - as in logging, where it has changed
        return is_session_here(self._session) and super().filter(record)


def _collect(record: bytes) -> None:
    records = _records.get()
    if len(records) < _MOST_RECORDS:
        records.append(record)


_traces = Traces()
_registry = threading.Lock()  # guards the three that follow
_outposts: dict[str, Outpost] = {}
_homes: set[str] = set()
_adopted: SharedSession | None = None
_records: ContextVar[list[bytes]] = ContextVar("records")
