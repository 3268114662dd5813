"""The pool of a run: opened with patience, counted when it has ended, and not waited for where the run has failed."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from shpool_cli.credentials import log_in_patiently
from shpool_cli.journaling import note_counts, noting

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shpool.engines.base import EngineDescription
    from shpool.journal import Journal
    from shpool.pool import AuthenticatedProcessPool
    from shpool.session import OAuthSession
    from shpool_cli.options import GateOptions
    from shpool_cli.summary import Summary


@contextlib.contextmanager
def running_pool(  # noqa: PLR0913 - what a run has of its own
    session: OAuthSession,
    gate: GateOptions,
    journal: Journal | None,
    summary: Summary,
    *,
    workers: int | None,
    jobs: int,
    engine: str | EngineDescription = "loky",
) -> Iterator[AuthenticatedProcessPool]:
    """Log in, and yield a pool; its logins and waits go to the summary and the journal.

    Args:
        session: What logs in.
        gate: The account's limits.
        journal: The run's, if it has one.
        summary: What the run comes to.
        workers: How many are asked for; None for the pool's own number.
        jobs: How many there are to run at most: no more workers are started.
        engine: Where they run.

    Raises:
        LoginError: There is no token.
    """
    from shpool.checks import checked_workers
    from shpool.pool import AuthenticatedProcessPool

    known = checked_workers(workers, is_local=engine == "loky")
    most = None if known is None else max(1, min(known, jobs))

    def opened() -> AuthenticatedProcessPool:
        limits = gate.make()
        stack.callback(limits.close)
        return stack.enter_context(AuthenticatedProcessPool(session, most, engine=engine, gate=limits))

    def conclude() -> None:
        """Count once the pool has ended: its last login is in it then."""
        stats = pool.stats()
        summary.note(stats)
        if journal is not None:
            note_counts(journal, stats)

    def end_at_once(kind: type[BaseException] | None, *_: object) -> None:
        """Wait for no running job where its result has nowhere to go."""
        if kind is not None:
            pool.terminate()

    with contextlib.ExitStack() as after, contextlib.ExitStack() as stack:
        pool = log_in_patiently(session, opened)
        after.callback(conclude)
        stack.push(end_at_once)
        stack.enter_context(noting(journal, pool))
        yield pool
