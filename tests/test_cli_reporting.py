from __future__ import annotations

import io
import json
import threading
from typing import Any

import pytest

from shpool.progress import Progress
from shpool_cli.console import CommandError, ExitCode
from shpool_cli.output.records import JsonLines, Record
from shpool_cli.output.results import ResultWriter
from shpool_cli.output.sinks import StreamSink
from shpool_cli.reporting import Ready, Report
from shpool_cli.summary import Summary


def record(index: int, error: str | None = None) -> Record:
    return Record(index, f"k{index}", "failed" if error else "done", None if error else "1", error, 1, 0.1)


class Told:
    """A report, and what it has said."""

    def __init__(self, *, ordered: bool = False, first: int = 0) -> None:
        self.stream = io.BytesIO()
        self.summary = Summary()
        self.bar = Progress(None, desc="test", enabled=False)
        writer = ResultWriter(StreamSink(self.stream, JsonLines(), "test"))
        self.report = Report(writer, self.summary, self.bar, ordered=ordered, first=first)

    @property
    def indexes(self) -> list[int]:
        return [json.loads(line)["index"] for line in self.stream.getvalue().splitlines()]

    @property
    def counts(self) -> tuple[int, int, int]:
        return self.summary.done, self.summary.failed, self.summary.skipped


def test_records_are_written_and_counted() -> None:
    told = Told()
    told.report.tell([record(1), record(0, "ValueError: bad")])
    told.report.tell([record(2)])
    assert told.indexes == [1, 0, 2]
    assert told.counts == (2, 1, 0)
    assert (told.bar.done_count, told.bar.failed_count) == (2, 1)


def test_what_is_skipped_is_counted_and_not_written() -> None:
    told = Told()
    told.report.skip(0)
    assert (told.indexes, told.counts) == ([], (0, 0, 1))


def test_in_order_they_wait_for_those_before_them_and_count_at_once() -> None:
    told = Told(ordered=True)
    told.report.tell([record(3)])
    told.report.skip(1)
    told.report.tell([record(2)])
    assert (told.indexes, told.counts) == ([], (2, 0, 1))
    told.report.tell([record(0)])
    assert told.indexes == [0, 2, 3]


def test_what_was_done_before_stands_in_its_place() -> None:
    """Of what is in the output already there is no record; the others come among those of this run."""
    told = Told(ordered=True, first=1)
    told.report.tell_before(0, None)
    told.report.tell_before(2, record(2))
    told.report.tell([record(1)])
    assert told.indexes == [1, 2]
    assert told.counts == (1, 0, 0)


def test_a_flush_writes_what_waits() -> None:
    told = Told(ordered=True)
    told.report.tell([record(3), record(1)])
    told.report.flush()
    assert told.indexes == [1, 3]


def test_a_flush_without_an_order_writes_nothing() -> None:
    told = Told()
    told.report.flush()
    assert told.indexes == []


def test_what_is_not_written_is_not_counted() -> None:
    told = Told()
    told.stream.close()
    with pytest.raises((CommandError, ValueError)):
        told.report.tell([record(0)])
    assert told.counts == (0, 0, 0)


def test_threads_do_not_mix_lines_or_counts() -> None:
    """The journal tells of ends while the run tells of what was done before."""
    told = Told(ordered=True)
    gate = threading.Barrier(4)

    def tell(part: int) -> None:
        gate.wait(30)
        for index in range(part, 400, 4):
            told.report.tell([record(index)])

    threads = [threading.Thread(target=tell, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert told.indexes == list(range(400))
    assert told.counts == (400, 0, 0)


@pytest.mark.parametrize(
    ("limit", "counts", "code"),
    [
        (None, {"done": 5}, ExitCode.OK),
        (None, {"done": 2, "before": 1, "skipped": 2}, ExitCode.OK),
        (None, {"done": 4}, ExitCode.FAILED),
        (4, {"done": 4}, ExitCode.OK),
        (4, {"done": 3, "failed": 1}, ExitCode.FAILED),
        (4, {"done": 3, "halted": "stopped"}, ExitCode.FAILED),
    ],
)
def test_all_is_well_only_where_every_job_that_was_asked_for_has_come_to_its_end(
    limit: int | None, counts: dict[str, Any], code: ExitCode
) -> None:
    """Whatever has left one out."""
    assert Summary(jobs=5, **counts, limit=limit).outcome is code


def test_what_is_ready_is_told_together_when_nothing_else_is() -> None:
    told = Told()
    with Ready(told.report) as ready:
        ready.add(record(0))
        ready.add(record(1))
        assert told.indexes == []
        ready.tell()
        assert told.indexes == [0, 1]
        ready.tell()
        ready.add(record(2))
    assert told.indexes == [0, 1, 2], "the end tells the last"


def test_what_is_ready_waits_for_a_few_others_only() -> None:
    told = Told()
    ready = Ready(told.report)
    for index in range(100):
        ready.add(record(index))
        assert index - len(told.indexes) < 32


def test_a_long_result_does_not_wait_in_memory() -> None:
    told = Told()
    ready = Ready(told.report)
    ready.add(record(0))
    ready.add(Record(1, "k1", "done", f'"{10_000 * "x"}"', None, 1, 0.1))
    assert told.indexes == [0, 1]
