"""What a worker of Dask has begun and ended, in a file that outlives it: nobody is blamed for what another call did.

1. The worker writes down each call before it begins, and its answer when it has ended. What a process has written to a
file before it was killed is there afterwards, as nothing is that it had yet to send.
2. Once it is gone, its nanny reads the file for the client: what has ended has its answer, what has begun besides is
lost with the worker, and all else has not begun and may go again.
3. While it lives, the client may take back what has not begun. The logbook's word is final: what was taken back does
not begin, even if it arrives later, and nothing begins twice.
4. Calls are known by tickets; each time that a call is sent, it has another.
5. A worker that closes in order seals its logbook: nothing begins any more, the client is told what has, as the nanny
may be about to go too, and the file stays for the nanny.
6. Two files take turns, and either has room for as many answers as the client may not have yet. Large ones are left
out, as such calls take their time anyway.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import fcntl
import os
import struct
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

_ENTRY = struct.Struct("<BQI")  # what happened, the ticket, the bytes that follow
_BEGUN, _ENDED, _ENDED_LARGE, _SEALED = 1, 2, 3, 4
_LARGEST = 256 * 1024  # bytes of an answer that is written down
_MOST_TAKEN = 4096  # tickets taken back that are remembered: they were cancelled too, so hardly one arrives
_SUFFIXES = (".0", ".1")
_RELEASED_WITHIN = 1.0  # s that a dying process gets to let go of its files
_STEP = 0.01  # s
_FORGOTTEN_AFTER = 600.0  # s after which nobody will ask for a dead worker's logbook any more
_PREFIX = "shpool-"


class TakenBack(NamedTuple):
    """What came of taking calls back.

    Attributes:
        taken: Tickets of those that will not begin.
        running: Tickets of those that have begun and not ended.
    """

    taken: list[int]
    running: list[int]


class Record(NamedTuple):
    """What a logbook says of some tickets.

    Attributes:
        begun: Those that had begun, whatever became of them.
        answers: The answers of those that had ended.
    """

    begun: list[int]
    answers: dict[int, bytes]


class Logbook:
    """The logbook of one pool on one worker.

    Args:
        path: Of the files, without their suffix; None for none, where nobody would read them.
        most: Calls that may be at the worker at once, as far as the client knows.
    """

    def __init__(self, path: str | None, most: int) -> None:
        self.path = path
        self._most = most
        self._lock = threading.Lock()  # guards what follows; calls run in threads
        self._running: dict[int, float] = {}  # since when, by time.monotonic
        self._ended: collections.deque[int] = collections.deque(maxlen=2 * most)
        self._taken: collections.OrderedDict[int, None] = collections.OrderedDict()
        self._files: list[int] = []  # descriptors, the newest last
        self._turn = self._entries = 0
        self._is_over = False  # nothing begins any more
        if path is not None:
            self._write_or_give_up(b"")

    def begin(self, ticket: int) -> bool:
        """Write down that a call begins; False if it must not."""
        with self._lock:
            if self._is_over or ticket in self._taken or ticket in self._running or ticket in self._ended:
                return False
            self._running[ticket] = time.monotonic()
            self._write_or_give_up(_ENTRY.pack(_BEGUN, ticket, 0))
        return True

    def end(self, ticket: int, answer: bytes) -> None:
        """Write down a call's answer."""
        is_large = len(answer) > _LARGEST
        entry = _ENTRY.pack(_ENDED_LARGE, ticket, 0) if is_large else _ENTRY.pack(_ENDED, ticket, len(answer)) + answer
        with self._lock:
            self._running.pop(ticket, None)
            self._ended.append(ticket)
            self._write_or_give_up(entry)
            self._entries += 1

    def take_back(self, tickets: Sequence[int], least: float, *, is_blocked: bool = False) -> TakenBack:
        """Let calls not begin that have not.

        Args:
            tickets: Theirs, and those of all others that were sent to this worker.
            least: Seconds that each of those which run must have run for, else nothing is taken back.
            is_blocked: Tasks of others keep these from beginning.
        """
        with self._lock:
            running = [ticket for ticket in tickets if ticket in self._running]
            youngest = max((self._running[ticket] for ticket in running), default=0.0 if is_blocked else float("inf"))
            if least and time.monotonic() - youngest < least:
                return TakenBack([], running)
            begun = {*running, *self._ended, *self._taken}
            taken = [ticket for ticket in tickets if ticket not in begun]
            self._taken.update(dict.fromkeys(taken))
            while len(self._taken) > _MOST_TAKEN:
                self._taken.popitem(last=False)
        return TakenBack(taken, running)

    def seal(self) -> list[int]:
        """Let nothing begin any more, and leave the files to whoever comes after the worker; return what has begun."""
        with self._lock:
            self._is_over = True
            self._write_or_give_up(_ENTRY.pack(_SEALED, 0, 0))
            return [*self._running, *self._ended]

    def close(self) -> None:
        """Let nothing begin any more, and remove the files: nobody will ask."""
        with self._lock:
            self._is_over = True
            self._give_up()

    # What follows runs under the lock.

    def _write_or_give_up(self, entry: bytes) -> None:
        """Write, unless there is no file; where that fails, a logbook with gaps is worse than none."""
        if self.path is None:
            return
        try:
            if not self._files or self._entries >= self._most:
                self._take_turns(self.path)
            while entry:
                entry = entry[os.write(self._files[-1], entry) :]
        except OSError:
            self._give_up()

    def _take_turns(self, path: str) -> None:
        """Begin the next file, in the place of the one before the last."""
        name = path + _SUFFIXES[self._turn]
        if len(self._files) == len(_SUFFIXES):
            os.close(self._files.pop(0))
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()
        descriptor = os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        self._files.append(descriptor)
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # this process's own, not that of what tasks fork
        os.write(descriptor, b"".join(_ENTRY.pack(_BEGUN, ticket, 0) for ticket in self._running))
        self._turn, self._entries = (self._turn + 1) % len(_SUFFIXES), 0

    def _give_up(self) -> None:
        for descriptor in self._files:
            os.close(descriptor)
        self._files.clear()
        if self.path is not None:
            _remove(self.path)
            self.path = None


