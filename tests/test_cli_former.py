from __future__ import annotations

from pathlib import Path

import pytest

from shpool_cli.output.former import first_key
from shpool_cli.output.records import Record
from shpool_cli.output.results import open_output

NAMES = ["out.jsonl", "out.csv", "out.parquet", "out.txt"]


def write(path: Path, *keys: str) -> None:
    with path.with_name("stdout").open("wb") as stdout, open_output(path, stdout) as writer:
        writer.write_records([Record(n, key, "done", '"ü\\n"', None, 1, 0.1) for n, key in enumerate(keys)])


@pytest.mark.parametrize("name", NAMES)
def test_an_output_names_its_first_job(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write(path, "a,b", "c")
    assert first_key(path) == "a,b"


@pytest.mark.parametrize("name", NAMES)
def test_an_output_without_jobs_is_one(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write(path)
    assert first_key(path) == ""


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_file_may_become_an_output(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.touch()
    assert first_key(path) == ""


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "content",
    [
        b"precious\n",
        b"\n",
        b"\xff\xfe\x00",
        b"{}\n",
        b"null\n",
        b"[1, 2, 3]\n",
        b'{"key": "k", "index": 0}\n',
        b"{broken\n",
        b'"index","key"\r\n1,2\r\n',
        b"index,key,status\r\n",
        b"index,key,status,result,error,attempts,seconds\r\n0\r\n",
        b"PAR1 and no more",
        b"[" * 200_000,
    ],
    ids=range(13),
)
def test_somebody_elses_file_is_none(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert first_key(path) is None


def first_line_of(path: Path) -> bytes:
    write(path, 'a,"b', "c")
    content = path.read_bytes()
    path.unlink()
    return content[: content.index(b"\r\n", 50) if path.suffix == ".csv" else content.index(b"\n")]


@pytest.mark.parametrize("after", [b"", b"\0" * 5000])
@pytest.mark.parametrize("name", ["out.jsonl", "out.csv"])
def test_a_file_torn_anywhere_in_its_first_line_is_an_output(tmp_path: Path, name: str, after: bytes) -> None:
    """A kill or a power loss during the first write leaves what the same command takes for its own."""
    path = tmp_path / name
    line = first_line_of(path)
    keys: list[str] = []
    for length in range(len(line)):
        path.write_bytes(line[:length] + after)
        key = first_key(path)
        assert key is not None, path.read_bytes()
        keys.append(key)
    assert set(keys) == {"", 'a,"b'}
    assert keys == sorted(keys), "the key from where it is whole"


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_zeros_is_an_output(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(bytes(100_000))
    assert first_key(path) == ""


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv"])
@pytest.mark.parametrize(
    "content",
    [
        b"precious",
        b'{"index": 0, "name": "ours"',
        b'{"index": {"key"',
        b"index,key,precious",
        b"index\r\n",
        b"index,key\r\n0",
        b"\0\0precious",
        b"in\0precious",
        b'{"in\0precious',
    ],
)
def test_somebody_elses_torn_file_is_none(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert first_key(path) is None


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv"])
def test_a_first_result_may_be_long(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with path.with_name("stdout").open("wb") as stdout, open_output(path, stdout) as writer:
        writer.write_records([Record(0, "a", "done", f'"{"x" * 500_000}"', None, 1, 0.1)])
    assert first_key(path) == "a"
    path.write_bytes(path.read_bytes()[:400_000])
    assert first_key(path) == "a"


def test_a_table_of_other_columns_is_none(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "out.parquet"
    parquet.write_table(pa.table({"key": ["a"]}), path)
    assert first_key(path) is None


def test_what_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="directory"):
        first_key(tmp_path)
