"""The gate: its arithmetic on a clock of its own, its memory and its locks with real processes."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from patience import NEVER, in_time, until

from shpool.errors import GateInUseError, GateUnusableError
from shpool.gate import PRESETS, Gate, Ticket
from shpool.gate.limits import Lane, Limits, Usage, cut_rate, grown_rate, parse_rate, usual_burst
from shpool.gate.segment import _PREFIX, LOOKED, SEGMENT_SIZE, Segment, own_descriptor, sweep_left

if TYPE_CHECKING:
    from collections.abc import Iterator

_SHM = Path("/dev/shm")


class Stopwatch:
    """A monotonic clock that moves only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def watch() -> Stopwatch:
    return Stopwatch()


def gate_on(
    watch: Stopwatch,
    requests: str | None = None,
    units: str | None = None,
    connections: int | None = None,
    *,
    burst: float | None = None,
) -> Gate:
    return Gate(requests, units, connections, burst=burst, _clock=watch, _sleep=watch.sleep)


def moments(gate: Gate, watch: Stopwatch, count: int, cost: float = 1.0) -> list[float]:
    """Return when so many requests in a row may go, in seconds from now."""
    begun = watch.now
    passed = []
    for _ in range(count):
        gate.acquire(cost).release()
        passed.append(round(watch.now - begun, 6))
    return passed


def sibling(gate: Gate) -> Gate:
    """Return the same gate as another process holds it."""
    return Gate._attached(Segment(own_descriptor(gate._segment.descriptor)))


# Limits


@pytest.mark.parametrize(
    ("text", "per_second"), [("300/min", 5.0), ("5/s", 5.0), ("3600 / hour", 1.0), ("86400/day", 1.0), ("0.5/sec", 0.5)]
)
def test_a_rate_is_a_number_and_a_time(text: str, per_second: float) -> None:
    assert parse_rate(text) == per_second


@pytest.mark.parametrize("text", ["banana", "", "300", "/min", "-3/s", "0/s", "1e9/s", "3/fortnight", "nan/s", "inf/s"])
def test_what_is_no_rate_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=r"requests must be .*not '" + text):
        Gate(requests=text)


def test_other_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="units must be"):
        Gate(units="many")
    with pytest.raises(ValueError, match="connections must be from 1"):
        Gate(connections=0)
    with pytest.raises(TypeError, match="connections must be an integer"):
        Gate(connections="4")  # type: ignore[arg-type]  # the mistake that is tested
    with pytest.raises(ValueError, match="burst must be"):
        Gate("5/s", burst=0.5)
    with pytest.raises(ValueError, match="burst goes with requests"):
        Gate(units="5/s", burst=5)
    with pytest.raises(ValueError, match="no gate 'cds'; there are cdse, sentinelhub"):
        Gate.preset("cds")
    with pytest.raises(ValueError, match="cost must be"):
        Gate("5/s").acquire(cost=-1)
    with pytest.raises(ValueError, match="no slash"):
        Gate("5/s", name="a/b")


def test_the_presets_are_gates() -> None:
    for name in PRESETS:
        Gate.preset(name).close()
    assert Gate.preset("cdse").stats().connections == 4
    assert Gate.preset("cdse", connections=None, requests="10/s").stats().requests == 10.0


@given(
    st.floats(0.1, 1000),
    st.floats(1, 50),
    st.lists(st.tuples(st.floats(0, 3), st.floats(0, 1)), min_size=1, max_size=60),
)
def test_no_span_of_time_holds_more_than_burst_and_rate_allow(
    rate: float, burst: float, arrivals: list[tuple[float, float]]
) -> None:
    """The defining property of GCRA, for costs that fit the burst."""
    lane, now = Lane(rate, burst), 50.0
    gone: list[tuple[float, float]] = []
    for gap, cost in arrivals:
        now += gap
        moment = lane.earliest(now)
        lane = lane._replace(tat=lane.tat_after(moment, cost))
        gone.append((moment, cost))
    for first, (begin, _) in enumerate(gone):
        total = 0.0
        for moment, cost in gone[first:]:
            total += cost
            assert total <= burst + rate * (moment - begin) + 1e-6


