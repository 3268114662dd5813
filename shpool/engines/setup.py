"""How workers begin. Apart from ``base``, since each worker imports it and nothing else of that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class WorkerSetup:
    """How each worker begins.

    Attributes:
        initializer: Called once in each worker, after its session is there.
        initargs: Arguments for it.
        env: Environment variables of the workers, set before anything is imported there.
        log_level: Least level of the log records that go to the parent; None for none.
        max_tasks: Calls after which a worker is replaced; None for no limit.
        max_memory: Bytes of resident memory beyond which a worker is replaced between two tasks; None for no limit.
    """

    initializer: Callable[..., object] | None = None
    initargs: tuple[Any, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    log_level: int | None = None
    max_tasks: int | None = None
    max_memory: int | None = None
