"""A call and its answer as they travel through a cluster, which looks into neither."""

from __future__ import annotations

import pickle
from typing import NamedTuple


class Call:
    """A call, or a batch of them, as it travels: no cluster looks into it or prints its arguments.

    Attributes:
        pool: Id of the pool.
        number: Of the launch; a further attempt has another.
        kind: CALL, BATCH or BATCH_STAR.
        key: The function's digest.
        function: The pickled function; empty where the worker is thought to have it.
        payload: The pickled arguments.
        is_timed: The worker is to tell when it begins.
    """

    __slots__ = ("function", "is_timed", "key", "kind", "number", "payload", "pool")

    def __init__(  # noqa: PLR0913, PLR0917 - a record
        self,
        pool: str,
        number: int,
        kind: int,
        key: bytes,
        function: bytes,
        payload: bytes,
        is_timed: bool,  # noqa: FBT001 - as above
    ) -> None:
        self.pool = pool
        self.number = number
        self.kind = kind
        self.key = key
        self.function = function
        self.payload = payload
        self.is_timed = is_timed

    def __reduce__(self) -> tuple[object, ...]:
        fields = (self.pool, self.number, self.kind, self.key, self.function, self.payload, self.is_timed)
        return Call, fields

    def __repr__(self) -> str:
        return f"<Call {self.number}>"


class Answer(NamedTuple):
    """What became of a call.

    Attributes:
        kind: RESULT, ERROR, UNFIT (the initializer failed) or FUNCTION (the worker lacks it).
        seconds: Time the call took.
        pid: The worker's process id.
        payload: The pickled result or error.
        records: Log records, packed.
    """

    kind: int
    seconds: float
    pid: int
    payload: bytes = b""
    records: tuple[bytes, ...] = ()

    def to_bytes(self) -> bytes:
        """Return the answer as it travels."""
        return pickle.dumps(tuple(self), protocol=5)

    @classmethod
    def from_bytes(cls, data: bytes) -> Answer:
        """Read what ``to_bytes`` wrote."""
        return cls(*pickle.loads(data))
