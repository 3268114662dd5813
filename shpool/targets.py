"""Functions named by text, as `shpool run` gets them: `package.module:function` or `path/to/file.py:function`.

A target travels to workers as its name, never as code: each process imports it once, so that lambdas,
partials and functions of a file outside any package work alike.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shpool.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType, TracebackType

_FORMS = "give package.module:function or path/to/file.py:function"


@dataclass(frozen=True)
class Target:
    """A function that is imported where it is called; cheap to pickle, and the same in every process.

    Attributes:
        source: Dotted name of a module, or absolute path of a Python file.
        name: The function in it; dots reach into classes.
        folder: Put on the import path first, as ``python -m`` and ``python file.py`` do.
    """

    source: str
    name: str
    folder: str

    @property
    def is_file(self) -> bool:
        """Tell whether the source is a file rather than a module's name."""
        return self.source.endswith(".py")

    @property
    def function(self) -> Callable[..., Any]:
        """The function itself, imported on first use in this process."""
        return _resolve(self)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever the function takes and gives
        """Call the function."""
        return _resolve(self)(*args, **kwargs)

    def __str__(self) -> str:
        return f"{self.source}:{self.name}"


def load_target(text: str) -> Target:
    """Find the function that ``text`` names and import it here, so that mistakes show before any work.

    Args:
        text: ``package.module:function``, with the current folder importable, or ``path/to/file.py:function``,
            with the file's folder importable.

    Raises:
        InputError: There is no such module, file or function, it cannot be called, or its import raised.
    """
    source, colon, name = text.rpartition(":")
    if not colon or not source or not name:
        raise InputError(text, "TARGET names no function", _FORMS)
    if source.endswith(".py") or "/" in source:
        path = Path(source).absolute()
        if not _is_file(path, text):
            raise InputError(text, f"there is no file {source}", _FORMS)
        if path.suffix != ".py":
            raise InputError(text, f"{source} is not a Python file", "its name must end in .py")
        target = Target(str(path), name, str(path.parent))
    else:
        target = Target(source, name, str(Path.cwd()))
    _check(target.function, text)
    return target


def _is_file(path: Path, text: str) -> bool:
    try:
        return path.is_file()
    except OSError as exc:  # a folder that may not be entered, or a name that is too long
        raise InputError(text, f"{path} cannot be reached: {exc.strerror}", "give a file that you may read") from None


def _check(function: object, text: str) -> None:
    if not callable(function):
        raise InputError(text, f"it is {_a(function)}, not a function", _FORMS)
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        kind = "async" if inspect.iscoroutinefunction(function) else "a generator"
        raise InputError(text, f"the function is {kind}", "give a plain function that returns its result")


def _a(value: object) -> str:
    kind = type(value).__name__
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


@functools.cache  # one entry a target; a process has one or two
def _resolve(target: Target) -> Callable[..., Any]:
    if target.folder not in sys.path:
        sys.path.insert(0, target.folder)
    with _UserImport(target):
        module = _import_file(Path(target.source)) if target.is_file else importlib.import_module(target.source)
    try:
        function: Callable[..., Any] = attrgetter(target.name)(module)  # load_target checks that it is one
    except AttributeError:
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        close = difflib.get_close_matches(target.name, names, n=1)
        hint = f"did you mean {close[0]}?" if close else _FORMS
        raise InputError(target.source, f"it has no {target.name!r}", hint) from None
    return function


def _import_file(path: Path) -> ModuleType:
    """Import the file under a name of its own, registered so that its classes can be pickled."""
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    name = f"shpool_target_{path.stem}_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(str(path), "it cannot be imported", "its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


class _UserImport:
    """Translate what the import of a user's module raises, SystemExit of a script included, into an InputError."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def __enter__(self) -> None:
        """Guard the import that follows."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Raise the InputError; interruptions and our own errors pass.

        A class derived from SystemExit is an interruption too: as a handler of SIGTERM raises it, and no script does.
        """
        is_interruption = isinstance(error, (KeyboardInterrupt, SystemExit)) and type(error) is not SystemExit
        if error is None or is_interruption or isinstance(error, (InputError, MemoryError)):
            return
        target = self._target
        if isinstance(error, ModuleNotFoundError) and f"{target.source}.".startswith(f"{error.name}."):
            hint = f"modules are looked for in {target.folder} and among the installed packages"
            raise InputError(str(target), f"there is no module {error.name}", hint) from None
        text = (str(error).splitlines() or [""])[0]
        words = f"{type(error).__name__}: {text}" if text else type(error).__name__
        raise InputError(str(target), f"its import raised {words} ({_place(error)})", "mend the module") from error


def _place(error: BaseException) -> str:
    """Return file and line of the innermost frame that is the user's, or of a syntax error."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen ") and frame.filename not in {__file__, importlib.__file__}
    ]
    return f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else "no line known"
