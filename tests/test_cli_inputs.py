from __future__ import annotations

import errno
import gzip
import inspect
import io
import lzma
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest

from shpool.errors import InputError
from shpool_cli.inputs import Format, Input, open_input

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def calls(text: str | bytes, form: Format) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    data = text.encode() if isinstance(text, str) else text
    source = Input(io.BytesIO(data), "jobs", form)
    count = source.check()
    found = list(source.calls())
    assert count == len(found)
    return found


def refused(text: str | bytes, form: Format) -> str:
    with pytest.raises(InputError) as caught:
        calls(text, form)
    return str(caught.value)


def test_json_objects_are_keywords_arrays_positions_all_else_one_argument() -> None:
    text = '{"a": 1}\n[1, [2]]\n"x"\n5\nnull\n'
    assert calls(text, Format.JSONL) == [((), {"a": 1}), ((1, [2]), {}), (("x",), {}), ((5,), {}), ((None,), {})]


def test_csv_rows_are_keywords() -> None:
    text = 'name,x\nä,1\n"a,b","two\nlines"\n'
    assert calls(text, Format.CSV) == [((), {"name": "ä", "x": "1"}), ((), {"name": "a,b", "x": "two\nlines"})]


def test_text_lines_are_one_argument() -> None:
    assert calls(" a b \r\n\n \nc", Format.TEXT) == [((" a b ",), {}), (("c",), {})]


@pytest.mark.parametrize("form", list(Format))
@pytest.mark.parametrize("text", ["", "\n", "\n\n"])
def test_nothing_is_no_jobs(form: Format, text: str) -> None:
    assert calls(text, form) == []


def test_a_header_alone_is_no_jobs() -> None:
    assert calls("a,b\n", Format.CSV) == []


@pytest.mark.parametrize("form", list(Format))
def test_the_mark_of_spreadsheets_is_skipped(form: Format) -> None:
    """A byte order mark would become part of the first column's name."""
    data = b'\xef\xbb\xbf"a"\n"b"\n'
    assert "\ufeff" not in repr(calls(data, form))


def test_blank_lines_are_skipped() -> None:
    assert len(calls("\n1\n\n2\n", Format.JSONL)) == 2
    assert len(calls("a\n\n1\n\n2\n", Format.CSV)) == 2


@pytest.mark.parametrize("blank", ["\n", "\r\n\r\n", "  \n\n"])
def test_blank_lines_before_a_header_are_skipped(blank: str) -> None:
    assert calls(f"{blank}a,b\n1,2\n", Format.CSV) == [((), {"a": "1", "b": "2"})]
    line = 1 + blank.count("\n")
    assert f"jobs, line {line}: the header" in refused(f"{blank}a,a\n1,2\n", Format.CSV)
    assert refused(f"{blank}a,b\n1\n", Format.CSV).startswith(f"jobs, line {line + 1}: 1 fields where the header has 2")


@pytest.mark.parametrize("line", ["{", "a", "1 2", "{'a': 1}", "[" * 100_000])
def test_a_line_that_is_not_json_is_named(line: str) -> None:
    assert refused(f"1\n\n{line}\n4\n", Format.JSONL).startswith("jobs, line 3: ")


@pytest.mark.parametrize("line", ['{"a": 1, "b": 2, "a": 3}', '[{"x": {"a": 1, "a": 1}}]'])
def test_a_key_that_stands_twice_is_named(line: str) -> None:
    assert refused(f"1\n{line}\n", Format.JSONL).startswith("jobs, line 2: the key 'a' stands twice")


@pytest.mark.parametrize(("row", "fields"), [("1", 1), ("1,2,3", 3)])
def test_a_row_of_another_length_is_named(row: str, fields: int) -> None:
    assert refused(f"a,b\n1,2\n{row}\n", Format.CSV).startswith(f"jobs, line 3: {fields} fields where the header has 2")


@pytest.mark.parametrize("header", ["a,a", "a,", ","])
def test_columns_need_names_of_their_own(header: str) -> None:
    assert "jobs, line 1: the header" in refused(f"{header}\n1,2\n", Format.CSV)


@pytest.mark.parametrize("text", ['{"a": 1}\n', '{"a": 1, "b": 2}\n{"a": 3, "b": 4}\n', "[1, 2]\n", " [[1]]\n[[2]]\n"])
def test_json_that_is_called_csv_is_named(text: str) -> None:
    """Else its first line is a header, and a file of one line no jobs."""
    told = refused(text, Format.CSV)
    assert "jobs, line 1" in told
    assert "--format jsonl" in told


def test_an_open_quote_is_named() -> None:
    assert "not CSV" in refused('a,b\n1,"2\n', Format.CSV)


@pytest.mark.parametrize("form", list(Format))
def test_bytes_that_are_not_utf8_are_named(form: Format) -> None:
    first = b'"x"\n'
    message = refused(first + b'"caf\xe9"\n', form)
    assert message.startswith("jobs, line 2: not UTF-8: byte 9 of the input is 0xe9")


@pytest.mark.parametrize("form", Format)
@pytest.mark.parametrize(("compress", "program"), [(gzip.compress, "zcat"), (lzma.compress, "xzcat")])
def test_what_is_compressed_is_said_to_be_that(compress: Callable[[bytes], bytes], program: str, form: Format) -> None:
    told = refused(compress(b"1\n2\n"), form)
    assert (
        told
        == f"jobs: it is compressed; unpack it first, or pipe it in, for which INPUT is -: {program} FILE | shpool …"
    )


