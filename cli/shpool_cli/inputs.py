"""The INPUT of a batch: JSON Lines, CSV or plain text, checked whole before the first job runs.

It stands with the command line, not in the library: only a shell needs its calls from a file. It reads
one line at a time, twice: once to check and to count, once to run. Both get the same bytes or an error, see `blocks`:
what is appended meanwhile belongs to the next run.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sys
import tempfile
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from shpool.errors import InputError
from shpool_cli.blocks import Blocks, unreadable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Call = tuple[tuple[Any, ...], dict[str, Any]]

# CSV fields may hold geometries as WKT; the module's own limit is 128 KiB. C longs have 32 bits on Windows.
_LONGEST_FIELD = 2**31 - 1

_CHUNK = 1 << 20  # bytes


class Format(str, Enum):
    """How the lines of an input are read."""

    JSONL = "jsonl"
    CSV = "csv"
    TEXT = "text"


# How compressed files begin, none of them like UTF-8, and what writes their content to standard output.
_COMPRESSED = {b"\x1f\x8b": "zcat", b"\xfd7zXZ\0": "xzcat", b"\x28\xb5\x2f\xfd": "zstdcat"}

_SUFFIXES = {".jsonl": Format.JSONL, ".ndjson": Format.JSONL, ".json": Format.JSONL, ".csv": Format.CSV}


class _RepeatedKeyError(ValueError):
    """A JSON object has a key twice, of which the reader would silently take the last."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _RepeatedKeyError(key)
        found[key] = value
    return found


_decode = json.JSONDecoder(object_pairs_hook=_unique).decode  # json.loads would make a decoder for every line


class Input:
    """The calls of one input.

    Args:
        stream: Its bytes, seekable.
        name: Named in errors.
        form: How to read its lines.
    """

    def __init__(self, stream: BinaryIO, name: str, form: Format) -> None:
        self._blocks = Blocks(stream, name)
        self._name = name
        self._form = form

    def check(self, *checks: Callable[[Call], None], each: Callable[[Call], None] | None = None) -> int:
        """Read everything and return the number of calls.

        Args:
            *checks: Each is given one call of each shape, and raises InputError about one that will not do.
            each: The same, and is given every call.

        Raises:
            InputError: A line cannot be read, or its arguments will not do.
        """
        count = 0
        fitting: set[object] = set()
        for count, (line, call) in enumerate(self._numbered_calls(), 1):  # noqa: B007 - the last one counts
            shape = (len(call[0]), frozenset(call[1]))
            try:
                if shape not in fitting:
                    for check in checks:
                        check(call)
                    fitting.add(shape)
                if each is not None:
                    each(call)
            except InputError as exc:
                raise InputError(self._place(line), exc.reason, exc.hint) from None
        return count

    def find(self, is_sought: Callable[[Call], bool]) -> tuple[int, Call]:
        """Return the number of the line with the first call that is sought, and the call."""
        return next((line, call) for line, call in self._numbered_calls() if is_sought(call))

    def calls(self) -> Iterator[Call]:
        """Yield positional and keyword arguments of each call, from the start.

        Raises:
            InputError: From the iteration: it was changed since it was checked.
        """
        for _, call in self._numbered_calls():
            yield call

    def _numbered_calls(self) -> Iterator[tuple[int, Call]]:
        readers = {Format.JSONL: self._from_json, Format.CSV: self._from_csv, Format.TEXT: self._from_text}
        return readers[self._form]()

    def _from_json(self) -> Iterator[tuple[int, Call]]:
        for number, line in self._lines():
            if not line.strip():
                continue
            try:
                value = _decode(line)
            except _RepeatedKeyError as exc:
                raise InputError(
                    self._place(number), f"the key {exc.key!r} stands twice", "name each key once"
                ) from None
            except RecursionError:
                raise InputError(self._place(number), "its JSON is nested too deeply", "flatten it") from None
            except ValueError as exc:
                hint = "every line must be one JSON value; for other input add --format csv or --format text"
                raise InputError(self._place(number), f"not JSON: {exc}", hint) from None
            if isinstance(value, dict):
                yield number, ((), value)
            else:
                yield number, (tuple(value) if isinstance(value, list) else (value,), {})

    def _from_csv(self) -> Iterator[tuple[int, Call]]:
        csv.field_size_limit(_LONGEST_FIELD)
        rows = csv.reader((line for _, line in self._lines()), strict=True)
        try:
            header = next((row for row in rows if "".join(row).strip() or len(row) > 1), [])  # what is not blank
            if len(set(header)) < len(header) or "" in header:
                raise InputError(
                    self._place(rows.line_num), "the header has an empty or repeated name", "name each column once"
                )
            if header and header[0].lstrip().startswith(("{", "[")):
                hint = "a CSV begins with its columns' names; for JSON Lines give --format jsonl"
                raise InputError(self._place(rows.line_num), "this header is JSON", hint)
            for row in rows:
                if row and len(row) != len(header):
                    reason = f"{len(row)} fields where the header has {len(header)}"
                    hint = "quote fields that hold a comma; an empty field still needs its comma"
                    raise InputError(self._place(rows.line_num), reason, hint)
                if row:
                    yield rows.line_num, ((), dict(zip(header, row, strict=True)))
        except csv.Error as exc:
            raise InputError(self._place(rows.line_num), f"not CSV: {exc}", "check its quotes and line ends") from None

    def _from_text(self) -> Iterator[tuple[int, Call]]:
        for number, line in self._lines():
            if line.strip():
                yield number, ((line.rstrip("\r\n"),), {})

    def _lines(self) -> Iterator[tuple[int, str]]:
        offset = 0
        for number, raw in enumerate(self._blocks.lines(), 1):
            if number == 1:
                self._refuse_compressed(raw)
            try:
                line = raw.decode()
            except UnicodeDecodeError as exc:
                reason = f"not UTF-8: byte {offset + exc.start + 1} of the input is 0x{raw[exc.start]:02x}"
                raise InputError(self._place(number), reason, "save it as UTF-8") from None
            offset += len(raw)
            yield number, line.removeprefix("\ufeff") if number == 1 else line  # spreadsheets write a BOM

    def _refuse_compressed(self, begin: bytes) -> None:
        for magic, program in _COMPRESSED.items():
            if begin.startswith(magic):
                hint = f"unpack it first, or pipe it in, for which INPUT is -: {program} FILE | shpool …"
                raise InputError(self._name, "it is compressed", hint)

    def _place(self, number: int) -> str:
        return f"{self._name}, line {number}"


