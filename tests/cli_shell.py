"""The command line as users start it: a script in a process of its own, in a folder of its own."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from shpool.testing import LoopbackServer

PATIENCE = 60  # s; a command that takes longer hangs

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

    def run(self, *args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        with self.start(*args) as process:
            stdout, stderr = process.communicate(stdin, timeout=PATIENCE)
        return subprocess.CompletedProcess(args, process.returncode, stdout, stderr)

    def command(self, *args: str) -> list[str]:
        return [sys.executable, "-W", "error", str(self._script), *args]

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
