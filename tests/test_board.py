"""The board: each of its numbered rules, in real memory and with real processes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import mmap
import operator
import os
import pwd
import resource
import signal
import struct
import subprocess
import sys
import threading
import warnings
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from patience import NEVER, in_time

from shpool.board import (
    CLOSED,
    LARGEST_PAYLOAD,
    MAGIC,
    SEGMENT_SIZE,
    Board,
    BoardReader,
    ReportBox,
    _settled,
    _unlinked_board,
    anonymous_board,
    attach_named,
    named_board,
    start_time_of,
    sweep_abandoned,
)
from shpool.engines.birth import start_process
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

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_SHM = Path("/dev/shm")
_SLOT = 64 * 1024
_PATIENCE = 30  # s; a child that takes longer hangs
_NOBODY = 65534

pytestmark = pytest.mark.skipif(not _SHM.is_dir(), reason="these tests look at segments where Linux keeps them")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")


@pytest.fixture
def board() -> Iterator[Board]:
    made = anonymous_board()
    yield made
    made.close()


@pytest.fixture
def named(memory_name: str) -> Iterator[Board]:
    made = named_board(memory_name)
    yield made
    made.close()


@pytest.fixture
def reader(board: Board) -> Iterator[BoardReader]:
    made = board.reader()
    yield made
    made.close()


def segment(board: Board) -> bytearray:
    """Return a copy of all bytes of a named board."""
    return bytearray((_SHM / board.name).read_bytes())


def run_python(code: str, env: dict[str, str], *args: str, python: str = sys.executable) -> str:
    """Run a program in a process of its own and return what it printed."""
    command = [python, "-W", "error", "-c", code, *args]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@contextlib.contextmanager
def running(code: str, env: dict[str, str], *args: str) -> Iterator[subprocess.Popen[str]]:
    """Run a program that prints a line once it is up and ends with its standard input."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code, *args], env=env, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "up\n"
            yield process
            process.communicate(timeout=_PATIENCE)  # ends its input, and waits for whoever holds its output
        except BaseException:
            process.kill()
            raise


_OWNER = """
import sys
from shpool.board import ReportBox, named_board
board, box = named_board(sys.argv[1]), ReportBox(sys.argv[1], create=True)
board.post(b"left behind", 1.0)
print("up", flush=True)
sys.stdin.read()
board.close()
box.close()
"""


@contextlib.contextmanager
def abandoned(name: str, env: dict[str, str], *, reap: bool = True) -> Iterator[int]:
    """Leave the board of a process that was killed; the lock is ours until now, as neighbouring tests sweep."""
    with running(_OWNER, env, name) as owner, (_SHM / name).open("rb") as segment:
        owner.kill()
        fcntl.flock(segment, fcntl.LOCK_EX)
        if reap:
            owner.wait(_PATIENCE)
        else:
            os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)
        fcntl.flock(segment, fcntl.LOCK_UN)
        yield owner.pid
        (_SHM / f"{name}.refused").unlink(missing_ok=True)


# Rules 1 to 7: layout and reading


@settings(max_examples=50)
@given(payloads=st.lists(st.binary(max_size=3000), min_size=1, max_size=5))
@example(payloads=[bytes(LARGEST_PAYLOAD), b"", b"x" * LARGEST_PAYLOAD])
def test_what_is_posted_last_is_what_is_read(payloads: list[bytes]) -> None:
    board = anonymous_board()
    with contextlib.closing(board), contextlib.closing(board.reader()) as reader:
        for version, payload in enumerate(payloads, start=1):
            board.post(payload, 1.5)
            assert reader.read() == (version, payload)
            assert board.version == version


def test_header_names_layout_and_owner_and_the_size_never_changes(named: Board) -> None:
    """Rules 1 and 2."""
    for payload in (b"small", bytes(LARGEST_PAYLOAD)):
        named.post(payload, 1.0)
        assert (_SHM / named.name).stat().st_size == SEGMENT_SIZE == 64 + 2 * _SLOT
    assert struct.unpack_from("=4Q", segment(named)) == (2, MAGIC, os.getpid(), start_time_of(os.getpid()))
    assert start_time_of(os.getpid()) > 0


