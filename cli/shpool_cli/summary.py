"""What a run came to, as its last line says."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, BinaryIO, ClassVar

from shpool_cli.console import CommandError, ExitCode, report, say

if TYPE_CHECKING:
    from shpool.pool import PoolStats

_WORDS = {
    ExitCode.HUNG_UP: "hung up: ",
    ExitCode.INTERRUPTED: "interrupted: ",
    ExitCode.TERMINATED: "terminated: ",
}


@dataclass
class Summary:
    """What a run came to: the last line on stderr, and the object of --json.

    Attributes:
        jobs: Jobs of the input; None until TARGET and INPUT are known to be good.
        done: Of these, done in this run.
        failed: Failed in this run.
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
    before: int = 0
    skipped: int = 0
    logins: int = 0
    refreshes: int = 0
    seconds: float = 0.0
    halted: str | None = None
    exit_code: int = ExitCode.OK

    def note(self, stats: PoolStats) -> None:
        """Take over the pool's counters."""
        self.logins, self.refreshes = stats.logins, stats.refreshes

    @property
    def is_complete(self) -> bool:
        """Tell whether every job has come to its end."""
        return self.done + self.failed + self.before + self.skipped == self.jobs

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


def _counted(number: int, noun: str, nouns: str = "") -> str:
    return f"{number} {noun if number == 1 else nouns or noun + 's'}"
