"""What travels to a worker, pickled once and for all: functions, arguments, how it begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shpool.engines.flight import PackedFunction
from shpool.engines.keeping import key_of
from shpool.engines.messages import Kind
from shpool.errors import UnpicklableError
from shpool.pickling import Pieces, dump, dump_in_pieces
from shpool.worker import shortened

if TYPE_CHECKING:
    from collections.abc import Callable

    from shpool.engines.base import Task
    from shpool.engines.setup import WorkerSetup


def pack_function(fn: Callable[..., Any], *, serves_many: bool = False) -> PackedFunction:
    """Pickle a function; see ``Engine.prepare``.

    Raises:
        UnpicklableError: It cannot be pickled.
    """
    try:
        pickled = dump(fn)
    except Exception as exc:
        raise _unpicklable(fn, "function", exc) from exc
    return PackedFunction(key_of(pickled, serves_many=serves_many), pickled)


def pack_arguments(task: Task) -> tuple[Kind, bytes | Pieces]:
    """Pickle a task's arguments as they are now; return them with the kind of message that carries them.

    Raises:
        UnpicklableError: They cannot be pickled.
    """
    kind = Kind.CALL
    content: object = (task.args, task.kwargs)
    if task.batch:
        kind, content = (Kind.BATCH_STAR if task.star else Kind.BATCH), task.args
    try:
        pickled = dump_in_pieces(content)  # here, as a call more costs what a tenth of the pickling does
    except Exception as exc:
        raise _unpicklable(content, "arguments", exc) from exc
    if isinstance(pickled, Pieces):
        pickled.freeze()
    return kind, pickled


def dump_setup(setup: WorkerSetup) -> bytes:
    """Pickle a ``WorkerSetup``.

    Raises:
        UnpicklableError: The initializer or its arguments cannot be pickled.
    """
    try:
        return dump(setup)
    except Exception as exc:
        reason = f"{type(exc).__name__}: {exc}"
        if isinstance(exc, RuntimeError):  # of multiprocessing's queues and locks
            reason += "; those of a multiprocessing.Manager() can travel"
        raise UnpicklableError("initializer", shortened(setup.initializer), reason) from exc  # noqa: EM101 - a field, no message


def _unpicklable(value: object, what: str, error: Exception) -> UnpicklableError:
    return UnpicklableError(what, shortened(value), f"{type(error).__name__}: {error}")
