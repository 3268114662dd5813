"""Strain a pool on a real cluster: short-lived tokens, workers that come and are killed, revocation, canaries.

Run `python tests/stress_cluster.py dask` or `... ray`; it prints what was counted and exits with 1 if a promise was
broken. With `--namespaces`, as root: two Dask workers in network namespaces of their own, each with its own /dev/shm.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

import psutil
from cluster_fixtures import DaskProcesses
from patience import PATIENCE, until
from ray_fixture import SecondNode

from shpool import AuthenticatedProcessPool, DaskEngine, OAuthSession, RayEngine, current_session
from shpool.testing import LoopbackServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from typing_extensions import Self

    from shpool.engines.base import EngineDescription
    from shpool.engines.ray_local import LocalRay

TASK_SECONDS = 0.2
LIFETIME = 3.0  # s of a token
SECRET = "canary-secret-not-real-0815"


class Machines(Protocol):
    """A cluster to be strained."""

    engine: EngineDescription

    def add_worker(self) -> object:
        """Start one more."""

    def processes(self) -> list[psutil.Process]:
        """Return all of its processes."""

    def busy(self, latest: int) -> int:
        """Return the process id of a worker that runs a task, given the one that was the last to answer."""

    def files(self) -> list[Path]:
        """Return the folders it writes to."""

    def holdings(self) -> dict[str, bytes]:
        """Return, pickled and by place, what it holds of tasks and of what was sent with them."""

    def plant(self, word: str) -> contextlib.AbstractContextManager[object]:
        """Put a word into each of these places that a pool's tasks and set-up do not reach; before they run."""

    def overfill(self, word: str) -> contextlib.AbstractContextManager[object]:
        """Have the cluster write to disk what it holds, and a word with it; while a pool's tasks run."""


class DaskMachines:
    """Two workers of Dask."""

    def __init__(self, running: DaskProcesses) -> None:
        self._running = running
        self.engine: EngineDescription = DaskEngine(running.address)

    def add_worker(self) -> object:
        return self._running.add_worker()

    def processes(self) -> list[psutil.Process]:
        roots = [psutil.Process(pid) for pid in self._running.pids]
        return roots + [child for root in roots for child in root.children(recursive=True)]

    def busy(self, latest: int) -> int:
        return latest

    def files(self) -> list[Path]:
        return [self._running.folder]

    def holdings(self) -> dict[str, bytes]:
        from distributed import Client

        with Client(self._running.address, set_as_default=False) as client:
            held: dict[str, bytes] = client.run_on_scheduler(held_by_scheduler)
            for there in client.run(held_by_worker).values():
                for place, content in there.items():
                    held[place] = held.get(place, b"") + content
            return held

    @contextlib.contextmanager
    def plant(self, word: str) -> Iterator[None]:
        import dask
        from distributed import Client

        with Client(self._running.address, set_as_default=False) as client:
            client.log_event("canary", word)
            with dask.annotate(note=word):
                result = client.submit(str.upper, word.lower(), pure=False)
            assert result.result(PATIENCE) == word
            yield

    def overfill(self, word: str) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext(word)


