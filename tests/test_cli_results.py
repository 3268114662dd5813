from __future__ import annotations

import contextlib
import csv
import dataclasses
import datetime as dt
import decimal
import enum
import io
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from pyarrow import parquet

from shpool.jobs import JobResult
from shpool_cli.console import CommandError, ExitCode
from shpool_cli.output.draft import Draft
from shpool_cli.output.jsonform import to_json
from shpool_cli.output.records import COLUMNS, JsonLines, Record, cell, recorded
from shpool_cli.output.results import ResultWriter, open_output
from shpool_cli.output.sinks import StreamSink

if TYPE_CHECKING:
    from collections.abc import Iterator


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Tile:
    number: int
    when: dt.date


class Listless:
    def tolist(self) -> list[int]:
        raise RuntimeError("no list")


class MuteError(Exception):
    def __str__(self) -> str:
        raise RuntimeError


def unset() -> Tile:
    tile = Tile(1, dt.date(2024, 5, 1))
    del tile.when
    return tile


def done(value: object) -> JobResult:
    return JobResult(3, "k3", "done", value, None, 1, 0.25)


def written(result: JobResult) -> tuple[JobResult, dict[str, Any]]:
    stream = io.BytesIO()
    kept = ResultWriter(StreamSink(stream, JsonLines(), "test")).write(result)
    assert stream.getvalue().count(b"\n") == 1
    return kept, json.loads(stream.getvalue())


def test_a_line_holds_what_became_of_the_job() -> None:
    expected = {"index": 3, "key": "k3", "status": "done", "result": [1], "attempts": 1, "seconds": 0.25}
    assert written(done([1]))[1] == expected


def test_a_failed_job_has_its_error_in_words() -> None:
    line = written(failed())[1]
    assert (line["status"], line["error"], line["attempts"]) == ("failed", "ValueError: bad\ntile", 2)
    assert "result" not in line


