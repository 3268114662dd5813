"""How long tests wait: long enough for what must come, and far too short for what must not be waited for."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

from shpool.testing import LoopbackServer

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import ParamSpec

    from shpool.testing.issuer import Issued

    _P = ParamSpec("_P")

_T = TypeVar("_T")

PATIENCE = 30.0  # s; machines stall for seconds, and a wait ends as soon as there is nothing to wait for
NEVER = 600.0  # s: what must not be waited for takes so long that no stall of the machine comes near it
LEEWAY = 6.0  # s; longer than the stalls of a shared machine


def until(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Return once the condition holds; fail the test if it does not come to."""
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "this never came true"
        time.sleep(0.005)


def in_time(call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Return what a call returns, or raise what it raises; fail the test if it waits for what takes NEVER."""
    outcome: Future[_T] = Future()

    def run() -> None:
        try:
            outcome.set_result(call(*args, **kwargs))
        except BaseException as exc:  # noqa: BLE001 - raised again in the test's own thread
            outcome.set_exception(exc)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        return outcome.result(PATIENCE)
    finally:
        thread.join(PATIENCE if outcome.done() else 0.0)


class LenientServer(LoopbackServer):
    """Accepts a token for LEEWAY past its end, so that a machine that stalls during a request causes no 401."""

    def __init__(self, lifetime: float = 3600.0) -> None:
        super().__init__(lifetime)
        self._issuer.lookup = self._lookup  # type: ignore[method-assign]  # the judgement is what differs

    def _lookup(self, access_token: str) -> Issued | None:
        issued = self._issuer._issued.get(access_token)
        return issued if issued is not None and self._clock.now().boot < issued.deadline + LEEWAY else None
