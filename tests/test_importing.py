"""Imports that ^C cannot break."""

from __future__ import annotations

import _imp
import importlib
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from patience import PATIENCE, in_time

from shpool.importing import free_import_lock, import_each

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

INTERRUPTED = "import signal\nsignal.raise_signal(signal.SIGINT)\nimport empty_module\n"


@pytest.fixture
def handled() -> Iterator[SimpleNamespace]:
    """Have SIGINT noted by a handler that raises as Python's own does, or does what the test says instead."""
    noted = SimpleNamespace(numbers=[], instead=None)

    def handle(number: int, _: object) -> None:
        noted.numbers.append(number)
        if noted.instead is None:
            raise KeyboardInterrupt
        noted.instead()

    former = signal.signal(signal.SIGINT, handle)
    yield noted
    signal.signal(signal.SIGINT, former)


@pytest.fixture
def write_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Write modules that can be imported, and are forgotten after the test."""
    monkeypatch.syspath_prepend(tmp_path)
    names = ["empty_module"]

    def write(name: str, text: str) -> None:
        names.append(name)
        (tmp_path / f"{name}.py").write_text(text)
        importlib.invalidate_caches()

    write("empty_module", "")
    yield write
    for name in names:
        sys.modules.pop(name, None)


def test_an_interrupt_waits_for_the_end_of_the_import_it_comes_in(
    handled: SimpleNamespace, write_module: Callable[[str, str], None]
) -> None:
    """Then it is handled as ever, before the next import."""
    write_module("interrupted_module", INTERRUPTED)
    write_module("later_module", "")
    with pytest.raises(KeyboardInterrupt):
        import_each("interrupted_module", "later_module")
    assert handled.numbers == [signal.SIGINT]
    assert "empty_module" in sys.modules
    assert "later_module" not in sys.modules
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_after_a_handler_that_returns_the_imports_go_on(
    handled: SimpleNamespace, write_module: Callable[[str, str], None]
) -> None:
    write_module("interrupted_module", INTERRUPTED)
    write_module("later_module", "")
    seen: list[bool] = []
    handled.instead = lambda: seen.append("later_module" in sys.modules)
    import_each("interrupted_module", "later_module")
    assert seen == [False]
    assert "later_module" in sys.modules


def test_a_handler_may_wait_for_a_thread_that_imports(
    handled: SimpleNamespace, write_module: Callable[[str, str], None]
) -> None:
    """No lock of the import system is held while it runs."""
    write_module("interrupted_module", INTERRUPTED)
    write_module("tidy_module", "")
    outcome: list[object] = []

    def wait_for_thread() -> None:
        thread = threading.Thread(target=lambda: outcome.append(importlib.import_module("tidy_module")), daemon=True)
        thread.start()
        thread.join(PATIENCE)
        outcome.append("handled")

    handled.instead = wait_for_thread
    import_each("interrupted_module")
    assert outcome == [sys.modules.get("tidy_module"), "handled"]


def test_each_of_the_signals_that_came_is_handled(
    handled: SimpleNamespace, write_module: Callable[[str, str], None]
) -> None:
    """Also when the handler of another one raises."""
    write_module("interrupted_module", "import signal\nsignal.raise_signal(signal.SIGTERM)\n" + INTERRUPTED)
    terminated: list[int] = []
    former = signal.signal(signal.SIGTERM, lambda number, _: terminated.append(number))
    try:
        with pytest.raises(KeyboardInterrupt):
            import_each("interrupted_module")
    finally:
        signal.signal(signal.SIGTERM, former)
    assert handled.numbers == [signal.SIGINT]
    assert terminated == [signal.SIGTERM]


def test_imports_that_fail_leave_the_handlers_as_they_were(handled: SimpleNamespace) -> None:
    """The error is the import's own."""
    with pytest.raises(ModuleNotFoundError):
        import_each("there_is_no_such_module")
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert handled.numbers == [signal.SIGINT]


@pytest.mark.usefixtures("handled")
def test_threads_other_than_the_main_one_import_as_ever(write_module: Callable[[str, str], None]) -> None:
    """Python lets none but the main thread set a handler."""
    former = signal.getsignal(signal.SIGINT)
    write_module("curious_module", "import signal\nHANDLER = signal.getsignal(signal.SIGINT)\n")
    with ThreadPoolExecutor(1) as executor:
        executor.submit(import_each, "curious_module").result()
    assert sys.modules["curious_module"].HANDLER is former


def test_other_threads_can_import_after_an_interrupt_that_left_the_lock_taken() -> None:
    """However often it was taken; where it is free, nothing is done."""
    _imp.acquire_lock()
    _imp.acquire_lock()
    assert free_import_lock()
    in_time(_take_and_release)
    assert free_import_lock()


def _take_and_release() -> None:
    assert threading.current_thread() is not threading.main_thread()
    _imp.acquire_lock()
    _imp.release_lock()


def test_the_lock_of_an_import_that_goes_on_is_left_alone(write_module: Callable[[str, str], None]) -> None:
    """A handler of a signal is called in the middle of whatever the main thread does, and the pool may call this."""
    write_module("later_module", "")
    finder = _Asking()
    sys.meta_path.insert(0, finder)
    try:
        importlib.import_module("later_module")
    finally:
        sys.meta_path.remove(finder)
    assert finder.answers == [False]
    assert free_import_lock()


class _Asking:
    """A finder that finds nothing: it stands where a handler is called in the middle of an import."""

    def __init__(self) -> None:
        self.answers: list[bool] = []

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        self.answers.append(free_import_lock())