def test_a_long_csv_field_is_read() -> None:
    """Geometries are longer than the 128 KiB that the csv module allows."""
    text = "9" * 300_000
    assert calls(f"wkt\n{text}\n", Format.CSV) == [((), {"wkt": text})]


def test_a_line_that_fails_a_check_is_named() -> None:
    def fetch(tile: str, *, size: int = 1) -> None: ...

    source = Input(io.BytesIO(b'{"tile": "a"}\n\n{"tile": "b", "zise": 2}\n'), "jobs", Format.JSONL)

    def fits(call: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        try:
            inspect.signature(fetch).bind(*call[0], **call[1])
        except TypeError as error:
            raise InputError("elsewhere", str(error), "look at the function") from None

    with pytest.raises(InputError, match=r"jobs, line 3: .*'zise'.*; look at the function"):
        source.check(fits)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("a.jsonl", Format.JSONL),
        ("a.NDJSON", Format.JSONL),
        ("a.json", Format.JSONL),
        ("a.csv", Format.CSV),
        ("a.txt", Format.TEXT),
        ("a", Format.TEXT),
    ],
)
def test_the_suffix_tells_the_format(tmp_path: Path, name: str, form: Format) -> None:
    path = tmp_path / name
    path.write_text('"a"\n"b"\n')
    expected = calls('"a"\n"b"\n', form)
    with open_input(str(path), None) as source:
        assert list(source.calls()) == expected
    with open_input(str(path), Format.TEXT) as source:
        assert next(iter(source.calls())) == (('"a"',), {})


@pytest.mark.parametrize("name", ["missing.csv", "."])
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(InputError, match="cannot be read"), open_input(str(path), None):
        pass


def test_what_opens_and_cannot_be_read_is_named() -> None:
    """As a file on a disk that fails: nothing is mapped at the begin of a process's memory."""
    with open_input("/proc/self/mem", None) as source, pytest.raises(InputError, match=r"mem: cannot be read: Input/"):
        source.check()


class Failing(io.BytesIO):
    """A file on a disk that begins to fail."""

    fails = False

    def read(self, size: int | None = -1, /) -> bytes:
        if self.fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().read(size)


def test_what_cannot_be_read_any_more_ends_the_reading() -> None:
    stream = Failing(b"".join(b"%d\n" % number for number in range(50_000)))
    source = Input(stream, "jobs", Format.JSONL)
    assert source.check() == 50_000
    calls = source.calls()
    assert next(calls) == ((0,), {})
    stream.fails = True
    with pytest.raises(InputError, match="jobs: cannot be read: Input/output error"):
        list(calls)


@pytest.mark.parametrize("form", list(Format))
@pytest.mark.parametrize("more", ["0\n5\n", "\n5\n6", "\xff{broken", '"broken', "\n1,2,3\n"])
def test_what_is_appended_after_the_check_is_for_the_next_run(tmp_path: Path, form: Format, more: str) -> None:
    """Also where the last line was half a line then: it is the line that was checked."""
    path = tmp_path / "jobs"
    path.write_text("3\n4")
    with open_input(str(path), form) as source:
        count = source.check()
        found = list(source.calls())
        with path.open("a", encoding="latin-1") as file:
            file.write(more)
        assert list(source.calls()) == found == list(source.calls())
        assert len(found) == count


@pytest.mark.parametrize("form", list(Format))
@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: text[:-1],
        lambda text: f"7\n{text[2:]}",
        lambda text: f"7\n{text}",
        lambda text: f"{text[:-2]}8\n",
    ],
    ids=["emptied", "cut", "without its last byte", "another first line", "with a line before", "another last line"],
)
def test_what_is_not_there_any_more_ends_the_reading(
    tmp_path: Path, form: Format, change: Callable[[str], str]
) -> None:
    """A line of which a half is left, or another in its place, was never checked: no job is made of it."""
    path = tmp_path / "jobs"
    lines = [f"{number:07}" if form is not Format.JSONL else f"{number}" for number in range(20_000)]
    text = "".join(f"{line}\n" for line in lines)
    path.write_text(text)
    with open_input(str(path), form) as source:
        count = source.check()
        found = list(source.calls())
        path.write_text(change(text))
        again: list[Any] = []
        with pytest.raises(InputError, match=r"jobs: it was changed during the run; .*appended"):
            again.extend(source.calls())
    assert again == found[: len(again)]
    assert len(again) < count


def test_what_was_read_already_may_go(tmp_path: Path) -> None:
    """As where jobs are taken from a file that is emptied once the last of them runs."""
    path = tmp_path / "jobs"
    path.write_text("3\n4\n")
    with open_input(str(path), Format.TEXT) as source:
        source.check()
        calls = source.calls()
        assert next(calls) == (("3",), {})
        path.write_text("")
        assert list(calls) == [(("4",), {})]


def test_readings_do_not_disturb_each_other() -> None:
    source = Input(io.BytesIO(b"".join(b"%d\n" % number for number in range(50_000))), "jobs", Format.JSONL)
    source.check()
    assert all(one == other for one, other in zip(source.calls(), source.calls(), strict=True))


def test_a_pipe_can_be_read_twice(tmp_path: Path) -> None:
    """As in ``shpool run f <(make-jobs)``: the check must not use it up."""
    path = tmp_path / "jobs.jsonl"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=("1\n2\n",))
    writer.start()
    with open_input(str(path), None) as source:
        assert source.check() == 2
        assert [args for args, _ in source.calls()] == [(1,), (2,)]
    writer.join()
