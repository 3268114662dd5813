"""Download files in parallel, safely: the public face of the transfer modules.

Items are planned in the parent (names, checks, duplicates), grouped by ``groups``, and fetched in the pool's workers by
``FetchGroup``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sized
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shpool.downloads.curling import CurlOptions, load_pycurl
from shpool.downloads.fetching import FetchGroup, close_loop
from shpool.downloads.groups import GroupRun, GroupSizer, unfetched
from shpool.downloads.items import DownloadItem, DownloadResult, FetchSettings, PlannedItem, Planner, as_item
from shpool.errors import TargetPathError

if TYPE_CHECKING:
    import os

    from shpool.sources import Session

__all__ = ["DownloadItem", "DownloadResult", "FetchGroup", "FetchSettings", "GroupSizer", "Planner", "download"]


def download(  # noqa: PLR0913 - all but three are keyword-only, each with its default
    pool: Executor | Session,
    items: Iterable[str | Mapping[str, Any] | DownloadItem],
    to: str | os.PathLike[str],
    *,
    connections: int = 8,
    retries: int = 3,
    timeout: float | None = None,
    stall_timeout: float = 120.0,
    overwrite: bool = False,
    durable: bool = True,
    authenticated: bool = True,
    ca_bundle: str | None = None,
    max_workers: int | None = None,
    progress: bool = False,
) -> Generator[DownloadResult, None, None]:
    """Fetch files into a folder and yield one result for each, as they finish; a failed file raises nothing.

    A file appears under its name only once it is complete, verified and on disk; until then it is ``NAME.part``, from
    which a later run goes on. A right file that is there is skipped: right by its checksum where one is given or the
    server sends one; else the server must have as many bytes and no later date, and the result says ``by_size``.

    Args:
        pool: An ``AuthenticatedProcessPool``, or a session to open one with for as long as this takes.
        items: URLs, mappings with the fields of ``DownloadItem``, or these; lazily read.
        to: The folder; made if need be. Nothing is written outside.
        connections: Transfers at once in each worker. More than the server allows brings 429s.
        retries: Further attempts for a file after one that brought no progress, or took too long.
        timeout: Seconds an attempt at a file may take, None for any time; the next goes on where it stood.
        stall_timeout: Seconds without a byte after which a transfer counts as broken.
        overwrite: Fetch files that are there already.
        durable: Write data and names to disk before a file is reported done.
        authenticated: Send the session's token.
        ca_bundle: File of the authorities to trust; None for the environment's, else certifi's.
        max_workers: Of the pool that is opened for a session; None for one per processor.
        progress: Show a bar, on stderr or in the notebook.

    Raises:
        MissingExtraError: pycurl is not installed: ``pip install 'shpool[download]'``.
        InputError: An item is no URL, or has unknown or impossible fields.
        ValueError: A setting is out of range.
        StorageFullError: The disk is full: after the results of what was under way.
        LoginError: The pool was opened, and the login failed.
    """
    if connections < 1 or retries < 0 or not stall_timeout > 0 or not (timeout is None or timeout > 0):
        msg = "connections must be at least 1, timeouts more than 0 seconds, and retries not negative"
        raise ValueError(msg)
    load_pycurl()
    curl = CurlOptions(connections, stall_timeout, ca_bundle)
    folder = str(Path(to).absolute())
    settings = FetchSettings(folder, curl, retries, timeout, overwrite, durable, authenticated=authenticated)
    return _run(pool, items, settings, max_workers, progress=progress)


def _run(
    pool: Executor | Session,
    items: Iterable[str | Mapping[str, Any] | DownloadItem],
    settings: FetchSettings,
    max_workers: int | None,
    *,
    progress: bool,
) -> Generator[DownloadResult, None, None]:
    with contextlib.ExitStack() as stack:
        if isinstance(pool, Executor):
            executor = pool
        else:
            from shpool.pool import AuthenticatedProcessPool

            executor = stack.enter_context(AuthenticatedProcessPool(pool, max_workers))
        stack.callback(close_loop)  # of the inline engine, which works in this thread
        count = len(items) if isinstance(items, Sized) else None
        run = stack.enter_context(
            contextlib.closing(GroupRun(executor, FetchGroup(settings), _planned(items), count=count))
        )
        if progress:
            yield from _shown(run, count)
        else:
            yield from run


def _shown(results: Iterable[DownloadResult], count: int | None) -> Iterator[DownloadResult]:
    """Yield results and show them on a bar."""
    from shpool.progress import Progress, shown_bytes

    size = 0
    with Progress(count, desc="download", unit="file", enabled=True, note=lambda: shown_bytes(size)) as bar:
        for result in results:
            size += result.bytes
            if result.error is None:
                bar.done()
            else:
                bar.failed()
            yield result


def _planned(
    items: Iterable[str | Mapping[str, Any] | DownloadItem],
) -> Iterator[PlannedItem | DownloadResult]:
    """Give each item its place; an item without one has failed."""
    planner = Planner()
    return (_placed(planner, index, item) for index, item in enumerate(items))


def _placed(planner: Planner, index: int, item: str | Mapping[str, Any] | DownloadItem) -> PlannedItem | DownloadResult:
    try:
        return planner.plan(index, item)
    except TargetPathError as exc:
        return unfetched(index, as_item(item).url, exc)