def logbook_path(folder: str, pool: str) -> str:
    """Return where the logbook of this process is to be, beside the worker's own folder, which may go with it."""
    return str(Path(folder).parent / f"{_PREFIX}{pool}-{os.getpid()}-{time.monotonic_ns()}")


def sweep(folder: str) -> None:
    """Remove the logbooks of workers that are gone for long, which nobody has asked for."""
    with contextlib.suppress(OSError):
        for file in Path(folder).parent.glob(f"{_PREFIX}*.[01]"):
            if time.time() - file.stat().st_mtime > _FORGOTTEN_AFTER and _is_released(str(file)):
                file.unlink()


async def read_logbook(path: str, tickets: Collection[int]) -> Record | None:
    """Read the logbook of a worker that is gone, or about to go, and remove it; runs in its nanny.

    Returns:
        What it says; None if there is none, or its worker may begin more.
    """
    is_released = False
    for _ in range(max(1, int(_RELEASED_WITHIN / _STEP))):
        is_released = all(_is_released(path + suffix) for suffix in _SUFFIXES)
        if is_released:
            break
        await asyncio.sleep(_STEP)
    contents = _contents_of(path)
    record, is_sealed = _said_of(tickets, contents)
    if not contents or not (is_released or is_sealed):
        return None
    _remove(path)
    return record


def _contents_of(path: str) -> list[bytes]:
    return [file.read_bytes() for file in (Path(path + suffix) for suffix in _SUFFIXES) if file.exists()]


def _said_of(tickets: Collection[int], contents: Sequence[bytes]) -> tuple[Record, bool]:
    """Return what is written of these, and whether the logbook is sealed."""
    kinds: set[int] = set()
    begun: set[int] = set()
    answers: dict[int, bytes] = {}
    for content in contents:
        at = 0
        while at + _ENTRY.size <= len(content):
            kind, ticket, size = _ENTRY.unpack_from(content, at)
            at += _ENTRY.size
            if at + size > len(content):
                break  # it was killed while it wrote this
            kinds.add(kind)
            begun.add(ticket)
            if kind == _ENDED:
                answers[ticket] = content[at : at + size]
            at += size
    record = Record([ticket for ticket in tickets if ticket in begun], {t: answers[t] for t in tickets if t in answers})
    return record, _SEALED in kinds


def _is_released(file: str) -> bool:
    """Tell whether no process writes here any more."""
    try:
        with Path(file).open("r+b") as opened:
            fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _remove(path: str) -> None:
    for suffix in _SUFFIXES:
        with contextlib.suppress(OSError):
            Path(path + suffix).unlink()
