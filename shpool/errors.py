"""Every error shpool raises, as one tree; each survives pickling and its text names the remedy.

    ShpoolError
    ├── LoginError                 no token this time; trying again may help
    │   ├── TokenResponseError     the endpoint answered, but not with a token
    │   └── LoginRefusedError      final: these credentials will never work
    ├── TokenUnavailableError      no valid token to hand out now
    ├── TokenTooLargeError         a token beyond what the board can hold
    ├── OpaqueTokenError           claims were asked of a token that is not a JWT
    ├── InsecureUrlError           the token would travel unencrypted
    ├── NoSessionError             current_session() outside a worker
    ├── BoardError                 the shared memory cannot be used
    │   ├── BoardNotFoundError     nobody shares under that name
    │   ├── BoardInUseError        a living process shares under that name
    │   ├── ForeignBoardError      another user owns the segment, or may write to it
    │   ├── BoardLayoutError       not a board, or one of another shpool version
    │   ├── TornBoardError         no consistent record within the bound
    │   └── GateUnusableError      the same of a gate's, or the system cannot keep limits
    ├── GateInUseError             others use the gate of that name with other limits
    ├── GateUnreachableError       a cluster's worker cannot ask the parent's gate
    ├── TaskError                  one task failed for a reason outside its function
    │   ├── WorkerLostError        its worker process died
    │   ├── TaskTimeoutError       it ran longer than its timeout
    │   ├── TaskTerminatedError    somebody stopped it while it ran
    │   └── UnpicklableError       its function, arguments, result or error cannot travel
    ├── ShellJobError              a shell command ended with another exit status than 0
    │   └── ShellTimeoutError      it ran longer than its timeout
    ├── InitializerError           the initializer failed in a worker
    │   └── WorkerStartError       no worker comes up, with or without one
    ├── ClusterError               the cluster that tasks were to run on cannot be used
    │   └── ClusterUnreachableError  it does not answer, or not any more
    ├── ConfigError                the configuration cannot be read or used
    ├── InputError                 a batch's target or input is not usable
    ├── JournalError               the journal of a batch cannot be read or written
    │   ├── JournalNotFoundError   there is no such file
    │   ├── NotAJournalError       the file is something else, which is never touched
    │   ├── JournalMismatchError   written for another target, or in another format
    │   ├── JournalInUseError      a run that is alive writes to it
    │   └── JournalFullError       no space is left for it
    ├── MissingExtraError          an optional package is not installed
    └── DownloadError              a file could not be fetched
        ├── TransferError          the server or the network did not deliver it
        ├── DownloadTimeoutError   an attempt took longer than it may; what has arrived is kept
        ├── ContentError           what was delivered is not the file: size, checksum, an error page
        ├── TargetPathError        its path leaves the folder, is taken, or is no possible one
        ├── PartInUseError         a living process writes the same file
        ├── StorageFullError       no space left; what has arrived is kept
        └── TooManyOpenFilesError  no file could be opened beside so many others

Classes take positional fields only and build their text in ``__str__``: pickle replays the fields.
Wrong arguments are plain ``TypeError`` and ``ValueError``.
"""

from __future__ import annotations

import signal


class ShpoolError(Exception):
    """Root of all errors of this package."""

    def __reduce__(self) -> tuple[object, ...]:
        """Replay the positional fields, also where a base class such as ``OSError`` would not."""
        return type(self), self.args, {"__notes__": self.__notes__} if hasattr(self, "__notes__") else None


class SHUserWarning(UserWarning):
    """Something was survived that the user may want to know of; named as in sentinelhub-py."""


