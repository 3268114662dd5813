"""What the tests of pool, crew and engines run in workers; light, since each worker imports it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from pickle import PickleBuffer
from typing import TYPE_CHECKING, Any, NoReturn, SupportsIndex

from shpool.shared import current_session

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE = 30.0  # s a task waits for its cue at most


class KeywordOnlyError(Exception):
    """Cannot be rebuilt from its args, as httpx's errors."""

    def __init__(self, message: str, *, request: str) -> None:
        super().__init__(message)
        self.request = request


class FailsWhereError(Exception):
    """Unpickles in the worker that raised it, and nowhere else."""

    def __reduce__(self) -> tuple[Callable[[int], object], tuple[int]]:
        return _rebuild_in, (os.getpid(),)


class LoadsHereOnly:
    """A value that unpickles in no other process than the one that pickled it."""

    def __reduce__(self) -> tuple[Callable[[int], object], tuple[int]]:
        return _rebuild_in, (os.getpid(),)


class Unpicklable:
    """A value that says why it cannot be pickled."""

    def __reduce__(self) -> NoReturn:
        message = "this value stays where it is"
        raise RuntimeError(message)


class ExitsOnLoad:
    """A value whose unpickling asks the process to exit."""

    def __reduce__(self) -> tuple[Callable[[int], object], tuple[int]]:
        return sys.exit, (3,)


class Counter:
    """Has a method to call by way of an instance."""

    def __init__(self, start: int) -> None:
        self.start = start

    def plus(self, number: int) -> int:
        return self.start + number


class Tally:
    """Counts the calls it has served, and leaves a file in a folder each time it is unpickled."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.calls = 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        Path(self.folder, f"{os.getpid()}-{time.monotonic_ns()}").touch()

    def count(self, _: object) -> int:
        self.calls += 1
        return self.calls


def _rebuild_in(pid: int) -> object:
    if os.getpid() != pid:
        message = "not in this process"
        raise LookupError(message)
    return FailsWhereError("rebuilt")


def double(number: int) -> int:
    return 2 * number


def add(first: int, second: int) -> int:
    return first + second


def pid(_: object = None) -> int:
    return os.getpid()


def slow_pid(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def fail(number: int) -> NoReturn:
    message = f"bad number {number}"
    raise ValueError(message)


def fail_at(number: int, bad: int) -> int:
    return fail(number) if number == bad else number


def stop_iteration_at(number: int, bad: int) -> int:
    if number == bad:
        raise StopIteration
    return number


def raise_keyword_only(_: object = None) -> NoReturn:
    message = "no such page"
    raise KeywordOnlyError(message, request="GET /")


def raise_here_only(_: object = None) -> NoReturn:
    raise FailsWhereError("only here")


def return_here_only(_: object = None) -> LoadsHereOnly:
    return LoadsHereOnly()


def return_exits_on_load(_: object = None) -> ExitsOnLoad:
    return ExitsOnLoad()


def return_unpicklable_at(number: int, bad: int) -> object:
    return threading.Lock() if number == bad else number


def leave(code: int) -> NoReturn:
    sys.exit(code)


def die(code: int = 1) -> NoReturn:
    os._exit(code)


_held = bytearray(2**20)


class ShowsHeld:
    """Is pickled as an array is that shows memory which this process may want to change."""

    nbytes = len(_held)

    def __reduce_ex__(self, _: SupportsIndex) -> tuple[Any, ...]:
        return bytes, (PickleBuffer(_held),)


def show_held() -> Any:
    return ShowsHeld()


def grow_held() -> int:
    _held.append(0)  # a BufferError while anything shows it
    return len(_held)


def write_to_sockets(data: bytes) -> None:
    """Say this to the parent, and wait for what it does about it."""
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if str(entry.readlink()).startswith("socket:"):
                os.write(int(entry.name), data)
    time.sleep(PATIENCE)


def is_loaded(name: str) -> bool:
    return name in sys.modules


def echo(value: Any) -> Any:
    return value


def wait_for(path: str) -> int:
    """Wait until a file is there; return this process's id."""
    give_up = time.monotonic() + PATIENCE
    while not Path(path).exists():
        if time.monotonic() > give_up:
            raise TimeoutError(path)
        time.sleep(0.005)
    return os.getpid()


