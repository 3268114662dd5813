"""What differs between Dask and Ray: where calls run, and by what means tokens reach them."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Protocol

from shpool.engines.parcels import Parcel, TokenCell

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shpool.engines.sealed import Call
    from shpool.tokens import Posting


class Lost(Exception):  # noqa: N818 - how a call ended, not an error anybody raises
    """The worker that ran a call is gone, and the call with it.

    Args:
        pid: The worker's process id, 0 when unknown.
        exitcode: Its exit code, None when unknown.
    """

    def __init__(self, pid: int = 0, exitcode: int | None = None) -> None:
        super().__init__(pid, exitcode)
        self.pid = pid
        self.exitcode = exitcode


class Unbegun(Exception):  # noqa: N818 - as above
    """A call did not begin, and no other will come of this launch; it may go again."""


class Events(Protocol):
    """What a cluster tells the engine: from any thread, and none of it waits."""

    def ended(self, number: int, outcome: bytes | BaseException) -> None:
        """A call has ended: with the outpost's answer, ``Lost``, ``Unbegun``, or an error of the cluster."""

    def begun(self, number: int) -> None:
        """A timed call has begun."""

    def refused(self, generation: int) -> None:
        """A worker's server has refused this generation of the token."""

    def changed(self) -> None:
        """There is more or less room than before."""

    def lost_worker(self, pid: int, detail: str = "") -> None:
        """A worker that this pool uses is gone unexpectedly."""

    def joined(self, outpost: str) -> None:
        """There is an outpost, known to the cluster by that name; may be told repeatedly."""

    def asked(self, outpost: str, note: bytes) -> None:
        """An outpost has a note for the gate."""

    def left(self, outpost: str) -> None:
        """An outpost is gone; a cluster that does not know tells nothing."""

    def failed(self, error: Exception) -> None:
        """The cluster is gone for good."""


class Cluster(Protocol):
    """Where calls run. All but ``push``, ``post`` and ``capacity`` is called from one thread at a time.

    Attributes:
        tells_begin: It tells when timed calls begin; else their time counts from the launch.
    """

    tells_begin: bool

    def open(self, pool: str, setup: bytes, events: Events) -> None:
        """Connect, and prepare to hold an ``Outpost`` of this pool in each worker process that there is or will be.

        Raises:
            ClusterError: It cannot be used; after 10 s at most.
        """

    @property
    def capacity(self) -> int:
        """How many calls can run at once now."""

    def launch(self, calls: Sequence[Call]) -> None:
        """Send calls to run; each is told of by ``ended``, once."""

    def cancel(self, numbers: Sequence[int]) -> None:
        """Drop calls, for which nobody waits any more; one that has begun may run on."""

    def stop(self, number: int) -> bool:
        """Kill what runs a call, unless others would be harmed. Tell whether ``Lost`` will come of it."""

    def push(self, parcel: Parcel) -> None:
        """Bring a parcel to every outpost there is, and keep it for those to come; must not wait for them."""

    def post(self, outpost: str | None, note: bytes) -> None:
        """Bring a note to the gate of one outpost, or of all there are; must not wait, and may fail in silence."""

    def close(self) -> None:
        """Leave the cluster as it was found, outposts closed; harmless when repeated, or when never opened."""


class RemoteChannel:
    """Publish to a cluster; the parent's own readers have a cell here."""

    report_poll = math.inf

    def __init__(self, push: Callable[[Parcel], None]) -> None:
        self._push = push
        self._numbers = itertools.count(1)
        self._cell = TokenCell()

    def publish(self, posting: Posting) -> None:
        """Show a posting to all readers."""
        parcel = Parcel.of(posting, next(self._numbers))
        self._cell.take(parcel)
        self._push(parcel)

    def newest_report(self) -> int:
        """Return 0: reports come by the cluster's own means."""
        return 0

    def reader(self) -> TokenCell:
        """Return a view for this process."""
        return self._cell

    def close(self) -> None:
        """End sharing; the outposts are closed with the cluster."""
        self._cell.close()
