"""What a template takes for a field, and that no value ever becomes part of the shell's program."""

from __future__ import annotations

import subprocess
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shpool.errors import InputError
from shpool.shell.template import Field, check_fields, fill, parse

# Whichever way it were read, a part of it would make the file.
_ATTACK = """x'"`:>pwned`$(:>pwned)\n:>pwned\n;:>pwned;" ' #` :>pwned` )} :>pwned\\"""
_TOKENS = [*"'\"\\`$()#<\n ;|ax=>", "{{", "}}", "$(", "${{", "$((", "))", "case ", "echo ", ' "$(', ')"', "{0}", "{0}"]


def run(template: str, *args: Any, cwd: Path | None = None, **kwargs: Any) -> str:
    command = fill(parse(template), args, kwargs)
    done = subprocess.run(["/bin/sh", "-c", command], cwd=cwd, capture_output=True, check=True)
    return done.stdout.decode()


def test_fields_are_keywords_and_positions() -> None:
    pieces = parse("a {url} {0}{12} {cloud cover-1} {}")
    assert [piece.key for piece in pieces if isinstance(piece, Field)] == ["url", 0, 12, "cloud cover-1", 0]


def test_doubled_braces_are_the_shells_own() -> None:
    assert parse("echo ${{HOME}} {{{name}}}") == ("echo ${HOME} {", Field("name"), "}")


@pytest.mark.parametrize(
    "value",
    ["plain", "", "it's", 'a "b"', "$HOME", "$(id)", "`id`", "a\nb", "; id", "*", "~", "-n", "\\", "ünï", "a'\"'\"'b"],
)
def test_a_value_arrives_as_it_is(value: str) -> None:
    assert run("printf '[%s]' {0}", value) == f"[{value}]"


@pytest.mark.parametrize(
    "template",
    [
        "printf %s {0}.tif",
        "printf %s pre{0}.tif | sed s/^pre//",
        "printf %s \"\"{0}'.tif'",
        'printf %s "$(printf %s {0}).tif"',
        'x={0}.tif; printf %s "$x"',
        "(printf %s {0}.tif)",
        "{{ printf %s {0}.tif; }} # don't",
        "( (printf %s {0}.tif) )",
        "ls [[:digit:]]* 2>/dev/null; printf %s {0}.tif",
        "x=$((1+(2<<1))); printf %s {0}.tif",
        "case a in a) printf %s {0}.tif;; esac",
        'printf %s "${{none:-"it"}}" >/dev/null; printf %s {0}.tif',
    ],
)
def test_a_field_may_stand_wherever_quotes_begin_a_string(template: str) -> None:
    assert run(template, "it's $(id)") == "it's $(id).tif"


def test_a_number_before_a_redirection_is_no_descriptor(tmp_path: Path) -> None:
    run("echo {count}>{name}.txt", count=2, name="out", cwd=tmp_path)
    assert (tmp_path / "out.txt").read_text() == "2\n"


@pytest.mark.parametrize(
    ("value", "text"),
    [(3, "3"), (0.5, "0.5"), (True, "true"), (None, "null"), ([1, "a"], '[1, "a"]'), (PurePosixPath("a/b"), "a/b")],
)
def test_values_that_are_no_text_stand_as_in_json(value: object, text: str) -> None:
    assert run("printf %s {0}", value) == text


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("", "it is empty"),
        (" \n", "it is empty"),
        ("echo {url!r}", "names no field"),
        ("echo {url:>10}", "names no field"),
        ("echo {url.__class__}", "names no field"),
        ("echo {url[0]}", "names no field"),
        ("{ echo a; }", "names no field"),
        ("echo {a,b}", "names no field"),
        ("echo {url", "a { has no }"),
        ("echo url}", "a } stands alone"),
        ('echo "{name}"', "{name} stands inside quotes"),
        ("echo '{name}'", "{name} stands inside quotes"),
        ("sh -c 'echo {name}'", "stands inside quotes"),
        ('echo "$(echo "{name}")"', "stands inside quotes"),
        ('echo "a\\"{name}"', "stands inside quotes"),
        ("echo ${name}", "a dollar stands before {name}"),
        ('echo "${name}"', "a dollar stands before {name}"),
        ("echo \\{name}", "a backslash stands before {name}"),
        ("echo `cat {name}`", "in backquotes"),
        ("echo $(({name}+1))", "in arithmetic"),
        ("echo ${{x:-{name}}}", "in ${{...}}"),
        ("echo a # {name}", "in a comment"),
        ("echo a # it's\necho 'b {name}'", "stands inside quotes"),
        ("echo a \\\n# it's\necho 'b {name}'", "stands inside quotes"),
        ("cat <<END\n{name}\nEND", "here-document"),
        ("echo $'a' {name}", "$'...'"),
        ('echo "$(case a in a) echo "b {name}";; esac)"', "case"),
        ("(({{'a';{name}))", "((...))"),
        ("(( {name} > 1 ))", "((...))"),
        ("echo $[{name}]", "$[...]"),
        ('echo "$[{name}]"', "$[...]"),
        ("if [[ {name} -eq 1 ]]; then echo; fi", "[[ ... ]]"),
        ("echo 'a {{", "never closed"),
        ("echo $(a", "never closed"),
        ("echo a\\", "ends in a backslash"),
    ],
)
def test_what_could_not_be_quoted_safely_is_refused_with_a_hint(template: str, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(template)
    assert reason in caught.value.reason
    assert caught.value.hint


def test_the_hint_for_quotes_shows_where_to_end_them() -> None:
    with pytest.raises(InputError, match=r'"a "\{name\}" b"'):
        parse('echo "tile {name}.tif"')


def test_an_unknown_field_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(InputError, match=r"no field \{nmae\}; there are \{0\}, \{name\}, \{url\}"):
        check_fields(parse("echo {nmae}"), 1, ["name", "url"])
    with pytest.raises(InputError, match=r"no field \{1\}; there is \{0\}"):
        check_fields(parse("echo {1}"), 1, [])


@pytest.mark.parametrize("value", ["a\0b", object(), {1: object()}])
def test_a_value_that_no_command_can_take_is_refused_with_its_field(value: object) -> None:
    with pytest.raises(InputError, match=r"the field \{name\}"):
        fill(parse("echo {name}"), (), {"name": value})


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(parts=st.lists(st.sampled_from(_TOKENS), min_size=1, max_size=14))
def test_no_accepted_template_ever_runs_a_value(parts: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Most of these programs make no sense; whatever the shell makes of them, the value stays a value."""
    try:
        pieces = parse("".join(parts) + " {0}")
    except InputError:
        return
    folder = tmp_path_factory.mktemp("attack")
    command = fill(pieces, (_ATTACK,), {})
    subprocess.run(
        ["/bin/sh", "-c", command], cwd=folder, env={}, stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    assert not (folder / "pwned").exists()
