"""Break `shpool run --journal` off in every way, start it again, and count what was lost or done twice.

Run `python tests/stress_resume.py kills|changes|full|million|all`; it prints what was counted, a line per promise, and
exits with 1 if one was broken.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from shpool.errors import JournalNotFoundError, NotAJournalError
from shpool.journal import JournalView
from shpool.testing import LoopbackServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATIENCE = 300.0  # s after which something counts as hanging
WORKERS = 8

# What workers call. A file per start is made before anything else happens; its name tells whether that came to an end.
JOBS = """
    import os, time

    def work(number, folder, seconds):
        start = f"{folder}/{number}.{os.getpid()}.{time.monotonic_ns()}"
        open(start, "x").close()
        time.sleep(seconds)
        os.rename(start, start + ".ended")
        return number * 3

    def fill(number, size):
        return "x" * size

    def nothing(number):
        pass
"""

# The command, and how much of the machine its parent process took, as it sees it itself at the end.
LAUNCHER = """
    import atexit, os, pathlib, sys, time
    facts, began = sys.argv.pop(1), time.monotonic()

    def tell():
        peak = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
        pathlib.Path(facts).write_text(f"{peak[0]} {sum(os.times()[:2])} {time.monotonic() - began}")

    atexit.register(tell)
    from shpool_cli.app import main
    main()
"""

Line = dict[str, Any]


@dataclass
class Bench:
    """A folder with jobs in it, and a server to log in at.

    Attributes:
        folder: The folder.
        server: The server.
        name: The function of JOBS to call.
        inputs: The input, which ``write`` fills.
        journal: The journal.
        output: The results.
    """

    folder: Path
    server: LoopbackServer
    name: str
    inputs: Path = field(init=False)
    journal: Path = field(init=False)
    output: Path = field(init=False)

    def __post_init__(self) -> None:
        (self.folder / "jobs.py").write_text(textwrap.dedent(JOBS))
        self.inputs = self.folder / "input.jsonl"
        self.journal = self.folder / "run.db"
        self.output = self.folder / "results.jsonl"

    def write(self, lines: list[Line]) -> None:
        self.inputs.write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    def start(self, *options: str, workers: int = WORKERS, journal: bool = True) -> subprocess.Popen[str]:
        """Start the command, the same each time, at the head of a process group of its own."""
        command = [sys.executable, "-c", textwrap.dedent(LAUNCHER), str(self.folder / "facts")]
        command += ["run", f"jobs.py:{self.name}", str(self.inputs), "--output", str(self.output)]
        command += ["--journal", str(self.journal)] if journal else []
        command += ["--workers", str(workers), "--token-url", self.server.token_url, "--no-progress", *options]
        credentials = {"SH_CLIENT_ID": self.server.client_id, "SH_CLIENT_SECRET": self.server.client_secret}
        env = {**os.environ, **credentials, "HOME": str(self.folder)}
        with (self.folder / "summary").open("w") as stdout:
            return subprocess.Popen(
                command,
                cwd=self.folder,
                env=env,
                stdout=stdout,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )

    def run(
        self, *options: str, workers: int = WORKERS, journal: bool = True, wait: float = PATIENCE
    ) -> tuple[int, str]:
        """Run the command to its end; return its exit code and what it said."""
        with self.start(*options, workers=workers, journal=journal) as process:
            try:
                _, said = process.communicate(timeout=wait)
            except BaseException:
                kill_group(process)
                raise
        return process.returncode, said

    def facts(self) -> list[float]:
        """Return the parent's peak memory in kB, its processor time in s, and its time in s."""
        return [float(word) for word in (self.folder / "facts").read_text().split()]

    def done(self) -> dict[int, str]:
        """Return which numbers are done by the journal, with their keys; while no run lives."""
        with tempfile.TemporaryDirectory() as folder:  # on a full disk there is no space to read in
            copy = Path(folder, self.journal.name)
            for suffix in ("", "-wal"):
                with contextlib.suppress(FileNotFoundError):
                    shutil.copyfile(f"{self.journal}{suffix}", f"{copy}{suffix}")
            try:
                records = list(JournalView(copy).records("done"))
            except (JournalNotFoundError, NotAJournalError):  # killed, or out of space, before it was made
                return {}
        return {json.loads(record.arguments)[1]["number"]: record.key for record in records}


