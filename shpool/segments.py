"""Shared memory: segments with a name and what is done to them, whatever they hold.

Names are those of POSIX shared memory (shm_open(3)); nothing here involves the resource tracker, which would take a
segment away with the first process that ends. Owner and mode of what was not made here are checked before it is used.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import sys
from typing import TYPE_CHECKING

from shpool.errors import BoardError, BoardNotFoundError, ForeignBoardError

if sys.platform != "win32":
    import _posixshmem  # type: ignore[import-not-found]  # typeshed lacks it; as multiprocessing.shared_memory does, which cannot attach without its tracker before 3.13

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = "/dev/shm"  # noqa: S108 - where Linux keeps POSIX shared memory

# Linux, <linux/fcntl.h>; Python's fcntl names the last one only from 3.13 on.
_F_ADD_SEALS = 1033
_F_SEAL_SHRINK, _F_SEAL_GROW, _F_SEAL_FUTURE_WRITE = 0x2, 0x4, 0x10


def open_segment(name: str, flags: int) -> int:
    """Return a descriptor of a named segment, opened with these flags of ``os.open``; a new one has mode 0600."""
    descriptor: int = _posixshmem.shm_open("/" + name, flags, mode=0o600)
    return descriptor


@contextlib.contextmanager
def opened_safely(name: str, flags: int = os.O_RDONLY) -> Iterator[int]:
    """Open a segment for as long as this lasts, once owner and mode are found safe.

    Raises:
        BoardNotFoundError: There is none of that name.
        ForeignBoardError: Another user owns it, or others may read or write it.
        BoardError: The system does not open it.
    """
    try:
        descriptor = open_segment(name, flags)
    except FileNotFoundError:
        raise BoardNotFoundError(name) from None
    except PermissionError:
        detail = "another user holds this name"
        raise ForeignBoardError(name, detail) from None
    except OSError as exc:
        raise BoardError(name, exc.strerror or str(exc)) from None
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid():
            detail = f"it belongs to user {found.st_uid}, not to {os.geteuid()}"
            raise ForeignBoardError(name, detail)
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH | stat.S_IRGRP | stat.S_IROTH):
            detail = f"its mode {stat.S_IMODE(found.st_mode):04o} lets other users in"
            raise ForeignBoardError(name, detail)
        yield descriptor
    finally:
        os.close(descriptor)


def leads_to(name: str, descriptor: int) -> bool:
    """Tell whether this very segment stands under the name. On Linux this takes no descriptor: there may be none."""
    try:
        if os.path.isdir(FOLDER):  # noqa: PTH112 - not worth importing pathlib in every worker
            return os.path.samestat(os.lstat(f"{FOLDER}/{name}"), os.fstat(descriptor))
        found = open_segment(name, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return os.path.samestat(os.fstat(found), os.fstat(descriptor))
    finally:
        os.close(found)


def unlink_if_same(name: str, descriptor: int) -> bool:
    """Take the name away if this very segment stands under it; tell whether it did."""
    is_same = leads_to(name, descriptor)
    if is_same:
        unlink_if_there(name)
    return is_same


def unlink_if_there(name: str) -> None:
    """Take a name away."""
    with contextlib.suppress(FileNotFoundError):
        _posixshmem.shm_unlink("/" + name)


def allocate(descriptor: int, name: str, size: int) -> None:
    """Give the segment its size and its pages now: a full /dev/shm is an error here and not a SIGBUS later."""
    try:
        os.ftruncate(descriptor, size)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
    except OSError as exc:
        text = "shared memory is full; free some in /dev/shm, or give the container a larger one (--shm-size)"
        raise BoardError(name, text if exc.errno == errno.ENOSPC else str(exc)) from None


def seal(descriptor: int, *, against_writes: bool) -> None:
    """Let nobody resize an anonymous segment.

    Args:
        descriptor: Of a memfd that allows seals.
        against_writes: Let nobody write to it either, but through the maps there are.
    """
    seals = _F_SEAL_SHRINK | _F_SEAL_GROW
    try:
        fcntl.fcntl(descriptor, _F_ADD_SEALS, seals | (_F_SEAL_FUTURE_WRITE if against_writes else 0))
    except OSError:  # Linux before 5.1 knows no FUTURE_WRITE
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, _F_ADD_SEALS, seals)
