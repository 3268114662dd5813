"""How a worker's process begins and ends: ``shpool.engines.birth``."""

from __future__ import annotations

import multiprocessing
import operator
import os
import resource
import signal
import subprocess
import sys
import textwrap
from multiprocessing.reduction import DupFd
from typing import TYPE_CHECKING, Any

import pytest
from patience import NEVER, PATIENCE, in_time

from shpool.engines.birth import WorkerProcess, start_process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow


class Handed:
    """Arrives as a descriptor of the new process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __reduce__(self) -> tuple[Callable[[Any], Any], tuple[object]]:
        return operator.methodcaller("detach"), (DupFd(self._descriptor),)


@pytest.fixture
def started() -> Iterator[list[WorkerProcess]]:
    """Processes that are ended whatever becomes of a test."""
    processes: list[WorkerProcess] = []
    yield processes
    for process in processes:
        process.kill()
        assert process.await_end(PATIENCE)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    yield reading, writing
    os.close(reading)
    os.close(writing)


def said_by(started: list[WorkerProcess], code: str, tmp_path: Path, **names: object) -> str:
    """Run code in a worker's process and return what it wrote to ``said``."""
    path = tmp_path / "said"
    code = f"with open(path, 'w') as said:\n{textwrap.indent(textwrap.dedent(code), '    ')}"
    started.append(process := start_process(exec, (code, {"path": str(path), **names}), {"SHPOOL_INVENTED": "set"}))
    assert process.await_end(PATIENCE)
    assert process.exitcode == 0
    return path.read_text()


