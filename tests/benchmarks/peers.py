"""The pools that are measured, behind one small face: shpool by its public names, and its peers.

Each opener imports its library itself, so that a process holds one library only and the import can be timed. Start
methods and settings are what is fastest for the peer on Linux: fork where it offers it. Peers from the extra ``bench``
are imported by name, because whether they are there, and typed, must not decide whether this file is.
"""

from __future__ import annotations

import importlib
from contextlib import contextmanager

TYPE_CHECKING = False  # as in tasks.py
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from contextlib import AbstractContextManager
    from typing import Any

    Opener = Callable[[int], AbstractContextManager["Pool"]]

SLOW_LOGIN_SECONDS = 0.3  # a token endpoint across the sea


class Pool:
    """An open pool.

    Args:
        map_: Called with (function, iterable, chunk size or None): yields the results in order.
        submit: Called with (function, *args): returns a handle; None where the peer has no such thing.
        take: Called with (handle, timeout): returns the result.
        lost: Returns how many workers died, where the peer says so.
    """

    __slots__ = ("lost", "map", "submit", "take")

    def __init__(
        self,
        map_: Callable[[Callable[..., Any], Iterable[Any], int | None], Iterable[Any]],
        submit: Callable[..., Any] | None,
        take: Callable[..., Any],
        lost: Callable[[], int] | None = None,
    ) -> None:
        self.map = map_
        self.submit = submit
        self.take = take
        self.lost = lost


def _login() -> dict[str, object]:
    return {"access_token": "invented", "expires_in": 3600}


def _slow_login() -> dict[str, object]:
    import time

    time.sleep(SLOW_LOGIN_SECONDS)
    return _login()


def _shpool_with(session: Callable[[], dict[str, object]] = _login, retries: int = 0) -> Opener:
    @contextmanager
    def opened(workers: int) -> Iterator[Pool]:
        from concurrent.futures import Future

        from shpool import AuthenticatedProcessPool

        with AuthenticatedProcessPool(session, workers, retries=retries) as pool:
            yield Pool(
                lambda fn, items, size: pool.map(fn, items, chunksize=size),
                pool.submit,
                Future.result,
                lambda: pool.stats().workers_lost,
            )

    return opened


@contextmanager
def _loky(workers: int) -> Iterator[Pool]:
    from concurrent.futures import Future

    import loky

    with loky.ProcessPoolExecutor(workers) as executor:
        yield Pool(lambda fn, items, size: executor.map(fn, items, chunksize=size or 1), executor.submit, Future.result)


@contextmanager
def _executor(workers: int) -> Iterator[Pool]:
    from concurrent.futures import Future, ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(workers, get_context("fork")) as executor:
        yield Pool(lambda fn, items, size: executor.map(fn, items, chunksize=size or 1), executor.submit, Future.result)


def _mp_pool_with(*, is_lazy: bool) -> Opener:
    @contextmanager
    def opened(workers: int) -> Iterator[Pool]:
        from multiprocessing import get_context
        from multiprocessing.pool import AsyncResult

        with get_context("fork").Pool(workers) as pool:
            yield Pool(
                (lambda fn, items, size: pool.imap(fn, items, size or 1)) if is_lazy else pool.map,
                lambda fn, *args: pool.apply_async(fn, args),
                AsyncResult.get,
            )

    return opened


@contextmanager
def _mpire(workers: int) -> Iterator[Pool]:
    mpire = importlib.import_module("mpire")
    with mpire.WorkerPool(workers, start_method="fork", keep_alive=True) as pool:
        yield Pool(
            lambda fn, items, size: pool.imap(fn, items, chunk_size=size or 1),
            lambda fn, *args: pool.apply_async(fn, args),
            lambda handle, timeout=None: handle.get(timeout),
        )


@contextmanager
def _pebble(workers: int) -> Iterator[Pool]:
    from concurrent.futures import Future

    pebble = importlib.import_module("pebble")
    with pebble.ProcessPool(workers) as pool:
        yield Pool(
            lambda fn, items, size: pool.map(fn, items, chunksize=size or 1).result(),
            lambda fn, *args: pool.schedule(fn, args=args),
            Future.result,
        )


@contextmanager
def _joblib(workers: int) -> Iterator[Pool]:
    joblib = importlib.import_module("joblib")
    with joblib.Parallel(workers, return_as="generator") as parallel:

        def lazy_map(fn: Callable[..., Any], items: Iterable[Any], size: int | None) -> Iterable[Any]:
            call = joblib.delayed(fn)
            parallel.batch_size = size or "auto"
            results: Iterable[Any] = parallel(call(item) for item in items)
            return results

        yield Pool(lazy_map, None, lambda handle: handle)


# Name in the tables: the module that must be there, and what opens the pool.
PEERS: dict[str, tuple[str, Opener]] = {
    "shpool": ("shpool", _shpool_with()),
    "shpool retries=1": ("shpool", _shpool_with(retries=1)),
    "shpool slow login": ("shpool", _shpool_with(_slow_login)),
    "loky": ("loky", _loky),
    "executor": ("concurrent.futures", _executor),
    "mp.Pool": ("multiprocessing", _mp_pool_with(is_lazy=True)),
    "mp.Pool eager": ("multiprocessing", _mp_pool_with(is_lazy=False)),
    "mpire": ("mpire", _mpire),
    "pebble": ("pebble", _pebble),
    "joblib": ("joblib", _joblib),
}
