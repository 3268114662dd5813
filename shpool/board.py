"""The board: one token record in shared memory, posted by one process and read by many without a lock.

The rules, all of them:

 1. A segment is a header of 64 bytes and two slots. Its size never changes.
 2. The header is: version word, magic, owner's pid, owner's start time; 8 bytes each, in the machine's order.
    Magic holds the layout's number: another layout is another magic.
 3. Only the owner writes. It writes a record into the slot that the *next* version selects (version modulo 2),
    and then stores the next version: one aligned 8-byte store through ``memoryview.cast("Q")``. Not
    ``struct.pack_into``, which zeroes its target before it fills it.
 4. A record is: digest, version, deadline, length, payload. The digest is the sha256 of all that follows it.
 5. A reader reads the version word, makes one private copy of the slot it selects, and accepts the copy if its
    digest is right and its version is the one the word told. Else it begins again, a bounded number of times. No
    reader ever waits for the writer, so nothing hangs when one dies.
 6. Version 0 means nothing has been posted yet; CLOSED means that sharing has ended, and the slots are zero.
 7. A reader that knows version and deadline reads nothing else while the word is unchanged.
 8. An anonymous segment has no name: it is handed over as a descriptor, and sealed so that no other process can
    write to it or change its size. It goes when the last process that holds it goes.
 9. A named segment is created with O_EXCL and mode 0600 by one owner, who keeps it locked (flock) while it lives.
    It is abandoned when the lock is free and no process has the owner's pid and start time.
10. A reader of a named segment accepts it only if its own user owns it and nobody else may write to it.
11. Beside a named segment stands another one of one word, for reports of refused generations: any process of the
    user may write to it, and the owner believes nothing in it but that a login is wanted.
12. The owner zeroes a segment before it unlinks it, and unlinks a name only while it still leads to its segment.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
import sys
import time
import warnings
import weakref
from typing import TYPE_CHECKING, Any

from shpool.errors import (
    BoardError,
    BoardInUseError,
    BoardLayoutError,
    BoardNotFoundError,
    ForeignBoardError,
    SHUserWarning,
    TokenTooLargeError,
    TornBoardError,
)
from shpool.segments import (
    FOLDER,
    allocate,
    leads_to,
    open_segment,
    opened_safely,
    seal,
    unlink_if_same,
    unlink_if_there,
)

if TYPE_CHECKING:
    from collections.abc import Callable

CLOSED = 2**64 - 1
MAGIC = int.from_bytes(b"shpool\0\1", sys.byteorder)

_WORD = 8  # bytes
_HEADER = 64  # bytes
_SLOT = 64 * 1024  # bytes: the largest tokens seen in the field are 12 kB
SEGMENT_SIZE = _HEADER + 2 * _SLOT
_DIGEST = 32  # bytes, of sha256
_FIELDS = struct.Struct("=QdQ")  # version, deadline, length
_OVERHEAD = _DIGEST + _FIELDS.size
LARGEST_PAYLOAD = _SLOT - _OVERHEAD

_REPORTS = ".refused"  # suffix of the segment beside a named board

_READ_TRIES = 1_000  # a flipping writer spoils about one read in twenty; a thousand in a row means corruption
_COMPLETE_WITHIN = 1.0  # s for another process to finish creating a segment whose name is visible already
# macOS: PSHMNAMLEN is 31, the slash, the end and the suffix above included.
_MAX_NAME = 240 if sys.platform == "linux" else 21


class BoardReader:
    """A read-only view of a board.

    Attributes:
        version_word: A sequence whose item 0 is the current version; cheap to look at.
        identity: Device and inode of the segment: another one under the same name differs.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        found = os.fstat(descriptor)
        self.identity = (found.st_dev, found.st_ino)
        self._segment = segment = mmap.mmap(descriptor, SEGMENT_SIZE, prot=mmap.PROT_READ)
        self._bytes = memoryview(segment)
        self.version_word = self._bytes[:8].cast("Q")
        self.name = name

    def read(self) -> tuple[int, bytes]:
        """Return the version and the payload now posted; the payload is empty at version 0 and CLOSED.

        Raises:
            TornBoardError: No consistent record within the bound: the memory is corrupt.
        """
        for _ in range(_READ_TRIES):
            version = self.version_word[0]
            if version in {0, CLOSED}:
                return version, b""
            payload = _checked_payload(self._copy_of_slot(version), version)
            if payload is not None:
                return version, payload
        detail = f"no consistent record in {_READ_TRIES} tries"
        raise TornBoardError(self.name, detail)

    def _copy_of_slot(self, version: int) -> bytes:
        start = _slot_offset(version)
        length = _FIELDS.unpack_from(self._bytes, start + _DIGEST)[2]
        return bytes(self._bytes[start : start + _OVERHEAD + min(length, LARGEST_PAYLOAD)])

    def close(self) -> None:
        """Let go of the memory."""
        self.version_word.release()
        self._bytes.release()
        self._segment.close()