@pytest.mark.parametrize(
    ("value", "form"),
    [
        (np.float32(0.5), 0.5),
        (np.int64(7), 7),
        (np.bool_(1), True),
        (np.longdouble("0.5"), 0.5),
        (np.array([0.5, np.nan], np.longdouble), [0.5, None]),
        (np.arange(3), [0, 1, 2]),
        (np.array([[1.5, np.nan]]), [[1.5, None]]),
        (dt.date(2024, 5, 1), "2024-05-01"),
        (dt.datetime(2024, 5, 1, 12, tzinfo=dt.timezone.utc), "2024-05-01T12:00:00+00:00"),
        (dt.timedelta(minutes=1, milliseconds=500), 60.5),
        (np.timedelta64(1_500_000_000, "ns"), 1.5),
        (np.array([90], "timedelta64[s]"), [90.0]),
        (np.datetime64("2024-05-01T12:00", "ns"), "2024-05-01T12:00:00"),
        (Path("a") / "b", str(Path("a") / "b")),
        (b"abc", "YWJj"),
        (Tile(1, dt.date(2024, 5, 1)), {"number": 1, "when": "2024-05-01"}),
        (Colour.RED, "red"),
        ({3, 1}, [1, 3]),
        ((1, 2), [1, 2]),
        (decimal.Decimal("1.10"), "1.10"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        ({"mean": math.nan, "most": math.inf}, {"mean": None, "most": None}),
        (None, None),
    ],
)
def test_what_functions_return_becomes_json(value: object, form: object) -> None:
    assert json.loads(to_json(value)) == form


@pytest.mark.parametrize("value", [object(), {(1, 2): 3}, [lambda: 0], Tile, Listless(), unset(), np.clongdouble(1)])
def test_a_result_without_a_json_form_is_a_failed_job(value: object) -> None:
    kept, line = written(done(value))
    assert kept.status == line["status"] == "failed"
    assert "the result of job k3 has no JSON form" in line["error"]
    assert kept.result is None


def test_what_a_result_raises_while_it_is_written_is_the_jobs_error() -> None:
    error = written(done(Listless()))[1]["error"]
    expected = "the result of job k3 has no JSON form: RuntimeError: no list; return plain values"
    assert error == f"TypeError: {expected}"


def test_an_error_without_a_text_is_written() -> None:
    kept, line = written(JobResult(4, "k4", "failed", None, MuteError(), 2, 0.25))
    assert kept.status == line["status"] == "failed"
    assert line["error"] == "MuteError: (it has no text: its __str__ raised RuntimeError)"


def test_a_result_that_contains_itself_is_a_failed_job() -> None:
    circle: list[object] = []
    circle.append(circle)
    assert written(done(circle))[0].status == "failed"


def failed(text: str = "bad\ntile") -> JobResult:
    return JobResult(4, "k4", "failed", None, ValueError(text), 2, 0.25)


def lines_of(path: Path) -> list[Any]:
    text = path.read_text()
    assert not text or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def keys_of(path: Path) -> list[str]:
    return [line["key"] for line in lines_of(path)]


def records(*numbers: int) -> list[Record]:
    return [Record(number, f"k{number}", "done", "1", None, 1, 0.5) for number in numbers]


def test_a_file_gets_each_line_at_once(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with open_output(path, io.BytesIO()) as writer:
        for count in range(1, 4):
            writer.write(done(count))
            assert len(path.read_text().splitlines()) == count


def test_a_file_that_holds_something_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("precious\n")
    with pytest.raises(CommandError, match="not empty"), open_output(path, io.BytesIO()):
        pass
    assert path.read_text() == "precious\n"


def test_an_error_before_the_first_line_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt), open_output(path, io.BytesIO()):
        raise KeyboardInterrupt
    assert not path.exists()


def test_an_interruption_keeps_the_lines(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with contextlib.suppress(KeyboardInterrupt), open_output(path, io.BytesIO()) as writer:
        writer.write(done(1))
        raise KeyboardInterrupt
    assert len(path.read_text().splitlines()) == 1


def test_a_folder_that_is_not_there_is_bad_usage(tmp_path: Path) -> None:
    with (
        pytest.raises(CommandError, match="cannot write to") as caught,
        open_output(tmp_path / "a" / "b", io.BytesIO()),
    ):
        pass
    assert caught.value.code == ExitCode.USAGE


def test_a_full_disk_is_told() -> None:
    with (
        open_output(Path("/dev/full"), io.BytesIO()) as writer,
        pytest.raises(CommandError, match="No space") as caught,
    ):
        writer.write(done(1))
    assert caught.value.code == ExitCode.FAILED


@pytest.mark.parametrize("value", [1, "a", None, {"a": [1.5, "ü"]}, "\ud800"])
def test_a_records_line_is_what_json_would_write(tmp_path: Path, value: object) -> None:
    with open_output(tmp_path / "out.jsonl", io.BytesIO()) as writer:
        writer.write_records([recorded(done(value))[1], recorded(failed())[1]])
    first, second = lines_of(tmp_path / "out.jsonl")
    assert first == {"index": 3, "key": "k3", "status": "done", "result": value, "attempts": 1, "seconds": 0.25}
    assert list(first) == ["index", "key", "status", "result", "attempts", "seconds"]
    assert second["error"] == "ValueError: bad\ntile"


def test_a_suffix_that_promises_another_form_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(CommandError, match=r"no results can be written as \.xlsx"),
        open_output(tmp_path / "out.xlsx", io.BytesIO()),
    ):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["out", "out.txt", "out.json", "out.ndjson", "out.JSONL"])
def test_json_lines_are_the_form_of_all_other_suffixes(tmp_path: Path, name: str) -> None:
    with open_output(tmp_path / name, io.BytesIO()) as writer:
        writer.write(done(1))
    assert keys_of(tmp_path / name) == ["k3"]


