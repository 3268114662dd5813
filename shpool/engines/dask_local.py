"""A Dask cluster on this machine, in processes of its own: ``python -m shpool.engines.dask_local WORKERS DESCRIPTOR``.

It writes its address to the descriptor. What tasks print goes where the parent's own output does, as that of the
crew's workers. It lives until its standard input ends, so it does not outlive a parent that was killed. Apart from the
parent, as Dask's nannies set environment variables for good in the process they run in.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING

from shpool.errors import ClusterError

if TYPE_CHECKING:
    from collections.abc import Sequence

_END_WITHIN = 10.0  # s


class LocalDask:
    """A local cluster, seen from the process that started it.

    Args:
        workers: Number of worker processes, one thread each.
        blanked: Environment variables they must not inherit.
    """

    def __init__(self, workers: int, blanked: Sequence[str] = ()) -> None:
        env = {name: value for name, value in os.environ.items() if name not in blanked}
        env["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)  # noqa: PTH109 - a text is needed
        self._told, telling = os.pipe()
        try:
            self._process = subprocess.Popen(  # noqa: S603 - this very module
                [sys.executable, "-m", __name__, str(workers), str(telling)],
                stdin=subprocess.PIPE,
                env=env,
                pass_fds=[telling],
                start_new_session=True,  # the terminal's ^C is the parent's to heed
            )
        except BaseException:
            os.close(self._told)
            raise
        finally:
            os.close(telling)

    def address(self) -> str:
        """Wait for the scheduler's address.

        Raises:
            ClusterError: It did not start.
        """
        with os.fdopen(self._told, encoding="utf-8", closefd=False) as told:
            line = told.readline().strip()
        if not line:
            where, reason = "dask", f"the local cluster did not start (exit code {self._process.wait()})"
            raise ClusterError(where, reason)
        return line

    def close(self) -> None:
        """End it; harmless when repeated."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        if self._told >= 0:
            os.close(self._told)
            self._told = -1
        try:
            self._process.wait(_END_WITHIN)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def main() -> None:
    """Be the cluster."""
    import dask
    from distributed import LocalCluster

    with (
        tempfile.TemporaryDirectory(prefix="shpool-dask-") as folder,
        dask.config.set({"temporary-directory": folder}),  # else the scheduler leaves a folder in the system's
        LocalCluster(
            n_workers=int(sys.argv[1]),
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            dashboard_address=None,
            local_directory=folder,
        ) as cluster,
    ):
        with os.fdopen(int(sys.argv[2]), "w", encoding="utf-8") as telling:
            telling.write(f"{cluster.scheduler_address}\n")
        sys.stdin.read()


if __name__ == "__main__":
    main()
