"""Jobs: the calls of a batch, what became of them, and the keys that name them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping


@dataclass(frozen=True)
class Job:
    """One call to make.

    Attributes:
        index: Position in the input, from 0.
        key: Names the job by its content, see ``job_key``.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    index: int
    key: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class JobResult:
    """What became of a job.

    Attributes:
        index: The job's position in the input.
        key: The job's key.
        status: ``done`` or ``failed``.
        result: What the function returned; None when it failed.
        error: What the last attempt raised; None when it is done.
        attempts: How often it was tried.
        seconds: Time the last attempt took inside its worker; where a lost worker could not tell, the
            time since it was submitted.
        worker: Id of the process that ran the last attempt; None when unknown.
    """

    index: int
    key: str
    status: Literal["done", "failed"]
    result: Any
    error: BaseException | None
    attempts: int
    seconds: float
    worker: int | None = None


_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode  # json.dumps would make one for every job


def job_key(target: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Name a job by its content: equal calls have equal keys, in every run and whatever their place in the input.

    Returns:
        16 hex digits of a sha256 over canonical JSON: a million jobs collide with a chance of 1 in 37 million.

    Raises:
        TypeError: An argument has no JSON form; give such jobs a key of your own.

    >>> job_key("tiles:fetch", (1,), {}) == job_key("tiles:fetch", (1,), {})
    True
    """
    content = _encode([target, list(args), dict(kwargs)])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def make_jobs(
    target: str, calls: Iterable[tuple[tuple[Any, ...], Mapping[str, Any]]], *, key_field: str | None = None
) -> Iterator[Job]:
    """Number the calls and give each its key, lazily.

    Args:
        target: Text that names the function for ever, such as ``package.module:function``.
        calls: Pairs of positional and keyword arguments.
        key_field: The keyword argument whose text is the key; None makes one of target and arguments.

    Raises:
        KeyError: From the iteration: a call lacks the field.
    """
    for index, (args, kwargs) in enumerate(calls):
        key = job_key(target, args, kwargs) if key_field is None else str(kwargs[key_field])
        yield Job(index, key, args, kwargs)