class RayMachines:
    """A Ray with two processors.

    Args:
        node: Where it runs already; None for one of its own.
    """

    def __init__(self, node: LocalRay | None = None) -> None:
        from shpool.engines.ray_local import LocalRay

        self._own = LocalRay(2, ()) if node is None else None
        self._node = node or self._own
        self._others: list[SecondNode] = []
        assert self._node is not None
        self._pid, self._folder = self._node.pid, Path(self._node.folder)
        self.engine: EngineDescription = RayEngine(self._node.address)

    def add_worker(self) -> object:
        assert self._node is not None
        self._others.append(SecondNode(self._node.address))
        return None  # it joins when it likes

    def processes(self) -> list[psutil.Process]:
        root = psutil.Process(self._pid)
        return [root, *root.children(recursive=True)]

    def busy(self, latest: int) -> int:
        """Go by the title that Ray gives a process: the one that has answered is idle, often."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if process.cmdline()[:1] == ["ray::shpool"]:
                    return process.pid
        return latest

    def files(self) -> list[Path]:
        return [self._folder]

    def holdings(self) -> dict[str, bytes]:
        return {}  # all that lasts is in the files

    def plant(self, word: str) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext(word)

    @contextlib.contextmanager
    def overfill(self, word: str) -> Iterator[None]:
        """Put more into the object store than it holds, so that some of what is there is spilled to disk."""
        import ray

        held = [ray.put(word.encode() + bytes(30_000_000)) for _ in range(4)]
        until(lambda: sum(path.stat().st_size for path in self._spilled()) > 0)
        yield
        del held

    def _spilled(self) -> list[Path]:
        return [path for folder in self._folder.rglob("*spill*") for path in folder.rglob("*") if path.is_file()]

    def close(self) -> None:
        for node in self._others:
            node.close()
        if self._own is not None:
            self._own.close()


def held_by_scheduler(dask_scheduler: Any) -> dict[str, bytes]:
    """Pickle what a scheduler has of tasks: what a repr leaves out is in there, and what cannot be pickled says so."""
    tasks = [
        (task.run_spec, task.annotations, task.metadata, task.exception, task.traceback)
        for task in dask_scheduler.tasks.values()
    ]
    events = [list(topic.events) for topic in dask_scheduler._broker._topics.values()]
    history = [list(dask_scheduler.transition_log), list(dask_scheduler.computations), dask_scheduler.get_logs()]
    return {
        "scheduler's tasks": _pickled(tasks),
        "scheduler's plugins": _pickled([dask_scheduler.worker_plugins, dask_scheduler.nanny_plugins]),
        "scheduler's events": _pickled(events),
        "scheduler's history": _pickled([history, dask_scheduler.task_metadata]),
    }


def held_by_worker(dask_worker: Any) -> dict[str, bytes]:
    """Pickle what a worker has of tasks."""
    state = dask_worker.state
    return {
        "workers' tasks": _pickled([(task, task.run_spec) for task in state.tasks.values()]),
        "workers' data": _pickled(dict(dask_worker.data)),
        "workers' history": _pickled([list(state.log), list(state.stimulus_log), dask_worker.get_logs()]),
    }


def _pickled(things: object) -> bytes:
    """Pickle whatever Dask holds, frames that came over the network included."""
    import io

    import cloudpickle

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle has no types
        def reducer_override(self, thing: Any) -> Any:
            return (bytes, (bytes(thing),)) if isinstance(thing, memoryview) else super().reducer_override(thing)

    into = io.BytesIO()
    Pickler(into).dump(things)
    return into.getvalue()


def ask(url: str) -> tuple[int, int]:
    """Ask a data URL for a while; return how often in vain, and in which process."""
    session = current_session().http
    failed = 0
    give_up = time.monotonic() + TASK_SECONDS
    while time.monotonic() < give_up:
        failed += session.get(url).status_code != 200
    return failed, os.getpid()


def session_of(server: LoopbackServer) -> OAuthSession:
    return OAuthSession(server.token_url, server.client_id, server.client_secret)


@dataclass
class Tally:
    """What a soak counted."""

    results: int = 0
    failed: int = 0
    logins: int = 0
    refused: int = 0
    lost: int = 0
    seconds: float = 0.0


def soak(engine: str | EngineDescription, seconds: float, disturb: Callable[[float, int, int], None]) -> Tally:
    """Let two workers ask without pause while tokens come and go."""
    count, tally = int(seconds / TASK_SECONDS) * 2, Tally()
    with LoopbackServer() as server:
        with AuthenticatedProcessPool(session_of(server), 2, engine=engine, retries=2) as pool:
            server.lifetime = LIFETIME
            server.revoke_all()
            began = time.monotonic()
            for failed, worker in pool.map_unordered(
                ask, (server.data_url(n, 1000) for n in range(count)), chunksize=1
            ):
                tally.results += 1
                tally.failed += failed
                disturb(tally.results / count, worker, pool.stats().workers_lost)
            tally.seconds = time.monotonic() - began
            tally.lost = pool.stats().workers_lost
        tally.logins, tally.refused = server.logins, server.unauthorized
    print(f"  {tally}")
    assert tally.results == count, "results are missing"
    assert tally.failed == 0, "a 401 was not recovered from"
    return tally


def disturber(machines: Machines) -> Callable[[float, int, int], None]:
    """Return what adds a worker at a third of the way and kills one at two thirds; or later, if that one was idle."""
    pending = [1 / 3, 2 / 3, 3 / 4, 5 / 6]

    def disturb(share: float, worker: int, lost: int) -> None:
        if not pending or share < pending[0]:
            return
        if pending.pop(0) < 1 / 2:
            threading.Thread(target=machines.add_worker).start()
        elif not lost:
            os.kill(machines.busy(worker), signal.SIGKILL)

    return disturb


def check_soak(machines: Machines, seconds: float) -> None:
    """3-second tokens, a worker added in the middle, one killed: all results, as many logins as on loky."""
    print(f"soak of {seconds:.0f} s, tokens of {LIFETIME:g} s, one worker added, one killed")
    there = soak(machines.engine, seconds, disturber(machines))
    here = soak("loky", seconds, lambda *_: None)
    pace = (there.logins - 2) / there.seconds, (here.logins - 2) / here.seconds
    print(f"  logins a second: {pace[0]:.2f}, on loky {pace[1]:.2f}")
    assert there.lost >= 1
    assert there.logins <= there.seconds / (LIFETIME * 0.8) + 4, "too many logins"


def check_revocation(machines: Machines) -> None:
    """All tokens revoked in mid-run: one more login."""
    print("revocation in mid-run")
    with LoopbackServer() as server, AuthenticatedProcessPool(session_of(server), 2, engine=machines.engine) as pool:
        urls = [server.data_url(number, 1000) for number in range(20)]
        failed = 0
        for number, (vain, _) in enumerate(pool.map_unordered(ask, urls, chunksize=1)):
            failed += vain
            if number == 5:
                server.revoke_all()
        print(f"  logins {server.logins}, refused {server.unauthorized}, failed {failed}")
        assert (server.logins, failed) == (2, 0)


def use_and_wait(url: str, folder: str, *_: str) -> int:
    """Use the token, write down the environment; then wait for a cue, so that somebody can look at a running task."""
    status = current_session().http.get(url).status_code
    (Path(folder) / f"environment-{os.getpid()}").write_text(repr(dict(os.environ)))
    (Path(folder) / f"begun-{os.getpid()}").touch()
    until((Path(folder) / "cue").exists)
    return status


@contextlib.contextmanager
def running_tasks(
    machines: Machines, server: LoopbackServer, word: str = ""
) -> Iterator[tuple[AuthenticatedProcessPool, dict[str, bytes]]]:
    """Run a pool's tasks, one on each of two workers, more behind them; yield the pool and what it has sent, by place.

    Args:
        machines: Where.
        server: What they use the token at.
        word: Stands in the tasks' arguments and in the workers' environment variables.
    """
    sent = {"sent tasks": b"", "environments of tasks": b""}
    env = {"PLANTED": word} if word else {}
    with (
        tempfile.TemporaryDirectory(prefix="canary-") as folder,
        AuthenticatedProcessPool(session_of(server), 2, engine=machines.engine, env=env) as pool,
    ):
        engine: Any = pool._engine  # a remote engine
        launch = engine._cluster.launch

        def record(calls: Any) -> None:
            sent["sent tasks"] += pickle.dumps(list(calls))
            launch(calls)

        engine._cluster.launch = record
        futures = [pool.submit(use_and_wait, server.data_url(n, 1000), folder, word) for n in range(6)]
        try:
            until(lambda: len(list(Path(folder).glob("begun-*"))) == 2)
            sent["environments of tasks"] = b"".join(_contents([Path(folder)]))
            yield pool, sent
        finally:
            (Path(folder) / "cue").touch()
        assert {future.result(PATIENCE) for future in futures} == {200}


def places(
    machines: Machines, pool: AuthenticatedProcessPool, sent: dict[str, bytes], processes: list[psutil.Process]
) -> dict[str, bytes]:
    """Return all that is searched for canaries, by place."""
    engine: Any = pool._engine
    return {
        **sent,
        "sent set-up": engine._setup,
        "environments": b"".join(map(_environment, processes)),
        "files": b"".join(_contents(machines.files())),
        **machines.holdings(),
    }


def check_sight(machines: Machines) -> None:
    """What is put into each place is seen there, so that no canary is where the search is blind."""
    print("words planted for the search to find")
    by_pool, beside = "PLANTED-BY-THE-POOL-4711", "PLANTED-BESIDE-IT-4712"
    file = machines.files()[0] / "planted"
    bystander = subprocess.Popen(["sleep", "600"], env={**os.environ, "PLANTED": beside})
    try:
        file.write_text(beside)
        with (
            LoopbackServer() as server,
            machines.plant(beside),
            running_tasks(machines, server, by_pool) as (pool, sent),
            machines.overfill(beside),
        ):
            seen = places(machines, pool, sent, [*machines.processes(), psutil.Process(bystander.pid)])
    finally:
        file.unlink(missing_ok=True)
        bystander.kill()
        bystander.wait()
    finds = {word: {place for place in seen if word.encode() in seen[place]} for word in (by_pool, beside)}
    for word, found in finds.items():
        print(f"  {word}: {', '.join(sorted(found))}")
    blind = {place for place in seen if place.endswith(("tasks", "plugins", "set-up"))} - finds[by_pool]
    blind |= set(seen).difference(*finds.values())
    assert not blind, f"the search is blind in: {blind}"


def check_own_cluster(engine: str) -> None:
    """The processes of a cluster that a pool starts for itself do not inherit the secret."""
    print("a cluster of the pool's own")
    with (
        LoopbackServer(client_secret=SECRET) as server,
        AuthenticatedProcessPool(session_of(server), 2, engine=engine) as pool,
    ):
        assert pool.submit(os.getpid).result(PATIENCE)
        found = [_environment(process) for process in psutil.Process().children(recursive=True)]
    hits = sum(SECRET.encode() in content for content in found)
    print(f"  {len(found)} processes, secret in the environment of {hits}")
    assert any(found)
    assert not hits


def check_canaries(machines: Machines) -> None:
    """Neither secret nor token lies where it must not, while tasks run."""
    print("canaries")
    os.environ["SH_CLIENT_SECRET"] = SECRET
    try:
        with (
            LoopbackServer(client_secret=SECRET) as server,
            running_tasks(machines, server) as (pool, sent),
            machines.overfill("no canary"),
        ):
            tokens = list(server._issuer._issued)
            assert tokens
            assert pool.stats().tasks_pending
            found = places(machines, pool, sent, machines.processes())
    finally:
        del os.environ["SH_CLIENT_SECRET"]
    for place, content in found.items():
        hits = [content.count(word.encode()) for word in (SECRET, *tokens)]
        print(f"  {place}: {len(content)} bytes, secret {hits[0]} times, token {sum(hits[1:])} times")
        assert content or place == "files", f"there is nothing in the {place}"
        assert not any(hits), f"a canary is in the {place}"


def _environment(process: psutil.Process) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process.pid}/environ").read_bytes()
    return b""


def _contents(folders: list[Path]) -> Iterator[bytes]:
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                with contextlib.suppress(OSError):
                    yield path.read_bytes()


# Names and addresses of this very process, lest two runs on one machine meet. Address 1 is the parent's.

_BRIDGE = f"shp{os.getpid() % 100_000}n"
_SUBNET = f"10.217.{os.getpid() % 250}"


class Namespaces:
    """Network namespaces whose workers reach nothing but the parent's addresses; gone at the end."""

    def __init__(self, count: int) -> None:
        self.names = [f"{_BRIDGE}{number}" for number in range(count)]
        self.host = f"{_SUBNET}.1"
        self._relays: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        try:
            _ip("link", "add", _BRIDGE, "type", "bridge")
            _ip("addr", "add", f"{self.host}/24", "dev", _BRIDGE)
            _ip("link", "set", _BRIDGE, "up")
            for number, name in enumerate(self.names):
                _ip("netns", "add", name)
                _ip("link", "add", f"{name}a", "type", "veth", "peer", "name", f"{name}b", "netns", name)
                _ip("link", "set", f"{name}a", "master", _BRIDGE, "up")
                for words in (
                    ("addr", "add", f"{_SUBNET}.{number + 2}/24", "dev", f"{name}b"),
                    ("link", "set", f"{name}b", "up"),
                    ("link", "set", "lo", "up"),
                ):
                    _ip("-n", name, *words)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for relay in self._relays:
            relay.kill()
            relay.wait()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)
            subprocess.run(["ip", "link", "del", f"{name}a"], check=False, stderr=subprocess.DEVNULL)
        subprocess.run(["ip", "link", "del", _BRIDGE], check=False, stderr=subprocess.DEVNULL)

    def prefix(self, name: str) -> list[str]:
        """Return what starts a command in a namespace, with a /dev/shm of its own."""
        mount = 'mount -t tmpfs tmpfs /dev/shm && exec "$@"'
        return ["ip", "netns", "exec", name, "unshare", "--mount", "sh", "-c", mount, "sh"]

    def bring(self, port: int) -> None:
        """Let 127.0.0.1:port of each namespace be the parent's: the token goes in the clear to loopback only."""
        outer = self._relay([], self.host, port, "127.0.0.1")
        self._relays.append(outer)
        self._relays += [
            self._relay(["ip", "netns", "exec", name], "127.0.0.1", port, self.host) for name in self.names
        ]

    def _relay(self, prefix: list[str], host: str, port: int, target: str) -> subprocess.Popen[bytes]:
        words = [*prefix, sys.executable, __file__, "relay", host, str(port), target]
        relay = subprocess.Popen(words, stdout=subprocess.PIPE)
        assert relay.stdout is not None
        relay.stdout.readline()
        relay.stdout.close()
        return relay


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, stderr=subprocess.DEVNULL)


