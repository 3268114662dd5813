"""Leases of the gate: the driver's office and the workers' gates, on wires that a test can cut, by its own clock."""

from __future__ import annotations

import functools
import gc
import itertools
from typing import TYPE_CHECKING

import pytest
from patience import PATIENCE, in_time, until

from shpool.engines.drivers_clock import DriversClock
from shpool.engines.lease_office import LeaseOffice
from shpool.engines.leased_gate import LeasedGate
from shpool.engines.leases import LATEST, LEASE, LONGEST_SILENCE, WITHIN, Ask, Grant
from shpool.errors import GateUnreachableError
from shpool.gate import Gate, Terms, Ticket

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Hand:
    """A clock that the test moves."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Wires:
    """The driver and its workers, in one process.

    Args:
        gate: The driver's.
        clock: Of all of them.
    """

    def __init__(self, gate: Gate, clock: Hand) -> None:
        self.clock = clock
        self.gate = gate
        self.office = LeaseOffice(gate, self.deliver, clock)
        self.office.start()
        self.workers: dict[str, LeasedGate] = {}
        self.asks: list[tuple[str, Ask]] = []
        self.grants: list[Grant] = []
        self.is_cut = False
        self.is_broken = False

    def add(self, name: str) -> LeasedGate:
        """Let a worker join."""

        def tell(note: bytes) -> None:
            self.asks.append((name, Ask.from_bytes(note)))
            if not self.is_cut:
                self.office.asked(name, note)

        worker = self.workers[name] = LeasedGate(tell, clock=self.clock)
        self.office.joined(name)
        until(lambda: worker._terms is not None)
        return worker

    def deliver(self, name: str | None, note: bytes) -> None:
        if self.is_broken:
            reason = "the wires are broken"
            raise OSError(reason)
        self.grants.append(Grant.from_bytes(note))
        for worker in self.workers.values() if name is None else [self.workers[name]]:
            if not self.is_cut:
                worker.take(note)

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()
        for worker in self.workers.values():
            if worker._thread is not None:
                worker._thread.join(PATIENCE)
        self.office.close()
        self.gate.close()


@pytest.fixture
def wired() -> Iterator[Callable[..., Wires]]:
    made: list[Wires] = []

    def wire(requests: str | None = None, units: str | None = None, connections: int | None = None) -> Wires:
        clock = Hand()
        made.append(Wires(Gate(requests, units, connections, _clock=clock), clock))
        return made[-1]

    yield wire
    for wires in made:
        wires.close()


def moment_of(gate: LeasedGate, ticket: Ticket) -> float:
    """Wait until a ticket has its moment; the clock stands still meanwhile."""
    until(lambda: gate.advance(ticket) is not None and ticket.moment is not None)
    assert ticket.moment is not None
    return ticket.moment


# Rates


def test_the_moments_of_two_workers_are_one_step_apart(wired: Callable[..., Wires]) -> None:
    wires = wired("10/s")
    gates = [wires.add("a"), wires.add("b")]
    moments = []
    for turn in range(20):
        gate = gates[turn % 2]
        moments.append(moment_of(gate, gate.try_acquire()))
        wires.clock.now = max(wires.clock.now, moments[-1])
    moments.sort()
    assert all(later - earlier > 0.1 - 1e-6 for earlier, later in itertools.pairwise(moments))


def test_a_busy_worker_asks_once_for_many(wired: Callable[..., Wires]) -> None:
    wires = wired("1000/s")
    gate = wires.add("a")
    for _ in range(400):
        wires.clock.now = max(wires.clock.now, moment_of(gate, gate.try_acquire()))
    assert len(wires.asks) < 100
    for grant in wires.grants:
        for _, moments in grant.moments:
            assert moments[-1] - grant.sent <= WITHIN + 0.01


def test_a_moment_that_nobody_took_in_time_is_void(wired: Callable[..., Wires]) -> None:
    wires = wired("1000/s")
    gate = wires.add("a")
    for _ in range(50):
        wires.clock.now = max(wires.clock.now, moment_of(gate, gate.try_acquire()))
    wires.clock.now += WITHIN + LATEST + 0.1
    assert moment_of(gate, gate.try_acquire()) >= wires.clock.now - LATEST


def test_a_message_that_is_late_moves_no_moment() -> None:
    clock = DriversClock()
    clock.hear(sent=10.0, received=110.001, asked=110.0)
    clock.hear(sent=11.0, received=111.8, asked=111.0)
    assert clock.here(12.0) == pytest.approx(112.001, abs=0.002)
    assert clock.lateness == pytest.approx(0.8, abs=0.01)


def test_a_host_that_has_slept_is_reckoned_anew() -> None:
    clock = DriversClock()
    clock.hear(sent=10.0, received=110.0, asked=109.9)
    clock.hear(sent=20.0, received=150.0, asked=149.9)
    assert clock.here(21.0) == pytest.approx(151.0)


def test_what_requests_have_cost_reaches_the_driver(wired: Callable[..., Wires]) -> None:
    wires = wired(units="10/s")
    gate = wires.add("a")
    ticket = gate.try_acquire()
    moment_of(gate, ticket)
    ticket.settle(21.0)
    wires.clock.now += 1.0
    until(lambda: any(ask.spent for _, ask in wires.asks))
    assert moment_of(gate, gate.try_acquire()) > wires.clock.now + 0.9


# Refusals


def test_without_limits_nothing_is_asked(wired: Callable[..., Wires]) -> None:
    wires = wired()
    gate = wires.add("a")
    for _ in range(10):
        with gate.acquire() as ticket:
            ticket.heed(200, {})
    assert not wires.asks
    assert gate._thread is None


def test_a_refusal_stops_its_worker_at_once_and_the_others_soon(wired: Callable[..., Wires]) -> None:
    wires = wired()
    first, second = wires.add("a"), wires.add("b")
    ticket = first.acquire()
    wires.is_cut = True
    ticket.heed(429, {"retry-after": "3"})
    assert first.advance(first.try_acquire()) > 0
    wires.is_cut = False
    wires.office.asked("a", wires.asks[0][1].to_bytes())
    until(lambda: not second._is_free)
    for gate in (first, second):
        assert moment_of(gate, gate.try_acquire()) >= 1003.0
    assert wires.gate.stats().pauses == 1


def test_an_echo_of_a_refusal_teaches_nothing(wired: Callable[..., Wires]) -> None:
    wires = wired()
    first, second = wires.add("a"), wires.add("b")
    tickets = [first.acquire(), second.acquire()]
    for ticket in tickets:
        ticket.heed(429, {"retry-after": "3"})
    until(lambda: first._terms is not None and first._terms.epoch > 0)
    until(lambda: wires.gate.stats().pauses > 0)
    assert wires.gate.stats().refusals == 1


def test_what_was_granted_before_a_refusal_is_void(wired: Callable[..., Wires]) -> None:
    wires = wired("10/s")
    gate = wires.add("a")
    ticket = gate.acquire()
    wires.is_cut = True
    gate.pause(3.0, ticket)
    stale = Grant(10**6, 1000.0, None, Terms(ticket.epoch, 0.0, True, False, 0), ((1.0, (1000.0,)),))
    gate.take(stale.to_bytes())
    late = gate.try_acquire()
    assert gate.advance(late) > 0
    assert late.moment is None


def test_terms_of_before_a_refusal_do_not_free_a_worker(wired: Callable[..., Wires]) -> None:
    wires = wired()
    gate = wires.add("a")
    ticket = gate.acquire()
    wires.is_cut = True
    gate.pause(3.0, ticket)
    gate.take(Grant(10**6, 1000.0, None, Terms(0, 0.0, False, False, 0)).to_bytes())
    assert gate.advance(gate.try_acquire()) >= 3.0


def test_a_pause_by_another_pool_reaches_the_workers(wired: Callable[..., Wires]) -> None:
    wires = wired("10/s")
    gate = wires.add("a")
    ticket = gate.acquire()
    wires.gate.pause(5.0)
    wires.clock.now += 0.2
    until(lambda: gate._epoch != ticket.epoch)
    assert moment_of(gate, gate.try_acquire()) >= 1005.0


# Connections


def test_a_slot_goes_from_hand_to_hand(wired: Callable[..., Wires]) -> None:
    wires = wired(connections=1)
    first, second = wires.add("a"), wires.add("b")
    ticket = first.acquire()
    other = second.try_acquire()
    assert second.advance(other) > 0
    until(lambda: first._slots.is_contended)
    assert other.slot < 0
    ticket.release()
    moment_of(second, other)
    assert other.is_connected
    assert wires.gate.stats().connected == 1


def test_a_slot_of_a_worker_that_is_gone_is_free(wired: Callable[..., Wires]) -> None:
    wires = wired(connections=1)
    first, second = wires.add("a"), wires.add("b")
    lost = first.acquire()
    wires.office.left("a")
    moment_of(second, second.try_acquire())
    assert lost.is_connected, "as nobody has told it"


def test_a_lease_that_is_not_renewed_ends_on_both_sides(wired: Callable[..., Wires]) -> None:
    wires = wired(connections=1)
    first = wires.add("a")
    first.acquire().release()
    wires.is_cut = True
    until(lambda: first._slots._idle)
    wires.clock.now += LEASE + 0.01
    ticket = first.try_acquire()
    assert first.advance(ticket) > 0
    assert ticket.slot < 0
    until(lambda: wires.gate.stats().connected == 0)


def test_a_forgotten_ticket_gives_its_slot_back(wired: Callable[..., Wires]) -> None:
    wires = wired(connections=1)
    first, second = wires.add("a"), wires.add("b")
    ticket = first.acquire()
    assert ticket.is_connected
    del ticket
    gc.collect()
    moment_of(second, second.try_acquire())


# The driver is gone


def test_who_hears_nothing_of_the_driver_gets_an_error(wired: Callable[..., Wires]) -> None:
    wires = wired("10/s")
    gate = wires.add("a")
    wires.is_cut = True
    ticket = gate.try_acquire()
    assert gate.advance(ticket) > 0
    wires.clock.now += LONGEST_SILENCE + 0.1
    with pytest.raises(GateUnreachableError, match="has not answered for 10 s"):
        gate.advance(ticket)


def test_a_grant_that_cannot_be_sent_costs_nobody_the_gate(
    wired: Callable[..., Wires], caplog: pytest.LogCaptureFixture
) -> None:
    """Neither one that nobody has asked for, nor an answer."""
    wires = wired("10/s")
    gate = wires.add("a")
    wires.is_broken = True
    wires.gate.pause(1.0)
    wires.clock.now += 0.2  # the office looks whether there are news
    until(lambda: "cannot be sent to the workers" in caplog.text)
    ticket = gate.try_acquire()
    until(lambda: gate.advance(ticket) is not None and "cannot be sent to a" in caplog.text)
    wires.is_broken = False
    wires.clock.now += 1.5  # the worker asks again
    assert moment_of(gate, ticket) >= 1001.0


def reached(things: list[int], count: int) -> bool:
    return len(things) >= count


def test_a_round_that_fails_is_told_once_and_is_not_the_last(
    wired: Callable[..., Wires], caplog: pytest.LogCaptureFixture
) -> None:
    wires = wired("10/s", connections=1)
    gate = wires.add("a")
    ticket = gate.try_acquire()
    moment_of(gate, ticket)
    failed = []

    def fail() -> bool:
        failed.append(1)
        raise OSError

    look, wires.gate.has_queue = wires.gate.has_queue, fail  # type: ignore[method-assign]  # as if its memory were gone
    for count in (1, 2, 3):
        wires.clock.now += 0.2
        until(functools.partial(reached, failed, count))
    wires.gate.has_queue = look  # type: ignore[method-assign]
    assert caplog.text.count("the gate cannot be looked after") == 1
    gate.release(ticket)
    assert moment_of(gate, gate.try_acquire()) is not None


def test_who_waits_when_the_pool_ends_gets_an_error(wired: Callable[..., Wires]) -> None:
    wires = wired("10/s")
    gate = wires.add("a")
    wires.is_cut = True
    gate.close()
    with pytest.raises(GateUnreachableError, match="the pool has ended"):
        in_time(gate.acquire)
