"""The journal: the SQLite file that remembers which jobs are done.

``record`` writes it, in one run's hands at a time (``run``, ``lock``), in batches (``writer``); ``view`` reads it, also
meanwhile. ``file`` opens and refuses files, ``rows`` and ``texts`` are what stands in them, ``keys`` spares look-ups.
"""

from __future__ import annotations

from shpool.journal.record import Claim, Ended, Journal
from shpool.journal.rows import JobRecord, RunRecord
from shpool.journal.view import JournalSummary, JournalView

__all__ = ["Claim", "Ended", "JobRecord", "Journal", "JournalSummary", "JournalView", "RunRecord"]
