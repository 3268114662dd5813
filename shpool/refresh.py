"""When to log in again, and what to do when that fails: pure decisions, and one loop that waits.

The rules:

 1. A token is FRESH until its refresh is due, STALE until it ends, then EXPIRED. REFUSED is final.
 2. The window before the end is the smaller of ``refresh_before_expiry`` and a quarter of the lifetime. The refresh
    falls at a random point of the window's middle fifth: pools started together do not log in together, and the
    rest of the window is time to try again.
 3. Two logins are at least the floor apart: 5 s, or a tenth of the lifetime where that is less.
 4. A failed login is tried again with full-jitter backoff, no sooner than the endpoint's Retry-After, without end.
    Once the token has ended, or a server has refused it, readers wait for the next one: then no pause of our own is
    longer than 5 s, which leaves several attempts within their patience of 30 s.
 5. The token in hand is served until it has really ended, whatever fails meanwhile. A login that brings an expired
    token has failed in this sense.
 6. Only a refusal for good (invalid_client, unauthorized_client, invalid_scope, unsupported_grant_type) ends the
    attempts.
 7. A login that brings no later end is no progress: the next one waits as after a failure, and no longer than
    until shortly after the token's end, when the provider has to mint another. A report still calls for one sooner.
 8. A report that the current generation was refused calls for a login now. Forced logins are at least 5 s apart.
    Reports of older generations call for nothing: the reporter will see the newer token.
 9. Time left is the lesser of what wall clock and boot clock say; no single nap is longer than 30 s. So a stepped
    clock or a suspended laptop costs one login at most, and never an expired token taken for a fresh one.

Nothing here knows the network or the memory; ``Refresher`` gets ``login``, ``publish``, ``clock`` and ``wait``.
"""

from __future__ import annotations

import enum
import logging
import math
import random
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from shpool.errors import LoginError, LoginRefusedError, TokenTooLargeError
from shpool.redaction import fingerprint
from shpool.retry import Backoff
from shpool.tokens import Posting

if TYPE_CHECKING:
    from collections.abc import Callable

    from shpool.tokens import Clock, Instant, Token

logger = logging.getLogger(__name__)

LARGEST_SHARE = 0.25  # of the lifetime: what a window may take of it
REFRESH_POINT = (0.4, 0.6)  # of the window, counted from the token's end
LONGEST_FLOOR = 5.0  # s between two logins
FLOOR_SHARE = 0.1  # of the lifetime, where that is less
FORCED_GAP = 5.0  # s between two logins that workers asked for
LONGEST_NAP = 30.0  # s until the clocks are looked at again
LONGEST_RETRY_AFTER = 3600.0  # s; an endpoint that asks for more is asked again after an hour
LONGEST_PAUSE_WITHOUT = 5.0  # s between attempts while readers wait for a token
SHORTEST_PAUSE = 0.05  # s after a failure: full jitter may draw nothing at all
_LONGEST_ERROR = 1000  # characters of an error that readers are told; a server's words may be of any length
_AFTER_END = 0.05  # s past the end, when a provider that repeats tokens must mint another


class State(enum.Enum):
    """How the token in hand stands."""

    FRESH = "fresh"
    STALE = "stale"
    EXPIRED = "expired"
    REFUSED = "refused"


@dataclass(frozen=True)
class History:
    """All that the next decision depends on. Times are seconds on the boot clock.

    Attributes:
        token: The token in hand.
        due: When its refresh is due.
        not_before: No login before this moment, reports included.
        failures: Attempts in a row without progress.
        refused_generation: Newest generation a reader reported as refused.
        forced_at: When the last login that a report asked for began.
        error: The last login error; None once a login worked again.
    """

    token: Token | None = None
    due: float = 0.0
    not_before: float = 0.0
    failures: int = 0
    refused_generation: int = 0
    forced_at: float = -math.inf
    error: LoginError | None = None

    @property
    def is_final(self) -> bool:
        """Tell whether the provider refused for good (rule 6)."""
        return isinstance(self.error, LoginRefusedError)

    @property
    def is_reported(self) -> bool:
        """Tell whether a reader was refused with the token in hand (rule 8)."""
        return self.token is not None and self.refused_generation >= self.token.generation > 0

    def posting(self) -> Posting:
        """Return what readers should know."""
        return Posting(self.token, "" if self.error is None else str(self.error)[:_LONGEST_ERROR], self.is_final)


