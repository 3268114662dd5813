"""Functions and arguments, pickled for a worker once and for all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from shpool.engines.member import PackedFunction
from shpool.engines.serve import Kind
from shpool.errors import UnpicklableError
from shpool.worker import dump, shortened

if TYPE_CHECKING:
    from collections.abc import Callable

    from shpool.engines.base import Task


def pack_function(fn: Callable[..., Any]) -> PackedFunction:
    """Pickle a function.

    Raises:
        UnpicklableError: It cannot be pickled.
    """
    try:
        pickled = dump(fn)
    except Exception as exc:
        raise _unpicklable(fn, "function", exc) from exc
    import hashlib  # here: the workers need not wait for it to be loaded

    return PackedFunction(hashlib.blake2b(pickled, digest_size=16).digest(), pickled)


def pack_arguments(task: Task) -> tuple[Kind, bytes]:
    """Pickle a task's arguments; return them with the kind of message that carries them.

    Raises:
        UnpicklableError: They cannot be pickled.
    """
    kind, content = Kind.CALL, cast("object", (task.args, task.kwargs))
    if task.batch:
        kind, content = (Kind.BATCH_STAR if task.star else Kind.BATCH), task.args
    try:
        return kind, dump(content)  # here, as a call more costs what a tenth of the pickling does
    except Exception as exc:
        raise _unpicklable(content, "arguments", exc) from exc


def _unpicklable(value: object, what: str, error: Exception) -> UnpicklableError:
    return UnpicklableError(what, shortened(value), f"{type(error).__name__}: {error}")
