"""Files that take another's place in one step, and locks by which two runs notice each other."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from shpool_cli.console import CommandError


class Draft:
    """A hidden file beside another one, whose place it takes when it is published.

    Whatever happens before, the other file stays as it was. What a killed run left is taken over by the next one.

    Args:
        path: The file to replace, which need not exist; a link is followed.

    Raises:
        OSError: It cannot be created.
        CommandError: A living run writes to the file or its draft.
    """

    def __init__(self, path: Path) -> None:
        self.target = Path(os.path.realpath(path))  # links in a circle are for whoever opens it
        self.path = _beside(self.target)
        self._replaced = -1
        self.descriptor = self._open(path)
        try:
            # In this order, the reverse of ``hold_new``: of two that begin at once, one at least sees the other.
            with contextlib.suppress(FileNotFoundError):
                self._replaced = os.open(self.target, os.O_RDONLY)
                lock(self._replaced, path)
                os.fchmod(self.descriptor, os.fstat(self._replaced).st_mode & 0o777)
        except BaseException:
            self.discard()
            os.close(self.descriptor)
            raise

    def _open(self, path: Path) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        while True:
            descriptor = os.open(self.path, flags, 0o666)
            try:
                lock(descriptor, path)
                if _is_at(descriptor, self.path):  # else its former owner has published or removed it meanwhile
                    os.ftruncate(descriptor, 0)
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def publish(self) -> None:
        """Take the place of the other file; durable at once, so that no power loss leaves neither."""
        os.fsync(self.descriptor)
        self.path.replace(self.target)
        with contextlib.suppress(OSError):  # not every file system takes this for a folder
            folder = os.open(self.target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        self._let_go()

    def discard(self) -> None:
        """Remove the draft; the caller closes its descriptor."""
        self.path.unlink(missing_ok=True)
        self._let_go()

    def _let_go(self) -> None:
        if self._replaced >= 0:
            os.close(self._replaced)
            self._replaced = -1


def lock(descriptor: int, path: Path) -> None:
    """Hold a file for this run until its descriptor is closed.

    Raises:
        CommandError: Another run holds it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        msg = f"another run is writing to {path}"
        raise CommandError(msg, "wait for it, or choose another --output") from None
    except OSError:
        return  # a file system without locks


def hold_new(descriptor: int, path: Path) -> None:
    """Hold a file that is written without a draft.

    Raises:
        CommandError: Another run holds it, or a draft of it.
    """
    lock(descriptor, path)
    with contextlib.suppress(OSError):
        draft = os.open(_beside(path.resolve()), os.O_RDONLY | os.O_NOFOLLOW)
        try:
            lock(draft, path)
        finally:
            os.close(draft)


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.shpool-draft")


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False
