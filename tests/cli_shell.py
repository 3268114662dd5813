"""The command line as users start it: a script in a process of its own, in a folder of its own."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import select
import struct
import subprocess
import sys
import termios
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from shpool.testing import LoopbackServer

PATIENCE = 180  # s; a command that takes longer hangs, be the machine as busy as it may

# As pip writes it: started so, the folder of the script is importable and the current one is not.
# The signals get their meaning back first: under nohup, or in the background of a shell, tests inherit them ignored.
_SCRIPT = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from shpool_cli.app import main
if __name__ == '__main__':
    main()
"""


@dataclass
class Shell:
    """A folder, an environment, and `shpool` in it."""

    folder: Path
    env: dict[str, str] = field(default_factory=dict)
    wrapper: list[str] = field(default_factory=list)  # the words of a command that runs another one
    is_struck_anywhere: bool = False  # by signals, also between the opening of a file and the block that closes it

    def __post_init__(self) -> None:
        (self.folder / "bin").mkdir()
        self._script = self.folder / "bin" / "shpool"
        self._script.write_text(_SCRIPT)

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        return path

    def log_in_at(self, server: LoopbackServer) -> list[str]:
        """Put the credentials into the environment and return the options that name the endpoint."""
        self.env |= {"SH_CLIENT_ID": server.client_id, "SH_CLIENT_SECRET": server.client_secret}
        return ["--token-url", server.token_url]

    def wait_for_logins(self, seconds: float) -> None:
        """Make the command wait so long for an answer of a token endpoint, instead of its own few seconds."""
        setting = f"import shpool_cli.credentials\nshpool_cli.credentials._TIMEOUT = ({seconds}, {seconds})\n"
        self._script.write_text(_SCRIPT.replace("if __name__", f"{setting}if __name__"))

    @contextlib.contextmanager
    def killed_at(self, module: str, method: str) -> Iterator[None]:
        """Have each command be killed, as by SIGKILL, where it would call a method."""
        setting = f"import os, {module}\n{module}.{method} = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n"
        script = self._script.read_text()
        self._script.write_text(script.replace("if __name__", f"{setting}if __name__"))
        try:
            yield
        finally:
            self._script.write_text(script)

    def run(self, *args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        with self.start(*args) as process:
            stdout, stderr = process.communicate(stdin, timeout=PATIENCE)
        return subprocess.CompletedProcess(args, process.returncode, stdout, stderr)

    def command(self, *args: str) -> list[str]:
        words = ["-W", "error", *(["-W", "ignore::ResourceWarning"] if self.is_struck_anywhere else [])]
        return [*self.wrapper, sys.executable, *words, str(self._script), *args]

    def sh(self, line: str, *args: str) -> subprocess.CompletedProcess[str]:
        """Run the command by a shell's line, in which it stands as "$@"."""
        command = ["/bin/sh", "-c", line, "sh", *self.command(*args)]
        return subprocess.run(
            command, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=PATIENCE, check=False
        )

    @contextlib.contextmanager
    def start(self, *args: str) -> Iterator[subprocess.Popen[str]]:
        pipe = subprocess.PIPE
        with subprocess.Popen(
            self.command(*args), cwd=self.folder, env=self.env, stdin=pipe, stdout=pipe, stderr=pipe, text=True
        ) as process:
            try:
                yield process
            finally:
                process.kill()  # nothing to a process that has ended and was waited for

    def run_on_terminal(self, *args: str, keys: bytes = b"") -> subprocess.CompletedProcess[str]:
        """Run a command whose three streams are one terminal, on which the keys are pressed; all it shows is stdout."""
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        shown = b""
        with subprocess.Popen(
            self.command(*args),
            cwd=self.folder,
            env=self.env,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        ) as process:
            os.close(theirs)
            os.write(ours, keys)
            try:
                with contextlib.suppress(OSError):  # the other end is closed
                    while select.select([ours], [], [], PATIENCE)[0]:
                        shown += os.read(ours, 4096)
                process.wait(PATIENCE)
            finally:
                process.kill()
                os.close(ours)
        return subprocess.CompletedProcess(args, process.returncode, shown.decode())


def lines_on_terminal(text: str) -> list[str]:
    """Return what stands in each line of a terminal in the end."""
    lines = []
    for line in text.replace("\r\n", "\n").split("\n"):
        seen = ""
        for piece in line.split("\r"):
            seen = piece + seen[len(piece) :]
        lines.append(seen.rstrip())
    return lines


def records(text: str) -> list[dict[str, Any]]:
    """Return the JSON Lines of a text in the order of the input."""
    return sorted((json.loads(line) for line in text.splitlines()), key=lambda record: record["index"])


def assert_told(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """Check that a command failed as promised: exit code, error and hint on stderr, no traceback, nothing on stdout."""
    lines = done.stderr.splitlines()
    assert done.returncode == code, done.stderr
    assert [line for line in lines if line.startswith("error: ")] == lines[:1], done.stderr
    assert len([line for line in lines if line.startswith("hint: ")]) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    for word in words:
        assert word in done.stderr