@contextlib.contextmanager
def bench(name: str, parent: str | None = None) -> Iterator[Bench]:
    with LoopbackServer() as server, tempfile.TemporaryDirectory(dir=parent) as folder:
        yield Bench(Path(folder), server, name)


def kill_group(process: subprocess.Popen[str]) -> None:
    """Send SIGKILL to a command and all its workers; return once none of them is left."""
    members = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    os.killpg(process.pid, signal.SIGKILL)  # not waited for yet, so the number is still its own
    process.wait(PATIENCE)
    give_up = time.monotonic() + PATIENCE
    while any(is_alive(member) for member in members):
        assert time.monotonic() < give_up, "processes outlive a kill of their group"
        time.sleep(0.005)


def is_alive(process: psutil.Process) -> bool:
    """Tell whether a process runs; whoever inherits an orphan may take his time to reap it."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def records_in(output: Path) -> list[Line]:
    """Return the whole lines of a result file; raise ValueError where one of them is none of ours."""
    content = output.read_bytes() if output.exists() else b""
    return [json.loads(line) for line in content.split(b"\n")[:-1]]


def ends_torn(output: Path) -> bool:
    """Tell whether a result file ends within a line."""
    content = output.read_bytes() if output.exists() else b""
    return bool(content) and not content.endswith(b"\n")


def promised(text: str, is_kept: object) -> bool:
    """Print whether a promise was kept, and return that."""
    print(f"  {'kept  ' if is_kept else 'BROKEN'} {text}", flush=True)
    return bool(is_kept)


# Kills


class Watcher(threading.Thread):
    """Read a result file again and again, as a user might; keep what was wrong with it.

    Attributes:
        looks: How often it was read.
        faults: What was wrong.
        may_shrink: Whether results may go from it: those of lines that are no longer in the input.
    """

    def __init__(self, output: Path) -> None:
        super().__init__(daemon=True)
        self._output = output
        self._ended = threading.Event()
        self._seen: set[str] = set()
        self.may_shrink = False
        self.looks = 0
        self.faults: list[str] = []

    def look(self) -> None:
        try:
            keys = [record["key"] for record in records_in(self._output)]
        except (ValueError, KeyError) as exc:
            self.faults.append(f"a bad line: {exc}")
            return
        self.looks += 1
        found = set(keys)
        if len(found) < len(keys):
            self.faults.append(f"{len(keys) - len(found)} results stand twice")
        if not self.may_shrink and self._seen - found:
            self.faults.append(f"{len(self._seen - found)} results have gone")
        self._seen = found

    def run(self) -> None:
        while not self._ended.wait(0.02):
            self.look()

    def end(self) -> None:
        self._ended.set()
        self.join()


@dataclass
class Story:
    """A batch on its way through runs and kills.

    Attributes:
        place: Where it runs.
        seconds: What a job takes.
        starts: Folder with a file per start.
        runs: Commands so far.
        kills: How many of them were killed.
        refused: How many of them ended before they were to be killed.
        idle: Of all, how many began no job.
        cut: Jobs that ran when their run was killed.
        most_cut: The most of them in one kill.
        unsaved: Jobs that had ended then and were not done by the journal.
        vain: Starts of jobs that the journal had as done before the run that started them.
        untrue: Results that stood in the file after a run and that the journal did not have as done.
        torn: Runs that left half a line at the end of the file.
    """

    place: Bench
    seconds: float
    starts: Path = field(init=False)
    runs: int = 0
    kills: int = 0
    refused: int = 0
    idle: int = 0
    cut: int = 0
    most_cut: int = 0
    unsaved: int = 0
    vain: int = 0
    untrue: int = 0
    torn: int = 0

    def __post_init__(self) -> None:
        self.starts = self.place.folder / "starts"
        self.starts.mkdir()

    def begun(self) -> collections.Counter[int]:
        """Return how often each number was begun."""
        return collections.Counter(map(number_of, self.starts.iterdir()))

    def write(self, numbers: list[int]) -> None:
        self.place.write([{"number": each, "folder": str(self.starts), "seconds": self.seconds} for each in numbers])

    def kill_once(self, most: int) -> None:
        """Run the command and kill it: every third time in its first second, else within so many new starts."""
        with self._compared(), self.place.start("--json") as process:
            self._await_moment(process, None if self.kills % 3 == 0 else random.randint(1, most))
            if process.poll() is None:
                kill_group(process)
                self.kills += 1
            else:
                self.refused += 1
                print(f"  ended by itself with {process.returncode}: {process.communicate()[1].strip()}")

    def run_once(self) -> tuple[int, Line]:
        """Run the command to its end; return its exit code and its summary."""
        with self._compared():
            code, said = self.place.run("--json")
        facts = (self.place.folder / "summary").read_text()
        if code:
            print(said)
        return code, dict(json.loads(facts or "{}"))

    @contextlib.contextmanager
    def _compared(self) -> Iterator[None]:
        """Compare what there was before a run and after it."""
        done, before = self.place.done(), set(self.starts.iterdir())
        yield
        new = {path for path in self.starts.iterdir() if path.with_suffix("") not in before and path not in before}
        saved = self.place.done()
        self.runs += 1
        self.idle += not new
        self.vain += sum(number_of(path) in done for path in new)
        cut = sum(path.suffix != ".ended" for path in new)
        self.cut, self.most_cut = self.cut + cut, max(self.most_cut, cut)
        self.unsaved += sum(path.suffix == ".ended" and number_of(path) not in saved for path in new)
        self.untrue += len({record["result"] // 3 for record in records_in(self.place.output)} - set(saved))
        self.torn += ends_torn(self.place.output)

    def _await_moment(self, process: subprocess.Popen[str], starts: int | None) -> None:
        """Wait for so many more starts and a part of the next job; None is somewhere in the first second."""
        if starts is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(random.uniform(0.0, 1.0))
            return
        goal = self.begun().total() + starts
        give_up = time.monotonic() + PATIENCE
        while self.begun().total() < goal and process.poll() is None:
            assert time.monotonic() < give_up, "the run hangs"
            time.sleep(0.002)
        time.sleep(random.uniform(0.0, self.seconds))


def number_of(start: Path) -> int:
    """Return which job a file in the folder of starts is of."""
    return int(start.name.partition(".")[0])


def tell_story(story: Story, watcher: Watcher, numbers: list[int], code: int, kills: int) -> bool:
    """Print what was counted and the promises that hold for any story that has come to its end."""
    begun, done = story.begun(), story.place.done()
    summary = JournalView(story.place.journal).summary()
    ends = sum(run.done for run in summary.runs)
    again = begun.total() - len(begun)
    print(f"  {story.runs} runs, {story.kills} killed, {story.idle} runs began no job")
    print(f"  {len(begun)} jobs begun, {begun.total()} starts, at most {max(begun.values())} of one job")
    print(f"  the kills cut off {story.cut} jobs, and {story.unsaved} had ended and were not in the journal yet")
    print(f"  the result file was read {watcher.looks} times, {story.torn} times it ended in half a line")
    return all(
        [
            promised(
                f"{kills} kills, {story.refused} other ends, then a run that ends with 0, not {code}",
                story.kills == kills and not story.refused and code == 0,
            ),
            promised(
                f"{summary.done} jobs are done, exactly once: {ends} ends in {len(summary.runs)} runs",
                summary.done == ends == len(done) and not summary.failed,
            ),
            promised(
                f"no job lost: of {len(numbers)} in the input {len(set(numbers) - set(done))} are not done",
                set(numbers) <= set(done),
            ),
            promised(
                f"at most workers x kills = {WORKERS * kills} starts of jobs begun before: {again}",
                again <= WORKERS * kills,
            ),
            promised(f"at most {WORKERS} jobs ran at a kill: {story.most_cut}", story.most_cut <= WORKERS),
            promised(f"no start of a job that was done: {story.vain}", not story.vain),
            promised(
                f"valid lines, no duplicates, nothing gone, at every moment: {watcher.faults or 'so it was'}",
                not watcher.faults,
            ),
            promised(f"no result in the file before it was in the journal: {story.untrue}", not story.untrue),
        ]
    )


def holds_exactly(output: Path, numbers: list[int]) -> bool:
    """Tell whether a result file has one line, and the right one, for each line of the input."""
    expected = [(index, number * 3, "done") for index, number in enumerate(numbers)]
    return sorted((line["index"], line["result"], line["status"]) for line in records_in(output)) == expected


@contextlib.contextmanager
def watched(output: Path, *, may_shrink: bool) -> Iterator[Watcher]:
    watcher = Watcher(output)
    watcher.may_shrink = may_shrink
    watcher.start()
    try:
        yield watcher
    finally:
        watcher.end()


def show_kills(jobs: int = 2000, kills: int = 20, seconds: float = 0.1) -> bool:
    """Kill the whole process group at random moments."""
    print(f"{jobs} jobs of {seconds:g} s, {WORKERS} workers, killed {kills} times")
    numbers = list(range(jobs))
    with bench("work") as place, watched(place.output, may_shrink=False) as watcher:
        story = Story(place, seconds)
        story.write(numbers)
        while story.kills < kills and story.runs < 2 * kills:
            story.kill_once(most=jobs // kills)
        code, _ = story.run_once()
        watcher.end()
        is_good = tell_story(story, watcher, numbers, code, kills)
        return promised("the result file is complete", holds_exactly(place.output, numbers)) and is_good


def changed(numbers: list[int], story: Story) -> list[int]:
    """Return the numbers in another order, a tenth of them replaced by new ones."""
    fresh = max(numbers) + 1
    replaced = set(random.sample(numbers, len(numbers) // 10))
    kept = [number for number in numbers if number not in replaced]
    result = [*kept, *range(fresh, fresh + len(replaced))]
    random.shuffle(result)
    story.write(result)
    return result


def show_changes(jobs: int = 2000, kills: int = 20, seconds: float = 0.1) -> bool:
    """Do the same while the input is reordered and a tenth of it replaced between the runs."""
    print(f"{jobs} jobs of {seconds:g} s, {WORKERS} workers, killed {kills} times, the input changed each time")
    with bench("work") as place, watched(place.output, may_shrink=True) as watcher:
        story = Story(place, seconds)
        numbers = list(range(jobs))
        story.write(numbers)
        while story.kills < kills and story.runs < 2 * kills:
            story.kill_once(most=jobs // kills)
            numbers = changed(numbers, story)
        code, _ = story.run_once()
        is_good = promised("the result file is that of the last input", holds_exactly(place.output, numbers))
        for _ in range(3):
            numbers = changed(numbers, story)
            is_good &= _only_new_runs(story, numbers)
        watcher.end()
        return tell_story(story, watcher, numbers, code, kills) and is_good


def _only_new_runs(story: Story, numbers: list[int]) -> bool:
    """Run a changed input undisturbed, and once more."""
    known = story.begun()
    code, summary = story.run_once()
    new = story.begun() - known
    expected = {number for number in numbers if number not in known}
    is_good = promised(
        f"changed: {len(expected)} lines new, {new.total()} starts, {summary['before']} done before",
        code == 0 and new == dict.fromkeys(expected, 1) and holds_exactly(story.place.output, numbers),
    )
    code, summary = story.run_once()
    return (
        promised(
            f"not changed at all: {summary['done']} done, {summary['logins']} logins",
            code == 0 and not summary["done"] + summary["logins"] and holds_exactly(story.place.output, numbers),
        )
        and is_good
    )


# A full disk


@contextlib.contextmanager
def small_disk(size: str) -> Iterator[Path]:
    """Mount a tmpfs of this size.

    Raises:
        PermissionError: We may not.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise PermissionError(done.stderr.strip() or f"mount exited with {done.returncode}")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


