"""Measure shpool's pool and its peers side by side, and print a table for each case.

    python tests/benchmarks/pool.py [--quick] [--case NAME]... [--rounds N]

Needs the extra ``bench`` and Linux; a peer that is not installed is shown as missing. Every figure comes from a fresh
process. A first round warms up: it writes .pyc files, and finds the chunk size that suits each peer best. In the rounds
after it the contenders take turns, each round beginning with another one, so that a busy machine slows all of them.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # What is imported from: tests/ and the checkout itself, instead of this folder.
    sys.path[:1] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]

import argparse
import os
import platform
from collections import defaultdict
from statistics import median
from typing import TYPE_CHECKING

from benchmarks.cases import CASES  # after the path is set
from benchmarks.trials import Figure, TrialError, measure, missing_modules

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.cases import Case

_TUNING_SHARE = 2  # the round that warms up runs half of the size for each chunk size
_SMALL = 1_000  # sizes up to this are not divided


class Contest:
    """One case, run in rounds; knows the figures so far and why some are not there."""

    def __init__(self, case: Case, *, is_quick: bool) -> None:
        self.case = case
        self._size = case.quick if is_quick else case.full
        self._figures: dict[str, list[Figure]] = defaultdict(list)
        self._chunk: dict[str, int | None] = {}
        self._out = {name: f"missing: {lack}" for name, lack in missing_modules(tuple(case.peers)).items()}

    def warm_up(self) -> None:
        """Run everybody once and settle the chunk sizes; the figures do not count."""
        if self.case.is_interrupted:
            return  # what is timed is an end, which no .pyc file hastens
        best = max if self.case.is_more_better else min
        for name, chunks in self.case.peers.items():
            is_tuned = len(chunks) > 1
            size = self._size // _TUNING_SHARE if self._size > _SMALL and is_tuned else self._size
            figures = self._measure(name, size, chunks)
            if figures:
                self._chunk[name] = best(figures, key=lambda figure: figure.value).chunk

    def run_round(self, number: int) -> None:
        """Measure everybody who is still in; begin with another one each time."""
        names = list(self.case.peers)
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            self._figures[name] += self._measure(name, self._size, (self._chunk.get(name),))

    def table(self) -> Iterator[str]:
        """Yield the lines: title, budgets, a row for each contender."""
        case = self.case
        medians = {name: median(f.value for f in figures) for name, figures in self._figures.items() if figures}
        yield f"\n{case.name}: {case.title.format(size=f'{self._size:,}')}"
        for budget in case.budgets:
            yield f"  budget {budget.text}: {budget.verdict(medians, is_more_better=case.is_more_better)}"
        better = "more is better" if case.is_more_better else "less is better"
        yield f"  {'':18}{'median':>10}{'least':>10}{'most':>10}{'to shpool':>11}  {case.unit}, {better}"
        for name in case.peers:
            yield f"  {name:18}{self._row(name, medians)}".rstrip()

    def _measure(self, name: str, size: int, chunks: Sequence[int | None]) -> list[Figure]:
        if name in self._out:
            return []
        _say(f"{self.case.name}: {name}")
        try:
            return measure(self.case, name, size, tuple(chunks))
        except TrialError as exc:
            self._out[name] = str(exc)  # once is enough: a peer that hangs would cost its time-out each round
            return []

    def _row(self, name: str, medians: dict[str, float]) -> str:
        if name not in medians:
            return f"{self._out.get(name, 'not run'):>10}"
        values = [figure.value for figure in self._figures[name]]
        ours = medians.get("shpool")
        ratio = f"{medians[name] / ours:.2f}" if ours else "-"
        remarks = [f"chunks of {self._chunk[name]}"] if self._chunk.get(name) else []
        remarks += [figure.note for figure in self._figures[name][-1:] if figure.note]
        remarks += [self._out[name]] if name in self._out else []
        cells = "".join(f"{value:>10.4g}" for value in (medians[name], min(values), max(values)))
        return f"{cells}{ratio:>11}  {', '.join(remarks)}"


def _say(text: str) -> None:
    """Show what runs now, where somebody is watching."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure shpool's pool and its peers side by side.")
    parser.add_argument("--quick", action="store_true", help="small sizes and one round: for a look, not for a verdict")
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES], help="only this; repeatable")
    parser.add_argument("--rounds", type=int, help="rounds that count (default: 5; with --quick 1)")
    return parser.parse_args()


def main() -> None:
    """Run the cases that the command line asks for."""
    arguments = _arguments()
    rounds = arguments.rounds or (1 if arguments.quick else 5)
    kind = "quick sizes" if arguments.quick else "full sizes"
    load = os.getloadavg()[0]
    print(f"Python {platform.python_version()}, {os.cpu_count()} processors, load {load:.1f}, {rounds} rounds, {kind}")
    for case in CASES:
        if arguments.case and case.name not in arguments.case:
            continue
        contest = Contest(case, is_quick=arguments.quick)
        contest.warm_up()
        for number in range(rounds):
            contest.run_round(number)
        _say("")
        print("\n".join(contest.table()), flush=True)


if __name__ == "__main__":
    main()
