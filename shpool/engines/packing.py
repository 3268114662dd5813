"""Functions and arguments, pickled for a worker once and for all."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

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
    pickled = _packed("function", fn)
    return PackedFunction(hashlib.blake2b(pickled, digest_size=16).digest(), pickled)


def pack_arguments(task: Task) -> tuple[Kind, bytes]:
    """Pickle a task's arguments; return them with the kind of message that carries them.

    Raises:
        UnpicklableError: They cannot be pickled.
    """
    if task.batch:
        return (Kind.BATCH_STAR if task.star else Kind.BATCH), _packed("arguments", task.args)
    return Kind.CALL, _packed("arguments", (task.args, task.kwargs))


def _packed(what: str, value: object) -> bytes:
    try:
        return dump(value)
    except Exception as exc:
        raise UnpicklableError(what, shortened(value), f"{type(exc).__name__}: {exc}") from exc
