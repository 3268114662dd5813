"""Sharing a session: the thread of the parent that keeps a token posted.

``SessionSharingThread`` and ``SessionSharing`` share under a name that any process of the user can collect from;
``SharingThread`` does the same over any channel, which is how the pool uses it.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shpool.channels import NamedChannel
from shpool.errors import LoginError
from shpool.importing import import_each, signals_wait
from shpool.refresh import Refresher
from shpool.shared import DEFAULT_NAME, SharedSession
from shpool.sources import refresh_window_of, source_of
from shpool.tokens import SYSTEM_CLOCK, Clock, Posting, Token
from shpool.waiting import wait_in_glances

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from shpool.channels import TokenChannel
    from shpool.retry import RetryAfterUnit
    from shpool.sources import Session

ATTEMPT_WITHIN = 20.0  # s for one login, whatever it does: less than readers wait, more than its own timeouts


class SharingThread(threading.Thread):
    """Keep a session's token fresh on a channel, from ``start()`` until ``join()``.

    A thread, because refreshing must go on while the parent's own code is busy. Logins after the first run in a
    short-lived thread of their own, so that this one ends at once even when a token endpoint hangs.
    """

    def __init__(self, session: Session, channel: TokenChannel, *, clock: Clock = SYSTEM_CLOCK, **kwargs: Any) -> None:  # noqa: ANN401 - handed to threading.Thread
        kwargs.setdefault("name", "shpool-sharing")
        kwargs.setdefault("daemon", True)
        super().__init__(**kwargs)
        self._source = source_of(session, clock)
        self._session = session
        self._allowed_hosts = tuple(getattr(session, "allowed_hosts", ()))
        self._retry_after_unit: RetryAfterUnit = getattr(session, "retry_after_unit", "s")
        self._channel = channel
        self._owner = os.getpid()
        self._woken = threading.Event()
        self._is_over = threading.Event()
        self._is_stopping = False
        self.refresher = Refresher(
            self._login,
            self._publish,
            clock=clock,
            wait=self._nap,
            wake=lambda: self._woken.set(),  # noqa: PLW0108 - a forked child gets another event
            refresh_before_expiry=refresh_window_of(session),
        )

    def start(self) -> None:
        """Log in, in the caller's thread, and return once the token is shared.

        Raises:
            LoginError: The first login failed; nothing is shared then.
            TokenTooLargeError: The channel cannot hold the token.
        """
        if self.ident is None:  # a second start is refused by the thread itself
            import_each("hashlib")  # for the board
            self.refresher.first_login()
            _running.add(self)
        with signals_wait():
            super().start()

    def run(self) -> None:
        """Refresh until stopped, then end sharing."""
        try:
            self.refresher.run()
        finally:
            _running.discard(self)  # a child forked from now on has nothing to read here
            self._channel.close()
            self._is_over.set()

    def stop(self) -> None:
        """Ask the thread to end; ``join()`` does too. In a forked child there is nothing to end."""
        self._is_stopping = True
        if os.getpid() == self._owner:
            self.refresher.stop()

    def end(self) -> None:
        """Stop and wait for the end, started or not; nothing stays shared."""
        if self.ident is None:
            self._channel.close()
        else:
            self.join()

    def join(self, timeout: float | None = None) -> None:
        """Stop the thread and wait for its end, at which it zeroes and unlinks what it shared.

        Args:
            timeout: Seconds to wait at most; see ``is_alive()`` afterwards. Without, as long as it takes: the
                thread never waits for the network.
        """
        self.stop()
        if os.getpid() != self._owner:
            return
        # Not for the thread at once: before Python 3.13 one whose join() was interrupted counts as stopped ever after.
        if self.ident is None or wait_in_glances(self._is_over.wait, timeout):
            super().join(timeout)

    def become_reader(self) -> None:
        """In a forked child, where no thread of the parent's runs: let the session read what the parent posts."""
        _running.discard(self)
        self._woken = threading.Event()  # whose lock a thread may have held at the fork
        follow = getattr(self._session, "follow", None)
        if follow is not None:
            shared = SharedSession(self._channel.reader())
            follow(lambda: shared.token)

    def _publish(self, posting: Posting) -> None:
        hosts, unit = self._allowed_hosts, self._retry_after_unit
        self._channel.publish(replace(posting, allowed_hosts=hosts, retry_after_unit=unit))

    def _nap(self, seconds: float) -> None:
        give_up = time.monotonic() + seconds
        while (left := give_up - time.monotonic()) > 0:
            is_woken = self._woken.wait(min(left, self._channel.report_poll))
            self._woken.clear()
            report = self._channel.newest_report()
            if report:
                self.refresher.report_refused(report)
            if is_woken or self._woken.is_set():
                return

    def _login(self, after: Token | None) -> Token:
        if after is None:
            return self._source.renew(None)
        outcome: list[Token | BaseException] = []

        def attempt() -> None:
            try:
                outcome.append(self._source.renew(after))
            except BaseException as exc:  # noqa: BLE001 - carried over to the sharing thread
                outcome.append(exc)
            self._woken.set()

        try:
            threading.Thread(target=attempt, name="shpool-login", daemon=True).start()
        except RuntimeError:  # the interpreter is ending and starts no threads any more
            attempt()
        give_up = time.monotonic() + ATTEMPT_WITHIN
        while not outcome and not self._is_stopping and (left := give_up - time.monotonic()) > 0:
            self._woken.wait(left)
            self._woken.clear()
        if not outcome:
            reason = f"a login took longer than {ATTEMPT_WITHIN:.0f} s and was given up"
            raise LoginError(type(self._session).__name__, reason)
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]


