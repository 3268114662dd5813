"""Sharing a session under a name: from its start to its end, with real processes on the other side."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import pickle
import struct
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from patience import NEVER, in_time

from shpool import OAuthSession, SessionSharing, SessionSharingThread, SharedSession, collect_shared_session
from shpool.board import (
    CLOSED,
    LARGEST_PAYLOAD,
    MAGIC,
    SEGMENT_SIZE,
    Board,
    BoardReader,
    anonymous_board,
    attach_named,
    named_board,
    start_time_of,
)
from shpool.channels import BoardChannel, NamedChannel, TeeChannel
from shpool.errors import (
    BoardError,
    BoardInUseError,
    BoardNotFoundError,
    ForeignBoardError,
    LoginError,
    LoginRefusedError,
    SHUserWarning,
    TokenTooLargeError,
    TokenUnavailableError,
)
from shpool.sharing import SharingThread
from shpool.tokens import Posting, Token, boot_time

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shpool.testing import LoopbackServer

_SHM = Path("/dev/shm")
_PATIENCE = 30  # s; what takes longer hangs

pytestmark = pytest.mark.skipif(not _SHM.is_dir(), reason="these tests look at segments where Linux keeps them")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")


@pytest.fixture
def session(server: LoopbackServer) -> OAuthSession:
    return OAuthSession(server.token_url, server.client_id, server.client_secret)


@pytest.fixture
def shared(session: OAuthSession, memory_name: str) -> Iterator[SharedSession]:
    """A shared session as another process would hold it."""
    with SessionSharing(session, memory_name=memory_name):
        yield collect_shared_session(memory_name)


@pytest.fixture
def board() -> Iterator[Board]:
    made = anonymous_board()
    yield made
    made.close()


def make_token(generation: int, lifetime: float = 600.0) -> Token:
    return Token(
        f"invented-{generation}", time.time() + lifetime, boot_time() + lifetime, lifetime, generation=generation
    )


def post(board: Board, posting: Posting) -> None:
    BoardChannel(board).publish(posting)


def eventually(condition: Callable[[], object]) -> None:
    """Wait until a condition holds; fail when it does not come to."""
    give_up = time.monotonic() + _PATIENCE
    while not condition():
        assert time.monotonic() < give_up, "it never came true"
        time.sleep(0.005)


def left_in_memory(name: str) -> list[str]:
    return [path.name for path in _SHM.glob(f"{name}*")]


def run_python(code: str, env: dict[str, str], *args: str, code_expected: int = 0) -> str:
    command = [sys.executable, "-W", "error", "-c", code, *args]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    assert done.returncode == code_expected, done.stderr
    return done.stdout.strip() + done.stderr


# From the start to the end


_COLLECT = """
import sys
from shpool import collect_shared_session
shared = collect_shared_session(sys.argv[1])
print(shared.token["access_token"], shared.info()["azp"], shared.session_headers["Authorization"][:7])
"""


@pytest.mark.slow
def test_another_process_reads_the_token(
    session: OAuthSession, server: LoopbackServer, memory_name: str, child_env: dict[str, str]
) -> None:
    """It logs in never, and the segment outlives it."""
    with SessionSharing(session, memory_name=memory_name):
        for _ in range(2):
            told = run_python(_COLLECT, child_env, memory_name)
            assert told.split() == [session.token["access_token"], "demo-client", "Bearer"]
    assert server.logins == 1


def test_join_zeroes_and_unlinks(session: OAuthSession, memory_name: str) -> None:
    thread = SessionSharingThread(session, memory_name=memory_name, name="of my own")
    thread.start()
    assert thread.name == "of my own"
    shared, reader = collect_shared_session(memory_name), attach_named(memory_name)
    assert shared.token.generation == 1
    thread.join()
    assert not thread.is_alive()
    assert left_in_memory(memory_name) == []
    assert reader.read() == (CLOSED, b"")
    assert not any(bytes(reader._bytes[64:]))
    reader.close()
    with pytest.raises(TokenUnavailableError, match="sharing has ended"):
        _ = shared.token
    with pytest.raises(BoardNotFoundError, match="sharing must be running"):
        collect_shared_session(memory_name)


@pytest.mark.parametrize("fault", ["refused", "unavailable", "unreachable"])
def test_start_raises_the_login_error_and_leaves_nothing(
    session: OAuthSession, server: LoopbackServer, memory_name: str, fault: str
) -> None:
    """Defect 1: the original waits for ever."""
    kind: type[LoginError] = LoginError
    if fault == "refused":
        server.answer_always(401, body={"error": "invalid_client"})
        kind = LoginRefusedError
    elif fault == "unavailable":
        server.answer_always(503)
    else:
        server.refuse_connections()
    thread = SessionSharingThread(session, memory_name=memory_name)
    with pytest.raises(kind):
        thread.start()
    assert left_in_memory(memory_name) == []
    assert not thread.is_alive()


def test_token_too_large_for_the_board_is_raised(memory_name: str) -> None:
    """Defect 7."""
    sharing = SessionSharing(lambda: {"access_token": "x" * LARGEST_PAYLOAD, "expires_in": 60}, memory_name=memory_name)
    with pytest.raises(TokenTooLargeError):
        sharing.__enter__()
    assert left_in_memory(memory_name) == []


def test_session_that_does_not_refresh_is_refused(memory_name: str) -> None:
    session = OAuthSession.from_token({"access_token": "invented", "expires_at": time.time() + 60})
    for kind in (SessionSharing, SessionSharingThread):
        with pytest.raises(ValueError, match="does not refresh"):
            kind(session, memory_name=memory_name)
    assert left_in_memory(memory_name) == []


def test_second_start_is_refused_and_harms_nothing(session: OAuthSession, memory_name: str) -> None:
    with SessionSharing(session, memory_name=memory_name) as sharing:
        assert sharing.thread is not None
        with pytest.raises(RuntimeError, match="once"):
            sharing.thread.start()
        assert sharing.thread.is_alive()
        assert collect_shared_session(memory_name).token.generation == 1


def test_thread_that_is_never_started_leaves_nothing(session: OAuthSession, memory_name: str) -> None:
    thread = SessionSharingThread(session, memory_name=memory_name)
    assert left_in_memory(memory_name)
    del thread
    gc.collect()
    assert left_in_memory(memory_name) == []
    with pytest.raises(TypeError):
        SessionSharingThread(session, memory_name=memory_name, no_such_argument=1)
    gc.collect()
    assert left_in_memory(memory_name) == []


def test_join_with_a_timeout_never_unlinks_under_a_living_thread(session: OAuthSession, memory_name: str) -> None:
    thread = SessionSharingThread(session, memory_name=memory_name)
    thread.start()
    held = threading.Event()
    thread._channel.newest_report = lambda: held.wait(_PATIENCE) and 0  # type: ignore[method-assign]  # a thread that is busy for long
    thread.refresher.stop()
    thread._woken.set()
    thread.join(0.05)
    assert thread.is_alive()
    assert collect_shared_session(memory_name).token.generation == 1
    held.set()
    thread.join()
    assert left_in_memory(memory_name) == []


# Names


def test_second_sharing_under_a_living_name_is_refused(
    session: OAuthSession, server: LoopbackServer, memory_name: str
) -> None:
    """Defect 10: no second login either, and the first goes on."""
    with SessionSharing(session, memory_name=memory_name):
        other = OAuthSession(server.token_url, server.client_id, server.client_secret)
        with pytest.raises(BoardInUseError, match=f"process {os.getpid()};"):
            SessionSharingThread(other, memory_name=memory_name)
        assert collect_shared_session(memory_name).token.generation == 1
        assert server.logins == 1
    with SessionSharing(session, memory_name=memory_name):
        assert collect_shared_session(memory_name).token["access_token"] == session.token["access_token"]


_LEAVE_BEHIND = """
import os, signal, sys
from shpool import SessionSharingThread
SessionSharingThread(lambda: {"access_token": "of-the-dead", "expires_in": 600}, memory_name=sys.argv[1]).start()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_name_of_a_killed_process_is_taken_over(
    session: OAuthSession, memory_name: str, child_env: dict[str, str]
) -> None:
    """Defect 13."""
    run_python(_LEAVE_BEHIND, child_env, memory_name, code_expected=-9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SHUserWarning)  # none where the sweep of a neighbouring test was faster
        sharing = SessionSharingThread(session, memory_name=memory_name)
    sharing.start()
    assert collect_shared_session(memory_name).token["access_token"] == session.token["access_token"]
    sharing.join()
    assert left_in_memory(memory_name) == []


