"""Secrets do not show themselves, and other people's loggers are held back."""

from __future__ import annotations

import copy
import logging
import pickle

import cloudpickle
import pytest

from shpool.redaction import Secret, fingerprint, quiet_transport

_CANARY = "canary-secret-7391"


@pytest.mark.parametrize("show", [repr, str, "{}".format, "{!r:>20}".format, lambda secret: f"{[secret]}"])
def test_secret_does_not_show_itself(show: object) -> None:
    assert _CANARY not in show(Secret(_CANARY))  # type: ignore[operator]  # every one of them takes an object


@pytest.mark.parametrize("travel", [pickle.dumps, cloudpickle.dumps, copy.copy, copy.deepcopy])
def test_secret_refuses_to_travel(travel: object) -> None:
    with pytest.raises(TypeError, match="does not leave its process"):
        travel(Secret(_CANARY))  # type: ignore[operator]  # every one of them takes an object


def test_secret_has_no_dictionary_to_look_into() -> None:
    assert not hasattr(Secret(_CANARY), "__dict__")


def test_secret_reveals_itself_when_asked() -> None:
    assert Secret(_CANARY).reveal() == _CANARY


def test_empty_secret_is_false() -> None:
    assert not Secret("")
    assert Secret(_CANARY)


def test_fingerprint_tells_tokens_apart_and_shows_neither() -> None:
    first, second = fingerprint("token-one"), fingerprint("token-two")
    assert first != second
    assert first == fingerprint("token-one")
    assert len(first) == 8


@pytest.mark.parametrize(
    "name", ["requests_oauthlib.oauth2_session", "oauthlib.oauth2.rfc6749", "urllib3.connectionpool"]
)
def test_debug_of_the_transport_is_dropped_during_a_login_only(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Warnings pass: they hold no bodies, and tell of real trouble."""
    logger = logging.getLogger(name)
    with caplog.at_level(logging.DEBUG, logger=name):
        with quiet_transport():
            logger.debug("body %s", _CANARY)
            logger.warning("connection lost")
        logger.debug("afterwards")
    assert [record.getMessage() for record in caplog.records] == ["connection lost", "afterwards"]


def test_filters_are_gone_after_an_error() -> None:
    logger = logging.getLogger("urllib3.connectionpool")
    before = list(logger.filters)
    with pytest.raises(KeyError), quiet_transport():
        raise KeyError
    assert logger.filters == before
