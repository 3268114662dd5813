"""Each example runs by itself, in a process and a home of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cluster_fixtures import needs_dask
from ray_fixture import beside_shared_ray, needs_ray

EXAMPLES = Path(__file__).parents[1] / "examples"
LAST_LINES = {
    "01_pool.py": "20 tiles, mean 126.5, 1 login",
    "02_downloads.py": "40 files, 4000000 bytes, 1 login",
    "03_any_provider.py": "client weather-app, scope read:forecast, 1 login",
    "04_sharing_without_pool.py": "20 tiles, 20480 bytes, 1 login",
    "06_one_limit.py": "40 tiles, limit kept",
    "on_dask.py": "20 tiles, mean 126.5, 1 login",
    "on_ray.py": "20 tiles, mean 126.5, 1 login",
}
ON_CLUSTERS = {"on_dask.py": needs_dask, "on_ray.py": [*needs_ray, beside_shared_ray]}
LONGEST = 50  # lines


def run_example(path: Path, env: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run one example with a folder of its own to work in."""
    return subprocess.run(
        [sys.executable, str(path)], env=env, cwd=folder, capture_output=True, text=True, timeout=180, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=ON_CLUSTERS.get(name, ())) for name in LAST_LINES])
def test_an_example_prints_its_result(name: str, child_env: dict[str, str], tmp_path: Path) -> None:
    run = run_example(EXAMPLES / name, child_env, tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == LAST_LINES[name]
    assert "Traceback" not in run.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_batch_example_gives_one_result_for_each_line(child_env: dict[str, str], tmp_path: Path) -> None:
    run = run_example(EXAMPLES / "05_batch" / "tiles.py", child_env, tmp_path)
    assert run.returncode == 0, run.stderr
    results = sorted((json.loads(line) for line in run.stdout.splitlines()), key=lambda result: result["index"])
    assert [result["result"]["tile"] for result in results] == list(range(12))
    assert {result["status"] for result in results} == {"done"}
    assert "12 jobs, 0 failed, 1 login" in run.stderr.splitlines()[-1]


@pytest.mark.slow
def test_downloads_show_their_progress(child_env: dict[str, str], tmp_path: Path) -> None:
    run = run_example(EXAMPLES / "02_downloads.py", child_env, tmp_path)
    assert "4.0 MB" in run.stderr


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(LAST_LINES)


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST
