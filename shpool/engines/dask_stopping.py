"""How a call on Dask is stopped: it is taken back, or its worker is killed, where no other task is harmed by that."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from shpool.engines.cluster import Unbegun
from shpool.engines.dask_border import outcome_of, words_of
from shpool.engines.dask_outpost import kill_worker

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shpool.engines.dask_calls import Calls
    from shpool.engines.dask_link import Link
    from shpool.engines.dask_places import Member

logger = logging.getLogger(__name__)


async def stop_call(link: Link, calls: Calls, number: int) -> bool:
    """Stop a call, in the event loop; tell whether its end will be told, or has been."""
    placed = calls.places.find(number)
    if placed is None:
        return True  # it has ended
    member, ticket = placed.member, placed.ticket
    if member is None:
        placed.is_unwanted = True
        if placed.is_held:
            calls.end(number, Unbegun())
        return True
    if link.is_silent:
        return False
    was_doomed, member.is_doomed = member.is_doomed, True  # so that nothing is sent there meanwhile
    is_killed = False
    try:
        answer = await calls.take_back(member, 0.0)
        if isinstance(answer, Exception):
            return _fail(answer)
        if ticket in answer.taken:
            calls.end(number, Unbegun())
        elif ticket in answer.running:
            is_killed = was_doomed or await _kill(link, member, answer.running)
            return is_killed
        return True  # if it is in neither, it has ended, and its answer is under way
    finally:
        member.is_doomed = was_doomed or is_killed or member.begun is not None
        calls.place()


async def _kill(link: Link, member: Member, running: Sequence[int]) -> bool:
    """Kill a worker that runs one call of ours and nothing else, if it will be started again."""
    if link.client is None or not member.nanny or len(running) != 1:
        return False
    processing = await outcome_of(link.client.processing([member.address]))
    if isinstance(processing, Exception):
        return _fail(processing)
    if any(not str(key).startswith(link.key("")) for key in processing.get(member.address, ())):
        return False
    outcome = await link.ask(kill_worker, worker=member.nanny)
    return _fail(outcome) if isinstance(outcome, Exception) else True


def _fail(error: Exception) -> bool:
    logger.warning("a worker cannot be stopped: %s", words_of(error))
    return False
