"""How many files a worker is handed at a time.

A group is sized by what the last ones took: a worker is to be busy with it for half a second, in a long run for two.
Less and it would idle between groups, more and others' results would be late. Where each result is told as it is there,
and files that are not begun can be had back, only the memory they take speaks against large groups: at each end of one
the worker's connections fall idle, one after the other, and then it waits for the disk.
"""

from __future__ import annotations

from dataclasses import dataclass

_LONGEST_GROUP = 4096  # files; where nobody listens, their results wait for each other
_GROUP_SECONDS = (0.5, 2.0)  # s a worker should be busy with a group: at first, and later on at most
_HEARD_SECONDS = (4.0, 10.0)  # s, where results are told on the way: what an end costs is then lost in it
_HEARD_ROUNDS = 4  # times a worker's transfers: the second group, where results are told on the way
_GROUP_SHARE = 0.1  # of the time that workers have been busy so far, between these
GROUPS_PER_WORKER = 2  # one running, one waiting


@dataclass
class GroupSizer:
    """Say how many files make a group, from how long the last groups took.

    Attributes:
        smallest: Files in a group at least, but at the end of the input: as many as a worker transfers at once. So
            many has the first.
        workers: How many there are.
        is_heard: Results come on the way, and what is not begun can be had back.
    """

    smallest: int
    workers: int = 1
    is_heard: bool = False
    _size: int = 0
    _busy: float = 0.0  # s, all workers' together

    def next_size(self, left: int | None = None) -> int:
        """Return how many files the next group has.

        Args:
            left: How many there are to come, where that is known.
        """
        size = min(max(self._size or self._unlearned, self.smallest), _LONGEST_GROUP)
        if left is None:
            return size
        # A worker's share of the last files goes to it at once, as far as it has connections for them.
        share = min(-(-left // self.workers), self.smallest)
        return max(min(size, max(left // (self.workers * self._parts), share)), 1)

    def learn(self, files: int, seconds: float) -> None:
        """Take note of a finished group.

        Args:
            files: How many it had.
            seconds: How long a worker was busy with it.
        """
        self._busy += seconds
        if files < self.smallest:
            return  # the end of the input tells nothing
        shortest, longest = _HEARD_SECONDS if self.is_heard else _GROUP_SECONDS
        ideal = files * min(max(self._busy * _GROUP_SHARE, shortest), longest) / max(seconds, 1e-3)
        former = max(self._size or self._unlearned, self.smallest)
        self._size = int(min(max(ideal, former / 4), former * 4))

    @property
    def _unlearned(self) -> int:
        """How many files a group has before one has ended."""
        return self.smallest * (_HEARD_ROUNDS if self.is_heard else 1)

    @property
    def _parts(self) -> int:
        """How many groups a worker's share of what is left makes; what one has too much can be had back."""
        return 1 if self.is_heard else GROUPS_PER_WORKER
