"""The promises of a pool on a cluster, strained for a moment; ``stress_cluster`` strains them for longer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import stress_cluster
from cluster_fixtures import DaskProcesses, needs_dask
from ray_fixture import beside_shared_ray, needs_ray

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shpool.engines.ray_local import LocalRay

pytestmark = pytest.mark.slow


@pytest.fixture(params=[pytest.param("dask", marks=needs_dask), pytest.param("ray", marks=needs_ray)])
def machines(request: pytest.FixtureRequest) -> Iterator[stress_cluster.Machines]:
    if request.param == "dask":
        with DaskProcesses(2) as running:
            yield stress_cluster.DaskMachines(running)
    else:
        node: LocalRay = request.getfixturevalue("ray_node")
        ray = stress_cluster.RayMachines(node)
        yield ray
        ray.close()


def test_a_revoked_token_costs_one_login_and_a_lost_worker_no_result(machines: stress_cluster.Machines) -> None:
    stress_cluster.check_revocation(machines)
    stress_cluster.check_soak(machines, 6.0)


@pytest.mark.parametrize("_", [pytest.param(None, marks=needs_ray)])
def test_no_canary_is_in_the_files_of_a_ray_that_spills(ray_node: LocalRay, _: None) -> None:
    machines = stress_cluster.RayMachines(ray_node)
    stress_cluster.check_sight(machines)
    stress_cluster.check_canaries(machines)


@pytest.mark.parametrize(
    "kind",
    [pytest.param("dask", marks=needs_dask), pytest.param("ray", marks=[*needs_ray, beside_shared_ray])],
)
def test_a_cluster_of_the_pools_own_does_not_inherit_the_secret(kind: str, child_env: dict[str, str]) -> None:
    """In a process of its own, as Ray keeps a connection to each cluster it was ever connected to."""
    code = f"import stress_cluster; stress_cluster.check_own_cluster({kind!r})"
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    env = {**child_env, "SH_CLIENT_SECRET": stress_cluster.SECRET, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "secret in the environment of 0" in done.stdout
