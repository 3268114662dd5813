from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import decimal
import enum
import io
import json
import math
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shpool.jobs import JobResult
from shpool_cli.console import CommandError, ExitCode
from shpool_cli.results import ResultWriter, open_output, to_json


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Tile:
    number: int
    when: dt.date


def done(value: object) -> JobResult:
    return JobResult(3, "k3", "done", value, None, 1, 0.25)


def written(result: JobResult) -> tuple[JobResult, dict[str, Any]]:
    stream = io.BytesIO()
    kept = ResultWriter(stream, "test").write(result)
    assert stream.getvalue().count(b"\n") == 1
    return kept, json.loads(stream.getvalue())


def test_a_line_holds_what_became_of_the_job() -> None:
    expected = {"index": 3, "key": "k3", "status": "done", "result": [1], "attempts": 1, "seconds": 0.25}
    assert written(done([1]))[1] == expected


def test_a_failed_job_has_its_error_in_words() -> None:
    failed = JobResult(3, "k3", "failed", None, ValueError("bad\ntile"), 2, 0.25)
    line = written(failed)[1]
    assert (line["status"], line["error"], line["attempts"]) == ("failed", "ValueError: bad\ntile", 2)
    assert "result" not in line


@pytest.mark.parametrize(
    ("value", "form"),
    [
        (np.float32(0.5), 0.5),
        (np.int64(7), 7),
        (np.bool_(1), True),
        (np.arange(3), [0, 1, 2]),
        (np.array([[1.5, np.nan]]), [[1.5, None]]),
        (dt.date(2024, 5, 1), "2024-05-01"),
        (dt.datetime(2024, 5, 1, 12, tzinfo=dt.timezone.utc), "2024-05-01T12:00:00+00:00"),
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


@pytest.mark.parametrize("value", [object(), {(1, 2): 3}, [lambda: 0], Tile])
def test_a_result_without_a_json_form_is_a_failed_job(value: object) -> None:
    kept, line = written(done(value))
    assert kept.status == line["status"] == "failed"
    assert "the result of job k3 has no JSON form" in line["error"]
    assert kept.result is None


def test_a_result_that_contains_itself_is_a_failed_job() -> None:
    circle: list[object] = []
    circle.append(circle)
    assert written(done(circle))[0].status == "failed"


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
