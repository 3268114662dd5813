"""Like errors are one kind, and what makes them unlike stays."""

from __future__ import annotations

import pytest

from shpool.errorkinds import kind_of_error
from shpool_cli.output.records import Record
from shpool_cli.summary import Summary


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("GET https://a.example/v1/0071 gave 503\nmore", "GET <url> gave 503"),
        ("404 Client Error: Not Found for url: https://a.example/t?x=y", "404 Client Error: Not Found for url: <url>"),
        ("https://a.example/a b.tif: HTTP 404; try later", "<url> b.tif: HTTP 404; try later"),
        ("tile 404 answered status_code=403, code 7", "tile # answered status_code=403, code 7"),
        ("[Errno 2] No such file or directory: '/in/a b/S2A_1.tif'", "[Errno 2] No such file or directory: <path>"),
        ("[Errno 28] No space left on device: 'berlin.tif'", "[Errno 28] No space left on device: <path>"),
        ("/got/t1.tif: another file has this name already", "<path>: another file has this name already"),
        ("tile 33UWP/0071 took 61.5 s", "tile <path> took # s"),
        ("the server sent application/json in place of data", "the server sent application/json in place of data"),
        ("sha256 is 0a1b, not 1a2b", "sha256 is #, not #"),
        (
            "command [cp a/b c] ended with exit status 1: cp: '/a/b': gone",
            "command [...] ended with exit status 1: cp: <path>: gone",
        ),
        ("commit 3fa85f64f00dcafe is a decade old", "commit # is a decade old"),
        ("0x7f3a2b1c4d5e", "#"),
        ("id 3FA85F64-5717-4562-B3FC-2C963F66AFA6 at 0X7F3A2B1C, layer B8A", "id # at #, layer #"),
        ("'NoneType' object has no attribute 'x'", "'NoneType' object has no attribute 'x'"),
        ("no data", "no data"),
        ("", ""),
        ("x" * 500, "x" * 200),
    ],
)
def test_kinds_of_errors(text: str, kind: str) -> None:
    assert kind_of_error(text) == kind


def test_a_summary_groups_failures_by_kind_and_tells_the_most_frequent_first() -> None:
    summary = Summary()
    errors = ["ValueError: late", *(f"TransferError: https://a.example/t{n}.tif: HTTP 404; x" for n in range(40_000))]
    errors += [f"TransferError: https://a.example/t{n}.tif: HTTP 410; x" for n in range(2)]
    for index, error in enumerate(errors):
        summary.note_failure(Record(index, "k", "failed", None, error, 1, 0.1))
    assert {kind: its["count"] for kind, its in summary.errors.items()} == {
        "ValueError: late": 1,
        "TransferError: <url>: HTTP 404; x": 40_000,
        "TransferError: <url>: HTTP 410; x": 2,
    }
    assert list(summary._failures()) == [
        "error: TransferError in 40000 jobs, first in job 1: https://a.example/t0.tif: HTTP 404; x",
        "error: TransferError in 2 jobs, first in job 40001: https://a.example/t0.tif: HTTP 410; x",
        "error: ValueError in 1 job, first in job 0: late",
    ]


def test_a_summary_tells_apart_no_more_kinds_than_it_has_memory_for() -> None:
    summary = Summary()
    for index in range(2_000):
        word = "".join(chr(97 + int(digit)) for digit in str(index))
        summary.note_failure(Record(index, "k", "failed", None, f"ValueError: no {word}", 1, 0.1))
    assert len(summary.errors) == 501
    assert summary.errors["all others"]["count"] == 1_500
