"""What the tests of the Ray engine run in workers."""

from __future__ import annotations

from pool_tasks import begin_and_wait

from shpool.engines import outpost
from shpool.shared import current_session


def outposts(_: object = None) -> list[str]:
    """Return the pools that have an outpost in this worker."""
    return list(outpost._outposts)


def generation(_: object = None) -> int:
    """Return the number of the token that this worker has."""
    return current_session().token.generation


def generation_after(begun: str, cue: str) -> tuple[int, int]:
    """Return the token's number before and after the test gives its cue."""
    before = generation()
    begin_and_wait(begun, cue)
    return before, generation()


def get(url: str) -> bytes:
    """Get a page with the session's own client, which lives with a token that was revoked."""
    content: bytes = current_session().http.get(url).content
    return content
