"""Downloads: many files at once, each right or reported by name.

``run`` plans files, ``copies`` knows those that are given twice, and ``groups`` hands them to a pool in groups, as
large as ``sizing`` says; in a worker ``fetching`` carries one group, ``curling`` is libcurl's loop, ``incoming`` one
file on its way and ``transfer`` the decisions about it; ``partfile`` and ``press`` put it on disk, ``checksums`` and
``filenames`` say what it must be and may be called; ``items`` are the values. ``descriptors`` knows how many transfers
at once a process has room for.
"""

from __future__ import annotations

from shpool.downloads.fetching import FetchGroup
from shpool.downloads.groups import GroupRun
from shpool.downloads.items import DownloadItem, DownloadResult, FetchSettings, PlannedItem, Planner, as_item
from shpool.downloads.run import download
from shpool.downloads.sizing import GroupSizer

__all__ = [
    "DownloadItem",
    "DownloadResult",
    "FetchGroup",
    "FetchSettings",
    "GroupRun",
    "GroupSizer",
    "PlannedItem",
    "Planner",
    "as_item",
    "download",
]