def may_make_namespaces() -> str:
    """Return why no namespaces can be made here; empty if they can."""
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    try:
        with Namespaces(1):
            return ""
    except (OSError, subprocess.CalledProcessError) as exc:
        return f"network namespaces cannot be made here: {exc}"


def check_namespaces(seconds: float) -> None:
    """Two workers that share no memory with the parent, nor with each other."""
    print(f"two network namespaces, soak of {seconds:.0f} s")
    with Namespaces(2) as spaces, DaskProcesses(0, host=spaces.host) as running, LoopbackServer() as server:
        spaces.bring(urlsplit(server.base_url).port or 0)
        for name in spaces.names:
            running.add_worker("--host", _address_in(name), prefix=spaces.prefix(name))
        with AuthenticatedProcessPool(session_of(server), engine=DaskEngine(running.address), retries=2) as pool:
            server.lifetime = LIFETIME
            server.revoke_all()
            urls = (server.data_url(n, 1000) for n in range(int(seconds / TASK_SECONDS) * 2))
            failed, places = 0, set()
            for vain, place in pool.map_unordered(ask_and_tell_where, urls, chunksize=1):
                failed += vain
                places.add(place)
        print(f"  failed {failed}, logins {server.logins}, (network, /dev/shm) of the workers: {sorted(places)}")
        own = place_of_this_process()
        assert failed == 0
        assert len({network for network, _ in places} | {own[0]}) == 3
        assert len({memory for _, memory in places} | {own[1]}) == 3


