"""Imports, and starts of threads, that ^C cannot break.

Python's import system is not safe from it: a KeyboardInterrupt that strikes the main thread just when that has taken
the lock of all imports leaves the lock taken, and every thread that imports then waits for ever; or it strikes in the
callback of a weak reference, and is lost as well. Most of a start is imports: with Python 3.11 one ^C of twenty there
made a script hang.

A handler may as well wait for another thread, and that thread may import. So signals are handled between two imports,
where no lock of the import system is held, and not between the modules that one import loads in its turn.

Nor is the start of a thread safe: interrupted while it waits for the thread, it leaves one that runs, but has no
identity yet, so that it passes for one that was never started.
"""

from __future__ import annotations

import _imp
import _signal  # type: ignore[import-not-found]  # typeshed has no stub; signal.signal is this with enumerations
import _thread
import contextlib
import importlib
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import FrameType

# Those whose handlers are wont to raise; as numbers, since to call C with a member of an enumeration takes longer.
_SIGNALS = tuple(int(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM))
_HOLDERS = {"_find_spec", "_get_module_lock", "cb"}  # functions of the import system that hold the lock of all imports


def import_each(*names: str) -> None:
    """Import modules, one after the other; a signal waits for the end of the import that it comes in.

    Not in another thread instead: one that still imports when the interpreter ends makes it forget that it was
    interrupted, so that it exits with 1.

    Args:
        *names: First those that the others import, so that no signal waits long.

    Raises:
        ImportError: As ever.
        KeyboardInterrupt: As ever, or whatever else a handler raises.
    """
    free_import_lock()
    for name in names:
        if name not in sys.modules:
            with signals_wait():
                importlib.import_module(name)


class signals_wait:  # noqa: N801 - it is used as a function that makes a context manager is
    """Have what comes meanwhile handled after the block; whatever one handler raises, the others are called too.

    A class and no generator, and the C functions themselves: it stands in the way of each ``submit``, where it takes
    1 µs.

    Raises:
        KeyboardInterrupt: As ever, or whatever else a handler raises.
    """

    __slots__ = ("_came", "_former")

    def __enter__(self) -> None:
        self._came: list[tuple[Any, int, FrameType | None]] = []
        self._former: list[tuple[int, Any]] = []
        if _thread.get_ident() != threading.main_thread().ident:  # no handler ever runs there
            return
        try:
            for number in _SIGNALS:
                handler = _signal.getsignal(number)
                if handler.__class__ is not int and handler is not None:
                    self._former.append((number, handler))
                    _signal.signal(number, self._note)
        except BaseException:
            self._restore()
            raise

    def __exit__(self, *_: object) -> None:
        if self._former:
            self._restore()
            if self._came:
                with contextlib.ExitStack() as handling:
                    for handler, number, frame in reversed(self._came):
                        handling.callback(handler, number, frame)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came.append((dict(self._former)[number], number, frame))

    def _restore(self) -> None:
        """Give all of them back, whatever one raises that is back already."""
        raised = None
        while self._former:
            try:
                _signal.signal(*self._former[-1])
                self._former.pop()
            except BaseException as exc:  # noqa: BLE001, PERF203 - raised below
                raised = exc
        if raised is not None:
            raise raised


def free_import_lock() -> bool:
    """Release the lock of all imports where an interrupted one has left it with this thread.

    Returns:
        Whether this thread does not hold it now: False in a signal's handler, or another call, in the middle of an
        import, which will release it itself.
    """
    frame: FrameType | None = sys._getframe()  # noqa: SLF001 - there is no other way to see who is at it
    while frame is not None:
        if frame.f_code.co_name in _HOLDERS and frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return False
        frame = frame.f_back
    with contextlib.suppress(RuntimeError):  # this thread does not hold it
        while True:
            _imp.release_lock()
    return True
