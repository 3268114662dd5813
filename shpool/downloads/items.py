"""What is to be downloaded, how, and what became of it; and where each file goes."""

from __future__ import annotations

import contextlib
import json
import operator
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


_LARGEST = 2**63 - 1  # bytes; no file system has a file with more
_LONGEST_SHOWN = 60  # characters of a value in an error


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
    """An item with its place in the input and below the folder.

    Attributes:
        number: Its position in the input, from 0; of one that is equal to an earlier one, that one's.
        item: The item.
        path: Where it goes; None while only the server's answer can tell.
    """

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
        reserved: Files that none of them may replace, as for ``Folder``.
    """

    folder: str
    curl: CurlOptions = field(default_factory=CurlOptions)
    retries: int = 3
    timeout: float | None = None
    overwrite: bool = False
    durable: bool = True
    backoff: Backoff = Backoff(base=0.5, cap=30.0)  # noqa: RUF009 - frozen
    authenticated: bool = True
    reserved: tuple[str, ...] = ()


class Planner:
    """Say where each item goes, know equal ones again, and refuse others with the same path. One for each run.

    A class for its memory of paths.
    """

    def __init__(self) -> None:
        self._seen = SeenPaths()

    def plan(self, index: int, item: str | Mapping[str, Any] | DownloadItem) -> PlannedItem:
        """Return an item with its place.

        Raises:
            InputError: It is no URL, or has unknown or impossible fields.
            TargetPathError: Its path leaves the folder, or an item that is not equal has it.
        """
        checked = as_item(item, where=f"item {index + 1}")
        path = planned_path(checked.url, checked.path)
        # Without a name of its own an unfinished file stands under its URL's digest, which must not come twice either.
        first = self._seen.take(path if path is not None else f"/{url_digest(checked.url)}", checked, index)
        if first is None:
            raise refuse_duplicate(checked.url, path if path is not None else "the same URL")
        return PlannedItem(first, checked, path)


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
        if not _FIELDS.issuperset(item) or not item.get("url"):
            unknown = sorted(str(name) for name in item if name not in _FIELDS)
            reason = f"unknown field {unknown[0]!r}" if unknown else "it has no url"
            raise InputError(where, reason, "fields are url, and where known path, size, sha256, md5")
        item = DownloadItem._make(None if (value := item.get(name)) == "" else value for name in DownloadItem._fields)
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
    _, path, size, sha256, md5 = item
    if path is not None and not isinstance(path, str):
        raise InputError(where, f"path {_shown(path)} is no text", "give a path below the folder, or none")
    return DownloadItem(
        item.url,
        path,
        None if size is None else _checked_size(size, where),
        None if sha256 is None else _checked_sum("sha256", sha256, where),
        None if md5 is None else _checked_sum("md5", md5, where),
    )


def _checked_size(size: object, where: str) -> int:
    """Return a number of bytes: whole, as a number or, as CSV has it, in digits."""
    number: int | None = None
    if isinstance(size, str):
        digits = size.strip()
        if digits.isascii() and digits.isdigit() and len(digits) <= len(str(_LARGEST)):
            number = int(digits)
    elif isinstance(size, float):
        number = int(size) if size.is_integer() else None  # tables that have gaps hold whole numbers so
    elif not isinstance(size, bool):
        with contextlib.suppress(TypeError):
            number = operator.index(size)  # type: ignore[arg-type]  # NumPy's numbers, too; others raise TypeError
    if number is None or not 0 <= number <= _LARGEST:
        hint = "give it in bytes, as a whole number from 0, or leave it out"
        raise InputError(where, f"size {_shown(size)} is no number of bytes", hint)
    return number


def _checked_sum(algorithm: str, text: object, where: str) -> str:
    hint = "give it in hex digits, or leave it out"
    if not isinstance(text, str):
        raise InputError(where, f"{algorithm} {_shown(text)} is no text", hint)
    try:
        return checked_digest(algorithm, text)
    except ValueError as exc:
        raise InputError(where, str(exc), hint) from None


def _shown(value: object) -> str:
    """Return a value as it stands in JSON, where it does, and not all of a long one."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):  # a number may have too many digits for a text
        text = f"of type {type(value).__name__}"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


_FIELDS = frozenset(DownloadItem._fields)
