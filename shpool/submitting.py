"""``submit`` and ``map`` over an engine: what the pool and its views have in common."""

from __future__ import annotations

import abc
import contextlib
from concurrent.futures import Executor, Future
from typing import TYPE_CHECKING, Any, TypeVar

from shpool.engines.base import Engine, Task
from shpool.engines.slot import Slot
from shpool.errors import ShpoolError
from shpool.importing import import_each

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from typing_extensions import ParamSpec

    from shpool.lazymap import LazyMap
    from shpool.retry import RetryPolicy

    P = ParamSpec("P")
T = TypeVar("T")


class Submitting(Executor, abc.ABC):
    """``submit`` and ``map`` with given retries and timeout."""

    _policy: RetryPolicy
    _timeout: float | None

    @property
    @abc.abstractmethod
    def max_workers(self) -> int:
        """How many tasks can run at once."""

    @abc.abstractmethod
    def _running_engine(self) -> Engine:
        """Return the pool's engine, started if need be."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run ``fn(*args, **kwargs)`` in a worker.

        Returns:
            A future; an error of the task arrives with the worker's traceback as its ``__cause__``.

        Raises:
            LoginError: The first submit starts the pool, and the login failed.
            RuntimeError: The pool is shut down.
            TokenUnavailableError: The token has expired and the provider refuses to give another.
            UnpicklableError: The function cannot be pickled.
        """
        return self._submit(fn, args, kwargs, None)

    def _submit(
        self,
        fn: Callable[..., T],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        hear: Callable[[Any], object] | None,
    ) -> Future[T]:
        engine = self._running_engine()
        policy, timeout = self._policy, self._timeout
        return engine.submit(
            Task(engine.prepare(fn), args, kwargs, label=_label_of(fn), policy=policy, timeout=timeout, hear=hear)
        )

    def _caller(self, fn: Callable[..., T]) -> Callable[[tuple[Any, ...], Mapping[str, Any]], Future[T]]:
        """Return what submits calls of a function; see ``caller``."""
        label, policy, timeout = _label_of(fn), self._policy, self._timeout
        prepared: Any = None

        def submit(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Future[T]:
            nonlocal prepared
            engine = self._running_engine()  # each time, as it tells whether the pool still takes tasks
            if prepared is None:
                prepared = engine.prepare(fn)
            return engine.submit(Task(prepared, args, kwargs, label=label, policy=policy, timeout=timeout), Slot())

        return submit

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int | None = None,
        buffersize: int | None = None,
    ) -> Iterator[T]:
        """Yield ``fn`` of each item, in order; lazy and bounded, so infinite iterables are welcome.

        Take the results before the pool ends: items beyond the window are not submitted yet.

        Args:
            fn: Called with one item of each iterable. What it holds, as a method or a closure does, is there once in
                each worker for the whole map: a call may meet what others have left in it.
            *iterables: As for the built-in ``map``; the shortest ends it.
            timeout: Seconds from this call within which a result must have come.
            chunksize: Items sent together; None adapts to what the tasks take, 1 isolates each.
            buffersize: Most items pulled from the iterables and not yet yielded; None for a few batches a worker.

        Raises:
            TimeoutError: From the iterator, when a result is not there in time.
            ValueError: ``chunksize`` or ``buffersize`` is less than 1.
        """
        return self._lazy_map(fn, iterables, chunksize, buffersize, timeout).in_order()

    def map_unordered(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int | None = None,
        buffersize: int | None = None,
    ) -> Iterator[T]:
        """Yield the results as they come; else as ``map``.

        An item that waits for its next attempt holds nothing up: beside the few batches a worker, four times as many
        items may wait so, but at most 256 items and 2 MiB a worker. Each that is beyond that takes a batch's place.
        """
        return self._lazy_map(fn, iterables, chunksize, buffersize, timeout).as_completed()

    def _lazy_map(
        self,
        fn: Callable[..., Any],
        iterables: tuple[Iterable[Any], ...],
        chunksize: int | None,
        buffersize: int | None,
        timeout: float | None,
    ) -> LazyMap:
        import_each("shpool.mapsizes", "shpool.lazymap")  # here: the login need not wait for them
        from shpool.lazymap import LazyMap
        from shpool.mapsizes import MapOptions

        if not iterables:
            msg = "map needs at least one iterable"
            raise TypeError(msg)
        options = MapOptions(chunksize, buffersize, timeout, self._policy, self._timeout)
        return LazyMap(self._running_engine(), fn, iterables, options)


def _label_of(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__qualname__", None) or type(fn).__name__


def caller(executor: Executor, fn: Callable[..., T]) -> Callable[[tuple[Any, ...], Mapping[str, Any]], Future[T]]:
    """Return what submits calls of one function to any executor, given their arguments; for many calls.

    A pool of ours pickles the function once, at the first call; and its futures are slots, for one reader (see
    `Slot`), which cost a third of what others do.

    Args:
        executor: Where the calls run.
        fn: The function.
    """
    if isinstance(executor, Submitting):
        return executor._caller(fn)  # noqa: SLF001 - of this module
    return lambda args, kwargs: executor.submit(fn, *args, **kwargs)


def submit_heard(
    executor: Executor, hear: Callable[[Any], object], fn: Callable[..., T], /, *args: object
) -> Future[T]:
    """Submit to any executor, and hear what the task tells (see ``talk``) where it is a pool of ours.

    Args:
        executor: Whose ``submit`` is called.
        hear: See ``Task.hear``.
        fn: The function.
        *args: Its arguments.
    """
    if isinstance(executor, Submitting):
        return executor._submit(fn, args, {}, hear)  # noqa: SLF001 - of this module
    return executor.submit(fn, *args)


def hears(executor: Executor) -> bool:
    """Tell whether tasks are heard and recalled: see ``submit_heard`` and ``recall``. Starts a pool of ours."""
    return isinstance(executor, Submitting) and executor._running_engine().hears  # noqa: SLF001 - as above


def recall(executor: Executor, future: Future[Any]) -> None:
    """Ask a running task for what it has not begun, where it is one of a pool of ours; see ``Engine.recall``."""
    if isinstance(executor, Submitting):
        with contextlib.suppress(RuntimeError, ShpoolError):  # the pool is at its end: so is the task
            executor._running_engine().recall(future)  # noqa: SLF001 - as above


def terminate(executor: Executor, future: Future[Any]) -> None:
    """Stop a running task, where it is one of a pool of ours; see ``Engine.terminate``."""
    if isinstance(executor, Submitting):
        with contextlib.suppress(RuntimeError, ValueError, ShpoolError):  # as above
            executor._running_engine().terminate(future)  # noqa: SLF001 - as above