def test_record_goes_into_the_slot_of_its_version_and_is_led_by_its_digest(named: Board) -> None:
    """Rules 3 and 4."""
    for version in (1, 2, 3):
        named.post(b"payload %d" % version, version / 2)
        start = 64 + version % 2 * _SLOT
        body = struct.pack("=QdQ", version, version / 2, 9) + b"payload %d" % version
        assert segment(named)[start : start + 32 + len(body)] == hashlib.sha256(body).digest() + body


def test_next_record_is_not_seen_before_its_version_is_stored(named: Board) -> None:
    """Rule 3: the word comes last, so a writer that dies inside a record harms nobody."""
    named.post(b"first", 1.0)
    named._bytes[64 : 64 + _SLOT] = b"half" * (_SLOT // 4)
    with contextlib.closing(attach_named(named.name)) as reader:
        assert reader.read() == (1, b"first")


class LappedWord:
    """A version word under which the writer rewrites the slot between a reader's look and its copy."""

    def __init__(self, board: Board, laps: int) -> None:
        self._board = board
        self._laps = laps

    def __getitem__(self, index: int) -> int:
        version = self._board.version
        if self._laps:
            self._laps -= 1
            for lap in range(2):
                self._board.post(b"lap %d %d" % (self._laps, lap), 1.0)
        return version

    def release(self) -> None:
        """As memoryview's."""


def test_reader_that_is_lapped_tries_again(board: Board, reader: BoardReader) -> None:
    """Rule 5: a whole record of another version is not what the word told."""
    board.post(b"first", 1.0)
    reader.version_word.release()
    reader.version_word = cast("Any", LappedWord(board, laps=3))
    assert reader.read() == (7, b"lap 0 1")


def test_reader_that_is_lapped_without_end_gives_up(board: Board, reader: BoardReader) -> None:
    """Rule 5: bounded, whatever the writer does."""
    board.post(b"first", 1.0)
    reader.version_word.release()
    reader.version_word = cast("Any", LappedWord(board, laps=10**9))
    with pytest.raises(TornBoardError):
        reader.read()


@pytest.mark.parametrize(
    ("offset", "what"),
    [(0, "digest"), (32, "version"), (40, "deadline"), (48, "length"), (62, "length"), (56, "payload")],
)
def test_one_wrong_bit_is_never_read(named: Board, offset: int, what: str) -> None:
    """Rule 5: any damage to a record shows."""
    if sys.byteorder == "big" and offset == 62:
        offset = 49
    named.post(b"payload that is here", 1.0)
    named._bytes[64 + _SLOT + offset] ^= 0x40
    with contextlib.closing(attach_named(named.name)) as reader, pytest.raises(TornBoardError) as caught:
        reader.read()
    assert caught.value.name == named.name
    named.post(b"the next one", 1.0)
    with contextlib.closing(attach_named(named.name)) as reader:
        assert reader.read() == (2, b"the next one")


def test_nothing_posted_and_closed_read_as_such(memory_name: str) -> None:
    """Rules 6 and 12: readers that stay attached are told, and find the token gone from memory."""
    board = named_board(memory_name)
    reader = attach_named(memory_name)
    assert reader.read() == (0, b"")
    board.post(b"canary", 1.0)
    board.post(b"canary", 1.0)
    board.close()
    assert reader.read() == (CLOSED, b"")
    assert bytes(reader._bytes[64:]) == bytes(2 * _SLOT)
    assert not (_SHM / memory_name).exists()
    reader.close()


def test_oversized_payload_leaves_the_old_one(board: Board, reader: BoardReader) -> None:
    board.post(b"old", 1.0)
    with pytest.raises(TokenTooLargeError, match=f"{LARGEST_PAYLOAD + 1} bytes and the board holds {LARGEST_PAYLOAD}"):
        board.post(bytes(LARGEST_PAYLOAD + 1), 1.0)
    assert reader.read() == (1, b"old")


def test_closed_board_posts_nothing(memory_name: str) -> None:
    board = named_board(memory_name)
    board.close()
    board.close()
    assert board.is_closed
    assert not board.has_vanished()
    with pytest.raises(ValueError, match="closed"):
        board.post(b"late", 1.0)


# Rule 8: anonymous boards


class Descriptor:
    """Arrives in a spawned process as a descriptor of its own."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __reduce__(self) -> tuple[Callable[[Any], Any], tuple[object, ...]]:
        return operator.methodcaller("detach"), (DupFd(self._number),)


def ask_worker(code: str, answers: Path, **names: object) -> Any:
    """Run code in a process that is started as the crew's are, and return the ``answer`` it made."""
    code += "\nimport json, pathlib\npathlib.Path(path).write_text(json.dumps(answer))"
    process = start_process(exec, (code, {"path": str(answers), **names}))
    assert process.await_end(_PATIENCE)
    assert process.exitcode == 0
    return json.loads(answers.read_text())


_READ_IN_WORKER = "version, payload = reader.read()\nanswer = [version, payload.decode(), reader.name]"


@pytest.mark.slow
def test_anonymous_board_is_read_by_a_spawned_worker(board: Board, tmp_path: Path) -> None:
    board.post(b"hello", 1.0)
    handle = board.handle()
    assert ask_worker(_READ_IN_WORKER, tmp_path / "answer", reader=handle) == [1, "hello", ""]
    assert not os.get_inheritable(board._handed_over)


_ATTACK = """
import ctypes, errno, mmap, os
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

def remap():
    address = libc.mmap(None, 4096, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if libc.mprotect(address, 4096, mmap.PROT_READ | mmap.PROT_WRITE):
        raise OSError(ctypes.get_errno(), "mprotect")

def reopened(attempt):
    other = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    try:
        attempt(other)
    finally:
        os.close(other)

attempts = {
    "write": lambda: os.pwrite(fd, b"forged", 0),
    "writable map": lambda: mmap.mmap(fd, 4096),
    "map made writable": remap,
    "shrink": lambda: os.ftruncate(fd, 1),
    "grow": lambda: os.ftruncate(fd, 1 << 20),
    "write, opened anew": lambda: reopened(lambda other: os.pwrite(other, b"forged", 0)),
    "shrink, opened anew": lambda: reopened(lambda other: os.ftruncate(other, 1)),
}
answer = {}
for name, attempt in attempts.items():
    try:
        attempt()
        answer[name] = "allowed"
    except OSError as exc:
        answer[name] = "refused" if exc.errno in {errno.EPERM, errno.EACCES} else repr(exc)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="seals are Linux's")
def test_worker_can_neither_write_nor_resize(board: Board, reader: BoardReader, tmp_path: Path) -> None:
    """Rule 8, against a worker that holds the descriptor and means harm."""
    board.post(b"true", 1.0)
    answer = ask_worker(_ATTACK, tmp_path / "answer", fd=Descriptor(board._descriptor))
    assert answer == dict.fromkeys(answer, "refused")
    assert len(answer) == 7
    assert reader.read() == (1, b"true")
    board.post(b"still true", 1.0)
    assert reader.read() == (2, b"still true")


@pytest.mark.slow
def test_board_without_memfd_has_no_name_and_a_read_only_descriptor(tmp_path: Path) -> None:
    """The way of systems without memfd: unlinked at once."""
    before = set(_SHM.glob("shpool-*"))
    board = _unlinked_board()
    with contextlib.closing(board):
        assert set(_SHM.glob("shpool-*")) <= before
        board.post(b"hello", 1.0)
        assert ask_worker(_READ_IN_WORKER, tmp_path / "answer", reader=board.handle())[1] == "hello"
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(board._handed_over, b"forged", 0)
        with pytest.raises(PermissionError):
            mmap.mmap(board._handed_over, SEGMENT_SIZE)
        assert os.fstat(board._handed_over).st_nlink == 0
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(board._handed_over)


# Rule 9: named boards and their owners


@pytest.mark.parametrize("umask", [0, 0o777])
def test_named_board_is_private_whatever_the_umask(memory_name: str, umask: int) -> None:
    before = os.umask(umask)
    try:
        board = named_board(memory_name)
        box = ReportBox(memory_name, create=True)
    finally:
        os.umask(before)
    with contextlib.closing(board), contextlib.closing(box):
        assert (_SHM / memory_name).stat().st_mode & 0o7777 == 0o600
        assert (_SHM / f"{memory_name}.refused").stat().st_mode & 0o7777 == 0o600


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system cannot reserve memory")
def test_memory_is_reserved_at_creation(named: Board) -> None:
    """A full /dev/shm is an error at once and not a SIGBUS later."""
    assert (_SHM / named.name).stat().st_blocks * 512 >= SEGMENT_SIZE


_NO_ROOM = """
import resource, sys
from shpool.board import anonymous_board, named_board
from shpool.errors import BoardError
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
for create in (anonymous_board, lambda: named_board(sys.argv[1])):
    try:
        create()
    except BoardError as exc:
        print(exc)
"""


def test_no_room_is_an_error_and_leaves_nothing(memory_name: str, child_env: dict[str, str]) -> None:
    told = run_python(_NO_ROOM, child_env, memory_name).splitlines()
    assert len(told) == 2
    assert all("cannot be used" in line for line in told)
    assert not (_SHM / memory_name).exists()


@pytest.mark.parametrize("name", ["", "a/b", "nul\0", ".hidden", "x" * 300, "other.refused", None, 7])
def test_impossible_names_are_refused(name: Any) -> None:
    """A name with the suffix of the reports would collide with another board's."""
    for function in (named_board, attach_named):
        with pytest.raises(ValueError, match="memory_name"):
            function(name)


def test_name_of_this_very_process_is_in_use(named: Board) -> None:
    with pytest.raises(BoardInUseError, match=rf"process {os.getpid()};"):
        named_board(named.name)
    assert not named.has_vanished()


@pytest.mark.slow
def test_living_owner_is_never_robbed(memory_name: str, child_env: dict[str, str]) -> None:
    """Defect 10: an error that names the process, and its board goes on."""
    with running(_OWNER, child_env, memory_name) as owner:
        with pytest.raises(BoardInUseError) as caught:
            named_board(memory_name)
        assert caught.value.pid == owner.pid
        assert f"process {owner.pid}" in str(caught.value)
        assert memory_name not in sweep_abandoned()
        with contextlib.closing(attach_named(memory_name)) as reader:
            assert reader.read() == (1, b"left behind")


@pytest.mark.slow
def test_dead_owner_is_succeeded_with_a_warning(memory_name: str, child_env: dict[str, str]) -> None:
    with abandoned(memory_name, child_env):
        with pytest.warns(SHUserWarning, match="ended process"):
            board = named_board(memory_name)
        with contextlib.closing(board), contextlib.closing(attach_named(memory_name)) as reader:
            assert reader.read() == (0, b"")


@pytest.mark.slow
def test_zombie_owner_is_dead(memory_name: str, child_env: dict[str, str]) -> None:
    """In a container nobody may reap the killed owner; its name is free all the same."""
    with abandoned(memory_name, child_env, reap=False) as pid:
        with pytest.warns(SHUserWarning, match="ended process"):
            board = named_board(memory_name)
        board.close()
        assert start_time_of(pid) == 0


_FORKING_OWNER = _OWNER.replace(
    "print(", "import os\nif os.fork() == 0:\n    sys.stdin.read()\n    os._exit(0)\nprint("
)


@pytest.mark.slow
def test_children_forked_by_a_dead_owner_do_not_hold_the_name(memory_name: str, child_env: dict[str, str]) -> None:
    """The lock belongs to the open file, which a fork would share."""
    with running(_FORKING_OWNER, child_env, memory_name) as owner:
        owner.kill()
        owner.wait()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SHUserWarning)  # none where a neighbouring test's sweep was faster
            board = named_board(memory_name)
        board.close()
        (_SHM / f"{memory_name}.refused").unlink(missing_ok=True)


