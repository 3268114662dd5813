"""Items given more than once: fetched once, and reported each time.

The rules:

 1. An item that is equal to an earlier one in all fields is a copy of it. Others with the same path are refused.
 2. A copy has the result of the first, with nothing more asked or received. It comes with the first's, or at once
    where that has come already.
 3. Results that were handed on are not kept: a million would fill the memory. A number for each item holds status and
    bytes, which is all that a file with a planned path needs. Of failures, and of files that the server named, the last
    ones are kept; a copy of an older one is fetched like any other item.
"""

from __future__ import annotations

import os
from array import array
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from shpool.downloads.groups import unfetched
from shpool.downloads.items import DownloadResult, PlannedItem, Planner, as_item
from shpool.errors import TargetPathError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from shpool.downloads.items import DownloadItem

_MOST_KEPT = 10_000  # results; some 5 MB
_UNDER_WAY, _UNNAMED = -1, -2  # in place of status and bytes: no result yet; and the server will say the name
_STATUSES: tuple[tuple[Literal["done", "skipped", "failed"], bool], ...] = (
    ("failed", False),
    ("done", False),
    ("skipped", False),
    ("skipped", True),  # by size alone
)
_KEPT = 0  # status and bytes of what is not told by them: see the kept results


class Copies:
    """Plan items and hand on their results, those of copies among them. One for each run.

    A class for its memory of both.

    Args:
        folder: Where the files go.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._planner = Planner()
        self._ended = array("q")  # by index: bytes and status
        self._waiting: dict[int, list[int]] = {}  # copies of those that are under way
        self._kept: dict[int, DownloadResult] = {}

    def planned(
        self, items: Iterable[str | Mapping[str, Any] | DownloadItem]
    ) -> Iterator[PlannedItem | DownloadResult]:
        """Yield each item to fetch with its place, and the results of those that need not or cannot be fetched."""
        for index, item in enumerate(items):
            try:
                planned = self._planner.plan(index, item)
            except TargetPathError as exc:
                self._ended.append(_KEPT)
                yield unfetched(index, as_item(item).url, exc)
                continue
            first = planned.number
            if first == index:
                self._ended.append(_UNNAMED if planned.path is None else _UNDER_WAY)
                yield planned
                continue
            self._ended.append(_KEPT)
            if self._ended[first] < 0:
                self._waiting.setdefault(first, []).append(index)
            else:
                yield self._result_of(planned, index) or planned._replace(number=index)

    def told(self, results: Iterable[DownloadResult]) -> Iterator[DownloadResult]:
        """Yield results, each with those of its copies so far."""
        for result in results:
            if self._ended[result.index] < 0:
                self._note(result)
            yield result
            for index in self._waiting.pop(result.index, ()):
                yield _copied(result, index)

    def _note(self, result: DownloadResult) -> None:
        if result.status != "failed" and self._ended[result.index] != _UNNAMED:
            status = _STATUSES.index((result.status, result.by_size))
            self._ended[result.index] = result.bytes * len(_STATUSES) + status
            return
        self._ended[result.index] = _KEPT
        self._kept[result.index] = result
        if len(self._kept) > _MOST_KEPT:
            del self._kept[next(iter(self._kept))]

    def _result_of(self, planned: PlannedItem, index: int) -> DownloadResult | None:
        """Return the result of a copy of an item that has ended; None where that is forgotten."""
        if self._ended[planned.number] == _KEPT:
            kept = self._kept.get(planned.number)
            return None if kept is None else _copied(kept, index)
        size, status = divmod(self._ended[planned.number], len(_STATUSES))
        path = f"{os.path.realpath(self._folder)}/{planned.path}"
        word, by_size = _STATUSES[status]
        return DownloadResult(index, planned.item.url, path, word, size, 0, 0, 0.0, by_size=by_size)


def _copied(result: DownloadResult, index: int) -> DownloadResult:
    return replace(result, index=index, received=0, attempts=0, seconds=0.0)