def test_a_learned_rate_is_cut_and_grows() -> None:
    assert cut_rate(None, 10.0) == pytest.approx(7.0)
    assert cut_rate(8.0, 10.0) == pytest.approx(5.6), "not more than it was"
    assert cut_rate(8.0, None) == pytest.approx(5.6), "too few requests tell nothing"
    assert cut_rate(None, None) is None
    assert cut_rate(8.0, 0.001) == pytest.approx(1 / 60), "and never to a stop"
    assert grown_rate(6.0, 5.0) == pytest.approx(8.0)


def test_a_rate_far_above_what_is_used_is_forgotten() -> None:
    assert grown_rate(1.0, 86_400.0, used=1000.0) == pytest.approx(5761.0)
    assert grown_rate(1.0, 86_400.0, used=100.0) is None
    assert grown_rate(1.0, 100.0) is not None
    assert grown_rate(1.0, 110.0) is None


def test_what_the_server_took_is_counted_over_busy_time() -> None:
    usage = Usage()
    for number in range(10):
        usage = usage.with_one(asked=100.0 + number, moment=100.5 + number)
    assert usage.rate(109.5) == pytest.approx(10 / 9)
    assert usage.rate(NEVER) == pytest.approx(10 / 10), "of a silence no more than a second counts"
    assert usage.with_one(NEVER, NEVER + 90.0).busy == pytest.approx(100.0), "a wait does"
    assert usage._replace(passed=7.0).rate(109.5) is None
    for _ in range(1000):
        usage = usage.with_one(usage.last, usage.last + 0.01)
    assert usage.busy < 10.1
    assert usage.rate(usage.last) == pytest.approx(100, rel=0.3), "what went lately"


# On a clock of its own


def test_requests_go_evenly(watch: Stopwatch) -> None:
    assert moments(gate_on(watch, "5/s"), watch, 5) == [0.0, 0.2, 0.4, 0.6, 0.8]


def test_a_burst_goes_at_once_after_a_silence_and_only_then(watch: Stopwatch) -> None:
    gate = gate_on(watch, "10/s", burst=3)
    assert moments(gate, watch, 5) == [0.0, 0.0, 0.0, 0.1, 0.2]
    watch.sleep(NEVER)
    assert moments(gate, watch, 5) == [0.0, 0.0, 0.0, 0.1, 0.2]


def test_a_free_gate_lets_all_go_and_counts_nothing(watch: Stopwatch) -> None:
    gate = gate_on(watch)
    assert moments(gate, watch, 100) == [0.0] * 100
    assert gate.stats().waits == 0
    assert repr(gate) == "<Gate no limits>"


def test_all_limits_must_pass(watch: Stopwatch) -> None:
    gate = gate_on(watch, "10/s", "4/s", burst=1)
    assert moments(gate, watch, 3, cost=1.0) == [0.0, 0.25, 0.5]
    watch.sleep(NEVER)
    assert moments(gate, watch, 3, cost=0.1) == [0.0, 0.1, 0.2]


def test_what_costs_more_than_the_burst_is_paid_afterwards(watch: Stopwatch) -> None:
    assert moments(gate_on(watch, units="5/s"), watch, 3, cost=10.0) == [0.0, 2.0, 4.0]


def test_the_real_cost_is_settled(watch: Stopwatch) -> None:
    gate = gate_on(watch, units="1/s")
    ticket = gate.acquire()
    ticket.heed(200, {"x-processingunits-spent": "3.5"})
    ticket.heed(200, {"x-processingunits-spent": "3.5"})
    assert moments(gate, watch, 1) == [3.5]
    ticket = gate.acquire(cost=5)
    ticket.settle(0.5)
    assert moments(gate, watch, 2) == [0.5, 1.5]
    gate.acquire().heed(200, {"x-processingunits-spent": "unknown"})


def test_waits_are_counted(watch: Stopwatch) -> None:
    gate = gate_on(watch, "5/s")
    moments(gate, watch, 5)
    stats = gate.stats()
    assert (stats.waits, round(stats.waited, 6)) == (4, 0.8)