def script(code: str, *options: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a script, and wait until the last process that it has left has closed its output."""
    return subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
        cwd=cwd,
    )


def test_a_process_gets_its_environment_and_the_paths_of_its_parent(
    started: list[WorkerProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.joinpath("only_here.py").write_text("WORD = 'found'")
    monkeypatch.syspath_prepend(str(tmp_path))
    code = "import os, only_here; said.write(only_here.WORD + ' ' + os.environ['SHPOOL_INVENTED'])"
    assert said_by(started, code, tmp_path) == "found set"


def test_a_process_gets_the_interpreters_options() -> None:
    code = """
        from shpool.engines.birth import start_process
        code = "import sys; print(sys.flags.optimize, sys.warnoptions, sys._xoptions)"
        process = start_process(exec, (code,))
        while not process.await_end(1.0): pass
    """
    done = script(code, "-O", "-W", "ignore::ImportWarning", "-X", "utf8")
    assert (done.stdout, done.stderr) == ("1 ['ignore::ImportWarning'] {'utf8': True}\n", "")


def test_a_descriptor_goes_to_this_process_alone(
    started: list[WorkerProcess], tmp_path: Path, pipe: tuple[int, int]
) -> None:
    os.write(pipe[1], b"handed over")
    code = "import os; said.write(os.read(pipe, 20).decode())"
    assert said_by(started, code, tmp_path, pipe=Handed(pipe[0])) == "handed over"
    assert not os.get_inheritable(pipe[0])


def test_a_process_has_what_multiprocessing_asks_for(started: list[WorkerProcess], tmp_path: Path) -> None:
    """The key by which managers know each other; and in a task processes are started as in the script."""
    code = """
        import multiprocessing
        process = multiprocessing.current_process()
        print(bytes(process.authkey).hex(), multiprocessing.get_start_method(allow_none=True), file=said)
    """
    key, method = said_by(started, code, tmp_path).split()
    assert key == bytes(multiprocessing.current_process().authkey).hex()
    assert method == str(multiprocessing.get_start_method(allow_none=True))


def test_an_interrupt_is_blocked_from_the_first_instruction_on(started: list[WorkerProcess], tmp_path: Path) -> None:
    code = "import signal; said.write(str(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])))"
    assert said_by(started, code, tmp_path) == "True"
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_nobody_waits_for_a_process_that_is_slow_to_come_up(started: list[WorkerProcess], tmp_path: Path) -> None:
    """However much it is to read first: ^C and other workers' tasks would wait as well."""
    tmp_path.joinpath("sitecustomize.py").write_text(f"import time; time.sleep({NEVER})")
    env = {"PYTHONPATH": str(tmp_path)}
    started.append(in_time(start_process, print, (bytes(2**23),), env))
    assert not started[0].await_end(0.0)


def test_a_process_imports_no_more_than_it_needs(
    started: list[WorkerProcess], tmp_path: Path, pipe: tuple[int, int]
) -> None:
    """Neither the script, which may lack the guard, nor loky, which takes long."""
    code = """
        import sys
        script = getattr(sys.modules["__main__"], "__file__", None)
        print(*{"loky", "pytest", "requests"} & set(sys.modules), script, file=said)
    """
    assert said_by(started, code, tmp_path, pipe=Handed(pipe[0])).split() == ["None"]


def test_nothing_comes_from_the_current_folder(tmp_path: Path) -> None:
    """It may be one of downloads, and names of downloads are the server's."""
    for name in ("pickle", "multiprocessing", "signal", "shpool"):
        # Not in the resource tracker: that is the standard library's, and looks there.
        tmp_path.joinpath(f"{name}.py").write_text("import sys; 'shpool-worker' in sys.orig_argv and print('run')")
    code = f"""
        import sys
        sys.path.remove("")
        from shpool.engines.birth import start_process
        process = start_process(print, ("born",))
        assert process.await_end({PATIENCE})
    """
    assert script(code, cwd=tmp_path).stdout == "born\n"


@pytest.mark.skipif(sys.version_info[:3] == (3, 13, 0), reason="it cannot import socket in a folder that is gone")
def test_a_current_folder_that_is_gone_is_none_of_its_business(tmp_path: Path) -> None:
    code = f"""
        import os, shutil
        from shpool.engines.birth import start_process
        shutil.rmtree(os.getcwd())
        process = start_process(print, ("born",))
        assert process.await_end({PATIENCE})
    """
    gone = tmp_path / "gone"
    gone.mkdir()
    done = script(code, cwd=gone)
    assert done.stdout == "born\n", done.stderr


@pytest.mark.parametrize("path", ["/nonexistent/python", None])
def test_an_interpreter_that_is_gone_is_named(path: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", path)
    with pytest.raises(FileNotFoundError, match=r"no Python interpreter \(sys.executable\)"):
        start_process(print, ())


def test_how_the_parent_starts_processes_is_not_settled() -> None:
    """A script may choose that once, and may do so after its pool has begun."""
    code = f"""
        import multiprocessing
        from shpool.engines.birth import start_process
        process = start_process(print, ("born",))
        assert process.await_end({PATIENCE})
        assert multiprocessing.get_start_method(allow_none=True) is None
    """
    done = script(code)
    assert (done.stdout, done.stderr, done.returncode) == ("born\n", "", 0)


def test_a_parent_that_is_killed_at_once_leaves_no_traceback() -> None:
    """What the process is to do waits for it, complete."""
    code = """
        import os, signal, sys
        from shpool.engines.birth import start_process

        def watch(frame, event, called):
            if event == "c_return" and called.__name__ == "fork_exec":
                os.kill(os.getpid(), signal.SIGKILL)

        import multiprocessing.resource_tracker
        multiprocessing.resource_tracker.ensure_running()  # it is started by the same function
        sys.setprofile(watch)
        start_process(print, ("born",))
    """
    done = script(code)
    assert (done.stdout, done.stderr, done.returncode) == ("born\n", "", -signal.SIGKILL)


def test_the_end_of_a_process_is_told_with_its_signal_and_memory(
    started: list[WorkerProcess], pipe: tuple[int, int]
) -> None:
    size = 2 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # a lesser peak could be this process's own
    code = f"import os, time; held = bytearray(b'1' * {size}); os.write(pipe, b'!'); time.sleep({NEVER})"
    started.append(process := start_process(exec, (code, {"pipe": Handed(pipe[1])})))
    assert in_time(os.read, pipe[0], 1) == b"!"
    assert (process.await_end(0.0), process.exitcode, process.peak_memory) == (False, None, None)
    process.kill()
    assert process.await_end(PATIENCE)
    assert process.exitcode == -signal.SIGKILL
    assert process.peak_memory is not None
    assert size < process.peak_memory < 4 * size


def test_a_process_that_has_ended_is_not_killed() -> None:
    """Its id may be another one's by now: here that of this very process, which is no child of its own."""
    process = WorkerProcess(os.getpid())
    assert process.await_end(0.0)
    process.kill()


def test_a_process_that_somebody_else_has_waited_for_has_ended(started: list[WorkerProcess]) -> None:
    started.append(process := start_process(print, ()))
    os.waitpid(process.pid, 0)
    assert process.await_end(0.0)
    assert process.exitcode is None
