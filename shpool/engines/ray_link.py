"""This process's connection to Ray: there is one at most, so pools share it, and the last of them ends it."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import logging
import os
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from shpool.engines.ray import check_ray_address
from shpool.engines.ray_head import Errand, let_go_of_head
from shpool.engines.ray_local import INNER, LocalRay
from shpool.errors import ClusterError, ClusterUnreachableError
from shpool.processors import processor_count

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_LONGEST_KNOCK = 3.0  # s until a host counts as unreachable; ray.init() itself tries for more than a minute
_LONGEST_CONNECT = 9.0  # s; a tenth is usual, and an unreachable cluster is to be told within 10
_LONGEST_LEAVE = 10.0  # s that ray.shutdown() gets; it wants up to 6 where a process of the cluster is gone
_FIRST_LEAVE = 0.5  # s that one gets whose end is not worth waiting for
_SILENCE = (
    f"it has not answered in {_LONGEST_CONNECT:.0f} s, nor does it where RAY_AUTH_MODE=token is wanted and not set"
)
_AUTH_VARIABLE = "RAY_AUTH_MODE"  # ray.init() sets it where it finds that a local cluster wants its token


class Link:
    """The connection, and how many pools use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards what follows, and is held while connecting
        self._users = 0
        self._is_ours = False
        self._local: LocalRay | None = None
        self._former_auth: str | None = None
        self._leaving: Errand | None = None  # ray.shutdown() of a cluster that did not answer

    def take(self, address: str | None, workers: int | None, blanked: Callable[[], Sequence[str]]) -> None:
        """Connect, unless this process is; count one more user.

        Args:
            address: As for ``RayEngine``.
            workers: How many processors a Ray of our own gets.
            blanked: Returns the environment variables it must not inherit.

        Raises:
            ClusterError: There is no cluster, none that can be reached within 10 s, or this process is connected to
                another.
        """
        with self._lock:
            if ray.is_initialized():
                _refuse_another(address)
            else:
                self._connect(address, workers, blanked)
                self._is_ours = True
            self._users += 1

    def give_back(self, *, is_answering: bool = True) -> None:
        """Disconnect if it was the last pool's, and the pools' own connection.

        Args:
            is_answering: The cluster's head answers; else its farewell is not waited for.
        """
        with self._lock:
            self._users -= 1
            if not self._users and self._is_ours:
                self._disconnect(is_answering=is_answering)

    def _connect(self, address: str | None, workers: int | None, blanked: Callable[[], Sequence[str]]) -> None:
        self._await_former_end(address)
        self._former_auth = os.environ.get(_AUTH_VARIABLE)
        address = address or os.environ.get("RAY_ADDRESS")
        try:
            if address is None:
                self._local = LocalRay(workers or processor_count(), blanked())
                _init_in_time(self._local.address, address="auto", _temp_dir=str(Path(self._local.folder, INNER)))
            else:
                if address != "auto":
                    _knock(address)
                _init_in_time(address, address=address)
        except BaseException:
            self._disconnect()
            raise

    def _await_former_end(self, address: str | None) -> None:
        if self._leaving is not None:
            self._leaving.join(_LONGEST_CONNECT)
            if self._leaving.is_alive():
                reason = "this process has not left one yet that did not answer"
                raise ClusterUnreachableError(address or "ray", reason)
            self._leaving = None

    def _disconnect(self, *, is_answering: bool = True) -> None:
        self._is_ours = False
        if ray.is_initialized():
            is_answering = self._leave(is_answering=is_answering) and is_answering
        if self._local is not None:
            self._local.close(is_answering=is_answering)
            self._local = None
        if self._former_auth is None:
            os.environ.pop(_AUTH_VARIABLE, None)

    def _leave(self, *, is_answering: bool) -> bool:
        """Call ``ray.shutdown``; tell whether it has ended in time."""
        if not is_answering:
            let_go_of_head()
        leaving = Errand("shpool-ray-leave", ray.shutdown)
        if leaving.has_ended(_LONGEST_LEAVE if is_answering else _FIRST_LEAVE):
            return True
        self._leaving = leaving
        atexit.register(_await_farewell, leaving)  # runs before Ray's own, which would do the same at the same time
        return False


def _await_farewell(leaving: Errand) -> None:
    """Let a ``ray.shutdown()`` end at the end of the process; where it does not, have that end without it.

    Ray's own would wait for it for ever. Once Python has ended, the process would end by SIGSEGV: the C library takes
    down what Ray's threads still use. So it is told to go at once then, with the exit code as it is.
    """
    leaving.join(_LONGEST_LEAVE)
    if leaving.is_alive():
        atexit.unregister(ray.shutdown)
        library = ctypes.CDLL(None)
        if hasattr(library, "on_exit"):  # glibc's; it calls what was registered last before all else
            library.on_exit(library["_exit"], None)


def _refuse_another(address: str | None) -> None:
    here = str(ray.get_runtime_context().gcs_address)
    if address not in {None, "auto", here} and _port(here) != _port(str(address)):
        raise ClusterError(str(address), f"this process is connected to another Ray, {here}; call ray.shutdown() first")


def _knock(address: str) -> None:
    """Find out whether anybody listens, as ``ray.init`` would ask for too long.

    Raises:
        ClusterUnreachableError: Nobody does.
        ClusterError: It is no address.
    """
    try:
        check_ray_address(address)  # RAY_ADDRESS has not been looked at yet
    except ValueError as exc:
        raise ClusterError(address, str(exc)) from None
    try:
        socket.create_connection((address.rpartition(":")[0].strip("[]"), _port(address) or 0), _LONGEST_KNOCK).close()
    except (OSError, OverflowError) as exc:  # the latter for a port that there is not
        raise ClusterUnreachableError(address, f"{type(exc).__name__}: {exc}") from exc


def _port(address: str) -> int | None:
    text = address.rpartition(":")[2]
    return int(text) if text.isdecimal() else None


def _init_in_time(where: str, **options: Any) -> None:  # noqa: ANN401 - as ray.init()
    """Run ``ray.init`` in a thread: there it leaves the process's handler of SIGTERM alone, and need not be waited for.

    Raises:
        ClusterUnreachableError: It has not connected in time.
        ClusterError: It has failed.
    """
    connecting = Errand(
        "shpool-connect", functools.partial(ray.init, log_to_driver=False, configure_logging=False, **options)
    )
    with _quiet():
        if not connecting.has_ended(_LONGEST_CONNECT):
            raise ClusterUnreachableError(where, _SILENCE)
    error = connecting.outcome.exception()
    if error is not None:
        raise ClusterError(where, f"{type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Spare the user what Ray tells about itself while connecting."""
    ray_logger = logging.getLogger("ray")
    level = ray_logger.level
    ray_logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray_logger.setLevel(level)


LINK = Link()