def go_times(tickets: list[Ticket], watch: Stopwatch) -> list[float]:
    """Look at tickets every so often until all have gone; return when they did, in seconds from now."""
    begun, gone = watch.now, dict[int, float]()
    while len(gone) < len(tickets):
        for index, ticket in enumerate(tickets):
            if index not in gone and not ticket.due_in():
                gone[index] = round(watch.now - begun, 2)
        watch.sleep(0.01)
    return [gone[index] for index in range(len(tickets))]


def test_tickets_get_their_moments_in_the_order_they_ask(watch: Stopwatch) -> None:
    gate = gate_on(watch, "5/s")
    tickets = [gate.try_acquire() for _ in range(4)]
    assert go_times(tickets, watch) == pytest.approx([0.0, 0.2, 0.4, 0.6], abs=0.011)


def test_no_moment_is_given_out_far_ahead(watch: Stopwatch) -> None:
    """So those who give up or die in the queue take none along."""
    gate = gate_on(watch, "1/min")
    gate.acquire().release()
    tickets = [gate.try_acquire() for _ in range(10)]
    for ticket in tickets:
        assert 0 < ticket.due_in() <= 0.1, "it is worth another look soon"
        ticket.release()
    assert moments(gate, watch, 1) == [pytest.approx(60.0)]


def test_what_is_given_back_before_its_moment_is_not_counted(watch: Stopwatch) -> None:
    gate = gate_on(watch, "5/s", "5/s")
    gate.acquire().release()
    first, second = gate.try_acquire(), gate.try_acquire(cost=2)
    assert first.due_in() == pytest.approx(0.2)
    first.release()
    first.release()
    assert second.due_in() == pytest.approx(0.2)
    watch.sleep(0.2)
    assert second.due_in() == 0
    second.release()
    assert moments(gate, watch, 1) == [pytest.approx(0.4)], "one that was used stays counted"


def test_who_waits_here_is_not_starved_by_leases_that_are_given_further_ahead(watch: Stopwatch) -> None:
    gate = gate_on(watch, "10/s", burst=1)
    ticket = gate.try_acquire()
    for _ in range(20):
        gate.reserve(10, 1.0, within=0.5)
        if not ticket.due_in():
            return
        watch.sleep(0.1)
    pytest.fail("it never came to its turn")


def test_what_is_given_back_from_amid_others_stays_counted(watch: Stopwatch) -> None:
    gate = gate_on(watch, "10/s", burst=1)
    tickets = [gate.try_acquire() for _ in range(3)]
    assert [round(ticket.due_in(), 6) for ticket in tickets] == [0.0, 0.1, 0.2]
    tickets[1].release()
    assert moments(gate, watch, 1) == [pytest.approx(0.3)]


def test_a_refusal_holds_everybody_back_and_no_burst_comes_after_it(watch: Stopwatch) -> None:
    gate = gate_on(watch, "10/s", burst=5)
    other = gate_on_same(gate, watch)
    gate.acquire().heed(429, {"retry-after": "3"})
    assert gate.stats().paused_for == pytest.approx(3.0)
    assert moments(other, watch, 4) == [3.0, 3.1, 3.2, 3.3]
    assert (gate.stats().refusals, gate.stats().pauses) == (1, 1)


def test_who_waits_already_is_held_back_too_and_keeps_the_order(watch: Stopwatch) -> None:
    gate = gate_on(watch, "10/s", burst=1)
    tickets = [gate.try_acquire() for _ in range(3)]
    assert [round(ticket.due_in(), 6) for ticket in tickets] == [0.0, 0.1, 0.2]
    tickets[0].heed(503, {"retry-after": "2"})
    watch.sleep(1.0)
    assert go_times(tickets[1:], watch) == pytest.approx([1.0, 1.1], abs=0.011)


@pytest.mark.parametrize(
    ("status", "fields", "unit", "pause"),
    [
        (429, {"retry-after": "1500"}, "ms", 1.5),
        (429, {}, "s", 1.0),
        (503, {}, "s", 0.0),
        (503, {"retry-after": "5"}, "s", 5.0),
        (500, {"retry-after": "5"}, "s", 0.0),
        (429, {"retry-after": "90000"}, "s", 120.0),
    ],
)
def test_the_provider_says_what_the_number_counts(
    watch: Stopwatch, status: int, fields: dict[str, str], unit: str, pause: float
) -> None:
    gate = gate_on(watch, "10/s")
    gate.acquire().heed(status, fields, unit)  # type: ignore[arg-type]  # the two there are
    assert gate.stats().paused_for == pytest.approx(pause)