class LoginError(ShpoolError):
    """The token endpoint gave no token; a later attempt may succeed.

    Args:
        endpoint: URL of the token endpoint.
        reason: What happened, in words.
        status: HTTP status, or None when there was no answer.
        retry_after: Seconds the endpoint asked to wait, or None.
    """

    def __init__(self, endpoint: str, reason: str, status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(endpoint, reason, status, retry_after)
        self.endpoint = endpoint
        self.reason = reason
        self.status = status
        self.retry_after = retry_after

    def __str__(self) -> str:
        answer = "" if self.status is None else f" with HTTP {self.status}"
        return f"no token from {self.endpoint}{answer}: {self.reason}; check the URL and the network, or try later"


class TokenResponseError(LoginError):
    """The token endpoint answered, but the answer is no token (RFC 6749, section 5.1)."""

    def __str__(self) -> str:
        return f"{self.endpoint} answered without a usable token: {self.reason}; check that the URL is a token endpoint"


_REFUSAL_HINTS = {
    "invalid_client": "check the client id and secret (SH_CLIENT_ID, SH_CLIENT_SECRET, or the configuration file)",
    "unauthorized_client": "allow the client credentials grant for this client at the provider",
    "invalid_scope": "ask only for scopes this client may have",
    "unsupported_grant_type": "the provider must allow the client credentials grant",
}


class LoginRefusedError(LoginError):
    """The provider refuses this client for good; no retry will help (RFC 6749, section 5.2).

    Args:
        endpoint: URL of the token endpoint.
        client_id: The client that was refused.
        code: The OAuth ``error`` code, such as ``invalid_client``.
        description: The provider's own words, may be empty.
        status: HTTP status, or None.
    """

    def __init__(
        self, endpoint: str, client_id: str, code: str, description: str = "", status: int | None = None
    ) -> None:
        super().__init__(endpoint, code, status)
        self.args = (endpoint, client_id, code, description, status)
        self.client_id = client_id
        self.code = code
        self.description = description

    def __str__(self) -> str:
        words = f": {self.description}" if self.description else ""
        hint = _REFUSAL_HINTS.get(self.code, "check the client's registration at the provider")
        return f"token endpoint {self.endpoint} refused client {self.client_id!r} ({self.code}){words}; {hint}"


class TokenUnavailableError(ShpoolError):
    """There is no valid token now: it has expired and could not be renewed, or sharing has ended.

    Args:
        reason: Why there is none.
        last_error: Text of the parent's last login error, empty when there was none.
    """

    def __init__(self, reason: str, last_error: str = "") -> None:
        super().__init__(reason, last_error)
        self.reason = reason
        self.last_error = last_error

    def __str__(self) -> str:
        if self.last_error:
            return f"no valid token: {self.reason}; the last login failed: {self.last_error}"
        return f"no valid token: {self.reason}"


class TokenTooLargeError(ShpoolError):
    """The token does not fit the board.

    Args:
        size: Bytes of the token's record.
        limit: Bytes the board can hold.
    """

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(size, limit)
        self.size = size
        self.limit = limit

    def __str__(self) -> str:
        return (
            f"the token needs {self.size} bytes and the board holds {self.limit}; "
            "ask the provider for fewer scopes or claims"
        )


class OpaqueTokenError(ShpoolError, ValueError):
    """The token carries no readable claims: it is not a JSON Web Token (RFC 7519)."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"the access token has no readable claims: {self.reason}; ask the provider's introspection endpoint"


class InsecureUrlError(ShpoolError, ValueError):
    """A request would send the token over an unencrypted connection.

    Args:
        host: Where to.
    """

    def __init__(self, host: str) -> None:
        super().__init__(host)
        self.host = host

    def __str__(self) -> str:
        return f"the token is not sent to {self.host} over an unencrypted connection; use https"


class NoSessionError(ShpoolError, RuntimeError):
    """``current_session()`` was called where there is no shared session."""

    def __init__(self) -> None:
        super().__init__()

    def __str__(self) -> str:
        return (
            "current_session() works inside a worker of AuthenticatedProcessPool; "
            "elsewhere use collect_shared_session(name), or the session itself in the parent"
        )


class BoardError(ShpoolError):
    """A shared-memory segment cannot be used.

    Args:
        name: Name of the segment.
        detail: What is wrong with it.
    """

    def __init__(self, name: str, detail: str = "") -> None:
        super().__init__(name, detail)
        self.name = name
        self.detail = detail

    def __str__(self) -> str:
        return f"shared memory {self.name!r} cannot be used: {self.detail}"


class BoardNotFoundError(BoardError, FileNotFoundError):
    """No session is shared under that name."""

    def __str__(self) -> str:
        return (
            f"no session is shared as {self.name!r}; sharing must be running: "
            "start SessionSharing, or a pool with memory_name, under this name first"
        )


class BoardInUseError(BoardError, FileExistsError):
    """A living process shares under that name already.

    Args:
        name: Name of the segment.
        pid: The process that owns it.
    """

    def __init__(self, name: str, pid: int) -> None:
        super().__init__(name, f"in use by process {pid}")
        self.args = (name, pid)
        self.pid = pid

    def __str__(self) -> str:
        return f"memory_name {self.name!r} is in use by process {self.pid}; choose another name or end that process"


class ForeignBoardError(BoardError, PermissionError):
    """Another user owns the segment, or could write to it."""

    def __str__(self) -> str:
        return f"shared memory {self.name!r} is not safe to use: {self.detail}; choose another memory_name"


class BoardLayoutError(BoardError):
    """The segment is no board, or a board of another version of shpool."""

    def __str__(self) -> str:
        return (
            f"shared memory {self.name!r} is not a board of this shpool: {self.detail}; "
            "use the same shpool version on both sides, or choose another memory_name"
        )


class TornBoardError(BoardError):
    """No consistent record could be read within the bound."""


class GateUnusableError(BoardError):
    """The gate's shared memory cannot be used, or the system lacks the locks that limits need.

    Args:
        name: The gate's name, empty for none.
        detail: What is wrong with it.
    """

    def __str__(self) -> str:
        if not self.name:
            return f"the gate cannot be used: {self.detail}"
        return f"gate {self.name!r} cannot be used: {self.detail}; choose another name, or give none"


class GateInUseError(ShpoolError, ValueError):
    """Processes that are running share a gate of that name, with other limits.

    Args:
        name: The gate's name.
        theirs: The limits in use.
        ours: The limits that were asked for.
    """

    def __init__(self, name: str, theirs: str, ours: str) -> None:
        super().__init__(name, theirs, ours)
        self.name = name
        self.theirs = theirs
        self.ours = ours

    def __str__(self) -> str:
        return (
            f"gate {self.name!r} is in use with other limits: {self.theirs}, not {self.ours}; "
            "give the same limits everywhere, or choose another name"
        )


class GateUnreachableError(ShpoolError, ConnectionError):
    """A worker on a cluster cannot ask the pool's parent, which holds the gate, so the limits cannot be kept.

    Args:
        reason: What is wrong.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"the request is not sent, as the account's gate cannot be asked: {self.reason}"


class TaskError(ShpoolError):
    """A task failed for a reason outside its own function."""


class WorkerLostError(TaskError):
    """The worker process died while it ran the task.

    Args:
        task: What was called, as text.
        pid: The worker's process id, 0 when unknown.
        exitcode: Exit code, negative for a signal, None when unknown.
        peak_memory: Peak resident memory of the worker in bytes, None when unknown.
        attempts: How many workers the task has cost.
    """

    def __init__(
        self, task: str, pid: int, exitcode: int | None = None, peak_memory: int | None = None, attempts: int = 1
    ) -> None:
        super().__init__(task, pid, exitcode, peak_memory, attempts)
        self.task = task
        self.pid = pid
        self.exitcode = exitcode
        self.peak_memory = peak_memory
        self.attempts = attempts

    def __str__(self) -> str:
        who = f"worker {self.pid}" if self.pid else "the worker"
        parts = [f"{who} died while running {self.task}"]
        if self.exitcode is not None:
            cause = f"signal {-self.exitcode}" if self.exitcode < 0 else f"exit code {self.exitcode}"
            parts.append(f" ({cause})")
        if self.peak_memory is not None:
            parts.append(f", peak memory {self.peak_memory / 1e6:.0f} MB")
        if self.attempts > 1:
            parts.append(f", attempt {self.attempts}")
        if self.exitcode == -9:  # noqa: PLR2004 - SIGKILL, what the kernel's out-of-memory killer sends
            parts.append("; if the kernel ran out of memory, use fewer workers or smaller tasks")
        elif self.attempts == 1:
            parts.append("; with more retries it would run again on a fresh worker")
        return "".join(parts)


class TaskTimeoutError(TaskError, TimeoutError):
    """The task ran longer than its timeout and was stopped.

    Args:
        task: What was called, as text.
        timeout: The limit in seconds.
    """

    def __init__(self, task: str, timeout: float) -> None:
        super().__init__(task, timeout)
        self.task = task
        self.timeout = timeout

    def __str__(self) -> str:
        return f"{self.task} ran longer than {self.timeout:g} s and was stopped; raise timeout= or split the task"


class TaskTerminatedError(TaskError):
    """The task was stopped while it ran: the pool was ended, or the task itself was.

    Args:
        task: What was called, as text.
    """

    def __init__(self, task: str) -> None:
        super().__init__(task)
        self.task = task

    def __str__(self) -> str:
        return f"{self.task} was stopped before it was done; submit it again if its result is still wanted"


class UnpicklableError(TaskError):
    """Something of a task cannot travel between processes.

    Args:
        what: ``function``, ``arguments``, ``result``, ``exception``, or the pool's ``initializer`` and its arguments.
        text: What it was, shortened.
        reason: Why it cannot be pickled or unpickled.
        is_temporary: It was an exception after which the same call may succeed.
    """

    def __init__(self, what: str, text: str, reason: str, is_temporary: bool = False) -> None:  # noqa: FBT001, FBT002 - pickle replays it
        super().__init__(what, text, reason, is_temporary)
        self.what = what
        self.text = text
        self.reason = reason
        self.is_temporary = is_temporary

    def __str__(self) -> str:
        owner = "pool" if self.what == "initializer" else "task"
        return f"the {owner}'s {self.what} cannot travel between processes: {self.text} ({self.reason})"


_TEMPORARY_STATUS = 75  # EX_TEMPFAIL of <sysexits.h>: "the user is invited to retry"
_SHELL_SIGNALS = 128  # a shell's exit status for a command that a signal killed, less the signal's number
_LONGEST_COMMAND = 200  # characters of a command in an error's text
_LONGEST_WORDS = 300  # characters of its last words there
_LONGEST_END = 10_000  # characters at the end of its stderr that are searched for them


class ShellJobError(ShpoolError):
    """A shell command ended with another exit status than 0, or by a signal.

    Args:
        command: What the shell was told; never the token.
        status: Its exit status; negative for a signal that killed the shell itself.
        stderr: What it wrote there; head and tail where that was much.
        stdout: Likewise.
        dropped: Bytes of both that were not kept.
    """

    def __init__(self, command: str, status: int, stderr: str = "", stdout: str = "", dropped: int = 0) -> None:
        super().__init__(command, status, stderr, stdout, dropped)
        self.command = command
        self.status = status
        self.stderr = stderr
        self.stdout = stdout
        self.dropped = dropped

    @property
    def output(self) -> dict[str, str | int | None]:
        """What it said and how it ended, under the names that ``ShellResult`` has for them."""
        return {
            "stdout": self.stdout,
            "stderr": self.stderr,
            "dropped": self.dropped,
            "exit_status": self.status if self.status >= 0 else None,
            "signal": self.signal_name or None,
        }

    @property
    def signal_name(self) -> str:
        """Name of the signal that killed the command, such as ``SIGSEGV``; empty if none did."""
        number = -self.status if self.status < 0 else self.status - _SHELL_SIGNALS
        try:
            return signal.Signals(number).name
        except ValueError:
            return ""

    @property
    def is_temporary(self) -> bool:
        """Tell whether another run may succeed.

        That is so for exit status 75, which says just that, and after SIGKILL, which the kernel sends when memory is
        short, as for a lost worker. Any other status means what its program means by it, mostly the same next time.
        """
        return self.status == _TEMPORARY_STATUS or self.signal_name == "SIGKILL"

    def __str__(self) -> str:
        how = f"exit status {self.status}" if self.status >= 0 else f"signal {-self.status}"
        named = f" ({self.signal_name})" if self.signal_name else ""
        return f"{self._shown} ended with {how}{named}{self._last_words}; run it by hand to see all of it"

    @property
    def _shown(self) -> str:
        text = " ".join(self.command.split())
        return f"command [{text if len(text) <= _LONGEST_COMMAND else text[: _LONGEST_COMMAND - 1] + '…'}]"

    @property
    def _last_words(self) -> str:
        lines = [line for line in self.stderr[-_LONGEST_END:].splitlines() if line.strip()]
        words = " | ".join(" ".join(line.split()) for line in lines[-3:])
        return f": {words[-_LONGEST_WORDS:]}" if words else ""


class ShellTimeoutError(ShellJobError, TimeoutError):
    """A shell command ran longer than its timeout and was stopped, with all it had started.

    Args:
        command: What the shell was told.
        timeout: The limit in seconds.
        stderr: What it wrote there, until it was stopped; head and tail where that was much.
        stdout: Likewise.
        dropped: Bytes of both that were not kept.
    """

    def __init__(self, command: str, timeout: float, stderr: str = "", stdout: str = "", dropped: int = 0) -> None:
        super().__init__(command, -signal.SIGTERM, stderr, stdout, dropped)
        self.args = (command, timeout, stderr, stdout, dropped)
        self.timeout = timeout

    def __str__(self) -> str:
        return (
            f"{self._shown} ran longer than {self.timeout:g} s and was stopped{self._last_words}; "
            "raise the timeout or split the job"
        )


class InitializerError(ShpoolError):
    """The initializer raised in a worker, so no task can run.

    Args:
        text: The error, as the worker saw it.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"the pool's initializer failed in a worker: {self.text}"


class WorkerStartError(InitializerError):
    """No worker comes up, so no task can run.

    Args:
        text: What became of the attempts.
    """

    def __str__(self) -> str:
        return f"the pool's workers do not start: {self.text}"


class ClusterError(ShpoolError):
    """The cluster that tasks were to run on cannot be used.

    Args:
        where: Its address, or its kind.
        reason: What is wrong.
    """

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(where, reason)
        self.where = where
        self.reason = reason

    def __str__(self) -> str:
        return f"cluster {self.where} cannot be used: {self.reason}"


class ClusterUnreachableError(ClusterError, ConnectionError):
    """The cluster does not answer, or not any more."""

    def __str__(self) -> str:
        return f"cluster {self.where} cannot be reached: {self.reason}; check its address and that it runs"


class ConfigError(ShpoolError, ValueError):
    """The configuration cannot be read or used.

    Args:
        path: The file, or where else the value came from.
        reason: What is wrong and what to do.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class InputError(ShpoolError, ValueError):
    """A batch's target or input is not usable.

    Args:
        where: File, line or option.
        reason: What is wrong.
        hint: What to do.
    """

    def __init__(self, where: str, reason: str, hint: str = "") -> None:
        super().__init__(where, reason, hint)
        self.where = where
        self.reason = reason
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}" + (f"; {self.hint}" if self.hint else "")