def fill_disk(what: str, disk_size: str = "1m") -> bool:
    """Run a batch with journal, output or both on a disk that is too small for it; then make the disk larger."""
    jobs, size = 3000, 1000
    with bench("fill") as place, small_disk(disk_size) as disk:
        if what != "output":
            place.journal = disk / "run.db"
        if what != "journal":
            place.output = disk / "results.jsonl"
        place.write([{"number": number, "size": size} for number in range(jobs)])
        code, said = place.run()
        reported = {record["key"] for record in records_in(place.output)}
        done = set(place.done().values())
        full = " ".join(said.split())
        print(f"{what} on a full disk, {len(done)} of {jobs} done, {len(reported)} reported: exit code {code}: {full}")
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        is_good = promised(
            "a clear error: one line that names the disk, a hint, exit code 1",
            code == 1
            and len(errors) == 1
            and "no space" in errors[0].lower()
            and "hint: " in said
            and "Traceback" not in said,
        )
        is_good &= promised("nothing reported that is not in the journal", reported <= done)
        is_good &= promised("no half line left in the file", not ends_torn(place.output))
        again, said_again = place.run()
        is_good &= promised(
            f"the same while it is still full: exit code {again}",
            again == 1 and "Traceback" not in said_again and done <= set(place.done().values()),
        )
        done = set(place.done().values())
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        code, said = place.run()
        records = records_in(place.output)
        summary = JournalView(place.journal).summary()
        print(f"  {said.strip()}")
        return is_good & promised(
            f"with space it resumes to the end: exit code {code}, {summary.runs[-1].done} done by this run",
            code == 0
            and summary.done == jobs == sum(run.done for run in summary.runs)
            and summary.runs[-1].done == jobs - len(done)
            and sorted(record["index"] for record in records) == list(range(jobs))
            and all(len(record["result"]) == size for record in records),
        )


