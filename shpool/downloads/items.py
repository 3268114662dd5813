"""What is to be downloaded, how, and what became of it; and where each file goes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from urllib.parse import urlsplit

from shpool.downloads.checksums import checked_digest
from shpool.downloads.curling import CurlOptions
from shpool.downloads.filenames import SeenPaths, is_plain_url, planned_path, refuse_duplicate, url_digest
from shpool.errors import InputError
from shpool.retry import Backoff

if TYPE_CHECKING:
    from collections.abc import Mapping


class DownloadItem(NamedTuple):
    """A file to fetch. A tuple, since a million of them travel between processes.

    Attributes:
        url: Where it is, http or https.
        path: Where it goes below the folder; None takes the name from the URL, or from the server's answer.
        size: Bytes it must have, if known.
        sha256: Its checksum in hex, if known.
        md5: The same, for servers that know no better.
    """

    url: str
    path: str | None = None
    size: int | None = None
    sha256: str | None = None
    md5: str | None = None

    @property
    def digests(self) -> tuple[tuple[str, str], ...]:
        """The checksums that are known, as pairs of algorithm and hex digest."""
        return tuple((name, text) for name, text in (("sha256", self.sha256), ("md5", self.md5)) if text is not None)


class PlannedItem(NamedTuple):
    """An item with its place in the input and below the folder."""

    number: int
    item: DownloadItem
    path: str | None


@dataclass(frozen=True)
class DownloadResult:
    """What became of a file.

    Attributes:
        index: The item's position in the input, from 0.
        url: Where it came from.
        path: The file; None where it has none.
        status: ``done``, ``skipped`` when the right file was there, or ``failed``.
        bytes: Size of the file; of a failed one, what has arrived and is kept.
        received: Bytes that were transferred for it in this run.
        attempts: Requests made, redirects apart.
        seconds: From its first request until it was safe on disk.
        error: Why it failed.
        by_size: It was skipped for its size alone: neither a checksum nor a journal says that its content is right.
    """

    index: int
    url: str
    path: str | None
    status: Literal["done", "skipped", "failed"]
    bytes: int
    received: int
    attempts: int
    seconds: float
    error: Exception | None = None
    by_size: bool = False


@dataclass(frozen=True)
class FetchSettings:
    """How files are fetched.

    Attributes:
        folder: Where they go.
        curl: What all transfers have in common.
        retries: Further attempts for a file after one without progress, or one that took too long.
        timeout: Seconds an attempt at a file may take, None for any time; waits for leave or a token do not count.
        overwrite: Fetch files that are there.
        durable: Write each to disk before it is reported.
        backoff: Waits between attempts.
        authenticated: Send the session's token.
    """

    folder: str
    curl: CurlOptions = field(default_factory=CurlOptions)
    retries: int = 3
    timeout: float | None = None
    overwrite: bool = False
    durable: bool = True
    backoff: Backoff = Backoff(base=0.5, cap=30.0)  # noqa: RUF009 - frozen
    authenticated: bool = True


class Planner:
    """Say where each item goes, and refuse two with the same path. One for each run.

    A class for its memory of paths.
    """

    def __init__(self) -> None:
        self._seen = SeenPaths()

    def plan(self, index: int, item: str | Mapping[str, Any] | DownloadItem) -> PlannedItem:
        """Return an item with its place.

        Raises:
            InputError: It is no URL, or has unknown or impossible fields.
            TargetPathError: Its path leaves the folder, or another item has it.
        """
        checked = as_item(item, where=f"item {index + 1}")
        path = planned_path(checked.url, checked.path)
        # Without a name of its own an unfinished file stands under its URL's digest, which must not come twice either.
        if not self._seen.add(path if path is not None else f"/{url_digest(checked.url)}"):
            raise refuse_duplicate(checked.url, path if path is not None else "the same URL")
        return PlannedItem(index, checked, path)


def as_item(item: str | Mapping[str, Any] | DownloadItem, where: str = "item") -> DownloadItem:
    """Return an item with its fields checked.

    Args:
        item: A URL, or a mapping with the fields of ``DownloadItem``.
        where: What to call it in an error.

    Raises:
        InputError: It is no URL, or has unknown or impossible fields.
    """
    if isinstance(item, str):
        item = DownloadItem(item)
    elif not isinstance(item, DownloadItem):
        unknown = sorted(str(name) for name in item if name not in _FIELDS)
        if unknown or not item.get("url"):
            reason = f"unknown field {unknown[0]!r}" if unknown else "it has no url"
            raise InputError(where, reason, "fields are url, and where known path, size, sha256, md5")
        item = DownloadItem(**{name: value for name, value in item.items() if value not in (None, "")})
    if not (isinstance(item.url, str) and is_plain_url(item.url)):
        _check_url(item.url, where)
    return item if item[1:] == (None, None, None, None) else _checked_fields(item, where)


def _check_url(url: str, where: str) -> None:
    hint = "give an absolute URL that begins with https:// or http://"
    try:
        parts = urlsplit(url)
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except (ValueError, TypeError, AttributeError):
        is_usable = False
    if not is_usable:
        raise InputError(where, "it is no URL to fetch", hint)
    if not url.isprintable():
        raise InputError(where, "its URL has control characters", hint)


def _checked_fields(item: DownloadItem, where: str) -> DownloadItem:
    try:
        size = None if item.size is None else int(item.size)
        sha256 = None if item.sha256 is None else checked_digest("sha256", item.sha256)
        md5 = None if item.md5 is None else checked_digest("md5", item.md5)
    except (ValueError, TypeError, AttributeError, OverflowError) as exc:
        raise InputError(where, str(exc), "size is a number of bytes, checksums are hex digits") from exc
    if (size is not None and size < 0) or not isinstance(item.path, (str, type(None))):
        raise InputError(where, f"size {item.size!r} or path {item.path!r} is none", "see the fields of DownloadItem")
    return DownloadItem(item.url, item.path, size, sha256, md5)


_FIELDS = frozenset(DownloadItem._fields)