class Board:
    """The owner's side of a segment: post records, close, unlink.

    Create one with ``anonymous_board()`` or ``named_board(name)``.
    """

    def __init__(self, descriptor: int, name: str = "", handed_over: int | None = None) -> None:
        self.name = name
        self._descriptor = descriptor
        self._handed_over = descriptor if handed_over is None else handed_over
        self._owner = os.getpid()
        self._segment = mmap.mmap(descriptor, SEGMENT_SIZE)
        self._bytes = memoryview(self._segment)
        self._words = self._bytes[:_HEADER].cast("Q")
        self._words[1:4] = memoryview(struct.pack("=QQQ", MAGIC, self._owner, start_time_of(self._owner))).cast("Q")
        self._closed = False
        _boards.add(self)

    @property
    def is_closed(self) -> bool:
        """Tell whether ``close()`` was called."""
        return self._closed

    @property
    def version(self) -> int:
        """The version last posted."""
        return self._words[0]

    def post(self, payload: bytes, deadline: float) -> None:
        """Make ``payload`` what readers see from now on.

        Raises:
            TokenTooLargeError: It exceeds LARGEST_PAYLOAD bytes; what was posted before stays.
            ValueError: The board is closed.
        """
        if self._closed:
            msg = f"board {self.name!r} is closed"
            raise ValueError(msg)
        if len(payload) > LARGEST_PAYLOAD:
            raise TokenTooLargeError(len(payload), LARGEST_PAYLOAD)
        version = self._words[0] + 1
        body = _FIELDS.pack(version, deadline, len(payload)) + payload
        record = _digest(body) + body
        start = _slot_offset(version)
        self._bytes[start : start + len(record)] = record
        self._words[0] = version

    def reader(self) -> BoardReader:
        """Return a view for the owner's own process."""
        return BoardReader(self._descriptor, self.name)

    def handle(self) -> BoardHandle:
        """Return what a worker attaches with; it pickles only while a process is being spawned."""
        return BoardHandle(self._handed_over, self.name)

    def has_vanished(self) -> bool:
        """Tell whether a named segment can no longer be found under its name."""
        if not self.name or self._closed:
            return False
        return not leads_to(self.name, self._descriptor)

    def close(self) -> None:
        """Tell readers that sharing has ended, zero the records, unlink the name; harmless when repeated.

        A forked child only lets go of its copy: the segment is its parent's.
        """
        if self._closed:
            return
        self._closed = True
        if os.getpid() == self._owner:
            self._words[0] = CLOSED
            self._bytes[_HEADER:] = bytes(2 * _SLOT)
            if self.name:
                unlink_if_same(self.name, self._descriptor)
        self._let_go()

    def become_read_only(self) -> None:
        """In a forked child: keep what ``reader()`` needs, and neither the writable map nor the parent's lock.

        A lock belongs to the open file, which a fork shares: the child would hold the name after the parent's end.
        """
        if self._closed:
            return
        with contextlib.suppress(OSError):  # no /proc, as on macOS, and no such locks there either
            reopened = os.open(f"/proc/self/fd/{self._descriptor}", os.O_RDONLY | os.O_CLOEXEC)
            self._let_go()
            self._descriptor = self._handed_over = reopened

    def _let_go(self) -> None:
        self._words.release()
        self._bytes.release()
        self._segment.close()
        for descriptor in {self._descriptor, self._handed_over}:
            os.close(descriptor)


