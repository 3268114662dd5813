"""This process's connection to Ray: there is one at most, so pools share it, and the last of them ends it."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from shpool.engines.ray_local import INNER, LocalRay
from shpool.errors import ClusterError, ClusterUnreachableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_LONGEST_KNOCK = 3.0  # s until a host counts as unreachable; ray.init() itself tries for more than a minute
_LONGEST_CONNECT = 9.0  # s; a tenth is usual, and DESIGN's limit for an unreachable cluster is 10
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

    def give_back(self) -> None:
        """Disconnect if it was the last pool's, and the pools' own connection."""
        with self._lock:
            self._users -= 1
            if not self._users and self._is_ours:
                self._disconnect()

    def _connect(self, address: str | None, workers: int | None, blanked: Callable[[], Sequence[str]]) -> None:
        self._former_auth = os.environ.get(_AUTH_VARIABLE)
        address = address or os.environ.get("RAY_ADDRESS")
        try:
            if address is None:
                self._local = LocalRay(workers or os.cpu_count() or 1, blanked())
                _init_in_time(self._local.address, address="auto", _temp_dir=str(Path(self._local.folder, INNER)))
            else:
                if address != "auto":
                    _knock(address)
                _init_in_time(address, address=address)
        except BaseException:
            self._disconnect()
            raise

    def _disconnect(self) -> None:
        self._is_ours = False
        if ray.is_initialized():
            ray.shutdown()
        if self._local is not None:
            self._local.close()
            self._local = None
        if self._former_auth is None:
            os.environ.pop(_AUTH_VARIABLE, None)


def _refuse_another(address: str | None) -> None:
    here = str(ray.get_runtime_context().gcs_address)
    if address not in {None, "auto", here} and _port(here) != _port(str(address)):
        raise ClusterError(str(address), f"this process is connected to another Ray, {here}; call ray.shutdown() first")


def _knock(address: str) -> None:
    """Find out whether anybody listens, as ``ray.init`` would ask for too long.

    Raises:
        ClusterUnreachableError: Nobody does.
    """
    host, port = address.rpartition(":")[0].strip("[]"), _port(address)
    if not host or port is None:
        raise ClusterError(address, "an address is host:port, or auto")
    try:
        socket.create_connection((host, port), _LONGEST_KNOCK).close()
    except OSError as exc:
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
    errors: list[BaseException] = []

    def connect() -> None:
        try:
            ray.init(log_to_driver=False, configure_logging=False, **options)
        except BaseException as exc:  # noqa: BLE001 - raised below
            errors.append(exc)

    thread = threading.Thread(target=connect, name="shpool-connect", daemon=True)
    with _quiet():
        thread.start()
        thread.join(_LONGEST_CONNECT)
    if thread.is_alive():
        raise ClusterUnreachableError(where, _SILENCE)
    if errors:
        raise ClusterError(where, f"{type(errors[0]).__name__}: {errors[0]}") from errors[0]


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
