from __future__ import annotations

import contextlib
import fcntl
import io
import itertools
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time

import pytest

from shpool.progress import Progress


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_without_a_terminal_nothing_is_drawn() -> None:
    """``enabled=None`` asks the stream."""
    stream = io.StringIO()
    with Progress(3, desc="tiles", stream=stream) as progress:
        progress.done()
        progress.failed()
        progress.update_token(5.0)
    assert not progress.is_shown
    assert stream.getvalue() == ""
    assert (progress.done_count, progress.failed_count) == (1, 1)


def test_the_bar_tells_done_failed_time_and_token() -> None:
    stream = Terminal()
    with Progress(4, desc="tiles", unit="tile", stream=stream) as progress:
        progress.update_token(59.6)
        progress.done(3)
        progress.failed()
    last = stream.getvalue().split("\r")[-1]
    assert "tiles 100%" in last
    assert "4/4" in last
    assert "failed 1, token 60 s" in last
    assert "tile/s" in last or "s/tile" in last


def all_of(terminal: int) -> str:
    """Return all that was written to a terminal whose other end is closed."""
    pieces = []
    with contextlib.suppress(OSError):  # its end
        while piece := os.read(terminal, 65536):
            pieces.append(piece)
    os.close(terminal)
    return b"".join(pieces).decode()


def test_on_a_narrow_terminal_what_matters_most_is_kept() -> None:
    reading, writing = pty.openpty()
    fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 80, 0, 0))
    with (
        os.fdopen(writing, "w", encoding="utf-8") as stream,
        Progress(
            1200,
            desc="download",
            unit="file",
            stream=stream,
            notes=lambda: ["87.6 MB", "28.9 MB/s"],
            token=lambda: 598.0,
        ) as progress,
    ):
        progress._bar.start_t -= 3.0  # as if it had run for so long
        progress.done(573)
        progress.failed(24)
    last = re.split(r"[\r\n]+", all_of(reading).strip())[-1]
    assert len(last) <= 80
    assert last.endswith("87.6 MB, failed 24]")
    assert "|█" in last


def test_where_all_sizes_are_known_the_bar_is_of_bytes() -> None:
    stream, moved = Terminal(), iter([0, 4_000_000])
    latest = 0

    def so_far() -> int:
        nonlocal latest
        latest = next(moved, latest)
        return latest

    with Progress(3, desc="download", stream=stream, size=12_000_000, moved=so_far, notes=lambda: ["1/3 files"]):
        pass
    last = stream.getvalue().split("\r")[-1]
    assert "download  33%" in last
    assert "4.00M/12.0M" in last
    assert "1/3 files, failed 0" in last


def test_bytes_of_former_runs_are_counted_once() -> None:
    """Whoever draws the bar meanwhile has moved it by them already."""
    stream = Terminal()
    with Progress(3, desc="download", stream=stream, size=9_000, moved=lambda: 6_000, tick=0.01) as progress:
        progress.update_token(None)
        progress.pass_over(2, 6_000)
    assert "6.00k/9.00k" in stream.getvalue().split("\r")[-1]


def test_an_unknown_total_is_counted_too() -> None:
    stream = Terminal()
    with Progress(None, desc="tiles", stream=stream) as progress:
        progress.done(7)
    assert "7job" in stream.getvalue()


def test_an_explicit_wish_wins_over_the_stream() -> None:
    shown, hidden = io.StringIO(), Terminal()
    with Progress(1, desc="on", enabled=True, stream=shown), Progress(1, desc="off", enabled=False, stream=hidden):
        pass
    assert "on" in shown.getvalue()
    assert hidden.getvalue() == ""


def test_an_expired_token_is_shown_as_zero() -> None:
    stream = Terminal()
    with Progress(1, desc="tiles", stream=stream) as progress:
        progress.update_token(-3.0)
        progress.done()
    assert "token 0 s" in stream.getvalue()


def test_a_token_that_is_gone_is_no_longer_shown() -> None:
    stream = Terminal()
    with Progress(1, desc="tiles", stream=stream) as progress:
        progress.update_token(9.0)
        progress.update_token(None)
        progress.done()
    assert "token" not in stream.getvalue()


def test_a_closed_stream_is_no_terminal() -> None:
    stream = io.StringIO()
    stream.close()
    with Progress(1, desc="tiles", stream=stream) as progress:
        progress.done()
    assert not progress.is_shown


def test_the_bar_leaves_no_thread() -> None:
    """tqdm's monitor would live for ever."""
    before = threading.active_count()
    with Progress(1, desc="tiles", enabled=True, stream=Terminal()) as progress:
        progress.done()
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_the_bar_moves_while_nothing_ends() -> None:
    stream = Terminal()
    left = itertools.chain(range(50, 0, -1), itertools.repeat(0))
    with Progress(1, desc="tiles", stream=stream, token=lambda: float(next(left)), tick=0.01):
        deadline = time.monotonic() + 30
        while "token 47 s" not in stream.getvalue():
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_the_bar_makes_room_for_lines_on_its_terminal() -> None:
    stream = Terminal()
    with Progress(2, desc="tiles", stream=stream) as progress:
        progress.done()
        with progress.hidden():
            begun = len(stream.getvalue())
            stream.write("a line\n")
    *_, cleared, _ = stream.getvalue()[:begun].rsplit("\r", 2)
    assert cleared.isspace()
    assert stream.getvalue()[begun:].startswith("a line\n\rtiles  50%|")


def test_a_bar_in_a_file_is_left_as_it_stands() -> None:
    stream = io.StringIO()
    with Progress(2, desc="tiles", enabled=True, stream=stream) as progress:
        begun = stream.getvalue()
        with progress.hidden():
            assert stream.getvalue() == begun


def test_standard_output_stays_empty(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1, desc="tiles", enabled=True) as progress:
        progress.done()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "tiles" in captured.err


@pytest.mark.slow
def test_a_disabled_bar_does_not_import_tqdm() -> None:
    code = (
        "import sys\n"
        "from shpool.progress import Progress\n"
        "with Progress(1, desc='tiles', enabled=False) as progress:\n"
        "    progress.done()\n"
        "assert 'tqdm' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
