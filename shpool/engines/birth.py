"""The process of a worker, from its start to its end; nothing here knows what it does meanwhile.

loky's fork_exec starts it, with the environment and the descriptors that it is given. What runs in it first is what the
standard library runs first in spawned processes, and not what loky does: that imports all of loky, which no worker uses
and which took 50 of the 171 ms of processor time that a worker's imports came to.

What the process is to do waits for it in a file without a name. So nobody waits for a process that is slow to come up,
and one whose parent is killed meanwhile finds all it needs, and then sees that it is alone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
import time
from multiprocessing import get_start_method, popen_spawn_posix, process, reduction, resource_tracker, spawn, util
from multiprocessing.context import SpawnProcess, set_spawning_popen
from typing import TYPE_CHECKING, Any, BinaryIO

from loky.backend.fork_exec import fork_exec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# As multiprocessing.spawn.spawn_main, but for the parent's end, which it would look for in the file. And nothing may
# come from the current folder before the parent's own search path is there: it may be one of downloads.
_COMMAND = """\
import sys
sys.path[:] = filter(None, sys.path)
import pickle
from multiprocessing import process, resource_tracker, spawn
resource_tracker._resource_tracker._fd = {tracker}
process.current_process()._inheriting = True
with open({letter}, "rb") as letter:
    spawn.prepare(pickle.load(letter))
    child = pickle.load(letter)
del process.current_process()._inheriting
sys.exit(child._bootstrap())
"""
_NAME = "shpool-worker"  # for people who look for workers with ps
_STEP = 0.01  # s between two looks whether a process has ended
_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes that ru_maxrss counts: getrusage(2) of macOS and Linux


class WorkerProcess:
    """A process that was started, until it is reaped.

    Args:
        pid: Its id.

    Attributes:
        exitcode: Negative for a signal's number; None before it was reaped, and where somebody else has waited for it.
        peak_memory: Most bytes of memory it ever held, None when unknown; there once it was reaped.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.exitcode: int | None = None
        self.peak_memory: int | None = None
        self._has_ended = False
        self._parents_peak = _own_peak_memory()

    def kill(self) -> None:
        """End the process at once."""
        if not self._has_ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)  # not reaped yet, so the pid is still its own

    def await_end(self, seconds: float) -> bool:
        """Reap the process once it has ended; tell whether it has within so many seconds."""
        give_up = time.monotonic() + seconds
        while not self._reap() and time.monotonic() < give_up:
            time.sleep(_STEP)
        return self._has_ended

    def _reap(self) -> bool:
        if not self._has_ended:
            try:
                pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            except ChildProcessError:  # somebody else has waited for it
                self._has_ended = True
            else:
                if pid:
                    self._has_ended, self.exitcode = True, os.waitstatus_to_exitcode(status)
                    peak = usage.ru_maxrss * _MAXRSS_UNIT
                    # Linux counts in what it was before exec(): a copy of this process. So a lesser peak says nothing.
                    self.peak_memory = peak if peak > self._parents_peak else None
        return self._has_ended


def start_process(
    target: Callable[..., object], args: tuple[object, ...], env: Mapping[str, str] | None = None
) -> WorkerProcess:
    """Start a process that calls a function, and in which ^C is blocked from its first instruction on.

    Args:
        target: The function, pickled by reference; it may unblock SIGINT once it ignores it.
        args: Its arguments; a descriptor among them as ``multiprocessing.reduction.DupFd``.
        env: Environment variables for it, beside those of this process.

    Raises:
        OSError: The system starts no more processes or opens no more descriptors.
    """
    if not os.access(sys.executable or "", os.X_OK):  # nobody would tell
        raise FileNotFoundError(errno.ENOENT, "there is no Python interpreter (sys.executable)", sys.executable)
    resource_tracker.ensure_running()  # before SIGINT is blocked: before Python 3.13 its own launch unblocks that
    luggage = _Luggage()
    with _file_without_a_name() as letter:
        _write_letter(letter, SpawnProcess(target=target, args=args), luggage)
        tracker: int = resource_tracker.getfd()  # type: ignore[assignment]  # it runs
        command = _command(tracker, letter.fileno())
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            pid = fork_exec(command, [*luggage.descriptors, letter.fileno(), tracker], env or {})
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return WorkerProcess(pid)


def _file_without_a_name() -> BinaryIO:
    try:
        return os.fdopen(os.memfd_create("shpool-letter", os.MFD_CLOEXEC), "w+b")
    except (AttributeError, OSError):  # not Linux, or a sandbox that refuses it
        import tempfile

        return tempfile.TemporaryFile()


def _write_letter(letter: BinaryIO, child: SpawnProcess, luggage: _Luggage) -> None:
    """Write what the process reads first: what to make of itself, and itself."""
    # In a task multiprocessing starts processes as it does here.
    child._start_method = get_start_method(allow_none=True)  # noqa: SLF001 - of multiprocessing's own classes
    set_spawning_popen(luggage)  # type: ignore[arg-type]  # it is asked for no more than it has
    try:
        reduction.dump(_preparation(child.name), letter)
        reduction.dump(child, letter)
    finally:
        set_spawning_popen(None)
    letter.seek(0)  # the position is the process's too; and what is buffered gets written


def _command(tracker: int, letter: int) -> list[str]:
    """Return the words that start Python."""
    if getattr(sys, "frozen", False):  # from multiprocessing's documentation; not run here
        return spawn.get_command_line(tracker_fd=tracker, pipe_handle=letter)  # for multiprocessing.freeze_support()
    options = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # noqa: SLF001 - as multiprocessing
    return [sys.executable, *options, "-c", _COMMAND.format(tracker=tracker, letter=letter), _NAME]


def _preparation(name: str) -> dict[str, Any]:
    """Return what ``multiprocessing.spawn.prepare`` takes.

    Without the main module, as with loky: what is defined there travels by value. Without the current folder, which is
    inherited, and may be gone. And not by multiprocessing's own function, which would settle how this process starts
    others.
    """
    return {
        "name": name,
        "authkey": bytes(process.current_process().authkey),
        "sys_path": [path or process.ORIGINAL_DIR or path for path in sys.path],  # type: ignore[attr-defined]  # typeshed lacks it
        "sys_argv": sys.argv,
        "orig_dir": process.ORIGINAL_DIR,  # type: ignore[attr-defined]  # likewise
        "log_to_stderr": util._log_to_stderr,  # type: ignore[attr-defined]  # noqa: SLF001 - as multiprocessing's own
    }


class _Luggage:
    """What multiprocessing asks while it pickles for a new process; collects the descriptors that go along."""

    DupFd = popen_spawn_posix._DupFd  # noqa: SLF001 - keeps its number; and it is not of here: a worker would import loky

    def __init__(self) -> None:
        self.descriptors: list[int] = []

    def duplicate_for_child(self, descriptor: int) -> int:
        """Have it go along."""
        self.descriptors.append(descriptor)
        return descriptor


def _own_peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT
