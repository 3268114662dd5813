"""The gate's shared memory: its layout and its locks, all of both.

The rules, all of them:

 1. A segment is one of fixed size: words of eight bytes, then a byte for each connection slot. It is apart from the
    board: workers write to it, and never to the board.
 2. The words are: epoch, magic, connections, next number, checked, not before, cut, cut at, passed, looked, two lanes
    (rate, burst, TAT), four counters, busy, last, leased, and 128 places of waiters (numbers, then looks). Moments are
    seconds of the monotonic clock, which all processes of a machine share.
 3. Epoch 0 means that there is nothing to obey: no limits, and no refusal yet. It is all that a free gate reads.
    Every pause raises it; a moment that was given out in another epoch is void.
 4. Words are changed under the mutex. It is a lock on a byte that belongs to an open file (fcntl(2), F_OFD_SETLK): the
    kernel frees it with the last descriptor, so at once when its holder is killed. A lock of a process (F_SETLK)
    would go with any descriptor of the file that the process closes, and flock() knows no ranges.
 5. So each process opens the segment for itself: a descriptor that was inherited or handed over is of the same open
    file, and would let its holders in together. A forked child opens it anew before it does anything. Threads of a
    process share its open file; a lock of threads stands in front.
 6. Each word is right by itself. Who is killed between two stores leaves at worst one request counted in one lane and
    not in the other.
 7. A connection slot is a lock on a byte of its own, held for as long as the slot: the kernel frees it with its holder.
    The slot's byte in memory says the same for those who look for a free one. It is a hint: now and then the first in
    the queue tries the locks themselves, and so finds the slots of the dead.
 8. Those who cannot go soon queue, for a slot and for a moment alike: each ticket has a number, and while it queues a
    place, where it notes that number and when it last looked. The lowest number of those who have looked lately may
    take a slot and a moment; who comes new while others wait queues behind them. Who is stopped looks no more, and is
    passed over; it keeps its number.
 9. Who takes a place locks the place's byte first. So a number without a lock is one of the dead: the first in the
    queue is looked at in this way before anybody waits for it, and a place of the dead is given to another.
10. A named segment is of one user (owner and mode 0600 are checked). Everybody who uses it holds a shared lock on the
    presence byte. Who finds itself alone there sets the limits anew; others must have asked for the same. The last to
    leave takes the name away, and what the killed have left is swept by the next who makes a named gate.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import mmap
import os
import struct
import sys
import threading
from typing import TYPE_CHECKING

from shpool.errors import BoardError, GateInUseError, GateUnusableError
from shpool.gate.limits import MOST_CONNECTIONS, Lane, Limits
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
    from types import TracebackType

    from typing_extensions import Self

MAGIC = int.from_bytes(b"shgate\0\2", sys.byteorder)

EPOCH, _MAGIC, _CONNECTIONS, _NUMBER = 0, 1, 2, 3  # integers; all that follows are floats but the places' numbers
CHECKED, NOT_BEFORE, CUT, CUT_AT, PASSED, LOOKED = 4, 5, 6, 7, 8, 9
REQUESTS, UNITS = 10, 13  # lanes of three words
WAITS, WAITED, REFUSALS, PAUSES = 16, 17, 18, 19
BUSY, LAST, LEASED = 20, 21, 22
_TAT = 2  # offset in a lane
_PLACES = 128
_FIRST_NUMBER, _FIRST_LOOK = 32, 32 + _PLACES
_SLOTS = 8 * (32 + 2 * _PLACES)  # bytes
SEGMENT_SIZE = _SLOTS + MOST_CONNECTIONS

_MUTEX, _PRESENCE, _FIRST_SLOT_LOCK = 0, 1, 16  # bytes that are locked, not stored
_FIRST_PLACE_LOCK = _FIRST_SLOT_LOCK + MOST_CONNECTIONS

_AWAKE = 0.3  # s since its last look in which a waiter counts; thrice the longest nap
_CHECK_EVERY = 0.05  # s between two looks for slots of the dead

_PREFIX = f"shpool-gate-{os.geteuid()}-" if sys.platform == "linux" else "shg"
_LONGEST_NAME = 200 if sys.platform == "linux" else 20

HAS_LOCKS = hasattr(fcntl, "F_OFD_SETLK")
NO_LOCKS = "this system has no locks that belong to open files (F_OFD_SETLK), so no limit can be kept between processes"


@functools.lru_cache(maxsize=2 * MOST_CONNECTIONS)
def _flock(kind: int, byte: int) -> bytes:
    """Return a ``struct flock`` of 64-bit Linux: type, whence, start, length, pid."""
    return struct.pack("hhqqi4x", kind, os.SEEK_SET, byte, 1, 0)


def _wait_for_lock(descriptor: int, request: bytes) -> None:
    if HAS_LOCKS:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLKW, request)


_LOCK_MUTEX, _UNLOCK_MUTEX = _flock(fcntl.F_WRLCK, _MUTEX), _flock(fcntl.F_UNLCK, _MUTEX)


class Segment:
    """One process's hold on a gate's memory; ``with segment:`` is the mutex.

    Args:
        descriptor: An open file of this process alone; closed by ``close()``.
        name: The gate's name, empty for none.

    Attributes:
        integers: The words as integers.
        floats: The words as floats.
    """

    def __init__(self, descriptor: int, name: str = "") -> None:
        self.name = name
        self.descriptor = descriptor
        self._look_at(memoryview(mmap.mmap(descriptor, SEGMENT_SIZE)))
        self._threads = threading.Lock()
        self._held: set[int] = set()  # slots of this process; changed under the mutex, but let go of without
        self._places: set[int] = set()  # places of its waiters; likewise

    def _look_at(self, whole: memoryview) -> None:
        self._whole = whole
        self.integers = whole[:_SLOTS].cast("Q")
        self.floats = whole[:_SLOTS].cast("d")
        self._slots = whole[_SLOTS:]
        self._numbers = self.integers[_FIRST_NUMBER : _FIRST_NUMBER + _PLACES]
        self._looks = self.floats[_FIRST_LOOK : _FIRST_LOOK + _PLACES]

    # The mutex

    def __enter__(self) -> Self:
        self.check_open()
        self._threads.acquire()
        try:
            _wait_for_lock(self.descriptor, _LOCK_MUTEX)
        except BaseException:  # ^C, maybe when the lock was there already
            self.__exit__(None, None, None)
            raise
        return self

    @property
    def is_closed(self) -> bool:
        """Tell whether this process has let go."""
        return self.descriptor < 0

    def check_open(self) -> None:
        """Raise if it is closed.

        Raises:
            ValueError: It is.
        """
        if self.is_closed:
            msg = "the gate is closed"
            raise ValueError(msg)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            _wait_for_lock(self.descriptor, _UNLOCK_MUTEX)
        finally:
            self._threads.release()

    def _try_lock(self, request: bytes) -> bool:
        if not HAS_LOCKS:
            return True
        try:
            fcntl.fcntl(self.descriptor, fcntl.F_OFD_SETLK, request)
        except (BlockingIOError, PermissionError):
            return False
        return True

    # The layout

    def write_layout(self, limits: Limits, now: float) -> None:
        """Make the memory a gate on which nothing has happened yet."""
        self._whole[:] = bytes(SEGMENT_SIZE)
        floats, integers = self.floats, self.integers
        for lane, rate, burst in (
            (REQUESTS, limits.requests, limits.burst),
            (UNITS, limits.units, limits.units_burst),
        ):
            floats[lane], floats[lane + 1] = rate, burst
        floats[NOT_BEFORE] = now
        integers[_CONNECTIONS] = limits.connections
        integers[EPOCH] = 0 if limits.are_none else 1
        integers[_MAGIC] = MAGIC

    @property
    def is_complete(self) -> bool:
        """Tell whether the memory holds a gate of this layout."""
        return self.integers[_MAGIC] == MAGIC

    @property
    def limits(self) -> Limits:
        """The limits it was made with."""
        floats = self.floats
        return Limits(floats[REQUESTS], floats[UNITS], self.connections, floats[REQUESTS + 1], floats[UNITS + 1])

    @property
    def connections(self) -> int:
        """Most requests at once; 0 for no limit."""
        return self.integers[_CONNECTIONS]

    def lane(self, lane: int) -> Lane:
        """Return a rate as it stands."""
        floats = self.floats
        return Lane(floats[lane], floats[lane + 1], floats[lane + 2])

    def store_tat(self, lane: int, tat: float) -> None:
        """Store a theoretical arrival time."""
        self.floats[lane + _TAT] = tat

    # Connection slots

    @property
    def taken(self) -> int:
        """How many slots are taken; those of the dead are not, nor any that is known of once this is closed."""
        if self.is_closed:
            return 0
        return sum(self._is_taken(slot) for slot in range(self.connections) if self._slots[slot])

    def _is_taken(self, slot: int) -> bool:
        return slot in self._held or self._is_locked(_FIRST_SLOT_LOCK + slot)

    def _is_locked(self, byte: int) -> bool:
        """Tell whether another process has the lock on a byte."""
        if not HAS_LOCKS:
            return True
        found = fcntl.fcntl(self.descriptor, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, byte))
        return bool(struct.unpack_from("h", found)[0] != fcntl.F_UNLCK)

    def take_slot(self, now: float) -> int:
        """Take a free connection slot and return it, -1 when there is none; under the mutex."""
        count = self.connections
        slot = bytes(self._slots[:count]).find(0)
        if slot >= 0:
            return self._lock_slot(slot)
        if now - self.floats[CHECKED] < _CHECK_EVERY:
            return -1
        self.floats[CHECKED] = now
        return next((slot for slot in range(count) if self._lock_slot(slot) >= 0), -1)

    def _lock_slot(self, slot: int) -> int:
        if slot in self._held or not self._try_lock(_flock(fcntl.F_WRLCK, _FIRST_SLOT_LOCK + slot)):
            return -1
        self._held.add(slot)
        self._slots[slot] = 1
        return slot

    def free_slot(self, slot: int) -> None:
        """Give a slot back; without the mutex, as finalizers call this, in the midst of anything."""
        if slot not in self._held:  # it was taken before a fork, and is the parent's
            return
        self._slots[slot] = 0
        if self.descriptor >= 0:
            self._try_lock(_flock(fcntl.F_UNLCK, _FIRST_SLOT_LOCK + slot))
        self._held.discard(slot)  # last: else another thread could take it, and be unlocked

    # The queue

    def next_number(self) -> int:
        """Return a number that is higher than all before; under the mutex."""
        self.integers[_NUMBER] = number = self.integers[_NUMBER] + 1
        return number

    def waiting_before(self, number: int, now: float) -> int:
        """Count those that wait with a lower number (rule 8), the first of whom is alive; under the mutex."""
        since = now - _AWAKE
        if self.floats[LOOKED] < since:
            return 0
        waiting = zip(self._numbers.tolist(), self._looks.tolist(), range(_PLACES), strict=True)
        before = sorted((other, place) for other, looked, place in waiting if 0 < other < number and looked >= since)
        for count, (_, place) in enumerate(before):
            if self._is_alive(place):
                return len(before) - count
            self._numbers[place] = 0
        return 0

    def count_waiting(self, now: float) -> int:
        """Count those that wait; without the mutex."""
        since = now - _AWAKE
        if self.floats[LOOKED] < since:
            return 0
        waiting = zip(self._numbers.tolist(), self._looks.tolist(), strict=True)
        return sum(number > 0 and looked >= since for number, looked in waiting)

    def stay(self, number: int, place: int, now: float) -> int:
        """Note that a number is still waiting; return its place, -1 when there is none left. Under the mutex."""
        if place not in self._places:
            place = next((free for free in range(_PLACES) if self._lock_place(free)), -1)
        if place >= 0:
            self._looks[place] = now
            self._numbers[place] = number
        self.floats[LOOKED] = now
        return place

    def leave_queue(self, place: int) -> None:
        """Wait no more; without the mutex, as above. A place taken before a fork is the parent's."""
        if place not in self._places:
            return
        self._numbers[place] = 0
        if self.descriptor >= 0:
            self._try_lock(_flock(fcntl.F_UNLCK, _FIRST_PLACE_LOCK + place))
        self._places.discard(place)  # last: as with slots

    def _is_alive(self, place: int) -> bool:
        return place in self._places or self._is_locked(_FIRST_PLACE_LOCK + place)

    def _lock_place(self, place: int) -> bool:
        """Take a place that is free, or of the dead (rule 9)."""
        if place in self._places or (not HAS_LOCKS and self._numbers[place]):
            return False
        if not self._try_lock(_flock(fcntl.F_WRLCK, _FIRST_PLACE_LOCK + place)):
            return False
        self._places.add(place)
        return True

    # Life

    def be_present(self) -> None:
        """Let others see that the segment is in use (rule 10)."""
        self._try_lock(_flock(fcntl.F_RDLCK, _PRESENCE))

    def is_alone(self) -> bool:
        """Tell whether nobody else uses the segment; nobody can come to while this process has the mutex."""
        return self._try_lock(_flock(fcntl.F_WRLCK, _PRESENCE))

    def reopen(self) -> None:
        """In a forked child: become a process of its own (rule 5). Descriptors of the parent's open file are closed."""
        self._threads = threading.Lock()
        self._held, self._places = set(), set()
        if self.descriptor < 0:
            return
        inherited, self.descriptor = self.descriptor, own_descriptor(self.descriptor)
        os.close(inherited)
        self._look_at(memoryview(mmap.mmap(self.descriptor, SEGMENT_SIZE)))  # the inherited map has a descriptor too
        self.be_present()

    def close(self) -> None:
        """Let go; the last takes the name away. What is known of it can still be read."""
        try:
            if self.name:
                with self:
                    if self.is_alone():
                        unlink_if_same(_PREFIX + self.name, self.descriptor)
        finally:
            descriptor, self.descriptor = self.descriptor, -1
            os.close(descriptor)
            self._look_at(memoryview(bytearray(self._whole)))  # the map goes with the last view, and has a descriptor


