from __future__ import annotations

import pytest

from shpool.halting import Halt, HaltPolicy


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("never", HaltPolicy()),
        ("soon", HaltPolicy(Halt.SOON)),
        ("now", HaltPolicy(Halt.NOW, failures=1)),
        ("soon,fail=5", HaltPolicy(Halt.SOON, failures=5)),
        ("now,fail=10%", HaltPolicy(Halt.NOW, percent=10)),
        ("now,fail=100%", HaltPolicy(Halt.NOW, percent=100)),
    ],
)
def test_a_policy_is_read(text: str, policy: HaltPolicy) -> None:
    assert HaltPolicy.parse(text) == policy


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "later",
            "SOON",
            "soon ",
            "soon,",
            "soon,5",
            "soon,fail=",
            "soon,fail=x",
            "soon,fail=-1",
            "soon,fail=1.5",
        ),
        *("never,fail=1", "soon,fail=0", "soon,fail=00", "now,fail=0%", "now,fail=101%", "now,fail=5%%", "now,fail=٣"),
        f"now,fail={'9' * 5000}",
    ],
)
def test_a_text_that_is_no_policy_is_refused_with_what_there_is(text: str) -> None:
    with pytest.raises(ValueError, match="is none of never, soon, now, soon,fail=5, now,fail=10%"):
        HaltPolicy.parse(text)


def test_never_is_never_reached() -> None:
    assert not HaltPolicy().is_reached(100, 100)


def test_one_failure_is_enough_by_default() -> None:
    policy = HaltPolicy.parse("soon")
    assert [policy.is_reached(failed, 10) for failed in range(3)] == [False, True, True]


def test_the_failure_that_makes_it_so_many_ends_the_batch() -> None:
    policy = HaltPolicy.parse("now,fail=3")
    assert [policy.is_reached(failed, 1000) for failed in range(5)] == [False, False, False, True, True]


@pytest.mark.parametrize(("total", "enough"), [(10, 1), (11, 2), (100, 10), (1, 1)])
def test_a_share_counts_of_all_jobs(total: int, enough: int) -> None:
    policy = HaltPolicy.parse("soon,fail=10%")
    assert not policy.is_reached(enough - 1, total)
    assert policy.is_reached(enough, total)


def test_no_failure_is_never_enough() -> None:
    assert not HaltPolicy.parse("soon,fail=10%").is_reached(0, 0)
