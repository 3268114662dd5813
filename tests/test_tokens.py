"""Tokens: what counts as one, when it ends, and that it does not show itself."""

from __future__ import annotations

import base64
import contextlib
import copy
import json
import math
import pickle
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shpool.errors import OpaqueTokenError, TokenResponseError
from shpool.testing import FakeClock
from shpool.tokens import (
    DEFAULT_LIFETIME,
    SYSTEM_CLOCK,
    Instant,
    Posting,
    Token,
    decode_claims,
    token_from_mapping,
    token_from_response,
)

_SENT = Instant(wall=1_800_000_000.0, boot=1_000.0)
_CANARY = "canary-token-4417"


def make_jwt(claims: object) -> str:
    def part(value: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    return f"{part({'alg': 'none'})}.{part(claims)}.c2lnbmF0dXJl"


def answer(**fields: object) -> dict[str, Any]:
    return {"access_token": "invented-token", "token_type": "Bearer", **fields}


@pytest.mark.parametrize("expires_in", [600, 600.0, "600", "600.0", " 600 "])
def test_expires_in_is_read_in_every_form_servers_send(expires_in: object) -> None:
    token = token_from_response(answer(expires_in=expires_in), _SENT)
    assert token.lifetime == 600.0
    assert token.expires_at == _SENT.wall + 600.0
    assert token.deadline == _SENT.boot + 600.0


@pytest.mark.parametrize("fields", [{}, {"expires_in": None}])
def test_without_expires_in_the_claims_of_a_jwt_decide(fields: dict[str, None]) -> None:
    jwt = make_jwt({"exp": _SENT.wall + 900})
    assert token_from_response({"access_token": jwt, **fields}, _SENT).lifetime == 900.0


def test_lifetime_from_claims_needs_no_agreed_clock() -> None:
    """With ``iat`` the lifetime is a difference of the server's own clock, an hour off here."""
    jwt = make_jwt({"iat": _SENT.wall + 3600, "exp": _SENT.wall + 3600 + 300})
    assert token_from_response({"access_token": jwt}, _SENT).lifetime == 300.0


def test_reissued_jwt_ends_when_its_claims_say() -> None:
    """A provider may hand out a token it issued long ago; its whole lifetime is not what is left of it."""
    jwt = make_jwt({"iat": _SENT.wall - 3590, "exp": _SENT.wall + 10})
    token = token_from_response({"access_token": jwt}, _SENT)
    assert token.remaining(_SENT) == 10.0
    assert (token.expires_at, token.deadline) == (_SENT.wall + 10, _SENT.boot + 10)


@pytest.mark.parametrize(
    ("ahead", "lifetime"), [(-5, 295.0), (-400, 0.0), (0, 300.0), (5, 300.0), (60, 300.0), (61, 300.0)]
)
def test_lifetime_is_the_lesser_of_both_statements(ahead: float, lifetime: float) -> None:
    jwt = make_jwt({"iat": _SENT.wall + ahead, "exp": _SENT.wall + ahead + 300})
    assert token_from_response({"access_token": jwt}, _SENT).lifetime == lifetime


@pytest.mark.parametrize("claims", [{}, {"exp": None}, {"exp": "soon"}, {"exp": True}, {"exp": {}}, []])
def test_without_any_statement_a_default_lifetime_holds(claims: object) -> None:
    assert token_from_response({"access_token": make_jwt(claims)}, _SENT).lifetime == DEFAULT_LIFETIME
    assert token_from_response({"access_token": "opaque"}, _SENT).lifetime == DEFAULT_LIFETIME


@pytest.mark.parametrize("expires_in", [-5, 0, "-1"])
def test_token_may_arrive_expired(expires_in: object) -> None:
    token = token_from_response(answer(expires_in=expires_in), _SENT)
    assert token.remaining(_SENT) == 0.0


@pytest.mark.parametrize("expires_in", ["soon", "", [], {}, True, math.nan, "nan"])
def test_expires_in_that_is_no_number_is_an_error(expires_in: object) -> None:
    with pytest.raises(TokenResponseError, match="expires_in is not a number of seconds"):
        token_from_response(answer(expires_in=expires_in), _SENT)


@pytest.mark.parametrize("expires_in", [10**400, math.inf, "inf", 1e300])
def test_absurd_lifetime_is_cut_or_refused_yet_stays_finite(expires_in: object) -> None:
    try:
        token = token_from_response(answer(expires_in=expires_in), _SENT)
    except TokenResponseError:
        return
    assert math.isfinite(token.expires_at)
    assert math.isfinite(token.remaining(_SENT))


@pytest.mark.parametrize("bad", [None, [], "text", 5, {}, {"access_token": ""}, {"access_token": 5}])
def test_answer_without_a_token_is_an_error(bad: object) -> None:
    with pytest.raises(TokenResponseError):
        token_from_response(bad, _SENT)


@pytest.mark.parametrize("value", ["a\r\nX-Evil: 1", "a b", "tök", "a\x00", "a\n"])
def test_token_that_no_header_may_carry_is_an_error(value: str) -> None:
    """A line break in a bearer token would smuggle headers into every request."""
    with pytest.raises(TokenResponseError, match="no header may carry"):
        token_from_response({"access_token": value}, _SENT)


def test_scope_may_be_a_list() -> None:
    assert token_from_response(answer(scope=["tiles", "statistics"]), _SENT).scope == "tiles statistics"


def nested(levels: int) -> object:
    value: object = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize("field", ["region", "scope"])
def test_deeply_nested_field_is_left_out(field: str) -> None:
    """What one recursion limit reads, another may not write; the posting has to be written anywhere."""
    for levels in (2, 992, 50_000):
        for value in (nested(levels), {"deep": nested(levels)}):
            token = token_from_response(answer(expires_in=60, **{field: value}), _SENT)
            assert Posting.from_bytes(Posting(token).to_bytes()).token is not None
            assert not token.extra


def test_flat_extra_fields_are_kept() -> None:
    extra = {"region": "eu", "quota": 5, "share": 0.5, "beta": True, "none": None, "list": [1, "a"], "map": {"a": None}}
    token = token_from_response(answer(expires_in=60, **extra), _SENT)
    assert dict(token.extra) == extra


def test_refresh_token_is_not_kept() -> None:
    """Client credentials need none (RFC 6749, section 4.4.3), and what is not kept cannot leak."""
    token = token_from_response(answer(refresh_token="invented", refresh_expires_in=5, region="eu"), _SENT)
    assert dict(token.extra) == {"region": "eu"}


def test_remaining_takes_the_more_pessimistic_clock() -> None:
    clock = FakeClock()
    token = token_from_response(answer(expires_in=600), clock.now())
    clock.advance(100)
    assert token.remaining(clock.now()) == 500
    clock.step_wall(-3600)
    assert token.remaining(clock.now()) == 500
    clock.step_wall(+3600 + 200)
    assert token.remaining(clock.now()) == 300


def test_system_clock_moves_forward() -> None:
    first, second = SYSTEM_CLOCK.now(), SYSTEM_CLOCK.now()
    assert second.boot >= first.boot
    assert first.wall > 1_600_000_000


def test_token_reads_as_the_mapping_of_oauth_libraries() -> None:
    token = token_from_response(answer(expires_in=60, scope="tiles", region="eu"), _SENT)
    assert dict(token) == {
        "access_token": "invented-token",
        "token_type": "Bearer",
        "expires_at": _SENT.wall + 60,
        "scope": "tiles",
        "region": "eu",
    }
    assert len(token) == 5


@pytest.mark.parametrize("show", [repr, str, "{}".format])
def test_token_does_not_show_itself(show: object) -> None:
    token = token_from_response({"access_token": _CANARY, "id_token": _CANARY}, _SENT)
    assert _CANARY not in show(token)  # type: ignore[operator]  # every one of them takes an object


def test_token_survives_a_pickle_and_a_copy() -> None:
    token = token_from_response(answer(expires_in=60, region="eu"), _SENT).numbered(7)
    for clone in (pickle.loads(pickle.dumps(token)), copy.copy(token), copy.deepcopy(token)):
        assert dict(clone) == dict(token)
        assert (clone.generation, clone.deadline, clone.lifetime) == (7, token.deadline, token.lifetime)


def test_mapping_with_expires_at_makes_a_token() -> None:
    token = token_from_mapping({"access_token": "invented", "expires_at": _SENT.wall + 50}, _SENT)
    assert token.remaining(_SENT) == 50
    assert token.deadline == _SENT.boot + 50


def test_mapping_keeps_the_whole_lifetime_of_a_token_under_way() -> None:
    """Refresh windows are shares of the lifetime, not of what happens to be left."""
    fields = {"access_token": "invented", "expires_at": _SENT.wall + 50, "expires_in": 600}
    assert token_from_mapping(fields, _SENT).lifetime == 600


def test_mapping_of_an_expired_token_is_read() -> None:
    token = token_from_mapping({"access_token": "invented", "expires_at": _SENT.wall - 50}, _SENT)
    assert token.remaining(_SENT) == -50
    assert token.lifetime == 0


@pytest.mark.parametrize("bad", [None, {}, {"expires_at": 5}, {"access_token": "a", "expires_at": "soon"}])
def test_mapping_that_is_no_token_is_an_error(bad: object) -> None:
    with pytest.raises(TokenResponseError):
        token_from_mapping(bad, _SENT)


@pytest.mark.slow
@given(st.dictionaries(st.text(), st.text() | st.integers() | st.none()))
def test_claims_are_read_whatever_base64url_makes_of_them(claims: dict[str, Any]) -> None:
    """The plain base64 alphabet and a fixed padding fail for a third of all claims."""
    assert decode_claims(make_jwt(claims)) == claims


@pytest.mark.parametrize("text", ["", "opaque", "a.b", "a.b.c.d", "a.!.c", "a.bnVsbA.c", "..", "a.ey.c"])
def test_claims_of_an_opaque_token_are_a_clear_error(text: str) -> None:
    with pytest.raises(OpaqueTokenError, match="introspection"):
        decode_claims(text)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
_access_tokens = st.text(min_size=1) | st.builds(make_jwt, _json | st.fixed_dictionaries({"exp": _json, "iat": _json}))
_answers = _json | st.fixed_dictionaries(
    {"access_token": _json | _access_tokens},
    optional={"expires_in": _json | st.floats(), "token_type": _json, "scope": _json, "expires_at": _json},
)


@pytest.mark.slow
@given(_answers)
@example({"access_token": "invented", "expires_in": 10**400})
@example({"access_token": "a.b.c", "expires_in": "1e999"})
@example({"access_token": make_jwt({"exp": 10**400, "iat": -(10**400)})})
@example({"access_token": make_jwt({"exp": 1e308, "iat": -1e308})})
def test_any_json_is_a_token_or_one_named_error(body: object) -> None:
    """Whatever a server sends: a token whose numbers are finite, or a TokenResponseError, and nothing else."""
    for make in (token_from_response, token_from_mapping):
        with contextlib.suppress(TokenResponseError):
            _assert_usable(make(body, _SENT))


def _assert_usable(token: Token) -> None:
    assert math.isfinite(token.remaining(_SENT))
    assert 0 <= token.lifetime < math.inf
    assert token.access_token.isascii()
    assert dict(token)["access_token"] == token.access_token
    assert dict(pickle.loads(pickle.dumps(token))).keys() == dict(token).keys()
