"""What is measured: the cases, who takes part in each with which settings, and the budgets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from benchmarks.peers import SLOW_LOGIN_SECONDS

if TYPE_CHECKING:
    from collections.abc import Mapping

DEFAULT = (None,)  # of the peer; for those without any, chunks of one item
COARSE = (1_000, 5_000, 20_000, 50_000)  # chunk sizes to choose from for tasks that do nothing
FINE = (10, 50, 200)  # and for short ones
LAZY = ("mp.Pool", "mpire", "joblib", "pebble", "loky", "executor")


@dataclass(frozen=True)
class Budget:
    """A bound on the figure of one contender.

    Attributes:
        text: As the table's title says it.
        factor: Times the reference; a bound by itself if there is none.
        of: Peers that are the reference; the hardest of those measured counts.
        plus: Added to the bound.
        least: What the reference is taken for if it is less.
        who: Whose figure it bounds.
    """

    text: str
    factor: float = 1.0
    of: tuple[str, ...] = ()
    plus: float = 0.0
    least: float = 0.0
    who: str = "shpool"

    def verdict(self, figures: Mapping[str, float], *, is_more_better: bool) -> str:
        """Return ``pass`` or ``behind`` with what was reached, or ``not measured``."""
        references = [figures[name] for name in self.of if name in figures]
        if self.who not in figures or (self.of and not references):
            return "not measured"
        reached = figures[self.who]
        hardest = (max(references) if is_more_better else min(references)) if references else 1.0
        bound = self.factor * max(hardest, self.least) + self.plus
        is_met = reached >= bound if is_more_better else reached <= bound
        shown = f"{reached / hardest:.2f}x" if references and hardest else f"{reached:.4g}"
        return f"{'pass' if is_met else 'behind'} ({shown})"


@dataclass(frozen=True)
class Case:
    """One table.

    Attributes:
        name: For ``--case``.
        title: What is run; ``{size}`` stands for the size.
        unit: Of the figures.
        measure: The function in ``measures.py``.
        peers: Who takes part, and the chunk sizes to choose the best from in the round that warms up.
        full: The size.
        quick: The size with ``--quick``.
        budgets: All that shall hold.
        is_more_better: Whether a greater figure is the better one.
        limit: Seconds after which a peer counts as hanging.
        is_interrupted: Whether ^C is sent once the tasks run, and the time to the end is the figure.
    """

    name: str
    title: str
    unit: str
    measure: str
    peers: Mapping[str, tuple[int | None, ...]]
    full: int
    quick: int
    budgets: tuple[Budget, ...] = field(default=())
    is_more_better: bool = True
    limit: float = 60.0
    is_interrupted: bool = False


def _all(*names: str, chunks: tuple[int | None, ...] = DEFAULT) -> dict[str, tuple[int | None, ...]]:
    return dict.fromkeys(names, chunks)


CASES = (
    Case(
        "one-at-a-time",
        "{size} no-op tasks, one at a time: from submit to result",
        "µs, median",
        "one_at_a_time",
        _all("shpool", *LAZY),
        1_000,
        500,
        (Budget("<= 0.7x loky", 0.7, ("loky",)),),
        is_more_better=False,
    ),
    Case(
        "burst",
        "{size} submits of no-ops, then their results",
        "thousand/s",
        "burst",
        _all("shpool", "mp.Pool", "mpire", "pebble", "loky", "executor"),
        20_000,
        3_000,
        (Budget(">= 3x loky", 3.0, ("loky",)),),
    ),
    Case(
        "map",
        "default map of no-ops over {size} ints from a generator; peers with their best chunks",
        "million/s",
        "map_rate",
        {"shpool": DEFAULT, **_all(*LAZY, chunks=COARSE), "mp.Pool eager": (None, *COARSE)},
        1_000_000,
        200_000,
        (
            Budget(">= 1.0x every lazy peer", 1.0, LAZY),
            Budget(">= 0.8x mp.Pool eager", 0.8, ("mp.Pool eager",)),
        ),
        limit=120.0,
    ),
    Case(
        "map-1",
        "map(chunksize=1) of {size} no-ops",
        "thousand/s",
        "map_singly",
        _all("shpool", *LAZY, chunks=(1,)),
        50_000,
        5_000,
        (Budget(">= 1.0x mp.Pool's imap", 1.0, ("mp.Pool",)), Budget(">= 5x mpire", 5.0, ("mpire",))),
    ),
    Case(
        "100us",
        "{size} tasks of 100 µs busy; peers with their best chunks",
        "% of ideal",
        "spin_100_microseconds",
        {"shpool": DEFAULT, **_all(*LAZY, chunks=FINE)},
        20_000,
        5_000,
        (Budget(">= 92 %", 92.0),),
    ),
    Case(
        "1ms",
        "{size} tasks of 1 ms busy; peers with their best chunks",
        "% of ideal",
        "spin_1_millisecond",
        {"shpool": DEFAULT, **_all(*LAZY, chunks=(1, 5, 20))},
        3_000,
        600,
    ),
    Case(
        "1MB",
        "map over {size} items of 1 MB bytes, sent and returned; peers with their best chunks",
        "MB/s each way",
        "payload",
        {"shpool": DEFAULT, **_all(*LAZY, chunks=(1, 4))},
        500,
        100,
        (Budget(">= 1.0x loky", 1.0, ("loky",)),),
    ),
    Case(
        "uneven",
        "map over {size} naps of 1 to 100 ms",
        "% of ideal makespan",
        "uneven",
        {"shpool": DEFAULT, **_all(*LAZY, chunks=(1,))},
        150,
        50,
        (Budget("within 10 % of the ideal makespan", 100 / 1.1),),
    ),
    Case(
        "first-result",
        "from before the import to the first result, 2 workers; login instant, or 0.3 s",
        "ms",
        "first_result",
        _all("shpool", "shpool slow login", *LAZY),
        1,
        1,
        (
            Budget("<= loky + 50 ms", 1.0, ("loky",), plus=50.0),
            Budget(
                "slow login <= max(loky, token latency) + 50 ms",
                1.0,
                ("loky",),
                plus=50.0,
                least=SLOW_LOGIN_SECONDS * 1e3,
                who="shpool slow login",
            ),
        ),
        is_more_better=False,
    ),
    Case(
        "start-64",
        "{size} workers started, until each has answered",
        "s",
        "start",
        _all("shpool", "mp.Pool", "mpire", "pebble", "loky", "executor"),
        64,
        64,
        (Budget("<= 1.3x loky", 1.3, ("loky",)),),
        is_more_better=False,
    ),
    Case(
        "memory",
        "growth of the parent while it maps no-ops over {size} ints from a generator; chunks as in map",
        "MB",
        "memory",
        {"shpool": DEFAULT, **_all(*LAZY, chunks=(5_000,)), "mp.Pool eager": DEFAULT},
        1_000_000,
        200_000,
        (Budget("< 20 MB", 20.0),),
        is_more_better=False,
        limit=120.0,
    ),
    Case(
        "crash",
        "{size} tasks of 50 ms, one of 2 workers SIGKILLed after 0.3 s",
        "results",
        "crash",
        _all("shpool", "shpool retries=1", *LAZY),
        40,
        40,
        (
            Budget("retries=1: 40 of 40", 40.0, who="shpool retries=1"),
            Budget("retries=0: 39 of 40", 39.0),
        ),
    ),
    Case(
        "ctrl-c",
        "^C (SIGINT to the process group) with tasks of 8 s running: seconds to the end",
        "s",
        "held",
        _all("shpool", *LAZY),
        6,
        6,
        (Budget("< 1 s"),),
        is_more_better=False,
        is_interrupted=True,
    ),
)