def refresh_window(lifetime: float, refresh_before_expiry: float) -> float:
    """Return the window before the end, in seconds (rule 2)."""
    return min(refresh_before_expiry, LARGEST_SHARE * lifetime)


def login_floor(lifetime: float) -> float:
    """Return the least time between two logins, in seconds (rule 3)."""
    return min(LONGEST_FLOOR, FLOOR_SHARE * lifetime) if lifetime > 0 else LONGEST_FLOOR


def backoff_for(lifetime: float) -> Backoff:
    """Return the waits after failures, scaled so that a short-lived token sees several attempts (rule 4)."""
    return Backoff(base=min(max(lifetime / 20, 0.1), 1.0), cap=min(max(lifetime / 10, 1.0), 60.0))


def state_of(history: History, now: Instant) -> State:
    """Return how things stand (rule 1)."""
    if history.is_final:
        return State.REFUSED
    if history.token is None or history.token.remaining(now) <= 0:
        return State.EXPIRED
    return State.STALE if now.boot >= history.due else State.FRESH


def seconds_until_login(history: History, now: Instant) -> float:
    """Return how long to wait before the next login: 0 for now, infinity for never."""
    if history.is_final:
        return math.inf
    wanted = history.due
    if history.is_reported:
        wanted = min(wanted, max(now.boot, history.forced_at + FORCED_GAP))
    if history.token is None or history.token.remaining(now) <= 0:
        wanted = now.boot
    return max(wanted, history.not_before, now.boot) - now.boot


def after_login(
    history: History, token: Token, now: Instant, *, refresh_before_expiry: float, rng: random.Random
) -> History:
    """Return the history once a login has brought ``token`` (rules 2, 3 and 7)."""
    forced_at = now.boot if history.is_reported else history.forced_at
    left = token.remaining(now)
    floor = login_floor(token.lifetime)
    fresh = replace(history, token=token, error=None, forced_at=forced_at)
    if left <= 0 or _is_no_progress(history.token, token):
        pause = max(floor, backoff_for(token.lifetime).delay(history.failures, rng))
        moment = now.boot + max(floor, min(pause, left + _AFTER_END) if left > 0 else min(pause, LONGEST_PAUSE_WITHOUT))
        if left <= 0:
            fresh = replace(fresh, token=_longer_lived(token, history.token), error=expired_on_arrival())
        not_before = now.boot if left > 0 else moment
        return replace(fresh, due=moment, not_before=not_before, failures=history.failures + 1)
    window = refresh_window(token.lifetime, refresh_before_expiry)
    due = now.boot + left - window * rng.uniform(*REFRESH_POINT)
    # A report may come before the floor has passed, and is spaced by rule 8 instead.
    return replace(fresh, due=max(due, now.boot + floor), not_before=now.boot, failures=0)


def after_failure(history: History, error: LoginError, now: Instant, *, rng: random.Random) -> History:
    """Return the history once a login has failed (rules 4 to 6)."""
    token = history.token
    lifetime, left = (0.0, 0.0) if token is None else (token.lifetime, token.remaining(now))
    pause = backoff_for(lifetime).delay(history.failures, rng)
    pause = min(pause, LONGEST_PAUSE_WITHOUT if history.is_reported else max(LONGEST_PAUSE_WITHOUT, left))
    pause = max(pause, min(error.retry_after or 0.0, LONGEST_RETRY_AFTER), SHORTEST_PAUSE)
    forced_at = now.boot if history.is_reported else history.forced_at
    moment = now.boot + pause
    return replace(history, not_before=moment, failures=history.failures + 1, error=error, forced_at=forced_at)


def after_report(history: History, generation: int) -> History:
    """Return the history once a reader has reported a refused generation (rule 8)."""
    return replace(history, refused_generation=max(history.refused_generation, generation))


def expired_on_arrival() -> LoginError:
    """Return the error of a login that answered a token without any life left."""
    return LoginError("session", "the token it gave had already expired")


def _longer_lived(token: Token, before: Token | None) -> Token:
    """Return what to go on with (rule 5)."""
    return token if before is None or before.deadline <= token.deadline else before


def _is_no_progress(before: Token | None, after: Token) -> bool:
    return before is not None and (after.access_token == before.access_token or after.deadline <= before.deadline)


class Wait(Protocol):
    """Sleep, and return early when woken."""

    def __call__(self, seconds: float, /) -> None:
        """Sleep so many seconds at most."""


class Refresher:
    """Keep one token fresh until told to stop.

    Args:
        login: Brings a token newer than the given one, or raises ``LoginError``. One attempt, no waiting.
        publish: Shows a posting to all readers.
        clock: Where the time comes from.
        wait: Sleeps up to so many seconds; must return early after ``wake`` was called.
        wake: Makes ``wait`` return.
        refresh_before_expiry: Seconds before the end from which a new token is wanted.
        rng: Source of jitter.
    """

    def __init__(  # noqa: PLR0913 - every collaborator is passed in
        self,
        login: Callable[[Token | None], Token],
        publish: Callable[[Posting], None],
        *,
        clock: Clock,
        wait: Wait,
        wake: Callable[[], None] = lambda: None,
        refresh_before_expiry: float = 120.0,
        rng: random.Random | None = None,
    ) -> None:
        self._login = login
        self._publish = publish
        self._clock = clock
        self._wait = wait
        self._wake = wake
        self._refresh_before_expiry = refresh_before_expiry
        self._rng = rng or random.Random()  # noqa: S311 - jitter, no cryptography
        self._lock = threading.Lock()
        self._history = History()  # replaced under _lock: reports come from any thread, all else from the loop's
        self._newest = 0  # generation ever shown to a reader; set before it is shown
        self._stopped = False
        self.logins = 0
        self.failures = 0

    @property
    def history(self) -> History:
        """The present state of affairs; a snapshot."""
        return self._history

    def state(self) -> State:
        """Return how the token in hand stands now."""
        return state_of(self._history, self._clock.now())

    def first_login(self) -> Token:
        """Log in and publish, in the caller's thread; what goes wrong is raised and nothing is published."""
        token = self._login(None)
        if token.remaining(self._clock.now()) <= 0:
            raise expired_on_arrival()
        self._take(token)
        return token

    def report_refused(self, generation: int) -> None:
        """Take a reader's word that a server refused the token of this generation; any thread.

        Nobody can have been refused with a generation that was never shown: such a report would stand for ever.
        """
        with self._lock:
            if generation > self._newest:
                return
            known = self._history.refused_generation
            self._history = after_report(self._history, generation)
            is_news = self._history.refused_generation > known and self._history.is_reported
        if is_news:
            self._wake()

    def stop(self) -> None:
        """Make the loop end soon; any thread."""
        self._stopped = True
        self._wake()

    def run(self) -> None:
        """Keep the token fresh until ``stop()`` is called."""
        while not self._stopped:
            pause = seconds_until_login(self._history, self._clock.now())
            if pause > 0:
                self._wait(min(pause, LONGEST_NAP))
            else:
                self.attempt()

    def attempt(self) -> None:
        """Log in once; take what comes, a token or an error."""
        try:
            token = self._login(self._history.token)
            if not self._stopped:
                self._take(token)
        except LoginError as exc:
            self._note_failure(exc)
        except Exception as exc:  # noqa: BLE001 - border: a user's own session, or a token too large, ends no loop
            self._note_failure(LoginError("session", f"{type(exc).__name__}: {exc}"))

    def _take(self, token: Token) -> None:
        now = self._clock.now()
        is_another = self._history.token is None or token.generation != self._history.token.generation
        history = after_login(
            self._history, token, now, refresh_before_expiry=self._refresh_before_expiry, rng=self._rng
        )
        with self._lock:
            self._newest = max(self._newest, token.generation)
        self._publish(history.posting())  # a token too large for the channel is not adopted
        self._adopt(history)
        self.logins += is_another
        mark, left = fingerprint(token.access_token), token.remaining(now)
        logger.info("token %s of generation %d is shared, %.0f s left", mark, token.generation, left)

    def _note_failure(self, error: LoginError) -> None:
        if self._stopped:
            return
        now = self._clock.now()
        history = after_failure(self._history, error, now, rng=self._rng)
        self._adopt(history)
        self.failures += 1
        try:
            self._publish(history.posting())
        except TokenTooLargeError:  # together with the error's text; the token alone was shown before
            self._publish(replace(history.posting(), error=""))
        if history.is_final:
            logger.error("no further logins: %s", error)
        else:
            # A long outage must not fill a log: the 1st, 2nd, 4th, 8th … failure in a row is a warning.
            level = logging.DEBUG if history.failures & (history.failures - 1) else logging.WARNING
            text = "login failed %d times in a row, next attempt in %.1f s: %s"
            logger.log(level, text, history.failures, history.not_before - now.boot, error)

    def _adopt(self, history: History) -> None:
        with self._lock:  # a report may have come since the decision was taken
            self._history = after_report(history, self._history.refused_generation)
