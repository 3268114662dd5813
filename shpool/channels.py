"""Ways from the sharing thread to its readers: the seam, and what there is of it on one host."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol

from shpool.board import Board, ReportBox, named_board, sweep_abandoned
from shpool.errors import BoardError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shpool.tokens import Posting

logger = logging.getLogger(__name__)

_REPORT_POLL = 0.2  # s between the owner's looks at the reports beside a named board


class TokenReader(Protocol):
    """Where a shared session reads; a board on this host, whatever an engine brings elsewhere."""

    @property
    def version_word(self) -> Sequence[int]:
        """A sequence whose item 0 is the current version; looked at on each read of the token."""

    def read(self) -> tuple[int, bytes]:
        """Return the version and the payload of the posting it stands for."""


class TokenChannel(Protocol):
    """Where the sharing thread publishes."""

    def publish(self, posting: Posting) -> None:
        """Show a posting to all readers."""

    def newest_report(self) -> int:
        """Return the newest generation that readers reported as refused by this way; 0 for none."""

    def reader(self) -> TokenReader:
        """Return a reader for this process and its forked children."""

    @property
    def report_poll(self) -> float:
        """Seconds between two looks at ``newest_report``; infinity where reports come another way."""

    def close(self) -> None:
        """End sharing and leave nothing behind; harmless when repeated."""


class BoardChannel:
    """Publish on an anonymous board; its readers report over their lifelines."""

    report_poll = float("inf")

    def __init__(self, board: Board) -> None:
        self.board = board

    def publish(self, posting: Posting) -> None:
        """Show a posting to all readers."""
        self.board.post(posting.to_bytes(), 0.0 if posting.token is None else posting.token.deadline)

    def newest_report(self) -> int:
        """Return 0: no report comes this way."""
        return 0

    def reader(self) -> TokenReader:
        """Return a view for this process and its forked children."""
        return self.board.reader()

    def close(self) -> None:
        """End sharing."""
        self.board.close()


class NamedChannel(BoardChannel):
    """Publish under a name; come back under it when somebody removes it."""

    report_poll = _REPORT_POLL

    def __init__(self, name: str) -> None:
        board, self._reports = _claim(name)
        super().__init__(board)
        sweep_abandoned()  # after the name was claimed: to take it over is worth a warning, to sweep it is not
        self._last: Posting | None = None
        self._trouble = ""

    def publish(self, posting: Posting) -> None:
        """Show a posting to all readers."""
        before, self._last = self._last, posting  # known before a reader can report it
        try:
            super().publish(posting)
        except BaseException:
            self._last = before
            raise

    def newest_report(self) -> int:
        """Return the newest generation reported; puts the board back first if its name has vanished."""
        if self.board.has_vanished() or self._reports.has_vanished():
            self._come_back()
        newest = self._reports.newest()
        shown = 0 if self._last is None or self._last.token is None else self._last.token.generation
        if newest > shown:  # nobody was refused with what was never shown; left there, it would hide honest reports
            self._reports.clear()
            return 0
        return newest

    def _come_back(self) -> None:
        try:
            if self.board.has_vanished():
                self._claim_again()
            else:
                reports = ReportBox(self.board.name, create=True)
                self._reports.close()
                self._reports = reports
        except BoardError as exc:
            if str(exc) != self._trouble:  # looked at several times a second
                self._trouble = str(exc)
                logger.warning("the shared session's name has vanished and cannot be taken again: %s", exc)

    def _claim_again(self) -> None:
        board, reports = _claim(self.board.name)
        self._reports.close()
        self._reports, self.board, vanished = reports, board, self.board
        if self._last is not None:
            self.publish(self._last)
        vanished.close()  # at which its readers look for the new one

    def close(self) -> None:
        """End sharing and take both names away."""
        super().close()
        self._reports.close()


def _claim(name: str) -> tuple[Board, ReportBox]:
    board = named_board(name)
    try:
        return board, ReportBox(name, create=True)
    except BaseException:
        board.close()
        raise


class TeeChannel:
    """Publish on two channels at once: a pool's own, and a name for other processes."""

    def __init__(self, first: TokenChannel, second: TokenChannel) -> None:
        self._both = (first, second)
        self.report_poll = min(first.report_poll, second.report_poll)

    def publish(self, posting: Posting) -> None:
        """Show a posting to the readers of both."""
        for channel in self._both:
            channel.publish(posting)

    def newest_report(self) -> int:
        """Return the newest generation reported on either."""
        return max(channel.newest_report() for channel in self._both)

    def reader(self) -> TokenReader:
        """Return a view of the first."""
        return self._both[0].reader()

    def close(self) -> None:
        """End both."""
        for channel in self._both:
            channel.close()
