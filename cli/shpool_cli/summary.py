"""What a run came to, as its last lines say."""

from __future__ import annotations

import json
import re
from dataclasses import InitVar, asdict, dataclass, field
from typing import TYPE_CHECKING, BinaryIO, ClassVar, TypedDict

from shpool.errorkinds import MOST_KINDS, OTHERS, kind_of_error
from shpool_cli.console import CommandError, ExitCode, report, say

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shpool.pool import PoolStats
    from shpool_cli.output.records import Record

_WORDS = {
    ExitCode.HUNG_UP: "hung up: ",
    ExitCode.INTERRUPTED: "interrupted: ",
    ExitCode.TERMINATED: "terminated: ",
}


_MOST_TOLD = 5  # kinds of errors, on stderr


class ErrorKind(TypedDict):
    """Failures with the same class of error and the same words, URLs, paths, numbers and ids apart.

    Attributes:
        count: How many there are.
        index: The first job's position in the input.
        example: What it failed with.
    """

    count: int
    index: int
    example: str


@dataclass
class Summary:
    """What a run came to: a line on stderr with the errors below it, and the object of --json.

    Args:
        limit: How many jobs were asked for; None for all of them.

    Attributes:
        jobs: Jobs of the input; None until TARGET and INPUT are known to be good.
        done: Of these, done in this run.
        failed: Failed in this run.
        errors: Of these, how many with which kind of error, and an example.
        before: Done in an earlier run, by the journal.
        skipped: Left out, as ``--only-failed`` asks.
        logins: Tokens fetched.
        refreshes: Of these, the ones after the first.
        seconds: Time the run took.
        halted: Why it ended before its jobs did, None if it did not.
        exit_code: What it ends with.
    """

    _noun: ClassVar[str] = "job"

    jobs: int | None = None
    done: int = 0
    failed: int = 0
    errors: dict[str, ErrorKind] = field(default_factory=dict)
    before: int = 0
    skipped: int = 0
    logins: int = 0
    refreshes: int = 0
    seconds: float = 0.0
    halted: str | None = None
    exit_code: int = ExitCode.OK
    limit: InitVar[int | None] = None

    def __post_init__(self, limit: int | None) -> None:
        self._is_limited = limit is not None

    def note(self, stats: PoolStats) -> None:
        """Take over the pool's counters."""
        self.logins, self.refreshes = stats.logins, stats.refreshes

    def note_failure(self, record: Record) -> None:
        """Count a job that failed."""
        self.failed += 1
        error = record.error or ""
        kind = kind_of_error(error)
        if kind not in self.errors and len(self.errors) >= MOST_KINDS:
            kind = OTHERS
        self.errors.setdefault(kind, {"count": 0, "index": record.index, "example": error})["count"] += 1

    @property
    def is_complete(self) -> bool:
        """Tell whether every job has come to its end."""
        return self.done + self.failed + self.before + self.skipped == self.jobs

    @property
    def outcome(self) -> ExitCode:
        """What a run ends with that nothing has interrupted; never OK where jobs that were asked for have no end."""
        is_all = self.is_complete or self._is_limited
        return ExitCode.FAILED if self.failed or self.halted or not is_all else ExitCode.OK

    @property
    def reason(self) -> str | None:
        """Why it ended before its jobs did, None if it did not: for the journal."""
        return self.halted or ("--limit is reached" if self._is_limited and not self.is_complete else None)

    def __str__(self) -> str:
        finished, total = self.done + self.failed + self.before + self.skipped, self.jobs or 0
        jobs = _counted(total, self._noun)
        jobs = jobs if self.is_complete else f"{finished} of {jobs}"
        counts = [jobs, *self._amounts(), f"{self.failed} failed"]
        counts += [f"{self.before} done before"] if self.before else []
        counts += [f"{self.skipped} skipped"] if self.skipped else []
        counts += [_counted(self.logins, "login"), _counted(self.refreshes, "refresh", "refreshes")]
        halted = f"{self.halted}: " if self.halted else _WORDS.get(ExitCode(self.exit_code), "")
        return f"{halted}{', '.join(counts)}, {self.seconds:.1f} s"

    def _amounts(self) -> list[str]:
        """Return what else is to be said of the jobs, in words."""
        return []

    def tell(self, stdout: BinaryIO | None, *, as_json: bool) -> None:
        """Say it on stderr, and as JSON where asked: on ``stdout``, or on stderr where that is None."""
        text = json.dumps(asdict(self))
        if as_json and stdout is not None:
            try:
                stdout.write(f"{text}\n".encode())
                stdout.flush()
            except BrokenPipeError:
                pass  # nobody is left to tell
            except OSError as exc:
                error = f"standard output cannot be written: {exc.strerror}"
                self.exit_code = report(CommandError(error, "the results are in --output", ExitCode.FAILED))
        say(text if as_json and stdout is None else str(self))
        for line in self._failures():
            say(line)

    def _failures(self) -> Iterator[str]:
        kinds = sorted(self.errors.values(), key=lambda its: -its["count"])
        for its in kinds[:_MOST_TOLD]:
            kind, text = re.split(r": | |$", its["example"], maxsplit=1)
            count, first = _counted(its["count"], self._noun), f"{self._noun} {its['index']}"
            yield f"error: {kind} in {count}, first in {first}: {text}"
        if others := kinds[_MOST_TOLD:]:
            count = _counted(sum(its["count"] for its in others), self._noun)
            yield f"error: and {len(others)} other kinds in {count}; all are in the output"


def _counted(number: int, noun: str, nouns: str = "") -> str:
    return f"{number} {noun if number == 1 else nouns or noun + 's'}"
