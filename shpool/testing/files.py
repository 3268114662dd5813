"""Files that a loopback server offers for download, with ranges, checksums, and faults on demand."""

from __future__ import annotations

import hashlib
import random
import re
import threading
from collections import defaultdict, deque
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

from shpool.testing.messages import Request, Response

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_RANGE = re.compile(r"bytes=(\d{1,18})-(\d{0,18})")


@dataclass(frozen=True)
class FileFault:
    """How one answer of the file service goes wrong.

    Attributes:
        status: Answer with this status and ``body`` instead of the file.
        body: Content of that answer.
        cut_at: Close the connection after so many bytes of the content.
        stall_at: Send nothing more after so many bytes of the content.
        ignores_range: Send the whole file with 200, whatever was asked.
        ignores_validator: Continue without a look at ``If-Range``.
        range_shift: Send a 206 that begins so many bytes later than asked, and says so.
        content: Other content than the file's.
        headers: Fields to add to the answer, or to send in place of its own.
    """

    status: int | None = None
    body: bytes = b""
    cut_at: int | None = None
    stall_at: int | None = None
    ignores_range: bool = False
    ignores_validator: bool = False
    range_shift: int = 0
    content: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _File:
    content: bytes
    headers: Mapping[str, str]
    is_public: bool


class FileShelf:
    """Answer requests for files; safe to change while the server runs.

    Attributes:
        seen: The requests for each file, oldest first.
    """

    def __init__(self) -> None:
        self.seen: dict[str, list[Request]] = defaultdict(list)
        self._lock = threading.Lock()  # guards the three below, which tests change while the server answers
        self._files: dict[str, _File] = {}
        self._faults: dict[str, deque[FileFault]] = defaultdict(deque)
        self._dice: tuple[random.Random, float, Sequence[FileFault]] | None = None

    def put(self, name: str, content: bytes, headers: Mapping[str, str] | None, *, is_public: bool) -> None:
        """Offer a file; a strong ETag of its content is among its fields unless ``headers`` say otherwise."""
        own = {
            "Content-Type": "application/octet-stream",
            "ETag": f'"{hashlib.sha256(content).hexdigest()[:16]}"',
            **(headers or {}),
        }
        with self._lock:
            self._files[name] = _File(content, own, is_public)

    def fail_next(self, name: str, *faults: FileFault) -> None:
        """Let the next answers for a file go wrong, in this order."""
        with self._lock:
            self._faults[name].extend(faults)

    def fail_at_random(self, seed: int, share: float, faults: Sequence[FileFault]) -> None:
        """Let a share of all answers go wrong, each in one of these ways; 0 heals."""
        with self._lock:
            self._dice = (random.Random(seed), share, tuple(faults)) if share else None  # noqa: S311 - repeatable faults

    def is_public(self, name: str) -> bool:
        """Tell whether a file is given to anybody."""
        return name in self._files and self._files[name].is_public

    def answer(self, name: str, request: Request) -> Response:
        """Answer a request that may have the file."""
        with self._lock:
            self.seen[name].append(request)
            file, fault = self._files.get(name), self._next_fault(name)
        if fault.status is not None:
            return Response(fault.status, fault.body, fault.headers)
        if file is None:
            return Response(404)
        if _has_changed(request, {**file.headers, **fault.headers}):
            return Response(412)
        content = file.content if fault.content is None else fault.content
        response = _content(request, content, {**file.headers, **fault.headers}, fault)
        return replace(response, cut_at=fault.cut_at, stall_at=fault.stall_at)

    def _next_fault(self, name: str) -> FileFault:
        if self._faults[name]:
            return self._faults[name].popleft()
        if self._dice is not None:
            dice, share, faults = self._dice
            if dice.random() < share:
                return dice.choice(faults)
        return FileFault()


def _has_changed(request: Request, headers: Mapping[str, str]) -> bool:
    """Tell whether the file is younger than the request wants it to be (RFC 9110, section 13.1.4)."""
    condition, date = request.headers.get("if-unmodified-since"), headers.get("Last-Modified")
    return bool(condition and date) and parsedate_to_datetime(date or "") > parsedate_to_datetime(condition or "")


def _content(request: Request, content: bytes, headers: Mapping[str, str], fault: FileFault) -> Response:
    """Answer with the file or the part of it that is asked for (RFC 9110, sections 13.1.5 and 14)."""
    asked = _RANGE.fullmatch(request.headers.get("range", ""))
    condition = request.headers.get("if-range")
    is_same = condition is None or condition in (headers.get("ETag"), headers.get("Last-Modified"))
    if asked is None or fault.ignores_range or not (is_same or fault.ignores_validator):
        return Response(200, content, {"Accept-Ranges": "bytes", **headers})
    start, total = int(asked[1]) + fault.range_shift, len(content)
    if start >= total:
        return Response(416, headers={"Content-Range": f"bytes */{total}"})
    end = min(int(asked[2]), total - 1) if asked[2] else total - 1
    return Response(206, content[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{total}"})