def left_behind(name: str, pid: int, started: int) -> int:
    """Make a board by hand that names any owner; return its descriptor, locked."""
    descriptor = os.open(_SHM / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.ftruncate(descriptor, SEGMENT_SIZE)
    os.pwrite(descriptor, struct.pack("=4Q", 0, MAGIC, pid, started), 0)
    return descriptor


def test_recycled_pid_is_not_taken_for_the_owner(memory_name: str) -> None:
    """Rule 9: pid *and* start time."""
    os.close(left_behind(memory_name, os.getpid(), start_time_of(os.getpid()) - 1))
    with pytest.warns(SHUserWarning, match="ended process"):
        named_board(memory_name).close()


def test_owner_that_runs_but_lost_its_lock_is_not_robbed(memory_name: str) -> None:
    """Rule 9: both must tell that it ended; on systems without locks the pid alone does."""
    os.close(left_behind(memory_name, os.getpid(), start_time_of(os.getpid())))
    with pytest.raises(BoardInUseError, match=f"process {os.getpid()};"):
        named_board(memory_name)
    (_SHM / memory_name).unlink()


@pytest.mark.slow
def test_owner_that_cannot_be_seen_but_holds_its_lock_is_not_robbed(memory_name: str) -> None:
    """Rule 9: a container's processes are invisible from outside, their locks are not."""
    descriptor = left_behind(memory_name, 2**22 + 1, 1)
    try:
        with pytest.raises(BoardError, match="holds its lock"):
            named_board(memory_name)
        assert memory_name not in sweep_abandoned()
    finally:
        (_SHM / memory_name).unlink()
        os.close(descriptor)


@contextlib.contextmanager
def looked_at_first(name: str, *, takes_it: bool) -> Iterator[int]:
    """Create a segment that somebody else locks before its owner does; yield the owner's descriptor."""
    descriptor = os.open(_SHM / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    other = (_SHM / name).open("rb")
    fcntl.flock(other, fcntl.LOCK_EX)

    def let_go() -> None:
        if takes_it:
            (_SHM / name).unlink()
        other.close()

    timer = threading.Timer(0.05, let_go)
    timer.start()
    yield descriptor
    timer.join()


def test_owner_gets_its_lock_though_somebody_looked_first(memory_name: str) -> None:
    """Rule 9: who sweeps at the very moment of creation holds the lock for a moment; the owner waits for it."""
    with looked_at_first(memory_name, takes_it=False) as descriptor:
        board = _settled(descriptor, memory_name)
    assert board is not None
    with contextlib.closing(board), (_SHM / memory_name).open("rb") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_owner_begins_again_when_somebody_took_its_new_segment(memory_name: str) -> None:
    """A process that cannot see the owner, as in another container, may take the segment before it is locked."""
    with looked_at_first(memory_name, takes_it=True) as descriptor:
        assert _settled(descriptor, memory_name) is None
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


@pytest.mark.slow
def test_sweep_takes_what_ended_processes_left_and_nothing_else(
    named: Board, memory_name: str, child_env: dict[str, str]
) -> None:
    """Defect 13, the reports beside the board included."""
    dead, other = f"{memory_name}-dead", _SHM / f"{memory_name}-other"
    other.write_bytes(b"no board" * (SEGMENT_SIZE // 8))
    with abandoned(dead, child_env):
        sweep_abandoned()
        assert not (_SHM / dead).exists()
        assert not (_SHM / f"{dead}.refused").exists()
    assert not named.has_vanished()
    assert other.exists()
    other.unlink()


def test_vanished_name_is_noticed(named: Board) -> None:
    assert not named.has_vanished()
    (_SHM / named.name).unlink()
    assert named.has_vanished()
    with contextlib.closing(named_board(named.name)) as other:
        assert named.has_vanished()
        named.close()
        assert not other.has_vanished(), "rule 12: a name that leads elsewhere now is not unlinked"


_FORK = """
import os, sys
from shpool.board import ReportBox, attach_named, named_board
board, box = named_board(sys.argv[1]), ReportBox(sys.argv[1], create=True)
board.post(b"mine", 1.0)
pid = os.fork()
if pid == 0:
    print(board.reader().read(), flush=True)
    try:
        board.post(b"forged", 1.0)
    except ValueError:
        print("read-only", flush=True)
    board.close()
    box.close()
    print(attach_named(sys.argv[1]).read(), flush=True)
    os._exit(0)
os.waitpid(pid, 0)
board.post(b"still mine", 1.0)
print(board.has_vanished(), box.newest(), attach_named(sys.argv[1]).read())
board.close()
box.close()
"""


def test_forked_child_reads_and_neither_writes_nor_unlinks(memory_name: str, child_env: dict[str, str]) -> None:
    told = run_python(_FORK, child_env, memory_name)
    assert told.splitlines() == ["(1, b'mine')", "read-only", "(1, b'mine')", "False 0 (2, b'still mine')"]
    assert not list(_SHM.glob(f"{memory_name}*"))


# Readers and the resource tracker


_COLLECT = """
import sys
from multiprocessing import resource_tracker
from shpool.board import attach_named
print(attach_named(sys.argv[1]).read()[1].decode(), resource_tracker._resource_tracker._fd)
"""


def interpreters() -> Iterator[Any]:
    """Yield this interpreter and those beside it, as far as they are there."""
    yield pytest.param(sys.executable, id="this")
    installed = Path(pwd.getpwuid(os.getuid()).pw_dir) / ".pyenv" / "versions"
    for version in ("3.10", "3.11", "3.12", "3.13"):
        found = next(iter(installed.glob(f"{version}.*/bin/python")), None) if os.access(installed, os.R_OK) else None
        missing = pytest.mark.skipif(found is None, reason=f"no Python {version} here")
        yield pytest.param(str(found), id=version, marks=missing)


@pytest.mark.parametrize("python", list(interpreters()))
def test_reader_that_exits_leaves_the_segment(python: str, named: Board, child_env: dict[str, str]) -> None:
    """Defect 12: before Python 3.13 a resource tracker would take the segment away."""
    named.post(b"hello", 1.0)
    assert run_python(_COLLECT, child_env, named.name, python=python) == "hello None"
    assert not named.has_vanished()


def test_map_of_a_reader_cannot_be_written(named: Board) -> None:
    with contextlib.closing(attach_named(named.name)) as reader:
        with pytest.raises(TypeError, match="read-only"):
            reader._bytes[0] = 1
        with pytest.raises(TypeError, match=r"readonly|read-only"):
            reader._segment[0] = 1


# Rule 10, and whatever else may stand under a name


def both_refuse(name: str, kind: type[BoardError], match: str | None = None) -> None:
    """Check that neither readers nor owners accept a name, and say so without waiting for its completion."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shpool.board._COMPLETE_WITHIN", NEVER)
        for function in (attach_named, named_board):
            with pytest.raises(kind, match=match) as caught:
                in_time(function, name)
            assert caught.value.name == name


def test_unknown_name_is_not_found(memory_name: str) -> None:
    with pytest.raises(BoardNotFoundError, match="sharing must be running") as caught:
        attach_named(memory_name)
    assert isinstance(caught.value, FileNotFoundError)


@pytest.mark.parametrize("mode", [0o666, 0o620, 0o604])
def test_segment_open_to_others_is_refused(named: Board, mode: int) -> None:
    (_SHM / named.name).chmod(mode)
    both_refuse(named.name, ForeignBoardError, f"mode {mode:04o}")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b'{"access_token": "of another program"}', id="another program's"),
        pytest.param(b"x" * SEGMENT_SIZE, id="of a board's size"),
        pytest.param(struct.pack("=QQ", 0, MAGIC + (1 << 56)).ljust(SEGMENT_SIZE, b"\0"), id="another layout"),
    ],
)
def test_segment_that_is_no_board_is_refused_and_kept(memory_name: str, content: bytes) -> None:
    path = _SHM / memory_name
    path.touch(mode=0o600)
    path.write_bytes(content)
    both_refuse(memory_name, BoardLayoutError)
    assert path.read_bytes() == content
    path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, SEGMENT_SIZE])
def test_segment_that_is_never_completed_is_refused_by_readers_and_taken_over_by_an_owner(
    memory_name: str, size: int
) -> None:
    """Its creator may be between two system calls, but not for ever; one that died there must not block the name."""
    path = _SHM / memory_name
    path.touch(mode=0o600)
    os.truncate(path, size)
    with path.open("rb") as segment:
        fcntl.flock(segment, fcntl.LOCK_EX)  # until the owner comes: neighbouring tests sweep
        with pytest.raises(BoardLayoutError, match="never completed"):
            in_time(attach_named, memory_name)
    with pytest.warns(SHUserWarning, match="took over"):
        board = in_time(named_board, memory_name)
    board.close()


def test_a_kernel_that_refuses_memfd_gets_an_unlinked_board(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSYS, "not implemented")

    monkeypatch.setattr(os, "memfd_create", refuse)
    board = anonymous_board()
    board.post(b"invented", 1.0)
    assert board.reader().read() == (1, b"invented")
    board.close()


def test_a_named_board_is_taken_away_even_without_a_free_descriptor(memory_name: str) -> None:
    board = named_board(memory_name)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
    held: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 1, hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.dup(0))
        assert not board.has_vanished()
        board.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in held:
            os.close(descriptor)
    assert not (_SHM / memory_name).exists()


@pytest.mark.parametrize("kind", ["symlink", "dangling symlink", "directory"])
def test_squatted_name_is_refused(memory_name: str, kind: str, tmp_path: Path) -> None:
    path = _SHM / memory_name
    if kind == "directory":
        path.mkdir()
    else:
        target = tmp_path / "target"
        target.write_bytes(b"precious" if kind == "symlink" else b"")
        if kind == "dangling symlink":
            target.unlink()
        path.symlink_to(target)
    both_refuse(memory_name, BoardError)
    path.rmdir() if kind == "directory" else path.unlink()
    assert kind != "symlink" or target.read_bytes() == b"precious"


_AS_NOBODY = """
import hashlib  # now: where Python lies may be closed to nobody
import os, sys
from shpool.board import ReportBox, attach_named, named_board, sweep_abandoned
from shpool.errors import BoardError
name = sys.argv[1]
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
"""
_TRY = """
for attempt in (attach_named, named_board, lambda name: ReportBox(name, create=False),
                lambda name: ReportBox(name, create=True)):
    try:
        attempt(name)
        print("done")
    except BoardError as exc:
        print(type(exc).__name__)
print(name in sweep_abandoned())
try:
    os.unlink("/dev/shm/" + name)
    print("gone")
except PermissionError:
    print("stays")
"""


@needs_root
def test_another_user_can_neither_read_nor_take_nor_report(named: Board, child_env: dict[str, str]) -> None:
    """Defect 11, seen from the other user."""
    named.post(b"secret", 1.0)
    with contextlib.closing(ReportBox(named.name, create=True)) as box:
        told = run_python(_AS_NOBODY + _TRY, child_env, named.name).split()
        assert told == ["ForeignBoardError"] * 4 + ["False", "stays"]
        assert box.newest() == 0
    assert not named.has_vanished()


@needs_root
@pytest.mark.slow
def test_board_of_another_user_is_refused(memory_name: str, child_env: dict[str, str]) -> None:
    """Defect 11, seen from the victim: what another user has put under the name is not believed."""
    owner = _AS_NOBODY + _OWNER.partition("named_board\n")[2]
    with running(owner, child_env, memory_name):
        both_refuse(memory_name, ForeignBoardError, "belongs to user 65534")
        with pytest.raises(ForeignBoardError, match="another user"):
            ReportBox(memory_name, create=False)


# Rule 11: reports


def test_newest_report_wins(named: Board) -> None:
    with contextlib.closing(ReportBox(named.name, create=True)) as box:
        for generation in (3, 5, 4):
            with contextlib.closing(ReportBox(named.name, create=False)) as mine:
                mine.report(generation)
        assert box.newest() == 5
    assert not (_SHM / f"{named.name}.refused").exists()


def test_reports_of_a_former_owner_are_not_heard(memory_name: str) -> None:
    former = ReportBox(memory_name, create=True)
    former.report(9)
    with contextlib.closing(ReportBox(memory_name, create=True)) as box:
        assert box.newest() == 0
        former.close()
        former.close()
        assert (_SHM / f"{memory_name}.refused").exists()


def test_reports_without_a_board_have_nowhere_to_go(memory_name: str) -> None:
    with pytest.raises(BoardNotFoundError):
        ReportBox(memory_name, create=False)


def test_something_else_beside_a_board_is_no_report_box(memory_name: str) -> None:
    path = _SHM / f"{memory_name}.refused"
    path.write_bytes(b"too long to be a word")
    before = _descriptors()
    with pytest.raises(ForeignBoardError):
        ReportBox(memory_name, create=False)
    assert _descriptors() == before
    path.unlink()


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# Whatever dies


_READER = """
import sys
from shpool.board import attach_named
reader = attach_named(sys.argv[1])
print("up", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_board_survives_a_reader_that_is_killed(named: Board, child_env: dict[str, str]) -> None:
    with running(_READER, child_env, named.name) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    named.post(b"on", 1.0)
    with contextlib.closing(attach_named(named.name)) as reader:
        assert reader.read() == (1, b"on")