def own_descriptor(descriptor: int) -> int:
    """Open the file behind a descriptor once more, for this process alone (rule 5)."""
    try:
        return os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # no /proc, as on macOS: there are no such locks either
        return os.dup(descriptor)


def anonymous_segment(limits: Limits, now: float) -> Segment:
    """Create a gate's memory without a name, for the processes its descriptor is handed to.

    Raises:
        GateUnusableError: The system has no room for shared memory.
    """
    try:
        descriptor = os.memfd_create("shpool-gate", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except (AttributeError, OSError):  # not Linux, or a sandbox that refuses it
        name = "shg" + os.urandom(8).hex()
        descriptor = open_segment(name, os.O_CREAT | os.O_EXCL | os.O_RDWR)
        unlink_if_there(name)
    try:
        allocate(descriptor, "anonymous", SEGMENT_SIZE)
        seal(descriptor, against_writes=False)
        segment = Segment(descriptor)
    except BaseException as exc:
        os.close(descriptor)
        if isinstance(exc, BoardError):
            no_name = ""
            raise GateUnusableError(no_name, exc.detail) from None
        raise
    segment.write_layout(limits, now)
    return segment


def named_segment(name: str, limits: Limits, now: float) -> Segment:
    """Join the gate of that name, or make it.

    Raises:
        ValueError: The name cannot be one of a shared-memory segment.
        GateInUseError: Others use it with other limits.
        GateUnusableError: Another user or something else holds the name, or there is no room for shared memory.
    """
    _check_name(name)
    if not HAS_LOCKS:
        raise GateUnusableError(name, NO_LOCKS)
    sweep_left()
    try:
        while True:
            with opened_safely(_PREFIX + name, os.O_RDWR | os.O_CREAT) as descriptor:
                segment = _joined(name, descriptor, limits, now)
            if segment is not None:
                return segment
    except BoardError as exc:
        raise GateUnusableError(name, exc.detail) from None  # the user gave a gate's name, and knows of no board


def sweep_left() -> list[str]:
    """Take away the names of this user's gates that nobody uses; return them. Linux only, else nothing."""
    swept = []
    with contextlib.suppress(OSError):
        for entry in os.scandir(FOLDER):
            if not entry.name.startswith(_PREFIX):
                continue
            with contextlib.suppress(OSError, BoardError), opened_safely(entry.name, os.O_RDWR) as descriptor:
                if _is_left(descriptor) and unlink_if_same(entry.name, descriptor):
                    swept.append(entry.name.removeprefix(_PREFIX))
    return swept


def _is_left(descriptor: int) -> bool:
    """Tell whether nobody uses a segment; both locks go with the descriptor."""
    if not HAS_LOCKS or os.fstat(descriptor).st_size not in {0, SEGMENT_SIZE}:
        return False
    try:
        for byte in (_MUTEX, _PRESENCE):
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _flock(fcntl.F_WRLCK, byte))
    except (BlockingIOError, PermissionError):
        return False
    return True


