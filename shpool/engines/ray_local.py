"""A Ray of our own on this machine, for trying out: ``python -m shpool.engines.ray_local FOLDER CPUS`` starts it.

A process of its own, for three reasons: Ray's processes, and so the workers, inherit an environment without secrets,
and the parent's is left alone. When the parent is gone, however it went, Ray ends and its folder with it. And the
terminal's ^C does not reach it.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from shpool.engines.ray_head import Errand
from shpool.errors import ClusterError

if TYPE_CHECKING:
    from collections.abc import Sequence

_LONGEST_START = 60.0  # s; two to eight are usual
_LONGEST_END = 20.0  # s
INNER = "r"  # name of Ray's own folder, within the one that is this user's alone
_LONGEST_FOLDER = 40  # characters: Ray's sockets lie 60 deeper, and the path of one may have 107 (<sys/un.h>)
_OBJECT_STORE = 80 * 2**20  # bytes, the least that Ray takes to be enough: arguments and results pass through, no more


class LocalRay:
    """A Ray with one node, this machine.

    Args:
        cpus: How many tasks of one processor each it runs at once.
        blanked: Names of environment variables that its processes must not inherit.

    Attributes:
        folder: Where Ray keeps what it writes, for this user's eyes only.
        address: Where it can be reached.
        pid: Of the process that started it, whose session all its processes are in.

    Raises:
        ClusterError: It does not start.
    """

    def __init__(self, cpus: int, blanked: Sequence[str] = ()) -> None:
        base = tempfile.gettempdir()
        self.folder = tempfile.mkdtemp(prefix="shpool-ray-", dir=base if len(base) < _LONGEST_FOLDER - 20 else "/tmp")  # noqa: S108 - mkdtemp is safe anywhere
        env = {name: value for name, value in os.environ.items() if name not in blanked}
        env.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        env["PYTHONPATH"] = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)  # for the workers too
        self._process = subprocess.Popen(  # noqa: S603 - this very program
            [sys.executable, "-m", __name__, self.folder, str(cpus)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=env,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self.address = self._first_line()
        if not self.address:
            self.close()
            where, reason = "ray", "Ray does not start on this machine; see what this says: ray start --head --block"
            raise ClusterError(where, reason)

    def _first_line(self) -> str:
        """Wait for the address; empty if none comes."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], _LONGEST_START)
        return self._process.stdout.readline().decode().strip() if ready else ""

    def close(self, *, is_answering: bool = True) -> None:
        """End Ray and remove what it has written; harmless when repeated.

        Args:
            is_answering: Its head answers; else it is killed, as it would take too long to end.
        """
        if self._process.stdin is None or self._process.stdin.closed:
            return
        self._process.stdin.close()
        if not is_answering:
            self._kill()
        try:
            self._process.wait(_LONGEST_END)
        except subprocess.TimeoutExpired:
            self._kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _kill(self) -> None:
        """Kill all that Ray has started; workers, which have groups of their own, end with those."""
        os.killpg(self.pid, signal.SIGKILL)


def main(folder: str, cpus: str) -> None:
    """Start Ray, say where, and end it once the parent has closed its end or is gone; the process's main function."""
    os.umask(0o077)  # Ray would let others read its log files, and the token that opens the cluster
    inner = str(Path(folder, INNER))  # Ray opens its own to all; the outer one stays closed
    context = ray.init(
        "local",
        num_cpus=int(cpus),
        object_store_memory=_OBJECT_STORE,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        _temp_dir=inner,
    )
    address = context.address_info["gcs_address"]
    Path(inner, "ray_current_cluster").write_text(address, encoding="utf-8")  # where address="auto" looks
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(address + "\n")
        sys.stdout.flush()
    sys.stdin.read()
    has_ended = Errand("shpool-ray-leave", ray.shutdown).has_ended(_LONGEST_END)
    shutil.rmtree(folder, ignore_errors=True)
    if not has_ended:  # it waits for a process that is stopped
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])
