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
import contextlib
import importlib
import signal
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # those whose handlers are wont to raise
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


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Have what comes meanwhile handled after the block; whatever one handler raises, the others are called too.

    Raises:
        KeyboardInterrupt: As ever, or whatever else a handler raises.
    """
    if threading.current_thread() is not threading.main_thread():  # no handler ever runs there
        yield
        return
    with contextlib.ExitStack() as handling, contextlib.ExitStack() as restoring:
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler):

                def note(number: int, frame: FrameType | None, handler: signal._HANDLER = handler) -> None:
                    handling.callback(handler, number, frame)  # type: ignore[arg-type]  # it is callable

                restoring.callback(signal.signal, number, handler)
                signal.signal(number, note)
        yield


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
