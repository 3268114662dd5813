"""The INPUT of downloads: files, each known to be possible before the first is fetched."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from typing import TYPE_CHECKING

from shpool.errors import InputError, InsecureUrlError, TargetPathError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from shpool.downloads import DownloadItem, PlannedItem
    from shpool.jobs import Job
    from shpool_cli.inputs import Call, Input

_FIELDS = "a URL, or a record with url and, where known, path, size, sha256, md5"
_ITEM = "item"  # in an error until the input knows the line


class Files:
    """The files of an input.

    Args:
        source: The input.
        target: What the journal calls these downloads.

    Attributes:
        count: How many they are, once checked.
        total: Bytes they have in all, each file counted once; 0 where that is not known.
    """

    def __init__(self, source: Input, target: str) -> None:
        self._source = source
        self._target = target
        self.count = 0
        self.total = 0
        self._open_hosts: set[str] = set()  # that are to be asked over an unencrypted connection
        self._copies = array("Q")  # 16 bytes for each line that repeats another, and nothing for the others
        self._first_and_copy = array("Q")  # 32 bits each, so that those of one file stand together

    def check(self) -> None:
        """Read everything.

        Raises:
            InputError: A line is no file to fetch, or another line has its path and is not equal.
        """
        from shpool.downloads import Planner
        from shpool.origins import host_of, is_secure_url

        planner, index, sized, total = Planner(), 0, 0, 0
        first_and_copy = array("Q")

        def fits(call: Call) -> None:
            nonlocal index, sized, total
            try:
                first, item, _ = planner.plan(index, item_of(call))
            except TargetPathError as exc:
                reason, _, hint = str(exc).rpartition("; ")
                raise InputError(_ITEM, reason, hint) from None
            if not item.url.startswith("https:") and not is_secure_url(item.url):
                self._open_hosts.add(host_of(item.url))
            sized += item.size is not None
            if first == index:
                total += item.size or 0
            else:
                self._copies.append(index)
                first_and_copy.append(first << 32 | index)
            index += 1

        self.count = self._source.check(each=fits)
        self.total = total if sized == self.count else 0
        self._first_and_copy = array("Q", sorted(first_and_copy))

    def check_connections(self, allowed_hosts: Sequence[str]) -> None:
        """Refuse files that the token would have to travel to unencrypted: each of them would fail.

        Args:
            allowed_hosts: The session's: hosts that may be sent the token, empty for all; others are asked without.

        Raises:
            InputError: There is such a file; the first one's line.
        """
        from shpool.origins import host_of, is_secure_url

        hosts = {host for host in self._open_hosts if not allowed_hosts or host in allowed_hosts}

        def is_safe(call: Call) -> None:
            url = item_of(call).url
            if host_of(url) in hosts and not is_secure_url(url):
                reason, _, hint = str(InsecureUrlError(host_of(url))).rpartition("; ")
                raise InputError(_ITEM, reason, hint)

        if hosts:
            self._source.check(each=is_safe)

    def is_copy(self, index: int) -> bool:
        """Tell whether an earlier line names the same file."""
        place = bisect_left(self._copies, index)
        return place < len(self._copies) and self._copies[place] == index

    def copies_of(self, index: int) -> Iterator[int]:
        """Yield the indexes of later lines that name the same file."""
        pairs, least = self._first_and_copy, index << 32
        for place in range(bisect_left(pairs, least), len(pairs)):
            copy = pairs[place] - least
            if copy >> 32:
                return
            yield copy

    def planned(self) -> Iterator[tuple[Job, PlannedItem]]:
        """Yield each file and its job, in the order of the input."""
        from shpool.downloads import PlannedItem
        from shpool.downloads.filenames import planned_path

        for index, call in enumerate(self._source.calls()):
            item = item_of(call)
            yield self._job(index, item), PlannedItem(index, item, planned_path(item.url, item.path))

    def jobs(self) -> Iterator[Job]:
        """Yield the jobs alone."""
        for index, call in enumerate(self._source.calls()):
            yield self._job(index, item_of(call))

    def _job(self, index: int, item: DownloadItem) -> Job:
        from shpool.jobs import Job, job_key
        from shpool.origins import shown_url

        # A URL may be signed: what the journal shows of it has no secrets.
        return Job(index, job_key(self._target, item, {}), (shown_url(item.url), *item[1:]))


def item_of(call: Call) -> DownloadItem:
    """Return the file that a line of an input names.

    Raises:
        InputError: It names none.
    """
    from shpool.downloads import as_item

    args, kwargs = call
    if kwargs:
        return as_item(kwargs)
    if len(args) == 1 and isinstance(args[0], str):
        return as_item(args[0].strip())
    raise InputError(_ITEM, "it names no file", f"give {_FIELDS}")
