"""What may be shared: our sessions, other people's, and plain functions."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from shpool.errors import TokenResponseError
from shpool.session import OAuthSession
from shpool.sources import TokenSource, refresh_window_of, source_of
from shpool.tokens import Token

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shpool.testing import FakeClock, LoopbackServer


class ForeignSession:
    """As sentinelhub-py's and others': a token that is refreshed when it is read."""

    refresh_before_expiry: float | None = 60.0

    def __init__(self, *answers: Mapping[str, Any]) -> None:
        self._answers = list(answers)

    @property
    def token(self) -> Mapping[str, Any]:
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


def answer(number: int, clock: FakeClock, lifetime: float = 600.0) -> dict[str, Any]:
    return {"access_token": f"invented-{number}", "expires_at": clock.now().wall + lifetime}


def test_our_own_session_is_a_source_as_it_is(server: LoopbackServer) -> None:
    session = OAuthSession(server.token_url, server.client_id, server.client_secret)
    assert isinstance(session, TokenSource)
    assert source_of(session) is session


def test_foreign_session_is_read(clock: FakeClock) -> None:
    """Each other token gets the next number; the end is known on both clocks."""
    source = source_of(ForeignSession(answer(1, clock), answer(2, clock), answer(3, clock)), clock)
    first = source.renew(None)
    second = source.renew(first)
    assert (first["access_token"], first.generation) == ("invented-1", 1)
    assert (second["access_token"], second.generation) == ("invented-2", 2)
    assert first.deadline == clock.now().boot + 600.0
    assert source.renew(second).generation == 3


def test_function_is_called(clock: FakeClock) -> None:
    """With an answer as token endpoints give it: no ``expires_at``, so it begins to live now."""
    source = source_of(lambda: {"access_token": "invented", "expires_in": "600"}, clock)
    assert source.renew(None).deadline == clock.now().boot + 600.0


def test_callable_object_and_token_object_will_do(clock: FakeClock) -> None:
    class Login:
        def __call__(self) -> Token:
            now = clock.now()
            return Token("invented", now.wall + 60.0, now.boot + 60.0, 60.0)

    assert source_of(Login(), clock).renew(None)["access_token"] == "invented"


@pytest.mark.parametrize("step", [-3600.0, 3600.0])
def test_same_token_stays_the_same_whatever_the_wall_clock_does(clock: FakeClock, step: float) -> None:
    """A clock that was set back must not lengthen a token's life: its end on the boot clock stands."""
    source = source_of(ForeignSession(answer(1, clock)), clock)
    first = source.renew(None)
    clock.advance(500.0)
    clock.step_wall(step)
    again = source.renew(first)
    assert again.generation == 1
    assert again.deadline == first.deadline
    assert again.remaining(clock.now()) <= 100.0


def test_same_token_with_a_later_end_is_taken_at_its_word(clock: FakeClock) -> None:
    """Some opaque tokens slide; refusing to see that would end in an outage."""
    source = source_of(ForeignSession(answer(1, clock), answer(1, clock, 900.0)), clock)
    first = source.renew(None)
    again = source.renew(first)
    assert again.generation == first.generation
    assert again.remaining(clock.now()) == pytest.approx(900.0)


@pytest.mark.parametrize(
    "given", [None, [], "token", {}, {"access_token": ""}, {"access_token": "x", "expires_at": "soon"}]
)
def test_what_is_no_token_is_a_named_error(given: Any, clock: FakeClock) -> None:
    def session_token() -> Any:
        return given

    source = source_of(session_token, clock)
    with pytest.raises(TokenResponseError, match="session_token"):
        source.renew(None)


def test_error_names_the_foreign_session(clock: FakeClock) -> None:
    with pytest.raises(TokenResponseError, match=r"ForeignSession\.token"):
        source_of(ForeignSession({}), clock).renew(None)


def test_session_that_does_not_refresh_is_refused(clock: FakeClock) -> None:
    """The sharing could not keep it fresh, and would end in 401s."""
    frozen = ForeignSession(answer(1, clock))
    frozen.refresh_before_expiry = None
    given = OAuthSession.from_token({"access_token": "invented", "expires_at": time.time() + 60})
    for session in (frozen, given):
        with pytest.raises(ValueError, match="does not refresh its token"):
            source_of(session)


@pytest.mark.parametrize("session", [None, 7, "https://idp.example/token", {"access_token": "x"}, ForeignSession])
def test_what_is_no_session_is_refused(session: Any) -> None:
    with pytest.raises(TypeError, match="session must be"):
        source_of(session)


def test_window_is_the_sessions_own(clock: FakeClock) -> None:
    assert refresh_window_of(ForeignSession(answer(1, clock))) == 60.0
    assert refresh_window_of(dict) == 120.0
    assert refresh_window_of(object(), 7.0) == 7.0


def test_a_class_is_no_session() -> None:
    with pytest.raises(TypeError, match="OAuthSession is a class: call it"):
        source_of(OAuthSession)  # type: ignore[arg-type]  # the mistake itself
