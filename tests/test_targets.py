from __future__ import annotations

import pickle
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TYPE_CHECKING

import pytest

from shpool.errors import InputError
from shpool.targets import load_target

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TILES = """
import dataclasses
import neighbour

@dataclasses.dataclass
class Tile:
    number: int

    @staticmethod
    def of(number):
        return Tile(number)

double = lambda number: number * neighbour.FACTOR
limit = 5

async def later(number): ...
def many(number): yield number
def exits(number): ...
"""


@pytest.fixture(autouse=True)
def same_modules() -> Iterator[None]:
    """Forget what a test imported, and where from."""
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


@pytest.fixture
def tiles(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("FACTOR = 2\n")
    path = tmp_path / "tiles.py"
    path.write_text(TILES)
    return path


def test_a_function_of_a_module() -> None:
    target = load_target("json:dumps")
    assert target([1]) == "[1]"
    assert str(target) == "json:dumps"


def test_dots_reach_into_classes() -> None:
    assert load_target("datetime:date.fromisoformat")("2024-05-01").year == 2024


def test_the_current_folder_is_importable(tiles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiles.parent)
    assert load_target("tiles:double")(4) == 8


def test_a_function_of_a_file_whose_folder_is_importable(tiles: Path) -> None:
    assert load_target(f"{tiles}:double")(4) == 8


def test_a_relative_path_names_the_same_target(tiles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the keys of the jobs would depend on the folder the command was given in."""
    monkeypatch.chdir(tiles.parent)
    assert load_target("tiles.py:double") == load_target(f"{tiles}:double")


def test_a_target_travels_as_its_name(tiles: Path) -> None:
    """Also a lambda, which pickle alone refuses."""
    target = load_target(f"{tiles}:double")
    assert len(pickle.dumps(target)) < 400
    assert pickle.loads(pickle.dumps(target))(4) == 8


def test_classes_of_a_file_can_be_pickled(tiles: Path) -> None:
    tile = load_target(f"{tiles}:Tile.of")(3)
    assert pickle.loads(pickle.dumps(tile)) == tile


@pytest.mark.slow
def test_a_worker_imports_the_target_itself(tiles: Path) -> None:
    target = load_target(f"{tiles}:Tile.of")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        assert executor.submit(target, 3).result() == target(3)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("json", "names no function"),
        ("json:", "names no function"),
        (":dumps", "names no function"),
        ("no_such_module_anywhere:f", "there is no module no_such_module_anywhere"),
        ("json.nothing:f", "there is no module json.nothing"),
        ("json:dmps", "did you mean dumps?"),
        ("json:__doc__", "it is a str, not a function"),
        ("missing/tiles.py:f", "there is no file missing/tiles.py"),
        ("./tiles:f", "there is no file ./tiles"),
    ],
)
def test_a_target_that_is_not_there(text: str, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        load_target(text)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("limit", "it is an int, not a function"),
        ("later", "the function is async"),
        ("many", "the function is a generator"),
        ("Tile.off", "has no 'Tile.off'"),
    ],
)
def test_a_name_that_is_no_plain_function(tiles: Path, name: str, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        load_target(f"{tiles}:{name}")
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("x = 1\nraise RuntimeError('boom\\nmore')\n", "RuntimeError: boom ({path}, line 2)"),
        ("def f(:\n", "({path}, line 1)"),
        ("import sys\n\nsys.exit(4)\n", "SystemExit: 4 ({path}, line 3)"),
        ("import no_such_module_anywhere\n", "No module named 'no_such_module_anywhere' ({path}, line 1)"),
        ("def f():\n    1 / 0\nf()\n", "ZeroDivisionError: division by zero ({path}, line 2)"),
    ],
)
def test_a_module_that_raises_is_named_with_its_line(tmp_path: Path, code: str, words: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(code)
    for text in (f"{path}:f", "broken:f"):
        sys.path.insert(0, str(tmp_path))
        with pytest.raises(InputError) as caught:
            load_target(text)
        assert words.format(path=path) in str(caught.value)


def test_a_failed_import_leaves_no_module(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("raise RuntimeError")
    before = set(sys.modules)
    with pytest.raises(InputError):
        load_target(f"{path}:f")
    assert not [name for name in set(sys.modules) - before if "broken" in name]


def test_not_a_python_file(tmp_path: Path) -> None:
    path = tmp_path / "tiles.txt"
    path.write_text("")
    with pytest.raises(InputError, match="not a Python file"):
        load_target(f"{path}:f")
