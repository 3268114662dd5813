"""``submit`` and ``map`` over an engine: what the pool and its views have in common."""

from __future__ import annotations

import abc
from concurrent.futures import Executor, Future
from typing import TYPE_CHECKING, Any, TypeVar

from shpool.engines.base import Engine, Task

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

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
        engine = self._running_engine()
        label = getattr(fn, "__qualname__", None) or type(fn).__name__
        return engine.submit(
            Task(engine.prepare(fn), args, kwargs, label=label, policy=self._policy, timeout=self._timeout)
        )

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
            fn: Called with one item of each iterable.
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
        """Yield the results as they come; else as ``map``."""
        return self._lazy_map(fn, iterables, chunksize, buffersize, timeout).as_completed()

    def _lazy_map(
        self,
        fn: Callable[..., Any],
        iterables: tuple[Iterable[Any], ...],
        chunksize: int | None,
        buffersize: int | None,
        timeout: float | None,
    ) -> LazyMap:
        from shpool.lazymap import LazyMap, MapOptions  # here: the login need not wait for it

        if not iterables:
            msg = "map needs at least one iterable"
            raise TypeError(msg)
        options = MapOptions(chunksize, buffersize, timeout, self._policy, self._timeout)
        return LazyMap(self._running_engine(), fn, iterables, options)