def test_taking_a_name_over_is_told(session: OAuthSession, memory_name: str) -> None:
    """The sweep at each start does not take it away unsaid."""
    header = struct.pack("=4Q", 0, MAGIC, os.getpid(), start_time_of(os.getpid()) - 1)
    path = _SHM / memory_name
    path.touch(mode=0o600)
    path.write_bytes(header.ljust(SEGMENT_SIZE, b"\0"))
    with pytest.warns(SHUserWarning, match="ended process"), SessionSharing(session, memory_name=memory_name):
        assert collect_shared_session(memory_name).token.generation == 1


@pytest.mark.slow
def test_what_a_killed_process_left_is_swept_at_the_next_start(
    session: OAuthSession, memory_name: str, child_env: dict[str, str]
) -> None:
    """Defect 13, under whatever name."""
    run_python(_LEAVE_BEHIND, child_env, f"{memory_name}-dead", code_expected=-9)
    with SessionSharing(session, memory_name=memory_name):
        assert left_in_memory(f"{memory_name}-dead") == []


def test_sharing_where_the_reports_cannot_stand_leaves_no_board(session: OAuthSession, memory_name: str) -> None:
    (_SHM / f"{memory_name}.refused").mkdir()
    with pytest.raises(BoardError, match=memory_name):
        SessionSharingThread(session, memory_name=memory_name)
    assert left_in_memory(memory_name) == [f"{memory_name}.refused"]
    (_SHM / f"{memory_name}.refused").rmdir()