@contextlib.contextmanager
def open_input(text: str, form: Format | None) -> Iterator[Input]:
    """Open the INPUT of a command line.

    What cannot be read twice, standard input or a pipe, is copied to a nameless temporary file first.

    Args:
        text: A path, or ``-`` for standard input.
        form: How to read it; None goes by the suffix: ``.jsonl``, ``.ndjson`` and ``.json`` are JSON Lines,
            ``.csv`` is CSV, everything else plain text; standard input is JSON Lines.

    Raises:
        InputError: It cannot be opened, read or copied.
    """
    with contextlib.ExitStack() as stack:
        if text == "-":
            name, default = "standard input", Format.JSONL
            if sys.stdin is None:
                raise InputError(name, "there is none", "give a file")
            stream = _spooled(stack, cast("io.BufferedReader", sys.stdin.buffer), name)  # which its type does not say
        else:
            path, name = Path(text), text
            stream, default = _opened(stack, path), _SUFFIXES.get(path.suffix.lower(), Format.TEXT)
        yield Input(stream, name, form or default)


def _opened(stack: contextlib.ExitStack, path: Path) -> BinaryIO:
    try:
        stream = stack.enter_context(path.open("rb"))
    except OSError as exc:
        raise unreadable(str(path), exc) from None
    return stream if stream.seekable() else _spooled(stack, stream, str(path))


def _spooled(stack: contextlib.ExitStack, stream: io.BufferedReader, name: str) -> BinaryIO:
    try:
        # Unbuffered: what a full disk does not take is told by the write, and by no later one.
        copy = stack.enter_context(tempfile.TemporaryFile(buffering=0))  # noqa: SIM115 - the stack closes it
        for chunk in _chunks(stream, name):
            left = memoryview(chunk)
            while left:
                left = left[copy.write(left) :]
    except OSError as exc:
        reason = f"cannot be copied to a temporary file: {exc.strerror or exc}"
        raise InputError(name, reason, "give a file, or name a folder with more room in TMPDIR") from None
    return stack.enter_context(io.BufferedReader(copy))


def _chunks(stream: io.BufferedReader, name: str) -> Iterator[bytes]:
    try:
        # Not by read(), which asks again after a short answer: on a terminal the end would have to be typed twice.
        while chunk := stream.read1(_CHUNK):
            yield chunk
    except OSError as exc:
        raise unreadable(name, exc) from None
