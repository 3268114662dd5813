"""What runs in a worker, whatever the engine: guarded calls, and what may travel back."""

from __future__ import annotations

import contextlib
import copyreg
import itertools
from typing import TYPE_CHECKING, Any, SupportsIndex

from shpool.errors import UnpicklableError
from shpool.errortexts import traceback_of
from shpool.pickling import dump, dump_in_pieces, load

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from shpool.pickling import Pieces

_LONGEST_TEXT = 300  # characters of a value named in an error


class WorkerTraceback(Exception):  # noqa: N818 - it is a cause to read, not an error to catch
    """The traceback of a task's error as the worker saw it; stands as the error's ``__cause__``."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'


def call(fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[bool, bytes | Pieces]:
    """Call a function; return whether it returned, and the pickled result or error.

    A large result comes in pieces, which are the result's own memory: to be sent or copied at once.
    """
    try:
        result = fn(*args, **kwargs)
    except BaseException as exc:  # noqa: BLE001 - border: a task may raise anything, and the worker lives on
        return False, dump_error(exc)
    try:
        return True, dump_in_pieces(result)
    except Exception as exc:  # noqa: BLE001 - border: pickling runs the result's own code
        return False, dump_error(UnpicklableError("result", shortened(result), _reason(exc)))


def call_each(
    fn: Callable[..., Any], items: Sequence[Any], *, star: bool, fatal: tuple[type[BaseException], ...] = ()
) -> tuple[list[Any], dict[int, bytes]]:
    """Call a function on each item; return the results in order, and the pickled errors by index.

    Errors of the ``fatal`` classes are raised. The loop runs in C: ``list.extend`` keeps what came before an error, so
    its length tells which item raised.
    """
    results: list[Any] = []
    errors: dict[int, bytes] = {}
    outcomes = itertools.starmap(fn, items) if star else map(fn, items)
    while True:
        try:
            results.extend(outcomes)
        except BaseException as exc:  # border: as in call()
            if isinstance(exc, fatal):
                raise
            errors[len(results)] = dump_error(exc)
        else:
            if len(results) == len(items):
                return results, errors
            # map() takes a StopIteration from the function for its own end.
            errors[len(results)] = dump_error(RuntimeError("the task raised StopIteration"))
        results.append(None)


def dump_each(results: list[Any], errors: dict[int, bytes]) -> bytes | Pieces:
    """Pickle the outcome of ``call_each``, as ``call`` does; a result that cannot be becomes an error of its own."""
    try:
        return dump_in_pieces((results, errors))
    except Exception:  # noqa: BLE001 - border: pickling runs the results' own code
        portable = []
        for index, result in enumerate(results):
            done, data = call(_itself, (result,), {})
            portable.append(result if done else None)
            if not done:
                errors[index] = bytes(data)
        return dump_in_pieces((portable, errors))


def dump_error(error: BaseException) -> bytes:
    """Pickle an error with its traceback.

    One whose ``__init__`` wants other arguments than its ``args``, as many an API client's, is made again without it;
    one that would not arrive even so is replaced by one that does.
    """
    text = traceback_of(error, skipped=1)
    reason = ""
    for portable in (_Plain(error) if _has_foreign_reducer(type(error)) else error, _WithoutInit(error)):
        try:
            data = dump(portable)
            load(data)  # what its __init__ does not take fails here and not in the parent
            return dump((data, text))
        except Exception as exc:  # noqa: BLE001, PERF203 - border: pickling runs the error's own code
            reason = reason or _reason(exc)
    kind = f"{type(error).__module__}.{type(error).__qualname__}"
    replaced = UnpicklableError("exception", f"{kind}: {shortened(error, str)}", reason, _is_temporary(error))
    return dump((dump(replaced), text))


def _is_temporary(error: BaseException) -> bool:
    from shpool.retry import is_retryable  # here: workers seldom need it

    try:
        return is_retryable(error)
    except Exception:  # noqa: BLE001 - border: this looks at the error's own attributes
        return False


class _Plain:
    """Pickles as the error it holds, whatever reducer is registered for the error's class."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        return self._error.__reduce_ex__(protocol)


class _WithoutInit:
    """Pickles as the error it holds, to be made again by the ``__init__`` of the built-in class that it comes from."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        way: Any = self._error.__reduce_ex__(protocol)
        if way[0] is not type(self._error):
            msg = "its class has a way of its own to be pickled"
            raise TypeError(msg)
        return _made_again, way


def _made_again(kind: type[BaseException], args: tuple[Any, ...], state: dict[str, Any] | None = None) -> object:
    error = kind.__new__(kind, *args)
    built_in: Any = next(base for base in kind.__mro__ if base.__module__ == "builtins")
    built_in.__init__(error, *args)
    error.__setstate__(state)
    return error


def _has_foreign_reducer(kind: type[BaseException]) -> bool:
    """Tell whether tblib pickles such errors, as it does all that were there when ``distributed`` was imported.

    It sends frames along, and rebuilds without ``__init__``: a SystemExit loses its code, a UnicodeError its text.
    """
    return getattr(copyreg.dispatch_table.get(kind), "__module__", "") == "tblib.pickling_support"


def load_error(data: bytes) -> BaseException:
    """Return the error ``dump_error`` pickled, its worker's traceback as its cause."""
    pickled, text = load(data)
    try:
        error: object = load(pickled)
    except BaseException as exc:  # noqa: BLE001 - border: unpickling runs the error's own code
        error = UnpicklableError("exception", text.strip().rpartition("\n")[2], _reason(exc))
    if not isinstance(error, BaseException):
        error = UnpicklableError("exception", shortened(error), "it is no exception once unpickled")
    BaseException.__setattr__(error, "__cause__", WorkerTraceback(text))  # its class may refuse attributes
    return error


def shortened(value: object, show: Callable[[object], str] = repr) -> str:
    """Return a text of bounded length for an error message; never raises."""
    text = f"<{type(value).__name__}>"
    with contextlib.suppress(Exception):
        text = show(value)
    return text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 1] + "…"


def _itself(value: object) -> object:
    return value


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {shortened(error, str)}"
