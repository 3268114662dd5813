"""Whether the cluster's head answers: Ray itself would wait for one that is stopped, with no word and for ever."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import ray

from shpool.errors import ClusterUnreachableError

if TYPE_CHECKING:
    from collections.abc import Callable

_PAUSE = 1.0  # s between two questions
_LONGEST_ANSWER = 2.0  # s; a thousandth is usual
_MOST_UNANSWERED = 5  # in a row: 10 s, counted in questions, as this process may have been stopped meanwhile itself
_LAST_ANSWER = 1.0  # s that it gets when the pool ends


class Errand(threading.Thread):
    """A call in a thread, which need not be waited for, as nothing else ends a call into Ray.

    Args:
        name: Of the thread.
        call: What to call.

    Attributes:
        outcome: What it returns or raises.
    """

    def __init__(self, name: str, call: Callable[[], Any]) -> None:
        super().__init__(name=name, daemon=True)
        self._call = call
        self.outcome: Future[Any] = Future()

    def has_ended(self, seconds: float) -> bool:
        """Begin, and wait so long; tell whether it has returned or raised by then."""
        self.start()
        self.join(seconds)
        return not self.is_alive()

    def run(self) -> None:
        """Call it; the thread's."""
        try:
            self.outcome.set_result(self._call())
        except BaseException as exc:  # noqa: BLE001 - raised where the outcome is looked at
            self.outcome.set_exception(exc)


class Watch:
    """Ask the head again and again, in a thread; see also how many calls can run at once.

    Args:
        cost: Processors a call takes.
    """

    def __init__(self, cost: float) -> None:
        self._cost = cost
        self._changed: Callable[[], None]
        self._failed: Callable[[Exception], None]
        self._is_closing = threading.Event()
        self._is_silent = False
        self._thread = threading.Thread(target=self._watch, name="shpool-ray-watch", daemon=True)
        self.capacity = 0

    def start(self, changed: Callable[[], None], failed: Callable[[Exception], None]) -> None:
        """Begin.

        Args:
            changed: Called when ``capacity`` has changed.
            failed: Called, once, when the head does not answer any more.
        """
        self._changed, self._failed = changed, failed
        self._thread.start()

    def look(self) -> bool:
        """Count the processors; tell whether their number has changed. Only where the head answers, else it waits."""
        former = self.capacity
        self.capacity = int(ray.cluster_resources().get("CPU", 0.0) / self._cost)
        return self.capacity != former

    def close(self) -> bool:
        """End; tell whether the head still answers."""
        self._is_closing.set()
        if self._thread.ident is not None:
            self._thread.join(_LAST_ANSWER)
        return not self._thread.is_alive() and not self._is_silent and _is_answering(_LAST_ANSWER)

    # What follows runs in the watch's thread.

    def _watch(self) -> None:
        unanswered = 0
        while unanswered < _MOST_UNANSWERED:
            if self._is_closing.wait(_PAUSE if not unanswered else 0.0) or not ray.is_initialized():
                return  # who has called ray.shutdown() is told by others
            asked = time.monotonic()
            if not _is_answering(_LONGEST_ANSWER):
                unanswered += 1
                self._is_closing.wait(asked + _LONGEST_ANSWER - time.monotonic())
            else:
                unanswered = 0
                if self.look():
                    self._changed()
        self._is_silent = True
        where, seconds = _address(), _MOST_UNANSWERED * _LONGEST_ANSWER
        self._failed(ClusterUnreachableError(where, f"its head, the GCS, has not answered for {seconds:.0f} s"))


def let_go_of_head() -> None:
    """Have ``ray.shutdown()`` not wait for a head that does not answer: it unsubscribes there from others' errors.

    These attributes are Ray's own; where it has them no more, nothing is lost but time.
    """
    worker = _worker()
    for subscriber in ("gcs_error_subscriber", "gcs_log_subscriber"):
        if hasattr(worker, subscriber):
            setattr(worker, subscriber, _Gone())
    for thread in ("listener_thread", "logger_thread"):
        if hasattr(worker, thread):
            delattr(worker, thread)


class _Gone:
    """Stands in for a subscription."""

    def close(self) -> None:
        """Do nothing."""

    def poll(self) -> None:
        """End the thread that asks."""
        raise SystemExit


def _is_answering(seconds: float) -> bool:
    """Ask whether there is a key that there is not; of all that Ray can be asked, this takes a deadline."""
    ask = getattr(getattr(_worker(), "gcs_client", None), "internal_kv_exists", None)
    if ask is None:  # ray.shutdown() was called, or this Ray cannot be asked: no reason to call it silent
        return bool(ray.is_initialized())
    try:
        ask(b"shpool", b"shpool", timeout=seconds)
    except Exception:  # noqa: BLE001 - border: Ray's own errors
        return False
    return True


def _address() -> str:
    return str(getattr(getattr(_worker(), "gcs_client", None), "address", "ray"))


def _worker() -> Any:  # noqa: ANN401 - what Ray knows of this process
    return ray._private.worker.global_worker  # noqa: SLF001 - public calls have no deadline