_boards: weakref.WeakSet[Board] = weakref.WeakSet()


def _become_read_only() -> None:
    for board in list(_boards):
        board.become_read_only()


os.register_at_fork(after_in_child=_become_read_only)


class ReportBox:
    """One word beside a named board, in which readers report the newest generation a server refused.

    A segment of its own, since workers may write to it and never to the board.
    """

    def __init__(self, board_name: str, *, create: bool) -> None:
        self._name = board_name + _REPORTS
        self._creator = os.getpid() if create else None
        self._is_closed = False
        flags = os.O_RDWR | (os.O_CREAT | os.O_EXCL if create else 0)
        try:
            if create:
                unlink_if_there(self._name)  # left behind by the board's former owner
            self._descriptor = open_segment(self._name, flags)
        except FileNotFoundError:
            raise BoardNotFoundError(self._name) from None
        except PermissionError:
            detail = "another user holds this name"
            raise ForeignBoardError(self._name, detail) from None
        except OSError as exc:
            raise BoardError(self._name, exc.strerror or str(exc)) from None
        try:
            if create:
                os.fchmod(self._descriptor, 0o600)
                os.ftruncate(self._descriptor, _WORD)
            _check_reports(self._descriptor, self._name)
            self._segment = mmap.mmap(self._descriptor, _WORD)
        except BaseException:
            os.close(self._descriptor)
            raise
        self._word = memoryview(self._segment).cast("Q")

    def has_vanished(self) -> bool:
        """Tell whether it can no longer be found under its name."""
        return not self._is_closed and not leads_to(self._name, self._descriptor)

    def report(self, generation: int) -> None:
        """Say that this generation was refused."""
        self._word[0] = max(self._word[0], generation)

    def clear(self) -> None:
        """Forget what was reported."""
        self._word[0] = 0

    def newest(self) -> int:
        """Return the newest generation reported, 0 for none."""
        return self._word[0]

    def close(self) -> None:
        """Let go; the creator takes the name away too. Harmless when repeated."""
        if self._is_closed:
            return
        self._is_closed = True
        self._word.release()
        self._segment.close()
        if self._creator == os.getpid():
            unlink_if_same(self._name, self._descriptor)
        os.close(self._descriptor)


class BoardHandle:
    """Carries a board's descriptor to a process being spawned, and becomes a ``BoardReader`` there."""

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor = descriptor
        self._name = name

    def __reduce__(self) -> tuple[Callable[..., BoardReader], tuple[object, ...]]:
        from multiprocessing.reduction import DupFd  # here: the login need not wait for it

        return _attach_handed_over, (DupFd(self._descriptor), self._name)


