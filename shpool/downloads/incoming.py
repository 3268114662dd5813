"""One file on its way from a server to its place: what ``transfer`` decides, done on disk."""

from __future__ import annotations

import math
import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from shpool.downloads.checksums import Hashers, has_digests
from shpool.downloads.curling import CurlTrouble
from shpool.downloads.filenames import late_name, safe_name, url_digest
from shpool.downloads.items import DownloadResult
from shpool.downloads.partfile import PartFile, file_size, size_and_date, translated
from shpool.downloads.press import Arrived
from shpool.downloads.transfer import (
    NOTHING,
    Ask,
    Failure,
    Patience,
    Receive,
    Standing,
    StartOver,
    Wanted,
    Whole,
    can_continue,
    is_younger,
    judge,
    words_in_place_of_data,
)
from shpool.errors import ContentError, DownloadError, DownloadTimeoutError, TooManyOpenFilesError, TransferError
from shpool.origins import shown_url

if TYPE_CHECKING:
    from shpool.downloads.filenames import Folder
    from shpool.downloads.items import FetchSettings, PlannedItem
    from shpool.downloads.transfer import Answer, Verdict
    from shpool.gate import Ticket
    from shpool.retry import RetryAfterUnit

_KEPT_IN_MEMORY = 256 * 1024  # bytes of a file that arrive before some are written: small files are written in one go
_IGNORED = 64 * 1024  # bytes of an error's body to read, so that the connection can be used again