def test_a_line_is_one_write_of_one_line(tmp_path: Path) -> None:
    """A size seen between two writes is always at a line's end; 200 kB would go in pieces through a buffer."""
    path = tmp_path / "out.jsonl"
    with open_output(path, io.BytesIO()) as writer:
        for size in (10, 200_000, 10):
            writer.write(done("x" * size))
            assert path.read_bytes().endswith(b"}\n")


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    """A limit on the size of files cuts a write short, as a disk that fills up does."""
    path = tmp_path / "out.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with open_output(path, io.BytesIO()) as writer:
            writer.write(done(1))
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
            with pytest.raises(CommandError, match="File too large"):
                writer.write(done("x" * 2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert keys_of(path) == ["k3"]


def test_csv_has_a_header_and_a_row_per_job(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    values = ["a.tif", 0.5, True, None, {"a": 1}, 'say "x, y"', "two\nlines", "\r", "\ud800"]
    with open_output(path, io.BytesIO()) as writer:
        for value in values:
            writer.write(done(value))
        writer.write(failed())
    with path.open(newline="", encoding="utf-8") as stream:
        header, *rows = csv.reader(stream)
    assert tuple(header) == COLUMNS
    shown = ["a.tif", "0.5", "true", "", '{"a": 1}', 'say "x, y"', "two\nlines", "\r", "\\ud800"]
    assert [row[3] for row in rows[:-1]] == shown
    assert rows[0] == ["3", "k3", "done", "a.tif", "", "1", "0.25"]
    assert rows[-1] == ["4", "k4", "failed", "", "ValueError: bad\ntile", "2", "0.25"]


def test_csv_without_jobs_is_a_header(tmp_path: Path) -> None:
    with open_output(tmp_path / "out.csv", io.BytesIO()):
        pass
    assert (tmp_path / "out.csv").read_text() == ",".join(COLUMNS) + "\n"


def test_an_error_before_the_first_row_leaves_no_file(tmp_path: Path) -> None:
    for name in ("out.csv", "out.parquet"):
        with pytest.raises(KeyboardInterrupt), open_output(tmp_path / name, io.BytesIO()):
            raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("text", "shown"), [('"a"', "a"), ("1", "1"), ("[1]", "[1]"), ("null", None), (None, None)])
def test_a_cell_is_text_where_the_result_is(text: str | None, shown: str | None) -> None:
    assert cell(text) == shown


def test_parquet_has_typed_columns(tmp_path: Path) -> None:
    path = tmp_path / "out.parquet"
    with open_output(path, io.BytesIO()) as writer:
        writer.write(done({"a": 1}))
        writer.write(done("\ud800"))
        writer.write(failed())
        assert not path.exists()
    table = parquet.read_table(path)
    assert tuple(table.column_names) == COLUMNS
    assert table.column("index").to_pylist() == [3, 3, 4]
    assert table.column("result").to_pylist() == ['{"a": 1}', "\\ud800", None]
    assert table.column("error").to_pylist() == [None, None, "ValueError: bad\ntile"]
    assert table.column("seconds").to_pylist() == [0.25] * 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.parquet"]


def test_parquet_is_written_in_bounded_groups(tmp_path: Path) -> None:
    path = tmp_path / "out.parquet"
    with open_output(path, io.BytesIO()) as writer:
        writer.write_records(records(*range(20_001)))
        writer.write_records(
            dataclasses.replace(record, result=json.dumps("x" * 8_500_000)) for record in records(1, 2, 3)
        )
    content = parquet.ParquetFile(path)
    assert [content.metadata.row_group(n).num_rows for n in range(content.num_row_groups)] == [20_000, 2, 1, 1]
    content.close()


def test_an_interruption_keeps_what_parquet_has(tmp_path: Path) -> None:
    path = tmp_path / "out.parquet"
    with contextlib.suppress(KeyboardInterrupt), open_output(path, io.BytesIO()) as writer:
        writer.write(done(1))
        raise KeyboardInterrupt
    assert parquet.read_table(path).num_rows == 1


def test_parquet_without_pyarrow_is_told_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with (
        pytest.raises(CommandError, match="needs pyarrow") as caught,
        open_output(tmp_path / "a.parquet", io.BytesIO()),
    ):
        pass
    assert "shpool[parquet]" in caught.value.hint
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv", "out.parquet"])
def test_a_file_with_content_is_not_touched_by_any_form(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("precious\n")
    with pytest.raises(CommandError, match="not empty"), open_output(path, io.BytesIO()):
        pass
    assert path.read_text() == "precious\n"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_resumed_run_replaces_the_file_once_it_has_caught_up(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text('{"key": "old"}\n')
    path.chmod(0o640)
    seen = []

    def former() -> Iterator[Record]:
        for record in records(1, 2):
            seen.append(keys_of(path))
            yield record

    with open_output(path, io.BytesIO(), replace=True) as writer:
        assert keys_of(path) == ["old"]
        writer.catch_up(former())
        assert keys_of(path) == ["k1", "k2"]
        writer.write(done(1))
        assert keys_of(path) == ["k1", "k2", "k3"]
    assert seen == [["old"], ["old"]]
    assert path.stat().st_mode & 0o777 == 0o640
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv", "out.parquet"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, None])
def test_an_old_file_stays_if_catching_up_is_cut_off_or_never_begins(
    tmp_path: Path, name: str, error: type[BaseException] | None
) -> None:
    path = tmp_path / name
    path.write_text("old\n")

    def cut_off() -> Iterator[Record]:
        yield from records(*range(2000))
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt), open_output(path, io.BytesIO(), replace=True) as writer:
        if error is not None:
            writer.catch_up(cut_off())
    assert path.read_text() == "old\n"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_resumed_parquet_file_is_replaced_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "out.parquet"
    with open_output(path, io.BytesIO()) as writer:
        writer.write_records(records(1))
    with contextlib.suppress(KeyboardInterrupt), open_output(path, io.BytesIO(), replace=True) as writer:
        writer.catch_up(records(1, 2))
        writer.write(done(1))
        assert parquet.read_table(path).num_rows == 1
        raise KeyboardInterrupt
    assert parquet.read_table(path).column("key").to_pylist() == ["k1", "k2", "k3"]


def test_a_link_stays_a_link_to_the_replaced_file(tmp_path: Path) -> None:
    (tmp_path / "real.jsonl").write_text("old\n")
    (tmp_path / "link.jsonl").symlink_to("real.jsonl")
    with open_output(tmp_path / "link.jsonl", io.BytesIO(), replace=True) as writer:
        writer.catch_up(records(1))
    assert (tmp_path / "link.jsonl").is_symlink()
    assert keys_of(tmp_path / "real.jsonl") == ["k1"]


def test_a_resumed_run_without_a_file_begins_one(tmp_path: Path) -> None:
    with open_output(tmp_path / "out.jsonl", io.BytesIO(), replace=True) as writer:
        writer.write(done(1))
    assert keys_of(tmp_path / "out.jsonl") == ["k3"]


def test_standard_output_and_devices_are_never_replaced() -> None:
    stream = io.BytesIO()
    with open_output(None, stream, replace=True) as writer:
        writer.catch_up(records(1))
    assert json.loads(stream.getvalue())["key"] == "k1"
    with open_output(Path("/dev/null"), stream, replace=True) as writer:
        writer.catch_up(records(1))
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("second", [True, False])
@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_two_runs_on_one_file_are_refused(tmp_path: Path, name: str, *, first: bool, second: bool) -> None:
    path = tmp_path / name
    with open_output(path, io.BytesIO(), replace=first) as writer:
        refuses_another_run(path, replace=second)
        writer.write(done(1))
        refuses_another_run(path, replace=second)
    assert path.stat().st_size
    assert len(list(tmp_path.iterdir())) == 1


def refuses_another_run(path: Path, *, replace: bool) -> None:
    with (
        pytest.raises(CommandError, match="another run is writing"),
        open_output(path, io.BytesIO(), replace=replace),
    ):
        pass


def test_what_a_killed_run_left_beside_the_file_is_taken_over(tmp_path: Path) -> None:
    left = tmp_path / ".out.jsonl.shpool-draft"
    left.write_text("half a li")
    draft = Draft(tmp_path / "out.jsonl")
    assert draft.path == left
    draft.publish()
    os.close(draft.descriptor)
    assert [entry.read_text() for entry in tmp_path.iterdir()] == [""]


RESUMES = """
import io, sys
from pathlib import Path
from shpool_cli.output.records import Record
from shpool_cli.output.results import open_output

def record(number):
    return Record(number, f"k{number}", "done", '"' + "x" * 100 + '"', None, 1, 0.5)

count = int(sys.argv[2])
print(flush=True)
with open_output(Path(sys.argv[1]), io.BytesIO(), replace=True) as writer:
    writer.catch_up(map(record, range(count)))
    for number in range(count, 10**9):
        writer.write_records([record(number)])
"""


@pytest.mark.slow
def test_a_run_killed_at_any_moment_leaves_whole_lines_and_can_be_resumed(
    tmp_path: Path, child_env: dict[str, str]
) -> None:
    path = tmp_path / "out.jsonl"
    count = 0
    for round_ in range(12):
        line = [sys.executable, "-c", RESUMES, str(path), str(count)]
        with subprocess.Popen(line, env=child_env, stdout=subprocess.PIPE) as run:
            assert run.stdout is not None
            run.stdout.readline()
            time.sleep(round_ % 4 * 0.02)
            run.kill()
        if path.exists():
            found = keys_of(path)
            assert found == [f"k{number}" for number in range(len(found))]
            assert len(found) >= count
            count = len(found)
    assert count
