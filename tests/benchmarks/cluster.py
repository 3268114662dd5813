"""What a task costs on a cluster, against the cluster's own client on the same workers in the same run.

Run `python tests/benchmarks/cluster.py dask` or `... ray`; it prints microseconds a task, the least of the rounds, as
what else the machine does only adds, and exits with 1 if the pool costs more than 1.2 times what the bare client does.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:1] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]

import argparse
import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from cluster_fixtures import DaskProcesses  # after the path is set
from pool_tasks import double

from shpool import AuthenticatedProcessPool, DaskEngine, OAuthSession, RayEngine
from shpool.testing import LoopbackServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shpool.engines.base import EngineDescription

_BUDGET = 1.2  # times the bare client


class Bare(NamedTuple):
    """What the cluster's own client offers: one task at a time, many submitted, many mapped."""

    one: Callable[[int], int]
    submitted: Callable[[range], list[int]]
    mapped: Callable[[range], list[int]]


@contextmanager
def dask() -> Iterator[tuple[EngineDescription, Bare]]:
    from distributed import Client

    with DaskProcesses(2) as processes, Client(processes.address, set_as_default=False) as client:
        client.wait_for_workers(2)
        yield (
            DaskEngine(processes.address),
            Bare(
                lambda number: int(client.submit(double, number, pure=False).result()),
                lambda numbers: list(client.gather([client.submit(double, number, pure=False) for number in numbers])),
                lambda numbers: list(client.gather(client.map(double, numbers, pure=False))),
            ),
        )


@contextmanager
def ray() -> Iterator[tuple[EngineDescription, Bare]]:
    from shpool.engines.ray_local import LocalRay

    os.environ["RAY_AUTH_MODE"] = "disabled"  # else a parent finds Ray's token only where it is told auto
    node = LocalRay(2, ())
    try:
        yield from _on_ray(node.address)
    finally:
        node.close()


def _on_ray(address: str) -> Iterator[tuple[EngineDescription, Bare]]:
    import ray as bare

    bare.init(address=address, log_to_driver=False, configure_logging=False)
    task: Any = bare.remote(num_cpus=1, max_retries=0)(double)
    try:
        yield (
            RayEngine(address),
            Bare(
                lambda number: int(bare.get(task.remote(number))),
                lambda numbers: list(bare.get([task.remote(number) for number in numbers])),
                lambda numbers: list(bare.get([task.remote(number) for number in numbers])),
            ),
        )
    finally:
        bare.shutdown()


def microseconds(work: Callable[[], list[int]], expected: range) -> float:
    """Return what one task of the work takes."""
    began = time.perf_counter()
    results = work()
    taken = time.perf_counter() - began
    assert results == [2 * number for number in expected]
    return taken / len(expected) * 1e6


def compare(pool: AuthenticatedProcessPool, bare: Bare, size: int, rounds: int) -> bool:
    """Measure by turns, so that what else the machine does meets both; print; tell whether the budget is kept."""
    few, many = range(size // 10), range(size)
    pairs: dict[str, tuple[Callable[[], list[int]], Callable[[], list[int]], range]] = {
        "one at a time": (
            lambda: [pool.submit(double, number).result() for number in few],
            lambda: [bare.one(number) for number in few],
            few,
        ),
        "many submitted": (
            lambda: [future.result() for future in [pool.submit(double, number) for number in many]],
            lambda: bare.submitted(many),
            many,
        ),
        "map, one a message": (lambda: list(pool.map(double, many, chunksize=1)), lambda: bare.mapped(many), many),
        "map": (lambda: list(pool.map(double, many)), lambda: bare.mapped(many), many),
    }
    is_kept = True
    print(f"{'':<22}{'shpool':>10}{'bare':>10}{'ratio':>8}   µs a task, the least of {rounds} rounds")
    for name, (ours, theirs, numbers) in pairs.items():
        figures = [(microseconds(ours, numbers), microseconds(theirs, numbers)) for _ in range(rounds + 1)][1:]
        mine, other = (min(column) for column in zip(*figures, strict=True))
        is_kept &= mine <= _BUDGET * other
        print(f"{name:<22}{mine:>10,.0f}{other:>10,.0f}{mine / other:>8.2f}")
    print(f"budget {_BUDGET} times the bare client: {'kept' if is_kept else 'MISSED'}")
    return is_kept


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cluster", choices=("dask", "ray"))
    parser.add_argument("--size", type=int, default=1000, help="tasks a round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    start = dask if options.cluster == "dask" else ray
    with start() as (engine, bare), LoopbackServer() as server:
        session = OAuthSession(server.token_url, server.client_id, server.client_secret)
        with AuthenticatedProcessPool(session, engine=engine) as pool:
            is_kept = compare(pool, bare, options.size, options.rounds)
    return 0 if is_kept else 1


if __name__ == "__main__":
    sys.exit(main())