def test_without_a_rate_they_come_back_spread(watch: Stopwatch) -> None:
    gate = gate_on(watch)
    gate.acquire().heed(429, {"retry-after": "3"})
    waits = sorted(gate.try_acquire().due_in() for _ in range(50))
    assert waits[0] >= 3.0
    assert waits[-1] <= 4.0
    assert waits[-1] - waits[0] > 0.5


def test_repeated_refusals_teach_a_rate_that_recovers(watch: Stopwatch) -> None:
    gate = gate_on(watch)
    gate.acquire().heed(429, {"retry-after": "1"})
    assert gate.stats().learned is None, "the first one tells nothing of the rate"
    watch.sleep(2.0)
    for _ in range(20):
        ticket = gate.acquire()
        watch.sleep(0.1)
    ticket.heed(429, {"retry-after": "1"})
    learned = gate.stats().learned or 0.0
    assert learned == pytest.approx(0.7 * 20 / 2.0)
    ticket.heed(429, {"retry-after": "1"})
    assert gate.stats().learned == learned, "an echo teaches nothing"
    assert gate.stats().refusals == 2
    watch.sleep(15.0)
    assert gate.stats().learned == pytest.approx(2 * learned)
    steps = moments(gate, watch, 12)
    assert steps[-1] - steps[-2] == pytest.approx(1 / (2 * learned), rel=0.2)
    assert "learned" in repr(gate)


def use(gate: Gate, watch: Stopwatch, count: int, every: float) -> Ticket:
    """Send requests that take so long each; return the last one's ticket."""
    for _ in range(count):
        ticket = gate.acquire()
        watch.sleep(every)
    return ticket


def test_a_silence_before_a_refusal_does_not_count_against_the_rate(watch: Stopwatch) -> None:
    gate = gate_on(watch)
    gate.acquire().heed(429, {"retry-after": "1"})
    watch.sleep(600)
    use(gate, watch, 8, every=0.1).heed(429, {"retry-after": "1"})
    assert (gate.stats().learned or 0.0) > 2


def test_waits_follow_a_learned_rate_as_it_grows(watch: Stopwatch) -> None:
    gate = gate_on(watch)
    gate.acquire().heed(429, {"retry-after": "1"})
    watch.sleep(2)
    use(gate, watch, 8, every=0.1)
    for _ in range(30):
        gate.pause(0, learn=True)
    learned = gate.stats().learned or 0.0
    assert learned == pytest.approx(1 / 60)
    gate.acquire().release()
    waited = moments(gate, watch, 1)[0]
    assert waited < 0.75 / learned, "less than at the rate of when it began to wait"


def test_a_learned_rate_that_is_not_used_is_forgotten(watch: Stopwatch) -> None:
    gate = gate_on(watch)
    gate.acquire().heed(429, {"retry-after": "1"})
    watch.sleep(2)
    use(gate, watch, 20, every=0.1).heed(429, {"retry-after": "1"})
    watch.sleep(10)
    assert gate.stats().learned is not None
    watch.sleep(86_400)
    assert gate.stats().learned is None
    assert moments(gate, watch, 50) == [0.0] * 50


def test_a_503_teaches_no_rate(watch: Stopwatch) -> None:
    gate = gate_on(watch)
    gate.acquire().heed(503, {"retry-after": "1"})
    watch.sleep(2)
    use(gate, watch, 20, every=0.1).heed(503, {"retry-after": "1"})
    assert (gate.stats().learned, gate.stats().refusals, gate.stats().pauses) == (None, 0, 2)