_AS_NOBODY = """
import os, sys
import shpool.session
from shpool import SessionSharingThread
from shpool.errors import ForeignBoardError
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
try:
    SessionSharingThread(lambda: {"access_token": "forged", "expires_in": 60}, memory_name=sys.argv[1])
except ForeignBoardError as exc:
    print(exc)
"""


@needs_root
@pytest.mark.slow
@pytest.mark.parametrize("squatted", ["", ".refused"])
def test_name_squatted_by_another_user_is_a_clear_error(
    squatted: str, memory_name: str, child_env: dict[str, str]
) -> None:
    """Defect 11: one error at once, and nothing of ours beside the squatter's."""
    (_SHM / f"{memory_name}{squatted}").touch(mode=0o600)
    assert "choose another memory_name" in run_python(_AS_NOBODY, child_env, memory_name)
    assert left_in_memory(memory_name) == [f"{memory_name}{squatted}"]
    (_SHM / f"{memory_name}{squatted}").unlink()


def test_vanished_name_comes_back(session: OAuthSession, memory_name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Somebody cleans /dev/shm; who was attached before, and who comes later, reads on and can report."""
    with SessionSharing(session, memory_name=memory_name):
        before = collect_shared_session(memory_name)
        assert before.token.generation == 1
        for name in (f"{memory_name}.refused", memory_name):
            (_SHM / name).unlink()
        eventually(lambda: len(left_in_memory(memory_name)) == 2)
        eventually(lambda: attach_named(memory_name).read()[0])
        assert collect_shared_session(memory_name).token == before.token
        before.report_refused(1)
        assert before.wait_for_token(_PATIENCE, newer_than=1).generation == 2
    assert left_in_memory(memory_name) == []
    assert caplog.records == []


def test_a_lost_report_box_comes_back(session: OAuthSession, server: LoopbackServer, memory_name: str) -> None:
    with SessionSharing(session, memory_name=memory_name):
        shared = collect_shared_session(memory_name)
        assert shared.token.generation == 1
        (_SHM / f"{memory_name}.refused").unlink()
        eventually(lambda: len(left_in_memory(memory_name)) == 2)
        shared.report_refused(1)
        assert shared.wait_for_token(_PATIENCE, newer_than=1).generation == 2
    assert server.logins == 2


@contextlib.contextmanager
def heir_until_the_end(sharing: SessionSharing) -> Iterator[None]:
    try:
        yield
    finally:
        sharing.__exit__(None, None, None)


_SHARE_AND_DIE = """
import os, sys, time
from shpool.tokens import Posting, Token, boot_time
from shpool.channels import NamedChannel
channel = NamedChannel(sys.argv[1])
channel.publish(Posting(Token("invented-first", time.time() + 0.5, boot_time() + 0.5, 0.5, generation=1)))
print("shared", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_a_reader_follows_the_heir_of_an_owner_that_was_killed(
    session: OAuthSession, memory_name: str, child_env: dict[str, str]
) -> None:
    command = [sys.executable, "-c", _SHARE_AND_DIE, memory_name]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=child_env, stdin=pipe, stdout=pipe, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "shared\n"
        reader = collect_shared_session(memory_name)
        owner.kill()
    heir = SessionSharing(session, memory_name=memory_name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SHUserWarning)  # none where the sweep of a neighbouring test was faster
        heir.__enter__()
    with heir_until_the_end(heir):
        eventually(lambda: reader.token.access_token != "invented-first")
        assert reader.token.access_token == session.token["access_token"]


def test_vanished_name_that_another_took_is_left_to_him(
    session: OAuthSession, memory_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """And said once, though it is looked at several times a second."""
    with SessionSharing(session, memory_name=memory_name) as sharing:
        (_SHM / memory_name).unlink()
        (_SHM / memory_name).symlink_to("nowhere")
        eventually(lambda: caplog.records)
        for _ in range(20):
            assert sharing.thread is not None
            sharing.thread._channel.newest_report()
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert (_SHM / memory_name).is_symlink()
    assert left_in_memory(memory_name) == [memory_name]
    (_SHM / memory_name).unlink()


# The live view


class CountingReader:
    """A reader that counts how often it is asked."""

    def __init__(self, reader: BoardReader) -> None:
        self.version_word = reader.version_word
        self._reader = reader
        self.reads = 0

    def read(self) -> tuple[int, bytes]:
        self.reads += 1
        return self._reader.read()


def test_view_follows_each_posting_and_reads_no_more_than_that(board: Board) -> None:
    """Rule 7 of the board, and defect 15: a collected session is not frozen."""
    reader = CountingReader(board.reader())
    shared = SharedSession(reader)
    for generation in range(1, 6):
        post(board, Posting(make_token(generation)))
        assert {shared.token.generation for _ in range(100)} == {generation}
        assert reader.reads == generation
    assert shared.session_headers == {"Authorization": "Bearer invented-5"}


def test_expired_token_is_never_handed_out(board: Board) -> None:
    """The last error of the parent is told with it."""
    shared = SharedSession(board.reader())
    post(board, Posting(make_token(1, lifetime=-1.0), "the endpoint answers 503"))
    with pytest.raises(
        TokenUnavailableError, match=r"expired.*the last login failed: the endpoint answers 503"
    ) as caught:
        shared.wait_for_token(0.01)
    assert caught.value.last_error == "the endpoint answers 503"


def test_token_that_was_read_expires_while_it_is_held(board: Board) -> None:
    """The deadline is looked at on each read, on the boot clock."""
    shared = SharedSession(board.reader())
    token = None
    for generation in range(1, 100):  # it may have expired before it was read
        post(board, Posting(make_token(generation, lifetime=0.1), "down", refused=True))
        with contextlib.suppress(TokenUnavailableError):
            token = shared.token
            break
    assert token is not None
    eventually(lambda: boot_time() > token.deadline)
    with pytest.raises(TokenUnavailableError, match="down"):
        _ = shared.token


def test_refusal_is_told_at_once_and_only_without_a_token(board: Board) -> None:
    """No waiting for what cannot come; what is valid serves to its end."""
    shared = SharedSession(board.reader())
    post(board, Posting(make_token(1), "invalid_client", refused=True))
    assert shared.token.generation == 1
    with pytest.raises(TokenUnavailableError, match="invalid_client"):
        in_time(shared.wait_for_token, NEVER, newer_than=1)


def test_reader_waits_for_a_newer_generation(board: Board) -> None:
    shared = SharedSession(board.reader())
    post(board, Posting(make_token(1)))
    timer = threading.Timer(0.05, post, (board, Posting(make_token(2))))
    timer.start()
    assert shared.wait_for_token(_PATIENCE, newer_than=1).generation == 2
    timer.join()
    with pytest.raises(TokenUnavailableError, match="generation 2 was refused"):
        shared.wait_for_token(0.01, newer_than=2)


def test_nobody_has_logged_in_yet(board: Board) -> None:
    shared = SharedSession(board.reader())
    with pytest.raises(TokenUnavailableError, match="nobody has logged in yet"):
        shared.wait_for_token(0.0)
    assert repr(shared) == "<SharedSession anonymous None>"


@pytest.mark.slow
def test_threads_of_a_worker_never_see_an_older_token_again(board: Board) -> None:
    """They share one view without a lock; it is replaced as a whole."""
    post(board, Posting(make_token(1)))
    shared, is_over, wrong = SharedSession(board.reader()), threading.Event(), list[tuple[int, int]]()

    def read() -> None:
        while not is_over.is_set():
            posted = board.version
            generation = shared.token.generation
            if generation < posted:
                wrong.append((posted, generation))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for generation in range(2, 1500):
            post(board, Posting(make_token(generation)))
    finally:
        sys.setswitchinterval(before)
        is_over.set()
        for thread in threads:
            thread.join()
    assert wrong == []


# Secrets


def test_pickle_is_a_note_without_the_token(shared: SharedSession, memory_name: str) -> None:
    """Defect 14: the token stays in shared memory."""
    access_token = shared.token["access_token"]
    note = pickle.dumps(shared)
    assert len(note) < 200
    for part in (access_token, *access_token.split(".")):
        assert part.encode() not in note
    assert pickle.loads(note).token["access_token"] == access_token
    assert access_token not in repr(shared)
    assert memory_name in repr(shared)


def test_note_of_a_sharing_that_has_ended_says_so(session: OAuthSession, memory_name: str) -> None:
    with SessionSharing(session, memory_name=memory_name):
        note = pickle.dumps(collect_shared_session(memory_name))
    with pytest.raises(FileNotFoundError, match="sharing must be running"):
        pickle.loads(note)


# Refused tokens and outages


def test_reports_beside_the_board_cause_one_login(
    shared: SharedSession, server: LoopbackServer, memory_name: str
) -> None:
    """Single flight, however many readers were refused."""
    server.revoke_all()
    readers = [shared, *(collect_shared_session(memory_name) for _ in range(7))]
    for reader in readers:
        reader.report_refused(reader.token.generation)
    for reader in readers:
        assert reader.wait_for_token(_PATIENCE, newer_than=1).generation == 2
        reader.report_refused(1)
    assert server.logins == 2


_FLOOD = """
import sys
from shpool import collect_shared_session
shared = collect_shared_session(sys.argv[1])
shared.report_refused(2**64 - 1)
for _ in range(2000):
    shared.report_refused(shared.token.generation + 1)
"""


@pytest.mark.slow
def test_forged_reports_cause_no_login_and_no_harm(
    shared: SharedSession, server: LoopbackServer, memory_name: str, child_env: dict[str, str]
) -> None:
    """A word that nobody honest can have written; honest reports are heard again after it."""
    run_python(_FLOOD, child_env, memory_name)
    assert shared.token.generation == server.logins == 1
    eventually(lambda: _told(shared))
    assert server.logins == 2


def _told(shared: SharedSession) -> bool:
    """Report as a reader does that is refused, and tell whether a new token came."""
    shared.report_refused(1)
    with contextlib.suppress(TokenUnavailableError):
        return shared.wait_for_token(0.3, newer_than=1).generation == 2
    return False


_AT_EXPIRY = """
import os, sys, time
from shpool import collect_shared_session
from shpool.tokens import boot_time
deadline = float(sys.argv[2])
children = []
for _ in range(8):
    pid = os.fork()
    if pid == 0:
        shared = collect_shared_session(sys.argv[1])
        while boot_time() < deadline:
            time.sleep(0.01)
        os._exit(shared.token.generation)
    children.append(pid)
print("up", flush=True)
print(sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children))
"""


def give_one_token(server: LoopbackServer) -> None:
    """Let the first login succeed, whatever the server is told about all others."""
    # Expires soon, and yet not before it has arrived and was looked at where the machine stalls for seconds.
    server.fail_next(1, 200, body={"access_token": "invented", "expires_in": 6})


@pytest.mark.slow
def test_stampede_at_expiry_is_one_login(
    server: LoopbackServer, session: OAuthSession, memory_name: str, child_env: dict[str, str]
) -> None:
    """16 threads and 8 processes find the token expired, as the provider was down; it heals: one login."""
    give_one_token(server)
    server.answer_always(503)
    with SessionSharing(session, memory_name=memory_name):
        shared = collect_shared_session(memory_name)
        deadline = shared.token.deadline
        command = [sys.executable, "-c", _AT_EXPIRY, memory_name, str(deadline)]
        generations: list[int] = []

        def ask() -> None:
            eventually(lambda: boot_time() > deadline)
            generations.append(shared.token.generation)

        threads = [threading.Thread(target=ask) for _ in range(16)]
        with subprocess.Popen(command, env=child_env, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            for thread in threads:
                thread.start()
            eventually(lambda: boot_time() > deadline + 0.1)
            assert generations == []
            server.answer_always(None)
            told, _ = process.communicate(timeout=_PATIENCE)
        for thread in threads:
            thread.join()
    assert generations == [2] * 16
    assert told.strip() == str([2] * 8)
    assert server.logins == 1


@pytest.mark.slow
def test_readers_learn_why_there_is_no_token(
    server: LoopbackServer, session: OAuthSession, memory_name: str, child_env: dict[str, str]
) -> None:
    """``TokenUnavailableError`` carries the parent's last error, in other processes too."""
    give_one_token(server)
    server.answer_always(401, body={"error": "invalid_client"})
    with SessionSharing(session, memory_name=memory_name):
        shared = collect_shared_session(memory_name)
        token = shared.token
        eventually(lambda: boot_time() > token.deadline)
        with pytest.raises(TokenUnavailableError, match="SH_CLIENT_SECRET") as caught:
            _ = shared.token
        assert "(invalid_client)" in caught.value.last_error
        told = run_python(_COLLECT, child_env, memory_name, code_expected=1)
        assert "TokenUnavailableError" in told
        assert "(invalid_client)" in told
    assert server.token_requests == 2, "no attempt after a final refusal"


# Ends


@pytest.mark.slow
@pytest.mark.parametrize("timeout", [None, NEVER])
def test_join_does_not_wait_for_a_token_endpoint_that_hangs(
    server: LoopbackServer, memory_name: str, timeout: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Defect 4."""
    monkeypatch.setattr("shpool.sharing.ATTEMPT_WITHIN", NEVER)
    session = OAuthSession(server.token_url, server.client_id, server.client_secret, timeout=(NEVER, NEVER))
    thread = SessionSharingThread(session, memory_name=memory_name)
    thread.start()
    server.hang()
    collect_shared_session(memory_name).report_refused(1)
    eventually(lambda: any(thread.name == "shpool-login" for thread in threading.enumerate()))
    try:
        in_time(thread.join, timeout)
        assert not thread.is_alive()
        assert left_in_memory(memory_name) == []
    finally:
        server.hang(False)


_FORGOTTEN = """
import sys, threading
import shpool.sharing
from shpool import OAuthSession, SessionSharingThread, collect_shared_session
shpool.sharing.ATTEMPT_WITHIN = 600.0
session = OAuthSession(sys.argv[2], "demo-client", "demo-secret-not-real", timeout=(600.0, 600.0))
thread = SessionSharingThread(session, memory_name=sys.argv[1])
thread.start()
if sys.argv[3] == "hang":
    shared = collect_shared_session(sys.argv[1])
    while not any(thread.name == "shpool-login" for thread in threading.enumerate()):
        shared.report_refused(shared.token.generation)
if sys.argv[3] == "raise":
    raise RuntimeError("between start and join")
"""


def hang_after_one_login(server: LoopbackServer) -> None:
    eventually(lambda: server.logins == 1)
    server.hang()


@pytest.mark.slow
@pytest.mark.parametrize("end", ["return", "raise", "hang"])
def test_program_that_forgets_to_join_ends_and_leaves_nothing(
    server: LoopbackServer, memory_name: str, child_env: dict[str, str], end: str
) -> None:
    """Defect 4: whatever happens between start and join, the program exits, also while a login hangs."""
    if end == "hang":
        hanging = threading.Thread(target=hang_after_one_login, args=(server,))
        hanging.start()
    told = run_python(_FORGOTTEN, child_env, memory_name, server.token_url, end, code_expected=int(end == "raise"))
    assert told == "" if end != "raise" else "between start and join" in told
    assert left_in_memory(memory_name) == []
    if end == "hang":
        hanging.join()
        server.hang(False)


_NEVER_STARTED = """
import sys
from shpool import SessionSharingThread
thread = SessionSharingThread(lambda: {"access_token": "invented", "expires_in": 60}, memory_name=sys.argv[1])
"""


@pytest.mark.slow
def test_program_that_never_starts_its_thread_leaves_nothing(memory_name: str, child_env: dict[str, str]) -> None:
    assert run_python(_NEVER_STARTED, child_env, memory_name) == ""
    assert left_in_memory(memory_name) == []


# Channels


def test_tee_shows_postings_on_both_and_hears_both(board: Board, memory_name: str) -> None:
    named = NamedChannel(memory_name)
    tee = TeeChannel(BoardChannel(board), named)
    tee.publish(Posting(make_token(3)))
    other = collect_shared_session(memory_name)
    assert other.token == SharedSession(board.reader()).token
    assert tee.report_poll == named.report_poll < float("inf")
    other.report_refused(3)
    assert tee.newest_report() == 3
    tee.close()
    tee.close()
    assert board.is_closed
    assert left_in_memory(memory_name) == []


def test_thread_on_any_channel_ends_without_having_been_started(session: OAuthSession, board: Board) -> None:
    """As the pool needs it when something else fails at its start."""
    thread = SharingThread(session, BoardChannel(board))
    thread.end()
    thread.end()
    assert board.is_closed


def test_foreign_board_is_told_from_a_missing_one(memory_name: str) -> None:
    with contextlib.closing(named_board(memory_name)):
        (_SHM / memory_name).chmod(0o666)
        with pytest.raises(ForeignBoardError, match="0666"):
            collect_shared_session(memory_name)