def show_full() -> bool:
    """Fill the disk under the journal, the output, and both."""
    try:
        with small_disk("64k"):
            pass
    except (OSError, PermissionError) as exc:
        print(f"full: skipped, no small disk can be mounted here: {exc}")
        return True
    kept = [fill_disk(what) for what in ("journal", "output", "both")]  # all of them, whatever the first comes to
    return all(kept)


# A million


def show_million(jobs: int = 1_000_000) -> bool:
    """Run no-ops with and without a journal."""
    with bench("nothing") as place:
        with place.inputs.open("w") as lines:
            lines.writelines(f'{{"number": {number}}}\n' for number in range(jobs))
        costs: dict[str, tuple[float, float]] = {}
        is_good = True
        for journal in (False, True):
            is_good &= _measured(place, jobs, costs, journal=journal, title="with" if journal else "without")
            place.output.unlink()
        place.journal.unlink()
        with place.inputs.with_suffix(".csv").open("w", newline="") as lines:
            rows = csv.writer(lines)
            rows.writerow(["number"])
            rows.writerows([number] for number in range(jobs))
        place.inputs.unlink()
        place.inputs, place.output = place.inputs.with_suffix(".csv"), place.output.with_suffix(".csv")
        is_good &= _measured(place, jobs, costs, journal=True, title="CSV, with")
    by_clock, busy = (costs["with"][n] - costs["without"][n] for n in (0, 1))
    load = os.getloadavg()[1]
    is_crowded = load > 2 * (os.cpu_count() or 1)  # our own three processes make no crowd
    print(f"  a journal costs {by_clock:.1f} us a job by the clock, {busy:.1f} us of the parent's processor time")
    print(f"  with / without: {costs['with'][0] / costs['without'][0]:.2f} times by the clock, ", end="")
    print(f"{costs['with'][1] / costs['without'][1]:.2f} by processor time; load {load:.1f}")
    cost, clock = (busy, "processor time, the machine being crowded") if is_crowded else (by_clock, "the clock")
    return promised(f"at most 100 us a job for the journal by {clock}: {cost:.1f}", cost <= 100.0) & is_good