def test_an_echo_that_asks_for_no_more_changes_nothing(watch: Stopwatch) -> None:
    gate = gate_on(watch, "5/s")
    first, echo = gate.acquire(), gate.acquire()
    first.heed(429, {"retry-after": "1"})
    watch.sleep(1.0)
    ticket = gate.acquire()
    waiting = gate.try_acquire()
    assert waiting.due_in() == pytest.approx(0.2)
    echo.heed(429, {"retry-after": "0"})
    assert waiting.due_in() == pytest.approx(0.2), "its moment is good still"
    assert (gate.stats().pauses, gate.stats().paused_for) == (1, 0.0)
    ticket.release()


def test_a_shorter_pause_does_not_end_a_longer_one(watch: Stopwatch) -> None:
    gate = gate_on(watch, "5/s")
    gate.pause(5)
    gate.pause(1)
    assert gate.stats().paused_for == pytest.approx(5)
    assert moments(gate, watch, 1) == [pytest.approx(5.0)]


def test_a_refund_from_before_a_pause_is_void(watch: Stopwatch) -> None:
    gate = gate_on(watch, units="100/s")
    ticket = gate.acquire(cost=4)
    gate.pause(1)
    ticket.settle(0.5)
    assert moments(gate, watch, 3) == pytest.approx([1.0, 1.01, 1.02]), "else there would be a burst"


@pytest.mark.parametrize("number", [math.nan, math.inf, -1, -0.001])
def test_numbers_out_of_range_are_refused(number: float) -> None:
    gate = Gate("5/s")
    for call in (gate.acquire, gate.try_acquire, gate.pause, gate.acquire().settle):
        with pytest.raises(ValueError, match="must be a finite number from 0"):
            call(number)


@pytest.mark.parametrize("number", [True, "1", None, [1]])
def test_what_is_no_number_is_refused(number: Any) -> None:
    gate = Gate("5/s")
    for call in (gate.acquire, gate.try_acquire, gate.pause, gate.acquire().settle):
        with pytest.raises(TypeError, match="must be a number, not"):
            call(number)


def test_a_pause_by_date_begins_before_the_date_is_read(watch: Stopwatch) -> None:
    gate = gate_on(watch)
    gate.acquire().heed(503, {"Retry-After": "Fri, 01 Jan 2100 00:00:00 GMT"})
    assert gate.stats().paused_for == pytest.approx(120)
    assert gate.stats().pauses == 1
    gate.acquire().heed(429, {"Retry-After": "Thu, 01 Jan 1970 00:00:00 GMT"})
    assert gate.stats().paused_for == pytest.approx(1)


