from __future__ import annotations

import pytest
import typer

from shpool.halting import Halt, HaltPolicy
from shpool_cli.options import at_least, duration, halt_policy


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90.0),
        ("1.5s", 1.5),
        ("15m", 900.0),
        ("48h", 172_800.0),
        ("2d", 172_800.0),
        (" 3 m ", 180.0),
        ("0.1", 0.1),
    ],
)
def test_a_time_is_read_in_its_unit(text: str, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    ["", "0", "0s", "0.0h", "-1", "soon", "1w", "1h30m", "1e3", ".5", "5.", "nan", "inf", "٣", "21d", "9" * 400],
)
def test_a_time_that_is_none_is_named(text: str) -> None:
    """The longest is what every wait of the system takes."""
    with pytest.raises(typer.BadParameter, match="is no time of more than 0 and at most 20d, such as 90, 15m or 48h"):
        duration(text)


@pytest.mark.parametrize("text", ["1000000001", "9" * 30])
def test_a_number_without_sense_is_named(text: str) -> None:
    with pytest.raises(typer.BadParameter, match=f"'{text}' is more than 1000000000"):
        at_least(0)(text)


def test_a_number_of_at_least_so_much_is_read() -> None:
    assert [at_least(0)("0"), at_least(1)("1"), at_least(1)(" 20 ")] == [0, 1, 20]


@pytest.mark.parametrize(("least", "text"), [(1, "0"), (0, "-1"), (1, "1.5"), (1, "many"), (1, "")])
def test_a_number_that_is_none_is_named(least: int, text: str) -> None:
    with pytest.raises(typer.BadParameter, match=f"'{text}' is not a whole number of at least {least}"):
        at_least(least)(text)


def test_a_default_is_read_like_what_is_given() -> None:
    """The parser hands over defaults in their own type."""
    assert at_least(0)(0) == 0  # type: ignore[arg-type]  # as the parser does
    assert duration(2.0) == 2.0  # type: ignore[arg-type]  # as the parser does


def test_a_halt_policy_is_read() -> None:
    assert halt_policy("soon,fail=2") == HaltPolicy(Halt.SOON, failures=2)


def test_a_halt_policy_that_is_none_is_bad_usage() -> None:
    with pytest.raises(typer.BadParameter, match="'later' is none of never, soon, now"):
        halt_policy("later")