def anonymous_board() -> Board:
    """Create a board without a name, for the processes its descriptor is handed to.

    Raises:
        BoardError: The system has no room for shared memory.
    """
    try:
        descriptor = os.memfd_create("shpool-board", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except (AttributeError, OSError):  # not Linux, or a sandbox that refuses it
        return _unlinked_board()
    try:
        allocate(descriptor, "anonymous", SEGMENT_SIZE)
        board = Board(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    seal(descriptor, against_writes=True)
    return board


def _unlinked_board() -> Board:
    """Create a board whose name is gone at once; workers get a descriptor that cannot write (macOS: not run here)."""
    name = "shpool-" + os.urandom(8).hex()
    descriptor = open_segment(name, os.O_CREAT | os.O_EXCL | os.O_RDWR)
    try:
        handed_over = open_segment(name, os.O_RDONLY)
        allocate(descriptor, name, SEGMENT_SIZE)
        return Board(descriptor, handed_over=handed_over)
    except BaseException:
        os.close(descriptor)
        raise
    finally:
        unlink_if_there(name)


def named_board(name: str) -> Board:
    """Create a board that any process of this user can find by its name.

    A segment that an ended process left under the name is taken over with a warning.

    Raises:
        ValueError: The name cannot be one of a shared-memory segment.
        BoardInUseError: A living process shares under the name.
        ForeignBoardError: Another user holds the name.
        BoardLayoutError: Something that is no board holds the name.
        BoardError: The system has no room for shared memory.
    """
    _check_name(name)
    for _ in range(_READ_TRIES):
        try:
            descriptor = open_segment(name, os.O_CREAT | os.O_EXCL | os.O_RDWR)
        except FileExistsError:
            _clear_abandoned(name)
            continue
        except OSError as exc:
            raise BoardError(name, exc.strerror or str(exc)) from None
        board = _settled(descriptor, name)
        if board is not None:
            return board
    detail = "it keeps appearing and vanishing, or a process that cannot be seen from here holds its lock"
    raise BoardError(name, detail)


def _settled(descriptor: int, name: str) -> Board | None:
    """Make a board of a new segment; None where another process has taken it for an abandoned one already.

    The header comes before the lock: who finds the segment in between locks it, reads that its owner runs, and
    lets go.
    """
    with contextlib.ExitStack() as on_error:
        on_error.callback(os.close, descriptor)
        on_error.callback(unlink_if_same, name, descriptor)
        os.fchmod(descriptor, 0o600)
        allocate(descriptor, name, SEGMENT_SIZE)
        board = Board(descriptor, name)
        on_error.pop_all()
        on_error.callback(board.close)
        give_up = time.monotonic() + _COMPLETE_WITHIN
        while not _try_lock(descriptor) and time.monotonic() < give_up:
            time.sleep(0.001)
        if board.has_vanished():
            return None
        on_error.pop_all()
        return board


def attach_named(name: str) -> BoardReader:
    """Attach read-only to the board of that name.

    Raises:
        BoardNotFoundError: There is none.
        ForeignBoardError: Another user owns it, or someone else may write to it.
        BoardLayoutError: It is not a board of this layout.
    """
    _check_name(name)
    with opened_safely(name) as descriptor:
        if not _check_header(descriptor, name)[0]:
            detail = "it was never completed"
            raise BoardLayoutError(name, detail)
        return BoardReader(descriptor, name)


def sweep_abandoned() -> list[str]:
    """Unlink this user's named boards whose owners have ended; return their names. Linux only, else nothing."""
    swept = []
    with contextlib.suppress(OSError):
        for entry in os.scandir(FOLDER):
            with contextlib.suppress(OSError, BoardError):
                found = entry.stat(follow_symlinks=False)
                if found.st_uid != os.geteuid() or found.st_size != SEGMENT_SIZE:
                    continue
                with opened_safely(entry.name) as descriptor:
                    if _is_abandoned(descriptor, entry.name) and leads_to(entry.name, descriptor):
                        unlink_if_there(entry.name + _REPORTS)  # before the board: its name is free only then
                        unlink_if_there(entry.name)
                        swept.append(entry.name)
    return swept


def start_time_of(pid: int) -> int:
    """Return when a process started, in clock ticks since boot; 0 when it is gone or the system cannot tell."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 - pathlib is too much for a worker to import
            text = file.read()
    except OSError:
        return 0
    fields = text.rpartition(b")")[2].split()  # field 3 of proc_pid_stat(5) and on; the name before may hold spaces
    return 0 if fields[0] in {b"Z", b"X"} else int(fields[19])  # a zombie has ended, though nobody has reaped it


def _attach_handed_over(duplicate: Any, name: str) -> BoardReader:  # noqa: ANN401 - multiprocessing's DupFd has no type
    descriptor = duplicate.detach()
    try:
        return BoardReader(descriptor, name)
    finally:
        os.close(descriptor)


def _digest(data: bytes | memoryview) -> bytes:
    import hashlib  # here: it loads OpenSSL, which a worker need not wait for before its first task

    return hashlib.sha256(data).digest()


def _slot_offset(version: int) -> int:
    return _HEADER + (version & 1) * _SLOT


def _checked_payload(record: bytes, version: int) -> bytes | None:
    """Return the payload of a record copy, None where rule 5 rejects it."""
    told, _, length = _FIELDS.unpack_from(record, _DIGEST)
    if told != version or len(record) != _OVERHEAD + length:
        return None
    if _digest(memoryview(record)[_DIGEST:]) != record[:_DIGEST]:
        return None
    return record[_OVERHEAD:]


def _check_name(name: str) -> None:
    is_text = isinstance(name, str) and 0 < len(name) <= _MAX_NAME and "/" not in name and "\0" not in name
    if not is_text or name.startswith(".") or name.endswith(_REPORTS):
        what = f"1 to {_MAX_NAME} characters, no slash, no dot at the beginning and no {_REPORTS} at the end"
        msg = f"memory_name {name!r} must have {what}"
        raise ValueError(msg)


def _check_header(descriptor: int, name: str) -> tuple[int, int]:
    """Return the owner's pid and start time; zeros for a segment whose creator never completed it.

    Waits, bounded, for one that is just being created.
    """
    give_up = time.monotonic() + _COMPLETE_WITHIN
    while True:
        size = os.fstat(descriptor).st_size
        header = os.pread(descriptor, _HEADER, 0) if size else b""
        magic, pid, started = struct.unpack_from("=QQQ", header, 8) if len(header) == _HEADER else (0, 0, 0)
        if magic == MAGIC and size == SEGMENT_SIZE:
            return pid, started
        if magic or size not in {0, SEGMENT_SIZE}:
            detail = f"{size} bytes that begin otherwise"
            raise BoardLayoutError(name, detail)
        if time.monotonic() >= give_up:
            return 0, 0
        time.sleep(0.001)  # its creator is between two system calls


def _check_reports(descriptor: int, name: str) -> None:
    found = os.fstat(descriptor)
    if found.st_uid != os.geteuid() or found.st_size != _WORD:
        detail = "another user or program holds this name"
        raise ForeignBoardError(name, detail)


def _is_abandoned(descriptor: int, name: str) -> bool:
    """Apply rule 9. The lock goes with the owner, in whatever pid namespace it lived."""
    if not _try_lock(descriptor):
        return False
    return not _is_running(*_check_header(descriptor, name))


def _is_running(pid: int, started: int) -> bool:
    if not pid:
        return False
    if started:
        return start_time_of(pid) == started
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _clear_abandoned(name: str) -> None:
    """Unlink what holds the name if its owner has ended, else say who lives there.

    The lock taken here keeps two heirs apart: the second finds another segment under the name and looks again.
    """
    try:
        with opened_safely(name) as descriptor:
            if _is_abandoned(descriptor, name):
                if unlink_if_same(name, descriptor):
                    text = f"took over shared memory {name!r}, which an ended process had left behind"
                    warnings.warn(text, SHUserWarning, stacklevel=4)
                return
            pid, started = _check_header(descriptor, name)
            if _is_running(pid, started):
                raise BoardInUseError(name, pid)
            time.sleep(0.001)  # another heir holds the lock, for as long as these few calls take
    except BoardNotFoundError:
        return


def _try_lock(descriptor: int) -> bool:
    """Lock a segment for this open descriptor; True also where the system has no locks on shared memory."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # macOS: not run here; pid and start time decide alone
    return True