class JournalError(ShpoolError):
    """The journal of a batch cannot be read or written.

    Args:
        path: The journal's file.
        reason: What is wrong.
        hint: What to do.
    """

    def __init__(self, path: str, reason: str, hint: str = "") -> None:
        super().__init__(path, reason, hint)
        self.path = path
        self.reason = reason
        self.hint = hint

    def __str__(self) -> str:
        return f"journal {self.path}: {self.reason}" + (f"; {self.hint}" if self.hint else "")


class JournalNotFoundError(JournalError, FileNotFoundError):
    """There is no journal at that place.

    Args:
        path: Where it was looked for.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path, "there is no such file", "give the file that a run was given as its --journal")
        self.args = (path,)


class NotAJournalError(JournalError):
    """The file is something else; it is left as it is, whatever was asked for.

    Args:
        path: The file.
        reason: What it is.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason, "give another --journal; a file that is no journal is never overwritten")
        self.args = (path, reason)

    def __str__(self) -> str:
        return f"{self.path} is no journal of shpool: {self.reason}; {self.hint}"


class JournalMismatchError(JournalError):
    """The journal was written for another target, for jobs with other keys, or in another format.

    Args:
        path: The journal's file.
        what: ``target``, ``jobs named`` or ``format version``.
        found: What the file says.
        wanted: What was asked for.
        hint: What to do.
    """

    def __init__(
        self,
        path: str,
        what: str,
        found: str,
        wanted: str,
        hint: str = "give another --journal, or --fresh to forget all that it holds",
    ) -> None:
        super().__init__(path, f"it was written for {what} {found}, not {wanted}", hint)
        self.args = (path, what, found, wanted, hint)
        self.what = what
        self.found = found
        self.wanted = wanted


