"""A real Ray with two processors on this machine, one for a whole session; conftest.py imports it."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

import pytest
from cluster_fixtures import lasting_ports, lasting_sessions

from shpool.engines.ray import RayEngine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shpool.engines.ray_local import LocalRay

needs_ray = [
    pytest.mark.xdist_group("ray"),  # one Ray for all of them
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs pip install '.[ray]'"),
]


@pytest.fixture(scope="session")
def ray_node() -> Iterator[LocalRay]:
    """Run Ray in processes of its own, for all tests of this process.

    Tests have a home each, and Ray keeps the token that opens a cluster there: this one has none.
    """
    from shpool.engines.ray_local import LocalRay

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        node = LocalRay(2, [name for name in os.environ if name.startswith("SH_")])
        lasting_sessions.add(node.pid)
        lasting_ports.add(int(node.address.rpartition(":")[2]))  # to which Ray keeps a connection for good
        yield node
        node.close()
        lasting_sessions.discard(node.pid)


@pytest.fixture(scope="session")
def ray_engine(ray_node: LocalRay) -> RayEngine:
    """Return where that Ray is."""
    return RayEngine(ray_node.address)
