"""Refreshing: each of the numbered rules, as pure functions and in the real loop on a clock that only tests move."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shpool.errors import LoginError, LoginRefusedError, TokenTooLargeError
from shpool.refresh import (
    FORCED_GAP,
    LONGEST_NAP,
    LONGEST_RETRY_AFTER,
    SHORTEST_PAUSE,
    History,
    Refresher,
    State,
    after_failure,
    after_login,
    after_report,
    backoff_for,
    login_floor,
    refresh_window,
    seconds_until_login,
    state_of,
)
from shpool.testing import FakeClock
from shpool.tokens import DEFAULT_LIFETIME, Instant, Posting, Token, token_from_response

if TYPE_CHECKING:
    from collections.abc import Callable

_NOW = Instant(wall=1_800_000_000.0, boot=1_000.0)
_HOUR = 3600.0
_DOWN = LoginError("https://idp.example/token", "service unavailable", 503)
_BUSY = LoginError("https://idp.example/token", "too many requests", 429, 2.0)
_REFUSED = LoginRefusedError("https://idp.example/token", "demo-client", "invalid_client")

lifetimes = st.floats(0.2, 10 * 86_400.0)
windows = st.floats(0.0, 7200.0)
seeds = st.integers(0, 2**32)


def make_token(lifetime: float = _HOUR, now: Instant = _NOW, generation: int = 1, text: str = "") -> Token:
    text = text or f"invented-{generation}"
    return Token(text, now.wall + lifetime, now.boot + lifetime, lifetime, generation=generation)


def later(seconds: float, wall: float = 0.0) -> Instant:
    return Instant(_NOW.wall + seconds + wall, _NOW.boot + seconds)


def logged_in(
    token: Token, before: History | None = None, now: Instant = _NOW, *, early: float = 120.0, seed: int = 0
) -> History:
    return after_login(before or History(), token, now, refresh_before_expiry=early, rng=random.Random(seed))


def failed(before: History, error: LoginError = _DOWN, now: Instant = _NOW, seed: int = 0) -> History:
    return after_failure(before, error, now, rng=random.Random(seed))


# The decisions


def test_a_token_is_fresh_then_stale_then_expired() -> None:
    """Rule 1."""
    history = logged_in(make_token())
    due = history.due - _NOW.boot
    assert state_of(History(), _NOW) is State.EXPIRED
    assert state_of(history, later(due - 0.01)) is State.FRESH
    assert state_of(history, later(due)) is State.STALE
    assert state_of(history, later(_HOUR - 0.01)) is State.STALE
    assert state_of(history, later(_HOUR)) is State.EXPIRED


def test_a_refusal_for_good_ends_all_attempts() -> None:
    """Rule 6, whatever else happens."""
    history = failed(logged_in(make_token()), _REFUSED)
    assert state_of(history, _NOW) is State.REFUSED
    for reported in (history, after_report(history, 1)):
        for moment in (0.0, _HOUR, 10 * _HOUR):
            assert seconds_until_login(reported, later(moment)) == math.inf
    assert history.posting().refused
    assert "invalid_client" in history.posting().error


@pytest.mark.parametrize(
    ("lifetime", "early", "window"),
    [(3600.0, 120.0, 120.0), (600.0, 120.0, 120.0), (120.0, 120.0, 30.0), (60.0, 120.0, 15.0), (2.0, 120.0, 0.5)],
)
def test_the_window_is_a_share_of_the_lifetime_at_most(lifetime: float, early: float, window: float) -> None:
    """Rule 2; the third and fourth are what sends the original into a busy loop (defect 2)."""
    assert refresh_window(lifetime, early) == window


@given(lifetimes, windows, seeds)
def test_the_refresh_falls_into_the_middle_fifth_of_the_window(lifetime: float, early: float, seed: int) -> None:
    """Rules 2 and 3: jittered, before the end, and not before the floor."""
    history = logged_in(make_token(lifetime), early=early, seed=seed)
    window = refresh_window(lifetime, early)
    left = _NOW.boot + lifetime - history.due
    assert 0.4 * window - 1e-6 <= left <= 0.6 * window + 1e-6
    assert history.due - _NOW.boot >= login_floor(lifetime) - 1e-6
    assert seconds_until_login(history, _NOW) == pytest.approx(history.due - _NOW.boot, abs=1e-6)


def test_pools_started_together_do_not_log_in_together() -> None:
    """Rule 2: 50 of them spread over the fifth of a window of 120 s."""
    dues = [logged_in(make_token(), seed=seed).due for seed in range(50)]
    assert max(dues) - min(dues) > 20.0


@pytest.mark.parametrize(("lifetime", "floor"), [(3600.0, 5.0), (50.0, 5.0), (20.0, 2.0), (1.0, 0.1), (0.0, 5.0)])
def test_the_floor_between_logins(lifetime: float, floor: float) -> None:
    """Rule 3; a token without any life must not be asked for in a loop either."""
    assert login_floor(lifetime) == pytest.approx(floor)


@given(st.integers(1, 10_000), lifetimes, seeds)
def test_waits_after_failures_stay_in_bounds(failures: int, lifetime: float, seed: int) -> None:
    """Rule 4: full jitter under a ceiling that fits the lifetime, never nothing at all, for ever."""
    history = dataclasses.replace(logged_in(make_token(lifetime)), failures=failures)
    pause = failed(history, seed=seed).not_before - _NOW.boot
    assert SHORTEST_PAUSE - 1e-6 <= pause <= min(60.0, max(lifetime / 10, 1.0)) + 1e-6
    assert backoff_for(lifetime).ceiling(failures) >= pause - SHORTEST_PAUSE


@pytest.mark.parametrize(("asked", "waited"), [(2.0, 2.0), (600.0, 600.0), (1e9, LONGEST_RETRY_AFTER)])
def test_retry_after_is_the_least_wait(asked: float, waited: float) -> None:
    """Rule 4, also once the token has ended, and also for reports."""
    error = LoginError("https://idp.example/token", "too many requests", 429, asked)
    history = failed(logged_in(make_token(60.0)), error, later(59.0))
    for known in (history, after_report(history, 1)):
        assert seconds_until_login(known, later(59.0)) >= waited
        assert seconds_until_login(known, later(61.0)) >= waited - 2.0
    assert seconds_until_login(history, later(59.0)) < waited + 6.1


@given(failures=st.integers(0, 200), seed=st.integers(0, 2**32), lifetime=st.sampled_from([600.0, _HOUR]))
def test_while_readers_wait_attempts_are_close_together(failures: int, seed: int, lifetime: float) -> None:
    """Readers wait 30 s: once the token has ended, or was refused, a provider that is back must be asked before."""
    token = make_token(lifetime)
    ended = History(token=token, failures=failures)
    pause = failed(ended, now=later(lifetime + 1), seed=seed).not_before - later(lifetime + 1).boot
    assert pause <= 5.0
    refused = History(token=token, failures=failures, refused_generation=1)
    assert failed(refused, now=later(1), seed=seed).not_before - later(1).boot <= 5.0
    nearly = failed(ended, now=later(lifetime - 20), seed=seed).not_before - later(lifetime - 20).boot
    assert nearly <= 20.0, "the next attempt comes before the end"


def test_a_failure_leaves_the_token_and_tells_its_error() -> None:
    """Rule 5."""
    history = logged_in(make_token())
    posting = failed(history).posting()
    assert posting.token is history.token
    assert posting.error == str(_DOWN)
    assert not posting.refused
    assert logged_in(make_token(generation=2), failed(history)).posting().error == ""


@pytest.mark.parametrize("left", [-10.0, 0.0])
def test_a_login_that_answers_an_expired_token_does_not_displace_a_valid_one(left: float) -> None:
    """Rule 5, and no busy loop: the next login waits for the floor at least."""
    history = logged_in(make_token(100.0))
    dead = Token("dead", later(80.0).wall + left, later(80.0).boot + left, 0.0, generation=2)
    after = logged_in(dead, history, later(80.0))
    assert after.token is history.token
    assert seconds_until_login(after, later(80.0)) >= 5.0
    gone = logged_in(dead, history, later(101.0))
    assert state_of(gone, later(101.0)) is State.EXPIRED
    assert seconds_until_login(gone, later(101.0)) >= 5.0


@given(st.floats(0.5, 86_400.0), st.floats(0.01, 0.99), st.integers(0, 50), seeds)
def test_the_same_token_again_is_no_progress(lifetime: float, share: float, failures: int, seed: int) -> None:
    """Rule 7: backed off from, floored, and asked for again right after its end."""
    token, now = make_token(lifetime), later(share * lifetime)
    history = dataclasses.replace(logged_in(token), failures=failures)
    after = logged_in(dataclasses.replace(token, generation=2), history, now, seed=seed)
    left = token.remaining(now)
    pause = seconds_until_login(after, now)
    floor = login_floor(lifetime)
    assert after.failures == failures + 1
    assert floor - 1e-6 <= pause <= max(floor, left + 0.05) + 1e-6


def test_a_token_with_an_earlier_end_is_no_progress() -> None:
    """Rule 7; it is used all the same, as the old one may have been revoked."""
    history = logged_in(make_token(600.0))
    other = make_token(100.0, generation=2)
    after = logged_in(other, history)
    assert after.token is other
    assert after.failures == 1


def test_a_report_of_the_current_generation_calls_for_a_login_now() -> None:
    """Rule 8."""
    history = logged_in(make_token(generation=3))
    assert seconds_until_login(after_report(history, 3), later(1.0)) == 0.0
    assert seconds_until_login(after_report(history, 2), later(1.0)) == seconds_until_login(history, later(1.0)) > 0
    assert after_report(after_report(history, 3), 1).refused_generation == 3


def test_forced_logins_are_spaced() -> None:
    """Rule 8, from success and from failure alike."""
    history = after_report(logged_in(make_token()), 1)
    succeeded = after_report(logged_in(make_token(generation=2), history, later(10.0)), 2)
    assert seconds_until_login(succeeded, later(11.0)) == pytest.approx(FORCED_GAP - 1.0)
    failing = failed(history, now=later(10.0))
    assert seconds_until_login(failing, later(10.0)) >= FORCED_GAP
    assert seconds_until_login(failing, later(20.0)) == 0.0


def test_a_token_without_a_number_cannot_be_reported() -> None:
    """Generation 0 stands for no generation."""
    assert not after_report(logged_in(make_token(generation=0)), 0).is_reported


@given(st.floats(-_HOUR, _HOUR), st.floats(0.0, _HOUR - 1.0))
def test_the_more_pessimistic_clock_counts(step: float, passed: float) -> None:
    """Rule 9: a step of the wall clock makes a token seem older, never younger."""
    history = logged_in(make_token())
    now = later(passed, wall=step)
    assert history.token is not None
    assert history.token.remaining(now) <= _HOUR - passed + 1e-6
    if step > _HOUR - passed + 1e-6:
        assert state_of(history, now) is State.EXPIRED
        assert seconds_until_login(history, now) == 0.0


@given(
    token=st.none() | st.builds(make_token, lifetimes),
    due=st.floats(0, 1e6),
    not_before=st.floats(0, 1e6),
    reported=st.integers(0, 3),
    forced_at=st.floats(-1e6, 1e6) | st.just(-math.inf),
    now=st.floats(0, 1e6),
)
def test_no_history_gives_a_negative_or_endless_wait(now: float, reported: int, **fields: Any) -> None:
    """Only a refusal for good means never."""
    history = History(refused_generation=reported, **fields)
    assert 0.0 <= seconds_until_login(history, Instant(_NOW.wall + now, now)) < math.inf


# The loop


class World:
    """A provider, a clock and one refresher between them; waiting moves the clock, to the next event at most.

    Attributes:
        lifetime: Of tokens to come, seconds.
        trouble: Raised instead of an answer while set.
        asked: Boot times of all login attempts.
        naps: Seconds of each wait.
        postings: What readers were shown.
    """

    def __init__(self, lifetime: float = 600.0, *, early: float = 120.0, seed: int = 0) -> None:
        self.clock = FakeClock()
        self.lifetime = lifetime
        self.trouble: Exception | None = None
        self.asked: list[float] = []
        self.naps: list[float] = []
        self.postings: list[Posting] = []
        self.logins = 0
        self._events: list[tuple[float, Callable[[], object]]] = []
        self._check: Callable[[], object] = lambda: None
        self._end = math.inf
        self.refresher = Refresher(
            self.login,
            self.publish,
            clock=self.clock,
            wait=self.wait,
            refresh_before_expiry=early,
            rng=random.Random(seed),
        )

    @property
    def now(self) -> float:
        return self.clock.now().boot - 1_000.0

    @property
    def shown(self) -> Token:
        token = self.postings[-1].token
        assert token is not None
        return token

    def at(self, moment: float, event: Callable[[], object]) -> None:
        self._events = sorted([*self._events, (moment, event)], key=lambda pair: pair[0])

    def set_trouble(self, moment: float, trouble: Exception | None) -> None:
        self.at(moment, lambda: setattr(self, "trouble", trouble))

    def run(self, seconds: float, check: Callable[[], object] = lambda: None) -> None:
        """Log in and run the real loop for so long; ``check`` is called whenever time has passed."""
        self._check, self._end = check, self.now + seconds
        self.refresher.first_login()
        self.refresher.run()

    def wait(self, seconds: float) -> None:
        assert 0.0 < seconds <= LONGEST_NAP
        moment = min([self.now + seconds, self._end, *(moment for moment, _ in self._events[:1])])
        self.naps.append(moment - self.now)
        self.clock.advance(max(moment - self.now, 0.0))
        while self._events and self._events[0][0] <= self.now + 1e-9:
            self._events.pop(0)[1]()
        self._check()
        if self.now >= self._end - 1e-9:
            self.refresher.stop()

    def login(self, after: Token | None) -> Token:
        assert len(self.asked) < 5_000, "busy loop"
        self.asked.append(self.now)
        if self.trouble is not None:
            raise type(self.trouble)(*self.trouble.args)
        return self.answer(after)

    def answer(self, after: Token | None) -> Token:
        self.logins += 1
        return make_token(self.lifetime, self.clock.now(), self.logins)

    def publish(self, posting: Posting) -> None:
        self.postings.append(posting)

    def assert_valid(self) -> None:
        assert self.shown.remaining(self.clock.now()) > 0


@pytest.mark.parametrize("lifetime", [2.0, 60.0, 120.0, 600.0, 3600.0])
def test_one_login_per_lifetime(lifetime: float) -> None:
    """Defect 2: also where the lifetime is less than the 120 s before the end."""
    world = World(lifetime)
    world.run(20 * lifetime, world.assert_valid)
    assert 20 <= len(world.asked) <= 20 / 0.85 + 1
    assert world.refresher.logins == len(world.asked) == world.shown.generation
    assert world.refresher.state() is not State.EXPIRED


@settings(max_examples=60)
@given(st.floats(0.3, 5000.0), st.floats(0.1, 7200.0), seeds)
def test_whatever_the_settings_readers_never_lack_a_token(lifetime: float, early: float, seed: int) -> None:
    """Rules 2, 3 and 9 together: valid at each moment, floored, and no nap over 30 s (checked in ``wait``)."""
    world = World(lifetime, early=early, seed=seed)
    world.run(5 * lifetime, world.assert_valid)
    gaps = [after - before for before, after in zip(world.asked, world.asked[1:], strict=False)]
    assert min(gaps, default=math.inf) >= min(login_floor(lifetime), 0.75 * lifetime) - 1e-6


@settings(max_examples=60)
@given(
    lifetime=st.floats(2.0, 300.0),
    outages=st.lists(st.tuples(st.floats(0.0, 1.0), st.floats(0.0, 1.0)), max_size=3),
    steps=st.lists(st.tuples(st.floats(0.0, 1.0), st.floats(-2 * _HOUR, 2 * _HOUR)), max_size=3),
    reports=st.lists(st.tuples(st.floats(0.0, 1.0), st.integers(0, 10**9)), max_size=5),
    seed=seeds,
)
def test_the_loop_survives_anything_and_heals(
    lifetime: float,
    outages: list[tuple[float, float]],
    steps: list[tuple[float, float]],
    reports: list[tuple[float, int]],
    seed: int,
) -> None:
    """Outages, stepped clocks and wild reports in any order: afterwards the token is valid and logins are few."""
    world, span = World(lifetime, seed=seed), 4 * lifetime
    for begin, length in outages:
        world.set_trouble(begin * span, _DOWN)
        world.set_trouble((begin + length) * span, None)
    for moment, seconds in steps:
        world.at(moment * span, lambda seconds=seconds: world.clock.step_wall(seconds))  # type: ignore[misc]  # mypy cannot infer a default's type
    for moment, generation in reports:
        world.at(moment * span, lambda generation=generation: world.refresher.report_refused(generation))  # type: ignore[misc]  # as above
    world.set_trouble(2 * span, None)
    world.run(2 * span + 200.0)
    world.assert_valid()
    assert world.logins <= (2 * span + 200.0) / (0.7 * lifetime) + len(outages) + len(steps) + len(reports) + 2
    assert world.refresher.history.error is None


@pytest.mark.parametrize("error", [_DOWN, _BUSY, ConnectionError("reset"), RuntimeError("of a user's own session")])
def test_failures_on_a_refresh_never_end_the_loop(error: Exception) -> None:
    """Defect 3: one 429, or four 503s, or anything else; the old token serves to its last second (rule 5)."""
    world = World(100.0)
    world.set_trouble(50.0, error)
    world.set_trouble(300.0, None)
    expired = []
    world.run(400.0, lambda: expired.append(world.now) if world.refresher.state() is State.EXPIRED else None)
    assert 99.0 < min(expired) < 131.0
    assert max(expired) < 310.0 + LONGEST_NAP
    assert world.refresher.failures > 20
    assert world.refresher.state() is State.FRESH
    posted = [posting for posting in world.postings if posting.error]
    assert len(posted) == world.refresher.failures
    assert type(error).__name__ in posted[0].error or str(error) == posted[0].error
    assert all(posting.token is not None for posting in posted)


def test_retry_after_is_respected_by_the_loop() -> None:
    """429 with ``Retry-After: 2``."""
    world = World(100.0)
    world.set_trouble(0.1, _BUSY)
    world.run(120.0)
    gaps = [after - before for before, after in zip(world.asked[1:], world.asked[2:], strict=False)]
    assert len(gaps) > 3
    assert min(gaps) >= 2.0 - 1e-6


def test_a_refusal_for_good_ends_the_logins_and_not_the_loop() -> None:
    """Rule 6: readers learn of it; the thread lives on to be joined."""
    world = World(100.0)
    world.set_trouble(50.0, _REFUSED)
    world.run(1000.0)
    assert len(world.asked) == 2
    assert world.postings[-1].refused
    assert world.now == pytest.approx(1000.0)


def test_first_login_raises_and_publishes_nothing() -> None:
    """Defect 1."""
    world = World()
    world.trouble = _DOWN
    with pytest.raises(LoginError, match="503"):
        world.refresher.first_login()
    assert world.postings == []


def test_missing_expires_in_is_a_lifetime_like_any_other() -> None:
    """Defect 9: a KeyError in the original; here the default lifetime, kept fresh."""

    class Silent(World):
        def answer(self, after: Token | None) -> Token:
            self.logins += 1
            fields = {"access_token": f"invented-{self.logins}"}
            return token_from_response(fields, self.clock.now()).numbered(self.logins)

    world = Silent()
    world.run(10 * DEFAULT_LIFETIME, world.assert_valid)
    assert 10 <= len(world.asked) <= 14


@pytest.mark.parametrize("step", [_HOUR, -_HOUR])
def test_a_stepped_wall_clock_costs_one_login_at_most(step: float) -> None:
    """Defect 18: valid all the time, and afterwards the old rhythm again."""
    calm, stepped = World(3000.0), World(3000.0)
    stepped.at(1000.0, lambda: stepped.clock.step_wall(step))
    stepped.at(7000.0, lambda: stepped.clock.step_wall(-step))
    boots: list[float] = []
    stepped.run(12_000.0, lambda: boots.append(stepped.shown.deadline - stepped.clock.now().boot))
    calm.run(12_000.0)
    assert min(boots) > 0
    assert len(stepped.asked) <= len(calm.asked) + 1
    stepped.assert_valid()


def test_a_suspended_laptop_wakes_to_a_login() -> None:
    """Defect 18: the boot clock goes on while asleep; the first look after waking finds the token expired."""
    world = World(600.0)
    world.at(100.0, lambda: world.clock.advance(8 * _HOUR))
    world.run(8 * _HOUR + 200.0)
    assert world.asked[1] == pytest.approx(100.0 + 8 * _HOUR)
    world.assert_valid()


def test_naps_are_short_however_long_the_token_lives() -> None:
    """Rule 9: a step or a suspend is noticed within 30 s."""
    world = World(86_400.0)
    world.run(1000.0)
    assert len(world.asked) == 1
    assert max(world.naps) == LONGEST_NAP


class Repeating(World):
    """A provider that repeats a token until it has ended, as some do."""

    def answer(self, after: Token | None) -> Token:
        if after is not None and after.remaining(self.clock.now()) > 0:
            self.logins += 1
            return dataclasses.replace(after, generation=self.logins)
        return super().answer(after)


def test_a_provider_that_repeats_tokens_is_not_pestered() -> None:
    """Rule 7: a few attempts under backoff in each lifetime, and a new token within moments of the end."""
    world, expired = Repeating(600.0), list[float]()
    world.run(6100.0, lambda: expired.append(world.now) if world.refresher.state() is State.EXPIRED else None)
    assert len({posting.token.access_token for posting in world.postings if posting.token}) == 11
    assert len(world.asked) < 11 * 15
    assert len(expired) <= 10


class Stillborn(World):
    """A provider whose tokens have ended when they arrive, until it heals."""

    def answer(self, after: Token | None) -> Token:
        if 400.0 < self.now < 1500.0:
            self.lifetime = -5.0
        else:
            self.lifetime = 600.0
        return super().answer(after)


def test_tokens_that_arrive_expired_do_not_make_a_busy_loop() -> None:
    """The old one serves to its end; then an attempt every 5 s at most; then all is well."""
    world = Stillborn()
    valid: list[float] = []
    world.run(1700.0, lambda: valid.append(world.now) if world.shown.remaining(world.clock.now()) > 0 else None)
    assert [moment for moment in valid if 400.0 < moment < 600.0]
    assert max(moment for moment in valid if moment < 1400.0) > 560.0
    assert sum(400.0 < moment < 1500.0 for moment in world.asked) <= 1100 / 5
    world.assert_valid()


# Reports in the loop


def test_many_reports_of_one_generation_cause_one_login() -> None:
    """Rule 8: single flight for refused tokens."""
    world = World(3600.0)
    for _ in range(64):
        world.at(100.0, lambda: world.refresher.report_refused(1))
    world.at(101.0, lambda: world.refresher.report_refused(1))
    world.run(1000.0)
    assert world.asked == [0.0, pytest.approx(100.0)]


@pytest.mark.parametrize("offset", [0, 1, 10**9])
def test_a_hostile_reporter_causes_a_login_each_five_seconds_at_most(offset: int) -> None:
    """Rule 8; generations that nobody was given are not believed at all."""
    world = World(3600.0)

    def report() -> None:
        world.refresher.report_refused(world.shown.generation + offset)
        world.at(world.now + 0.25, report)

    world.at(1.0, report)
    world.run(100.0)
    assert len(world.asked) == (1 if offset else 21)
    gaps = [after - before for before, after in zip(world.asked[1:], world.asked[2:], strict=False)]
    assert min(gaps, default=FORCED_GAP) >= FORCED_GAP - 1e-6


def test_one_hostile_report_has_no_lasting_effect() -> None:
    world = World(600.0)
    world.at(1.0, lambda: world.refresher.report_refused(2**64 - 1))
    world.run(3000.0)
    assert len(world.asked) <= 3000 / 480 + 1


def test_a_reporter_does_not_get_round_retry_after() -> None:
    world = World(3600.0)
    world.trouble = None
    world.set_trouble(10.0, LoginError("https://idp.example/token", "too many requests", 429, 60.0))
    for second in range(10, 60):
        world.at(float(second), lambda: world.refresher.report_refused(1))
    world.run(69.0)
    assert world.asked == [0.0, pytest.approx(10.0)]


def test_a_report_wakes_the_loop_once() -> None:
    """Only news does: an old generation and a repetition let it sleep."""
    woken: list[int] = []
    world = World()
    refresher = Refresher(world.login, world.publish, clock=world.clock, wait=world.wait, wake=lambda: woken.append(1))
    refresher.report_refused(1)
    refresher.first_login()
    for generation in (0, 1, 1, 1):
        refresher.report_refused(generation)
    assert len(woken) == 1


def test_a_report_during_a_login_is_not_forgotten() -> None:
    """It may be about the token that is being replaced, or come while an attempt fails."""
    world = World(3600.0)

    def answer(after: Token | None) -> Token:
        if world.logins == 1 and len(world.asked) == 2:
            world.refresher.report_refused(1)
            raise ConnectionError
        return World.answer(world, after)

    world.answer = answer  # type: ignore[method-assign]  # one provider of one test
    world.at(10.0, lambda: world.refresher.report_refused(1))
    world.run(60.0)
    assert world.logins == 2
    assert len(world.asked) == 3


# What goes wrong while publishing


class Narrow(World):
    """A channel that holds texts of some length at most, as the board does."""

    room = 50

    def publish(self, posting: Posting) -> None:
        size = len(posting.token.access_token if posting.token else "") + len(posting.error)
        if size > self.room:
            raise TokenTooLargeError(size, self.room)
        super().publish(posting)


def test_first_token_that_is_too_large_is_raised() -> None:
    """Defect 7: an error in the parent."""
    world = Narrow()
    world.room = 5
    with pytest.raises(TokenTooLargeError):
        world.refresher.first_login()


def test_token_that_becomes_too_large_does_not_end_the_loop() -> None:
    """Defect 7: the old one serves on, readers learn why, and a smaller one is taken again."""
    world = Narrow(100.0)
    world.room = 400

    def answer(after: Token | None) -> Token:
        token = World.answer(world, after)
        return dataclasses.replace(token, access_token="x" * 500) if 50.0 < world.now < 300.0 else token

    world.answer = answer  # type: ignore[method-assign]  # one provider of one test
    world.run(400.0)
    assert any("500 bytes" in posting.error for posting in world.postings)
    assert world.now == pytest.approx(400.0)
    world.assert_valid()


def test_error_that_does_not_fit_beside_the_token_does_not_end_the_loop() -> None:
    world = Narrow(100.0)
    world.set_trouble(50.0, _DOWN)
    world.set_trouble(300.0, None)
    world.run(400.0)
    assert world.refresher.failures > 20
    world.assert_valid()


def test_error_texts_are_shortened_for_readers() -> None:
    """A server's words may be of any length; the board is not."""
    history = failed(logged_in(make_token()), LoginError("https://idp.example/token", "long " * 100_000))
    assert len(history.posting().to_bytes()) < 16_000
    assert "long long" in history.posting().error


def test_stop_during_a_login_discards_its_outcome() -> None:
    """Nothing is published once sharing ends."""
    world = World(100.0)

    def answer(after: Token | None) -> Token:
        if after is not None:
            world.refresher.stop()
        return World.answer(world, after)

    world.answer = answer  # type: ignore[method-assign]  # one provider of one test
    world.run(1000.0)
    assert len(world.postings) == 1
