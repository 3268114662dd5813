"""Log records of workers: packed there, without secrets, and handed to the parent's own loggers."""

from __future__ import annotations

import contextlib
import logging
import pickle
import re
from typing import TYPE_CHECKING, Any

from shpool.redaction import MASK

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

logger = logging.getLogger(__name__)

_LONGEST = 64 * 1024  # characters of a message or traceback that travel; a log line is no way to move data
_FIELDS = ("name", "levelno", "pathname", "lineno", "funcName", "created", "msecs", "threadName")
# Tokens that are not the present one: what stands after Bearer (RFC 6750, section 2.1), and JSON Web Tokens.
_TOKEN_LIKE = re.compile(r"(?<=Bearer )[\w.~+/=-]{8,}|\beyJ[\w-]{8,}\.[\w-]+\.[\w-]*", re.IGNORECASE)


class RelayHandler(logging.Handler):
    """Send each record to the parent; a record that cannot go is shown here.

    Args:
        send: Sends bytes to the parent; raises ``OSError`` where that is impossible, as in a task's forked child.
        secrets: Returns texts that no record may hold: the tokens of late.
    """

    def __init__(self, send: Callable[[bytes], None], secrets: Callable[[], Iterable[str]]) -> None:
        super().__init__()
        self._send = send
        self._secrets = secrets

    def emit(self, record: logging.LogRecord) -> None:
        """Pack the record and send it."""
        try:
            fields = self._fields_of(record)
        except Exception:  # noqa: BLE001 - border: formatting runs the arguments' own code
            record.msg, record.args = self._clean(str(record.msg)), (MASK,)  # it is printed with what is wrong
            self.handleError(record)
            return
        try:
            self._send(pickle.dumps(fields, protocol=5))
        except OSError:
            here = logging.lastResort
            if here is not None and record.levelno >= here.level:
                here.handle(logging.makeLogRecord(fields))

    def _fields_of(self, record: logging.LogRecord) -> dict[str, Any]:
        fields: dict[str, Any] = {name: getattr(record, name, None) for name in _FIELDS}
        fields["msg"] = self._clean(record.getMessage())
        if record.exc_info:
            fields["exc_text"] = self._clean(logging.Formatter().formatException(record.exc_info))
        if record.stack_info:
            fields["stack_info"] = self._clean(record.stack_info)
        return fields

    def _clean(self, text: str) -> str:
        for secret in self._secrets():
            text = text.replace(secret, MASK)
        text = _TOKEN_LIKE.sub(MASK, text)
        return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"


def relay(level: int, send: Callable[[bytes], None], secrets: Callable[[], Iterable[str]]) -> None:
    """Send this process's log records from ``level`` on to the parent, and its warnings as records."""
    root = logging.getLogger()
    root.setLevel(level)
    root.addHandler(RelayHandler(send, secrets))
    logging.captureWarnings(capture=True)


def deliver(data: bytes | memoryview, worker: int, task: str | None) -> None:
    """Hand a worker's record to this process's logger of the same name.

    Handlers and formatters find the worker's process id as ``process`` and ``worker``, and what ran there as
    ``task``: ``%(worker)d``, ``%(task)s``.

    Args:
        data: What the handler in the worker sent.
        worker: The worker's process id.
        task: What it was running, None for nothing.
    """
    with contextlib.suppress(Exception, SystemExit):  # border: handlers are the user's
        fields = pickle.loads(data)
        fields |= {"levelname": logging.getLevelName(fields["levelno"])}  # as this process calls it
        fields |= {"process": worker, "processName": f"worker-{worker}", "worker": worker, "task": task or ""}
        record = logging.makeLogRecord(fields)
        receiver = logging.getLogger(record.name)
        if receiver.isEnabledFor(record.levelno):
            receiver.handle(record)
