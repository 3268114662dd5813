"""A task on its way: what the parent knows of it until its future gets an end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from concurrent.futures import Future

    from shpool.engines.base import Task
    from shpool.engines.messages import Kind
    from shpool.pickling import Pieces


class PackedFunction(NamedTuple):
    """A function as it travels."""

    key: bytes
    pickled: bytes


@dataclass(eq=False)
class Flight:
    """A task under way: pickled, numbered, and with its attempts so far."""

    task: Task
    number: int
    function: PackedFunction
    kind: Kind
    payload: bytes | Pieces
    future: Future[Any]
    history: list[str] = field(default_factory=list)  # a line for each attempt that failed
    results: list[Any] = field(default_factory=list)  # of a batch, as far as they have come
    errors: dict[int, BaseException] = field(default_factory=dict)  # likewise, by index
    is_spoiled: bool = False  # some of them could not be unpickled: what comes after those counts no more
    seconds: float = 0.0  # these have taken
    size: int = field(init=False)  # bytes of the arguments and of these
    is_running: bool = False
    is_unwanted: bool = False  # terminate() was called for it
    was_unread: bool = False
    ends_at: int = 0  # of all bytes ever put for its worker

    def __post_init__(self) -> None:
        self.size = len(self.payload) if isinstance(self.payload, bytes) else self.payload.size
