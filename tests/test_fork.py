"""What a forked child of the parent does: it reads, it never logs in, and it takes nothing away."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest

from shpool import OAuthSession, SessionSharing, collect_shared_session

if TYPE_CHECKING:
    from collections.abc import Callable

    from shpool.testing import LoopbackServer

# A multi-threaded process that forks is what is tested; 3.12 and later warn of it.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def in_child(work: Callable[[], str]) -> str:
    """Return what ``work`` returns in a forked child."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(write, work().encode())
        except BaseException as exc:  # noqa: BLE001 - the child must never run on into the test runner
            os.write(write, repr(exc).encode())
        sys.stderr.flush()
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as stream:
        text = stream.read()
    os.waitpid(pid, 0)
    return text


@pytest.mark.slow
def test_children_of_a_sharing_parent_read_its_token(server: LoopbackServer, memory_name: str) -> None:
    """Defect 19 of the origin: six children made seven logins."""
    session = OAuthSession(server.token_url, server.client_id, server.client_secret)
    with SessionSharing(session, memory_name=memory_name):
        token = session.token["access_token"]
        assert {in_child(lambda: session.token["access_token"]) for _ in range(6)} == {token}
        server.revoke_all()
        newer = session.renew(session._renewal.current)
        assert in_child(lambda: str(len(session.token["access_token"]))) == str(len(newer.access_token))
    assert server.logins == 2


@pytest.mark.slow
def test_a_child_that_ends_takes_no_sharing_with_it(server: LoopbackServer, memory_name: str) -> None:
    session = OAuthSession(server.token_url, server.client_id, server.client_secret)
    with SessionSharing(session, memory_name=memory_name) as sharing:
        thread = sharing.thread
        assert thread is not None
        assert in_child(lambda: "closed" if thread._channel.close() is None else "") == "closed"  # type: ignore[func-returns-value]  # run for its effect
        assert collect_shared_session(memory_name).token["access_token"] == session.token["access_token"]
    assert server.logins == 1


@pytest.mark.slow
def test_a_child_never_holds_the_secret_to_log_in_with(server: LoopbackServer, memory_name: str) -> None:
    session = OAuthSession(server.token_url, server.client_id, server.client_secret)
    with SessionSharing(session, memory_name=memory_name):
        assert session.is_secret(server.client_secret)
        assert in_child(lambda: str(session.is_secret(server.client_secret))) == "False"
