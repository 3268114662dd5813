"""Templates of shell commands: their fields, and whether a value can be quoted safely where each of them stands.

Rules. What breaks one is refused before anything runs, so that no value ever becomes part of the shell's program:

1. ``{name}`` is the job's keyword argument of that name, ``{0}`` its first positional one, ``{}`` the same as ``{0}``.
   ``{{`` and ``}}`` are braces for the shell. There are no format specifications, conversions or attributes.
2. Each value is put between single quotes, always: unquoted, ``echo {count}>log`` with 2 would redirect descriptor 2.
3. So a field must stand where quotes begin a quoted string: not inside quotes, which a value could end; not after a
   dollar or backslash, which would change the quotes' meaning; not in a comment, ``${...}``, ``$((...))`` or
   backquotes, where they have none. ``$(...)`` begins anew, inside double quotes too.
4. What would make a reader lose track of the quotes is refused anywhere: here-documents, ``$'...'``, and ``case`` along
   with ``$(...)``, as its patterns end in a lone parenthesis. So is what bash, which some systems have as ``/bin/sh``,
   adds to compute with: ``((...))``, ``$[...]`` and ``[[ ... ]]`` run what stands in a value even where it is quoted.

What the quotes cannot know: a command that reads its arguments as a program (``sh -c``, ``ssh``, ``eval``) reads the
value as a program, and one that takes options takes a value that begins with a dash for one; write ``./{name}``.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from shpool.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

_NAME = re.compile(r"[^\W\d][\w -]*")  # a CSV header's names may hold spaces and dashes
_POSITION = re.compile(r"\d{1,4}")
_WHERE = "the command"
_LONGEST_SHOWN = 120  # characters of a template in an error
# MAX_ARG_STRLEN of Linux, execve(2): 32 pages for one argument, its final NUL included.
LONGEST_COMMAND = 32 * 4096 - 1  # bytes


@dataclass(frozen=True)
class Field:
    """A place in a template for a job's argument: a keyword's name, or a position from 0."""

    key: str | int

    def __str__(self) -> str:
        return f"{{{self.key}}}"


def parse(template: str) -> tuple[str | Field, ...]:
    """Cut a template into the shell's own text and the fields between.

    Raises:
        InputError: It is empty, its quotes or braces do not match, or a field stands where no value is safe.

    >>> parse("convert {src} {0}.tif")
    ('convert ', Field(key='src'), ' ', Field(key=0), '.tif')
    """
    if not template.strip():
        refuse("it is empty", "give what /bin/sh should run, such as 'wget {url}'")
    pieces: list[str | Field] = []
    reader = _Reader(template)
    for piece in _pieces(template):
        if isinstance(piece, Field):
            reader.check_field(piece)
            pieces.append(piece)
            continue
        reader.read(piece)
        if pieces and isinstance(pieces[-1], str):
            pieces[-1] += piece
        else:
            pieces.append(piece)
    reader.check_end()
    return tuple(pieces)


def fill(pieces: Sequence[str | Field], args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Return the command for one job.

    Raises:
        InputError: The job lacks a field, or a value has no text or holds a NUL character.
    """
    check_fields(pieces, len(args), kwargs)
    return "".join(
        piece
        if isinstance(piece, str)
        else _quoted(piece, args[piece.key] if isinstance(piece.key, int) else kwargs[piece.key])
        for piece in pieces
    )


def check_fields(pieces: Sequence[str | Field], positional: int, names: Collection[str]) -> None:
    """Check that jobs with so many positional arguments and keyword arguments of these names have every field.

    Raises:
        InputError: A field is unknown; the hint names the fields there are.
    """
    for piece in pieces:
        if isinstance(piece, str):
            continue
        if piece.key not in names if isinstance(piece.key, str) else piece.key >= positional:
            there = [f"{{{key}}}" for key in (*range(positional), *names)]
            hint = f"there {'is' if len(there) == 1 else 'are'} {', '.join(there)}" if there else "the job has none"
            refuse(f"the job has no field {piece}", hint)


def _quoted(field: Field, value: object) -> str:
    """Return a value as one word for the shell: text as it is, a path as text, anything else as in JSON."""
    if not isinstance(value, str):
        try:
            value = os.fspath(value) if isinstance(value, os.PathLike) else json.dumps(value)
        except (TypeError, ValueError) as exc:
            reason = f"the field {field} has no text: {exc}"
            refuse(reason, "give text, a number, a path or a JSON value")
    text = str(value)
    if "\0" in text:
        hint = "no argument of a command can hold one"
        refuse(f"the field {field} holds a NUL character", hint)
    return "'" + text.replace("'", "'\"'\"'") + "'"


def _pieces(template: str) -> Iterator[str | Field]:
    """Yield the characters of the shell's text, and the fields, in order."""
    at = 0
    while at < len(template):
        char = template[at]
        if template[at : at + 2] in {"{{", "}}"}:
            yield char
            at += 2
        elif char == "{":
            end = template.find("}", at)
            if end < 0:
                raise _braces(template, "a { has no }")
            yield _field(template, template[at + 1 : end])
            at = end + 1
        elif char == "}":
            raise _braces(template, "a } stands alone")
        else:
            yield char
            at += 1


def _field(template: str, text: str) -> Field:
    if not text:
        return Field(0)
    if _POSITION.fullmatch(text):
        return Field(int(text))
    if not _NAME.fullmatch(text):
        raise _braces(template, f"{{{text}}} names no field")
    return Field(text)


def _braces(template: str, reason: str) -> InputError:
    hint = "write {name} or {0} for a field, and {{ and }} for braces that the shell should see"
    return InputError(_shown(template), reason, hint)