class SessionSharingThread(SharingThread):
    """Share a session with other processes of the same user, under a name.

    Args:
        session: What logs in; it must refresh its token.
        memory_name: Name of the shared-memory segment.
        **thread_kwargs: For ``threading.Thread``.

    Raises:
        ValueError: The session does not refresh, or the name is no possible one.
        BoardInUseError: A living process shares under that name.
        ForeignBoardError: Another user holds that name.
    """

    def __init__(self, session: Session, memory_name: str = DEFAULT_NAME, **thread_kwargs: Any) -> None:  # noqa: ANN401 - handed to threading.Thread
        source_of(session)  # refused before anything is created
        self.memory_name = memory_name
        channel = NamedChannel(memory_name)
        self._if_forgotten = weakref.finalize(self, channel.close)  # one never started leaves no name behind either
        super().__init__(session, channel, **thread_kwargs)

    def start(self) -> None:
        """Log in, in the caller's thread, and return once the token is shared; else raise, and free the name.

        Raises:
            LoginError: The first login failed.
            TokenTooLargeError: The token does not fit the shared memory.
        """
        self._if_forgotten.atexit = False  # the thread itself ends sharing then
        try:
            super().start()
        except BaseException:
            if not self.is_alive():
                self.end()
            raise


class SessionSharing:
    """Share a session under a name for the length of a ``with`` block.

    Args:
        session: What logs in; it must refresh its token.
        **kwargs: As for ``SessionSharingThread``.

    Entering raises what ``SessionSharingThread`` and its ``start()`` raise.
    """

    def __init__(self, session: Session, **kwargs: Any) -> None:  # noqa: ANN401 - handed to SessionSharingThread
        source_of(session)
        self._session = session
        self._kwargs = kwargs
        self.thread: SessionSharingThread | None = None

    def __enter__(self) -> Self:
        thread = SessionSharingThread(self._session, **self._kwargs)
        thread.start()
        self.thread = thread
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.thread is not None:
            self.thread.join()


def _end_all() -> None:
    """End sharing at interpreter exit, so that no name outlives the process."""
    for thread in list(_running):
        if thread.is_alive():
            thread.join(_EXIT_WAIT)


def _become_readers() -> None:
    for thread in list(_running):
        thread.become_reader()


_EXIT_WAIT = 3.0  # s
_running: weakref.WeakSet[SharingThread] = weakref.WeakSet()
atexit.register(_end_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_become_readers)
