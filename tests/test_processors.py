"""How many processors this process may use."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import loky
import pytest

from shpool.processors import processor_count

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be on a large machine."""
    monkeypatch.delenv("LOKY_MAX_CPU_COUNT", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(32)), raising=False)


def test_it_is_what_loky_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the default number of workers is loky's own."""
    monkeypatch.undo()
    assert processor_count() == loky.cpu_count()


def test_those_it_is_bound_to_count(tmp_path: Path) -> None:
    assert processor_count(tmp_path) == 32


def test_a_user_may_ask_for_fewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "3")
    assert processor_count(tmp_path) == 3


@pytest.mark.parametrize(("text", "count"), [("250000 100000\n", 3), ("max 100000\n", 32), ("1000 100000", 1)])
def test_a_containers_limit_counts(tmp_path: Path, text: str, count: int) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert processor_count(tmp_path) == count


@pytest.mark.parametrize(("quota", "count"), [("200000\n", 2), ("-1\n", 32)])
def test_an_older_kernels_limit_counts(tmp_path: Path, quota: str, count: int) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota)
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert processor_count(tmp_path) == count