def refuse(reason: str, hint: str) -> NoReturn:
    """Raise an InputError about a command as a whole."""
    raise InputError(_WHERE, reason, hint) from None


def _shown(template: str) -> str:
    return template if len(template) <= _LONGEST_SHOWN else template[: _LONGEST_SHOWN - 1] + "…"


_BASH_TEST = re.compile(r"(?<![^\s;&|(!])\[\[\s")
_BREAKS = " \t\n;&|()<>"  # after one of these, a # begins a comment


class _Reader:
    """Follow the shell's quoting through a template, character by character.

    The stack holds what is open: ``'`` and ``"`` quotes, a backquote, ``$(`` and ``(`` inside it, ``$((``, ``${`` and
    ``#`` for a comment.
    """

    def __init__(self, template: str) -> None:
        self._template = template
        self._open: list[str] = []
        self._is_escaped = False
        self._last = "\n"
        self._has_substitution = False

    def read(self, char: str) -> None:
        """Take the next character of the shell's own text."""
        inner = self._open[-1] if self._open else ""
        if self._is_escaped:
            self._is_escaped = False
            self._last = self._last if char == "\n" else "x"  # an escaped line end is no character at all
            return
        if inner == "'":
            self._close_at("'", char)
        elif inner == "#":
            self._close_at("\n", char)
        elif char == "\\":
            self._is_escaped = True
            return
        elif inner == "`":
            self._close_at("`", char)
        else:
            self._read_plain(inner, char)
        self._last = char

    def _close_at(self, end: str, char: str) -> None:
        if char == end:
            self._open.pop()

    def _read_plain(self, inner: str, char: str) -> None:
        is_literal = self._quotes_are_literal()
        if char == '"':
            if inner == '"':
                self._open.pop()
            else:
                self._open.append('"')
        elif char == "`" or (char == "'" and not is_literal):
            if char == "'" and self._last == "$":
                self._refuse("$'...' is read differently by different shells", "use plain quotes, or printf")
            self._open.append(char)
        elif self._last == "$" and char == "[":
            self._refuse("bash would compute what stands in $[...]", "escape the dollar if it is only text")
        elif self._last == "$" and char in "({":
            self._open.append("$" + char)
            self._has_substitution |= char == "("
        elif char == "}" and inner == "${":
            self._open.pop()
        elif inner != '"':
            self._read_unquoted(inner, char)

    def _read_unquoted(self, inner: str, char: str) -> None:
        is_inside = inner in {"$(", "(", "$(("}
        if char == "(" and inner == "$(" and self._last == "(":
            self._open[-1:] = ["$((", "("]
        elif char == "(" and self._last == "(" and not self._quotes_are_literal():
            self._refuse("bash would compute what stands in ((...))", "leave a space between nested parentheses")
        elif char == "(" and is_inside:
            self._open.append("(")
        elif char == ")" and is_inside:
            self._open.pop()
        elif char == "#" and self._last in _BREAKS and not self._quotes_are_literal() and inner != "${":
            self._open.append("#")
        elif char == "<" and self._last == "<" and not self._quotes_are_literal() and inner != "${":
            self._refuse("a here-document cannot be followed safely", "use printf and a pipe, or a script file")

    def _quotes_are_literal(self) -> bool:
        """Tell whether a single quote is a character like others: in double quotes, and in ``${...}`` inside them."""
        if "$((" in self._open:
            return True
        within = [what for what in self._open if what != "${"]
        return bool(within) and within[-1] == '"'

    def check_field(self, field: Field) -> None:
        """Refuse a field here unless the quotes around its value would be a quoted string; rule 3."""
        inner = self._open[-1] if self._open else ""
        if self._is_escaped:
            self._refuse(f"a backslash stands before {field}", "leave it out: each value is quoted already")
        if self._last == "$" and inner not in {"'", "#"}:
            hint = f"for a variable of the shell write ${{{field}}}, for the field leave out the dollar"
            self._refuse(f"a dollar stands before {field}", hint)
        if inner in {"'", '"'}:
            hint = (
                f"each value is quoted already: end the quotes before it, as in {inner}a {inner}{field}{inner} b{inner}"
            )
            self._refuse(f"{field} stands inside quotes", hint)
        for what, (name, hint) in _UNSAFE.items():
            if what in self._open:
                self._refuse(f"{field} stands in {name}", hint)
        self._last = "x"

    def check_end(self) -> None:
        """Refuse a template that ends in the middle of something, or that could not be followed."""
        if self._open and self._open[-1] != "#":
            self._refuse(f"its {self._open[-1]} is never closed", "check the quotes and parentheses")
        if self._is_escaped:
            self._refuse("it ends in a backslash", "leave it out")
        if _BASH_TEST.search(self._template):
            self._refuse("[[ ... ]] is not in every /bin/sh, and bash would compute what stands in it", "use [ ... ]")
        if self._has_substitution and re.search(r"\bcase\b", self._template):
            hint = "put the command into a script file and give it the fields as arguments"
            self._refuse("the quotes of a command with both case and $(...) cannot be followed safely", hint)

    def _refuse(self, reason: str, hint: str) -> NoReturn:
        raise InputError(_shown(self._template), reason, hint)


_UNSAFE = {
    "#": ("a comment", "leave it out there"),
    "`": ("backquotes", "use $(...) instead"),
    "$((": ("arithmetic, which evaluates what a value says", "compute it in a function of your own, or with expr"),
    "${": ("${{...}}, where quotes have other meanings", "assign the field to a variable first"),
}
