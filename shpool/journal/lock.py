"""One live run per journal: a lock file beside it, which the kernel lets go of when its holder dies.

The journal itself is not locked: SQLite's own locks on it are of the kind that a process loses when any of its
descriptors of that file is closed, and on macOS they clash with ``flock``. So:

1. The lock is an exclusive ``flock`` on ``<journal>.lock``; the file holds the pid of the run, for messages, and
   after that some room, which is given back where a full disk has none for the last words of the run.
2. Who ends cleanly removes the file while still holding the lock. Whoever got the lock on a file that no longer
   has its name has got nothing, and begins again.
3. A killed run leaves the file and not the lock. A forked child gives its copy back: it must not hold the lock
   beyond its parent's end.
4. Looking takes a shared lock for a moment, and creates nothing; so taking tries again for a while.
"""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path

from shpool.errors import JournalError, JournalInUseError

# s to try for: those who look hold the lock for microseconds; and s between two tries.
_PATIENCE = 0.3
_PAUSE = 0.02

# What SQLite may need to write one row: a few pages of its log, and 32 KiB of its index of them.
_ROOM = 64 * 1024  # bytes

_held: set[int] = set()  # descriptors of this process's locks, for forked children


class RunLock:
    """Hold a journal for one run.

    Args:
        journal: The journal's file, with links resolved; it need not exist.

    Raises:
        JournalInUseError: A live run holds it.
        JournalError: The lock file cannot be made.
    """

    def __init__(self, journal: Path) -> None:
        self._path = _lock_file(journal)
        deadline = time.monotonic() + _PATIENCE
        while (descriptor := self._attempt(journal)) is None:
            if time.monotonic() > deadline:
                raise JournalInUseError(str(journal), _pid_in(self._path))
            time.sleep(_PAUSE)
        os.ftruncate(descriptor, 0)
        # A full disk spoils the pid, which only serves messages; the journal's own writes will tell.
        with suppress(OSError):
            size = os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            os.pwrite(descriptor, bytes(_ROOM), size)
        self._descriptor = descriptor
        _held.add(descriptor)

    def _attempt(self, journal: Path) -> int | None:
        """Return a descriptor that holds the lock, or None."""
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as exc:
            reason = f"cannot write beside it: {exc.strerror}"
            raise JournalError(str(journal), reason, "give a --journal in a folder you may write to") from exc
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), self._path.stat()):
                return descriptor
        except (BlockingIOError, FileNotFoundError):
            pass
        os.close(descriptor)
        return None

    def give_room(self) -> None:
        """Give the disk back what was kept for the last words; the file's name and the lock stay."""
        if self._descriptor in _held:
            os.ftruncate(self._descriptor, 0)

    def release(self) -> None:
        """Remove the lock file and let go; harmless when done before, and in a forked child."""
        if self._descriptor in _held:
            _held.discard(self._descriptor)
            with suppress(OSError):
                self._path.unlink()
            os.close(self._descriptor)


def live_pid(journal: Path) -> int | None:
    """Return the process that runs with a journal now: None when there is none, 0 when it did not tell."""
    path = _lock_file(journal)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _pid_in(path)
    finally:
        os.close(descriptor)
    return None


def _lock_file(journal: Path) -> Path:
    return journal.with_name(f"{journal.name}.lock")


def _pid_in(path: Path) -> int:
    try:
        with path.open() as file:
            return int(file.readline())
    except (OSError, ValueError):
        return 0


def _let_go() -> None:
    """Close the copies of a forked child; the parent's lock stays."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
