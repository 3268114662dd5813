"""Run one shell command and keep what it says; whatever happens, nothing it started outlives it.

Rules:

1. The command leads a session of its own, hence a process group: no terminal reaches it, one signal reaches all of it.
2. Beside it runs a watch: a shell that waits for the end of a pipe which only this process holds open. When this
   process is gone, by SIGKILL too, the watch kills the command's group, and what is left of its session.
3. The command begins only when the watch is there: until then it waits for a line, at whose absence it ends.
4. The watch stands outside of the session, so that a command that kills its own group does not lose it.
5. The command's process id stays reserved until all is over, as its exit is waited for last: the group's number cannot
   come to mean somebody else's processes meanwhile.

A process that begins a session of its own (``setsid``, a daemon) has left on purpose and is not followed.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shpool.shell.capture import Capture

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from typing_extensions import Self

_SHELL = "/bin/sh"
_BEGIN = f'read -r _ || exit 1; exec {_SHELL} -c "$1" </dev/null'
# GNU timeout and shells with job control move to groups of their own, in the same session: hence the second part.
_WATCH = """
read -r _
kill -s KILL -- "-$1"
for round in 1 2 3; do
    for stat in /proc/[0-9]*/stat; do
        read -r line <"$stat" || continue
        set -- "$1" ${line##*) }
        if [ "$5" = "$1" ] && [ "$2" != Z ]; then
            pid=${stat#/proc/}
            kill -s KILL "${pid%/stat}"
        fi
    done
done
"""
_GRACE = 5.0  # s between SIGTERM and SIGKILL: GDAL and curl remove their half-written files in far less
_LONGEST_WAIT = 86_400.0  # s at a time: epoll_wait(2) takes 2**31 ms at most
_STEP = 0.02  # s between looks where the system cannot tell of an end by itself
_READ = 64 * 1024  # bytes: a pipe's usual capacity, pipe(7)
_LAST_READS = 16  # from each pipe once all is over; a process that got away may write for ever
_KILL_ROUNDS = 3  # a process may fork while its session is being listed


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        status: Exit status; negative for a signal, as ``subprocess`` has it.
        stdout: What was captured.
        stderr: What was captured.
        is_late: It was stopped as it ran longer than its timeout.
    """

    status: int
    stdout: Capture
    stderr: Capture
    is_late: bool


def run_command(  # noqa: PLR0913 - the last one is for tests
    command: str, env: Mapping[str, str], *, timeout: float | None, limit: int, secret: str, grace: float = _GRACE
) -> Ended:
    """Run a command by ``/bin/sh`` and wait for it.

    Args:
        command: The shell's program.
        env: Its whole environment.
        timeout: Seconds it may run, None for ever. After that it gets SIGTERM, then SIGKILL.
        limit: Bytes to keep of each of its outputs.
        secret: Masked in them.
        grace: Seconds between the two signals.

    Raises:
        OSError: The system starts no more processes, or the command is too long.
    """
    stdout, stderr = Capture(limit, secret.encode()), Capture(limit, secret.encode())
    with _Session(command, env) as session, _Outputs(session, stdout, stderr) as outputs:
        deadline = None if timeout is None else time.monotonic() + timeout
        is_late = not outputs.collect(session.has_ended, deadline)
        if is_late:
            session.ask_to_end()
            outputs.collect(session.is_gone, time.monotonic() + grace, step=_STEP)
        session.kill()
        outputs.collect_rest()
    return Ended(session.status, stdout, stderr, is_late)


class _Session:
    """A command, its watch, and the session that holds all it starts; over at the end of the ``with`` block."""

    status = 0

    def __init__(self, command: str, env: Mapping[str, str]) -> None:
        pipe = subprocess.PIPE
        self._leader = subprocess.Popen(  # noqa: S603 - the user's own command, by rule 3 behind a gate
            [_SHELL, "-c", _BEGIN, _SHELL, command],
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            env=env,
            bufsize=0,
            start_new_session=True,
        )
        self.pid = self._leader.pid
        try:
            self._watch = subprocess.Popen(  # noqa: S603 - our own script
                [_SHELL, "-c", _WATCH, _SHELL, str(self.pid)],
                stdin=pipe,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={},
                bufsize=0,
                cwd="/",
                start_new_session=True,
            )
        except BaseException:
            self._leader.communicate()  # closes its stdin, at which it ends
            raise

    def __enter__(self) -> Self:
        assert self._leader.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._leader.stdin as gate:  # somebody may have killed it
            gate.write(b"\n")
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._watch.kill()
        self._watch.wait()
        self.status = self._leader.wait()
        for stream in (self._leader.stdout, self._leader.stderr, self._watch.stdin):
            assert stream is not None
            stream.close()

    def outputs(self) -> tuple[int, int]:
        """Return the descriptors of stdout and stderr."""
        assert self._leader.stdout is not None
        assert self._leader.stderr is not None
        return self._leader.stdout.fileno(), self._leader.stderr.fileno()

    def has_ended(self) -> bool:
        """Tell whether the command has ended, whatever it left behind; its process id stays reserved."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def is_gone(self) -> bool:
        """Tell whether the command and all it started have ended."""
        return self.has_ended() and not self._others()

    def ask_to_end(self) -> None:
        """Send SIGTERM to all, stopped processes too."""
        for number in (signal.SIGTERM, signal.SIGCONT):
            _signal(os.killpg, self.pid, number)
        for pid in self._others():
            if _ask(os.getpgid, pid) != self.pid:
                _signal(os.kill, pid, signal.SIGTERM)

    def kill(self) -> None:
        """Kill the group, and what else is in the session."""
        _signal(os.killpg, self.pid, signal.SIGKILL)
        for _ in range(_KILL_ROUNDS):
            others = self._others()
            for pid in others:
                _signal(os.kill, pid, signal.SIGKILL)
            if not others:
                return

    def _others(self) -> list[int]:
        """Return what runs in the session besides its leader; nothing where there is no /proc."""
        mates = [pid for pid in _all_processes() if pid != self.pid and _ask(os.getsid, pid) == self.pid]
        return [pid for pid in mates if not _is_zombie(pid)]


def _all_processes() -> Iterator[int]:
    with contextlib.suppress(FileNotFoundError), os.scandir("/proc") as entries:
        for entry in entries:
            if entry.name.isdigit():
                yield int(entry.name)


def _ask(question: Callable[[int], int], pid: int) -> int | None:
    try:
        return question(pid)
    except OSError:  # it has just ended
        return None


def _signal(send: Callable[[int, int], None], pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # gone, or somebody else's by sudo
        send(pid, number)


def _is_zombie(pid: int) -> bool:
    """Tell whether a process has ended and only waits for being asked; who adopted it may take seconds for that."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return True
    return stat.rpartition(b") ")[2][:1] == b"Z"


class _Outputs:
    """Read both outputs of a command as they come, so that it never waits for a reader."""

    def __init__(self, session: _Session, stdout: Capture, stderr: Capture) -> None:
        self._captures = dict(zip(session.outputs(), (stdout, stderr), strict=True))
        self._selector = selectors.DefaultSelector()
        self._end = _end_of(session.pid)

    def __enter__(self) -> Self:
        for descriptor in self._captures:
            os.set_blocking(descriptor, False)
            self._selector.register(descriptor, selectors.EVENT_READ)
        if self._end is not None:
            self._selector.register(self._end, selectors.EVENT_READ)
        return self

    def __exit__(self, *_: object) -> None:
        self._selector.close()
        if self._end is not None:
            os.close(self._end)
        for capture in self._captures.values():
            capture.finish()

    def collect(self, is_over: Callable[[], bool], deadline: float | None, *, step: float | None = None) -> bool:
        """Read until it is over; tell whether that came before the deadline.

        Args:
            is_over: Asked after each look.
            deadline: By ``time.monotonic``, None for never.
            step: Seconds between looks; None where the end of the command is all that matters.
        """
        if step is None and self._end is None:
            step = _STEP
        while not is_over():
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return False
            left = None if left is None else min(left, _LONGEST_WAIT)
            wait = left if step is None else min(step, step if left is None else left)
            for key, _ in self._selector.select(wait):
                if key.fd == self._end or not self._read(key.fd):
                    self._selector.unregister(key.fd)
        return True

    def collect_rest(self) -> None:
        """Read what is still in the pipes; all who wrote there are dead, or got away and do not matter."""
        for descriptor in self._captures:
            for _ in range(_LAST_READS):
                if not self._read(descriptor):
                    break

    def _read(self, descriptor: int) -> bool:
        """Take in what is there; tell whether something was."""
        data = b""
        with contextlib.suppress(BlockingIOError):
            data = os.read(descriptor, _READ)
        self._captures[descriptor].add(data)
        return bool(data)


def _end_of(pid: int) -> int | None:
    """Return a descriptor that becomes readable at the end of a process; None where the system has none."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # before Linux 5.3, or forbidden by a sandbox
            return os.pidfd_open(pid)
    return None
