"""Jobs that are shell commands: a template, filled with each job's arguments and run by ``/bin/sh`` in a worker."""

from __future__ import annotations

import errno
import os
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shpool.errors import ShellJobError, ShellTimeoutError
from shpool.redaction import MASK, SECRET_VARIABLES
from shpool.shared import current_session
from shpool.shell.command import run_command
from shpool.shell.template import LONGEST_COMMAND, check_fields, fill, parse, refuse

if TYPE_CHECKING:
    from collections.abc import Collection

    from shpool.shell.command import Ended
    from shpool.tokens import Token

TOKEN_VARIABLE = "SHPOOL_TOKEN"  # noqa: S105 - a name

# Of each output of a job. The JSON of gdalinfo for a product of many bands takes some 100 kB; results of this size from
# four jobs in flight cost the parent 8 MiB a worker at worst.
KEPT_OUTPUT = 1024 * 1024  # bytes


@dataclass(frozen=True)
class ShellResult:
    """What a command that ended well has said; of one that failed, ``ShellJobError.output`` holds the same.

    Attributes:
        stdout: Its standard output; head and tail where it was longer than the limit.
        stderr: Its standard error, likewise.
        dropped: Bytes of both that were dropped; a line in the text says where.
        exit_status: What it ended with; None where a signal killed the shell itself.
        signal: Name of the signal that killed the command, if one did.
    """

    stdout: str
    stderr: str
    dropped: int = 0
    exit_status: int | None = 0
    signal: str | None = None


class ShellCall:
    """A function that runs a shell command with its arguments as fields; picklable.

    Values are quoted, see ``shpool.shell.template``. The command runs in a session of its own, without a terminal, with
    nothing on stdin, in the worker's folder and environment; the token is in ``SHPOOL_TOKEN`` and nowhere else. It is
    the token of the moment: a command that runs longer than the token lives must be split. When the command ends, is
    late, or loses its worker, all it has started is killed.

    A worker ignores SIGINT, and so does what it starts.

    Args:
        template: The command, such as ``gdal_translate -q {url} {name}.tif``.
        timeout: Seconds each command may take, None for ever. A pool's own timeout kills the worker, and then the
            command at once; this one asks the command to end first and keeps what it has said.
        kept_output: Bytes to keep of each output.

    Raises:
        InputError: The template cannot be used safely; says why and what to write.
        ValueError: ``timeout`` is not more than 0, or ``kept_output`` negative.

    >>> print(ShellCall("convert {src} {0}.tif").command(1, src="my tile.jp2"))
    convert 'my tile.jp2' '1'.tif
    """

    def __init__(self, template: str, *, timeout: float | None = None, kept_output: int = KEPT_OUTPUT) -> None:
        if timeout is not None and not timeout > 0:
            msg = f"timeout must be more than 0 seconds, or None, not {timeout!r}"
            raise ValueError(msg)
        if kept_output < 0:
            msg = f"kept_output={kept_output} must not be negative"
            raise ValueError(msg)
        self.template = template
        self._timeout = timeout
        self._kept_output = kept_output
        self._pieces = parse(template)

    def check_fields(self, positional: int, names: Collection[str]) -> None:
        """Check that jobs of this shape have every field of the template.

        Args:
            positional: How many positional arguments a job has.
            names: Names of its keyword arguments.

        Raises:
            InputError: A field is unknown; the hint names the fields there are.
        """
        check_fields(self._pieces, positional, names)

    def check_syntax(self) -> None:
        """Let the shell read the command without running it.

        Raises:
            InputError: The shell does not understand it.
        """
        command = "".join(piece if isinstance(piece, str) else "'x'" for piece in self._pieces)
        read = subprocess.run(  # noqa: S603 - with -n the shell runs nothing
            ["/bin/sh", "-n", "-c", command], stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
        if read.returncode:
            words = _last_line(read.stderr.decode(errors="replace")) or f"exit status {read.returncode}"
            refuse(f"the shell cannot read it: {words}", "check its quotes and keywords")

    def command(self, /, *args: Any, **kwargs: Any) -> str:  # noqa: ANN401 - fields of any type
        """Return the command for a job's arguments.

        Raises:
            InputError: The job lacks a field, a value cannot be given to a command, or all is too long.
        """
        command = fill(self._pieces, args, kwargs)
        try:
            size = len(os.fsencode(command))
        except UnicodeEncodeError as exc:
            reason = f"it cannot be encoded: {exc.reason}"
            refuse(reason, "give values that are text")
        if size > LONGEST_COMMAND:
            hint = "give large values by way of a file"
            refuse(f"{size} bytes are more than the system takes, {LONGEST_COMMAND}", hint)
        return command

    def __call__(self, /, *args: Any, **kwargs: Any) -> ShellResult:  # noqa: ANN401 - as above
        """Run the command.

        Raises:
            InputError: As for ``command``.
            NoSessionError: This process has no shared session.
            TokenUnavailableError: There is no valid token.
            ShellJobError: The exit status was not 0.
            ShellTimeoutError: It was late and was stopped.
        """
        command, token = self.command(*args, **kwargs), current_session().token
        ended = self._run(command, token)
        return self._judge(ended, command.replace(token.access_token, MASK))

    def _run(self, command: str, token: Token) -> Ended:
        """Run it; apart, so that no frame of a failed job's traceback holds the environment."""
        secret = token.access_token
        # Workers have them blanked already; where tasks run in the caller's own process, nobody has.
        env = {name: value for name, value in os.environ.items() if name not in SECRET_VARIABLES}
        env[TOKEN_VARIABLE] = secret
        try:
            return run_command(command, env, timeout=self._timeout, limit=self._kept_output, secret=secret)
        except OSError as exc:
            if exc.errno != errno.E2BIG:
                raise
        reason = "it and its environment are more than the system takes"
        return refuse(reason, "make the environment smaller, or give large values by way of a file")

    def _judge(self, ended: Ended, command: str) -> ShellResult:
        stdout, stderr = ended.stdout.text(), ended.stderr.text()
        dropped = ended.stdout.dropped + ended.stderr.dropped
        if ended.is_late and self._timeout is not None:
            raise ShellTimeoutError(command, self._timeout, stderr, stdout, dropped)
        if ended.status:
            raise ShellJobError(command, ended.status, stderr, stdout, dropped)
        return ShellResult(stdout, stderr, dropped)

    def __str__(self) -> str:
        """Name the command for ever, as a target's text does: the jobs' keys are made of it."""
        return f"sh:{self.template}"

    def __repr__(self) -> str:
        return f"ShellCall({self.template!r})"

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuilt, (self.template, self._timeout, self._kept_output)


def _rebuilt(template: str, timeout: float | None, kept_output: int) -> ShellCall:
    return ShellCall(template, timeout=timeout, kept_output=kept_output)


def _last_line(text: str) -> str:
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return "".join(lines[-1:])
