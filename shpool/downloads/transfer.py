"""What to ask a server for one file, and what its answers mean. Pure: no network, no disk, no clock.

The rules:

 1. A part of the file that is on disk is asked to be continued (``Range``, RFC 9110 section 14.2) only with a
    validator that proves it to be of the same file (``If-Range``: a strong ETag, else the date of its last change),
    or with a checksum that will prove it in the end.
 2. A 206 continues the part only if ``Content-Range`` says so to the byte, and its ETag is the part's. A 200 is the
    file from its start, whatever was asked. A 416 with the part's own length says that the part is all of it.
 3. A file without a known checksum that stands under its name is compared with what the server says, in one request
    without a body: the bytes behind its end are asked for, on condition that the server's file is not younger
    (``If-Unmodified-Since``, RFC 9110 section 13.1.4). A 416 with the same length says that it is whole, by its size
    alone; a 412 or another length that it is not. A checksum the server states with a 200 is compared with the file.
 4. The size stated by the answer must be the size that was given.
 5. A page in HTML, or an error in JSON, XML or plain words, is not data, unless the file is to be one or the size or a
    checksum that was given will tell. What a file is to be, the suffix of its name says; plain words are looked at, as
    many servers call text what they do not know.
 6. Failures in a row without progress are counted; a megabyte of progress forgets them. Waits that the server asks
    for are counted apart, and so are attempts that took too long, which no progress makes forgotten.
"""

from __future__ import annotations

import os.path
import re
from dataclasses import dataclass
from email.utils import formatdate, mktime_tz, parsedate_tz
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urljoin

from shpool.bearer import lacks_scope
from shpool.downloads.checksums import sent_digests
from shpool.errors import ContentError, DownloadError, TransferError
from shpool.origins import host_of, is_loopback_host, shown_url
from shpool.retry import is_temporary_status, parse_retry_after

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from shpool.retry import RetryAfterUnit