def _joined(name: str, descriptor: int, limits: Limits, now: float) -> Segment | None:
    """Return a hold on a named segment, None if its last user is taking the name away at this moment."""
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLKW, _LOCK_MUTEX)
    try:
        size = os.fstat(descriptor).st_size
        if not leads_to(_PREFIX + name, descriptor):
            return None
        if size not in {0, SEGMENT_SIZE}:
            raise GateUnusableError(name, f"what holds that name is no gate of this shpool ({size} bytes)")
        if not size:
            allocate(descriptor, _PREFIX + name, SEGMENT_SIZE)
        segment = Segment(os.dup(descriptor), name)  # the same open file, so its locks stay
        try:
            _agree(segment, limits, now)
        except BaseException:
            os.close(segment.descriptor)
            raise
        return segment
    finally:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _UNLOCK_MUTEX)


def _agree(segment: Segment, limits: Limits, now: float) -> None:
    """Set the limits of a segment that nobody uses, else see that they are the same (rule 10)."""
    if segment.is_alone() or not segment.is_complete:
        segment.write_layout(limits, now)
    elif segment.limits != limits:
        raise GateInUseError(segment.name, str(segment.limits), str(limits))
    segment.be_present()


def _check_name(name: str) -> None:
    is_text = isinstance(name, str) and 0 < len(name) <= _LONGEST_NAME and "/" not in name and "\0" not in name
    if not is_text:
        msg = f"a gate's name must have 1 to {_LONGEST_NAME} characters and no slash, not {name!r}"
        raise ValueError(msg)