def begin_and_wait(begun: str, cue: str) -> int:
    """Leave this process's id in a file, then wait for another one."""
    leave_mark(begun)
    return wait_for(cue)


def begin_and_wait_or_double(begun: str, cue: str, number: int) -> int:
    """Wait for the cue if there is one."""
    if begun:
        begin_and_wait(begun, cue)
    return 2 * number


def grow(size: int) -> int:
    """Keep so many bytes in use; return the process's id."""
    _kept.append(b"x" * size)
    return os.getpid()


def grow_and_die(size: int) -> NoReturn:
    """Die as one whom the kernel's out-of-memory killer has chosen."""
    grow(size)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


_kept: list[bytes] = []


def leave_mark(path: str) -> None:
    """Write this process's id into a new file, whole from the moment it can be seen."""
    unfinished = Path(f"{path}.{os.getpid()}")
    unfinished.write_text(str(os.getpid()))
    unfinished.rename(path)


def note_run(folder: str, value: int) -> int:
    """Leave a file for this one run of this value."""
    (Path(folder) / f"{value}-{time.monotonic_ns()}").touch()
    return value


def die_once(folder: str, value: int, victim: int) -> int:
    """Return the value; at the victim's first run the process is killed."""
    mark = Path(folder) / "died"
    if value == victim and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return value


def hang_once(folder: str, value: int) -> int:
    """Take for ever in the first run, no time in the second."""
    mark = Path(folder) / f"hung-{value}"
    if not mark.exists():
        mark.touch()
        time.sleep(600)
    return value


def meet(folder: str, me: int, count: int) -> int:
    """Wait until ``count`` tasks run at once, each in a worker of its own."""
    (Path(folder) / f"{me}").touch()
    give_up = time.monotonic() + 2 * PATIENCE
    while len(list(Path(folder).iterdir())) < count:
        if time.monotonic() > give_up:
            raise TimeoutError(folder)
        time.sleep(0.02)
    return os.getpid()


def fork_sleeper(_: object = None) -> int:
    """Leave a forked child behind that sleeps; return its id."""
    child = os.fork()
    if child == 0:
        time.sleep(PATIENCE)
        os._exit(0)
    return child


def sleeper_and_wait(begun: str) -> None:
    """Fork a sleeping child, say both ids, and take for ever."""
    child = fork_sleeper()
    unfinished = Path(f"{begun}.{os.getpid()}")
    unfinished.write_text(f"{os.getpid()} {child}")
    unfinished.rename(begun)
    time.sleep(600)


def environment(name: str) -> tuple[str | None, bytes]:
    """Return a variable as Python sees it, and the whole environment as the kernel does."""
    return os.environ.get(name), Path("/proc/self/environ").read_bytes()


def descriptors(_: object = None) -> dict[int, str]:
    """Return this process's open sockets and boards."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = str(entry.readlink())
        except OSError:
            continue
        if target.startswith(("socket:", "/memfd:")):
            found[int(entry.name)] = target
    return found


def access_token(_: object = None) -> str:
    return current_session().token.access_token


def report_refused(generation: int) -> None:
    """Say that a server refused the token of this generation."""
    current_session().report_refused(generation)


def fetch(url: str) -> bytes:
    """Get a page of the loopback server with the shared token."""
    request = urllib.request.Request(url, headers=current_session().session_headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=PATIENCE) as response:
        body: bytes = response.read()
        return body


_inited: list[str] = []


def initialise(word: str) -> None:
    """Remember a word and the token that was there."""
    _inited.append(f"{word} {current_session().token.generation}")


def initialised(folder: str, me: int, count: int) -> tuple[int, list[str]]:
    """Return this worker's id and what its initializer left, once all workers are at it."""
    return meet(folder, me, count), _inited


def refuse_to_start(word: str) -> NoReturn:
    message = f"cannot start: {word}"
    raise OSError(message)


def functions_held(_: object = None) -> int:
    """Return how many functions the serve loop around this very call keeps."""
    frame = sys._getframe()
    while frame.f_code.co_name != "serve":
        assert frame.f_back is not None
        frame = frame.f_back
    return len(frame.f_locals["functions"])


def run_python(code: str, *arguments: str) -> str:
    """Run code in an interpreter of its own and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    return done.stdout.strip()