@pytest.mark.slow
def test_a_refusal_is_heeded_without_importing_anything_first(child_env: dict[str, str]) -> None:
    code = """
import sys
from shpool.gate import Gate
gate = Gate()
ticket = gate.acquire()
before = set(sys.modules)
ticket.heed(429, {"retry-after": "3"})
gate.try_acquire().due_in()
sys.exit(str(set(sys.modules) - before) if set(sys.modules) - before else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], env=child_env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_header_names_compare_without_case(watch: Stopwatch) -> None:
    gate = gate_on(watch, units="1/s")
    gate.acquire().heed(429, {"Retry-After": "3", "X-ProcessingUnits-Spent": "0.5"})
    assert gate.stats().paused_for == pytest.approx(3)


def test_the_gate_knows_what_a_number_counts(watch: Stopwatch) -> None:
    gate = gate_on(watch)
    gate.retry_after_unit = "ms"
    gate.acquire().heed(429, {"retry-after": "1500"})
    assert gate.stats().paused_for == pytest.approx(1.5)
    gate.acquire().heed(429, {"retry-after": "3"}, "s")
    assert gate.stats().paused_for == pytest.approx(3)


def test_a_rate_that_was_given_is_kept_whatever_is_refused(watch: Stopwatch) -> None:
    gate = gate_on(watch, "10/s", burst=1)
    for _ in range(3):
        gate.acquire().heed(429, {"retry-after": "1"})
    assert gate.stats().learned is None
    watch.sleep(5)
    assert moments(gate, watch, 3) == [0.0, 0.1, 0.2]


def gate_on_same(gate: Gate, watch: Stopwatch) -> Gate:
    """Return a second hold on a gate, with the same clock."""
    other = sibling(gate)
    other._clock, other._sleep = watch, watch.sleep
    return other


# Connection slots


def test_so_many_connections_and_no_more() -> None:
    gate = Gate(connections=2)
    other = sibling(gate)
    first, second = gate.acquire(), other.acquire()
    third = other.try_acquire()
    assert third.due_in() > 0
    assert gate.stats().connected == 2
    first.release()
    first.release()
    assert third.due_in() == 0
    assert gate.try_acquire().due_in() > 0
    second.release()
    third.release()
    assert gate.stats().connected == 0


def test_slots_go_to_those_who_wait_in_their_order() -> None:
    gate = Gate(connections=1)
    holds = [gate, sibling(gate), sibling(gate)]
    taken = gate.acquire()
    waiting = [hold.try_acquire() for hold in holds]
    for ticket in waiting:
        assert ticket.due_in() > 0
    taken.release()
    newcomer = gate.try_acquire()
    assert newcomer.due_in() > 0, "it may not overtake"
    assert waiting[1].due_in() > 0
    assert waiting[0].due_in() == 0
    waiting[0].release()
    assert waiting[2].due_in() > 0
    assert waiting[1].due_in() == 0


def test_who_looks_no_more_is_passed_over(watch: Stopwatch) -> None:
    gate = gate_on(watch, connections=1)
    taken = gate.acquire()
    stopped, alive = gate.try_acquire(), gate.try_acquire()
    assert stopped.due_in() > 0
    assert alive.due_in() > 0
    taken.release()
    watch.sleep(0.2)
    assert alive.due_in() > 0, "the first may still come"
    watch.sleep(0.2)
    assert alive.due_in() == 0


def test_a_ticket_that_is_forgotten_gives_its_slot_back() -> None:
    gate = Gate(connections=1)
    gate.acquire()
    assert gate.stats().connected == 0
    ticket = gate.acquire()
    waiting = gate.try_acquire()
    assert waiting.due_in() > 0
    del waiting
    ticket.release()
    assert gate.try_acquire().due_in() == 0


def test_more_wait_than_there_are_places(watch: Stopwatch) -> None:
    gate = gate_on(watch, connections=1)
    taken = gate.acquire()
    waiting = [gate.try_acquire() for _ in range(200)]
    assert all(ticket.due_in() > 0 for ticket in waiting)
    taken.release()
    for ticket in waiting:
        while ticket.due_in():
            watch.sleep(0.01)
        ticket.release()
    assert gate.stats().connected == 0


def test_threads_of_a_process_share_the_slots() -> None:
    gate, most, now = Gate(connections=3), [0], [0]
    guard = threading.Lock()

    def work() -> None:
        for _ in range(20):
            with gate.acquire():
                with guard:
                    now[0] += 1
                    most[0] = max(most[0], now[0])
                time.sleep(0.0005)
                with guard:
                    now[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 3
    assert gate.stats().connected == 0


def test_a_slot_is_taken_only_when_the_rate_lets_its_ticket_go_soon(watch: Stopwatch) -> None:
    gate = gate_on(watch, "1/s", connections=1)
    gate.acquire().release()
    ticket = gate.try_acquire()
    assert ticket.due_in() > 0
    assert gate.stats().connected == 0
    watch.sleep(0.8)
    assert ticket.due_in() == pytest.approx(0.2)
    assert gate.stats().connected == 1


def test_a_pause_returns_the_slots_of_those_who_have_not_gone(watch: Stopwatch) -> None:
    """Else who has a slot, and who is before it in the queue, would wait for each other."""
    gate = gate_on(watch, "10/s", connections=1)
    gate.acquire().release()
    holder, waiting = gate.try_acquire(), gate.try_acquire()
    assert holder.due_in() == pytest.approx(0.1)
    assert waiting.due_in() > 0
    gate.pause(5)
    assert waiting.due_in() > 0
    assert holder.due_in() > 0
    assert gate.stats().connected == 0
    watch.sleep(5)
    assert holder.due_in() == 0
    assert waiting.due_in() > 0


# Other processes

_USER = """
import os, sys, time
from shpool.gate import Gate
gate = Gate(*[arg or None for arg in sys.argv[2:4]], connections=int(sys.argv[4]) or None, name=sys.argv[1])
"""


@contextlib.contextmanager
def user_of(
    name: str, code: str, env: dict[str, str], *, requests: str = "", connections: int = 0
) -> Iterator[subprocess.Popen[str]]:
    """Run a process that uses a named gate; it prints a line once it is where the test wants it."""
    command = [sys.executable, "-c", _USER + code, name, requests, "", str(connections)]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            yield process
        finally:
            process.kill()


@pytest.mark.slow
def test_a_killed_waiter_stops_nobody_and_its_place_is_given_away(
    watch: Stopwatch, memory_name: str, child_env: dict[str, str]
) -> None:
    """On a clock that stands still: its death is seen in its lock, not in its silence (rule 9)."""
    code = """
