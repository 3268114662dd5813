"""Download files in parallel, safely: the public face of the transfer modules.

Items are planned in the parent (names, checks, ``copies``), grouped by ``groups``, and fetched in the pool's workers by
``FetchGroup``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sized
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shpool.downloads.copies import Copies
from shpool.downloads.curling import CurlOptions, load_pycurl
from shpool.downloads.descriptors import enough_for, most_transfers
from shpool.downloads.fetching import FetchGroup, close_loop
from shpool.downloads.groups import GroupRun
from shpool.downloads.items import DownloadItem, DownloadResult, FetchSettings, Planner
from shpool.downloads.sizing import GroupSizer

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

    Left early, by ``break`` or ``close()``, it begins no file any more, and what is under way and does not end within
    half a second is stopped at the cost of its worker; the parts are kept. On a cluster groups of files, of two seconds
    at most, come to their end.

    An item that is equal to an earlier one in all fields has its result, and nothing is asked for it. Of two others
    with one path the second fails.

    Args:
        pool: An ``AuthenticatedProcessPool``, or a session to open one with for as long as this takes.
        items: URLs, mappings with the fields of ``DownloadItem``, or these; lazily read.
        to: The folder; made if need be. Nothing is written outside.
        connections: Transfers at once in each worker. More than the server allows brings 429s; each needs two of the
            files that a process may have open (``ulimit -n``).
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
    if connections > most_transfers():
        msg = f"connections={connections} is more than this system's limit of open files has room for: at most "
        msg += f"{most_transfers()}; raise the limit to {enough_for(connections)} (ulimit -n), or give fewer"
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
        copies = Copies(settings.folder)
        run = stack.enter_context(
            contextlib.closing(GroupRun(executor, FetchGroup(settings), copies.planned(items), count=count))
        )
        results = copies.told(run)
        yield from _shown(results, run, count) if progress else results


def _shown(results: Iterable[DownloadResult], run: GroupRun, count: int | None) -> Iterator[DownloadResult]:
    """Yield results and show them on a bar."""
    from shpool.progress import Progress, shown_bytes

    size = 0

    def words() -> list[str]:
        return [shown_bytes(size + run.bytes_under_way)]

    with Progress(count, desc="download", unit="file", enabled=True, notes=words) as bar:
        for result in results:
            size += result.bytes
            if result.error is None:
                bar.done()
            else:
                bar.failed()
            yield result