class JournalInUseError(JournalError):
    """A run that is alive writes to the journal.

    Args:
        path: The journal's file.
        pid: That run's process; 0 when it did not tell.
    """

    def __init__(self, path: str, pid: int) -> None:
        process = f"process {pid}" if pid else "another process"
        super().__init__(
            path, f"{process} is running with it", "wait for that run or end it, or give another --journal"
        )
        self.args = (path, pid)
        self.pid = pid


class JournalFullError(JournalError):
    """There is no space left for the journal; what it holds is safe.

    Args:
        path: The journal's file.
        recorded: Jobs whose end it holds; None when they could not be counted.
    """

    def __init__(self, path: str, recorded: int | None = None) -> None:
        hint = "free some and run the same command again"
        if recorded is not None:
            hint += f", {recorded} jobs are recorded"
        super().__init__(path, "no space is left on its disk", hint)
        self.args = (path, recorded)
        self.recorded = recorded


class MissingExtraError(ShpoolError, ImportError):
    """A feature needs a package that is not installed.

    Args:
        package: The package.
        extra: shpool's extra that brings it.
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(package, extra)
        self.package = package
        self.extra = extra

    def __str__(self) -> str:
        return f"{self.package} is not installed; run: pip install 'shpool[{self.extra}]'"


class DownloadError(ShpoolError):
    """A file could not be fetched.

    Args:
        what: Its URL, without the query and anything else that may be secret, or its path.
        reason: What happened, and what to do.
    """

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(what, reason)
        self.what = what
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.what}: {self.reason}"


class TransferError(DownloadError):
    """The server or the network did not deliver the file.

    Args:
        what: Its URL, without the query.
        reason: What happened.
        status: HTTP status of the last answer, or None.
        retry_after: Seconds the server asked to wait, or None.
        is_temporary: Whether the same request may work later.
    """

    def __init__(
        self,
        what: str,
        reason: str,
        status: int | None = None,
        retry_after: float | None = None,
        is_temporary: bool = True,  # noqa: FBT001, FBT002 - pickle replays positional fields
    ) -> None:
        super().__init__(what, reason)
        self.args = (what, reason, status, retry_after, is_temporary)
        self.status = status
        self.retry_after = retry_after
        self.is_temporary = is_temporary

    def __str__(self) -> str:
        hint = "try later" if self.is_temporary else "check the URL and what the account may read"
        return f"{self.what}: {self.reason}; {hint}"


class DownloadTimeoutError(DownloadError, TimeoutError):
    """An attempt at a file took longer than it may; what has arrived is kept.

    Args:
        what: Its URL, without the query.
        timeout: The limit in seconds.
    """

    def __init__(self, what: str, timeout: float) -> None:
        super().__init__(what, f"it took longer than {timeout:g} s")
        self.args = (what, timeout)
        self.timeout = timeout

    def __str__(self) -> str:
        return f"{self.what}: {self.reason}; raise the timeout, or run the same again: what has arrived is kept"


class ContentError(DownloadError):
    """What was delivered is not the file that was asked for, and was thrown away."""


class TargetPathError(DownloadError, ValueError):
    """A file cannot have this path: it would leave the folder, is taken by another file, or is no possible name."""


class PartInUseError(DownloadError, FileExistsError):
    """A living process writes the same file.

    Args:
        path: The unfinished file.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path, "another process is writing this file; wait for it, or end it")
        self.args = (path,)


class StorageFullError(DownloadError, OSError):
    """There is no space left for a file; what has arrived of it is kept.

    Args:
        path: The unfinished file.
        detail: The operating system's own words.
    """

    def __init__(self, path: str, detail: str = "No space left on device") -> None:
        super().__init__(path, detail)
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.what}: {self.detail}; what has arrived is kept: free some space and run the same again"


class TooManyOpenFilesError(DownloadError, OSError):
    """A file could not be opened, as this process or the system has as many open as it may.

    Args:
        path: The file.
        detail: The operating system's own words.
    """

    def __init__(self, path: str, detail: str = "Too many open files") -> None:
        super().__init__(path, detail)
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.what}: {self.detail}; transfer fewer files at once, or raise the limit (ulimit -n)"
