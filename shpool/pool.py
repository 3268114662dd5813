"""The pool: owns the session's sharing and the engine, starts them together, ends them in order."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

from shpool.channels import NamedChannel, TeeChannel
from shpool.checks import (
    checked_arguments,
    checked_env,
    checked_function,
    checked_level,
    checked_limit,
    checked_retries,
    checked_timeout,
    checked_workers,
)
from shpool.engines.setup import WorkerSetup
from shpool.errors import LoginError, TokenUnavailableError
from shpool.gate import Gate
from shpool.importing import import_each
from shpool.processors import processor_count
from shpool.redaction import SECRET_VARIABLES
from shpool.refresh import State
from shpool.retry import Backoff, RetryPolicy, is_retryable
from shpool.sharing import SharingThread
from shpool.sources import source_of
from shpool.submitting import Submitting
from shpool.tokens import SYSTEM_CLOCK

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import ParamSpec, Self

    from shpool.engines.base import Engine, EngineDescription
    from shpool.gate import GateStats
    from shpool.retry import RetryAfterUnit
    from shpool.sources import Session

    P = ParamSpec("P")
T = TypeVar("T")
F = TypeVar("F")

# One per library that would start a thread for each processor in every worker; loky sets none of them.
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMBA_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "GDAL_NUM_THREADS",
)
_ENGINES = ("loky", "inline", "dask", "ray")
_BACKOFF = Backoff(base=0.1, cap=10.0)  # s; short, as it is mostly workers that were lost


@dataclass(frozen=True)
class PoolStats:
    """What a pool has done so far, and how its token stands.

    Attributes:
        state: ``new``, ``running``, ``closing`` or ``closed``.
        workers: How many tasks can run at once.
        tasks_pending: Submitted and not settled.
        tasks_done: Ended with a result; a batch of ``map`` counts as one.
        tasks_failed: Ended with an error.
        tasks_retried: Attempts after the first.
        workers_lost: Workers that died and were replaced.
        logins: Tokens shared so far, the first included.
        refreshes: Of these, the ones after the first.
        login_failures: Logins that failed.
        last_error: Class and text of the last login error, None once a login worked again.
        token_state: ``fresh``, ``stale``, ``expired`` or ``refused``.
        generation: Number of the token in use, 0 before the first.
        token_remaining: Seconds it has left, None before the first.
        gate: The account's limits, what they made tasks wait, and what refusals have taught.
    """

    state: str
    workers: int
    tasks_pending: int
    tasks_done: int
    tasks_failed: int
    tasks_retried: int
    workers_lost: int
    logins: int
    refreshes: int
    login_failures: int
    last_error: str | None
    token_state: str
    generation: int
    token_remaining: float | None
    gate: GateStats


class AuthenticatedProcessPool(Submitting):
    """A process pool whose workers share one login. A ``concurrent.futures.Executor``.

    A class of its own and no wrapper of one: the login, its refreshing and the workers must start and end together.

    Args:
        session: What logs in: an ``OAuthSession``, another object with a ``token`` refreshed on read, or a function
            that returns a token mapping.
        max_workers: Number of worker processes; None for the processors this process may use. On a cluster, the most
            tasks to run at once; None for as many as it has room for.
        engine: ``loky`` for worker processes on this machine, ``inline`` for the caller's own; a ``DaskEngine``,
            a ``RayEngine`` or a ``distributed.Client`` for a cluster; ``dask`` or ``ray`` for one on this machine.
        memory_name: Also share the session under this name, for other processes of the user.
        initializer: Called once in each worker, after its session is there.
        initargs: Arguments for it.
        env: Environment variables of the workers, set before anything is imported there. The thread limits of BLAS,
            OpenMP, Numba and GDAL are processors / workers unless set here or in the parent's environment.
        retries: More attempts for a task that failed for a passing reason: a lost worker, a timeout, a connection
            error, HTTP 408, 425, 429 or 5xx. Programming errors are never retried.
        retry_if: Tells, given the error, whether to retry, in place of that rule. Called in a thread of the parent.
        timeout: Seconds one attempt of a task may take before its worker is stopped; None for no limit.
        max_tasks_per_worker: Calls after which a worker is replaced, for code that leaks; None for no limit.
        max_worker_memory: Bytes of resident memory; a worker that holds more once a task is done is replaced. None for
            no limit. A task that takes more while it runs is not stopped.
        log_level: Least level of the workers' log records, which are handed to the parent's loggers of the same
            names, with ``worker`` (process id) and ``task`` as attributes, tokens masked; warnings too. 0 for the
            level of the parent's root logger, None to leave the workers' logging alone.
        gate: The account's limits, which all workers keep together: a ``Gate``, or the name of a provider whose
            limits are known, ``cdse`` or ``sentinelhub``. None for no limits but those that a server teaches by 429.

    Raises:
        ValueError: A setting is out of range, or the session does not refresh its token.
        TypeError: The session is none.
    """

    def __init__(  # noqa: PLR0913 - the contract; all but two are keyword-only
        self,
        session: Session,
        max_workers: int | None = None,
        *,
        engine: str | EngineDescription = "loky",
        memory_name: str | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        env: Mapping[str, str] | None = None,
        retries: int = 0,
        retry_if: Callable[[BaseException], bool] = is_retryable,
        timeout: float | None = None,
        max_tasks_per_worker: int | None = None,
        max_worker_memory: int | None = None,
        log_level: int | str | None = logging.NOTSET,
        gate: Gate | str | None = None,
    ) -> None:
        source_of(session)
        unit: RetryAfterUnit = getattr(session, "retry_after_unit", "s")
        self._policy = RetryPolicy(checked_retries(retries), _BACKOFF, unit, checked_function("retry_if", retry_if))
        self._timeout = checked_timeout(timeout)
        self._where = _described_engine(engine)
        self._workers = checked_workers(max_workers, is_local=self._where is None)
        if initializer is not None:
            checked_function("initializer", initializer)
        self._session = session
        self._engine_name = str(engine) if self._where is None else self._where.name
        self._memory_name = memory_name
        self._setup = WorkerSetup(
            initializer,
            checked_arguments(initargs),
            {**_thread_limits(self._workers, self._where), **checked_env(env)},
            checked_level(log_level),
            checked_limit("max_tasks_per_worker", max_tasks_per_worker),
            checked_limit("max_worker_memory", max_worker_memory),
        )
        self._gate = _checked_gate(gate)
        # Guards the five below; held while starting, so that it happens once. What the handler of a signal does in the
        # meantime it does under the lock too, as the same thread: it may end the pool, or submit to it.
        self._lock = threading.RLock()
        self._state = "new"
        self._is_starting = False
        self._engine: Engine | None = None
        self._sharing: SharingThread | None = None
        self._owner = 0  # process that started it

    # Life

    def __enter__(self) -> Self:
        """Launch the workers, log in meanwhile, share the token.

        Raises:
            LoginError: The first login failed; the workers are gone again then.
            RuntimeError: The pool is shut down, be it by the handler of a signal that came while it started.
        """
        self._running_engine()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for all tasks and end; on ^C or another exit, stop them at once."""
        if kind is not None and not issubclass(kind, Exception):
            self.terminate()
        else:
            self.shutdown(wait=True)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: FBT001, FBT002 - the Executor's signature
        """Take no more tasks, finish those there are, end the workers and the sharing.

        Args:
            wait: Return only when all is gone; else it goes by itself once the tasks are done.
            cancel_futures: Cancel the tasks that have not begun.
        """
        self._close(cancel=cancel_futures, kill=False, wait=wait)

    def terminate(self, future: Future[Any] | None = None) -> bool:
        """Stop one task, or all of them and the pool.

        Args:
            future: The task's, as ``submit`` returned it. It is cancelled if it has not begun; if it runs, its worker
                is stopped and replaced, and it ends with ``TaskTerminatedError``. None stops everything now.

        Returns:
            Whether there was something to stop: False for a future that was done.

        Raises:
            ValueError: The future is of no task of this pool.
        """
        if future is None:
            self._close(cancel=True, kill=True, wait=True)
            return True
        if self._engine is None:
            msg = "this pool has not begun, so the future is of no task of it"
            raise ValueError(msg)
        return self._engine.terminate(future)

    def options(
        self,
        *,
        retries: int | None = None,
        retry_if: Callable[[BaseException], bool] | None = None,
        timeout: float | None = None,
    ) -> PoolView:
        """Return a view of this pool with other defaults for its tasks.

        Args:
            retries: As for the pool; None keeps the pool's.
            retry_if: As for the pool; None keeps the pool's.
            timeout: As for the pool; None keeps the pool's.
        """
        policy = self._policy
        if retries is not None:
            policy = replace(policy, retries=checked_retries(retries))
        if retry_if is not None:
            policy = replace(policy, retry_if=checked_function("retry_if", retry_if))
        return PoolView(self, policy, self._timeout if timeout is None else checked_timeout(timeout))

    def stats(self) -> PoolStats:
        """Return what the pool has done so far, and how its token stands."""
        with self._lock:
            state, engine, sharing = self._state, self._engine, self._sharing
        if state != "new" and (engine is None or engine.has_ended):
            state = "closed"
        tally = engine.tally if engine is not None else None
        refresher = sharing.refresher if sharing is not None else None
        history = refresher.history if refresher is not None else None
        token = history.token if history is not None else None
        logins = refresher.logins if refresher is not None else 0
        return PoolStats(
            state=state,
            workers=self.max_workers,
            tasks_pending=engine.backlog if engine is not None else 0,
            tasks_done=tally.done if tally is not None else 0,
            tasks_failed=tally.failed if tally is not None else 0,
            tasks_retried=tally.retried if tally is not None else 0,
            workers_lost=tally.workers_lost if tally is not None else 0,
            logins=logins,
            refreshes=max(logins - 1, 0),
            login_failures=refresher.failures if refresher is not None else 0,
            last_error=None if history is None or history.error is None else _described(history.error),
            token_state=refresher.state().value if refresher is not None else State.EXPIRED.value,
            generation=token.generation if token is not None else 0,
            token_remaining=token.remaining(SYSTEM_CLOCK.now()) if token is not None else None,
            gate=self._gate.stats(),
        )

    def __repr__(self) -> str:
        now = self.stats()
        standing = "no token yet"
        if now.token_remaining is not None:
            standing = f"token generation {now.generation} {now.token_state}, {now.token_remaining:.0f} s left"
        error = "" if now.last_error is None else f", last login failed: {now.last_error}"
        tasks = f"{now.tasks_pending} pending, {now.tasks_done} done, {now.tasks_failed} failed"
        workers = f"{now.workers} {self._engine_name} workers"
        return f"<AuthenticatedProcessPool {now.state}, {workers}, {tasks}, {standing}{error}>"

    @property
    def max_workers(self) -> int:
        """How many tasks can run at once; 0 while that is a cluster's to say, and the pool has not begun."""
        if self._where is not None and self._engine is not None:
            return self._engine.workers
        return self._workers or 0

    # Inside

    def _running_engine(self) -> Engine:
        engine = self._engine
        if self._state != "running" or engine is None:
            if self._state == "new" and self._engine_name == "loky":
                # Not under the lock: handlers of signals may use the pool meanwhile, or wait for a thread that does.
                import_each("shpool.engines.crew")
            with self._lock:
                if self._state == "new" and not self._is_starting:
                    self._is_starting = True
                    try:
                        self._start()
                    finally:
                        self._is_starting = False
                self._check_open()
                engine = self._engine
                if engine is None:  # in a handler, a moment too early
                    msg = "cannot schedule new futures yet: the pool is starting"
                    raise RuntimeError(msg)
        sharing = self._sharing
        if sharing is not None and sharing.refresher.history.is_final:
            self._check_token(sharing)
        return engine

    def _start(self) -> None:
        """Launch the workers, then log in while they start; look between the steps whether a handler ends the pool."""
        engine, sharing = self._assemble()
        try:
            self._check_open()
            engine.start()
        except BaseException:
            engine.shutdown(cancel=True, kill=True)  # a handler may have raised when it had just been started
            engine.join()
            sharing.end()
            if engine.has_ended:
                self._state = "closing"
            elif self._state == "closing":  # there was no engine yet that ran, and would have ended all
                self._engine = None
                self._gate.close()
            raise
        try:
            self._check_open()
            # The last to be registered runs first: a cluster's library, imported by now, must not leave before we do.
            atexit.unregister(_end_all)
            atexit.register(_end_all)
            # Neither the engine nor the sharing knows the pool, so one that is forgotten is collected, and then ends.
            weakref.finalize(self, engine.shutdown).atexit = False
            sharing.start()
            if engine.has_ended:  # so soon: it has called sharing.end() too early
                sharing.end()
        except BaseException as exc:
            is_ended, self._state = self._state == "closing", "closing"
            engine.shutdown(cancel=True, kill=True)
            engine.join()
            reason = _closed() if is_ended else engine.failure  # that ended the sharing, in which the login then failed
            if reason is None or isinstance(exc, LoginError) or not isinstance(exc, Exception):
                raise
            raise reason from None
        if self._state == "new":  # no handler is called between this and the next
            self._state = "running"

    def _assemble(self) -> tuple[Engine, SharingThread]:
        """Return what is to be started; nothing of it runs yet."""
        engine = self._make_engine()
        try:
            channel = engine.channel
            if self._memory_name is not None:
                channel = TeeChannel(channel, NamedChannel(self._memory_name))
            sharing = SharingThread(self._session, channel)
        except BaseException:
            engine.channel.close()
            raise
        engine.on_refused = sharing.refresher.report_refused
        engine.on_end = _ending(sharing, self._gate)
        self._engine, self._sharing, self._owner = engine, sharing, os.getpid()
        _live.add(self)
        return engine, sharing

    def _make_engine(self) -> Engine:
        if self._engine_name == "inline":
            from shpool.engines.inline import Inline

            return Inline(self._setup, gate=self._gate)
        blanked = functools.partial(_secret_variables, self._session)
        if self._where is not None:
            return self._where.build(self._workers, self._setup, blanked, self._gate)
        from shpool.engines.crew import Crew

        return Crew(self._workers or 1, self._setup, blanked=blanked, gate=self._gate)

    def _check_open(self) -> None:
        if self._state == "closing":
            raise _closed()

    def _close(self, *, cancel: bool, kill: bool, wait: bool) -> None:
        if self._engine is not None and os.getpid() != self._owner:
            return  # a forked child: the pool is its parent's
        with self._lock:
            self._state = "closing"
        if self._engine is not None:
            self._engine.shutdown(cancel=cancel, kill=kill)
            if wait:
                self._engine.join()
        else:
            self._gate.close()

    @staticmethod
    def _check_token(sharing: SharingThread) -> None:
        history = sharing.refresher.history
        if history.token is None or history.token.remaining(SYSTEM_CLOCK.now()) <= 0:
            reason = "it has expired and the provider refuses to give another"
            raise TokenUnavailableError(reason, str(history.error))