LONGEST_PAUSE = 120.0  # s; a server that asks for more gets the file reported as failed, as in the HTTP client
MOST_REDIRECTS = 10
_PROGRESS = 1 << 20  # bytes that make failures before them forgotten
_PAUSES = 20  # waits in a row that a server may ask for
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_OK, _PARTIAL, _UNAUTHORIZED, _PRECONDITION_FAILED, _NOT_SATISFIABLE = 200, 206, 401, 412, 416
_ASKS_TO_WAIT = (429, 503)
_CONTENT_RANGE = re.compile(r"bytes\s+(?:(\d{1,18})-(\d{1,18})|\*)/(\d{1,18}|\*)", re.IGNORECASE)
_HTML = frozenset({"text/html", "application/xhtml+xml"})
_HTML_SUFFIXES = frozenset({".html", ".htm", ".xhtml"})
_PROBLEM = frozenset({"application/problem+json", "application/problem+xml"})
_WORDS = frozenset({"application/json", "application/xml", "text/xml"})
_JSON_SUFFIXES = frozenset({".json", ".geojson", ".jsonl", ".ndjson", ".topojson", ""})
# Of files that are never text: images and rasters, arrays, tables, point clouds, archives. A product in the SAFE format
# is a zip where it comes as one file, whatever it is called; its manifest.safe is XML.
_BINARY_SUFFIXES = frozenset(
    {
        *(".tif", ".tiff", ".jp2", ".j2k", ".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".cog", ".ecw", ".sid"),
        *(".nc", ".nc4", ".cdf", ".h5", ".hdf", ".hdf5", ".he5", ".grib", ".grib2", ".grb", ".grb2", ".bufr", ".n1"),
        *(".zip", ".safe", ".sen3", ".seosp", ".kmz", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".tar", ".rar"),
        *(".parquet", ".feather", ".arrow", ".npy", ".npz", ".pkl", ".gpkg", ".sqlite", ".mbtiles", ".pmtiles", ".fgb"),
        *(".shp", ".shx", ".dbf", ".las", ".laz", ".copc", ".pdf", ".mp4", ".avi", ".mov", ".mp3", ".wav", ".whl"),
    }
)
_SNIFFED = 512  # bytes at the beginning of a file that tell text from other things
_CONTROLS = bytes(set(range(32)) - set(b"\t\n\f\r\x1b"))  # what no text has, as file(1) has it


class Wanted(NamedTuple):
    """What is known of a file before anything is asked.

    Attributes:
        url: Where it is.
        name: What it will be called, as far as that is known; its suffix says what is expected.
        size: Bytes, or None.
        digests: Pairs of algorithm and hex digest that were given.
    """

    url: str
    name: str = ""
    size: int | None = None
    digests: Sequence[tuple[str, str]] = ()


class Standing(NamedTuple):
    """What is on disk of a file.

    Attributes:
        size: Bytes that have arrived.
        validator: ``ETag`` or ``Last-Modified`` that came with them; empty for none.
        written: Of a file under its name, when that was, in seconds since the epoch; None for a part.
    """

    size: int = 0
    validator: str = ""
    written: float | None = None


NOTHING = Standing()


class Answer(NamedTuple):
    """The head of an answer; names of fields are lower case."""

    status: int
    fields: Mapping[str, str]


class Receive(NamedTuple):
    """The body is the file from ``offset`` on.

    Attributes:
        offset: Where its first byte belongs; 0 throws away what is there.
        total: Size of the whole file, or None.
        validator: Proves a later part to be of the same file; empty for none.
        digests: Checksums that the server states.
    """

    offset: int
    total: int | None
    validator: str
    digests: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Whole:
    """What is on disk is all of it."""


@dataclass(frozen=True)
class StartOver:
    """What is on disk is of no use: throw it away and ask for everything.

    Attributes:
        reason: Why.
        is_free: Nothing went wrong, it was only a look: no attempt of the file's.
    """

    reason: str
    is_free: bool = False


@dataclass(frozen=True)
class Redirect:
    """Ask there."""

    url: str


@dataclass(frozen=True)
class Refused:
    """The token was refused, and a newer one may do."""

    error: DownloadError


@dataclass(frozen=True)
class Failure:
    """Not this time, or never.

    Attributes:
        error: What to report when this was the last attempt.
        is_final: No further attempt will help.
        pause: Seconds the server asked to wait, or None.
    """

    error: DownloadError
    is_final: bool = False
    pause: float | None = None


Verdict = Receive | Whole | StartOver | Redirect | Refused | Failure


def can_continue(wanted: Wanted, standing: Standing) -> bool:
    """Tell whether the part on disk is worth asking for the rest (rule 1)."""
    if standing.size == 0 or (wanted.size is not None and standing.size > wanted.size):
        return False
    return bool(standing.validator or wanted.digests)


class Ask(NamedTuple):
    """One request.

    Attributes:
        wanted: The file it is for.
        standing: What it asks to continue; ``NOTHING`` for all of the file.
        url: What is asked: the file's URL, or where redirects have led.
        unit: What a number in ``Retry-After`` counts there.
    """

    wanted: Wanted
    standing: Standing
    url: str
    unit: RetryAfterUnit = "s"

    def fields(self) -> list[str]:
        """Return the header fields that ask for what follows the bytes on disk."""
        if not self.standing.size:
            return []
        fields = [f"Range: bytes={self.standing.size}-"]
        if self.standing.validator:
            fields.append(f"If-Range: {self.standing.validator}")
        if self.standing.written is not None:
            fields.append(f"If-Unmodified-Since: {formatdate(int(self.standing.written), usegmt=True)}")
        return fields


def judge(answer: Answer, ask: Ask, now: float) -> Verdict:
    """Say what an answer means.

    Args:
        answer: Its head.
        ask: The request.
        now: Wall clock, for dates in ``Retry-After``.
    """
    if answer.status == _OK:
        return _judge_whole(answer, ask.wanted)
    if answer.status == _PARTIAL:
        return _judge_part(answer, ask.wanted, ask.standing)
    if answer.status == _NOT_SATISFIABLE and ask.standing.size:
        found = _CONTENT_RANGE.match(answer.fields.get("content-range", ""))
        is_whole = found is not None and found[3] == str(ask.standing.size)
        return Whole() if is_whole else StartOver("the server has no such range of it")
    if answer.status == _PRECONDITION_FAILED and ask.standing.written is not None:
        return StartOver("it has changed on the server since the file there was written")
    if answer.status in _REDIRECTS and answer.fields.get("location"):
        return _judge_redirect(answer, ask)
    return _judge_error(answer, ask, now)


def _judge_error(answer: Answer, ask: Ask, now: float) -> Verdict:
    status = answer.status
    pause = parse_retry_after(answer.fields.get("retry-after"), now=now, unit=ask.unit)
    what = shown_url(ask.wanted.url)
    error = TransferError(what, f"HTTP {status}", status, pause, is_temporary_status(status))
    if status == _UNAUTHORIZED and not lacks_scope(answer.fields.get("www-authenticate", "")):
        return Refused(error)
    if status in _ASKS_TO_WAIT and pause is not None:
        return Failure(error, is_final=pause > LONGEST_PAUSE, pause=pause)
    return Failure(error, is_final=not error.is_temporary)


def _judge_whole(answer: Answer, wanted: Wanted) -> Verdict:
    total = _number(answer.fields.get("content-length"))
    trouble = page_in_place_of_data(answer, wanted) or _wrong_size(wanted, total)
    if trouble is not None:
        return Failure(trouble)
    digests = sent_digests(answer.fields, _OK)
    return Receive(0, total, _validator(answer), tuple(digests.items()))


def _judge_part(answer: Answer, wanted: Wanted, asked_from: Standing) -> Verdict:
    found = _CONTENT_RANGE.match(answer.fields.get("content-range", ""))
    if not asked_from.size or found is None or found[1] is None or int(found[1]) != asked_from.size:
        return StartOver("the server sent another part of it than was asked for")
    validator = _validator(answer)
    if asked_from.validator.startswith('"') and validator.startswith('"') and validator != asked_from.validator:
        return StartOver("it has changed on the server since the part on disk was fetched")
    total = _number(found[3])
    trouble = page_in_place_of_data(answer, wanted) or _wrong_size(wanted, total)
    if trouble is not None:
        return Failure(trouble)
    digests = sent_digests(answer.fields, _PARTIAL)
    return Receive(asked_from.size, total, asked_from.validator or validator, tuple(digests.items()))


def _judge_redirect(answer: Answer, ask: Ask) -> Verdict:
    try:
        target = urljoin(ask.url, answer.fields["location"])
    except ValueError:
        target = ""
    scheme = target.partition(":")[0].lower()
    is_downgrade = ask.url.startswith("https:") and scheme == "http" and not is_loopback_host(host_of(target))
    if scheme not in ("http", "https") or is_downgrade:
        reason = f"it redirects to {shown_url(target)!r}, which is not fetched from there: no https"
        return Failure(TransferError(shown_url(ask.wanted.url), reason, answer.status, None, False), is_final=True)
    return Redirect(target)


def page_in_place_of_data(answer: Answer, wanted: Wanted) -> ContentError | None:
    """Return an error when an answer is a page for people, or an error in words, where data was expected (rule 5)."""
    media_type = _media_type(answer)
    if not media_type or wanted.digests:
        return None
    if wanted.size is not None and answer.fields.get("content-length") == str(wanted.size):
        return None
    suffix = os.path.splitext(wanted.name)[1].lower()
    is_words = media_type in {"application/json", "application/xml", "text/xml"} or media_type.endswith(
        ("+json", "+xml")
    )
    is_page = (
        media_type in _PROBLEM
        or (media_type in _HTML and suffix not in _HTML_SUFFIXES)
        or (media_type == "application/json" and suffix not in _JSON_SUFFIXES)
        or (is_words and _is_binary(wanted.name))
    )
    return _no_data(media_type, wanted) if is_page else None


def words_in_place_of_data(answer: Answer, wanted: Wanted, beginning: bytes) -> ContentError | None:
    """Return an error when a file that is to be no text begins as one, and the server calls it that (rule 5)."""
    media_type = _media_type(answer)
    if media_type != "text/plain" or not _is_binary(wanted.name):
        return None
    if wanted.digests or (wanted.size is not None and answer.fields.get("content-length") == str(wanted.size)):
        return None
    start = beginning[:_SNIFFED]
    is_text = not start.startswith(b"%PDF") and start.translate(None, _CONTROLS) == start
    try:
        start.decode()
    except UnicodeDecodeError as exc:
        is_text = is_text and exc.start > len(start) - 4  # a character that the cut has torn
    return _no_data(media_type, wanted) if is_text else None


def _is_binary(name: str) -> bool:
    """Tell whether a file of this name is no text for certain."""
    lower = os.path.basename(name).lower()
    return os.path.splitext(lower)[1] in _BINARY_SUFFIXES and lower != "manifest.safe"


def _no_data(media_type: str, wanted: Wanted) -> ContentError:
    reason = f"the server sent {media_type} in place of data; give its size or checksum if that is the file"
    return ContentError(shown_url(wanted.url), reason)


def _media_type(answer: Answer) -> str:
    return answer.fields.get("content-type", "").partition(";")[0].strip().lower()


def is_younger(answer: Answer, written: float) -> bool:
    """Tell whether the server's file has changed since then, by its own date; not where it has none."""
    parsed = parsedate_tz(answer.fields.get("last-modified", ""))
    return parsed is not None and mktime_tz(parsed) > written


def _wrong_size(wanted: Wanted, total: int | None) -> ContentError | None:
    if wanted.size is None or total is None or total == wanted.size:
        return None
    return ContentError(shown_url(wanted.url), f"the server has {total} bytes of it, not {wanted.size}")


def _validator(answer: Answer) -> str:
    """Return what proves a part to be of this file: a strong ETag, else the date (RFC 9110, section 13.1.5)."""
    etag = answer.fields.get("etag", "")
    validator = etag or answer.fields.get("last-modified", "")
    # What is sent back must be the bytes that came, and of other text than ASCII these are not known any more.
    return "" if etag[:1] not in ('"', "") or not validator.isascii() else validator


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() else None


@dataclass
class Patience:
    """Count what went wrong with one file, and say whether it is worth another attempt (rule 6).

    Attributes:
        retries: Further attempts after one that brought no progress.
    """

    retries: int
    failures: int = 0  # in a row
    pauses: int = 0  # in a row
    lates: int = 0  # in all
    _best: int = 0  # bytes on disk when the failures were last forgotten

    def has_more(self, size: int, *, is_pause: bool = False, is_late: bool = False) -> bool:
        """Take note of a failed attempt; tell whether there is to be another.

        Args:
            size: Bytes on disk after it.
            is_pause: The server asked to wait.
            is_late: It took too long.
        """
        if is_late:
            self.lates += 1
            return self.lates <= self.retries
        if size >= self._best + _PROGRESS:
            self._best, self.failures, self.pauses = size, 0, 0
        if is_pause:
            self.pauses += 1
            return self.pauses <= max(_PAUSES, self.retries) and self.retries > 0
        self.failures += 1
        return self.failures <= self.retries
