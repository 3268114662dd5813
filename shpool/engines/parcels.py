"""The token on its way to other hosts, and where it lies there.

1. The parent seals it into a ``Parcel`` with a number; a cell takes no parcel older than the one it holds.
2. A parcel tells how long the token lives, not until when: another host has another boot clock. The time counts from
the arrival, or, once the outpost has asked and the answer says which question it answers, from the question: what
the network took then shortens the token's life here, and never lengthens it.
3. Nothing that holds a token shows it: not in a repr, hence not in a cluster's logs.
4. A cell holds no token that has ended, only when that was: its readers are to hear why they get none.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from shpool.board import CLOSED
from shpool.tokens import SYSTEM_CLOCK, Posting, boot_time

if TYPE_CHECKING:
    from collections.abc import Callable

_ASK_PAUSE = 0.5  # s between two questions for a token


@dataclass(frozen=True, repr=False)
class Parcel:
    """A posting on its way to another host.

    Attributes:
        number: Of the posting, from 1.
        payload: The posting as bytes; empty once sharing has ended.
        remaining: Seconds the token had when it was sealed.
        sealed: When that was, by the sender's boot clock.
        asked: When the receiver asked for it, by its own boot clock; None for one that comes unasked.
    """

    number: int
    payload: bytes
    remaining: float
    sealed: float
    asked: float | None = None

    @classmethod
    def of(cls, posting: Posting, number: int) -> Parcel:
        """Seal a posting."""
        now = SYSTEM_CLOCK.now()
        remaining = 0.0 if posting.token is None else posting.token.remaining(now)
        return cls(number, posting.to_bytes(), remaining, now.boot)

    def resealed(self, asked: float | None = None) -> Parcel:
        """Return the same for another departure, from the process that sealed it: time has passed."""
        now = boot_time()
        return replace(self, remaining=self.remaining - (now - self.sealed), sealed=now, asked=asked)

    def __repr__(self) -> str:
        return f"<Parcel {self.number}>"


class TokenCell:
    """A token in the memory of a process far from the parent: a ``TokenReader`` that parcels are put into.

    Args:
        ask: Asks the parent for a parcel, given this host's boot clock; must not wait for it.
    """

    def __init__(self, ask: Callable[[float], object] = lambda _: None) -> None:
        self._ask = ask
        self._lock = threading.Lock()  # guards what follows
        self.version_word = [0]
        self._payload = b""
        self._is_wiped = True  # no token is in the payload
        self._deadline = math.inf
        self._offset = -math.inf  # this host's boot clock less the parent's, at least
        self._asked = -math.inf

    def take(self, parcel: Parcel) -> None:
        """Put a parcel in, unless a newer one is there."""
        with self._lock:
            here = boot_time()
            if parcel.asked is not None:
                self._offset = max(self._offset, parcel.asked - parcel.sealed)
            if self._offset > -math.inf:
                here = min(here, parcel.sealed + self._offset)
            if not self.version_word[0] <= parcel.number < CLOSED:
                return
            posting = Posting.from_bytes(parcel.payload)
            if posting.token is not None:
                posting = replace(posting, token=replace(posting.token, deadline=here + parcel.remaining))
            self._deadline = math.inf if posting.token is None else posting.token.deadline
            self._payload = posting.to_bytes()
            self._is_wiped = posting.token is None
            self.version_word[0] = parcel.number
            self._wipe(boot_time())

    def read(self) -> tuple[int, bytes]:
        """Return the newest parcel's number and posting; asks for another where this one is of no use."""
        with self._lock:
            now = boot_time()
            self._wipe(now)
            version, payload = self.version_word[0], self._payload
            is_wanted = version != CLOSED and (not version or now >= self._deadline) and now - self._asked > _ASK_PAUSE
            if is_wanted:
                self._asked = now
        if is_wanted:
            self._ask(now)
        return version, payload

    def wipe(self) -> float:
        """Forget the token if it has ended; return the seconds until it does, negative since, -inf without any."""
        with self._lock:
            now = boot_time()
            self._wipe(now)
            return -math.inf if self._deadline == math.inf else self._deadline - now

    def _wipe(self, now: float) -> None:
        if not self._is_wiped and now >= self._deadline:
            posting = Posting.from_bytes(self._payload)
            token = posting.token and replace(posting.token, access_token="", extra={})
            self._payload, self._is_wiped = replace(posting, token=token).to_bytes(), True

    def close(self) -> None:
        """Tell readers that sharing has ended, and forget the token."""
        with self._lock:
            self.version_word[0], self._payload = CLOSED, b""
            self._is_wiped, self._deadline = True, math.inf
