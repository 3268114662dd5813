"""The INPUT of downloads: files, each known to be possible before the first is fetched."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shpool.errors import InputError, TargetPathError

if TYPE_CHECKING:
    from collections.abc import Iterator

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
        total: Bytes they have in all; 0 where that is not known.
    """

    def __init__(self, source: Input, target: str) -> None:
        self._source = source
        self._target = target
        self.count = 0
        self.total = 0

    def check(self) -> None:
        """Read everything.

        Raises:
            InputError: A line is no file to fetch, or another line has its path.
        """
        from shpool.downloads import Planner

        planner, sized, total = Planner(), 0, 0

        def fits(call: Call) -> None:
            nonlocal sized, total
            try:
                size = planner.plan(0, item_of(call)).item.size
            except TargetPathError as exc:
                reason, _, hint = str(exc).rpartition("; ")
                raise InputError(_ITEM, reason, hint) from None
            sized += size is not None
            total += size or 0

        self.count = self._source.check(each=fits)
        self.total = total if sized == self.count else 0

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