def _measured(place: Bench, jobs: int, costs: dict[str, tuple[float, float]], *, journal: bool, title: str) -> bool:
    code, said = place.run(workers=2, journal=journal, wait=3600.0)
    peak, busy, seconds = place.facts()
    costs[title] = seconds / jobs * 1e6, busy / jobs * 1e6
    with place.output.open("rb") as lines:
        count = sum(1 for _ in lines) - (place.output.suffix == ".csv")
    print(f"{title} journal: {said.strip()}", flush=True)
    print(f"  {costs[title][0]:.1f} us a job by the clock, {costs[title][1]:.1f} us of the parent's processor time")
    return all(
        [
            promised(f"{jobs} lines of results: {count}, exit code {code}", count == jobs and not code),
            promised(f"the parent stays below 150 MB: {peak / 1000:.0f} MB at its peak", peak < 150_000),
        ]
    )


PARTS: dict[str, Callable[[], bool]] = {
    "kills": show_kills,
    "changes": show_changes,
    "full": show_full,
    "million": show_million,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "all"])
    chosen = parser.parse_args().part
    outcomes = {name: part() for name, part in PARTS.items() if chosen in {name, "all"}}
    print({name: "good" if is_good else "BROKEN" for name, is_good in outcomes.items()})
    return 0 if all(outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