class Incoming:
    """One file, from the look at what is there until its content is complete and right.

    Args:
        planned: What to fetch.
        folder: Where to.
        settings: How.
        unit: What a number in ``Retry-After`` counts.
    """

    def __init__(self, planned: PlannedItem, folder: Folder, settings: FetchSettings, unit: RetryAfterUnit) -> None:
        item = planned.item
        self.planned = planned
        self.patience = Patience(settings.retries)
        self.url = item.url  # of the next request: redirects change it
        self.redirects = self.refusals = self.attempts = self.received = 0
        self.generation: int | None = None  # of the token the request under way was sent with
        self.ticket: Ticket | None = None  # leave for the request under way, and for what it was redirected to
        self.answer: Answer | None = None  # to the last request
        self.is_astray = False  # a redirect has led to another origin: the token stays behind
        self.begun = 0.0
        self.deadline = math.inf  # of the attempt under way, by time.monotonic
        self.target: str | None = None
        self._folder = folder
        self._settings = settings
        self._unit = unit
        self._wanted = Wanted(item.url, planned.path or "", item.size, item.digests)
        self._part: PartFile | None = None
        self._is_unseen = False  # there was no descriptor left to look for a part
        self._checks_existing = False
        self._is_proven = False  # a checksum the server states is that of the file there
        self._asked: Ask | None = None
        self._verdict: Verdict | None = None
        self._hashers = Hashers(())
        self._chunks: list[bytes] = []
        self._in_memory = 0
        self._is_sniffed = False  # the first bytes of the answer under way were looked at

    @property
    def has_begun(self) -> bool:
        """Whether anything was asked for it; what waits for leave or for a token has not begun."""
        return self.attempts > 0

    # Before a request

    def look(self) -> DownloadResult | Arrived | None:
        """See what is on disk: a right file, a part that only has to be renamed, or None when a request is needed.

        Raises:
            DownloadError: It cannot be fetched to where it is to go.
        """
        self.begun = time.monotonic()
        if self.planned.path is not None:
            self.target = self._folder.locate(self.planned.path)
            if not self._settings.overwrite and (size := file_size(self.target)) is not None:
                if self._is_right(size):
                    return self.skipped(size)
                if size and not self._wanted.digests and self._wanted.size in (None, size):
                    self._checks_existing = True
                    return None
        self._look_for_part()
        return self._arrived() if self._has_all() else None

    def _look_for_part(self) -> None:
        try:
            self._part = PartFile.open(self._stem(), create=False)
        except TooManyOpenFilesError:
            self._is_unseen = True  # some may be closed until the next look
        else:
            self._is_unseen = False

    def go_back(self) -> None:
        """Ask the first URL again: where it redirects to may have changed, and signed ones expire."""
        self.url = self._wanted.url
        self.redirects, self.is_astray = 0, False

    def request_fields(self) -> list[str]:
        """Return the header fields of the next request, and get ready for its answer."""
        if not self.redirects:
            self.attempts += 1
            self.deadline = time.monotonic() + (math.inf if self._settings.timeout is None else self._settings.timeout)
        self._verdict = self.answer = None
        self._is_sniffed = False
        self._asked = Ask(self._wanted, self._standing(), self.url, self._unit)
        return self._asked.fields()

    def _standing(self) -> Standing:
        if self._checks_existing and self.target is not None:
            size, written = size_and_date(self.target)
            return Standing(size or 0, written=written)
        if self._part is None and self._is_unseen:
            self._look_for_part()
        if self._part is None:
            return NOTHING
        standing = self._part.standing(url_digest(self._wanted.url), is_provable=bool(self._wanted.digests))
        return standing if can_continue(self._wanted, standing) else NOTHING

    # The answer

    def take_head(self, answer: Answer) -> None:
        """Judge an answer, and get ready to write what follows."""
        assert self._asked is not None
        self.answer = answer
        wanted = self._wanted
        if self.planned.path is None:  # what the server calls it says what it is to be
            wanted = wanted._replace(name=late_name(wanted.url, answer.fields.get("content-disposition", "")))
        self._asked = self._asked._replace(wanted=wanted)
        verdict = judge(answer, self._asked, time.time())
        if isinstance(verdict, Receive) and self.target is None:
            self._settle_name(answer.fields.get("content-disposition", ""))
        if isinstance(verdict, Receive) and self._is_existing(verdict):
            verdict = Whole()
        elif isinstance(verdict, Receive) and self._checks_existing and verdict.offset:
            verdict = StartOver("the file there is not the server's")
        if isinstance(verdict, Receive):
            self._checks_existing = False
            self.refusals = 0
            self._prepare_to_write(verdict)
        self._verdict = verdict

    def _settle_name(self, disposition: str) -> None:
        self.target = self._folder.locate(late_name(self._wanted.url, disposition))

    def _is_existing(self, verdict: Receive) -> bool:
        """Tell whether the file under this name is the one that is about to arrive."""
        if self._settings.overwrite or self.target is None or not (self._checks_existing or self.planned.path is None):
            return False
        size, written = size_and_date(self.target)
        if size is None or size != verdict.total:
            return False
        digests = [*self._wanted.digests, *verdict.digests]
        # Equal sizes prove nothing where the server names the file: two URLs may name theirs alike.
        if digests:
            is_same = self._is_proven = has_digests(self.target, digests)
        else:
            is_same = self.planned.path is not None and self.answer is not None and not is_younger(self.answer, written)
        self._checks_existing = self._checks_existing or is_same
        return is_same

    def _prepare_to_write(self, verdict: Receive) -> None:
        self._hashers = Hashers([*self._wanted.digests, *verdict.digests])
        if self._part is not None and self._part.size:
            if verdict.offset:
                self._hashers.read(self._part.descriptor)
            else:
                self._part.restart()

    def take_body(self, chunk: bytes) -> bool:
        """Take some of the body; tell whether more is wanted."""
        self.received += len(chunk)
        self._in_memory += len(chunk)
        verdict = self._verdict
        if not isinstance(verdict, Receive):
            return self._in_memory <= _IGNORED and not isinstance(verdict, (Whole, StartOver))
        if not self._is_sniffed and not verdict.offset and not self._sniff(chunk):
            return True  # read to its end, if that is near, so that the connection can be used again
        if (expected := self._expected(verdict)) is not None and self.bytes_kept + self._in_memory > expected:
            self._start_over()
            self._verdict = Failure(self._wrong(f"it is more than {expected} bytes"))
            return False
        self._chunks.append(chunk)
        if self._in_memory >= _KEPT_IN_MEMORY:
            self._write()
        return True

    def _expected(self, verdict: Receive) -> int | None:
        """Return the bytes the file must have, as far as that is known."""
        return self._wanted.size if self._wanted.size is not None else verdict.total

    def _wrong(self, mismatch: str) -> ContentError:
        return ContentError(shown_url(self._wanted.url), f"{mismatch}; what was sent is thrown away")

    def _sniff(self, chunk: bytes) -> bool:
        """Look at the first bytes of a file; tell whether they may be of it."""
        self._is_sniffed = True
        assert self._asked is not None
        assert self.answer is not None
        trouble = words_in_place_of_data(self.answer, self._asked.wanted, chunk)
        if trouble is not None:
            self._verdict = Failure(trouble)
        return trouble is None

    def _write(self) -> None:
        """Write what has arrived to the part, and note what it is worth if more is to come."""
        verdict = self._verdict
        if not self._chunks or not isinstance(verdict, Receive):
            return
        if self._part is None:
            self._part = PartFile.open(self._stem(), create=True)
            assert self._part is not None
            if self._part.size:
                self._part.restart()  # left by a run that was not to be continued
        size = self._part.size + self._in_memory
        if self._part.size == 0 and size != verdict.total:
            self._part.note(url_digest(self._wanted.url), verdict.validator, os.path.basename(self.target or ""))
        chunks, self._chunks, self._in_memory = self._chunks, [], 0
        self._hashers.update(chunks)
        self._part.append(chunks)

    # After it

    def conclude(self, trouble: CurlTrouble | Exception | None) -> Verdict | DownloadResult | Arrived:
        """Return what comes of an answer, complete or cut."""
        verdict = self._verdict
        try:
            if isinstance(trouble, Exception):
                return self._failed_here(trouble)
            if isinstance(verdict, Receive):
                return self._conclude_body(verdict, trouble)
            if isinstance(verdict, Whole):
                return self._conclude_whole()
        except (DownloadError, OSError) as exc:
            return self._failed_here(exc)
        finally:
            self._drop_memory()
        if isinstance(verdict, StartOver):
            verdict = StartOver(verdict.reason, is_free=self._checks_existing)
            self._start_over()
        if verdict is not None:
            return verdict
        return self._failed_on_the_way(trouble or CurlTrouble("no answer", is_final=False))

    def _failed_on_the_way(self, trouble: CurlTrouble) -> Failure:
        what = shown_url(self._wanted.url)
        if trouble.is_late and self._settings.timeout is not None:
            return Failure(DownloadTimeoutError(what, self._settings.timeout))
        error = TransferError(what, trouble.reason, None, None, not trouble.is_final)
        return Failure(error, is_final=trouble.is_final)

    def _failed_here(self, exc: Exception) -> Failure:
        if isinstance(exc, OSError) and not isinstance(exc, DownloadError):
            exc = translated(exc, self._part.path if self._part is not None else self._stem())
        error = exc if isinstance(exc, DownloadError) else DownloadError(shown_url(self._wanted.url), repr(exc))
        return Failure(error, is_final=not isinstance(error, (ContentError, TooManyOpenFilesError)))

    def _conclude_body(self, verdict: Receive, trouble: CurlTrouble | None) -> Failure | Arrived:
        if trouble is not None:
            if verdict.validator or self._wanted.digests:
                self._write()
            return self._failed_on_the_way(trouble)
        if self._part is None and not self._chunks:
            self._part = PartFile.open(self._stem(), create=True)  # an empty file
        self._write()
        size, expected = self.bytes_kept, self._expected(verdict)
        mismatch = f"it is {size} bytes, not {expected}" if expected not in (None, size) else self._hashers.mismatch()
        if mismatch:
            self._start_over()
            return Failure(self._wrong(mismatch))
        return self._arrived()

    def _conclude_whole(self) -> DownloadResult | Arrived | StartOver:
        if self._checks_existing and self.target is not None:
            return self.skipped(file_size(self.target) or 0, by_size=not self._is_proven)
        if self.target is None:
            self.target = self._folder.locate(self._noted_name() or late_name(self._wanted.url, ""))
        hashers = Hashers(self._wanted.digests)
        if self._part is not None:
            hashers.read(self._part.descriptor)
            if self._wanted.size in (None, self._part.size) and not hashers.mismatch():
                return self._arrived()
        self._start_over()
        return StartOver("what is on disk is not the file")

    def _noted_name(self) -> str:
        return safe_name(self._part.noted_name) if self._part is not None else ""

    def _start_over(self) -> None:
        if self._checks_existing:
            self._checks_existing = False
        elif self._part is not None and self._part.size:
            self._part.restart()

    def _drop_memory(self) -> None:
        self._chunks, self._in_memory = [], 0

    def _has_all(self) -> bool:
        """Tell whether the part is the whole file, as far as a checksum can tell without the server."""
        part = self._part
        if part is None or self.target is None or not self._wanted.digests or not part.size:
            return False
        if self._wanted.size is None or part.size != self._wanted.size:
            return False
        hashers = Hashers(self._wanted.digests)
        hashers.read(part.descriptor)
        return not hashers.mismatch()

    def _is_right(self, size: int) -> bool:
        """Tell whether the file under the target's name is the one that is wanted, as far as that is known."""
        wanted = self._wanted
        if self.target is None or wanted.size not in (None, size):
            return False
        if not wanted.digests:
            return size == wanted.size == 0  # then there is nothing to be wrong
        return has_digests(self.target, wanted.digests)

    def _arrived(self) -> Arrived:
        assert self._part is not None
        assert self.target is not None
        part, self._part = self._part, None
        return Arrived(part, self.target, replace=self.planned.path is not None or self._settings.overwrite)

    def _stem(self) -> str:
        if self.planned.path is not None and self.target is not None:
            return self.target
        return f"{self._folder.root}/file-{url_digest(self._wanted.url)}"

    # The end

    @property
    def bytes_kept(self) -> int:
        """Bytes of it on disk."""
        return self._part.size if self._part is not None and self._part.descriptor >= 0 else 0

    def skipped(self, size: int, *, by_size: bool = False) -> DownloadResult:
        """Return the result of a file that was there; ``by_size``: nothing but its size says that it is right."""
        return replace(self._result("skipped", size, None), by_size=by_size)

    def done(self, size: int) -> DownloadResult:
        """Return the result of a file that has its name now."""
        return self._result("done", size, None)

    def failed(self, error: Exception) -> DownloadResult:
        """Keep what has arrived for another run, and return the result."""
        kept = self.bytes_kept
        self.close()
        return self._result("failed", kept, error)

    def close(self) -> None:
        """Write what is in memory, as far as it can be continued, and close the part."""
        verdict = self._verdict
        try:
            if isinstance(verdict, Receive) and (verdict.validator or self._wanted.digests):
                self._write()
        finally:
            self._drop_memory()
            if self._part is not None:
                self._part.close()
                self._part = None

    def _result(
        self, status: Literal["done", "skipped", "failed"], size: int, error: Exception | None
    ) -> DownloadResult:
        seconds = time.monotonic() - self.begun if self.begun else 0.0
        planned = self.planned
        path = self.target if status != "failed" else None
        return DownloadResult(
            planned.number, planned.item.url, path, status, size, self.received, self.attempts, seconds, error
        )