waiting = [gate.try_acquire() for _ in range(128)]
for ticket in waiting:
    ticket.due_in()
print('up', flush=True)
time.sleep(600)"""
    gate = Gate(connections=1, name=memory_name, _clock=watch, _sleep=watch.sleep)
    taken = gate.acquire()
    with user_of(memory_name, code, child_env, connections=1) as process:
        watch.now = gate._segment.floats[LOOKED]
        ticket = gate.try_acquire()
        assert ticket.due_in() > 0
        assert ticket.place == -1, "all are taken"
        taken.release()
        assert ticket.due_in() > 0, "others wait before it"
        process.kill()
        process.wait()
        assert ticket.due_in() == 0
        other = gate.try_acquire()
        assert other.due_in() > 0
        assert other.place >= 0
    other.release()
    ticket.release()
    gate.close()


@pytest.mark.slow
def test_a_killed_holder_of_slots_leaks_none(memory_name: str, child_env: dict[str, str]) -> None:
    code = "held = [gate.acquire() for _ in range(3)]\nprint('up', flush=True)\ntime.sleep(600)"
    gate = Gate(connections=3, name=memory_name)
    with user_of(memory_name, code, child_env, connections=3) as process:
        ticket = gate.try_acquire()
        assert ticket.due_in() > 0
        process.kill()
        held = [in_time(gate.acquire) for _ in range(2)]
        until(lambda: not ticket.due_in())
    assert gate.stats().connected == len(held) + 1
    gate.close()


@pytest.mark.slow
def test_a_holder_that_is_killed_under_the_mutex_stops_nobody(memory_name: str, child_env: dict[str, str]) -> None:
    code = "gate._segment.__enter__()\nprint('up', flush=True)\ntime.sleep(600)"
    gate = Gate("1000/s", name=memory_name)
    with user_of(memory_name, code, child_env, requests="1000/s") as process:
        threading.Timer(0.1, process.kill).start()
        in_time(gate.acquire)
        assert process.wait() == -signal.SIGKILL
    gate.close()


@pytest.mark.slow
def test_a_name_is_shared_and_goes_with_the_last_user(memory_name: str, child_env: dict[str, str]) -> None:
    with user_of(memory_name, "gate.pause(100)\nprint('up', flush=True)\ninput()", child_env, requests="5/s"):
        gate = Gate("5/s", name=memory_name)
        assert gate.stats().paused_for > 50
        with pytest.raises(GateInUseError, match=r"in use with other limits: 5 requests/s, not 6 requests/s"):
            Gate("6/s", name=memory_name)
    entry = _SHM / (_PREFIX + memory_name)
    assert entry.stat().st_mode & 0o777 == 0o600
    assert sweep_left() == [] or memory_name not in sweep_left()
    gate.close()
    assert not entry.exists()


@pytest.mark.slow
def test_what_the_killed_left_is_made_anew_or_swept(memory_name: str, child_env: dict[str, str]) -> None:
    code = "gate.pause(100)\nprint('up', flush=True)\ninput()"
    with user_of(f"{memory_name}-0", code, child_env), user_of(f"{memory_name}-1", code, child_env):
        pass  # both are killed here
    assert (_SHM / (_PREFIX + memory_name + "-0")).exists()
    gate = Gate("6/s", name=f"{memory_name}-0")
    assert gate.stats().paused_for == 0
    assert not (_SHM / (_PREFIX + memory_name + "-1")).exists()
    gate.close()


def test_what_is_no_gate_is_left_alone(memory_name: str) -> None:
    entry = _SHM / (_PREFIX + memory_name)
    entry.write_bytes(b"something else")
    entry.chmod(0o600)
    try:
        with pytest.raises(GateUnusableError, match=f"gate '{memory_name}' cannot be used: .* is no gate"):
            Gate("5/s", name=memory_name)
        assert entry.read_bytes() == b"something else"
        entry.chmod(0o666)
        with pytest.raises(GateUnusableError, match="lets other users in; choose another name"):
            Gate("5/s", name=memory_name)
    finally:
        entry.unlink()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_is_a_process_of_its_own() -> None:
    """Rule 5: it must not take its parent's slots for its own, nor keep them when the parent is gone."""
    gate = Gate(connections=1)
    ticket = gate.acquire()
    pid = os.fork()
    if pid == 0:
        waits = gate.try_acquire().due_in() > 0
        ticket.release()  # not its own to give back
        os._exit(0 if waits and gate.try_acquire().due_in() > 0 else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert gate.stats().connected == 1
    ticket.release()
    assert gate.try_acquire().due_in() == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_keeps_the_name_when_its_parent_leaves(memory_name: str) -> None:
    """Rule 10: it is present by itself."""
    gate = Gate("5/s", name=memory_name)
    ready, go = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(ready[1], b".")
        os.read(go[0], 1)
        gate.close()
        os._exit(0)
    try:
        os.read(ready[0], 1)
        gate.close()
        with pytest.raises(GateInUseError):
            Gate("6/s", name=memory_name)
    finally:
        os.write(go[1], b".")
        os.waitpid(pid, 0)
        for end in (*ready, *go):
            os.close(end)
    assert not (_SHM / (_PREFIX + memory_name)).exists()


def test_nobody_can_resize_what_has_no_name() -> None:
    gate = Gate("5/s")
    with pytest.raises(PermissionError):
        os.ftruncate(gate._segment.descriptor, 0)
    assert os.fstat(gate._segment.descriptor).st_size == SEGMENT_SIZE


def test_a_closed_gate_tells_how_it_stood() -> None:
    gate = Gate("5/s", connections=2)
    ticket = gate.acquire()
    gate.close()
    gate.close()
    assert gate.stats().connected == 0, "its slots went with it"
    ticket.release()
    assert gate.stats().requests == 5.0
    with pytest.raises(ValueError, match="the gate is closed"):
        gate.acquire()


@pytest.mark.parametrize("connections", [None, 1])
def test_who_waits_in_a_gate_that_is_closed_is_told(watch: Stopwatch, connections: int | None) -> None:
    gate = gate_on(watch, connections=connections)
    gate.pause(100)

    def sleep(seconds: float) -> None:
        watch.sleep(seconds)
        gate.close()

    gate._sleep = sleep
    with pytest.raises(ValueError, match="the gate is closed"):
        gate.acquire()
    assert watch.now < 110


@pytest.mark.slow
def test_no_limit_is_promised_where_it_cannot_be_kept(child_env: dict[str, str]) -> None:
    """As on macOS, whose fcntl knows no locks of open files."""
    code = """
import fcntl
del fcntl.F_OFD_SETLK
from shpool import Gate
from shpool.errors import GateUnusableError
for options in {"requests": "5/s"}, {"units": "5/s"}, {"connections": 4}, {"name": "account"}:
    try:
        Gate(**options)
    except GateUnusableError as exc:
        assert "no locks that belong to open files" in str(exc), exc
    else:
        raise AssertionError(options)
gate = Gate()
gate.acquire().heed(429, {"retry-after": "3"})
assert gate.stats().paused_for > 0 and gate.try_acquire().due_in() > 0
"""
    done = subprocess.run([sys.executable, "-c", code], env=child_env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_limits_say_themselves_in_words() -> None:
    assert str(Limits.parse("300/min", "60/min", 4)) == "5 requests/s, 1 units/s, 4 connections"
    assert usual_burst(5.0) == 1.0
    assert isinstance(Gate().acquire(), Ticket)