def place_of_this_process() -> tuple[str, int]:
    return str(Path("/proc/self/ns/net").readlink()), Path("/dev/shm").stat().st_dev


def ask_and_tell_where(url: str) -> tuple[int, tuple[str, int]]:
    return ask(url)[0], place_of_this_process()


def _address_in(name: str) -> str:
    return f"{_SUBNET}.{int(name.removeprefix(_BRIDGE)) + 2}"


async def relay(host: str, port: int, target: str) -> None:
    """Pass on connections, until killed."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner, outer = await asyncio.open_connection(target, port)
        await asyncio.gather(pump(reader, outer), pump(inner, writer))

    server = await asyncio.start_server(serve, host, port)
    print("ready", flush=True)
    await server.serve_forever()


@contextlib.contextmanager
def running_cluster(kind: str) -> Iterator[Machines]:
    if kind == "ray":
        machines = RayMachines()
        try:
            yield machines
        finally:
            machines.close()
    else:
        with DaskProcesses(2) as running:
            yield DaskMachines(running)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cluster", choices=("dask", "ray"))
    parser.add_argument("--seconds", type=float, default=20.0, help="length of the soak")
    parser.add_argument(
        "--namespaces", action="store_true", help="the soak across network namespaces, and nothing else"
    )
    options = parser.parse_args()
    if options.namespaces:
        reason = may_make_namespaces()
        if reason:
            print(f"skipped: {reason}")
        else:
            check_namespaces(options.seconds)
        return 0
    # Before anything runs, as in a shell that has exported it.
    os.environ["SH_CLIENT_SECRET"] = SECRET
    os.environ["RAY_AUTH_MODE"] = "disabled"  # else a parent finds Ray's token only where it is told auto
    check_own_cluster(options.cluster)
    del os.environ["SH_CLIENT_SECRET"]  # what somebody else's cluster inherits is not the pool's to say
    with running_cluster(options.cluster) as machines:
        check_sight(machines)
        check_canaries(machines)
        check_revocation(machines)
        check_soak(machines, options.seconds)
    print("all promises kept")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["relay"]:  # a child of ``Namespaces``
        asyncio.run(relay(sys.argv[2], int(sys.argv[3]), sys.argv[4]))
    sys.exit(main())