class PoolView(Submitting):
    """A pool with other defaults for retries and timeout; made by ``AuthenticatedProcessPool.options``."""

    def __init__(self, pool: AuthenticatedProcessPool, policy: RetryPolicy, timeout: float | None) -> None:
        self._pool = pool
        self._policy = policy
        self._timeout = timeout

    @property
    def max_workers(self) -> int:
        """Number of worker processes of the pool this is a view of."""
        return self._pool.max_workers

    def _running_engine(self) -> Engine:
        return self._pool._running_engine()  # noqa: SLF001 - the pool's own view

    def __enter__(self) -> Self:
        """Start the pool this is a view of; see there."""
        self._pool.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the pool this is a view of; see there."""
        self._pool.__exit__(kind, error, trace)

    def terminate(self, future: Future[Any] | None = None) -> bool:
        """Stop one task, or the pool this is a view of; see there."""
        return self._pool.terminate(future)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: FBT001, FBT002 - the Executor's signature
        """End the pool this is a view of."""
        self._pool.shutdown(wait, cancel_futures=cancel_futures)

    def __repr__(self) -> str:
        return f"<PoolView retries={self._policy.retries} timeout={self._timeout} of {self._pool!r}>"


def _ending(sharing: SharingThread, gate: Gate) -> Callable[[], None]:
    """Return what ends with the engine; it must not know the pool."""

    def end() -> None:
        sharing.end()
        gate.close()

    return end


def _closed() -> RuntimeError:
    return RuntimeError("cannot schedule new futures after shutdown")


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _described_engine(engine: object) -> EngineDescription | None:
    """Return the description of a cluster's engine, None for the engines of this machine."""
    if isinstance(engine, str) and engine not in _ENGINES:
        msg = f"engine must be one of {', '.join(_ENGINES)}, a DaskEngine or a RayEngine, not {engine!r}"
        raise ValueError(msg)
    if engine in {"loky", "inline"}:
        return None
    if engine == "ray":
        from shpool.engines.ray import RayEngine

        return RayEngine()
    from shpool.engines.dask import DaskEngine, is_dask_client

    if engine == "dask":
        return DaskEngine()
    if is_dask_client(engine):
        return DaskEngine(engine)
    if isinstance(engine, type) or not callable(getattr(engine, "build", None)):
        msg = f"engine must be a name, a DaskEngine, a RayEngine or a distributed.Client, not {engine!r}"
        raise TypeError(msg)
    return cast("EngineDescription", engine)


def _thread_limits(workers: int | None, where: EngineDescription | None) -> dict[str, str]:
    """Return how many threads a worker's libraries may start, for those that nobody has told yet."""
    if where is not None or workers is None:
        return {}  # a cluster's workers have long imported them
    share = str(max(1, processor_count() // workers))
    return {name: share for name in _THREAD_VARIABLES if name not in os.environ}


def _checked_gate(gate: Gate | str | None) -> Gate:
    """Return a gate that is the pool's to close: the caller may close theirs while workers are still to be started."""
    if gate is None:
        return Gate()
    if isinstance(gate, str):
        return Gate.preset(gate)
    if not isinstance(gate, Gate):
        msg = f"gate must be a Gate, the name of a provider or None, not {gate!r}"  # type: ignore[unreachable]  # callers without a type checker
        raise TypeError(msg)
    if gate.is_closed:
        msg = "the gate is closed; make a new one for this pool"
        raise ValueError(msg)
    return gate.held_anew()


def _secret_variables(session: object) -> tuple[str, ...]:
    """Return the environment variables no worker may inherit."""
    is_secret = getattr(session, "is_secret", lambda _: False)
    return (*SECRET_VARIABLES, *(name for name, value in os.environ.items() if is_secret(value)))


def _end_all() -> None:
    """Finish what is pending at interpreter exit, as the standard library's executors do; after ^C, stop it."""
    interrupted = issubclass(getattr(sys, "last_type", None) or Exception, KeyboardInterrupt)
    for pool in list(_live):
        if interrupted:
            pool.terminate()
        else:
            pool.shutdown(wait=True)


def _renew_locks() -> None:
    """Run in a forked child: threads that are not there may have held them."""
    for pool in list(_live):
        pool._lock = threading.RLock()  # noqa: SLF001 - this module's own class


_live: weakref.WeakSet[AuthenticatedProcessPool] = weakref.WeakSet()
atexit.register(_end_all)
os.register_at_fork(after_in_child=_renew_locks)
